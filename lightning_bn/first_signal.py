# SPDX-License-Identifier: Apache-2.0
"""How the signal runs through the layers in one forward pass, and how the weights say it would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bn.filling import Row
from lightning_bn.gains import Follower, leaves
from lightning_bn.initialization import Report
from lightning_bn.layers import NORMS, holds_weights
from lightning_bn.outlook import Stage
from lightning_bn.stats.finite import is_measurable
from lightning_bn.stats.moments import Summary, complete, measure, summarize, wide_dtype
from lightning_bn.taps import choose, plain_name, tensors_in

BOUNDED = ("tanh", "sigmoid", "hardsigmoid", "softmax", "softsign", "hardtanh", "relu6")
"""Nonlinearities behind which the signal is about 1, however large it was before."""


class SignalRecorder:
    """Measure the output of every layer in one forward pass; nothing is read on the host before :meth:`finish`.

    Args:
        model: the network. Measured are modules without submodules, each in its first call.
        eager: whether compiled modules will run eagerly, where they are heard like any others.
    """

    def __init__(self, model: nn.Module, *, eager: bool = False) -> None:
        choice = choose(model, eager=eager)
        self.layers = choice.layers
        self.unseen = choice.unseen
        self._measured: dict[str, tuple[int, Tensor]] = {}

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002  (signature of taps.Hear)
        """Measure what a module put out."""
        if name in self._measured:
            return
        for _, x in tensors_in(output):
            if is_measurable(x) and x.dim() and x.numel() and not x.is_complex():
                with torch.autocast(x.device.type, enabled=False):
                    self._measured[name] = (x.numel(), measure(x))
                return

    def finish(self) -> dict[str, Summary]:
        """Summary by layer, in the order in which the layers ran; one transfer for each device."""
        if not self._measured:
            return {}
        counts, rows = zip(*self._measured.values(), strict=True)
        device = rows[0].device
        wide = torch.stack([row.to(device, wide_dtype(device)) for row in rows]).cpu().double().numpy()
        pooled = complete(wide, np.array([float(count) for count in counts]))
        return {name: summarize(row) for name, row in zip(self._measured, pooled, strict=True)}


def stages(model: nn.Module, report: Report, found: Mapping[str, Follower | None]) -> list[Stage]:
    """The layers in module order, each with the factor by which its weights multiply the signal.

    A layer multiplies the root mean square of what it gets by std·√fan_in, less what the ReLU before it cut off:
    std·√(fan_in/2) (He et al. 2015, eq. 7). Where the nonlinearity before it is unknown, ReLU is assumed.

    Args:
        model: the network.
        report: what its parameters hold.
        found: what follows each layer, from :func:`~lightning_bn.gains.followers`.
    """
    modules = {plain_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    rows = {row.name: row for row in report.rows}
    return list(_stages(modules, rows, found))


def _stages(
    modules: Mapping[str, nn.Module], rows: Mapping[str, Row], found: Mapping[str, Follower | None]
) -> Iterator[Stage]:
    cut = 1.0  # share of the mean square that the nonlinearity before lets through; the input has none before it
    for layer in leaves(modules):
        module = modules[layer]
        row = rows.get(f"{layer}.weight" if layer else "weight")
        if isinstance(module, NORMS):
            yield Stage(layer, 1.0, resets=True, is_norm=True)
        elif holds_weights(module) and (row is None or row.actual_std is None):
            yield Stage(layer, 1.0, resets=True)  # attention, recurrent and unreadable layers: bounded, or unknown
            cut = 1.0
        elif holds_weights(module) and row is not None and row.actual_std is not None:
            yield Stage(layer, row.actual_std * math.sqrt(row.fan_in * cut), resets=False)
            follower = found.get(layer)
            cut = 1.0 if follower is not None and follower.nonlinearity == "linear" else 0.5
            if follower is not None and follower.nonlinearity in BOUNDED:
                yield Stage(f"{layer}, behind {follower.nonlinearity}", 1.0, resets=True)
                cut = 1.0
