# SPDX-License-Identifier: Apache-2.0
"""A layer's output is finite, but so close to the end of its dtype's range that training will leave it."""

from __future__ import annotations

import math

import torch

from lightning_bn.findings import Finding, Severity

RULE = "little-headroom"
SHARE = 0.25
"""Share of the range from which on it is said: two more doublings, and the numbers end."""


def little_headroom(layer: str, largest: float, dtype: torch.dtype) -> Finding | None:
    """Judge the largest value of one layer's output in the first pass.

    Args:
        layer: module path.
        largest: largest absolute value of its output, finite.
        dtype: dtype of the output.

    Returns:
        A ``warning`` from a quarter of the range on, else None.
    """
    end = float(torch.finfo(dtype).max)
    share = largest / end
    if not SHARE <= share <= 1:  # NaN too
        return None
    name = str(dtype).removeprefix("torch.")
    doublings = math.log2(1 / share) if share else math.inf
    evidence = (
        f"the largest |value| of its output is {largest:.4g}, {100 * share:.0f} % of the range of {name} "
        f"({end:.5g}): {doublings:.1f} doublings are left"
    )
    advice = "use bfloat16 or float32 here, or make the weights in front of it smaller"
    data = {"largest": largest, "share": share, "dtype": name}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=layer, data=data)
