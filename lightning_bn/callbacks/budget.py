# SPDX-License-Identifier: Apache-2.0
"""How much of the training time a monitor takes, and by how much its interval has to grow to stay below a limit."""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median

LOOKS = 8
"""Due steps whose median is judged; the first few of a fit warm up and are left out."""
WARM_UP = 3


class Budget:
    """A clock for the due steps; used as a context manager, also within itself, it counts the time inside.

    Args:
        limit: largest share of the training time; None for none.
    """

    def __init__(self, limit: float | None) -> None:
        self.factor = 1
        """By how much the interval has grown."""
        self.latest = (0.0, 0.0)
        """Seconds of the last due step: measuring, and all else."""
        self._limit = limit
        self._began = self._entered = self._spent = 0.0
        self._depth = 0
        self._pairs: deque[tuple[float, float]] = deque(maxlen=LOOKS)
        self._seen = 0

    def __enter__(self) -> None:
        """Start counting."""
        if not self._depth:
            self._entered = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        """Stop counting."""
        self._depth -= 1
        if not self._depth:
            self._spent += time.perf_counter() - self._entered

    def begin(self) -> None:
        """A due step begins."""
        self._began, self._spent = time.perf_counter(), 0.0

    def end(self) -> None:
        """The due step is over."""
        self.latest = (self._spent, time.perf_counter() - self._began - self._spent)

    def judge(self, spent: float, rest: float, interval: int) -> float | None:
        """Take the seconds of one more due step, of the slowest rank, and widen the interval where they are too many.

        Args:
            spent: seconds that measuring took.
            rest: seconds of the same step without it.
            interval: steps from one due step to the next, without :attr:`factor`.

        Returns:
            The share of the training time that made the interval grow; None where it stays.
        """
        self._seen += rest > 0
        if self._limit is None or rest <= 0 or self._seen <= WARM_UP:
            return None
        self._pairs.append((spent, rest))
        if len(self._pairs) < LOOKS:
            return None
        cost = median(pair[0] for pair in self._pairs) / median(pair[1] for pair in self._pairs)
        share = cost / (interval * self.factor)
        if share <= self._limit:
            return None
        self.factor = math.ceil(cost / (interval * self._limit))
        self._pairs.clear()
        return share
