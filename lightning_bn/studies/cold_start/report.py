# SPDX-License-Identifier: Apache-2.0
"""What the rows of the study ``cold_start`` say: tables and a summary."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_bn.studies.cold_start.rows import (
    BATCHES,
    CASES,
    GAPS,
    HE,
    HUGE,
    LAST,
    PLACINGS,
    PLAIN,
    RAISED,
    STDS,
    WIDTHS,
    accuracies,
    deepest,
    ends,
    silent,
    sparse,
    trained,
)
from lightning_bn.studies.seeds import markdown, mean, of_seeds, places, size
from lightning_bn.studies.starts import DTYPES, OPTIMIZERS
from lightning_bn.studies.study import Row

FLOAT32_MAX = 3.4028e38
HEADS = ["fan-in (layers)", *(f"σ = {std:g}" for std in STDS)]
RANGE = (
    "First forward pass through linear layers with ReLU: the layer, counted from 1, whose output is the first that is "
    "not finite, and in brackets the one predicted from the weights alone; a dash is none."
)
SILENCE = (
    "One BatchNorm layer in float32 on the CPU: the standard deviation of what it gets from which on channels are "
    "exactly 0 in all of the batch, all outputs being finite and the running variance infinite. Where the squares of N "
    "values are added up, the range of float32 ends at √(3.4e38 / N)."
)
GAP = (
    f"N(0, 1000²), width 128, {max(GAPS)} layers, BatchNorm behind some of them only. Not finite: layer in float32 / "
    "bfloat16 / float16, and share of the logits. Silent and infinite: shares of the channels of BatchNorm whose "
    "output is exactly 0 and whose running variance is infinite, in float32."
)
REMEDIES = (
    "Width 128, 5 layers, BatchNorm behind every hidden layer but in the first row; five epochs. Moved: by how much "
    "the weights changed, relative to their norm, in the first step and in all, with Adam."
)


def tables(rows: list[Row]) -> str:
    """Overflows by fan-in and σ, silent channels by what comes in, BatchNorm behind some layers only, remedies."""
    wide = ["BatchNorm", "not finite", "logits", "silent", "infinite", "first loss over ln 10", "Adam", "SGD"]
    helped = ["start and remedy", "σ", "first loss over ln 10", "Adam", "SGD", "moved in a step", "in all"]
    parts = [
        RANGE,
        f"**float16, BatchNorm behind every layer** (float32 and bfloat16: {count(rows, 'batch')})",
        markdown(HEADS, overflows(rows, "batch", "float16")),
        f"**float32, without BatchNorm** (bfloat16 {agreement(rows)})",
        markdown(HEADS, overflows(rows, "none", "float32")),
        "**float16, without BatchNorm**",
        markdown(HEADS, overflows(rows, "none", "float16")),
        SILENCE,
        markdown(["batch size N", "no channel up to", "all channels from", "√(3.4e38 / N)"], silences(rows)),
        GAP,
        markdown(wide, gaps(rows)),
        REMEDIES,
        markdown(helped, remedies(rows)),
    ]
    return "\n\n".join(parts)


def count(rows: list[Row], norm: str) -> str:
    """How many first forward passes in float32 and in bfloat16 are not finite."""
    both = [ends(rows, norm, name) for name in ("float32", "bfloat16")]
    return f"{sum(len(end.hits) for end in both)} of {sum(len(end.seen) for end in both)} overflow"


def agreement(rows: list[Row]) -> str:
    """Whether bfloat16 ends in the layer in which float32 does."""
    pairs = list(zip(ends(rows, "none", "float32").seen, ends(rows, "none", "bfloat16").seen, strict=True))
    return f"ends in the same layer in {sum(one == other for one, other in pairs)} of {len(pairs)}"


def overflows(rows: list[Row], norm: str, dtype: str) -> Iterator[list[str]]:
    """Where the first forward pass ends, by fan-in and σ."""
    for width in WIDTHS:
        found = [ends(rows, norm, dtype, width=width, std=std) for std in STDS]
        yield [f"{width} ({deepest(width)})", *map(str, found)]


def silences(rows: list[Row]) -> Iterator[list[str]]:
    """From which standard deviation on BatchNorm is silent, by batch size."""
    for batch in BATCHES:
        shares = {std: silent(rows, batch, std) for std in HUGE}
        none = [std for std, share in shares.items() if share == 0]
        every = [std for std, share in shares.items() if share == 1]
        edge = math.sqrt(FLOAT32_MAX / batch)
        yield [str(batch), *(f"{value:.1e}" for value in (max(none, default=0), min(every, default=math.inf), edge))]


def gaps(rows: list[Row]) -> Iterator[list[str]]:
    """What BatchNorm behind some layers only leads to."""
    for gap in GAPS:
        where = [places(sparse(rows, gap, f"{name}_ends")) for name in DTYPES]
        bad = [f"{mean(sparse(rows, gap, f'{name}_bad')):.0%}" for name in DTYPES]
        shares = [f"{mean(sparse(rows, gap, name)):.0%}" for name in ("silent", "running_var_inf")]
        yield [
            PLACINGS[gap],
            " / ".join(where),
            " / ".join(bad),
            *shares,
            size(mean(sparse(rows, gap, "loss_ratio"))),
            *(of_seeds(sparse(rows, gap, name)) for name in OPTIMIZERS),
        ]


def remedies(rows: list[Row]) -> Iterator[list[str]]:
    """What each remedy leads to."""
    for case, stds in CASES.items():
        for std in stds:
            numbers = [size(mean(trained(rows, case, f"adam_{what}", std))) for what in ("update", "change")]
            loss = size(mean(trained(rows, case, "loss_ratio", std)))
            found = [of_seeds(trained(rows, case, name, std)) for name in OPTIMIZERS]
            yield [case, "He" if case == HE else f"{std:g}", loss, *found, *numbers]


def summary(rows: list[Row]) -> str:
    """What was seen, in a few sentences."""
    half = {std: ends(rows, "batch", "float16", std=std) for std in STDS}
    ended = ", ".join(f"σ = {std:g} in {len(end.hits)} of {len(end.seen)}" for std, end in half.items())
    bare = ends(rows, "none", "float32")
    exact = sum(seen == said for seen, said in zip(bare.seen, bare.predicted, strict=True))
    loss, moved = (size(mean(trained(rows, PLAIN, name))) for name in ("loss_ratio", "adam_change"))
    mended = size(mean(trained(rows, LAST, "loss_ratio")))
    reached = {case: f"{mean(accuracies(rows, case, 'adam')):.2f}" for case in (PLAIN, LAST, RAISED, HE)}
    return (
        f"With BatchNorm behind every layer, of the first forward passes in float32 and bfloat16 {count(rows, 'batch')}"
        f", of those in float16 with {ended}. Without BatchNorm float32 ends in layer {places(bare.seen)}, as "
        f"predicted from the weights in {exact} of {len(bare.seen)}. N(0, 1000²) behind BatchNorm in float32 starts "
        f"with {loss} times the loss of equal probabilities. Five epochs of Adam move its weights by {moved} of their "
        f"norm, and its accuracy is {reached[PLAIN]}; He has {reached[HE]}. With BatchNorm behind the last layer too "
        f"the first loss is {mended} times ln 10 and the accuracy {reached[LAST]}; with learning rates raised as well, "
        f"in proportion to the weights, it is {reached[RAISED]}."
    )
