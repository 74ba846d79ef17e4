# SPDX-License-Identifier: Apache-2.0
"""The initial weights make the signal so large that it leaves the range of its dtype."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.outlook import Prediction

RULE = "overflow-by-initialisation"


def overflow_by_initialisation(ahead: Prediction | None, scheme: str) -> Finding | None:
    """Say where the first forward pass is predicted to overflow.

    Args:
        ahead: the prediction; None is none.
        scheme: what initialised the weights.

    Returns:
        A ``warning`` for the layer.
    """
    if ahead is None:
        return None
    dtype = str(ahead.dtype).removeprefix("torch.")
    grows = f"layer {ahead.place} of {ahead.of} multiplies the signal by {ahead.growth:.3g}"
    size = f"10^{ahead.log10_rms:.1f} (root mean square)"
    if ahead.kind == "variance":
        what = f"in front of {ahead.layer} it is then {size}, whose square is beyond float32: the norm puts out zeros"
    else:
        what = f"it is then {size}, and its largest values are beyond the range of {dtype}"
    evidence = (
        f"initialised by {scheme}, {grows}, and {what}; predicted from the weights alone, for an input of root mean "
        "square 1, in module order, without skip connections"
    )
    data = {"place": ahead.place, "log10_rms": ahead.log10_rms, "dtype": dtype, "kind": ahead.kind, "scheme": scheme}
    return Finding(RULE, Severity.WARNING, evidence, "initialise with he, or put a norm behind the layer", ahead.layer, data=data)
