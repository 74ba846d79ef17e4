# SPDX-License-Identifier: Apache-2.0
"""Run a step that was saved beside the findings again, in a model and a trainer that are new."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_bn.callbacks.base import Monitor
from lightning_bn.callbacks.black_box import read_case
from lightning_bn.callbacks.retrace import cannot_retrace, retrace
from lightning_bn.findings import Finding
from lightning_bn.rules.diverged_by_learning_rate import History
from lightning_bn.rules.traced_cause import traced_cause

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Rerun(Monitor):
    """Run a saved step again before the fit begins, and keep what it shows.

    Args:
        file: a ``batch_step*.pt`` that NaNGuard saved.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is none of these.
    """

    stages: ClassVar[frozenset[str]] = frozenset()  # nothing is written anywhere

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        self.found: list[Finding] = []
        self.packed: dict[str, Any] = read_case(file)[1]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the step and replay it; called by Lightning."""
        case, _ = read_case(self.file, pl_module)
        reason = cannot_retrace(trainer, pl_module, case)
        if reason is not None:
            raise ValueError(f"model must have a step that can be run again, but {reason}")
        divisor = float(getattr(trainer, "accumulate_grad_batches", 1)) if pl_module.automatic_optimization else 1.0
        seen = retrace(trainer, pl_module, case, backward=True, divisor=divisor)
        stamp: dict[str, Any] = {"step": self.packed["step"], "epoch": self.packed["epoch"]}
        self.found = [replace(found, **stamp) for found in traced_cause(seen, History(**self.packed["history"]))]
