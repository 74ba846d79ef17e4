# SPDX-License-Identifier: Apache-2.0
"""A target, or whatever else of the batch meets only what the network has computed, holds NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.stats.finite import Census

RULE = "non-finite-target"


def non_finite_target(path: str, index: Sequence[int], seen: Census, *, after: str) -> Finding:
    """Report bad values of a batch that came in behind the network.

    Args:
        path: where the tensor lies in the batch, such as ``batch[1]``.
        index: index of its first non-finite value; the first number is the sample.
        seen: census of the tensor.
        after: what became of the step, in words.

    Returns:
        An ``error``.
    """
    place = f"{path}, sample {index[0]}" if index else path
    evidence = (
        f"{place}: {seen.describe()}, the first at index {list(index)}; no weight of the network met them, only its "
        f"outputs did; {after}"
    )
    data = {"path": path, "index": list(index), "nan": seen.nan, "posinf": seen.posinf, "neginf": seen.neginf}
    advice = "repair or drop this sample where the data set loads it, or leave its term out of the loss"
    return Finding(RULE, Severity.ERROR, evidence, advice, data=data)
