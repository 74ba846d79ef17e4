# SPDX-License-Identifier: Apache-2.0
"""The study of starts: what it measures, and what it says of planted rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_bn.demo import DigitsMLP
from lightning_bn.initialization import initialize
from lightning_bn.studies import starts
from lightning_bn.studies.init import measure as init
from lightning_bn.studies.init.rows import DEPTHS, STARTS, Cell, compare, ends, predictions
from lightning_bn.studies.init.verdicts import (
    critical_without,
    deep_networks,
    fail_at_once,
    layers_without,
    normalised_start,
    order_with,
    order_without,
    simple_values,
    terrible_with,
)
from lightning_bn.studies.results import Results, read_rows
from lightning_bn.studies.seeds import Ends, difference, mean, of_seeds, places, size, spread
from lightning_bn.studies.starts import DTYPES, OPTIMIZERS

SEEDS = 3
SETTINGS = init.settings(range(SEEDS))
MADE, SIMPLE, TERRIBLE = ("he", "xavier"), ("naive", "uniform"), ("normal_1", "normal_1000")


def row(setting, **found):
    """A row in which nothing overflows and everything trains, but for what is planted."""
    forward = {f"{name}_{what}": None for name in DTYPES for what in ("ends", "predicted")}
    made = dict.fromkeys(OPTIMIZERS, 0.95) | {f"{name}_nan_step": None for name in OPTIMIZERS}
    made |= {f"{name}_loss_{when}": 0.1 for name in OPTIMIZERS for when in ("first", "last")}
    return {**setting, "std": 0.6, "loss_ratio": 1.1, "gradient_growth": 1.0, **forward, **made, **found}


def planted(plant=lambda setting: {}):
    """Rows of all settings, each with what the function plants there."""
    return [row(setting, **plant(setting)) for setting in SETTINGS]


def poor(*starts, norm=None, depths=DEPTHS, accuracy=0.2):
    """A plant: these starts do not train, with one norm or with any, at some depths."""

    def plant(setting):
        here = setting["start"] in starts and setting["depth"] in depths and norm in {None, setting["norm"]}
        return dict.fromkeys(OPTIMIZERS, accuracy) if here else {}

    return plant


def both(*plants):
    return lambda setting: {name: value for plant in plants for name, value in plant(setting).items()}


def slow_to_learn(*starts):
    return lambda setting: (
        {f"{name}_loss_last": 0.5 for name in OPTIMIZERS}
        if setting["start"] in starts and setting["norm"] == "batch"
        else {}
    )


def overflowing(dtypes):
    return lambda setting: (
        {f"{name}_ends": 3 for name in dtypes} if setting["start"] in TERRIBLE and setting["norm"] == "none" else {}
    )


def with_gamma(gammas, accuracy):
    return lambda setting: (
        dict.fromkeys(OPTIMIZERS, accuracy) if setting["network"] == "mlp" and setting["gamma"] in gammas else {}
    )


def loud_loss(setting):
    return {"loss_ratio": 5000.0} if setting["start"] == "normal_1000" else {}


BARE_FAILS = poor(*SIMPLE, norm="none")


@pytest.mark.parametrize(
    ("judge", "plant", "verdict"),
    [
        pytest.param(simple_values, BARE_FAILS, "holds", id="simple: with BatchNorm all train"),
        pytest.param(simple_values, both(BARE_FAILS, poor("naive", depths=(50,))), "holds if", id="simple: not at 50"),
        pytest.param(simple_values, both(BARE_FAILS, poor("naive")), "does not hold", id="simple: naive never"),
        pytest.param(simple_values, lambda setting: {}, "does not hold", id="simple: BatchNorm changes nothing"),
        pytest.param(order_with, lambda setting: {}, "not shown", id="order with: all equal"),
        pytest.param(order_with, slow_to_learn(*SIMPLE), "holds", id="order with: made ones are faster"),
        pytest.param(order_with, slow_to_learn(*MADE), "does not hold", id="order with: simple ones are faster"),
        pytest.param(
            order_with,
            both(slow_to_learn(*SIMPLE), poor("he", norm="batch", depths=(50,))),
            "holds if",
            id="order with: he loses once",
        ),
        pytest.param(order_without, BARE_FAILS, "holds", id="order without: simple ones fail"),
        pytest.param(order_without, poor(*MADE, norm="none"), "does not hold", id="order without: made ones fail"),
        pytest.param(critical_without, BARE_FAILS, "holds", id="critical: simple ones fail"),
        pytest.param(critical_without, lambda setting: {}, "does not hold", id="critical: all train"),
        pytest.param(critical_without, poor(*SIMPLE, norm="none", depths=(20,)), "holds if", id="critical: at 20"),
        pytest.param(fail_at_once, overflowing(DTYPES), "holds", id="at once: everywhere"),
        pytest.param(fail_at_once, overflowing(["float16"]), "holds if", id="at once: in float16"),
        pytest.param(fail_at_once, lambda setting: {}, "does not hold", id="at once: nowhere"),
        pytest.param(terrible_with, lambda setting: {}, "holds", id="terrible: train"),
        pytest.param(terrible_with, poor("normal_1000"), "holds if", id="terrible: one of them"),
        pytest.param(terrible_with, poor(*TERRIBLE), "does not hold", id="terrible: none"),
        pytest.param(normalised_start, with_gamma((0.0, 0.1, 10.0), 0.1), "holds", id="gamma: 1 alone trains"),
        pytest.param(normalised_start, with_gamma((0.0,), 0.1), "holds if", id="gamma: all but 0 train"),
        pytest.param(normalised_start, lambda setting: {}, "does not hold", id="gamma: 0 trains too"),
        pytest.param(layers_without, loud_loss, "holds", id="layers: a loud loss behind equal layers"),
        pytest.param(layers_without, lambda setting: {}, "does not hold", id="layers: usual losses"),
        pytest.param(
            layers_without,
            lambda setting: {**loud_loss(setting), "std": 0.6 if setting["start"] == "he" else 0.9},
            "does not hold",
            id="layers: they differ before",
        ),
        pytest.param(deep_networks, lambda setting: {}, "holds", id="deep: all train"),
        pytest.param(deep_networks, poor(*STARTS, depths=(50,)), "does not hold", id="deep: none of 50 layers"),
    ],
)
def test_a_verdict_follows_from_the_rows(judge, plant, verdict):
    """Each claim gets the verdict that planted rows call for, and says numbers."""
    found = judge(planted(plant))
    assert found.verdict == verdict
    assert any(letter.isdigit() for letter in found.measured)


def test_there_is_a_verdict_on_every_claim():
    """Nine claims, each once, with a summary and a picture of the same rows."""
    rows = planted(BARE_FAILS)
    assert len({verdict.claim for verdict in init.STUDY.verdicts(rows)}) == 9
    assert "0.95" in init.STUDY.summary(rows)
    assert len(init.STUDY.draw(rows).axes) == 3


def test_a_run_that_ends_in_nan_knows_nothing():
    """In means it counts as chance; a table tells it apart from one that only failed."""
    rows = planted(lambda setting: {"sgd": math.nan} if setting["start"] == "normal_1" else {})
    cell = Cell("normal_1", "none", 5)
    assert cell.accuracies(rows, "sgd") == [0.1] * SEEDS
    assert cell.accuracies(rows, "adam") == [0.95] * SEEDS
    assert "| N(0, 1) | 0.95 / NaN | 0.95 / NaN | 0.95 / NaN |" in init.STUDY.tables(rows)


def test_predictions_are_counted_by_how_far_they_are_off():
    """Exact, one layer beside, further off, not at all, and for nothing."""
    cases = {"he": (3, 3), "xavier": (3, 4), "naive": (3, 9), "uniform": (3, None), "normal_1": (None, 3)}

    def plant(setting):
        if setting["start"] not in cases or (setting["norm"], setting["depth"]) != ("none", 5):
            return {}
        seen, said = cases[setting["start"]]
        return {"float16_ends": seen, "float16_predicted": said}

    expected = {"exact": SEEDS, "beside": SEEDS, "further": SEEDS, "missed": SEEDS, "alarms": SEEDS}
    assert predictions(planted(plant)) == expected


def test_every_setting_is_found_again_in_a_file(tmp_path):
    """Settings differ from each other and are read as they were written."""
    results = Results(tmp_path / "init.csv")
    for setting in SETTINGS:
        assert results.row_of(setting) is None
        results.append(row(setting))
    again = Results(tmp_path / "init.csv")
    assert all(again.row_of(setting) for setting in SETTINGS)
    assert len(read_rows(tmp_path / "init.csv")) == len(SETTINGS) == SEEDS * (6 * 2 * 3 + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_layer_that_ends_is_that_of_a_hook(dtype):
    """The first pass names the linear layer whose output a forward hook sees as the first that is not finite."""
    model = DigitsMLP("none", depth=6)
    initialize(model, 1.0 if dtype is torch.float16 else 1e6)
    data, seen = starts.digits(0), []
    layers = [layer for layer in model.net if isinstance(layer, nn.Linear)]
    found = starts.first_pass(model.net, data.images[:64], data.labels[:64], dtype)
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(bool(output.isfinite().all())))
    model.to(dtype)(data.images[:64].to(dtype))
    assert found.ends == seen.index(False) + 1 < len(layers)
    assert math.isnan(found.loss)


def test_the_first_loss_is_that_of_the_model():
    """A healthy start is finite, and its loss that of cross-entropy in training mode."""
    model = DigitsMLP("batch", depth=3)
    initialize(model, "he")
    data = starts.digits(0)
    found = starts.first_pass(model.net, data.images[:64], data.labels[:64], torch.float32)
    loss = nn.functional.cross_entropy(model.train()(data.images[:64]), data.labels[:64])
    assert found.ends is None
    assert found.loss == pytest.approx(loss.item())
    assert math.isfinite(found.std)


def test_gradient_growth_is_the_ratio_of_neighbouring_layers():
    """1 where signal and gradient grow alike, the planted factor where they do not, NaN where a gradient is 0."""
    layers = [nn.Linear(8, 8, bias=False) for _ in range(4)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=3.0)
    net = nn.Sequential(nn.Linear(5, 8, bias=False), *layers)
    x = torch.randn(1, 5)
    net(x).sum().backward()
    # The gradient of a weight is the outer product of what comes back and of what comes in: both grow by 3 a layer.
    assert init.growth(net) == pytest.approx(1.0)
    for layer in layers:
        layer.weight.grad = torch.full((8, 8), 3.0 ** -layers.index(layer))
    assert init.growth(net) == pytest.approx(3.0)
    layers[0].weight.grad.zero_()
    assert math.isnan(init.growth(net))


def test_training_stops_where_the_loss_is_nan():
    """A run with NaN in its weights ends in its first step and has no accuracy; a healthy one has five."""
    sick, healthy = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    nn.init.constant_(sick[1].weight, math.nan)
    done = starts.train(sick, OPTIMIZERS["sgd"](sick.parameters()), starts.digits(0), seed=0)
    assert done.nan_step == 1
    assert all(map(math.isnan, done.accuracies + done.losses))
    done = starts.train(healthy, OPTIMIZERS["adam"](healthy.parameters()), starts.digits(0), seed=0)
    assert done.nan_step is None
    assert len(done.accuracies) == len(done.losses) == starts.EPOCHS
    assert done.losses[-1] < done.losses[0]


def test_the_spread_and_the_difference_follow_their_formulas():
    """Unbiased deviation against torch; a difference is told at more than two standard errors."""
    values = [0.1, 0.4, 0.35, 0.8]
    assert spread(values) == pytest.approx(torch.tensor(values).std().item())
    assert mean(values) == pytest.approx(0.4125)
    error = math.hypot(spread(values) / 2, spread(values) / 2)
    near, far = ([value + factor * error for value in values] for factor in (1.9, 2.1))
    assert [difference(near, values, least=0.0), difference(far, values, least=0.0)] == [0, 1]
    assert [difference(values, far, least=0.0), difference(far, values, least=9.0)] == [-1, 0]
    assert spread([1.0]) == 0.0


def test_numbers_are_written_short():
    """Two digits after the point, powers where they do not do, a dash for no layer."""
    assert [size(value) for value in (1.0, 5300.0, 0.002, 0.0, math.nan)] == [
        "1.00",
        "5.3e+03",
        "2.0e-03",
        "0.00",
        "NaN",
    ]
    assert [places([math.nan]), places([3.0]), places([3.0, math.nan, 7.0])] == ["-", "3", "3–7"]
    assert str(Ends([3.0, math.nan], [4.0, 4.0])) == "3 in 1 of 2 (4)"
    assert [of_seeds([0.5, 0.5]), of_seeds([0.4, 0.6]), of_seeds([math.nan, 0.5])] == [
        "0.50",
        "0.50 ± 0.14",
        "0.50, NaN in 1 of 2",
    ]


# Accuracy with Adam and with SGD, measured with other code: the mean of three seeds, with room for one.
KNOWN = {
    ("he", "none", 5): (0.96, 0.95, 0.04),
    ("xavier", "none", 5): (0.96, 0.92, 0.06),
    ("naive", "none", 5): (0.35, 0.09, 0.15),
    ("uniform", "none", 5): (0.73, 0.09, 0.15),
    ("he", "batch", 5): (0.97, 0.97, 0.04),
    ("naive", "batch", 5): (0.96, 0.97, 0.04),
    ("uniform", "batch", 20): (0.89, 0.90, 0.15),
    ("he", "batch", 20): (0.37, 0.87, 0.15),
    ("normal_1", "batch", 5): (0.68, 0.83, 0.12),
}


@pytest.mark.slow
@pytest.mark.parametrize(("start", "norm", "depth"), KNOWN)
def test_cells_of_the_table_are_those_known(start, norm, depth):
    """One seed of a cell lies near the accuracies that were measured apart from this code."""
    setting = next(s for s in SETTINGS if (s["start"], s["norm"], s["depth"]) == (start, norm, depth))
    found = init.measure(setting)
    adam, sgd, room = KNOWN[start, norm, depth]
    assert found["adam"] == pytest.approx(adam, abs=room)
    assert found["sgd"] == pytest.approx(sgd, abs=room)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "norm", "depth", "expected"),
    [
        pytest.param("normal_1000", "none", 20, {"float32": 10, "bfloat16": 10, "float16": 2}, id="1000, bare"),
        pytest.param("normal_1", "none", 20, {"float32": None, "bfloat16": None, "float16": 5}, id="1, bare"),
        pytest.param("normal_1000", "batch", 5, dict.fromkeys(DTYPES), id="1000, BatchNorm"),
    ],
)
def test_overflows_of_the_table_are_those_known(start, norm, depth, expected):
    """The layer in which each precision ends is the known one, and the one predicted from the weights."""
    setting = next(s for s in SETTINGS if (s["start"], s["norm"], s["depth"]) == (start, norm, depth))
    found = [{**setting, **init.measure(setting)}]
    cell = Cell(start, norm, depth)
    for name, place in expected.items():
        assert places(ends(found, cell, name).seen) == places(ends(found, cell, name).predicted)
        assert found[0][f"{name}_ends"] == place


def test_the_score_compares_each_with_each():
    """Two starts against two, at three depths with two optimizers."""
    score = compare(planted(BARE_FAILS), "none")
    assert (score.better, score.worse, score.of) == (24, 0, 24)
