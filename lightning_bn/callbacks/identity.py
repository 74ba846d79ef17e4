# SPDX-License-Identifier: Apache-2.0
"""A checkpoint key of its own for each instance, that a resumed run finds again."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class Identity:
    """Gives each instance a ``state_key`` made from its class and from what it watches.

    Arguments that a resumed run may well change, such as an interval, are left out of the key. Lightning refuses a
    Trainer in which two stateful callbacks share a key. Instances that watch the same are therefore numbered by their
    place in the trainer; until they have one, when no checkpoint is written yet, they are told apart by address.
    """

    watches: ClassVar[tuple[str, ...]] = ()
    """Names of the constructor arguments that say what an instance watches."""

    added_by: str | None = None
    """What attached this instance where the user's code and config did not."""

    _place: int | None = None
    _key: str | None = None

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; read by Lightning."""
        if self._place is None:
            return f"{self.stem}@{id(self)}"
        if self._key is None:  # Lightning asks at every hook of every step
            self._key = self.stem if self._place == 0 else f"{self.stem}#{self._place + 1}"
        return self._key

    @property
    def stem(self) -> str:
        """The part of the key that twins share."""
        arguments = {name: getattr(self, name) for name in self.watches}
        return f"{type(self).__qualname__}{arguments!r}"

    def take_place(self, callbacks: Sequence[Any]) -> None:
        """Number this instance among those of its kind.

        Args:
            callbacks: all callbacks of the trainer, this one among them.
        """
        kin = [entry for entry in callbacks if isinstance(entry, Identity) and entry.stem == self.stem]
        self._key = None
        self._place = next((place for place, entry in enumerate(kin) if entry is self), 0)

    def arguments(self) -> dict[str, Any]:
        """What the constructor was given, by name; what a subclass does not keep is like nothing else."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name, object()) for name in names}

    def is_doubled(self, callbacks: Sequence[Any]) -> bool:
        """Whether another callback does the work of this one.

        Args:
            callbacks: all callbacks of the trainer, this one among them.

        Returns:
            True where one of this class with the same arguments stands before it, and, for an instance that the user
            did not attach, where the user attached any of this class.
        """
        if self.added_by:
            return any(isinstance(entry, type(self)) and not entry.added_by for entry in callbacks)
        before = itertools.takewhile(lambda entry: entry is not self, callbacks)
        twins = (entry for entry in before if type(entry) is type(self) and not entry.added_by)
        return any(entry.arguments() == self.arguments() for entry in twins)


def adopted_state(mine: Identity, callbacks: Sequence[Any], states: Mapping[str, Any]) -> Any | None:
    """The state that belongs to a callback whose key a checkpoint does not hold.

    What it watches may have changed between runs, and so may the numbers of twins: what is left over of a class in
    the checkpoint goes to what is left over of it in the trainer, in order.

    Args:
        mine: the callback that looks for its state.
        callbacks: all callbacks of the trainer.
        states: the states in the checkpoint by key.

    Returns:
        The state, or None where the key is there, or nothing is left over.
    """
    kin = [entry for entry in callbacks if type(entry) is type(mine)]
    lost = [entry for entry in kin if entry.state_key not in states]
    known = {entry.state_key for entry in kin}
    prefix = f"{type(mine).__qualname__}{{"
    left = [key for key in states if isinstance(key, str) and key.startswith(prefix) and key not in known]
    place = next((place for place, entry in enumerate(lost) if entry is mine), None)
    return None if place is None or place >= len(left) else states[left[place]]
