# SPDX-License-Identifier: Apache-2.0
"""The processes of a fit normalise by statistics of different data, and those of one of them are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_bn.findings import Finding, Severity

RULE = "statistics-differ-between-ranks"
NOTED, FAR = 0.1, 0.15
"""Distance of the processes from their mean, in standard deviations within a process, at which it is noted, and at
which it is a warning."""
SURE = 4.0
"""Multiple of what noise alone makes of the squared distance."""


@dataclass(frozen=True)
class Apart:
    """How far the processes are apart in one layer.

    Args:
        batches: root mean square distance of their batch statistics from the mean of all, over the channels, in
            standard deviations within a process; what noise makes of it is taken off.
        batches_times: its square with noise, as a multiple of that of noise alone.
        stored: the same of the running statistics that each process has.
        stored_times: likewise.
    """

    batches: float
    batches_times: float
    stored: float
    stored_times: float

    @property
    def most(self) -> float:
        """The larger distance of those that are sure; 0 where none is."""
        pairs = ((self.batches, self.batches_times), (self.stored, self.stored_times))
        return max((far for far, times in pairs if times >= SURE), default=0.0)


def statistics_differ_between_ranks(layers: Mapping[str, Apart], processes: int) -> Finding | None:
    """Judge how far the statistics of the processes are apart.

    Args:
        layers: by layer.
        processes: number of processes.

    Returns:
        An ``info`` or a ``warning`` about the layer where they are farthest apart; None where they are not.
    """
    worst = max(layers, key=lambda name: layers[name].most, default=None)
    if worst is None or layers[worst].most < NOTED:
        return None
    apart, far = layers[worst], sum(entry.most >= NOTED for entry in layers.values())
    evidence = (
        f"the batch statistics of {processes} processes lie {apart.batches:.2f} standard deviations from the mean of "
        f"all, and their running statistics {apart.stored:.2f}; {far} of {len(layers)} BatchNorm layers are {NOTED:g} "
        "or more apart. The running statistics of the first process are the ones that are kept"
    )
    advice = (
        "let every process draw from all data, as Lightning's own sampler does; or pass sync_batchnorm=True to the "
        "Trainer, on GPUs; or add PreciseBatchNorm, which pools the processes"
    )
    severity = Severity.WARNING if apart.most >= FAR else Severity.INFO
    data = {"layers": {name: vars(entry) for name, entry in layers.items()}, "processes": processes}
    return Finding(RULE, severity, evidence, advice, layer=worst, data=data)
