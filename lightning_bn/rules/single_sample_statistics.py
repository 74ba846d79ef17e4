# SPDX-License-Identifier: Apache-2.0
"""BatchNorm on batches of one sample with spatial extent: InstanceNorm in training, something else in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "single-sample-statistics"


def single_sample_statistics(layers: Sequence[str]) -> Finding | None:
    """Say what BatchNorm is where each batch of a process holds one sample.

    Args:
        layers: BatchNorm layers in training mode that are not synchronised and whose spatial extent is not known to
            be 1; where it is 1 torch raises.

    Returns:
        An ``info``; None without layers.
    """
    if not layers:
        return None
    evidence = (
        f"every batch has 1 sample in a process: in training {listed(layers)} normalise{'s' * (len(layers) == 1)} each "
        "sample by itself, as InstanceNorm does, and in evaluation by running statistics over samples"
    )
    advice = "larger batches, or GroupNorm, which does the same in training and in evaluation"
    return Finding(RULE, Severity.INFO, evidence, advice, layer=the_one(layers), data={"layers": list(layers)})
