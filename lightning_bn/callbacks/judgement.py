# SPDX-License-Identifier: Apache-2.0
"""From what was collected in a fit to the verdict on overfitting."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from lightning_bn.callbacks.assessment import Assessment
from lightning_bn.callbacks.base import callbacks_of, gather_objects
from lightning_bn.callbacks.console import print_above_bar
from lightning_bn.callbacks.drift import affine_of, drift_by_layer
from lightning_bn.callbacks.evidence import Evidence
from lightning_bn.callbacks.material import Cost, Material, NotAssessedError
from lightning_bn.callbacks.rehearsal import cannot_repeat
from lightning_bn.callbacks.response import PATIENCE
from lightning_bn.callbacks.training_batches import cannot_reestimate
from lightning_bn.findings import Finding
from lightning_bn.norms import find_batchnorm
from lightning_bn.quarantine import lazy_tensors
from lightning_bn.rules.affine_drift import Pace, Watched
from lightning_bn.rules.affine_driven_overfitting import affine_driven_overfitting
from lightning_bn.rules.mismatched_statistics import mismatched_statistics
from lightning_bn.rules.no_overfitting import no_overfitting
from lightning_bn.rules.not_assessed import RULE as NOT_ASSESSED
from lightning_bn.rules.not_assessed import not_assessed
from lightning_bn.rules.overfitting_elsewhere import overfitting_elsewhere
from lightning_bn.rules.shared_overfitting import shared_overfitting
from lightning_bn.rules.verdict import Case
from lightning_bn.rules.wrong_running_statistics import wrong_running_statistics
from lightning_bn.stats.batchnorm import Affine

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_bn.stats.attribution import Losses

LARGER_IS_BETTER = frozenset(
    [
        "acc",
        "accuracy",
        "ap",
        "auc",
        "auroc",
        "bleu",
        "dice",
        "f1",
        "iou",
        "map",
        "miou",
        "precision",
        "psnr",
        "r2",
        "recall",
        "score",
        "ssim",
        "top1",
        "top5",
    ]
)
"""Words in the names of metrics that rise while a network learns, which would be taken for overfitting."""
VERDICTS = (affine_driven_overfitting, shared_overfitting, overfitting_elsewhere, no_overfitting)


@dataclass(frozen=True)
class Outcome:
    """What came of an assessment.

    Args:
        losses: losses in all settings; None where there is no verdict.
        rules: rules that spoke.
        words: what was said about overfitting.
    """

    losses: Losses | None
    rules: set[str]
    words: str


def cannot_assess(trainer: Trainer, pl_module: LightningModule, watch: str) -> tuple[str, str]:
    """Why a fit cannot be assessed, in words, and what to do; both empty where it can."""
    reason, remedy = cannot_reestimate(trainer, pl_module)
    if reason:
        return reason, remedy
    if not trainer.enable_validation:
        return "there is no validation loop", "give the fit a validation loader, and log its loss"
    if LARGER_IS_BETTER & set(re.split(r"[^a-z0-9]+", watch.lower())):
        return f"of watch={watch!r} larger values are better", "set watch to the name of a loss"
    for callback in callbacks_of(trainer):
        if any(base.__name__ == "WeightAveraging" for base in type(callback).__mro__):
            name = type(callback).__name__
            return f"{name} has other weights validated than are trained", f"leave {name} out for one fit"
    if lazy_tensors(pl_module):  # they may see data in the first batch
        return "", ""
    return cannot_repeat(pl_module, "validation_step") or "", ""


def metric_of(trainer: Trainer, name: str) -> float | None:
    """Value of a logged metric, read from the device; None where it was not logged."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def with_pace(finding: Finding, pace: Pace | None) -> Finding:
    """Put speed and gradient share of γ and β beside the losses that a finding stands on.

    Args:
        finding: any finding; one that stands on no losses stays as it is.
        pace: what the measured steps had; None where there were none.
    """
    if pace is None or "rise" not in finding.data:
        return finding
    return replace(finding, data={**finding.data, **pace.data()})


