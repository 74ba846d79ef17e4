# SPDX-License-Identifier: Apache-2.0
"""A run of any length fits into the columns, and nothing that went wrong in it is averaged away."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from lightning_bn.stats.history import History

INF = math.inf


def filled(steps, value=lambda step: float(step), *, columns=4, layer="fc", **given):
    """A history of one layer with one statistic."""
    history = History(columns, **given)
    for step in steps:
        history.add(step, {layer: {"std": value(step)}})
    return history


def run(number, seed=0):
    """Measured steps of three layers: one is late, one is measured now and then, one has values that are not finite."""
    random = np.random.default_rng(seed)
    for turn in range(number):
        rows = {"a": {"std": random.normal(), "dead": random.random()}}
        if turn >= number // 3:
            rows["late"] = {"std": random.normal()}
        if random.random() < 0.3:
            rows["b"] = {"std": random.choice([1.0, INF, -INF, math.nan, 2.0])}
        yield 7 * turn, rows


def taken(history, statistic):
    """A grid as plain values: layers, steps, end, values with NaN equal to itself, measured, stride."""
    grid = history.grid(statistic)
    values = np.where(np.isnan(grid.values), 12345.0, grid.values).tolist()
    return grid.layers, grid.steps, grid.end, values, grid.measured.tolist(), grid.stride


def by_loop(rows, stride, layer, statistic):
    """The cells of one layer by a float64 loop over groups of measured steps: value and whether it was measured."""
    cells = []
    for first in range(0, len(rows), stride):
        group = [row[layer][statistic] for _, row in rows[first : first + stride] if statistic in row.get(layer, {})]
        bad = {value for value in group if not math.isfinite(value)}
        mean = math.fsum(group) / len(group) if group and not bad else math.nan
        cells.append((bad.pop() if len(bad) == 1 else mean, bool(group)))
    return cells


@pytest.mark.parametrize("number", [1, 2, 3, 8, 9, 16, 17, 100, 511])
@pytest.mark.parametrize(("layer", "statistic"), [("a", "std"), ("a", "dead"), ("b", "std"), ("late", "std")])
def test_a_cell_is_the_mean_of_what_was_measured_in_it(number, layer, statistic):
    """After any number of merges each cell equals that of a float64 loop over the steps behind it."""
    rows, history = list(run(number)), History(8)
    for step, row in rows:
        history.add(step, row)
    if not any(statistic in row.get(layer, {}) for _, row in rows):
        return
    grid = history.grid(statistic)
    expected = by_loop(rows, grid.stride, layer, statistic)
    place = grid.layers.index(layer)
    assert grid.steps == tuple(step for step, _ in rows[:: grid.stride])
    assert grid.measured[place].tolist() == [known for _, known in expected]
    np.testing.assert_allclose(grid.values[place], [value for value, _ in expected], rtol=1e-5, atol=1e-6)


def test_the_columns_are_used_well():
    """Past the first merge more than half of them are taken, and the stride doubles each time."""
    history, seen = History(8), set()
    for step in range(200):
        history.add(step, {"fc": {"std": 1.0}})
        grid = history.grid("std")
        seen.add(grid.stride)
        assert len(grid.steps) <= 8
        assert step < 8 or len(grid.steps) > 4
    assert seen == {1, 2, 4, 8, 16, 32}


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("when", [0, 1, 30, 63, 64, 99])
def test_a_value_that_is_not_finite_is_never_averaged_away(bad, when):
    """One such value among a hundred is still in its column after all merges, and in no other."""
    history = filled(range(100), lambda step: bad if step == when else 1.0)
    grid = history.grid("std")
    column = when // grid.stride
    assert grid.stride == 32
    np.testing.assert_array_equal(grid.values[0], [bad if place == column else 1.0 for place in range(len(grid.steps))])
    assert grid.measured.all()


def test_several_kinds_in_one_column_are_nan():
    """Where infinities of both signs, or infinity and NaN, meet, the cell says that it is no number."""
    for kinds in ((INF, -INF), (-INF, INF), (INF, math.nan), (math.nan, -INF)):
        history = filled(range(5), lambda step, kinds=kinds: kinds[step] if step < 2 else 1.0)
        assert math.isnan(history.grid("std").values[0, 0])
        assert history.grid("std").measured[0, 0]


def test_what_was_not_measured_is_not_what_was_nan():
    """Both have no number, but the mask tells them apart, and a layer that is missing in a step stays in its row."""
    history = History(4)
    history.add(0, {"a": {"std": math.nan}, "b": {"std": 1.0}})
    history.add(1, {"b": {"std": 2.0}})
    history.add(2, {})
    grid = history.grid("std")
    assert grid.measured.tolist() == [[True, False, False], [True, True, False]]
    np.testing.assert_array_equal(grid.values, np.float32([[math.nan] * 3, [1.0, 2.0, math.nan]]))


def test_layers_lie_in_the_order_in_which_they_appeared():
    """Late ones come last; and each statistic lists those layers alone that it was measured of."""
    history = History(4)
    history.add(0, {"b": {"std": 1.0}, "a": {"std": 2.0, "dead": 0.5}})
    history.add(1, {"c": {"dead": 0.25}, "b": {"std": 3.0}})
    assert history.statistics == ("std", "dead")
    assert history.grid("std").layers == ("b", "a")
    assert history.grid("dead").layers == ("a", "c")


def test_a_given_order_is_kept():
    """Layers take their given places whenever they appear; others follow; those that never appear are left out."""
    history = History(4, layers=["first", "never", "second"])
    history.add(0, {"stranger": {"std": 1.0}, "second": {"std": 2.0}})
    history.add(1, {"first": {"std": 3.0}})
    assert history.grid("std").layers == ("first", "second", "stranger")
    np.testing.assert_array_equal(history.grid("std").values[:, 1], np.float32([3.0, math.nan, math.nan]))


@pytest.mark.parametrize("cut", [0, 1, 3, 8, 9, 50, 51, 99])
def test_a_resumed_run_continues_the_picture(cut):
    """Saved, read back with weights_only and continued, a history equals that of an uninterrupted run, bit by bit."""
    rows, whole, before = list(run(100)), History(8, layers=["late"]), History(8, layers=["late"])
    for step, row in rows:
        whole.add(step, row)
    for step, row in rows[:cut]:
        before.add(step, row)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = History(32)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step, row in rows[cut:]:
        resumed.add(step, row)
    for statistic in ("std", "dead"):
        assert taken(resumed, statistic) == taken(whole, statistic)


def test_a_state_is_a_copy():
    """Neither adding to the history nor to the one that took the state over changes the other, or the state."""
    history = filled(range(3))
    state, twin = history.state_dict(), History(4)
    twin.load_state_dict(state)
    for step in (3, 4):  # the second one merges
        history.add(step, {"fc": {"std": 9.0}})
        twin.add(step, {"fc": {"std": -9.0}})
    assert history.grid("std").values[0].tolist() == [0.5, 5.5, 9]
    assert twin.grid("std").values[0].tolist() == [0.5, -3.5, -9]
    assert state["mean"].tolist() == [[[0, 1, 2]]]
    assert state["count"].tolist() == [[[1, 1, 1]]]


def test_layers_that_a_state_does_not_know_follow_its_own():
    """A model that grew between two runs gets rows for what is new, behind those that are old."""
    grown = History(4, layers=["new", "fc"])
    grown.load_state_dict(filled(range(2)).state_dict())
    grown.add(2, {"new": {"std": 5.0}, "fc": {"std": 6.0}})
    assert grown.grid("std").layers == ("fc", "new")
    assert grown.grid("std").values[:, 2].tolist() == [6.0, 5.0]


def test_memory_does_not_grow_with_the_run():
    """Arrays and saved state are as large after 5000 steps as after 10, and smaller than the columns allow."""
    short, long = filled(range(10), columns=8), filled(range(5000), columns=8)
    sizes = [
        [
            history._mean.nbytes,
            history._count.nbytes,
            len(history._steps) <= 8,
            history.state_dict()["mean"].shape[-1] <= 8,
        ]
        for history in (short, long)
    ]
    assert sizes == [[32, 32, True, True]] * 2


@pytest.mark.slow
def test_a_hundred_thousand_steps_fit_into_256_columns():
    """The last of them is still in the picture, the mean is right, and a single NaN of step 77,777 is in its column."""
    history = filled(range(100_000), lambda step: math.nan if step == 77_777 else step / 1000, columns=256)
    grid = history.grid("std")
    assert (grid.stride, len(grid.steps), grid.end) == (512, 196, 100_000)
    column = 77_777 // 512
    assert np.flatnonzero(np.isnan(grid.values[0])).tolist() == [column]
    expected = [(np.arange(first, min(first + 512, 100_000)) / 1000).mean() for first in grid.steps]
    expected[column] = math.nan
    np.testing.assert_allclose(grid.values[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "end"),
    [
        pytest.param([5], 6.0, id="one step"),
        pytest.param([0, 50, 100], 150.0, id="every 50th"),
        pytest.param(range(0, 1000, 10), 1000.0, id="merged"),
        pytest.param([3, 3, 3], 4.0, id="one step thrice"),
    ],
)
def test_the_last_column_ends_one_interval_behind_the_last_step(steps, end):
    """So that the newest column is as wide in a picture as the steps in it."""
    assert filled(steps).grid("std").end == end


def test_a_step_that_comes_again_is_one_step_measured_twice():
    """It opens no column of its own, and its cell is the mean of both."""
    history = filled([0, 4], lambda step: 1.0 + step)
    history.add(4, {"fc": {"std": 7.0}})
    assert history.grid("std").steps == (0, 4)
    assert history.grid("std").values.tolist() == [[1.0, 6.0]]


def test_a_large_finite_value_stays_finite():
    """What float32 cannot hold is its largest number, not infinity; its mean with itself does not overflow."""
    history = filled(range(9), lambda step: 1e300 if step % 2 else 3e38)
    assert np.isfinite(history.grid("std").values).all()
    assert history.grid("std").values.max() > 3e38


def test_a_step_in_the_past_is_refused():
    """Columns are in order of time; the refusal leaves the history as it was."""
    history = filled([10])
    with pytest.raises(ValueError, match=r"step must not be below that of the step before \(10\), got 9"):
        history.add(9, {"other": {"std": 1.0}})
    assert history.grid("std").layers == ("fc",)


@pytest.mark.parametrize("columns", [0, 1, 3, 2.0, True, "8"])
def test_columns_that_do_not_make_pairs_are_refused(columns):
    """The number has to be whole, even and at least 2."""
    with pytest.raises(ValueError, match="columns must be an even whole number of at least 2, got"):
        History(columns)


def test_a_statistic_that_was_never_measured_is_refused_by_name():
    """The error lists those that there are."""
    with pytest.raises(ValueError, match=r"statistic must be one that was measured \(std\), got 'sdt'"):
        filled([0]).grid("sdt")
    with pytest.raises(ValueError, match=r"\(none yet\), got 'std'"):
        History().grid("std")
