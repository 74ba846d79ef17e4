# SPDX-License-Identifier: Apache-2.0
"""What the rows of the study ``cold_start`` say of what is said about cold starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

from lightning_bn.studies.cold_start.rows import (
    GAPS,
    HE,
    LAST,
    PLACINGS,
    PLAIN,
    RAISED,
    STDS,
    WIDTHS,
    accuracies,
    ends,
    sparse,
    trained,
)
from lightning_bn.studies.seeds import difference, mean, of_seeds, places, size
from lightning_bn.studies.starts import DTYPES, OPTIMIZERS, TRAINED
from lightning_bn.studies.study import Row, Verdict

Word = Literal["holds", "holds if", "does not hold", "not shown"]
LIKE, NOTABLE, MENDED = 0.05, 0.05, 4.0
"""Accuracies that differ by no more than the first are alike; those that differ by less than the second are no gain; a
first loss over ln 10 up to the third is that of a usual start."""
FIRST, THIRD, LAST_HE, INPUT = (
    "He in the first layer",
    "He in the third layer",
    "He in the last layer",
    "norm on the input",
)


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What became of each claim."""
    return [judge(rows) for judge in (overflow_first, beyond_repair, truly_bad, seen_by_nan, first_layer, scale_only)]


def overflow_first(rows: list[Row]) -> Verdict:
    """Holds for the precisions and fan-ins in which a seed overflows; BatchNorm stands behind every layer."""
    found = {name: [ends(rows, "batch", name, width=width, std=max(STDS)) for width in WIDTHS] for name in DTYPES}
    hits = [bool(end.hits) for of_dtype in found.values() for end in of_dtype]
    parts = [
        f"{name} {sum(len(end.hits) for end in of_dtype)} of {sum(len(end.seen) for end in of_dtype)}"
        for name, of_dtype in found.items()
    ]
    half = [
        f"{width}: {len(end.hits)} of {len(end.seen)}" + (f", layer {places(end.seen)}" if end.hits else "")
        for width, end in zip(WIDTHS, found["float16"], strict=True)
    ]
    return Verdict(
        "N(0, 1000²) overflows to NaN before BatchNorm can act.",
        "holds" if all(hits) else "holds if" if any(hits) else "does not hold",
        f"BatchNorm behind every layer, first forward passes that overflow: {', '.join(parts)}; float16 by fan-in "
        f"{'; '.join(half)}",
    )


def beyond_repair(rows: list[Row]) -> Verdict:
    """Holds where all logits are not finite whenever a layer in front of a BatchNorm overflowed."""
    pairs = [
        pair
        for gap, name in product(GAPS, DTYPES)
        for pair in zip(sparse(rows, gap, f"{name}_ends"), sparse(rows, gap, f"{name}_bad"), strict=True)
    ]
    bad = [share for end, share in pairs if end == end]  # noqa: PLR0124  (NaN is where nothing overflowed)
    shares = sorted({f"{share:.0%}" for share in bad})
    return Verdict(
        "What overflowed in front of a BatchNorm it cannot repair.",
        "not shown" if not bad else "holds" if min(bad) == 1 else "holds if" if max(bad) == 1 else "does not hold",
        f"BatchNorm {', '.join(PLACINGS.values())}: in {len(bad)} of {len(pairs)} first forward passes a layer in "
        f"front of it overflows; share of the logits that are not finite there: {', '.join(shares) or 'none'}",
    )


def truly_bad(rows: list[Row]) -> Verdict:
    """Holds where neither optimizer trains it, although BatchNorm stands behind every hidden layer."""
    reached = {name: accuracies(rows, PLAIN, name) for name in OPTIMIZERS}
    failed = [mean(values) < TRAINED for values in reached.values()]
    return Verdict(
        "N(0, 1000²) is truly bad, with BatchNorm too.",
        "holds" if all(failed) else "holds if" if any(failed) else "does not hold",
        f"accuracy {_both(rows, PLAIN)} (He {_both(rows, HE)}); first loss over ln 10 "
        f"{size(mean(trained(rows, PLAIN, 'loss_ratio')))} (He {size(mean(trained(rows, HE, 'loss_ratio')))}); a step "
        f"of Adam moves the weights by {size(mean(trained(rows, PLAIN, 'adam_update')))} of their norm (He "
        f"{size(mean(trained(rows, HE, 'adam_update')))})",
    )


