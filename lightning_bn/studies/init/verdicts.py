# SPDX-License-Identifier: Apache-2.0
"""What the rows of the study ``init`` say of what is said about initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Literal

from lightning_bn.studies.init.report import accuracies, of_gamma
from lightning_bn.studies.init.rows import (
    DEPTHS,
    GAMMAS,
    MADE,
    NORMS,
    SIMPLE,
    STARTS,
    TERRIBLE,
    TITLES,
    Cell,
    Score,
    compare,
    ends,
    span,
)
from lightning_bn.studies.seeds import between, column, mean, size
from lightning_bn.studies.starts import CHANCE, DTYPES, OPTIMIZERS, TRAINED
from lightning_bn.studies.study import Row, Setting, Verdict

Word = Literal["holds", "holds if", "does not hold", "not shown"]
SAME_STD, LARGE_LOSS = 1.1, 4.0
"""Ratio of standard deviations up to which they are called equal; first loss over ln 10 that no usual start has."""
FAILED, AHEAD = 3 * CHANCE, 0.2
"""Accuracy that is no more than a little above chance, and a difference in accuracy that nobody overlooks."""


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What became of each claim."""
    made = (simple_values, order_with, order_without, critical_without, fail_at_once, terrible_with)
    return [judge(rows) for judge in (*made, normalised_start, layers_without, deep_networks)]


def of_all(found: Sequence[bool]) -> Word:
    """``holds`` where all are true, ``does not hold`` where none is."""
    return "holds" if all(found) else "holds if" if any(found) else "does not hold"


def simple_values(rows: list[Row]) -> Verdict:
    """Holds at the depths where simple starts train and BatchNorm halves what the four usual starts differ by."""
    found, parts = [], []
    for depth in DEPTHS:
        low, high = span(rows, (*MADE, *SIMPLE), "batch", depth)
        bare_low, bare_high = span(rows, (*MADE, *SIMPLE), "none", depth)
        trained = span(rows, SIMPLE, "batch", depth)[0] >= TRAINED
        found.append(trained and high - low < (bare_high - bare_low) / 2)
        parts.append(f"depth {depth}: {low:.2f} to {high:.2f} with, {bare_low:.2f} to {bare_high:.2f} without")
    words = ", ".join(str(depth) for depth, good in zip(DEPTHS, found, strict=True) if good)
    end = f". Both halves hold at depth {words}" if words else ""
    return Verdict(
        "With BatchNorm the start matters far less, and simple random values work.",
        of_all(found),
        f"accuracy of He, Xavier and the two simple starts, both optimizers: {'; '.join(parts)}{end}",
    )


def order_with(rows: list[Row]) -> Verdict:
    """Holds where He and Xavier never lose; does not hold where they lose as often as they win, or more."""
    loss, final = compare(rows, "batch", loss=True), compare(rows, "batch")
    shallow = compare(rows, "batch", depths=DEPTHS[:1])
    return Verdict(
        "Even with BatchNorm He and Xavier converge faster and more reliably than simple values.",
        word_of(loss, final),
        f"training loss of the fifth epoch {loss}; accuracy after it {final}, at depth {DEPTHS[0]} {shallow}",
    )


def order_without(rows: list[Row]) -> Verdict:
    """The same without BatchNorm."""
    final = compare(rows, "none")
    usual = [(STARTS[start], accuracies(rows, Cell(start, "none", DEPTHS[1]))) for start in (*MADE, *SIMPLE)]
    return Verdict(
        "Without BatchNorm He and Xavier are better than N(0, 0.01²) and U(−0.05, 0.05).",
        word_of(final),
        f"accuracy after five epochs {final}; at depth {DEPTHS[1]} with Adam / SGD: "
        + ", ".join(f"{label} {accuracy}" for label, accuracy in usual),
    )


def word_of(*scores: Score) -> Word:
    """What the comparisons of two groups say."""
    better, worse = sum(score.better for score in scores), sum(score.worse for score in scores)
    if better == worse == 0:
        return "not shown"
    return "holds" if not worse else "holds if" if better > worse else "does not hold"


def critical_without(rows: list[Row]) -> Verdict:
    """Holds at the depths where no simple start trains, and one made for the network is ahead by ``AHEAD``."""
    found, parts = [], []
    for depth in DEPTHS:
        made, simple = span(rows, MADE, "none", depth)[1], span(rows, SIMPLE, "none", depth)[1]
        found.append(simple < TRAINED and made - simple >= AHEAD)
        parts.append(f"depth {depth} {made:.2f} against {simple:.2f}")
    return Verdict(
        "Without BatchNorm a careful start is critical, and simple values fail or are very slow.",
        of_all(found),
        f"best accuracy of He and Xavier against best of the two simple starts: {', '.join(parts)}",
    )


