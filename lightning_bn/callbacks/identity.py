# SPDX-License-Identifier: Apache-2.0
"""A checkpoint key of its own for each instance, that a resumed run finds again."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class Identity:
    """Gives each instance a ``state_key`` made from its class and its constructor's arguments.

    Lightning refuses a Trainer in which two stateful callbacks share a key. Instances that were constructed alike
    are therefore numbered, in the order in which trainers ask for their keys.
    """

    _numbered: ClassVar[weakref.WeakSet[Identity]] = weakref.WeakSet()
    _twin: int | None = None

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; read by Lightning."""
        stem = self._stem()
        if self._twin is None:
            taken = {other._twin for other in self._numbered if other._stem() == stem}  # noqa: SLF001  (other instances)
            self._twin = next(number for number in range(len(taken) + 1) if number not in taken)
            self._numbered.add(self)
        return stem if self._twin == 0 else f"{stem}#{self._twin + 1}"

    def _stem(self) -> str:
        names = inspect.signature(type(self).__init__).parameters
        arguments = {name: getattr(self, name) for name in names if name != "self"}
        return f"{type(self).__qualname__}{arguments!r}"


def adopted_state(mine: Identity, callbacks: Sequence[Any], states: Mapping[str, Any]) -> Any | None:
    """The state that belongs to a callback whose key a checkpoint does not hold.

    Arguments may have changed between runs, and so may the numbers of twins: what is left over of a class in the
    checkpoint goes to what is left over of it in the trainer, in order.

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
