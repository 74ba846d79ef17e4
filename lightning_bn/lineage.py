# SPDX-License-Identifier: Apache-2.0
"""Follow NaN and infinity through every operation of a pass, back to the one that made them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_bn.operations import (
    FINITE,
    INFINITE,
    NAN,
    Fault,
    Operation,
    Origin,
    Outside,
    as_before,
    has_literal,
    in_float64,
    largest,
    measured,
    outside_of,
    overwritten,
    scalars_of,
    state,
    tensors_of,
    written_to,
)
from lightning_bn.source import Names, Spot, spot
from lightning_bn.stats.finite import is_measurable
from lightning_bn.writes import Writes

MULTIPLYING = frozenset({"addmm", "mm", "bmm", "baddbmm", "convolution", "addmv", "mv", "linear"})
"""Operations whose outputs tell how the signal grows over depth."""
PLUMBING = frozenset({"clone", "detach", "constant", "_to_copy", "copy_", "ones_like", "zeros", "zeros_like", "expand"})
"""Operations that move values or fill memory, and explain nothing."""
COPYING = frozenset({"_to_copy", "clone"})
"""Operations whose result stands for what they were given."""
TALK = frozenset({"c10d", "_c10d_functional", "c10d_functional", "symm_mem"})
"""Namespaces of the operations that wait for other processes."""
CHECKPOINT = "checkpoint.py"
STEPS_BEFORE = 4


class CollectiveError(RuntimeError):
    """A pass that one rank runs alone would wait for the others."""


@dataclass(eq=False)
class _Mark:
    """What is known of a storage."""

    alive: Any  # a weak reference: while it is held, no other storage gets the same address
    writer: Operation | None = None
    sources: tuple[_Mark, ...] = ()
    origin: Origin | None = None
    meant: bool = False  # infinities that a literal put there
    inside: bool = False  # made in this pass
    computed: bool = False  # made with parameters
    name: str = ""  # of a parameter, a buffer or a tensor of the batch
    kind: str = ""


@dataclass(frozen=True)
class _Came:
    """An input of an operation before it ran."""

    tensor: Tensor
    state: int
    mark: _Mark | None


class Lineage(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Watch every operation that runs in this block, forward and backward, and remember where bad values came from.

    Reads the host for every operation: this is for the replay of a step that is known to be bad, not for training.
    An infinity that a literal put there (``masked_fill(mask, -inf)``) is meant, as long as no NaN is made of it.

    Args:
        names: the modules of the model.
        outermost: code of the function that runs the pass; stack frames from there on are not looked at.
        alone: whether other ranks may not run the same: the pass ends where it would wait for them.

    Example:
        >>> with Lineage(Names(torch.nn.Identity())) as lineage:
        ...     y = torch.log(torch.zeros(2)) * 0
        >>> lineage.origin_of(y).operation.name
        'log'
    """

    def __init__(self, names: Names, outermost: CodeType | None = None, *, alone: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self._names = names
        self._outermost = outermost
        self._alone = alone
        self._marks: dict[int, _Mark] = {}
        self._made: dict[int, Spot] = {}  # by the number that autograd gave the node of a forward operation
        self._sizes: dict[str, float] = {}
        self._mixed: dict[int, str] = {}
        self._count = 0
        self.writes = Writes()  # to tensors that were there before; to be put back when the pass is over
        self.suspect: Origin | None = None
        """Where a bad value came from that was read on the host, or refused by an operation."""

    def enter(self, kind: Any, path: str, x: Tensor) -> None:
        """Make a tensor known that is there before anything runs: of the batch, a parameter or a buffer."""
        mark = self._known(x)
        if mark is None:
            return
        mark.name, mark.kind = mark.name or path, mark.kind or kind
        with _disable_current_modes():
            if state(x) == FINITE or mark.origin is not None:
                return
            outside = outside_of(kind, path, x)
        # Of -inf alone one may assume that it is there on purpose.
        mark.meant = outside.seen.level < NAN
        mark.origin = None if mark.meant else outside

    def origin_of(self, x: Tensor) -> Origin | None:
        """Where the bad values of a tensor came from; None if it is finite, or what it holds is meant."""
        mark = self._mark_of(x)
        with _disable_current_modes():
            if mark is None or mark.origin is None or state(x) == FINITE:
                return None
        if isinstance(mark.origin, Outside):
            return replace(mark.origin, mixed=self._mixed.get(id(mark.origin), ""))
        return mark.origin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it did; called by torch."""
        kwargs = kwargs or {}
        if self._alone and func.namespace in TALK:
            raise CollectiveError(f"{func} in a replay that other ranks may not run")
        lost = {id(x) for x in overwritten(func, args, kwargs)}
        came = [_Came(x, FINITE if id(x) in lost else state(x), self._known(x)) for x in tensors_of(args, kwargs)]
        for x in filter(_has_storage, written_to(func, args, kwargs)):
            if not self._marks[_key(x)].inside:
                self.writes.keep(x)
        before = as_before(func, args, kwargs)
        operation = self._operation(func)
        try:
            out = func(*args, **kwargs)
        except Exception:
            self._suspect(came)
            raise
        if func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001  (the name of the operation)
            self._suspect(came)
        outs = tensors_of(out, written_to(func, args, kwargs))
        self._follow(operation, func, before, came, outs)
        return out

    def _operation(self, func: Any) -> Operation:
        self._count += 1
        name = func.overloadpacket.__name__
        name = "constant" if name == "lift_fresh" else name
        here = spot(self._names, self._outermost)
        node = torch._C._current_autograd_node()  # noqa: SLF001  (no public name)
        if node is None or self._recomputes(node.name()):
            self._made.setdefault(_sequence_number() - 1, here)
            return Operation(self._count, name, here)
        made = self._made.get(node._sequence_nr(), Spot("", "", None))  # noqa: SLF001  (the same)
        return Operation(self._count, name, made, node.name(), here.line)

    def _recomputes(self, node: str) -> bool:
        """Whether activation checkpointing runs a forward pass again, inside backward."""
        frame = sys._getframe(2)  # noqa: SLF001  (a public function, despite its name)
        while frame is not None and frame.f_code is not self._outermost:
            if frame.f_code.co_filename.endswith(CHECKPOINT):
                # The reentrant kind runs the backward pass of what it ran again from the same function.
                return frame.f_code.co_name != "backward" or node == "CheckpointFunctionBackward"
            frame = frame.f_back  # type: ignore[assignment]  # None at the end
        return False

    def _follow(self, operation: Operation, func: Any, before: Any, came: list[_Came], outs: list[Tensor]) -> None:
        args, kwargs = before
        states = [state(x) for x in outs]
        bad = [entry for entry in came if entry.state != FINITE or _is_test(entry)]
        origin, meant = self._cause(bad, max(states, default=FINITE), args, kwargs)
        if origin is None and not meant and any(states):
            worst = outs[max(range(len(outs)), key=states.__getitem__)]
            origin = self._fault(operation, before, func, came, worst)
        if isinstance(origin, Outside):
            self._mixes(origin, came)
        sources = tuple(entry.mark for entry in came if entry.mark is not None)
        for x, found in zip(outs, states, strict=True):
            is_test = not is_measurable(x) and bool(bad)
            self._write(x, operation, sources, origin if found or is_test else None, meant=bool(found) and meant)
        if operation.name in MULTIPLYING and not operation.node and outs and is_measurable(outs[0]):
            key = operation.spot.layer or operation.name
            self._sizes[key] = max(self._sizes.get(key, 0.0), largest(outs[0]))

    def _cause(self, bad: list[_Came], worst: int, args: Any, kwargs: Any) -> tuple[Origin | None, bool]:
        """What the bad values of the output go back to, and whether they are meant; (None, False) for: to this."""
        blamed = [entry for entry in bad if entry.mark is not None and entry.mark.origin is not None]
        if blamed:
            first = max(blamed, key=lambda entry: (entry.state, -_place(entry.mark)))
            return first.mark.origin if first.mark else None, False
        return None, worst == INFINITE and (bool(bad) or has_literal(args, kwargs))

    def _fault(self, operation: Operation, before: Any, func: Any, came: list[_Came], worst: Tensor) -> Fault:
        args, kwargs = before
        marks = [entry.mark for entry in came]
        inputs = zip(tensors_of(args, kwargs), marks, strict=True)  # as they were before a change in place
        ranges = tuple(measured(x, mark.name if mark else "") for x, mark in inputs)
        earlier = tuple(_earlier([mark for mark in marks if mark is not None]))
        sizes = tuple(self._sizes.items())
        wide = in_float64(func, args, kwargs)
        return Fault(operation, ranges, scalars_of(args, kwargs), measured(worst), wide, earlier, sizes)

    def _mixes(self, origin: Outside, came: list[_Came]) -> None:
        """Note what bad values of the batch met first: a parameter of the network, or what it computed."""
        if origin.kind != "batch" or id(origin) in self._mixed:
            return
        met = [entry for entry in came if entry.mark is None or entry.mark.origin is not origin]
        if any(entry.mark is not None and entry.mark.kind == "parameter" for entry in met):
            self._mixed[id(origin)] = "parameter"
        elif any(entry.mark is not None and entry.mark.computed for entry in met):
            self._mixed[id(origin)] = "activation"

    def _write(
        self, x: Tensor, operation: Operation, sources: tuple[_Mark, ...], origin: Origin | None, *, meant: bool
    ) -> None:
        if not _has_storage(x):
            return
        old = self._mark_of(x)
        computed = any(source.computed or source.kind == "parameter" for source in sources)
        covers = x.numel() * x.element_size() >= x.untyped_storage().nbytes()
        if old is not None and any(old is source for source in sources):
            # A view, or a change in place. What it does not cover stays as it was; what it does keeps its name.
            if covers or origin is not None:
                old.origin, old.meant = origin, meant
            old.computed = old.computed or computed
            if operation.name.endswith("_"):
                others = (source for source in sources if source is not old)
                old.sources, old.writer = (replace(old), *others), operation
            return
        mark = _Mark(_weakly(x), operation, sources, origin, meant, inside=True, computed=computed)
        if operation.name in COPYING and len(sources) == 1:  # under autocast the weights are cast first
            mark.name, mark.kind = sources[0].name, sources[0].kind
        self._marks[_key(x)] = mark

    def _known(self, x: Tensor) -> _Mark | None:
        """The mark of a tensor, which was there before anything ran if it has none yet."""
        return self._marks.setdefault(_key(x), _Mark(_weakly(x))) if _has_storage(x) else None

    def _mark_of(self, x: Tensor) -> _Mark | None:
        return self._marks.get(_key(x)) if _has_storage(x) else None

    def _suspect(self, came: list[_Came]) -> None:
        found = (entry.mark.origin for entry in came if entry.mark and (entry.state != FINITE or _is_test(entry)))
        self.suspect = next((origin for origin in found if origin is not None), self.suspect)


def _sequence_number() -> int:
    """The number that autograd gives to the next node; that of the node of this operation is one less."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]  # noqa: SLF001  (no public name)


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)  # noqa: SLF001  (the identity of a storage has no public name)


def _weakly(x: Tensor) -> Any:
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _has_storage(x: Tensor) -> bool:
    dense = x.layout == torch.strided and not x.is_nested and not x.is_meta
    return dense and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # noqa: SLF001  (no public name)


def _is_test(entry: _Came) -> bool:
    """Whether it tells which values are bad, as ``isnan(x)`` does."""
    return not is_measurable(entry.tensor) and entry.mark is not None and entry.mark.origin is not None


def _place(mark: _Mark | None) -> int:
    return mark.origin.operation.place if mark and isinstance(mark.origin, Fault) else -1


def _earlier(marks: list[_Mark]) -> list[Operation]:
    """The operations that made some tensors, and those before them, the latest first."""
    found: dict[int, Operation] = {}
    queue, visited = list(marks), set(map(id, marks))
    while queue and len(found) < STEPS_BEFORE:
        queue.sort(key=lambda mark: mark.writer.place if mark.writer else -1)
        mark = queue.pop()
        if mark.writer is not None and mark.writer.name not in PLUMBING:
            found.setdefault(mark.writer.place, mark.writer)
        fresh = [source for source in mark.sources if id(source) not in visited]
        visited.update(map(id, fresh))
        queue.extend(fresh)
    return list(found.values())
