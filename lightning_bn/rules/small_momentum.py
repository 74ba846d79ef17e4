# SPDX-License-Identifier: Apache-2.0
"""A momentum so small that the fit ends before the running statistics have forgotten where they started."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "small-momentum"
USUAL = 0.1
"""torch's own momentum: a fit that is too short for it as well is no fault of the momentum."""
LEFT = 0.1
"""Share of the start that is left at the end, from which on it is a warning. On scikit-learn's digits such a share
makes the validation loss of a perceptron half as large again and more, against statistics that are taken anew; a
hundredth makes it a third larger at most (tests/rules/test_preflight_rules.py)."""


def small_momentum(momenta: Mapping[str, float], batches: float) -> Finding | None:
    """Foresee running statistics that still hold their start, mean 0 and variance 1, at the end of the fit.

    After T updates of momentum m a share of (1 - m)^T of the start is left.

    Args:
        momenta: momentum of each BatchNorm layer whose running statistics are fresh and will be updated.
        batches: number of training batches until the end of the fit; infinite where that is not known.

    Returns:
        A ``warning`` where a tenth or more will be left that a momentum of 0.1 would have brought below a hundredth.
    """
    if not math.isfinite(batches) or (1 - USUAL) ** batches > LEFT**2:
        return None
    left = {layer: (1 - m) ** batches for layer, m in momenta.items() if 0 < m < USUAL}
    left = {layer: share for layer, share in left.items() if share >= LEFT}
    if not left:
        return None
    layers, top = list(left), max(left, key=left.__getitem__)
    evidence = (
        f"momentum {momenta[top]:g} in {listed(layers)}: after the {batches:.0f} batches of this fit {left[top]:.0%} "
        "of the running statistics is still what they started from, mean 0 and variance 1"
    )
    advice = "leave momentum at 0.1 (in torch it is the weight of the newest batch), or at None for a plain average"
    data = {"momenta": {layer: momenta[layer] for layer in layers}, "left": left, "batches": batches}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=the_one(layers), data=data)
