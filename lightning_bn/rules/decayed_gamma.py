# SPDX-License-Identifier: Apache-2.0
"""A weight decay on γ that leaves next to nothing of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "decayed-gamma"
EXTREME = {"adamw": 10.0, "adam": 1.0, "sgd": 0.1}
"""Weight decay from which on it is a warning, by how it acts. Decay beside a step of Adam bounds a parameter by
1 / decay (Xie & Li 2024, theorem 1.1): 0.1 at 10."""


def decayed_gamma(
    layers: Sequence[str], law: str, lr: float, decay: float, *, momentum: float = 0.0, steps: float = math.inf
) -> Finding | None:
    """Judge the weight decay of a parameter group that holds γ.

    Args:
        layers: BatchNorm layers whose γ it holds.
        law: how the decay acts: ``adamw``, ``adam`` or ``sgd``; of others nothing is known.
        lr: learning rate of the group.
        decay: its weight decay.
        momentum: momentum of ``sgd``.
        steps: optimizer steps of the whole fit; infinite where that is not known.

    Returns:
        A ``warning`` from a decay of 10 (AdamW), 1 (Adam) or 0.1 (SGD) on, if the fit is long enough for the decay
        alone to bring γ from 1 to about 1/e; else None.
    """
    if not layers or decay < EXTREME.get(law, math.inf) or lr <= 0 or steps * _pull(law, lr, decay, momentum) < 1:
        return None
    acts = {
        "adamw": f"which bounds γ by 1 / {decay:g} = {1 / decay:.2g}",
        "adam": "which Adam scales up to whole steps towards 0 wherever it outweighs the gradient of the loss",
        "sgd": f"which at γ = 1 outweighs every gradient of the loss below {decay:g}",
    }[law]
    evidence = f"γ of {listed(layers)} has a weight decay of {decay:g} at a learning rate of {lr:g}, {acts}"
    advice = "put γ and β into a parameter group with weight_decay=0"
    data = {"layers": list(layers), "law": law, "lr": lr, "decay": decay, "momentum": momentum}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=the_one(layers), data=data)


def _pull(law: str, lr: float, decay: float, momentum: float) -> float:
    """How far the decay alone moves a γ of 1 in one step."""
    if law == "adam":
        return lr
    return lr * decay / (1 - momentum if law == "sgd" and momentum < 1 else 1)
