# SPDX-License-Identifier: Apache-2.0
"""Starts that are too large are said, before the first step or from the first loss; usual starts are not."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from lightning_bn.demo import DigitsData, DigitsMLP, DigitsResNet
from lightning_bn.findings import Severity
from lightning_bn.initialization import initialize
from lightning_bn.outlook import Stage, predicted_overflow
from lightning_bn.rules.large_initial_loss import large_initial_loss
from lightning_bn.rules.overflow_by_initialisation import overflow_by_initialisation

SEEDS, CLASSES = 10, 10
LN10 = math.log(CLASSES)
MLPS = [
    pytest.param(DigitsMLP, norm, depth, id=f"MLP {norm} {depth}") for norm in ("none", "batch") for depth in (2, 5)
]
RESNETS = [pytest.param(DigitsResNet, "batch", depth, id=f"ResNet batch {depth}") for depth in (2, 5)]


def foretold(std=1000.0, dtype=torch.float16, depth=6, *, norm=False):
    """The prediction for linear layers of width 128 from N(0, std²)."""
    norms = [Stage("norm", 1.0, resets=True, is_norm=True)] if norm else []
    stages = [each for k in range(depth) for each in (Stage(f"net.{2 * k}", 8 * std, resets=False), *norms)]
    return predicted_overflow(stages, dtype)


def test_an_overflow_to_come_is_a_warning_with_layer_place_and_range():
    """The evidence has start, factor, the layer's place, size, the end of the dtype and what was assumed."""
    finding = overflow_by_initialisation(foretold(), "1000")
    assert finding.severity is Severity.WARNING
    assert finding.layer == "net.2"
    for part in (
        "N(0, 1000²) multiplies the signal by 8000 in layer 2 of 6",
        "10^7.8",
        "float16 (largest 65504)",
        "no skip connections",
    ):
        assert part in finding.evidence
    assert finding.advice.startswith("initialise with he")


def test_a_variance_to_overflow_is_named_by_its_norm_and_by_float32():
    """Under bfloat16 too it is float32 that a norm's variance leaves, and the layer is the norm."""
    finding = overflow_by_initialisation(foretold(1e19, torch.bfloat16, norm=True), "1e+19")
    assert finding.layer == "norm"
    assert finding.evidence.startswith(
        "N(0, 1e+19²) multiplies the signal by 8e+19 in layer 1 of 6; what norm normalises"
    )
    assert "variance is beyond the range of float32 (largest 3.4028e+38)" in finding.evidence
    assert finding.data["kind"] == "variance"


def test_a_scheme_with_a_name_keeps_it():
    """Only a number is read as the standard deviation of a normal."""
    assert overflow_by_initialisation(foretold(), "pytorch").evidence.startswith("pytorch multiplies the signal")


def test_the_numbers_are_kept_as_plain_data():
    """A program can read what the sentence says."""
    data = overflow_by_initialisation(foretold(), "1000").data
    assert json.loads(json.dumps(dict(data))) == data
    assert (data["place"], data["of"], data["dtype"], data["kind"], data["scheme"]) == (
        2,
        6,
        "float16",
        "value",
        "1000",
    )
    assert data["growth"] == pytest.approx(8000)
    assert data["log10_rms"] == pytest.approx(2 * math.log10(8000))


@pytest.mark.parametrize("std", [math.sqrt(2 / 128), 0.01], ids=["He", "naive"])
def test_no_prediction_is_no_finding(std):
    """A start that overflows nowhere has nothing to be said about, in the narrowest dtype and at any depth."""
    assert overflow_by_initialisation(foretold(std, depth=1000), "he") is None


@pytest.mark.parametrize(
    ("ratio", "severity"),
    [
        pytest.param(1.0, None, id="equal probabilities"),
        pytest.param(4.0, None, id="at the note"),
        pytest.param(4.01, Severity.INFO, id="above the note"),
        pytest.param(8.0, Severity.INFO, id="at the warning"),
        pytest.param(8.01, Severity.WARNING, id="above the warning"),
        pytest.param(math.nan, None, id="NaN"),
        pytest.param(math.inf, None, id="inf"),
    ],
)
def test_an_initial_loss_is_judged_by_its_ratio_to_equal_probabilities(ratio, severity):
    """More than 4 times is a note, more than 8 times a warning; what is not finite is another rule's matter."""
    finding = large_initial_loss(ratio * LN10, LN10)
    assert (finding and finding.severity) == severity


