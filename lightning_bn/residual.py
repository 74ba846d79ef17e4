# SPDX-License-Identifier: Apache-2.0
"""Find, in the traced forward of a model, the BatchNorm calls that close a residual branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.padding import _ReflectionPadNd, _ReplicationPadNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd
from torch.nn.parameter import is_lazy

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)

PASSING_LAYERS = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten, nn.Upsample),
    *(_AvgPoolNd, _MaxPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _ReflectionPadNd, _ReplicationPadNd),
    *(nn.ZeroPad2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
)
"""Layers that give zero for zero and let the gradient through there, in training too."""

POOLING = ("dropout", "drop_", "stochastic_depth", "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")
PASSING = frozenset(
    [
        *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "repeat", "contiguous", "clone"),
        *("permute", "transpose", "swapaxes", "movedim", "T", "mT", "flip", "roll", "pixel_shuffle", "pixel_unshuffle"),
        *("to", "type", "type_as", "float", "half", "bfloat16", "double", "mean", "sum", "interpolate"),
        *("div", "truediv", "itruediv", "divide", "neg"),
    ],
)
"""The same for functions and methods of a tensor, which is their first argument; of POOLING, how the names begin."""

ADDING = frozenset({"add", "iadd", "sub", "isub", "subtract"})
SCALING = frozenset({"mul", "imul", "multiply"})
IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv"})
ASKING = frozenset({"size", "dim", "numel", "stride", "shape", "ndim", "dtype", "device", "requires_grad", "_assert"})
"""Questions about a tensor that do not hand its values on."""


def batchnorm_calls(graph: fx.Graph, layers: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, bool]]:
    """Every call of a BatchNorm layer, with whether it closes a residual branch (Goyal et al. 2017, sec. 5.1).

    Looked at is every sum (or difference) of two or more computed values. A BatchNorm call closes a branch of it if

    - its output comes to the sum through nothing but what gives zero for zero and lets the gradient through there:
      dropout, drop path, pooling, changes of shape, multiplication by a number, a parameter or a computed gate
      (squeeze and excitation). An activation ends the search: ReLU gives zero no gradient;
    - all that is computed from its output goes into the sum;
    - another value of the sum is a skip connection: it is, or is computed from, something that the branch is computed
      from as well; on the way there is nothing with weights and no norm, or one layer with weights (a projection
      shortcut) where the branch has more. Of two branches of one layer each, neither is the other's skip.

    Args:
        graph: a forward, as :func:`.tracing.trace` gives it.
        layers: what the graph's module calls refer to, by path.
    """
    flow = _Flow(graph, layers)
    closing = {call for node in graph.nodes if flow.is_sum(node) for call in flow.closed_by(node)}
    for node in graph.nodes:
        layer = flow.layer(node)
        if isinstance(layer, _BatchNorm):
            yield layer, node in closing


class _Flow:
    """Which value is computed from which. A value that is changed in place is a new value from there on."""

    def __init__(self, graph: fx.Graph, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._inputs: dict[Node, list[Node]] = {}
        self._users: dict[Node, list[Node]] = {}
        self._args: dict[Node, list[Any]] = {}
        self._bit: dict[Node, int] = {}  # 0 for parameters and for what is only asked of a tensor
        self._above: dict[Node, int] = {}  # the bits of all that a value is computed from, and its own
        newest: dict[Any, Node] = {}
        for place, node in enumerate(graph.nodes):
            self._inputs[node] = [newest.get(source, source) for source in node.all_input_nodes]
            self._args[node] = [newest.get(arg, arg) if isinstance(arg, Node) else arg for arg in _operands(node)]
            self._users[node] = []
            self._add(node, 0 if node.op == "get_attr" or _name(node) in ASKING else 1 << place)
            if _is_in_place(node) and node.all_input_nodes:
                newest[node.all_input_nodes[0]] = node

    def _add(self, node: Node, bit: int) -> None:
        self._bit[node] = self._above[node] = bit
        for source in self._inputs[node]:
            if _name(node) not in ASKING:
                self._users.setdefault(source, []).append(node)
            if bit and not _is_one_of_several(node):
                self._above[node] |= self._above.get(source, 0)

    def layer(self, node: Node) -> nn.Module | None:
        """The layer that a node calls."""
        return self._layers.get(str(node.target)) if node.op == "call_module" else None

    def is_sum(self, node: Node) -> bool:
        """Whether a node adds two computed values."""
        return _name(node) in ADDING and len(_nodes(self._args[node])) > 1

    def closed_by(self, total: Node) -> Iterator[Node]:
        """The BatchNorm calls that close a branch of a sum."""
        terms = list(self._terms(total))
        for term in terms:
            end = self._end(term)
            others = [other for other in terms if other is not term]
            closes = self._ends_in_norm(end) and self._leads_only_to(total, end)
            if closes and any(self._is_skip(other, end) for other in others):
                yield end

    def _terms(self, total: Node) -> Iterator[Node]:
        """The values that are added up, also where a sum of some of them is nothing but a part of the whole."""
        for operand in _nodes(self._args[total]):
            inner = self._end(operand)
            if self.is_sum(inner) and len(self._users[inner]) == 1:
                yield from self._terms(inner)
            else:
                yield operand

    def _end(self, node: Node) -> Node:
        while (source := self._passed(node)) is not None:
            node = source
        return node

    def _passed(self, node: Node) -> Node | None:
        """The input that a node hands on, zero as zero with its gradient; None if it is no such node."""
        name, args = _name(node), self._args.get(node, [])
        sources: list[Node] = []
        if isinstance(self.layer(node), PASSING_LAYERS):
            sources = self._inputs[node]
        elif name in PASSING or name.startswith(POOLING) or (name == "getitem" and not _is_key(args[1])):
            sources = _nodes(args[:1])
        elif name in SCALING:
            sources = _nodes(args)
            if len(sources) > 1:  # a gate: computed from the branch, or from something else
                sources = [source for source in sources if self._ends_in_norm(self._end(source))]
        elif name in ADDING and 0 in [arg for arg in args if not isinstance(arg, Node)]:
            sources = _nodes(args)  # ``sum`` starts from 0
        return sources[0] if len(sources) == 1 else None

    def _ends_in_norm(self, node: Node) -> bool:
        """Whether a node calls a BatchNorm layer; some kinds go on with an activation of their own."""
        layer = self.layer(node)
        return isinstance(layer, _BatchNorm) and all(isinstance(part, PASSING_LAYERS) for part in layer.children())

    def _leads_only_to(self, total: Node, node: Node) -> bool:
        waiting, seen = [node], {node, total}
        while waiting:
            onward = [user for user in self._users[waiting.pop()] if user not in seen]
            if any(user.op == "output" for user in onward):
                return False
            seen.update(onward)
            waiting += onward
        return True

    def _is_skip(self, value: Node, branch: Node) -> bool:
        common = self._above[value] & self._above[branch]
        if not common or self._above[value] & self._bit[branch]:
            return False
        weights, norm = self._between(common, value)
        return not norm if weights == 0 else weights == 1 < self._between(common, branch)[0]

    def _between(self, common: int, value: Node) -> tuple[int, bool]:
        """Layers with weights on the longest way from what is common to a value, and whether a norm is on any way."""
        longest: dict[Node, int] = {}
        norm = False
        for node, bit in self._bit.items():
            if bit & self._above[value] & ~common:
                before = max((longest.get(source, 0) for source in self._inputs[node]), default=0)
                longest[node] = before + self._weights(node)
                norm = norm or isinstance(self.layer(node), NORMS)
        return longest.get(value, 0), norm

    def _weights(self, node: Node) -> int:
        if node.op != "call_module":
            return int(_name(node) == "linear" or _name(node).startswith("conv"))
        layer = self.layer(node)
        return 1 if layer is None else sum(map(_has_weights, layer.modules()))


def _name(node: Node) -> str:
    """What a node calls: the name of a function, method or attribute, without the mark of a change in place."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    if node.op != "call_function":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", "")).split(".", maxsplit=1)[0].rstrip("_")


