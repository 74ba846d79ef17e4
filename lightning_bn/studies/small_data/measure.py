# SPDX-License-Identifier: Apache-2.0
"""Study ``small_data``: 100 images in batches of 8, with BatchNorm, GroupNorm, LayerNorm and without any."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_bn.callbacks.batchnorm_monitor import BatchNormMonitor
from lightning_bn.demo import DigitsData, DigitsMLP
from lightning_bn.demo.models import Norm
from lightning_bn.norms import find_batchnorm
from lightning_bn.rules.noisy_batch_statistics import RULE as NOISY
from lightning_bn.rules.not_assessed import RULE as NOT_ASSESSED
from lightning_bn.rules.wrong_running_statistics import RULE as WRONG
from lightning_bn.studies.fitting import batches, fit
from lightning_bn.studies.small_data.figure import draw
from lightning_bn.studies.small_data.report import summary, tables
from lightning_bn.studies.small_data.rows import MARKS, Run
from lightning_bn.studies.small_data.verdicts import verdicts
from lightning_bn.studies.study import Row, Setting, Study

IMAGES, BATCH, EPOCHS = 100, 8, MARKS[-1]
RATE = 0.5  # of dropout, where there is any
NORMS = ("batch", "none", "group", "layer")


def settings(seeds: Sequence[int]) -> list[Setting]:
    """The runs: seed by seed, so that a stopped study has whole seeds."""
    runs = [
        *(
            Run(norm, noise=noise, dropout=dropout)
            for norm in NORMS
            for noise in (0.0, 0.3)
            for dropout in ("no", "all")
        ),
        *(Run("batch", noise=noise, affine="fixed") for noise in (0.0, 0.3)),
        *(Run("batch", noise=noise, dropout="last") for noise in (0.0, 0.3)),
        *(Run(norm, noise=0.3, depth=6) for norm in NORMS[:3]),
        *(Run(norm, noise=0.3, depth=depth, start="he") for norm in ("batch", "none") for depth in (2, 6)),
    ]
    return [{**vars(run), "seed": seed} for seed in seeds for run in runs]


class Digits(DigitsMLP):
    """The perceptron of the demo, with less to log: a step of 8 images is short, and its log is half of its time."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002  (Lightning's signature)
        """Loss of one batch."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002  (the same)
        """Loss and accuracy of one batch."""
        images, labels = batch
        logits = self(images)
        self.log_dict({"val_loss": self.loss(logits, labels), "val_acc": accuracy(logits, labels)})


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the samples with the largest logit at their label; NaN of none."""
    return (logits.argmax(1) == labels).float().mean()


def network(run: Run) -> Digits:
    """The network of a run; γ and β stay at 1 and 0 where they are fixed."""
    model = Digits(cast("Norm", run.norm), depth=run.depth, dropout=0.0 if run.dropout == "no" else RATE)
    drops = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    for layer in drops[:-1] if run.dropout == "last" else []:
        layer.p = 0.0
    hidden = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][:-1]
    for linear in hidden if run.start == "he" else []:
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    for norm in find_batchnorm(model).values() if run.affine == "fixed" else []:
        norm.requires_grad_(False)
    return model


def measure(setting: Setting) -> Row:
    """Train one network, and say what became of its losses and accuracies.

    Networks of one seed have the same images and wrong labels; those of one start also the same first weights, and
    without dropout the same order of batches.
    """
    seed = cast("int", setting["seed"])
    run = Run(**cast("Any", {name: value for name, value in setting.items() if name != "seed"}))
    data, clean = (DigitsData(BATCH, train_size=IMAGES, label_noise=noise, seed=seed) for noise in (run.noise, 0.0))
    for part in (data, clean):
        part.setup("fit")
    if data.train_set is None or data.val_set is None or clean.train_set is None:
        raise RuntimeError("DigitsData.setup gave no data")
    torch.manual_seed(seed)
    model, monitor = network(run), BatchNormMonitor() if run.norm == "batch" else None
    curve = fit(
        model,
        batches(data.train_set, BATCH, shuffle=True),
        batches(data.val_set, len(data.val_set)),
        epochs=EPOCHS,
        callbacks=[monitor] if monitor else [],
    )
    images, labels = data.train_set.tensors
    return {
        **validation(curve),
        **training(model, images, labels, clean.train_set.tensors[1]),
        **verdict(monitor),
        **{f"loss_{epoch}": curve[epoch - 1]["val_loss"] for epoch in MARKS},
    }


def validation(curve: Sequence[dict[str, float]]) -> Row:
    """Best and last validation; ``rise`` is how far the loss went up from its best to its last one."""
    losses, shares = ([values[name] for values in curve] for name in ("val_loss", "val_acc"))
    best = min(losses)
    return {
        "best_loss": best,
        "last_loss": losses[-1],
        "rise": losses[-1] - best,
        "relative_rise": (losses[-1] - best) / best,
        "best_epoch": losses.index(best) + 1,
        "best_acc": max(shares),
        "last_acc": shares[-1],
    }


def training(model: Digits, images: Tensor, labels: Tensor, true: Tensor) -> Row:
    """The training set in eval mode, and the share of its wrong labels that the network gives back."""
    model.eval()
    with torch.no_grad():
        logits = model(images)
    wrong = labels != true
    return {
        "train_loss": float(model.loss(logits, labels)),
        "train_acc": float(accuracy(logits, labels)),
        "memorised": float(accuracy(logits[wrong], labels[wrong])) if wrong.any() else None,
    }


def verdict(monitor: BatchNormMonitor | None) -> Row:
    """What BatchNormMonitor says; None throughout for a network without BatchNorm.

    ``share_low`` and ``share_high`` bound the part of the rise that γ and β carry, ``statistics`` is the part
    by which the loss is higher with the running statistics than with estimated ones, ``effective`` the median over the
    layers of the effective samples per channel.
    """
    said = {finding.rule: finding for finding in monitor.findings} if monitor else {}
    losses = monitor.losses if monitor else None
    shares = losses.shares if losses else None
    noise = list(said[NOISY].data["effective"].values()) if NOISY in said else []
    return {
        "verdict": next((rule for rule in said if "overfitting" in rule or rule == NOT_ASSESSED), None),
        "share_low": min(shares) if shares else None,
        "share_high": max(shares) if shares else None,
        "statistics": losses.statistics.relative if losses else None,
        "wrong_statistics": None if monitor is None else int(WRONG in said),
        "effective": median(noise) if noise else None,
    }


STUDY = Study(
    name="small_data",
    settings=settings,
    measure=measure,
    tables=tables,
    verdicts=verdicts,
    summary=summary,
    draw=draw,
    seeds=5,
)