def conclude(
    trainer: Trainer,
    pl_module: LightningModule,
    evidence: Evidence | None,
    watched: Watched | None,
    emit: Callable[[Finding], None],
) -> Outcome:
    """Assess a fit that is over, and say what was found; a collective.

    Args:
        trainer: its trainer.
        pl_module: its model.
        evidence: what was collected; None where that failed on this process.
        watched: the watched metric.
        emit: takes the findings.

    Returns:
        What was found and said, the same on all processes.
    """
    losses: Losses | None = None
    said: list[Finding] = []
    cost = Cost()
    try:
        material = _material(trainer, pl_module, evidence, watched)
        losses = _measure(trainer, pl_module, material, cost)
        fell = _train_loss_fell(trainer, evidence)
        epoch, since = (watched.best_epoch if watched else 0), (evidence.since_best if evidence else 0)
        case = Case(material.watch, epoch, losses, _moved(pl_module, material), fell)
        said = [finding for finding in _judge(pl_module, material, case, since) if finding is not None]
    except NotAssessedError as reason:
        said = [not_assessed(str(reason))]
    for finding in said if evidence is not None else ():  # else this process has told what failed
        emit(replace(finding, data={**finding.data, "cost": vars(cost)}) if cost.validations else finding)
    rules = {finding.rule: finding.evidence for finding in said}
    words = next((words for rule, words in rules.items() if "overfitting" in rule or rule == NOT_ASSESSED), "")
    return Outcome(losses, set(rules), words)


def _measure(trainer: Trainer, pl_module: LightningModule, material: Material, cost: Cost) -> Losses:
    """Run the assessment, show how far it is, and tell what it cost."""
    first = trainer.is_global_zero
    shown = first and trainer.progress_bar_callback is not None
    with tqdm(desc="lightning_bn: does it overfit?", leave=False, disable=not shown) as bar:
        losses = Assessment(trainer, pl_module, material, cost, lambda done, total: _show(bar, done, total)).run()
    if first:
        print_above_bar(trainer, f"lightning_bn: {cost.words()}")
    return losses


def _material(
    trainer: Trainer, pl_module: LightningModule, evidence: Evidence | None, watched: Watched | None
) -> Material:
    if evidence is None:
        found: Material | str = "what it needs could not be collected"
    elif watched is None:
        found = "the loss that watch names was never logged"
    elif not math.isfinite(watched.best):
        found = f"{watched.name} was never finite"
    elif watched.best <= 0:
        found = f"a relative rise has no meaning where the loss is not above 0 ({watched.name} was {watched.best:.4g})"
    else:
        found = evidence.material(pl_module, watched)
    for reason in gather_objects(trainer, found if isinstance(found, str) else ""):
        if reason:
            raise NotAssessedError(reason)
    if isinstance(found, str):
        raise NotAssessedError(found)
    return found


def _train_loss_fell(trainer: Trainer, evidence: Evidence | None) -> bool | None:
    """Whether the training loss is lower than in front of the best validation; None where it is not known."""
    pairs = gather_objects(trainer, (evidence.train_best, evidence.train_now) if evidence is not None else None)
    best, last = (mean(values) for values in zip(*(pair for pair in pairs if pair), strict=True))
    return None if math.isnan(best + last) else last < best


def _judge(pl_module: LightningModule, material: Material, case: Case, since: int) -> Iterator[Finding | None]:
    """What the rules say, running statistics first."""
    layers = find_batchnorm(pl_module)
    yield wrong_running_statistics(case, {name: layer.momentum for name, layer in layers.items()})
    if material.is_best and material.validations == 1:
        yield not_assessed("there was one validation, and nothing to compare it with")
        return
    if case.overfits and since < PATIENCE:
        yield not_assessed(f"{case.words()}, and only {since} validations came after the best one")
        return
    if case.unsure:
        rise = case.losses.rise
        yield not_assessed(
            f"{case.name} rose from {rise.before:.4g} to {rise.after:.4g} ({rise.relative:+.0%}), which {rise.z:.1f} "
            "standard errors do not make sure: it rose in few of the validation batches"
        )
    for rule in VERDICTS:
        yield rule(case)
    yield mismatched_statistics(case, _dropout(pl_module, material.modes))


def _moved(pl_module: LightningModule, material: Material) -> float:
    """Median over the layers of the drift of γ since the best validation."""
    if material.is_best:
        return 0.0
    names = {id(x): name for name, x in pl_module.named_parameters()}
    then = {
        name: Affine(material.best.parameters[names[id(layer.weight)]], material.best.parameters[names[id(layer.bias)]])
        for name, layer in find_batchnorm(pl_module).items()
        if layer.weight is not None and layer.bias is not None
    }
    (pairs,) = drift_by_layer(affine_of(pl_module), then)
    return median(gamma for gamma, _ in pairs.values()) if pairs else 0.0


def _dropout(pl_module: LightningModule, modes: Mapping[nn.Module, bool]) -> str | None:
    """The first dropout that is active in training, with a BatchNorm layer behind it in the order of the modules."""
    modules = list(pl_module.named_modules())
    norms = set(find_batchnorm(pl_module).values())
    last = max((place for place, (_, module) in enumerate(modules) if module in norms), default=0)
    found = (
        name for name, module in modules[:last] if isinstance(module, _DropoutNd) and module.p and modes.get(module)
    )
    return next(found, None)


def _show(bar: tqdm[None], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
