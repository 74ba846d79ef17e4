# SPDX-License-Identifier: Apache-2.0
"""What the runs of the study ``small_data`` say of each claim; the rule is that of :func:`.small_data_rows.judged`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import cast

from lightning_bn.rules import affine_driven_overfitting, overfitting_elsewhere, shared_overfitting
from lightning_bn.stats.attribution import Change
from lightning_bn.studies.small_data.rows import NAMES, PLACES, STARTS, Run, Word, is_sure, judged, paired
from lightning_bn.studies.study import Row, Verdict

OVERFITS = (affine_driven_overfitting.RULE, shared_overfitting.RULE, overfitting_elsewhere.RULE)
SMALL = (Run("batch"), Run("batch", noise=0.3))
WU_HE = "Wu & He 2018 (arXiv 1803.08494), ResNet-50 on ImageNet"

Pair = tuple[str, Run, Run]


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What became of each claim."""
    return [
        noise_regularises(rows),
        dropout_is_spared(rows),
        affine_memorises(rows),
        affine_drives(rows),
        small_data_overfits_more(rows),
        converges_faster(rows),
        ends_worse(rows),
        others_instead(rows),
        keep_dropout(rows),
        dropout_behind_batchnorm(rows),
    ]


def noise_regularises(rows: Sequence[Row]) -> Verdict:
    """The noise is what BatchNorm has and GroupNorm has not."""
    found = _changes(rows, [(place.place, _other("group", place), place) for place in PLACES], "rise")
    return Verdict(
        "The noise of the batch statistics regularises: the validation loss rises less with BatchNorm than with "
        "GroupNorm, which normalises without the batch.",
        judged(list(found.values()), -1),
        f"rise, GroupNorm → BatchNorm: {_listed(found)}{_where(found, -1)}",
        f"{WU_HE}, 32 images a GPU: error 24.1% with GroupNorm, 23.6% with BatchNorm, though the training error of "
        "GroupNorm is lower",
    )


def dropout_is_spared(rows: Sequence[Row]) -> Verdict:
    """Dropout would have to bring nothing where BatchNorm is."""
    found = _changes(rows, [(run.place, run, _dropped(run)) for run in SMALL], "last_loss")
    return Verdict(
        "With BatchNorm dropout can be left out.",
        judged(list(found.values()), 1),
        f"last validation loss, BatchNorm without → with dropout: {_listed(found)}{_where(found, 1)}",
    )


def keep_dropout(rows: Sequence[Row]) -> Verdict:
    """Dropout has to lower the last loss."""
    runs = [Run(norm, noise=place.noise) for norm in NAMES for place in SMALL]
    found = _changes(rows, [(f"{run.label}, {run.place}", run, _dropped(run)) for run in runs], "last_loss")
    return Verdict(
        "On small data keep dropout, with BatchNorm or without: the validation loss ends lower.",
        judged(list(found.values()), -1),
        f"last validation loss, without → with dropout: {_listed(found)}{_where(found, -1)}",
    )


def dropout_behind_batchnorm(rows: Sequence[Row]) -> Verdict:
    """In front of the head alone against behind each hidden layer."""
    runs = [Run("batch", noise=place.noise, dropout="last") for place in SMALL]
    pairs = [(Run("batch", noise=run.noise).place, run, _dropped(run)) for run in runs]
    found = _changes(rows, pairs, "last_loss")
    return Verdict(
        "Dropout belongs behind the last BatchNorm layer: the validation loss ends lower than with dropout behind each "
        "hidden layer.",
        judged(list(found.values()), 1),
        f"last validation loss, in front of the head → behind each hidden layer: {_listed(found)}{_where(found, 1)}",
        "Li et al. 2019 (arXiv 1801.05134), DenseNet on CIFAR-100: 77.42% falls to 68.55% with dropout 0.5 in each "
        "bottleneck",
    )


def affine_memorises(rows: Sequence[Row]) -> Verdict:
    """Against the same network with γ and β fixed."""
    pairs = [(run.place, Run("batch", noise=run.noise, affine="fixed"), run) for run in SMALL]
    found, last = _changes(rows, pairs, "rise"), _changes(rows, pairs, "last_acc")
    return Verdict(
        "γ and β add capacity that memorises noise: the validation loss rises more where they are trained.",
        judged(list(found.values()), 1),
        f"rise, γ and β fixed at 1 and 0 → trained: {_listed(found)}{_where(found, 1)}; last accuracy: "
        f"{_listed(last, '.3f')}",
    )