def seen_by_nan(rows: list[Row]) -> Verdict:
    """Does not hold where the first forward pass of a start is finite and no optimizer trains it."""
    finite = [mean(sparse(rows, gap, "float32_bad")) == 0 for gap in GAPS]
    failed = [not any(mean(sparse(rows, gap, name)) >= TRAINED for name in OPTIMIZERS) for gap in GAPS]
    hidden = [gap for gap, fine, bad in zip(GAPS, finite, failed, strict=True) if fine and bad]
    parts = [
        f"{PLACINGS[gap]}: first loss over ln 10 {size(mean(sparse(rows, gap, 'loss_ratio')))}, accuracy "
        f"{' / '.join(of_seeds(sparse(rows, gap, name)) for name in OPTIMIZERS)}, silent channels "
        f"{mean(sparse(rows, gap, 'silent')):.0%}"
        for gap in hidden
    ]
    return Verdict(
        "A start that is bad shows itself by NaN.",
        "does not hold" if hidden else "holds",
        f"N(0, 1000²) in float32: of {sum(failed)} placings of BatchNorm that do not train, {len(hidden)} have a "
        f"finite first forward pass; {'; '.join(parts)}",
    )


def first_layer(rows: list[Row]) -> Verdict:
    """Holds where mending the first layer helps more than mending one that has BatchNorm on both sides."""
    ahead = {_against(rows, FIRST, THIRD, name) for name in OPTIMIZERS}
    word: Word = "holds" if ahead in ({1}, {0, 1}) else "not shown" if ahead == {-1, 1} else "does not hold"
    losses = {case: size(mean(trained(rows, case, "loss_ratio"))) for case in (PLAIN, INPUT, FIRST, THIRD, LAST_HE)}
    parts = [f"{case} {_both(rows, case)}, first loss {loss}" for case, loss in losses.items()]
    mended = mean(trained(rows, LAST_HE, "loss_ratio")) <= MENDED
    return Verdict(
        "The first layer is the weak one, as no BatchNorm stands in front of it.",
        word,
        f"N(0, 1000²) but for what is named, accuracy and first loss over ln 10: {'; '.join(parts)}"
        + (". What decides the first loss is the last layer, which has no BatchNorm behind it" if mended else ""),
    )


def scale_only(rows: list[Row]) -> Verdict:
    """Holds where, normalised to the end and with rates in proportion, the start trains as He does."""
    gaps = [abs(mean(accuracies(rows, RAISED, name)) - mean(accuracies(rows, HE, name))) for name in OPTIMIZERS]
    like = [gap <= LIKE for gap in gaps]
    return Verdict(
        "Between two BatchNorms the scale of the weights sets nothing but how far a step turns them.",
        "holds" if all(like) else "holds if" if any(like) else "does not hold",
        f"N(0, 1000²) with BatchNorm behind the last layer as well: accuracy {_both(rows, LAST)}; with learning rates "
        f"raised in proportion to the weights (SGD: to their square) {_both(rows, RAISED)}; He {_both(rows, HE)}",
    )


def _both(rows: Sequence[Row], case: str) -> str:
    """The accuracies of a remedy with Adam and with SGD."""
    return " / ".join(of_seeds(trained(rows, case, name)) for name in OPTIMIZERS)


def _against(rows: Sequence[Row], case: str, other: str, optimizer: str) -> int:
    """1 where a remedy beats another, -1 where it is beaten, 0 where neither can be said."""
    return difference(accuracies(rows, case, optimizer), accuracies(rows, other, optimizer), least=NOTABLE)
