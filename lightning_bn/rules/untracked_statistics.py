# SPDX-License-Identifier: Apache-2.0
"""BatchNorm normalises by the batch in training and by stored statistics, which nothing updates, in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "untracked-statistics"


def untracked_statistics(layers: Sequence[str]) -> Finding | None:
    """Judge layers in training mode that have running statistics and do not update them.

    ``track_running_stats=False`` on a layer that has running statistics stops their updates and nothing else: in
    training mode torch normalises by the batch, in eval mode by the stored statistics. ``BaseFinetuning.freeze`` of
    Lightning leaves layers so with ``train_bn=False``; a momentum of 0 does the same.

    Args:
        layers: the layers.

    Returns:
        A ``warning``; None without layers.
    """
    if not layers:
        return None
    normalise, their = ("normalises", "its") if len(layers) == 1 else ("normalise", "their")
    evidence = (
        f"{listed(layers)} {normalise} by the batch in training and by stored statistics in evaluation, and training "
        f"does not update {their} statistics (track_running_stats=False, or momentum 0)"
    )
    advice = "to keep the stored statistics call eval() on them; to learn new ones set track_running_stats=True"
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=the_one(layers), data={"layers": list(layers)})