def affine_drives(rows: Sequence[Row]) -> Verdict:
    """By the verdicts of BatchNormMonitor, which puts γ and β of the best epoch back."""
    said = affine_verdicts(rows)
    driven, shared = said[OVERFITS[0]], said[OVERFITS[1]]
    word: Word = "not shown"
    if said:
        word = "holds" if driven == said.total() else "holds if" if driven + shared else "does not hold"
    tops = [cast("float", row["share_high"]) for row in _ordinary(rows) if overfits(row)]
    most = f"; they carry at most {median(tops):.0%} of the rise (median of the upper bounds)" if tops else ""
    return Verdict(
        "γ and β chase the noise of small batches, and drive the overfitting.",
        word,
        f"of {said.total()} runs that overfit by BatchNormMonitor, γ and β drive {driven} and share in {shared}{most}",
    )


def small_data_overfits_more(rows: Sequence[Row]) -> Verdict:
    """By the rise of the validation loss."""
    found = _changes(rows, [(place.place, _other("none", place), place) for place in STARTS], "rise")
    return Verdict(
        "On small data in small batches a network with BatchNorm overfits more than one without: its validation loss "
        "rises more.",
        judged(list(found.values()), 1),
        f"rise, without → with BatchNorm: {_listed(found)}{_where(found, 1)}",
    )


def converges_faster(rows: Sequence[Row]) -> Verdict:
    """By the validation loss after three epochs."""
    pairs = [(place.place, _other("none", place), place) for place in STARTS]
    found, best = _changes(rows, pairs, "loss_3"), _changes(rows, pairs, "best_epoch")
    return Verdict(
        "100 images, batches of 8: the network with BatchNorm (A) converges faster than the one without (B).",
        judged(list(found.values()), -1),
        f"validation loss after 3 epochs, B → A: {_listed(found)}{_where(found, -1)}; epoch of the best validation: "
        f"{_listed(best, '.0f')}",
    )


def ends_worse(rows: Sequence[Row]) -> Verdict:
    """By the last accuracy."""
    found = _changes(rows, [(place.place, _other("none", place), place) for place in STARTS], "last_acc")
    return Verdict(
        "A ends with a worse accuracy than B.",
        judged(list(found.values()), -1),
        f"last accuracy, B → A: {_listed(found, '.3f')}{_where(found, -1)}",
    )


def others_instead(rows: Sequence[Row]) -> Verdict:
    """By the last accuracy, for GroupNorm and LayerNorm."""
    pairs = [(f"{NAMES[norm]}, {run.place}", run, _other(norm, run)) for norm in ("group", "layer") for run in SMALL]
    found = _changes(rows, pairs, "last_acc")
    return Verdict(
        "Below batches of 16 GroupNorm or LayerNorm end with a better accuracy than BatchNorm.",
        judged(list(found.values()), 1),
        f"last accuracy, BatchNorm → the other: {_listed(found, '.3f')}{_where(found, 1)}",
        f"{WU_HE}, 8 images a GPU: error 24.8% with BatchNorm, 24.2% with GroupNorm; 32 images: LayerNorm 25.3%, "
        "BatchNorm 23.6%",
    )


def affine_verdicts(rows: Sequence[Row]) -> Counter[str]:
    """What was said of runs that overfit and whose γ and β were trained."""
    return Counter(str(row["verdict"]) for row in _ordinary(rows) if overfits(row))


def overfits(row: Row) -> bool:
    """Whether BatchNormMonitor says so."""
    return row["verdict"] in OVERFITS


def _ordinary(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["norm"] == "batch" and row["affine"] == "trained"]


def _other(norm: str, place: Run) -> Run:
    return replace(place, norm=norm)


def _dropped(run: Run) -> Run:
    return replace(run, dropout="all")


def _changes(rows: Sequence[Row], pairs: Sequence[Pair], column: str) -> dict[str, Change]:
    return {name: paired(rows, before, after, column) for name, before, after in pairs}


def _listed(changes: dict[str, Change], form: str = ".2f") -> str:
    return "; ".join(f"{name} {x.before:{form}} → {x.after:{form}} (z = {x.z:+.2f})" for name, x in changes.items())


def _where(changes: dict[str, Change], sign: int) -> str:
    """Where a claim holds for sure and where its contrary does, unless that is everywhere or nowhere."""
    parts = []
    for word, way in (("holds for", sign), ("the contrary for", -sign)):
        names = [name for name, found in changes.items() if is_sure(found, way)]
        parts += [f"; {word} {' / '.join(names)}"] if 0 < len(names) < len(changes) else []
    return "".join(parts)
