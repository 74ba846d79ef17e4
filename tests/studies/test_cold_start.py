# SPDX-License-Identifier: Apache-2.0
"""The study of cold starts: what it measures, and what it says of planted rows."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_bn.initialization import initialize
from lightning_bn.studies import starts
from lightning_bn.studies.cold_start import measure as cold_start
from lightning_bn.studies.cold_start.networks import moved, network, optimizer_of
from lightning_bn.studies.cold_start.rows import HE, LAST, PLAIN, RAISED
from lightning_bn.studies.cold_start.verdicts import (
    FIRST,
    THIRD,
    beyond_repair,
    first_layer,
    overflow_first,
    scale_only,
    seen_by_nan,
    truly_bad,
)
from lightning_bn.studies.results import Results, read_rows
from lightning_bn.studies.starts import DTYPES, OPTIMIZERS

SEEDS = 2
SETTINGS = cold_start.settings(range(SEEDS))
SILENCE = [setting for setting in SETTINGS if setting["part"] == "silence" and setting["seed"] == 0]


def row(setting, **found):
    """A row in which nothing overflows and everything trains, but for what is planted."""
    made = {**cold_start.EMPTY, "silent": 0.0, "running_var_inf": 0.0, "loss_ratio": 1.1}
    made |= {f"{name}_bad": 0.0 for name in DTYPES} | dict.fromkeys(OPTIMIZERS, 0.95)
    made |= {f"{name}_{what}": 0.01 for name in OPTIMIZERS for what in ("change", "update")}
    return {**setting, **made, **found}


def planted(plant=lambda setting: {}):
    """Rows of all settings, each with what the function plants there."""
    return [row(setting, **plant(setting)) for setting in SETTINGS]


def chosen(setting_of):
    """The first setting that has the values asked for."""
    return next(s for s in SETTINGS if all(s[name] == value for name, value in setting_of.items()))


def overflows(dtypes, **where):
    return lambda setting: (
        {f"{name}_ends": 2 for name in dtypes}
        if setting["part"] == "range" and all(setting[key] == value for key, value in where.items())
        else {}
    )


def sparse(bad, *, silent=0.0, trains=False, gaps=(5, 10)):
    """Rows of BatchNorm behind some layers only that overflow and leave a share of the logits not finite."""

    def plant(setting):
        if setting["part"] != "gap" or int(setting["case"].split()[-1]) not in gaps:
            return {}
        found = dict.fromkeys(OPTIMIZERS, 0.95 if trains else 0.1) | {"silent": silent}
        return found | {"float32_ends": 5 if bad else None, "float32_bad": bad}

    return plant


def reaching(**accuracies):
    """Accuracies by case, the words of which are joined by underscores."""
    names = {"plain": PLAIN, "he": HE, "last": LAST, "raised": RAISED, "first": FIRST, "third": THIRD}
    table = {names[name]: pair for name, pair in accuracies.items()}

    def plant(setting):
        pair = table.get(setting["case"]) if setting["part"] == "training" else None
        return dict(zip(OPTIMIZERS, pair, strict=True)) if pair else {}

    return plant


@pytest.mark.parametrize(
    ("judge", "plant", "verdict"),
    [
        pytest.param(overflow_first, lambda setting: {}, "does not hold", id="overflow: nowhere"),
        pytest.param(overflow_first, overflows(DTYPES, case="batch", std=1000.0), "holds", id="overflow: everywhere"),
        pytest.param(overflow_first, overflows(["float16"], case="batch", width=2304), "holds if", id="overflow: wide"),
        pytest.param(overflow_first, overflows(DTYPES, case="none"), "does not hold", id="overflow: without BatchNorm"),
        pytest.param(beyond_repair, lambda setting: {}, "not shown", id="repair: no overflow"),
        pytest.param(beyond_repair, sparse(1.0), "holds", id="repair: all logits are bad"),
        pytest.param(beyond_repair, sparse(0.5), "does not hold", id="repair: half of them"),
        pytest.param(truly_bad, reaching(plain=(0.2, 0.3)), "holds", id="bad: neither trains"),
        pytest.param(truly_bad, reaching(plain=(0.2, 0.9)), "holds if", id="bad: SGD trains"),
        pytest.param(truly_bad, lambda setting: {}, "does not hold", id="bad: both train"),
        pytest.param(seen_by_nan, sparse(0.0, silent=1.0), "does not hold", id="nan: silent and finite"),
        pytest.param(seen_by_nan, sparse(1.0), "holds", id="nan: all that fail are not finite"),
        pytest.param(first_layer, reaching(first=(0.9, 0.9), third=(0.2, 0.2)), "holds", id="first: helps more"),
        pytest.param(first_layer, reaching(first=(0.2, 0.2), third=(0.9, 0.9)), "does not hold", id="first: less"),
        pytest.param(first_layer, reaching(first=(0.9, 0.2), third=(0.2, 0.9)), "not shown", id="first: as it comes"),
        pytest.param(first_layer, lambda setting: {}, "does not hold", id="first: the same"),
        pytest.param(scale_only, reaching(he=(0.95, 0.95), raised=(0.94, 0.96)), "holds", id="scale: alike"),
        pytest.param(scale_only, reaching(he=(0.95, 0.95), raised=(0.94, 0.5)), "holds if", id="scale: Adam alike"),
        pytest.param(scale_only, reaching(he=(0.95, 0.95), raised=(0.3, 0.5)), "does not hold", id="scale: unlike"),
    ],
)
def test_a_verdict_follows_from_the_rows(judge, plant, verdict):
    """Each claim gets the verdict that planted rows call for, and says numbers."""
    found = judge(planted(plant))
    assert found.verdict == verdict
    assert any(letter.isdigit() for letter in found.measured)


def test_there_is_a_verdict_on_every_claim():
    """Six claims, each once, with tables, a summary and a picture of the same rows."""
    rows = planted(sparse(1.0))
    assert len({verdict.claim for verdict in cold_start.STUDY.verdicts(rows)}) == 6
    assert "0 of 72 overflow" in cold_start.STUDY.summary(rows)
    assert "| behind every 5th | 5 / - / - | 100% / 0% / 0% |" in cold_start.STUDY.tables(rows)
    assert len(cold_start.STUDY.draw(rows).axes) == 3


def test_every_setting_is_found_again_in_a_file(tmp_path):
    """Settings differ from each other and are read as they were written, powers of ten among them."""
    results = Results(tmp_path / "cold_start.csv")
    for setting in SETTINGS:
        assert results.row_of(setting) is None
        results.append(row(setting))
    again = Results(tmp_path / "cold_start.csv")
    assert all(again.row_of(setting) for setting in SETTINGS)
    assert len(read_rows(tmp_path / "cold_start.csv")) == len(SETTINGS) == SEEDS * (36 + 11 + 4 + 33)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_walk_is_the_forward_pass_of_a_network(norm):
    """Layer by layer in float16, the overflow is in the layer in which that of a whole network of modules is."""
    setting = {**chosen({"part": "range", "width": 512, "case": norm, "std": 1000.0}), "depth": 4}
    generator = torch.Generator().manual_seed(0)
    layers = []
    for fan_in, fan_out in pairwise([64, 512, 512, 512, 512]):
        linear = nn.Linear(fan_in, fan_out, bias=False)
        linear.weight.data = torch.randn(fan_out, fan_in, generator=generator) * 1000.0
        layers += [linear, *([nn.BatchNorm1d(fan_out)] if norm == "batch" else []), nn.ReLU()]
    x, finite = starts.digits(0).images[:64].flatten(1).half(), []
    for layer in nn.Sequential(*layers).half().train():
        x = layer(x)
        if isinstance(layer, nn.Linear):
            finite.append(bool(x.isfinite().all()))
    found = cold_start.measure(setting)
    assert found["float16_ends"] == finite.index(False) + 1
    assert found["float16_predicted"] == 2
    assert (found["float32_ends"], found["bfloat16_ends"]) == (None, None)


@pytest.mark.parametrize("setting", SILENCE, ids=lambda s: f"{s['batch']}-{s['std']:.1e}")
def test_channels_fall_silent_where_the_sum_of_squares_leaves_float32(setting):
    """A channel is 0 if and only if the squares of its centred values, added up in float64, exceed float32's range."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting["batch"], 128, generator=generator).mul(setting["std"]).double()
    total = (x - x.mean(0)).square().sum(0)
    share = (total > torch.finfo(torch.float32).max).float().mean().item()
    found = cold_start.measure(setting)
    assert found["silent"] == pytest.approx(share, abs=0.01)
    assert found["running_var_inf"] == found["silent"]


