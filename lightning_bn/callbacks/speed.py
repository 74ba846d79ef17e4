# SPDX-License-Identifier: Apache-2.0
"""How fast γ and β move from one optimizer step to the next, and how much of the gradient falls on them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bn.callbacks.drift import Pairs, References, affine_of, measured
from lightning_bn.norms import find_batchnorm
from lightning_bn.rules.affine_drift import Pace
from lightning_bn.stats.batchnorm import Affine

Report = tuple[Pairs, Pairs, Pairs, float]
"""Drift since the start, drift since the best validation, speed, and share of γ and β in the squared gradient norm."""


class Speed:
    """Copies γ and β in front of the optimizer step of a due step, and drops the copies behind it.

    All values stay on the device until :meth:`after` brings them to the host together with the drift.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Affine] = {}
        self._squares: Tensor | None = None
        self._latest: Pairs = {}
        self._shares = (math.nan, 0.0, 0)  # the last one, sum and number

    def before(self, model: nn.Module, optimizer: Optimizer) -> None:
        """An optimizer is about to step; of several, each is to be told.

        Args:
            model: the network.
            optimizer: holds gradients as it will use them, before any clipping.
        """
        self._copies = self._copies or affine_of(model)
        affine = {id(x) for layer in find_batchnorm(model).values() for x in layer.parameters(recurse=False)}
        squares = squared_norms([x for group in optimizer.param_groups for x in group["params"]], affine)
        if squares is not None:
            self._squares = squares if self._squares is None else self._squares.to(squares.device) + squares

    def after(self, model: nn.Module, references: References) -> Report:
        """The step is over; one transfer brings all numbers to the host.

        Args:
            model: the network.
            references: γ and β at the start of the run, and at its best validation.
        """
        compared = (references.start, references.best, self._copies)
        (since_start, since_best, speed), squares = measured(affine_of(model), compared, self._squares)
        self._copies, self._squares = {}, None
        share = share_of(*squares) if squares else math.nan
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


def squared_norms(parameters: Iterable[nn.Parameter], affine: set[int]) -> Tensor | None:
    """Squared 2-norm of the gradients of γ and β, and of all gradients; nothing is read on the host.

    Args:
        parameters: what an optimizer trains.
        affine: ids of all γ and β.

    Returns:
        ``(2,)``, float32, on the device of the first gradient. None without gradients, and where a gradient is sharded
        or sparse, as the norm is then not known here.
    """
    graded = [x for x in parameters if x.grad is not None]
    gradients = [x.grad.detach() for x in graded if x.grad is not None]
    if not gradients or any(hasattr(x, "to_local") or x.is_sparse for x in gradients):
        return None
    device = gradients[0].device
    norms = torch._foreach_norm(gradients)  # noqa: SLF001  (what clip_grad_norm_ uses)
    squares = torch.stack([norm.float().to(device, non_blocking=True) for norm in norms]).square()
    mine = [place for place, x in enumerate(graded) if id(x) in affine]
    on_affine = torch.stack([squares[place] for place in mine]).sum() if mine else torch.zeros_like(squares[0])
    return torch.stack([on_affine, squares.sum()])


def share_of(affine: float, everything: float) -> float:
    """Share of the squared gradient norm that falls on γ and β; NaN where it is not finite, or there is no gradient.

    The scale of a ``GradScaler`` cancels.

    Example:
        >>> share_of(1.0, 4.0)
        0.25
    """
    return affine / everything if everything and math.isfinite(everything) else math.nan
