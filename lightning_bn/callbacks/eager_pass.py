# SPDX-License-Identifier: Apache-2.0
"""Hear what is compiled, which no hook reaches: in a pass of the step's own that runs eagerly and leaves no trace."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from lightning_bn.callbacks.base import is_compiled
from lightning_bn.callbacks.rehearsal import cannot_rehearse, cannot_unwrap, rehearse
from lightning_bn.findings import Finding
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.taps import COMPILED, reachable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def hear_apart(
    trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, listening: AbstractContextManager[Any]
) -> Finding | None:
    """Run a training step in advance, eagerly and without a trace, and have its first forward pass heard.

    Args:
        trainer: the trainer, before the step.
        pl_module: its model.
        batch: what the step will get.
        batch_idx: its number in the epoch.
        listening: the block of a :func:`~lightning_bn.taps.listen`.

    Returns:
        A note where the step raised: an exception of the user's own will come again in the real one.
    """
    try:
        rehearse(trainer, pl_module, batch, batch_idx, listening)
    except Exception as error:  # noqa: BLE001  (whatever a step may raise)
        return not_watched("a part of the first forward pass", f"{type(error).__name__}: {error}")
    return None


def goes_apart(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether a model is compiled, and its steps can be run a second time, eagerly."""
    return has_compiled(pl_module) and cannot_run_eagerly(trainer, pl_module) is None


def has_compiled(pl_module: LightningModule) -> bool:
    """Whether a model is compiled, as a whole or in part."""
    return is_compiled(pl_module) or COMPILED in reachable(pl_module)[1].values()


def cannot_run_eagerly(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why a step of a compiled model cannot be run a second time, eagerly, in words; None where it can."""
    if not hasattr(torch.compiler, "set_stance"):
        return f"torch {torch.__version__} cannot run it eagerly (2.6 can)"
    return cannot_unwrap(trainer) or cannot_rehearse(pl_module)
