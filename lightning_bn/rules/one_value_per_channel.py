# SPDX-License-Identifier: Apache-2.0
"""A batch gives a BatchNorm layer one value for each channel, of which there is no variance: torch raises."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "one-value-per-channel"


def one_value_per_channel(
    layers: Sequence[str], batch_size: int | None, last: int | None, *, sure: bool
) -> Finding | None:
    """Foresee the ValueError "Expected more than 1 value per channel when training".

    Args:
        layers: BatchNorm layers in training mode without spatial extent: one value for each row and channel.
        batch_size: samples in a batch of one process; None if unknown.
        last: samples in the last batch of an epoch; None if unknown.
        sure: whether each of the layers is given one row for each sample, and not more.

    Returns:
        An ``error`` where it is sure, else an ``info``; None where no batch is known to have one sample.
    """
    if not layers or 1 not in {batch_size, last}:
        return None
    every = batch_size == 1
    others = "" if batch_size is None else f" (the others have {batch_size})"
    what = "every batch" if every else f"the last batch of every epoch{others}"
    have = "has" if len(layers) == 1 else "have"
    where = f"{listed(layers)} {have} no spatial axis to average over"
    what_comes = "torch raises ValueError there: one value for each channel has no variance"
    if not sure:
        what_comes = f"if a sample is one row for {'it' if len(layers) == 1 else 'them'}, {what_comes}"
    evidence = f"{what} has 1 sample in a process, and {where}: {what_comes}"
    advice = "use batches of at least 16 samples, or GroupNorm" if every else "pass drop_last=True to the train loader"
    data = {"layers": list(layers), "batch_size": batch_size, "last": last, "sure": sure}
    severity = Severity.ERROR if sure else Severity.INFO
    return Finding(RULE, severity, evidence, advice, layer=the_one(layers), data=data)
