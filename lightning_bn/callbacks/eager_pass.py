# SPDX-License-Identifier: Apache-2.0
"""Hear what is compiled, which no hook reaches: in a pass of the step's own that runs eagerly and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lightning_bn.callbacks.base import is_compiled
from lightning_bn.callbacks.rehearsal import cannot_rehearse, cannot_repeat, cannot_unwrap
from lightning_bn.findings import Finding
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.taps import COMPILED, reachable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def hear_apart(run: Callable[[], object]) -> Finding | None:
    """Have a step run in advance, eagerly and without a trace, for the sake of those who listen.

    Args:
        run: runs it, such as a :func:`~lightning_bn.callbacks.rehearsal.rehearse`.

    Returns:
        A note where the step raised: an exception of the user's own will come again in the real one.
    """
    try:
        run()
    except Exception as error:  # noqa: BLE001  (whatever a step may raise)
        return not_watched("a part of the first forward pass", f"{type(error).__name__}: {error}")
    return None


def goes_apart(trainer: Trainer, pl_module: LightningModule, stage: str = "training_step") -> bool:
    """Whether a model is compiled, and this step of it can be run a second time, eagerly."""
    return has_compiled(pl_module) and cannot_run_eagerly(trainer, pl_module, stage) is None


def has_compiled(pl_module: LightningModule) -> bool:
    """Whether a model is compiled, as a whole or in part."""
    return is_compiled(pl_module) or COMPILED in reachable(pl_module)[1].values()


def cannot_run_eagerly(trainer: Trainer, pl_module: LightningModule, stage: str = "training_step") -> str | None:
    """Why a step of a compiled model cannot be run a second time, eagerly, in words; None where it can."""
    if not hasattr(torch.compiler, "set_stance"):
        return f"torch {torch.__version__} cannot run it eagerly (2.6 can)"
    training = stage == "training_step"
    return cannot_unwrap(trainer) or (cannot_rehearse(pl_module) if training else cannot_repeat(pl_module, stage))
