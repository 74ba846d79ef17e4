# SPDX-License-Identifier: Apache-2.0
"""Many layers become a few numbers: median, largest, smallest, and a count of what has none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_bn.overview import (
    activation_overview,
    activation_table,
    drift_overview,
    first_pass_table,
    gradient_overview,
    rank_overview,
    spread,
)
from lightning_bn.stats.moments import Summary

NAN, INF = math.nan, math.inf
LAYERS = {
    "a": Summary(10, 1.0, 0.1, 10.0, 0.5, nonfinite=0),
    "b": Summary(20, -2.0, 1.0, 100.0, 0.25, nonfinite=0),
    "c": Summary(30, 4.0, 100.0, 1000.0, 0.0, nonfinite=0),
}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([3.0, 1.0, 2.0], (2.0, 3.0, 1.0), id="odd number"),
        pytest.param([4.0, 1.0, 2.0, 3.0], (2.5, 4.0, 1.0), id="even number"),
        pytest.param([7.0], (7.0, 7.0, 7.0), id="one layer"),
        pytest.param([NAN, 3.0, NAN, 1.0], (2.0, 3.0, 1.0), id="NaN is left out"),
        pytest.param([1.0, INF, 2.0], (2.0, INF, 1.0), id="infinity is not"),
    ],
)
def test_the_spread_is_median_largest_and_smallest(values, expected):
    """Three scalars summarise a statistic over the layers; NaN is left out."""
    names = ("bn_overview/gain_median", "bn_overview/gain_max", "bn_overview/gain_min")
    assert spread("gain", iter(values)) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize("values", [pytest.param([], id="no layer"), pytest.param([NAN, NAN], id="only NaN")])
def test_without_values_there_is_no_spread(values):
    """Where nothing is known nothing is logged, not 0."""
    assert spread("gain", values) == {}


def test_activations_are_summarised_over_the_layers():
    """Mean and zero share as they are, spread and range as decimal logarithms."""
    assert activation_overview(LAYERS) == pytest.approx(
        {
            "bn_overview/mean_median": 1.0,
            "bn_overview/mean_max": 4.0,
            "bn_overview/mean_min": -2.0,
            "bn_overview/std_log10_median": 0.0,
            "bn_overview/std_log10_max": 2.0,
            "bn_overview/std_log10_min": -1.0,
            "bn_overview/abs_max_log10_median": 2.0,
            "bn_overview/abs_max_log10_max": 3.0,
            "bn_overview/abs_max_log10_min": 1.0,
            "bn_overview/zero_share_median": 0.25,
            "bn_overview/zero_share_max": 0.5,
            "bn_overview/zero_share_min": 0.0,
            "bn_overview/nonfinite_layers": 0.0,
        }
    )


@pytest.mark.parametrize(
    "sick",
    [
        pytest.param(Summary(10, NAN, NAN, NAN, NAN), id="NaN"),
        pytest.param(Summary(10, NAN, NAN, INF, 1.0), id="infinity"),
    ],
)
def test_a_layer_with_non_finite_values_is_counted_and_left_out(sick):
    """One sick layer adds to the count of such layers and leaves the other numbers as they were."""
    assert activation_overview({**LAYERS, "sick": sick}) == {
        **activation_overview(LAYERS),
        "bn_overview/nonfinite_layers": 1.0,
    }


def test_where_no_layer_is_finite_only_the_count_is_logged():
    """Statistics that nobody has are not logged."""
    layers = {"a": Summary(1, NAN, NAN, INF, 0.0), "b": Summary(1, NAN, NAN, NAN, NAN)}
    assert activation_overview(layers) == {"bn_overview/nonfinite_layers": 2.0}


def test_no_layers_are_no_sick_layers():
    """Without layers the count is 0 and nothing else is logged."""
    assert activation_overview({}) == {"bn_overview/nonfinite_layers": 0.0}


@pytest.mark.parametrize(
    ("value", "logged"),
    [
        pytest.param(0.0, -45.0, id="0"),
        pytest.param(1.4e-45, math.log10(1.4e-45), id="smallest subnormal"),
        pytest.param(1e-3, -3.0, id="healthy twin"),
    ],
)
def test_the_logarithm_of_zero_is_a_number(value, logged):
    """A layer without spread reads as -45, below every other."""
    layers = {"a": replace(LAYERS["a"], std=value, absmax=value)}
    assert activation_overview(layers)["bn_overview/std_log10_min"] == pytest.approx(logged)
    assert activation_overview(layers)["bn_overview/abs_max_log10_min"] == pytest.approx(logged)


@pytest.mark.parametrize(
    ("name", "row", "line"),
    [
        pytest.param("net.0", LAYERS["b"], "| `net.0` | 20 | -2 | 1 | 100 | 25.0% | 0 |", id="layer"),
        pytest.param("", LAYERS["a"], "| `(the model)` | 10 | 1 | 0.1 | 10 | 50.0% | 0 |", id="the model"),
        pytest.param(
            "x",
            Summary(3, NAN, NAN, NAN, NAN, nonfinite=2),
            "| `x` | 3 | nan | nan | nan | undefined | 2 |",
            id="NaN",
        ),
        pytest.param(
            "x",
            Summary(3, NAN, NAN, INF, 0.0),
            "| `x` | 3 | nan | nan | inf | 0.0% | not counted |",
            id="infinity, not counted",
        ),
        pytest.param(
            "x", Summary(3, 1.0, 2.0, NAN, NAN, ranged=False, nonfinite=0), "| `x` | 3 | 1 | 2 |  |  | 0 |", id="asked"
        ),
    ],
)
def test_the_table_has_one_row_for_each_layer(name, row, line):
    """Count, mean, spread, range, zero share and non-finite values stand in one markdown row below the head."""
    assert activation_table({name: row}).split("\n")[2:] == [line]


def test_all_rows_of_the_table_have_the_same_cells():
    """Head, rule and rows of the markdown table agree in the number of cells."""
    assert {line.count("|") for line in activation_table(LAYERS).split("\n")} == {8}


def test_what_was_asked_for_has_columns_of_its_own():
    """Effective rank and gradients stand behind the rest, and their cells are empty where a layer has none."""
    slopes = {"b": Summary(20, 0.0, 0.01, 1.0, 0.0, nonfinite=0), "c": Summary(30, NAN, NAN, NAN, NAN, nonfinite=7)}
    table = activation_table(LAYERS, {"a": 3.14159, "b": NAN}, slopes).split("\n")
    assert {line.count("|") for line in table} == {11}
    assert [line.split("|")[8:-1] for line in table] == [
        [" effective rank ", " gradient std ", " gradient non-finite "],
        ["---:", "---:", "---:"],
        [" 3.14 ", "  ", "  "],
        [" nan ", " 0.01 ", " 0 "],
        ["  ", " nan ", " 7 "],
    ]


def test_effective_ranks_are_summarised_over_the_layers():
    """Median, largest and smallest; layers in which nothing varies are left out."""
    assert rank_overview({"a": 2.0, "b": NAN, "c": 5.0, "d": 3.0}) == {
        "bn_overview/effective_rank_median": 3.0,
        "bn_overview/effective_rank_max": 5.0,
        "bn_overview/effective_rank_min": 2.0,
    }
    assert rank_overview({}) == {}


def test_gradients_are_summarised_by_the_logarithm_of_their_spread():
    """Decimal logarithms over the layers whose gradient is finite; a gradient of 0 reads as -45."""
    slopes = {**LAYERS, "zero": Summary(9, 0.0, 0.0, 0.0, 1.0), "sick": Summary(9, NAN, NAN, INF, 0.0)}
    assert gradient_overview(slopes) == pytest.approx(
        {
            "bn_overview/gradient_std_log10_median": -0.5,
            "bn_overview/gradient_std_log10_max": 2.0,
            "bn_overview/gradient_std_log10_min": -45.0,
        }
    )
    assert gradient_overview({}) == {}


def test_drift_is_summarised_for_gamma_and_beta():
    """Median, largest and smallest since the start, and the largest since the best validation."""
    found = drift_overview([(0.1, 1.0), (0.3, 2.0), (0.2, 6.0)], [(0.01, 0.3), (0.03, 0.1)])
    assert found == {
        "bn_overview/gamma_drift_median": 0.2,
        "bn_overview/gamma_drift_max": 0.3,
        "bn_overview/gamma_drift_min": 0.1,
        "bn_overview/beta_drift_median": 2.0,
        "bn_overview/beta_drift_max": 6.0,
        "bn_overview/beta_drift_min": 1.0,
        "bn_overview/gamma_drift_since_best_max": 0.03,
        "bn_overview/beta_drift_since_best_max": 0.3,
    }


@pytest.mark.parametrize(
    ("start", "best", "names"),
    [
        pytest.param([(0.1, 0.2)], [], {"gamma_drift", "beta_drift"}, id="before the first validation"),
        pytest.param([], [], set(), id="no layers"),
        pytest.param([(NAN, 0.2)], [], {"beta_drift"}, id="gamma is NaN"),
    ],
)
def test_drift_that_is_not_known_is_not_logged(start, best, names):
    """Only what was measured gets a scalar."""
    found = drift_overview(start, iter(best))
    assert {name.removeprefix("bn_overview/").rpartition("_")[0] for name in found} == names


def test_the_table_of_the_first_pass_has_one_row_a_layer_with_its_headroom():
    """Headroom is the end of the range over the largest value; unknown where that is 0 or not finite."""
    rows = {"a": Summary(8, 0.0, 2.0, 4.0, 0.0), "": Summary(8, 0.0, 0.0, 0.0, 1.0)}
    table = first_pass_table(rows, {"a": 65504.0, "": 65504.0}).split("\n")
    assert table[2:] == ["| `a` | 2 | 4 | × 1.6e+04 |", "| `(the model)` | 0 | 0 |  |"]
    assert first_pass_table({}, {}) == ""
