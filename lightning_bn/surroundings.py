# SPDX-License-Identifier: Apache-2.0
"""What stands in front of each BatchNorm layer, in the order in which the traced forward of a model connects them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd
from torch.nn.parameter import is_lazy

from lightning_bn.norms import find_batchnorm
from lightning_bn.residual import ADDING, SCALING
from lightning_bn.taps import GROUPS, plain_name
from lightning_bn.tracing import trace, wrapped

WEIGHTED = (nn.Linear, _ConvNd)
TO_ONE = (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)
PER_SAMPLE = (*WEIGHTED, *TO_ONE, _AvgPoolNd, _MaxPoolNd, nn.Upsample, nn.ZeroPad2d)
"""Layers, beside those that work value by value, that keep the samples apart."""
VALUE_BY_VALUE = frozenset(
    [
        *("relu", "relu6", "leaky_relu", "gelu", "silu", "mish", "elu", "selu", "celu", "hardswish", "hardtanh"),
        *("tanh", "sigmoid", "softplus", "dropout", "abs", "neg", "clone", "contiguous"),
        *("float", "half", "bfloat16", "double", "to", "type", "type_as"),
    ],
)
ASKED = frozenset({"size", "shape", "dim", "ndim", "len"})
"""Questions about a tensor, whose answer is no tensor of samples."""
SPATIAL = ((2, 3), (-2, -1), (-1, -2), (2, 3, 4), (-3, -2, -1))
"""Axes over which a mean leaves samples and channels alone."""
SPATIALLY = ("adaptive_", "avg_pool", "max_pool", "interpolate", "pad")
"""How the names of functions begin that change spatial axes alone."""


@dataclass(frozen=True)
class Entry:
    """The first layer with weights that the batch meets, as far as it tells the shape of a sample.

    Args:
        dims: number of axes of its input, the samples among them.
        size: channels or features of its input.
        joined: whether all axes of a sample are flattened before.
    """

    dims: int
    size: int
    joined: bool

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of the batch fits, sample by sample."""
        if self.joined:
            return len(shape) > 1 and math.prod(shape[1:]) == self.size
        return len(shape) == self.dims and shape[1] == self.size


@dataclass(frozen=True)
class Way:
    """How what reaches a place is shaped.

    Args:
        flat: whether it has no axis beside samples and channels, or only such of length 1.
        kept: whether its first axis are the samples of what the forward was given.
        joined: whether the axes of a sample were flattened before any layer with weights.
        entries: the first layers with weights on the ways to it.
        size: length of its last axis behind a linear layer; 0 where that is not known.
    """

    flat: bool = False
    kept: bool = False
    joined: bool = False
    entries: frozenset[Entry] = frozenset()
    size: int = 0


