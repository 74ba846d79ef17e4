# SPDX-License-Identifier: Apache-2.0
"""Which layers a monitor hears, and in which pass: no hook reaches what is compiled, unless it runs eagerly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lightning_bn.callbacks.base import is_compiled
from lightning_bn.callbacks.eager_pass import cannot_run_eagerly
from lightning_bn.callbacks.layer_watch import LayerWatch
from lightning_bn.callbacks.slopes import Feel
from lightning_bn.callbacks.verdicts import of_choice
from lightning_bn.findings import Finding
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.taps import COMPILED, choose

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

OF_OUTPUTS = "the gradient with respect to the outputs of layers"


@dataclass(frozen=True)
class Reach:
    """How the layers of a fit are heard.

    Args:
        layers: module by name, without what ``torch.compile`` inserts.
        eager: whether in a pass of their own that runs eagerly; otherwise in that of training.
        gradients: whether the gradient with respect to their outputs is to be felt in that pass.
        findings: what cannot be heard, and layers that there are not.
    """

    layers: dict[str, nn.Module]
    eager: bool
    gradients: bool
    findings: tuple[Finding, ...]

    def watch(self, pl_module: LightningModule, *, ranked: bool, feel: Feel) -> LayerWatch:
        """What hears them.

        Args:
            pl_module: the model.
            ranked: whether the effective rank of outputs is wanted.
            feel: what gets the gradients with respect to outputs.
        """
        wanted = feel if self.gradients else None
        return LayerWatch(pl_module, self.layers, pl_module.device, ranked=ranked, feel=wanted, eager=self.eager)


def reach(trainer: Trainer, pl_module: LightningModule, wanted: Sequence[str] | None, *, gradients: bool) -> Reach:
    """Find out how the layers of a model can be heard.

    Hooks that the compiler takes in with the model would change what it makes of it, and so the numbers of training.
    Where one of the wanted layers is compiled, all are therefore heard in a forward pass of the same batch that leaves
    no trace.

    Args:
        trainer: the trainer, at the start of a fit.
        pl_module: its model.
        wanted: patterns and words, see :func:`~lightning_bn.taps.choose`.
        gradients: whether the gradient with respect to outputs is wanted too.
    """
    whole, choice = is_compiled(pl_module), choose(pl_module, wanted)
    if not whole and COMPILED not in choice.unseen.values():
        return Reach(choice.layers, eager=False, gradients=gradients, findings=tuple(of_choice(choice)))
    reason = cannot_run_eagerly(trainer, pl_module)
    if reason:
        findings = tuple(of_choice(choice, compiled=whole, reason=reason))
        return Reach({} if whole else choice.layers, eager=False, gradients=gradients, findings=findings)
    choice, alone = choose(pl_module, wanted, eager=True), trainer.world_size == 1
    findings = tuple(of_choice(choice))
    if gradients and choice.layers and not alone:
        findings = (*findings, not_watched(OF_OUTPUTS, f"{COMPILED}, and several processes exchange gradients"))
    return Reach(choice.layers, eager=True, gradients=gradients and alone, findings=findings)
