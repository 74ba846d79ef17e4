# SPDX-License-Identifier: Apache-2.0
"""Find the BatchNorm layers that close a residual branch."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_bn.norms import find_batchnorm
from lightning_bn.taps import plain_name
from lightning_bn.tracing import trace

ADDITIONS = (operator.add, operator.iadd, torch.add)
PASSING_MODULES = ("torch.nn.modules.dropout", "torch.nn.modules.pooling", "torch.nn.modules.flatten")
PASSING_FUNCTIONS = (
    *(operator.mul, operator.imul, operator.truediv, torch.mul, torch.flatten, torch.reshape, torch.permute),
    *(nn.functional.dropout, nn.functional.dropout2d, nn.functional.avg_pool2d, nn.functional.interpolate),
)
PASSING_METHODS = ("mul", "mul_", "div", "view", "reshape", "flatten", "permute", "transpose", "contiguous", "to")
LONGEST_SHORTCUT = 1
"""Layers with weights that a skip connection may have: one that projects onto the shape of the branch."""


@dataclass(frozen=True)
class Closers:
    """What closes the residual branches of a model.

    Args:
        closing: paths of the BatchNorm layers whose output is added to a skip connection, in the order of the model.
        unseen: modules whose forward could not be looked into, by path, with the reason.
    """

    closing: tuple[str, ...] = ()
    unseen: dict[str, str] = field(default_factory=dict)


def residual_closing(model: nn.Module) -> Closers:
    """The BatchNorm layers that close a residual branch: γ = 0 there starts the block as its skip connection.

    The forward of the model is traced, not run. A BatchNorm closes a branch if its output is added to what the branch
    began from, or to a projection of that by one layer with weights; dropout, pooling, reshaping and multiplication may
    come between it and the sum, an activation may not, as ReLU passes no gradient at 0 (Goyal et al. 2017, sec. 5.1).
    Two branches of the same number of layers are parallel, and neither closes.

    Args:
        model: the network, also with lazy or meta parameters. It is left as it was.

    Returns:
        The layers, and the modules that could not be looked into.
    """
    norms = find_batchnorm(model)
    if not norms:
        return Closers()
    seen = trace(model)
    paths = {module: plain_name(path) for path, module in model.named_modules()}
    unseen = {
        paths.get(module, type(module).__name__): why
        for module, why in seen.refused.items()
        if any(isinstance(below, _BatchNorm) for below in module.modules())
    }
    modules = {plain_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    found = set(_closers(seen.graph, modules)) if seen.graph is not None else set()
    return Closers(tuple(name for name, layer in norms.items() if layer in found), unseen)


def _closers(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    before: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        before[node] = frozenset().union(*({source} | before[source] for source in node.all_input_nodes))
    for node in graph.nodes:
        pair = [each for each in node.args if isinstance(each, fx.Node)]
        adds = node.target in ADDITIONS or (node.op == "call_method" and node.target in {"add", "add_"})
        if not adds or len(pair) != 2:  # noqa: PLR2004  (a sum of two)
            continue
        for branch, skip in (pair, pair[::-1]):
            norm = _norm_behind(branch, modules)
            common = (before[branch] | {branch}) & (before[skip] | {skip})
            longer = _weighted((before[branch] | {branch}) - common, modules)
            shorter = _weighted((before[skip] | {skip}) - common, modules)
            if norm is not None and common and shorter <= LONGEST_SHORTCUT and shorter < longer:
                yield norm


def _norm_behind(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The BatchNorm that an operand comes from, through nothing but what keeps zeros zero and passes the gradient."""
    module = _module_of(node, modules)
    if isinstance(module, _BatchNorm):
        return module
    passes = (
        isinstance(module, nn.Identity)
        or type(module).__module__ in PASSING_MODULES
        or (node.op == "call_function" and node.target in PASSING_FUNCTIONS)
        or (node.op == "call_method" and node.target in PASSING_METHODS)
    )
    sources = node.all_input_nodes if passes else []
    return next((norm for source in sources if (norm := _norm_behind(source, modules)) is not None), None)


def _weighted(nodes: frozenset[fx.Node], modules: dict[str, nn.Module]) -> int:
    kinds = (nn.Linear, _ConvNd)
    return sum(isinstance(_module_of(node, modules), kinds) for node in nodes)


def _module_of(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules.get(plain_name(str(node.target))) if node.op == "call_module" else None
