# SPDX-License-Identifier: Apache-2.0
"""Which module takes what another one put out, unchanged: seen once, by where tensors lie in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from lightning_bn.stats.finite import is_measurable
from lightning_bn.stats.units import kind_of
from lightning_bn.taps import GROUPS, tensors_in

WEIGHTED = (nn.Linear, _ConvNd)


class Wiring:
    """Follows tensors from module to module through one forward pass; it holds on to them while it does.

    Two tensors that are alive at once never begin at the same address, so that an input that lies where an output lies
    is that output, or a reshaped view of it.
    """

    def __init__(self) -> None:
        self.direct: set[str] = set()
        """Activations whose output a layer with weights or a norm takes, as it is or behind dropout or pooling."""
        self.dropouts: dict[str, tuple[str, float]] = {}
        """For each BatchNorm layer the dropout, and its rate, that reaches it through one layer with weights."""
        self._kept: list[Tensor] = []
        self._activations: dict[int, str] = {}
        self._dropped: dict[int, tuple[str, float]] = {}
        self._behind: dict[int, tuple[str, float]] = {}

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Take note of one call; called after each forward pass of a layer."""
        came = next((x for _, x in tensors_in(inputs[0]) if is_measurable(x)), None)
        if came is None or not isinstance(output, Tensor) or not is_measurable(output):
            return
        self._kept += [came, output]
        at, to = came.data_ptr(), output.data_ptr()
        dropout = isinstance(module, _DropoutNd)
        takes = isinstance(module, WEIGHTED) or GROUPS["norm"](module) or dropout or "Pool" in type(module).__name__
        if takes and at in self._activations:
            self.direct.add(self._activations[at])
        if kind_of(module):
            self._activations[to] = name
        elif isinstance(module, _DropoutNd) and module.training and module.p:
            self._dropped[to] = (name, float(module.p))
        elif isinstance(module, WEIGHTED) and at in self._dropped:
            self._behind[to] = self._dropped[at]
        elif isinstance(module, _BatchNorm) and module.training and at in self._behind:
            self.dropouts[name] = self._behind[at]

    def let_go(self) -> None:
        """The pass is over."""
        self._kept.clear()
