# SPDX-License-Identifier: Apache-2.0
"""Small batches on several processes, each of which takes BatchNorm statistics of its own."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.few_values_per_channel import FEW, NOTED
from lightning_bn.rules.listing import listed, the_one

RULE = "unsynchronised-batchnorm"
SMALL = 4
"""Samples in a process up to which it is noted of layers with spatial extent: ResNet-50 on ImageNet lost 0.1 points at
16 images for each GPU, 1.2 at 8, 3.7 at 4 and 11.1 at 2 against 32 (Wu & He 2018)."""


def unsynchronised_batchnorm(layers: Sequence[str], batch_size: int, processes: int, *, flat: bool) -> Finding | None:
    """Say that statistics of several processes could be pooled.

    Args:
        layers: BatchNorm layers in training mode that are not synchronised.
        batch_size: samples in a batch of one process.
        processes: number of processes that see different samples.
        flat: whether the layers see one value for each sample and channel; else their spatial extent is not known.

    Returns:
        Of flat layers a ``warning`` below 6 samples and an ``info`` below 16; of others an ``info`` up to 4; else None.
    """
    if not layers or processes == 1 or batch_size >= (NOTED if flat else SMALL + 1):
        return None
    together = batch_size * processes
    extent = "" if flat else " times their spatial extent, if they have one"
    evidence = (
        f"{listed(layers)}: each of {processes} processes takes its statistics from its own {batch_size} "
        f"sample{'s' * (batch_size > 1)}{extent}; together they have {together}"
    )
    advice = "pass sync_batchnorm=True to the Trainer, which pools them on GPUs; or larger batches, or GroupNorm"
    data = {"layers": list(layers), "batch_size": batch_size, "processes": processes, "flat": flat}
    severity = Severity.WARNING if flat and batch_size < FEW else Severity.INFO
    return Finding(RULE, severity, evidence, advice, layer=the_one(layers), data=data)