def _is_in_place(node: Node) -> bool:
    called = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    marked = (
        called.endswith("_") and not called.endswith("__") and getattr(node.target, "__module__", "") != "_operator"
    )
    return _name(node) in IN_PLACE or marked  # ``operator.and_`` is not in place


def _operands(node: Node) -> list[Any]:
    return [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)][:2]


def _nodes(args: list[Any]) -> list[Node]:
    return [arg for arg in args if isinstance(arg, Node)]


def _is_key(index: Any) -> bool:
    return isinstance(index, int | str)


def _is_one_of_several(node: Node) -> bool:
    """Whether a node takes one thing of several out of a container: they need have nothing in common."""
    if _name(node) != "getitem" or not _is_key(node.args[1]):
        return False
    beside = [user for user in node.all_input_nodes[0].users if _name(user) == "getitem" and user.users]
    return len({user.args[1] for user in beside if _is_key(user.args[1])}) > 1


def _has_weights(layer: nn.Module) -> bool:
    """Whether a layer mixes its inputs by weights; a scale for each channel is none."""
    if isinstance(layer, _ConvNd | nn.Linear):
        return True
    own = [] if isinstance(layer, NORMS) else list(layer.parameters(recurse=False))
    return any(is_lazy(weight) or sum(size > 1 for size in weight.shape) > 1 for weight in own)
