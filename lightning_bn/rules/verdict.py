# SPDX-License-Identifier: Apache-2.0
"""What the rules about overfitting share: the gate in front of them, and the numbers that stand behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_bn.stats.attribution import Losses

RISE, SURE = 0.1, 3.0
"""Part of the loss, and standard errors, by which the validation loss has to have risen since its best: that one is the
smallest of many, so that a little rise is no news."""
HALF = 0.5
"""Share of the rise above which γ and β drive it, if both orders of putting them back say so."""


@dataclass(frozen=True)
class Case:
    """One run, at the end of it or where it is looked at.

    Args:
        name: name of the validation loss.
        best_epoch: epoch of the best validation, counted from 0.
        losses: validation losses in all settings.
        drift: median over the layers of ‖γ − γ_best‖/‖γ_best‖.
        train_fell: whether the training loss is lower than in the best epoch; None where it is not known.
    """

    name: str
    best_epoch: int
    losses: Losses
    drift: float
    train_fell: bool | None

    @property
    def overfits(self) -> bool:
        """Whether validation loss rose while training loss fell, with statistics that suit the weights."""
        rise = self.losses.rise
        return rise.relative >= RISE and rise.z >= SURE and self.train_fell is not False

    @property
    def unsure(self) -> bool:
        """Whether the validation loss rose far enough, and it is not sure that it did."""
        rise = self.losses.rise
        return rise.relative >= RISE and rise.z < SURE and self.train_fell is not False

    @property
    def share(self) -> tuple[float, float] | None:
        """Smaller and larger share of the rise that γ and β carry."""
        shares = self.losses.shares
        return None if shares is None else (min(shares), max(shares))

    def words(self) -> str:
        """The rise in words."""
        rise = self.losses.rise
        return (
            f"with statistics estimated anew for both, {self.name} rose from {rise.before:.4g} (epoch "
            f"{self.best_epoch}) to {rise.after:.4g} ({rise.relative:+.0%}, {rise.z:.1f} standard errors) while "
            "the training loss fell"
        )

    def data(self) -> dict[str, Any]:
        """The numbers."""
        losses = self.losses
        return {
            "name": self.name,
            "best_epoch": self.best_epoch,
            "rise": vars(losses.rise),
            "statistics": vars(losses.statistics),
            "lag": None if losses.lag is None else vars(losses.lag),
            "mismatch": None if losses.mismatch is None else vars(losses.mismatch),
            "shares": None if losses.shares is None else list(losses.shares),
            "drift": self.drift,
            "batches": len(losses.sizes),
            "samples": int(sum(losses.sizes)),
        }


def percent(low: float, high: float) -> str:
    """A range of shares in words.

    Example:
        >>> percent(0.12, 0.34), percent(0.999, 1.0)
        ('12% to 34%', '100%')
    """
    left, right = f"{low:.0%}", f"{high:.0%}"
    return left if left == right else f"{left} to {right}"
