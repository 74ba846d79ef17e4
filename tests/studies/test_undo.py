# SPDX-License-Identifier: Apache-2.0
"""What undoes BatchNorm agrees with theory and with plain computation, and the verdicts follow from the rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.stats import chi
from torch import nn
from torch.nn import functional

from lightning_bn.norms import find_batchnorm
from lightning_bn.precise import precise_statistics
from lightning_bn.studies.starts import digits
from lightning_bn.studies.undo import measure as undo
from lightning_bn.studies.undo.rows import (
    BATCHES,
    INPUTS,
    constant_error,
    forgotten_error,
    least_error,
    power,
    shrinkage,
)

STUDY = undo.STUDY
CLAIMS = {
    "evaluation": "γ = σ, β = μ undo BatchNorm in evaluation mode.",
    "training": "They undo it in training mode as well.",
    "layer": "A layer that is trained to undo itself arrives at γ = σ.",
    "network": "Networks that were trained have undone their BatchNorm layers.",
}


def row(setting):
    """What theory expects of a setting; a trained network that is far from undone, with γ as it was."""
    found = dict.fromkeys(undo.MEASURED)
    batch, part = setting["batch"], setting["part"]
    if part == "evaluation":
        rounding = {"float32": 5e-8, "float64": 5e-17}[setting["dtype"]]
        found |= {"error": rounding if setting["gamma"] == "with ε" else forgotten_error(setting["ratio"])}
        found |= {"predicted": 0.0 if setting["gamma"] == "with ε" else forgotten_error(setting["ratio"])}
    elif part == "training":
        samples = batch * (64 if setting["input"] == "conv" else 1)
        found |= {"error": constant_error(samples), "m_eff": 1.0 * samples}
    elif part == "layer":
        found |= {"error": least_error(batch), "predicted": shrinkage(batch), "eval_error": 1 - shrinkage(batch)}
        found |= {"gamma_ratio": shrinkage(batch), "gamma_distance": 1 - shrinkage(batch)}
    else:
        found |= {"start_error": 2.0, "eval_error": 1.2, "gamma_ratio": 1.9, "correlation": 0.05}
        found |= {"start_distance": 1.7, "gamma_distance": 0.9, "still_distance": 0.8}
    return {**setting, **found}


def rows_with(part=None, **changes):
    """All rows of two seeds, those of one part with values of their own."""
    rows = [row(setting) for setting in STUDY.settings(range(2))]
    return [{**found, **changes} if found["part"] == part else found for found in rows]


def verdict(rows, name):
    (found,) = [found for found in STUDY.verdicts(rows) if found.claim == CLAIMS[name]]
    return found


@pytest.mark.parametrize("batch", [2, 3, 8, 64, 1000])
def test_the_mean_deviation_is_that_of_a_chi_distribution(batch):
    """√m·s of m normal values has the chi distribution of m − 1 degrees of freedom."""
    assert shrinkage(batch) == pytest.approx(chi.mean(batch - 1) / math.sqrt(batch), rel=1e-9)


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_errors_in_training_are_those_of_drawn_batches(batch):
    """Closed forms against 20,000 batches in NumPy; no other γ does better than E[s]."""
    z = np.random.default_rng(0).standard_normal((20_000, batch))
    unit = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    assert constant_error(batch) == pytest.approx(float(np.sqrt(np.mean((unit - z) ** 2))), rel=1e-2)
    tried = {gamma: float(np.sqrt(np.mean((gamma * unit - z) ** 2))) for gamma in np.arange(0.5, 1.1, 0.02)}
    best = min(tried, key=tried.get)
    assert best == pytest.approx(shrinkage(batch), abs=0.02)
    assert least_error(batch) == pytest.approx(tried[best], rel=1e-2)


def test_many_values_leave_an_error_of_the_root_of_three_halves_over_m():
    """The closed form tends to √(3/(2m)), and its exponent to −1/2."""
    assert constant_error(10_000) == pytest.approx(math.sqrt(1.5 / 10_000), rel=1e-3)
    sizes = [1000, 2000, 4000]
    assert power(sizes, [constant_error(size) for size in sizes]) == pytest.approx(-0.5, abs=1e-3)


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 1e4])
def test_the_error_without_epsilon_is_that_of_torch(ratio):
    """``F.batch_norm`` in float64 with γ = σ leaves the closed form."""
    x = torch.randn(1000, 1, dtype=torch.float64)
    x = (x - x.mean()) / x.std(correction=0) * math.sqrt(ratio * 1e-5) + 3
    mean, var = x.mean(0), x.var(0, correction=0)
    y = functional.batch_norm(x, mean, var, var.sqrt(), mean, eps=1e-5)
    assert ((y - x).square().mean().sqrt() / var.sqrt()).item() == pytest.approx(forgotten_error(ratio), rel=1e-6)


def test_the_error_is_per_channel_in_units_of_its_deviation():
    """A loop over the values of (N, C, *) in float64 gives the same."""
    x, y, sd = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.5, 2.0])
    squares = [
        ((y[n, c, k].item() - x[n, c, k].item()) / sd[c].item()) ** 2
        for n in range(3)
        for c in range(2)
        for k in range(4)
    ]
    assert undo.error_of(y, x, sd) == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-6)


def test_the_distance_is_the_error_that_torch_makes_in_evaluation():
    """From γ and β alone comes what ``F.batch_norm`` does to the values, in units of √(σ² + ε)."""
    x = torch.randn(5000, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 4.0]) + 1
    mean, var = x.mean(0), x.var(0, correction=0)
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    known = undo.Moments(mean, (var + layer.eps).sqrt())
    y = functional.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps).detach()
    assert undo.distance(layer, known) == pytest.approx(undo.error_of(y, x, known.sd), rel=1e-4)
    gap = (layer.weight.detach() - known.sd).norm() / known.sd.norm()
    assert undo.gamma_distance(layer, known) == pytest.approx(gap.item())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ratio", [1e-3, 1e6])
def test_evaluation_is_undone_with_epsilon_and_not_without(dtype, ratio):
    """Rounding is left with √(σ² + ε), the closed form with σ."""
    setting = {"part": "evaluation", "input": "normal", "dtype": dtype, "ratio": ratio, "batch": None, "seed": 0}
    right = STUDY.measure({**setting, "gamma": "with ε"})
    wrong = STUDY.measure({**setting, "gamma": "without ε"})
    assert right["error"] < {"float32": 2e-7, "float64": 5e-16}[dtype]
    assert wrong["error"] == pytest.approx(wrong["predicted"], rel=0.1 if dtype == "float32" else 1e-4)
    assert wrong["predicted"] == pytest.approx(forgotten_error(ratio), rel=1e-2)


@pytest.mark.parametrize(("name", "batch"), [("normal", 2), ("normal", 64), ("mlp", 8), ("conv", 8)])
def test_training_leaves_the_error_of_its_effective_samples(name, batch):
    """On vectors the closed form of the batch size, on feature maps much less."""
    setting = {"part": "training", "input": name, "dtype": "float32", "gamma": "with ε", "ratio": None}
    found = STUDY.measure({**setting, "batch": batch, "seed": 0})
    if name == "conv":
        assert found["m_eff"] > 10 * batch
        assert found["error"] < constant_error(batch) / 3
    else:
        assert found["error"] == pytest.approx(constant_error(batch), rel=0.05)
        assert found["m_eff"] == pytest.approx(batch, rel=0.2)


def test_a_layer_trained_to_undo_itself_arrives_at_the_mean_deviation():
    """γ/σ is E[s] and not 1, the error in training is the least there is, and 1 − E[s] is left in evaluation."""
    setting = {"part": "layer", "input": "normal", "dtype": "float32", "gamma": "with ε", "ratio": None}
    found = STUDY.measure({**setting, "batch": 4, "seed": 0})
    assert found["gamma_ratio"] == pytest.approx(shrinkage(4), abs=0.015)
    assert found["error"] == pytest.approx(least_error(4), rel=0.02)
    assert found["eval_error"] == pytest.approx(1 - shrinkage(4), abs=0.02)


def test_a_network_that_was_undone_by_hand_is_recognised():
    """Distance 0 and correlation 1 after γ = √(σ² + ε), β = μ; not so for the same network as it starts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32))
    images = digits(0).images
    before = undo.condition(net, images)
    assert before["eval_error"] > 0.5
    assert before["gamma_distance"] == before["still_distance"]
    (known,), (layer,) = precise_statistics(net, [images]).layers.values(), find_batchnorm(net).values()
    with torch.no_grad():
        layer.weight.copy_((known.var + layer.eps).sqrt())
        layer.bias.copy_(known.mean)
    after = undo.condition(net, images)
    assert after["eval_error"] < 1e-6
    assert after["correlation"] == pytest.approx(1)
    assert after["still_distance"] == pytest.approx(before["still_distance"], rel=1e-5)


