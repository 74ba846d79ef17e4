# SPDX-License-Identifier: Apache-2.0
"""The recorded runs of the study of starts, beside the same table measured before with other code."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev

import pytest

from lightning_bn.studies.results import read_rows

RECORDED = Path(__file__).parents[2] / "docs" / "studies" / "results" / "init.csv"
NORMS, DEPTHS, OPTIMIZERS = ("none", "batch"), (5, 20, 50), ("adam", "sgd")
NAN = math.nan
# Accuracy after five epochs, Adam and SGD, means of three seeds: without BatchNorm at depth 5, 20, 50, then with it.
ACCURACY = {
    "he": ((0.96, 0.95), (0.91, 0.62), (0.39, 0.19), (0.97, 0.97), (0.37, 0.87), (0.10, 0.22)),
    "xavier": ((0.96, 0.92), (0.33, 0.11), (0.10, 0.10), (0.98, 0.98), (0.57, 0.90), (0.12, 0.23)),
    "naive": ((0.35, 0.09), (0.10, 0.09), (0.09, 0.09), (0.96, 0.97), (0.79, 0.80), (0.27, 0.11)),
    "uniform": ((0.73, 0.09), (0.09, 0.09), (0.10, 0.09), (0.98, 0.97), (0.89, 0.90), (0.16, 0.15)),
    "normal_1": ((0.64, NAN), (0.29, NAN), (NAN, NAN), (0.68, 0.83), (0.10, 0.36), (0.11, 0.15)),
    "normal_1000": ((0.12, NAN), (NAN, NAN), (NAN, NAN), (0.19, 0.13)),
}
CELLS = {
    (start, norm, depth, optimizer): value
    for start, pairs in ACCURACY.items()
    for (norm, depth), pair in zip([(norm, depth) for norm in NORMS for depth in DEPTHS], pairs, strict=False)
    for optimizer, value in zip(OPTIMIZERS, pair, strict=True)
}
# The linear layer, counted from 1, whose output is the first that is not finite; all others are finite.
WIDE = {("normal_1", "none", 50): {42, 43}, ("normal_1000", "none", 20): {10}, ("normal_1000", "none", 50): {10}}
HALF = {("normal_1", "none", depth): {5} for depth in DEPTHS} | {
    ("normal_1000", "none", depth): {2} for depth in DEPTHS
}
SOMETIMES = {("normal_1000", "batch", 20), ("normal_1000", "batch", 50)}  # float16, in some seeds
KNOWN_SEEDS, LEAST = 3, 0.02  # LEAST: 12 of the 600 samples, where all seeds happen to agree


@pytest.fixture(scope="module")
def runs():
    """The perceptrons of the table, by start, norm and depth."""
    found: dict[tuple[str, str, int], list[dict]] = {}
    for row in read_rows(RECORDED):
        if row["network"] == "mlp" and row["gamma"] in {None, 1.0}:
            found.setdefault((row["start"], row["norm"], row["depth"]), []).append(row)
    return found


def distance(values, known):
    """How far a mean lies from a known one, in standard errors of their difference."""
    spread = max(stdev(values), LEAST)
    return abs(mean(values) - known) / (spread * math.sqrt(1 / len(values) + 1 / KNOWN_SEEDS))


def test_accuracies_are_the_known_ones_within_the_spread_of_seeds(runs):
    """No cell is four standard errors off, and no more of them than chance makes lie beyond two."""
    far = {}
    for (start, norm, depth, optimizer), known in CELLS.items():
        values = [row[optimizer] for row in runs[start, norm, depth]]
        if not math.isnan(known):
            far[start, norm, depth, optimizer] = distance(values, known)
    assert len(far) == 59
    assert max(far.values()) < 4
    beyond = [cell for cell, errors in far.items() if errors > 2]
    # Of a t distribution of four degrees of freedom, 12 % lie beyond two: 7 of 59 are expected.
    assert len(beyond) <= 7


def test_nan_is_where_it_was_known_to_be(runs):
    """Every seed of the cells that were NaN is NaN, and none of the others."""
    for (start, norm, depth, optimizer), known in CELLS.items():
        values = {math.isnan(row[optimizer]) for row in runs[start, norm, depth]}
        assert values == {math.isnan(known)}, (start, norm, depth, optimizer)


@pytest.mark.parametrize(
    ("dtype", "known"),
    [("float32", WIDE), ("bfloat16", WIDE), ("float16", HALF)],
    ids=["float32", "bfloat16", "float16"],
)
def test_the_first_pass_ends_where_it_was_known_to_end(runs, dtype, known):
    """The layer is the known one in every seed; with BatchNorm float16 overflows in some seeds of deep N(0, 1000²)."""
    for cell, rows in runs.items():
        found = {row[f"{dtype}_ends"] for row in rows}
        if dtype == "float16" and cell in SOMETIMES:
            assert None in found or cell[2] == 50
            assert found != {None}
        else:
            assert found <= known.get(cell, {None}), cell
