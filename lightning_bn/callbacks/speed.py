# SPDX-License-Identifier: Apache-2.0
"""How fast γ and β move from one optimizer step to the next, and how much of the gradient falls on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_bn.callbacks.drift import Pairs, References, copied, measured, with_affine
from lightning_bn.norms import find_batchnorm
from lightning_bn.overview import drift_overview, speed_overview
from lightning_bn.rules.affine_drift import Pace
from lightning_bn.stats.batchnorm import Affine

Report = tuple[Pairs, Pairs, Pairs, float]
"""Drift since the start, drift since the best validation, speed, and share of γ and β in the squared gradient norm."""


class Speed:
    """Copies γ and β in front of the optimizer step of a due step, and drops the copies behind it.

    All values stay on the device until :meth:`after` brings them to the host together with the drift.
    """

    def __init__(self) -> None:
        self._layers: dict[str, _BatchNorm] | None = None  # that have γ and β; None before they were looked for
        self._affine: set[int] = set()  # ids of all γ and β
        self._copies: dict[str, Affine] = {}
        self._norms: list[Norms | None] = []
        self._latest: Pairs = {}
        self._shares = (math.nan, 0.0, 0)  # the last one, sum and number

    def forget_layers(self) -> None:
        """Look for the layers anew when the next step is due, as they may have been replaced."""
        self._layers = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but layers, and what belongs to a step in progress."""
        return {**vars(self), "_layers": None, "_copies": {}, "_norms": []}

    def before(self, model: nn.Module, optimizer: Optimizer) -> None:
        """An optimizer is about to step; of several, each is to be told.

        Args:
            model: the network.
            optimizer: holds gradients as it will use them, before any clipping.
        """
        layers = self._found(model)
        if not self._norms:  # the first optimizer
            self._copies = copied(layers)
        self._norms.append(norms_of([x for group in optimizer.param_groups for x in group["params"]], self._affine))

    def _found(self, model: nn.Module) -> dict[str, _BatchNorm]:
        if self._layers is None:
            layers = find_batchnorm(model)
            self._affine = {id(x) for layer in layers.values() for x in layer.parameters(recurse=False)}
            self._layers = with_affine(layers)
        return self._layers

    def after(self, model: nn.Module, references: References) -> Report:
        """The step is over; one transfer brings all numbers to the host.

        Args:
            model: the network.
            references: γ and β at the start of the run, and at its best validation.
        """
        layers = self._found(model)
        now = {name: Affine(layer.weight.detach(), layer.bias.detach()) for name, layer in layers.items()}
        graded = [norms for norms in self._norms if norms is not None]
        compared, beside = (references.start, references.best, self._copies), [norms.values for norms in graded]
        (since_start, since_best, speed), numbers = measured(now, compared, beside)
        on_affine = [mine for norms in graded for mine in norms.on_affine]
        share = share_of(numbers, on_affine)
        self._copies, self._norms = {}, []
        if math.isfinite(share):
            _, total, steps = self._shares
            self._shares = (share, total + share, steps + 1)
        self._latest = speed or self._latest
        return since_start, since_best, speed, share

    @property
    def pace(self) -> Pace | None:
        """What the due steps so far had; None before the first."""
        last, total, steps = self._shares
        if not self._latest:
            return None
        return Pace(self._latest, last if steps else None, total / steps if steps else None, steps)


def overview(report: Report) -> dict[str, float]:
    """What the loggers get of a due step."""
    since_start, since_best, speed, share = report
    return drift_overview(since_start.values(), since_best.values()) | speed_overview(speed.values(), share)


class Norms(NamedTuple):
    """Norms of the gradients that one optimizer uses.

    Args:
        values: 2-norm of each gradient, ``(K,)``, on the device of the first.
        on_affine: whether it is the gradient of γ or β.
    """

    values: Tensor
    on_affine: list[bool]


def norms_of(parameters: Iterable[nn.Parameter], affine: set[int]) -> Norms | None:
    """2-norm of each gradient; nothing is read on the host.

    Args:
        parameters: what an optimizer trains.
        affine: ids of all γ and β.

    Returns:
        The norms. None without gradients, and where a gradient is sharded or sparse, as its norm is not known here.
    """
    graded = [(gradient, id(x) in affine) for x in parameters if (gradient := x.grad) is not None]
    gradients = [gradient for gradient, _ in graded]
    if not gradients or any(x.is_sparse or (type(x) is not Tensor and hasattr(x, "to_local")) for x in gradients):
        return None
    with torch.no_grad():
        norms = list(torch._foreach_norm(gradients))  # noqa: SLF001  (what clip_grad_norm_ uses)
        if len({(x.device, x.dtype) for x in norms}) > 1:
            device = norms[0].device
            norms = [x.to(device, torch.float32, non_blocking=device.type != "cpu") for x in norms]
        return Norms(torch.stack(norms), [mine for _, mine in graded])


def share_of(norms: Sequence[float], on_affine: Sequence[bool]) -> float:
    """Share of the squared gradient norm that falls on γ and β; NaN where it is not finite, or there is no gradient.

    The scale of a ``GradScaler`` cancels.

    Args:
        norms: 2-norm of each gradient.
        on_affine: whether it is the gradient of γ or β.

    Example:
        >>> share_of([3.0, 4.0], [True, False])
        0.36
    """
    everything = math.fsum(norm * norm for norm in norms) if all(map(math.isfinite, norms)) else math.nan
    affine = math.fsum(norm * norm for norm, mine in zip(norms, on_affine, strict=True) if mine)
    return affine / everything if everything and math.isfinite(everything) else math.nan