def test_a_trained_network_is_compared_with_its_start(monkeypatch):
    """Before and after are measured, and the seed decides both."""
    monkeypatch.setattr(undo, "EPOCHS", {"mlp": 1, "conv": 1})
    (setting,) = [s for s in STUDY.settings([1]) if (s["part"], s["input"]) == ("network", "mlp")]
    found = STUDY.measure(setting)
    assert found == STUDY.measure(setting)
    assert found["start_error"] != found["eval_error"]
    assert {name for name, value in found.items() if value is None} == {"error", "predicted", "m_eff"}


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        pytest.param("evaluation", rows_with(), "holds if", id="undone with ε alone"),
        pytest.param("evaluation", rows_with("evaluation", error=1e-9), "holds", id="undone without ε too"),
        pytest.param("evaluation", rows_with("evaluation", error=0.1), "does not hold", id="not undone"),
        pytest.param("training", rows_with(), "does not hold", id="noise is left"),
        pytest.param("training", rows_with("training", error=1e-3), "holds if", id="hardly any noise"),
        pytest.param("layer", rows_with(), "holds if", id="large batches arrive"),
        pytest.param("layer", rows_with("layer", gamma_ratio=1.0), "holds", id="all arrive"),
        pytest.param("layer", rows_with("layer", gamma_ratio=0.5), "does not hold", id="none arrives"),
        pytest.param("network", rows_with(), "does not hold", id="far, and γ came no nearer"),
        pytest.param("network", rows_with("network", gamma_distance=0.7), "not shown", id="far, but γ came nearer"),
        pytest.param("network", rows_with("network", eval_error=0.05), "holds", id="undone"),
    ],
)
def test_a_verdict_follows_from_the_rows(name, rows, expected):
    """Each criterion is met by rows that were made to meet it, and by no others."""
    assert verdict(rows, name).verdict == expected


