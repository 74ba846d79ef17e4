# SPDX-License-Identifier: Apache-2.0
"""What is done about overfitting through γ and β, where the user asked for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from lightning_bn.callbacks.arguments import check_choice
from lightning_bn.norms import find_batchnorm
from lightning_bn.rules.affine_driven_overfitting import RULE as DRIVEN
from lightning_bn.rules.overfitting_elsewhere import RULE as ELSEWHERE
from lightning_bn.rules.shared_overfitting import RULE as SHARED
from lightning_bn.rules.verdict import RISE
from lightning_bn.stats.batchnorm import Affine

if TYPE_CHECKING:
    from lightning_bn.callbacks.evidence import Evidence
    from lightning_bn.rules.affine_drift import Watched

Action = Literal["report", "stop", "freeze", "rewind"]
ACTIONS = get_args(Action)
PATIENCE = 3
"""Validations that come after the best one before a rise is looked into, and between two looks."""


def check_action(value: object, *, assess: bool) -> Action:
    """What is to be done about overfitting.

    Raises:
        ValueError: where it is none of the actions, or needs a verdict that is not looked for.
    """
    action: Any = check_choice("on_overfitting", value, ACTIONS)
    if action != "report" and not assess:
        raise ValueError(f"assess must be True for on_overfitting={action!r}, got {assess!r}")
    return cast("Action", action)


class Response:
    """Decides when to look, and acts on what was found.

    Args:
        action: ``report`` does nothing.
    """

    def __init__(self, action: Action) -> None:
        self.action = action
        self.frozen = False
        """Whether γ and β are held where they are."""
        self._rests = 0  # validations until the next look

    def is_time(self, watched: Watched | None, evidence: Evidence | None) -> bool:
        """Whether a validation that is over opens the gate: the loss is a tenth above its best, and has been rising.

        Args:
            watched: the watched metric.
            evidence: what was collected for a verdict.
        """
        self._rests = max(self._rests - 1, 0)
        since_best = evidence.since_best if evidence is not None else 0
        if self.action == "report" or self.frozen or watched is None or since_best < PATIENCE or self._rests:
            return False
        risen = watched.best > 0 and watched.last >= (1 + RISE) * watched.best
        self._rests = PATIENCE if risen else 0
        return risen

    def act(self, model: nn.Module, said: Collection[str], best: Mapping[str, Affine]) -> bool:
        """Do what was asked for.

        Args:
            model: the network; with ``rewind`` its γ and β become those of the best validation.
            said: rules that spoke.
            best: γ and β of the best validation, by layer.

        Returns:
            Whether the run is to be stopped.
        """
        if self.action == "stop":
            return bool({DRIVEN, SHARED, ELSEWHERE} & set(said))
        if self.action != "report" and {DRIVEN, SHARED} & set(said):
            self.frozen = True
            if self.action == "rewind":
                _put_back(model, best)
        return False

    def hold(self, model: nn.Module) -> None:
        """Take the gradients of γ and β away, so that no optimizer moves them; called before each of its steps.

        ``requires_grad`` stays, as distributed training counts on every gradient.
        """
        if self.frozen:
            for layer in find_batchnorm(model).values():
                for x in layer.parameters(recurse=False):
                    x.grad = None


def _put_back(model: nn.Module, best: Mapping[str, Affine]) -> None:
    with torch.no_grad():
        for name, layer in find_batchnorm(model).items():
            if name in best and layer.weight is not None and layer.bias is not None:
                layer.weight.copy_(best[name].gamma)
                layer.bias.copy_(best[name].beta)
