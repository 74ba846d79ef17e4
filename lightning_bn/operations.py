# SPDX-License-Identifier: Apache-2.0
"""What is told of one operation of torch: where it ran, on what, and what came out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree

from lightning_bn.source import Line, Spot
from lightning_bn.stats.finite import Census, census, first_bad_index, is_measurable, read

FINITE, INFINITE, NAN = 0, 1, 2
"""What a tensor holds at worst: only finite values, infinities but no NaN, NaN."""

FILLING = frozenset(
    {"copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_", "normal_", "uniform_", "bernoulli_", "exponential_"}
)
"""Operations in place that use nothing of what was there."""


@dataclass(frozen=True)
class Range:
    """One tensor as an operation saw it.

    Args:
        shape: its shape.
        dtype: its dtype, such as ``float32``.
        low: smallest finite value; 0 where there is none.
        high: largest finite value; 0 where there is none.
        zeros: how many values are exactly 0.
        seen: its census; None for tensors that are neither floating-point nor complex.
        name: path of the parameter, buffer or batch tensor that it is, or is a view of; else empty.
    """

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    zeros: int
    seen: Census | None
    name: str = ""

    @property
    def largest(self) -> float:
        """Largest finite absolute value."""
        return max(abs(self.low), abs(self.high))

    def describe(self) -> str:
        """The tensor in words."""
        text = f"{self.name} " if self.name else ""
        text += f"{self.shape} {self.dtype}"
        if self.seen is None:
            return text
        if self.seen.count == 0:
            return f"{text} without any value"
        text += f" in [{self.low:.4g}, {self.high:.4g}]"
        return text if self.seen.is_finite else f"{text} beside {self.seen.describe()}"


@dataclass(frozen=True)
class Operation:
    """One operation of torch that ran.

    Args:
        place: its number in the order of execution, counted from 0.
        name: name of the operation in torch's ``aten`` namespace, without overload, such as ``log``.
        spot: module and source line; of an operation of a backward pass those of the forward operation that it
            differentiates, as far as they are known.
        node: the autograd node that ran it in a backward pass, such as ``SqrtBackward0``; empty in a forward pass.
        at: for a backward pass that is the user's own code, the line in it.
    """

    place: int
    name: str
    spot: Spot
    node: str = ""
    at: Line | None = None

    def describe(self) -> str:
        """The operation in words."""
        text = f"{self.name} of {self.node}" if self.node else self.name
        return f"{text} in {self.spot.layer}" if self.spot.layer else text


@dataclass(frozen=True)
class Outside:
    """A tensor that was not finite before anything ran.

    Args:
        kind: what it is.
        path: where it lies in the batch, or its path in the model.
        index: index of its first non-finite value.
        seen: its census.
        mixed: what the values first met: ``parameter`` for an input of the network, ``activation`` for a target or
            anything else that joins what the network has computed; empty where they met neither.
    """

    kind: Literal["batch", "parameter", "buffer"]
    path: str
    index: tuple[int, ...]
    seen: Census
    mixed: str = ""


@dataclass(frozen=True)
class Fault:
    """An operation that made non-finite values out of finite ones, or NaN out of infinities that were meant.

    It may also be the first to have seen NaN that no operation made, as of a constant that the user wrote.

    Args:
        operation: the operation.
        inputs: its tensors, before it ran.
        scalars: its other arguments, as far as they are numbers.
        output: what came out, the worst tensor of several.
        wide: whether the same operation on the same values in float64 gives ``finite`` values; empty where that
            could not be tried.
        before: the operations that made its inputs, and those that made theirs, the latest first.
        sizes: largest absolute value behind each layer that multiplies, up to this operation, by module path.
    """

    operation: Operation
    inputs: tuple[Range, ...]
    scalars: tuple[float, ...]
    output: Range
    wide: Literal["finite", "non-finite", ""]
    before: tuple[Operation, ...]
    sizes: tuple[tuple[str, float], ...]


Origin = Fault | Outside


def state(x: Tensor) -> int:
    """What a tensor holds at worst (:data:`FINITE`, :data:`INFINITE` or :data:`NAN`); reads the host."""
    if not is_measurable(x) or x.numel() == 0:
        return FINITE
    x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
    # NaN and infinities survive a sum, which is cheap; one that overflowed is looked at again.
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
    if bool(torch.isfinite(total)):
        return FINITE
    return NAN if bool(torch.isnan(x).any()) else INFINITE if bool(torch.isinf(x).any()) else FINITE


def measured(x: Tensor, name: str = "") -> Range:
    """Range and census of a tensor; reads the host."""
    dtype = str(x.dtype).removeprefix("torch.")
    shape = () if x.is_nested else tuple(x.shape)
    if not is_measurable(x):
        return Range(shape, dtype, 0.0, 0.0, 0, None, name)
    seen = read([census(x)])[0]
    flat = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
    flat = flat.to(torch.float64) if flat.device.type != "mps" else flat.to(torch.float32)
    finite = flat[torch.isfinite(flat)]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    return Range(shape, dtype, low, high, int((flat == 0).sum()), seen, name)


def outside_of(kind: Any, path: str, x: Tensor) -> Outside:
    """A tensor that is not finite before anything runs, with its census; reads the host."""
    return Outside(kind, path, first_bad_index(x) or (), read([census(x)])[0])


def largest(x: Tensor) -> float:
    """Largest finite absolute value of a floating-point tensor; reads the host."""
    return read([census(x)])[0].largest


def tensors_of(*values: Any) -> list[Tensor]:
    """All tensors among the arguments or results of an operation."""
    return [x for x in _pytree.tree_leaves(values) if isinstance(x, Tensor)]


def scalars_of(args: Any, kwargs: Any) -> tuple[float, ...]:
    """All numbers among the arguments of an operation, lists of sizes and axes left out."""
    flat = [*args, *kwargs.values()]
    return tuple(float(x) for x in flat if isinstance(x, int | float) and not isinstance(x, bool))


def in_float64(func: Callable[..., Any], args: Any, kwargs: Any) -> Literal["finite", "non-finite", ""]:
    """Whether an operation gives finite values in float64; empty where it cannot be run in it.

    Args:
        func: the operation; it must not draw random numbers whose stream matters.
        args: its arguments as they were before it ran; they are not changed.
        kwargs: the same.
    """

    def widen(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().to(torch.float64).clone() if x.is_floating_point() else x.detach().clone()
        return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x

    try:
        wide = func(*_pytree.tree_map(widen, tuple(args)), **_pytree.tree_map(widen, dict(kwargs)))
    except Exception:  # noqa: BLE001  (an operation without a float64 kernel, or one that takes no such arguments)
        return ""
    return "finite" if all(state(x) == FINITE for x in tensors_of(wide)) else "non-finite"


def has_literal(args: Any, kwargs: Any) -> bool:
    """Whether NaN or an infinity was written out among the numbers of an operation."""
    return any(not math.isfinite(number) for number in scalars_of(args, kwargs))


def written_to(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation changes in place."""
    arguments = func._schema.arguments  # noqa: SLF001  (the schema has no public name)
    changed = [entry.name for entry in arguments if entry.alias_info is not None and entry.alias_info.is_write]
    if not changed:
        return []
    given = dict(zip((entry.name for entry in arguments), args, strict=False)) | kwargs
    return tensors_of([given.get(name) for name in changed])


def overwritten(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments whose old values do not matter: those given as ``out``, and what is filled as a whole."""
    if func.overloadpacket.__name__ in FILLING:
        return tensors_of(args[:1])
    names = {entry.name for entry in func._schema.arguments if entry.is_out}  # noqa: SLF001  (the same)
    return tensors_of([kwargs.get(name) for name in names])


def as_before(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments as they are before an operation that changes some of them."""
    changed = {id(x): x.detach().clone() for x in written_to(func, args, kwargs)}
    if not changed:
        return args, kwargs
    before: tuple[Any, Any] = _pytree.tree_map_only(Tensor, lambda x: changed.get(id(x), x), (args, kwargs))
    return before
