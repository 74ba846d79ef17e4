# SPDX-License-Identifier: Apache-2.0
"""A BatchNorm layer begins training in eval mode: its running statistics stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "batchnorm-in-eval-mode"


def batchnorm_in_eval_mode(layers: Sequence[str], *, fresh: bool) -> Finding | None:
    """Judge layers that normalise by stored statistics while what is around them is trained.

    Args:
        layers: the layers.
        fresh: whether their statistics are still mean 0 and variance 1, by which they do not normalise at all; if not,
            keeping them is a usual way to fine-tune.

    Returns:
        A ``warning`` if they are fresh, else an ``info``; None without layers.
    """
    if not layers:
        return None
    are, their = ("is", "its") if len(layers) == 1 else ("are", "their")
    state = "still mean 0 and variance 1, so that nothing is normalised" if fresh else "those it came with"
    evidence = (
        f"{listed(layers)} {are} in eval mode as training begins: {their} running statistics stay as they are, {state}"
    )
    advice = "call train() on them (Lightning does not), or leave them so if the stored statistics are meant to be kept"
    if fresh:
        advice = "call train() on them before the first step; Lightning leaves the mode of each module as it finds it"
    severity = Severity.WARNING if fresh else Severity.INFO
    return Finding(
        RULE, severity, evidence, advice, layer=the_one(layers), data={"layers": list(layers), "fresh": fresh}
    )
