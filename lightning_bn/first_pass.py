# SPDX-License-Identifier: Apache-2.0
"""Record one forward pass in full: batch, parameters, every module's inputs and outputs, running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.norms import find_batchnorm
from lightning_bn.stats.finite import NOTHING, Census, census, first_bad_index, is_measurable, read
from lightning_bn.taps import COMPILED, choose, listen, plain_name, tensors_in


@dataclass(frozen=True)
class Call:
    """One forward call of one module, on the host.

    Args:
        layer: module path; empty for the whole model.
        kind: class name of the module.
        inputs: census of all floating-point inputs together.
        outputs: census of all floating-point outputs together.
        dtype: dtype of the first floating-point output, such as ``torch.float16``.
        shapes: shapes of all input tensors; empty where no tensor was found among the inputs.
        largest_weight: largest absolute value of the module's own parameters; None without parameters.
    """

    layer: str
    kind: str
    inputs: Census
    outputs: Census
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    largest_weight: float | None


@dataclass(frozen=True)
class Place:
    """One tensor of the batch.

    Args:
        path: where it lies, such as ``batch[0]`` or ``batch['image']``.
        index: index of its first non-finite value; empty if all are finite.
        seen: its census.
    """

    path: str
    index: tuple[int, ...]
    seen: Census


@dataclass(frozen=True)
class Pass:
    """One forward pass on the host.

    Args:
        batch: the floating-point tensors of the batch, before the pass.
        weights: parameters before the pass, by path.
        buffers: buffers before the pass, by path, without BatchNorm's running statistics.
        calls: module calls in the order in which they returned.
        loss: census of the loss; None where there was none.
        statistics: running statistics of each BatchNorm layer, before and after the pass.
        unseen: modules that could not be listened to, by path, with the reason.
        failed: whether the step ended in an exception.
    """

    batch: tuple[Place, ...]
    weights: Mapping[str, Census]
    buffers: Mapping[str, Census]
    calls: tuple[Call, ...]
    loss: Census | None
    statistics: Mapping[str, tuple[Census, Census]]
    unseen: Mapping[str, str]
    failed: bool = False


@dataclass(frozen=True)
class _Came:
    rows: list[Tensor]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Heard:
    layer: str
    kind: str
    inputs: _Came
    outputs: list[Tensor]
    dtype: torch.dtype
    own: tuple[str, ...]


class Recorder:
    """Look at batch and weights now, listen to a forward pass, then read everything at once.

    Nothing is read on the host while the pass runs: each tensor leaves five numbers on its device.

    Args:
        model: the network.
        batch: the batch that it is about to see, any nested container.
        compiled: whether the model as a whole is compiled, so that no module can be listened to.
        eager: whether compiled modules will run eagerly, where they are heard like any others.
    """

    def __init__(self, model: nn.Module, batch: Any, *, compiled: bool = False, eager: bool = False) -> None:
        choice = choose(model, leaves_only=False, eager=eager)
        self.layers = {} if compiled else choice.layers
        self.unseen = {"": COMPILED} if compiled else choice.unseen
        self._norms = find_batchnorm(model)
        self._names = {id(x): plain_name(name) for name, x in model.named_parameters()}
        self._expected: dict[int, list[_Came]] = {}
        self._heard: list[_Heard] = []
        self._batch = tuple(_places(batch))
        self._weights = dict(_census_of(model.named_parameters()))
        self._buffers = dict(_census_of(_buffers(model)))
        self._before = self._statistics()

    def listen(self) -> AbstractContextManager[None]:
        """The block in which the pass runs."""
        return listen(self.layers, self.hear, self.expect)

    def expect(self, name: str, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002  (signature of taps.Expect)
        """Take the census of what a module is about to see, which it may change in place."""
        tensors = [x for _, x in tensors_in(inputs)]
        came = _Came([census(x) for x in tensors if is_measurable(x)], tuple(map(_shape, tensors)))
        self._expected.setdefault(id(module), []).append(came)

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002  (of taps.Hear)
        """Take the census of what a module put out."""
        stack = self._expected.get(id(module))
        came = stack.pop() if stack else _Came([], ())
        went = _measurable(output)
        # A distributed Trainer calls training_step through the model itself: what comes out then is the loss.
        if went and (name or any(x.dim() for x in went)):
            own = tuple(self._names[id(x)] for x in module.parameters(recurse=False) if id(x) in self._names)
            rows = [census(x) for x in went]
            self._heard.append(_Heard(name, type(module).__name__, came, rows, went[0].dtype, own))

    def finish(self, loss: Tensor | None, *, failed: bool = False) -> Pass:
        """Read everything that was recorded, in one transfer for each device.

        Args:
            loss: the loss of the pass; None where there is none.
            failed: whether the step ended in an exception.
        """
        after = self._statistics()
        groups: dict[Any, list[Tensor]] = {("weight", name): [row] for name, row in self._weights.items()}
        groups |= {("buffer", name): [row] for name, row in self._buffers.items()}
        groups |= {("before", name): rows for name, rows in self._before.items()}
        groups |= {("after", name): rows for name, rows in after.items()}
        for place, heard in enumerate(self._heard):
            groups["in", place], groups["out", place] = heard.inputs.rows, heard.outputs
        groups["loss"] = [] if loss is None or not is_measurable(loss) else [census(loss)]
        seen = _read_groups(groups)
        weights = {name: seen["weight", name] for name in self._weights}
        return Pass(
            batch=self._batch,
            weights=weights,
            buffers={name: seen["buffer", name] for name in self._buffers},
            calls=tuple(self._call(place, seen, weights) for place in range(len(self._heard))),
            loss=seen["loss"] if groups["loss"] else None,
            statistics={name: (seen["before", name], seen["after", name]) for name in self._norms},
            unseen=self.unseen,
            failed=failed,
        )

    def _statistics(self) -> dict[str, list[Tensor]]:
        return _statistics_of(self._norms)

    def _call(self, place: int, seen: Mapping[Any, Census], weights: Mapping[str, Census]) -> Call:
        heard = self._heard[place]
        largest = max((weights[name].largest for name in heard.own if name in weights), default=None)
        inputs, outputs = seen["in", place], seen["out", place]
        return Call(heard.layer, heard.kind, inputs, outputs, heard.dtype, heard.inputs.shapes, largest)


def _places(batch: Any) -> Iterator[Place]:
    tensors = [(path, x) for path, x in tensors_in(batch, "batch") if is_measurable(x)]
    for (path, x), seen in zip(tensors, read([census(x) for _, x in tensors]), strict=True):
        index = None if seen.is_finite else first_bad_index(x)
        yield Place(path, index or (), seen)


def _census_of(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for path, x in named:
        if _has_memory(x) and is_measurable(x):
            yield plain_name(path), census(x)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    running = {f"{name}.{kind}" for name in find_batchnorm(model) for kind in ("running_mean", "running_var")}
    return ((path, x) for path, x in model.named_buffers() if plain_name(path) not in running)


def running_statistics(model: nn.Module) -> dict[str, Census]:
    """Census of running mean and variance together, by BatchNorm layer; reads the host once for each device."""
    return _read_groups(_statistics_of(find_batchnorm(model)))


def _statistics_of(norms: Mapping[str, Any]) -> dict[Any, list[Tensor]]:
    return {
        name: [census(x) for x in (layer.running_mean, layer.running_var) if x is not None and _has_memory(x)]
        for name, layer in norms.items()
    }


def _shape(x: Tensor) -> tuple[int, ...]:
    return () if x.is_nested else tuple(x.shape)


def _has_memory(x: Tensor) -> bool:
    return not torch.nn.parameter.is_lazy(x) and not x.is_meta


def _measurable(container: Any) -> list[Tensor]:
    return [x for _, x in tensors_in(container) if is_measurable(x)]


def _read_groups(groups: Mapping[Any, Iterable[Tensor]]) -> dict[Any, Census]:
    flat = [(key, row) for key, rows in groups.items() for row in rows]
    seen: dict[Any, list[Census]] = {key: [NOTHING] for key in groups}
    for (key, _), found in zip(flat, read([row for _, row in flat]), strict=True):
        seen[key].append(found)
    return {key: reduce(add, found) for key, found in seen.items()}
