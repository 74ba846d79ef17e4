# SPDX-License-Identifier: Apache-2.0
"""Find the BatchNorm layers of a model, and those of them that close a residual branch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.residual import batchnorm_calls
from lightning_bn.taps import plain_name
from lightning_bn.tracing import Trace, is_layer, trace, wrapped


@dataclass(frozen=True)
class Closers:
    """What closes the residual branches of a model.

    Args:
        closing: paths of the BatchNorm layers whose output is added to a skip connection, in the order of the model.
        unseen: paths of modules with BatchNorm below them whose own forward could not be looked into, with the
            reason. Of sums that stand in such a forward nothing is known; the modules below it were looked into.
    """

    closing: tuple[str, ...] = ()
    unseen: dict[str, str] = field(default_factory=dict)


def find_batchnorm(model: nn.Module) -> dict[str, _BatchNorm]:
    """All BatchNorm layers by module path, in the order of ``named_modules``.

    Subclasses of ``BatchNorm1d/2d/3d``, ``SyncBatchNorm`` and direct subclasses of torch's common base class
    are found; a layer that is used in several places is listed once, under its first name.

    Args:
        model: any module.

    Returns:
        Layer by name; without BatchNorm an empty dict.

    Example:
        >>> list(find_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        ['1']
    """
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def residual_closing(model: nn.Module) -> Closers:
    """The BatchNorm layers that close a residual branch: γ = 0 there starts the block as its skip connection.

    Goyal et al. 2017, sec. 5.1. The Python code of the model's forward is traced as it runs in eval mode; no layer
    runs, and the model, the random streams and whoever listens are left as they were. What counts as closing a branch
    is said in :func:`.residual.batchnorm_calls`; a layer that is called several times has to close one each time.

    Args:
        model: the network, on any device, also with lazy or meta parameters.

    Returns:
        The layers, and the modules that could not be looked into. Two branches without a skip connection, one with
        one layer of weights and one with more, look like a projection shortcut and its branch, and are taken for it.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        ...
        ...     def forward(self, x):
        ...         return torch.relu(x + self.branch(x))
        >>> residual_closing(nn.Sequential(Block(), nn.BatchNorm1d(2))).closing
        ('0.branch.1',)
    """
    above = _above_batchnorm(model)
    calls: dict[nn.Module, list[bool]] = {}
    unseen: dict[nn.Module, str] = {}
    done: set[nn.Module] = set()
    for module in above:
        # Below a module that was refused, or is not called by the one around it, there may be calls not seen so far.
        if module in done or wrapped(module) is not None or all(map(calls.__contains__, _normalising(module))):
            continue
        found = trace(module)
        calls = {**_calls(module, found), **calls}
        unseen.update(found.refused)
        done.update(found.entered, *(part.modules() for part in found.refused if is_layer(part)), found.refused)
    return Closers(
        tuple(name for name, layer in find_batchnorm(model).items() if calls.get(layer) and all(calls[layer])),
        {name: unseen[module] for module, name in above.items() if module in unseen},
    )


def _calls(root: nn.Module, found: Trace) -> dict[nn.Module, list[bool]]:
    """For each BatchNorm layer in a trace, whether its calls close a branch."""
    calls: dict[nn.Module, list[bool]] = defaultdict(list)
    if found.graph is not None:
        for layer, closes in batchnorm_calls(found.graph, dict(root.named_modules())):
            calls[layer].append(closes)
    return calls


def _above_batchnorm(model: nn.Module) -> dict[nn.Module, str]:
    """Modules with BatchNorm below them, with their paths, from the top down."""
    norms = set(_normalising(model))
    above: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if path and module in norms:
            parts = path.split(".")
            above.update(".".join(parts[:length]) for length in range(len(parts)))
    return {module: plain_name(path) for path, module in model.named_modules() if path in above}


def _normalising(root: nn.Module) -> Iterator[nn.Module]:
    """BatchNorm layers, also scripted ones."""
    for module in root.modules():
        scripted = isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in str(module.original_name)
        if scripted or isinstance(module, _BatchNorm):
            yield module