def test_every_claim_has_its_verdict_and_its_numbers():
    """No claim is left out; what is printed are the numbers of the rows."""
    rows = rows_with()
    assert [found.claim for found in STUDY.verdicts(rows)] == list(CLAIMS.values())
    assert "0.93 at batch 2 to 0.15 at 64" in verdict(rows, "training").measured
    assert "batch^(-0.52)" in verdict(rows, "training").measured
    assert "0.56 (batch 2)" in verdict(rows, "layer").measured


def test_the_summary_explains_only_what_the_rows_show():
    """Why the distance fell is said where γ stayed behind σ, and not elsewhere."""
    assert "while γ moved away" in STUDY.summary(rows_with())
    assert "while γ moved away" not in STUDY.summary(rows_with("network", gamma_distance=0.7))
    assert "did not become smaller" in STUDY.summary(rows_with("network", start_error=1.0))


def test_tables_have_a_line_for_each_size():
    """Batch sizes stand in two tables, and both networks in one."""
    lines = STUDY.tables(rows_with()).splitlines()
    assert [sum(line.startswith(f"| {batch} |") for line in lines) for batch in BATCHES] == [2] * len(BATCHES)
    assert sum(line.startswith(("| MLP |", "| conv net |")) for line in lines) == 2


def test_the_picture_shows_every_point_and_cuts_off_no_text():
    """Three panels with their points, within the figure."""
    figure = STUDY.draw(rows_with())
    FigureCanvasAgg(figure).draw()
    width, height = figure.canvas.get_width_height()
    points = [[len(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None"] for axes in figure.axes]
    assert points == [[8, 8, 8], [len(BATCHES)] * len(INPUTS), [len(BATCHES)] * 2]
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, *axes.get_legend().get_texts()):
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height


def test_settings_are_all_different_and_grow_by_seed():
    """A run is made once, and more seeds add runs without changing the others."""
    one, three = STUDY.settings(range(1)), STUDY.settings(range(3))
    assert len({tuple(setting.items()) for setting in three}) == len(three) == 3 * len(one)
    assert three[: len(one)] == one
