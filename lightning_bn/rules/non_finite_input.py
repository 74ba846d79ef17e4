# SPDX-License-Identifier: Apache-2.0
"""The batch itself holds NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.stats.finite import Census

RULE = "non-finite-input"


def non_finite_input(path: str, index: Sequence[int], seen: Census, *, spread: bool, after: str = "") -> Finding | None:
    """Judge one tensor of a batch.

    Values of -inf alone pass: attention masks are filled with them. NaN or +inf that neither an output nor the
    loss repeats is handled by the model (masked labels, ``nan_to_num``), hence a note and no fault.

    Args:
        path: where the tensor lies in the batch, such as ``batch[0]``.
        index: index of its first non-finite value; the first number is the sample.
        seen: census of the tensor.
        spread: whether outputs, loss or running statistics became non-finite in the same pass.
        after: what became of the step, in words; empty for what a look at the modules alone can say.

    Returns:
        An ``error`` if it spread, an ``info`` if it did not, None if the tensor is clean.
    """
    if seen.level < 2:  # noqa: PLR2004  (Census.level: 2 is NaN or +inf)
        return None
    place = f"{path}, sample {index[0]}" if index else path
    what = f"{place}: {seen.describe()}, the first at index {list(index)}"
    data = {"path": path, "index": list(index), "nan": seen.nan, "posinf": seen.posinf, "neginf": seen.neginf}
    if not spread:
        quiet = f"{what}; nothing else that is not finite was traced to it"
        return Finding(RULE, Severity.INFO, quiet, "", data=data)
    advice = "repair or drop this sample where the data set loads it"
    after = after or "outputs or the loss of the same step are not finite"
    return Finding(RULE, Severity.ERROR, f"{what}; {after}", advice, data=data)
