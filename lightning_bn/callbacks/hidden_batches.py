# SPDX-License-Identifier: Apache-2.0
"""What compiled BatchNorm layers normalised by, from what one update did to their running statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_bn.stats.batchnorm import Batch, Saved, batch_statistics_from_running


class HiddenBatches:
    """Reads mean and variance of a batch off layers that no hook reaches; nothing is read on the host.

    Args:
        layers: those layers, by name. One with ``momentum=None`` tells nothing.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.layers = dict(layers)
        self._before: dict[str, tuple[Batch, Tensor]] = {}

    def begin(self) -> None:
        """A batch begins: copy the running statistics that it will update."""
        running = {name: _running(layer) for name, layer in self.layers.items() if layer.training and layer.momentum}
        self._before = {
            name: (Batch(found[0].mean.clone(), found[0].var.clone()), found[1].clone())
            for name, found in running.items()
            if found is not None
        }

    def end(self) -> dict[str, Saved]:
        """The batch is over.

        Returns:
            What each layer normalised by, but with the unbiased variance; it is 0 in all channels of a layer that did
            not update its statistics exactly once.
        """
        batches = {}
        for name, (before, count) in self._before.items():
            layer, found = self.layers[name], _running(self.layers[name])
            if found is not None and layer.momentum:
                batch = batch_statistics_from_running(before, found[0], factor=layer.momentum, count=None)
                var = torch.where(found[1] == count + 1, batch.var.clamp(min=0), 0.0)
                batches[name] = Saved(batch.mean, (var + layer.eps).rsqrt(), layer.eps)
        self._before = {}
        return batches


def _running(layer: _BatchNorm) -> tuple[Batch, Tensor] | None:
    """Running mean and variance, and how often they were updated; None where the layer keeps none, or not yet."""
    mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or count is None or any(map(is_lazy, layer.buffers())):
        return None
    return Batch(mean.detach(), var.detach()), count