def fail_at_once(rows: list[Row]) -> Verdict:
    """Holds for the precisions and depths in which the first forward pass of every terrible start overflows."""
    cells = [Cell(start, "none", depth) for start, depth in product(TERRIBLE, DEPTHS)]
    table = {name: [bool(ends(rows, cell, name).hits) for cell in cells] for name in DTYPES}
    parts = [f"{name} overflows in {sum(hits)} of {len(hits)} cells" for name, hits in table.items()]
    found = {f"{STARTS[cell.start]} at depth {cell.depth}": ends(rows, cell, "float32") for cell in cells}
    seen = [f"{name} in layer {end}" for name, end in found.items() if end.hits]
    steps = [step for cell in cells for step in cell.values(rows, "sgd_nan_step") if not math.isnan(step)]
    later = f"; with SGD the loss is NaN by step {max(steps):.0f} in {len(steps)} runs" if steps else ""
    return Verdict(
        "Without BatchNorm N(0, 1) and N(0, 1000²) fail at once with NaN.",
        of_all([hit for hits in table.values() for hit in hits]),
        f"first forward pass: {', '.join(parts)}; float32, predicted in brackets: "
        f"{', '.join(seen) or 'nowhere'}{later}",
    )


def terrible_with(rows: list[Row]) -> Verdict:
    """Holds where each terrible start trains somewhere, and none as fast as He."""
    tops = [max(runs_of(start), key=lambda run: run[0].accuracy(rows, run[1])) for start in TERRIBLE]
    parts = [f"{cell} with {TITLES[name]} {between(cell.accuracies(rows, name))}" for cell, name in tops]
    slow = [f"{STARTS[cell.start]} {size(mean(cell.values(rows, f'{name}_loss_last')))}" for cell, name in tops]
    he = mean(Cell("he", "batch", DEPTHS[0]).values(rows, "adam_loss_last"))
    return Verdict(
        "With BatchNorm terrible values may still succeed, chaotically and slowly.",
        of_all([cell.accuracy(rows, name) >= TRAINED for cell, name in tops]),
        f"best cells: {', '.join(parts)}; their training loss of the fifth epoch over ln 10: {', '.join(slow)}, that "
        f"of He {size(he)}",
    )


def runs_of(start: str) -> list[tuple[Cell, str]]:
    """The cells of a start with BatchNorm, with each optimizer."""
    return [(Cell(start, "batch", depth), name) for depth, name in product(DEPTHS, OPTIMIZERS)]


def normalised_start(rows: list[Row]) -> Verdict:
    """Holds where γ = 1 trains and every other start of γ is worse; holds if, where only γ = 0 fails."""
    where: Setting = {"network": "mlp", "start": "he", "norm": "batch", "depth": DEPTHS[0]}
    low = {g: min(mean(column(rows, name, {**where, "gamma": g})) for name in OPTIMIZERS) for g in GAMMAS}
    trains = [f"{gamma:g}" for gamma, accuracy in low.items() if accuracy >= TRAINED]
    fails = low[0] < FAILED and low[1] >= TRAINED
    word: Word = "does not hold" if not fails else "holds" if trains == ["1"] else "holds if"
    plain = "; ".join(f"γ = {gamma:g} {' / '.join(of_gamma(rows, 'mlp', gamma)[1:])}" for gamma in GAMMAS)
    closing = " / ".join(of_gamma(rows, "resnet", 0.0)[1:])
    both = " / ".join(of_gamma(rows, "resnet", 1.0)[1:])
    return Verdict(
        "γ = 1 and β = 0 are part of the start.",
        word,
        f"He at depth {DEPTHS[0]}, Adam / SGD: {plain}; it trains with γ = {', '.join(trains)}. In a residual network "
        f"γ = 0 on the norms that close a branch {closing}, γ = 1 everywhere {both}, after five epochs",
        "γ = 0 on the last norm of each residual block is a usual start (Wu & He 2018, arXiv 1803.08494)",
    )


def layers_without(rows: list[Row]) -> Verdict:
    """Holds where what the last layer gets has one size under all starts, and the loss behind it has not."""
    cells = [Cell(start, "batch", depth) for start, depth in product(STARTS, DEPTHS)]
    stds = [mean(cell.values(rows, "std")) for cell in cells]
    losses = {start: mean(Cell(start, "batch", DEPTHS[0]).values(rows, "loss_ratio")) for start in STARTS}
    covered = max(stds) / min(stds) <= SAME_STD
    return Verdict(
        "BatchNorm does not cover every layer: there the start matters as it does without.",
        "holds" if covered and max(losses.values()) > LARGE_LOSS else "does not hold",
        f"what the last layer gets has standard deviation {between(stds)} under all starts; the first "
        "loss behind it, over ln 10: " + ", ".join(f"{STARTS[start]} {size(loss)}" for start, loss in losses.items()),
    )


def deep_networks(rows: list[Row]) -> Verdict:
    """Holds where a start with BatchNorm trains at every depth."""
    tops = {depth: span(rows, tuple(STARTS), "batch", depth)[1] for depth in DEPTHS}
    growths = [
        mean(Cell(start, "batch", depth).values(rows, "gradient_growth")) for start in STARTS for depth in DEPTHS[1:]
    ]
    bare = [mean(Cell("he", "none", depth).values(rows, "gradient_growth")) for depth in DEPTHS[1:]]
    return Verdict(
        "BatchNorm makes plain networks of any depth trainable.",
        "holds" if min(tops.values()) >= TRAINED else "does not hold",
        f"best accuracy {NORMS['batch']}: "
        + ", ".join(f"{top:.2f} at depth {depth}" for depth, top in tops.items())
        + f"; on the way back the first gradient grows by {between(growths)} a layer with BatchNorm under every "
        f"start, by {between(bare)} under He without",
    )