@pytest.mark.parametrize(
    ("options", "norms"),
    [
        pytest.param({"gap": 0}, [], id="none"),
        pytest.param({}, [128] * 4, id="every layer"),
        pytest.param({"gap": 2}, [128] * 2, id="every 2nd"),
        pytest.param({"first": True, "last": True}, [64, *[128] * 4, 10], id="at both ends"),
    ],
)
def test_norms_stand_where_they_were_asked_for(options, norms):
    """The number and the width of the BatchNorm layers, and ten logits."""
    net = network(depth=4, **options)
    assert [layer.num_features for layer in net if isinstance(layer, nn.BatchNorm1d)] == norms
    assert sum(isinstance(layer, nn.Linear) for layer in net) == 5
    assert net(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_learning_rates_are_raised_for_the_weights_named():
    """Adam's by the factor, SGD's by its square; biases and other layers keep theirs."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    rates = {name: [g["lr"] for g in optimizer_of(net, name, {"1": 3.0}).param_groups] for name in OPTIMIZERS}
    assert rates["adam"] == pytest.approx([1e-3, 1e-3, 3e-3, 1e-3])
    assert rates["sgd"] == pytest.approx([0.01, 0.01, 0.09, 0.01])
    assert optimizer_of(net, "sgd", {}).defaults["momentum"] == 0.9


def test_a_move_is_relative_to_the_weights():
    """Half of the weights, in the mean over two layers of which one stays; biases do not count."""
    before, after = (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(2))
    after.load_state_dict(before.state_dict())
    after[0].weight.data *= 2.0
    after[2].bias.data += 5.0
    assert moved(before, after) == pytest.approx(0.5)


def test_a_scale_between_norms_and_a_rate_in_proportion_make_the_same_step():
    """Weights 100 times as large, normalised to the end, turn as far in a step of a rate 100² times as large."""
    images, labels = starts.digits(0).images[:64], starts.digits(0).labels[:64]
    turned = []
    for factor in (1.0, 100.0):
        net = network(depth=2, last=True)
        initialize(net, "he")
        linears = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
        for layer in linears.values():
            layer.weight.data *= factor
        before = {name: layer.weight.detach().clone() for name, layer in linears.items()}
        optimizer = optimizer_of(net, "sgd", dict.fromkeys(linears, factor))
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        turned.append([(layer.weight - before[name]).norm() / before[name].norm() for name, layer in linears.items()])
    # Less than 1 % apart: eps of the variance is a larger share of small weights' variance.
    assert [step.item() for step in turned[0]] == pytest.approx([step.item() for step in turned[1]], rel=0.01)
    assert min(turned[0]) > 1e-4


@pytest.mark.slow
def test_norms_five_layers_apart_are_silent_and_look_healthy():
    """Output and loss are finite, the first loss is exactly ln 10, half of the running variances are infinite."""
    found = cold_start.measure(chosen({"part": "gap", "case": "norm behind every 5"}))
    assert (found["float32_ends"], found["float32_bad"]) == (None, 0.0)
    assert (found["silent"], found["running_var_inf"], found["loss_ratio"]) == (1.0, 0.5, 1.0)
    assert found["adam"] < 0.2 > found["sgd"]
    assert (found["float16_ends"], found["float16_bad"]) == (2, 1.0)


@pytest.mark.slow
def test_an_overflow_in_front_of_the_only_norm_ends_in_nan():
    """Ten layers in front of the first BatchNorm: the tenth overflows, all logits and the loss are NaN."""
    found = cold_start.measure(chosen({"part": "gap", "case": "norm behind every 10"}))
    assert (found["float32_ends"], found["bfloat16_ends"], found["float16_ends"]) == (10, 10, 2)
    assert (found["float32_bad"], found["adam_nan_step"], found["sgd_nan_step"]) == (1.0, 1, 1)
    assert math.isnan(found["loss_ratio"])


@pytest.mark.slow
def test_a_cold_start_is_finite_loud_and_frozen_and_he_is_not():
    """First loss in the thousands and weights that move by less than 1e-4, as known; He is near ln 10 and moves."""
    cold, he = (cold_start.measure(chosen({"part": "training", "case": case, "std": 1000.0})) for case in (PLAIN, HE))
    assert 1e3 < cold["loss_ratio"] < 2e4
    assert 1e-5 <= cold["adam_change"] <= 1e-4
    assert 1e-7 < cold["adam_update"] < 1e-5
    assert cold["adam"] < 0.3
    assert 1.0 < he["loss_ratio"] < 2.0
    assert 0.05 < he["adam_change"] < 0.25
    assert min(he["adam"], he["sgd"]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("width", "hits"), [(64, False), (1024, True)])
def test_float16_behind_batchnorm_ends_by_fan_in(width, hits):
    """N(0, 1000²) in two layers overflows float16 at a fan-in of 1024 and not at 64; float32 at neither."""
    setting = {**chosen({"part": "range", "width": width, "case": "batch", "std": 1000.0}), "depth": 2}
    found = cold_start.measure(setting)
    assert (found["float16_ends"] == 2) is hits
    assert (found["float16_predicted"] == 2) is hits
    assert found["float32_ends"] is None
