# SPDX-License-Identifier: Apache-2.0
"""BatchNorm layers in training are asked and not measured: what they normalised by tells the moments behind them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.tally import Reader
from lightning_bn.stats.batchnorm import output_moments, saved_statistics
from lightning_bn.stats.moments import Rows, blank

VECTORS = 4
"""Mean, 1/√(v + ε), γ and β, v being the biased batch variance."""


class Norm(NamedTuple):
    """What a layer made of one batch.

    Args:
        name: the layer.
        size: values that it put out.
        channels: number of channels, C.
        eps: its ε.
    """

    name: str
    size: int
    channels: int
    eps: float


class AskedNorms:
    """The answers of one due step; they lie on the device until :meth:`read` gets them from the host."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._heard: list[Norm] = []
        self._answers: list[Tensor] = []

    @property
    def names(self) -> list[str]:
        """The layers, in the order in which they answered."""
        return [norm.name for norm in self._heard]

    def ask(self, name: str, module: _BatchNorm, output: Tensor) -> bool:
        """Let a layer say mean, 1/√(v + ε), γ and β, ``(C,)`` each; nothing is read on the host.

        Args:
            name: the layer.
            module: the layer.
            output: what it put out, before the backward pass frees the graph.

        Returns:
            Whether it had an answer.
        """
        saved = saved_statistics(output)
        if saved is None:
            return False
        gamma: Tensor | None = module.weight
        beta: Tensor | None = module.bias
        gamma = torch.ones_like(saved[0]) if gamma is None else gamma
        beta = torch.zeros_like(saved[0]) if beta is None else beta
        self._heard.append(Norm(name, output.numel(), len(saved[0]), module.eps))
        # A copy at once: the optimizer moves γ and β, and FSDP frees them when the forward pass is over.
        self._answers.append(torch.cat([*saved, gamma, beta]).detach())
        return True

    def parts(self) -> list[Tensor]:
        """What is to come to the host."""
        return self._answers

    def read(self, host: Reader) -> tuple[Rows, dict[str, float]]:
        """Take what :meth:`parts` gave, now on the host.

        Returns:
            A row of each answer, of which mean and variance are known, and range and zeros are not; and by layer the
            median over channels of the batch variance in front of it.
        """
        groups: dict[int, list[int]] = {}
        answers = []
        for place, norm in enumerate(self._heard):
            groups.setdefault(norm.channels, []).append(place)
            answers.append(host.take(norm.channels * VECTORS))
        rows, variances = blank(len(answers)), {}
        for channels, places in groups.items():
            values = np.concatenate([answers[place] for place in places]).reshape(-1, VECTORS, channels)
            asked = [self._heard[place] for place in places]
            for place, norm, found in zip(places, asked, output_moments(values, [x.eps for x in asked]), strict=True):
                unknown = 0 if math.isfinite(found.var) else math.nan
                rows[place] = (norm.size, found.mean, found.var * norm.size, math.inf, -math.inf, 0, 0, unknown)
                variances[norm.name] = found.median
        return rows, variances
