# SPDX-License-Identifier: Apache-2.0
"""Initialise weights where it is safe: after the layers exist, before a checkpoint is restored."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from lightning_bn.callbacks.arguments import check_choice
from lightning_bn.callbacks.base import Monitor, shielded
from lightning_bn.rules.not_initialised import could_not_fill, left_alone, replaced_by_checkpoint
from lightning_bn.schemes import SCHEMES, Report, Scheme, initialize

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

MARK = "_lightning_bn_initialised"
"""Attribute of a LightningModule that was initialised: it travels with copies of the module, not with its weights."""


WRAPS = "_lightning_bn_wraps"
"""Attribute of a wrapper of ``configure_model``: what stood in its place on the instance, or None."""


class WeightInit(Monitor):
    """Initialise the model before training: He, Xavier or naive weights, zero biases, BatchNorm γ = 1 and β = 0.

    Covers Linear, Conv and ConvTranspose layers of any dimension, and BatchNorm with its running statistics. Other
    layers and frozen parameters keep what they have. A resumed run keeps its checkpoint's weights, and a model
    that was initialised once is left alone by every later fit. Each parameter has its own random stream: the
    global random state is untouched, all ranks agree, and adding a layer does not change the others. Runs once per
    model and costs nothing in training. Weights that were loaded before the fit are overwritten.

    Args:
        scheme: ``he`` = N(0, 2 / fan_in), for ReLU networks (He et al. 2015, eq. 10); ``xavier`` =
            N(0, 2 / (fan_in + fan_out)), for tanh, sigmoid or linear ones (Glorot & Bengio 2010, eq. 12); ``naive``
            = N(0, 0.01²), whatever the layer.
        seed: seed of the weights, at least 0; None takes the seed of ``seed_everything``, or else of this process.
        ignore: slugs of findings that are not to be reported, out of not-initialised.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.WeightInit("he")])``
    """

    def __init__(self, scheme: Scheme = "he", *, seed: int | None = None, ignore: list[str] | None = None) -> None:
        super().__init__(ignore=ignore)
        check_choice("scheme", scheme, SCHEMES)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ValueError(f"seed must be a whole number of at least 0, or None, got {seed!r}")
        self.scheme: Scheme = scheme
        self.seed = seed
        self.report: Report | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the weights to be set when ``configure_model`` has run; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._arrange(trainer, pl_module)

    @shielded
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done; called by Lightning."""
        self.live.hooks.close()
        if self.report is not None:
            self.emit(could_not_fill(self.report.skipped))
        if self.report is not None and trainer.ckpt_path:
            self.emit(replaced_by_checkpoint(str(trainer.ckpt_path)))

    @shielded
    def _arrange(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = None
        seed = trainer.strategy.broadcast(self._seed())
        if not _builds_later(pl_module):
            self._apply(pl_module, seed)
            return
        # No callback hook runs between configure_model and the restore of a checkpoint. Lightning calls an
        # override of configure_model, and an attribute of the instance is one; it may be called twice
        # (WeightAveraging does), which the fixed seed makes harmless.
        self.live.hooks.callback(_unwrap, pl_module)
        present = pl_module.configure_model

        def configure_model() -> None:
            present()
            self._apply(pl_module, seed)

        setattr(configure_model, WRAPS, pl_module.__dict__.get("configure_model"))
        pl_module.__dict__["configure_model"] = configure_model

    @shielded
    def _apply(self, pl_module: LightningModule, seed: int) -> None:
        before = getattr(pl_module, MARK, None)
        if before is not None and self.report is None:  # by an earlier fit, or by another instance in this one
            self.emit(left_alone(before))
            return
        self.report = initialize(pl_module, self.scheme, seed=seed)
        setattr(pl_module, MARK, self.scheme)

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) if self.seed is None else self.seed


def _unwrap(pl_module: LightningModule) -> None:
    """Take all wrappers off a model: its ``configure_model`` is that of its class again, or the user's own."""
    present = pl_module.__dict__.pop("configure_model", None)
    while hasattr(present, WRAPS):
        present = getattr(present, WRAPS)
    if present is not None:
        pl_module.__dict__["configure_model"] = present


def _builds_later(pl_module: LightningModule) -> bool:
    """Whether the project has a ``setup`` or ``configure_model`` of its own, which may still add layers."""
    hooks = (pl_module.setup, pl_module.configure_model)
    return any(not hook.__module__.startswith(("lightning.pytorch.", "pytorch_lightning.")) for hook in hooks)