@dataclass(frozen=True)
class Surroundings:
    """What a trace shows of the BatchNorm layers of a model.

    Args:
        biased: layers whose output goes to BatchNorm layers in training mode and nowhere else, and that have a bias
            which is trained, each with its number of values.
        dropped: BatchNorm layers in training mode that an active dropout reaches through one layer with weights, with
            path and rate of the dropout.
        ways: for each call of a BatchNorm layer how its input is shaped.
        unseen: modules with BatchNorm below them whose own forward could not be traced, with the reason.
    """

    biased: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, tuple[str, float]] = field(default_factory=dict)
    ways: dict[str, list[Way]] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)

    def flat(self) -> list[str]:
        """BatchNorm layers that see no spatial extent at any call: one value for each sample and channel."""
        return [name for name, ways in self.ways.items() if all(way.flat for way in ways)]

    def by_sample(self, name: str, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether a layer sees one row for each sample of a batch whose tensors have these shapes.

        So it is where the samples stay apart all the way, and the first layer with weights fits a tensor of the batch
        as it comes from the loader. A forward that is given something else than the batch is not seen.
        """
        kept = all(way.kept for way in self.ways.get(name, [Way()]))
        entries = [entry for way in self.ways.get(name, []) for entry in way.entries]
        return kept and any(entry.takes(shape) for entry in entries for shape in shapes)


def surroundings(model: nn.Module) -> Surroundings:
    """Trace the forward of a model, or of those of its parts that can be traced, and look in front of its BatchNorm.

    No layer runs; the Python code of the model's forward does, with stand-ins for tensors (:func:`.tracing.trace`).

    Args:
        model: the network, on any device, also with lazy or meta parameters.

    Example:
        >>> found = surroundings(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        >>> found.biased, found.flat(), found.by_sample("1", [(8, 3)])
        ({'0': 4}, ['1'], True)
    """
    names = {module: plain_name(path) for path, module in model.named_modules()}
    reader = _Reader()
    unseen: dict[nn.Module, str] = {}
    done: set[nn.Module] = set()
    for module in filter(_holds_batchnorm, names):
        if module in done or wrapped(module) is not None:
            continue
        found = trace(module)
        unseen.update(found.refused)
        done.update(found.entered)
        if found.graph is not None:
            # The model itself, and what its steps call: these may be given the batch.
            reader.read(found.graph, dict(module.named_modules()), given_batch="." not in names[module])
    norms = find_batchnorm(model)
    dropouts = {name: reader.dropouts[layer] for name, layer in norms.items() if layer in reader.dropouts}
    return Surroundings(
        {names[layer]: layer.bias.numel() for layer in reader.useless_biases()},
        {name: (names[layer], float(layer.p)) for name, layer in dropouts.items()},
        {name: reader.ways[layer] for name, layer in norms.items() if layer in reader.ways},
        {names[module]: why for module, why in unseen.items() if module in names},
    )


def _holds_batchnorm(module: nn.Module) -> bool:
    return not isinstance(module, _BatchNorm) and any(isinstance(below, _BatchNorm) for below in module.modules())


class _Reader:
    """Gathers from the graphs of a model what its BatchNorm layers have in front of them."""

    def __init__(self) -> None:
        self.ways: dict[nn.Module, list[Way]] = defaultdict(list)
        self.dropouts: dict[nn.Module, _DropoutNd] = {}
        self._ends_in_norm: dict[nn.Module, list[bool]] = defaultdict(list)

    def read(self, graph: fx.Graph, layers: Mapping[str, nn.Module], *, given_batch: bool) -> None:
        """Follow the values of one graph, in the order in which they are computed."""
        called = {node: layers.get(str(node.target)) for node in graph.nodes if node.op == "call_module"}
        ways: dict[Node, Way | None] = {}  # None for what is not computed from samples
        for node in graph.nodes:
            layer = called.get(node)
            came = [way for source in node.all_input_nodes if (way := ways[source]) is not None]
            ways[node] = _way(node, layer, came, given_batch=given_batch)
            if isinstance(layer, _BatchNorm):
                self.ways[layer].append(_into(layer, _merged(came)))
                self._find_dropout(layer, node, called)
            elif isinstance(layer, WEIGHTED):
                ends = [_subtracts(called.get(user), layer) for user in node.users]
                self._ends_in_norm[layer].append(bool(ends) and all(ends))

    def useless_biases(self) -> Iterator[Any]:
        """Layers with a trained bias that BatchNorm takes away at every call."""
        for layer, ends in self._ends_in_norm.items():
            bias = getattr(layer, "bias", None)
            if all(ends) and bias is not None and bias.requires_grad and not is_lazy(bias):
                yield layer

    def _find_dropout(self, norm: _BatchNorm, node: Node, called: Mapping[Node, nn.Module | None]) -> None:
        before = _source(node)
        if before is None or not norm.training or not isinstance(called.get(before), WEIGHTED):
            return
        before = _source(before)
        while before is not None and isinstance(called.get(before), nn.Identity | nn.Flatten):
            before = _source(before)
        layer = None if before is None else called.get(before)
        if isinstance(layer, _DropoutNd) and layer.training and layer.p:
            self.dropouts[norm] = layer


def _subtracts(norm: nn.Module | None, layer: Any) -> bool:
    """Whether a module is BatchNorm that takes the bias of a layer away, channel by channel, with the batch mean."""
    if not isinstance(norm, _BatchNorm) or not (norm.training or norm.running_mean is None):
        return False
    return norm.num_features == (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _into(norm: _BatchNorm, way: Way) -> Way:
    """What reaches BatchNorm: its channels are axis 1, so that features of another number are no channels."""
    return replace(way, flat=way.flat and (not way.size or norm.num_features in {0, way.size}))


def _source(node: Node) -> Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], Node) else None


def _merged(ways: Sequence[Way]) -> Way:
    """How a value is shaped that is computed from several, value by value."""
    if not ways:
        return Way()
    flat, kept = all(way.flat for way in ways), all(way.kept for way in ways)
    entries = frozenset(entry for way in ways for entry in way.entries)
    return Way(flat, kept, any(way.joined for way in ways), entries, max(way.size for way in ways))


def _way(node: Node, layer: nn.Module | None, came: Sequence[Way], *, given_batch: bool) -> Way | None:
    if node.op == "placeholder":
        return Way(kept=given_batch)
    if not came or _called(node) in ASKED:
        return None
    way = _merged(came)
    return _through_function(node, way) if layer is None else _through_layer(layer, way)


def _through_layer(layer: nn.Module, way: Way) -> Way:
    if GROUPS["activation"](layer) or GROUPS["norm"](layer) or isinstance(layer, nn.Identity | _DropoutNd):
        return way
    if isinstance(layer, nn.Linear):
        entry = Entry(2, layer.in_features, way.joined)
        return replace(way, flat=True, entries=way.entries or frozenset([entry]), size=layer.out_features)
    if isinstance(layer, _ConvNd):
        entry = Entry(len(layer.kernel_size) + 2, layer.in_channels, way.joined)
        point = set(layer.kernel_size) == {1} and (isinstance(layer.padding, str) or set(layer.padding) == {0})
        return replace(way, flat=way.flat and point, entries=way.entries or frozenset([entry]), size=0)
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
        return _joined(way)
    if isinstance(layer, PER_SAMPLE):
        return replace(way, flat=isinstance(layer, TO_ONE) and _is_one(layer.output_size), size=0)
    return Way()


def _through_function(node: Node, way: Way) -> Way:
    name, given = _called(node), [*node.args[1:], *node.kwargs.values()]
    first = given[0] if given else None
    if name in VALUE_BY_VALUE or name in ADDING or name in SCALING or (name == "cat" and first == 1):
        return way
    if (name == "flatten" and given == [1]) or (name in {"view", "reshape"} and _joins(node)):
        return _joined(way)
    if name in {"mean", "amax"}:
        return replace(way, flat=True, size=0) if any(first in (axes, list(axes)) for axes in SPATIAL) else Way()
    if name.startswith(SPATIALLY) or (name == "getitem" and isinstance(first, int | str)):
        return replace(way, flat=name.startswith("adaptive_") and _is_one(first), size=0)
    return Way()


def _joined(way: Way) -> Way:
    return replace(way, flat=True, joined=way.joined or not way.entries, size=0)


def _joins(node: Node) -> bool:
    """Whether a view is one row for each sample: ``x.view(x.size(0), -1)``, ``x.reshape(len(x), -1)`` and the like."""
    sizes = node.args[1:] if len(node.args) > 2 else node.args[1:] and node.args[1]  # noqa: PLR2004  (tensor, two sizes)
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or sizes[1] != -1:  # noqa: PLR2004  (the same)
        return False
    first = sizes[0]
    if not isinstance(first, Node):
        return False
    if _called(first) in {"size", "len"}:
        return bool(first.args[1:] in {(), (0,)})
    shape = _source(first)
    return shape is not None and _called(shape) in ASKED and _called(first) == "getitem" and first.args[1:] == (0,)


def _called(node: Node) -> str:
    """The name of the function, method or attribute that a node stands for, without the mark of a change in place."""
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1])
    if node.op not in {"call_function", "call_method"}:
        return ""
    return str(getattr(node.target, "__name__", node.target)).rstrip("_")


def _is_one(size: Any) -> bool:
    return set(size if isinstance(size, list | tuple) else [size]) == {1}