def test_thresholds_of_an_initial_loss_can_be_given():
    """Note and warning are arguments."""
    assert large_initial_loss(3.0, 1.0, note=2.0).severity is Severity.INFO
    assert large_initial_loss(3.0, 1.0, note=1.0, warn=2.0).severity is Severity.WARNING


def test_a_large_initial_loss_comes_with_its_numbers():
    """Loss, ratio and ln C are in the evidence and in the data."""
    finding = large_initial_loss(13.6, LN10)
    assert "13.6, 5.91 times that of equal probabilities (2.303)" in finding.evidence
    assert finding.data == {"loss": 13.6, "expected": LN10, "ratio": 13.6 / LN10}
    assert json.loads(json.dumps(dict(finding.data))) == finding.data


@pytest.fixture(scope="module")
def digits():
    data = DigitsData()
    data.setup("fit")
    return data.train_set.tensors


def start(build, norm, depth, scheme, seed):
    """A demo network, initialised; ``pytorch`` leaves what torch drew."""
    torch.manual_seed(seed)
    model = build(norm, depth=depth)
    initialize(model, scheme, seed=seed)
    return model


@torch.no_grad()
def judged(digits, build, norm, depth, scheme):
    """Ratio and finding of the loss on a batch of 64 digits, for each seed."""
    found = []
    for seed in range(SEEDS):
        model = start(build, norm, depth, scheme, seed)
        chosen = torch.randperm(len(digits[0]))[:64]
        loss = nn.functional.cross_entropy(model(digits[0][chosen]), digits[1][chosen]).item()
        found.append((loss / LN10, large_initial_loss(loss, LN10)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["he", "xavier", "naive", "orthogonal", "pytorch"])
@pytest.mark.parametrize(("build", "norm", "depth"), [*MLPS, *RESNETS])
def test_a_usual_start_has_a_usual_loss(digits, build, norm, depth, scheme):
    """Networks that train well are not spoken of, with any of ten seeds."""
    assert [finding for _, finding in judged(digits, build, norm, depth, scheme) if finding] == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["xavier", "naive", "orthogonal", "pytorch"])
def test_a_residual_network_without_a_norm_has_a_usual_loss_from_a_small_start(digits, scheme):
    """Its signal stays small where the branches do."""
    assert [finding for _, finding in judged(digits, DigitsResNet, "none", 5, scheme) if finding] == []


@pytest.mark.slow
def test_he_in_a_residual_network_without_a_norm_is_warned_of(digits):
    """Each block doubles the variance there, and ten blocks make every first loss more than 8 times too large."""
    found = judged(digits, DigitsResNet, "none", 5, "he")
    assert {finding.severity for _, finding in found} == {Severity.WARNING}


@pytest.mark.slow
def test_a_normal_start_behind_batchnorm_is_spoken_of(digits):
    """N(0, 1) with BatchNorm is a note in most seeds, and no warning: deep healthy networks have such losses too."""
    found = [finding.severity for _, finding in judged(digits, DigitsMLP, "batch", 5, 1.0) if finding]
    assert len(found) > SEEDS / 2
    assert set(found) == {Severity.INFO}


@pytest.mark.slow
def test_a_huge_normal_start_behind_batchnorm_is_finite_and_warned_of(digits):
    """N(0, 1000²) with BatchNorm does not overflow in float32, and its loss is some thousand times too large."""
    found = judged(digits, DigitsMLP, "batch", 5, 1000.0)
    assert {finding.severity for _, finding in found} == {Severity.WARNING}
    assert all(3000 < ratio < 9000 for ratio, _ in found)
    assert overflow_by_initialisation(foretold(1000.0, torch.float32, 5, norm=True), "1000") is None
