# SPDX-License-Identifier: Apache-2.0
"""Running statistics of BatchNorm layers were updated and are not any longer, while training calls the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "statistics-stopped"


@dataclass(frozen=True)
class Stop:
    """How a layer stopped.

    Args:
        layer: its path.
        step: the optimizer step at which it was first seen not to update.
        by_batch: whether it still normalises by the batch, with ``track_running_stats`` False or momentum 0; else it is
            in eval mode.
        alone: whether it is in eval mode and the modules around it, which hold the weights, are not.
        frozen: whether it has γ or β, and none of them is trained.
        amid_learning: whether parameters of the module around it are trained.
    """

    layer: str
    step: int
    by_batch: bool
    alone: bool
    frozen: bool
    amid_learning: bool

    @property
    def kind(self) -> str:
        """What is said of it; empty for nothing."""
        if self.by_batch:
            return "by batch, frozen" if self.frozen else "by batch"
        if self.frozen or not self.amid_learning:
            return ""
        return "alone" if self.alone else "with others"


BY_BATCH = "in evaluation by statistics that nothing updates any longer (track_running_stats=False, or momentum 0)"
SAID = {
    "by batch": (
        Severity.WARNING,
        f"in training they normalise by the batch, and {BY_BATCH}",
        "set momentum and track_running_stats back, or call eval() on the layers if their statistics are to be kept",
    ),
    "by batch, frozen": (
        Severity.INFO,
        f"in training they normalise by the batch although γ and β are frozen, and {BY_BATCH}",
        "call eval() on the layers if they are to be frozen",
    ),
    "alone": (
        Severity.INFO,
        "they are in eval mode while the modules around them are in training mode",
        "nothing, if their statistics are frozen on purpose; else call train() on them",
    ),
    "with others": (
        Severity.WARNING,
        "they are in eval mode together with the modules around them, whose parameters are trained",
        "find what calls eval() during training, and have it put back the mode that it found",
    ),
}
"""What is said of each kind of stop."""


def statistics_stopped(stops: Sequence[Stop]) -> list[Finding]:
    """Judge layers whose running statistics moved earlier in this run and stand still now.

    Args:
        stops: the layers.

    Returns:
        One finding for each kind of stop. A ``warning`` where a layer normalises by the batch and keeps stale
        statistics, and where a module was put in eval mode as a whole while it learns; an ``info`` where the BatchNorm
        layers alone were, which is a usual way to freeze them, and where γ and β are frozen. Nothing about layers in
        eval mode with frozen γ and β, or amid parameters that are frozen.
    """
    found = []
    for kind, (severity, words, advice) in SAID.items():
        mine = [stop for stop in stops if stop.kind == kind]
        if not mine:
            continue
        names, steps = [stop.layer for stop in mine], sorted(stop.step for stop in mine)
        evidence = (
            f"the running statistics of {listed(names)} were updated earlier in this run and stand still since about "
            f"step {steps[0]}, while training calls the layers: {words}"
        )
        data = {"path": kind, "layers": {stop.layer: stop.step for stop in mine}}
        found.append(Finding(RULE, severity, evidence, advice, layer=the_one(names), data=data))
    return found
