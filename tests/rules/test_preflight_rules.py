# SPDX-License-Identifier: Apache-2.0
"""Each rule of the audit before the first step: its thresholds, and by another route what it claims."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from lightning_bn.demo import DigitsData, DigitsMLP, DigitsResNet
from lightning_bn.findings import Severity
from lightning_bn.norms import find_batchnorm
from lightning_bn.rules.affine_outnumbers_samples import affine_outnumbers_samples
from lightning_bn.rules.batchnorm_in_eval_mode import batchnorm_in_eval_mode
from lightning_bn.rules.bias_before_batchnorm import bias_before_batchnorm
from lightning_bn.rules.decayed_gamma import decayed_gamma
from lightning_bn.rules.fast_affine import fast_affine
from lightning_bn.rules.few_values_per_channel import few_values_per_channel
from lightning_bn.rules.large_momentum import large_momentum
from lightning_bn.rules.listing import counted, listed
from lightning_bn.rules.one_value_per_channel import one_value_per_channel
from lightning_bn.rules.single_sample_statistics import single_sample_statistics
from lightning_bn.rules.small_momentum import LEFT, small_momentum
from lightning_bn.rules.unsynchronised_batchnorm import unsynchronised_batchnorm
from lightning_bn.rules.untracked_statistics import untracked_statistics
from lightning_bn.rules.zero_gamma import zero_gamma

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR
ONE = ["net.1"]
MANY = ["a", "b", "c", "d", "e"]

one_value = partial(one_value_per_channel, ONE)
apart = partial(unsynchronised_batchnorm, ONE)
adamw, adam, sgd = (partial(decayed_gamma, ONE, law) for law in ("adamw", "adam", "sgd"))

VERDICTS = {
    "bias": (bias_before_batchnorm({"net.0": 4}), INFO),
    "no bias": (bias_before_batchnorm({}), None),
    "batch of 1": (one_value(1, 1, sure=True), ERROR),
    "batch of 1, of unknown rest": (one_value(1, None, sure=True), ERROR),
    "last batch of 1": (one_value(16, 1, sure=True), ERROR),
    "last batch of 1 in one of several loaders": (one_value(None, 1, sure=False), INFO),
    "rows not known": (one_value(16, 1, sure=False), INFO),
    "last batch of 2": (one_value(16, 2, sure=True), None),
    "batch sizes not known": (one_value(None, None, sure=True), None),
    "no layer": (one_value_per_channel([], 1, 1, sure=True), None),
    "2 values": (few_values_per_channel(ONE, 2), WARNING),
    "5 values": (few_values_per_channel(ONE, 5), WARNING),
    "6 values": (few_values_per_channel(ONE, 6), INFO),
    "15 values": (few_values_per_channel(ONE, 15), INFO),
    "16 values": (few_values_per_channel(ONE, 16), None),
    "1 value, which raises": (few_values_per_channel(ONE, 1), None),
    "few values, no layer": (few_values_per_channel([], 2), None),
    "one sample": (single_sample_statistics(ONE), INFO),
    "one sample, no layer": (single_sample_statistics([]), None),
    "flat, 5 on each of 2": (apart(5, 2, flat=True), WARNING),
    "flat, 6 on each of 2": (apart(6, 2, flat=True), INFO),
    "flat, 16 on each of 2": (apart(16, 2, flat=True), None),
    "spatial, 1 on each of 8": (apart(1, 8, flat=False), INFO),
    "spatial, 4 on each of 8": (apart(4, 8, flat=False), INFO),
    "spatial, 5 on each of 8": (apart(5, 8, flat=False), None),
    "one process": (apart(2, 1, flat=True), None),
    "eval mode, fresh": (batchnorm_in_eval_mode(ONE, fresh=True), WARNING),
    "eval mode, learned": (batchnorm_in_eval_mode(ONE, fresh=False), INFO),
    "no layer in eval mode": (batchnorm_in_eval_mode([], fresh=True), None),
    "untracked": (untracked_statistics(ONE), WARNING),
    "all tracked": (untracked_statistics([]), None),
    "momentum 0.9": (large_momentum({"a": 0.1, "b": 0.9}), WARNING),
    "momentum 1": (large_momentum({"a": 1.0}), WARNING),
    "momentum 0.51": (large_momentum({"a": 0.51}), WARNING),
    "momentum 0.5": (large_momentum({"a": 0.5}), None),
    "momentum 0.1": (large_momentum({"a": 0.1}), None),
    "momentum 0.001, 270 batches": (small_momentum({"a": 0.001}, 270), WARNING),
    "momentum 0.01, 200 batches": (small_momentum({"a": 0.01}, 200), WARNING),
    "momentum 0.01, 250 batches": (small_momentum({"a": 0.01}, 250), None),
    "momentum 0.001, 100,000 batches": (small_momentum({"a": 0.001}, 1e5), None),
    "momentum 0.001, no end": (small_momentum({"a": 0.001}, math.inf), None),
    "momentum 0.001, too short for 0.1 too": (small_momentum({"a": 0.001}, 10), None),
    "momentum 0.1, any fit": (small_momentum({"a": 0.1}, 50), None),
    "γ = 0": (zero_gamma(ONE, zero_beta=True, sure=True), WARNING),
    "γ = 0, not seen": (zero_gamma(ONE, zero_beta=False, sure=False), INFO),
    "no γ = 0": (zero_gamma([], zero_beta=True, sure=True), None),
    "10 times as fast": (fast_affine(0.01, 0.001), WARNING),
    "9 times as fast": (fast_affine(0.009, 0.001), None),
    "slower": (fast_affine(0.0001, 0.001), None),
    "weights not trained": (fast_affine(0.01, 0.0), None),
    "γ not trained": (fast_affine(0.0, 0.001), None),
    "AdamW, decay 10": (adamw(1e-3, 10.0, steps=270), WARNING),
    "AdamW, decay 9": (adamw(1e-3, 9.0, steps=270), None),
    "AdamW, decay 10, a fit too short": (adamw(1e-3, 10.0, steps=99), None),
    "AdamW, decay 10, no end": (adamw(1e-3, 10.0), WARNING),
    "AdamW, as usual": (adamw(1e-3, 0.05), None),
    "Adam, decay 1": (adam(1e-3, 1.0, steps=2000), WARNING),
    "Adam, decay 1, a fit too short": (adam(1e-3, 1.0, steps=500), None),
    "Adam, as usual": (adam(1e-3, 1e-4), None),
    "SGD, decay 0.1": (sgd(0.1, 0.1, momentum=0.9, steps=270), WARNING),
    "SGD, decay 0.1, a fit too short": (sgd(0.01, 0.1, momentum=0.0, steps=270), None),
    "SGD, decay 0.1, long enough by its momentum": (sgd(0.01, 0.1, momentum=0.9, steps=270), WARNING),
    "SGD, as usual": (sgd(0.1, 5e-4, momentum=0.9), None),
    "rate 0": (sgd(0.0, 0.1), None),
    "another optimizer": (decayed_gamma(ONE, "", 0.1, 100.0), None),
    "decay, but not of γ": (decayed_gamma([], "adamw", 0.1, 100.0), None),
    "γ and β alone on few samples": (affine_outnumbers_samples(1536, 1536, 100), INFO),
    "half of the trained": (affine_outnumbers_samples(100, 200, 100), INFO),
    "less than half of the trained": (affine_outnumbers_samples(100, 201, 100), None),
    "more samples": (affine_outnumbers_samples(100, 100, 101), None),
    "samples not known": (affine_outnumbers_samples(100, 100, None), None),
    "nothing trained": (affine_outnumbers_samples(0, 0, 100), None),
}


@pytest.mark.parametrize(("finding", "severity"), VERDICTS.values(), ids=VERDICTS)
def test_a_rule_speaks_on_its_side_of_the_threshold_alone(finding, severity):
    """The severity on both sides of each threshold; None is silence."""
    assert (finding and finding.severity) == severity


@pytest.mark.parametrize(
    ("names", "text"),
    [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c"), (MANY, "a, b, c and 2 more")],
    ids=["one", "two", "three", "five"],
)
def test_layers_are_listed_in_a_sentence(names, text):
    """Up to three are named, the others counted."""
    assert listed(names) == text
    assert counted(len(names), "layer") == ("1 layer" if len(names) == 1 else f"{len(names)} layers")


@pytest.mark.parametrize(("names", "layer"), [(ONE, "net.1"), (MANY, None)], ids=["one", "several"])
def test_a_finding_about_one_layer_names_it_as_its_layer(names, layer):
    """Of several the finding has the list in its data."""
    for finding in (
        untracked_statistics(names),
        few_values_per_channel(names, 2),
        zero_gamma(names, zero_beta=True, sure=True),
    ):
        assert finding.layer == layer
        assert finding.data["layers"] == names


def test_the_foretold_error_is_that_of_torch():
    """BatchNorm in training mode refuses one value for each channel, and takes two, or one picture."""
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.BatchNorm1d(3)(torch.rand(1, 3))
    nn.BatchNorm1d(3)(torch.rand(2, 3))
    nn.BatchNorm2d(3)(torch.rand(1, 3, 2, 2))


def test_batchnorm_of_one_picture_is_instance_norm():
    """What single-sample-statistics claims, to rounding."""
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(nn.BatchNorm2d(3)(x), nn.InstanceNorm2d(3)(x))


@pytest.mark.parametrize("values", [2, 6, 15])
def test_the_spread_of_a_variance_is_that_of_normal_samples(values):
    """few-values-per-channel tells √(2 / (m - 1)), which 200,000 variances of m normal values have."""
    x = torch.randn(values, 200_000, dtype=torch.float64)
    told = few_values_per_channel(ONE, values).evidence
    assert x.var(0).std().item() == pytest.approx((2 / (values - 1)) ** 0.5, rel=0.02)
    assert f"± {(2 / (values - 1)) ** 0.5:.0%}" in told


@pytest.mark.parametrize("momentum", [0.6, 0.9])
def test_running_statistics_are_as_noisy_as_a_mean_over_that_many_batches(momentum):
    """large-momentum tells (2 - m) / m batches: the variance of running means over 4,000 channels is 1 / that."""
    norm = nn.BatchNorm1d(4000, momentum=momentum, affine=False, dtype=torch.float64)
    for _ in range(40):
        norm(torch.randn(4, 4000, dtype=torch.float64))
    batches = 1 / (4 * norm.running_mean.var().item())
    assert batches == pytest.approx((2 - momentum) / momentum, rel=0.1)
    assert f"over {(2 - momentum) / momentum:.1f} batches" in large_momentum({"a": momentum}).evidence


def test_the_share_that_is_left_is_that_of_torch():
    """small-momentum tells (1 - m)^T: a layer fed zeros T times keeps that share of the variance 1 it started from."""
    norm = nn.BatchNorm1d(2, momentum=0.004, dtype=torch.float64)
    for _ in range(200):
        norm(torch.zeros(4, 2, dtype=torch.float64))
    (left,) = small_momentum({"a": 0.004}, 200).data["left"].values()
    assert left == pytest.approx(norm.running_var[0].item(), rel=1e-9)


def test_untracked_statistics_are_used_in_evaluation_and_never_updated():
    """With the flag off, and with momentum 0, torch normalises by the batch in training and by the buffers after."""
    x = torch.randn(64, 3) * 2 + 5
    for change in ({"track_running_stats": False}, {"momentum": 0.0}):
        norm = nn.BatchNorm1d(3)
        vars(norm).update(change)
        torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, training=True))
        torch.testing.assert_close(norm.eval()(x), x, rtol=1e-4, atol=1e-4)  # by mean 0 and variance 1


def test_lightnings_freeze_leaves_layers_untracked():
    """``BaseFinetuning.freeze(train_bn=False)`` takes the flag and leaves buffers and training mode."""
    norm = nn.BatchNorm1d(3)
    BaseFinetuning.freeze(nn.Sequential(norm), train_bn=False)
    assert norm.training
    assert not norm.track_running_stats
    assert norm.running_mean is not None


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_no_gradient_passes_a_gamma_of_zero(beta):
    """zero-gamma: what is in front gets none; with β = 0 behind ReLU neither do γ and β."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(net[1].weight)
    nn.init.constant_(net[1].bias, beta)
    net(torch.randn(8, 3)).square().sum().backward()
    assert net[0].weight.grad.abs().max() == 0
    assert (net[1].weight.grad.abs().max() == 0) == (beta == 0)
    assert ("stay 0" in zero_gamma(ONE, zero_beta=beta == 0, sure=True).evidence) == (beta == 0)


def test_adamw_keeps_a_parameter_below_one_over_its_decay():
    """decayed-gamma tells 1 / decay: with a gradient that always pushes outwards a γ of 1 ends there."""
    gamma = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([gamma], lr=1e-3, weight_decay=20.0)
    for _ in range(2000):
        gamma.grad = -torch.ones_like(gamma)
        optimizer.step()
    assert gamma.item() == pytest.approx(1 / 20, rel=0.01)
    assert "bounds γ by 1 / 20 = 0.05" in adamw(1e-3, 20.0).evidence


def digits(seed):
    data = DigitsData(seed=seed)
    data.setup("fit")
    return data.train_set.tensors, data.val_set.tensors


def fit(model, optimizer, images, labels, *, batch=64, epochs=15):
    """Train as a loop without any framework does."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            if len(rows) > 1:
                optimizer.zero_grad()
                F.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()


@torch.no_grad()
def judged(model, images, labels):
    """Loss and accuracy in evaluation."""
    logits = copy.deepcopy(model).eval()(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def restated(model, images, batch):
    """A copy whose running statistics were averaged anew over all batches."""
    model = copy.deepcopy(model)
    for norm in find_batchnorm(model).values():
        norm.reset_running_stats()
        norm.momentum = None
    for rows in images.split(batch)[:-1]:
        model(rows)
    return model


def excess(momentum, batch, epochs, seed):
    """By how much the validation loss is too large because of the running statistics."""
    torch.manual_seed(seed)
    train, val = digits(seed)
    model = DigitsMLP("batch").net
    for norm in find_batchnorm(model).values():
        norm.momentum = momentum
    fit(model, torch.optim.Adam(model.parameters(), 1e-3), *train, batch=batch, epochs=epochs)
    return judged(model, *val)[0] / judged(restated(model, train[0], batch), *val)[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_from_which_on_small_momentum_warns_does_harm(seed):
    """A tenth of the start left makes the loss half as large again or more, a hundredth a third larger at most."""
    batches = 15 * math.ceil(1100 / 64)
    assert excess(1 - LEFT ** (1 / batches), 64, 15, seed) > 0.5
    assert excess(1 - 0.01 ** (1 / batches), 64, 15, seed) < 1 / 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_momentum_from_which_on_it_is_large_does_harm(seed):
    """At batches of 8 a momentum of 0.6 makes the validation loss a quarter larger or more, 0.1 a tenth at most."""
    assert excess(0.6, 8, 6, seed) > 0.25
    assert excess(0.1, 8, 6, seed) < 0.1


@pytest.mark.slow
def test_statistics_that_lightnings_freeze_leaves_untracked_do_harm_on_other_data():
    """On pictures of half the contrast a new head on a body frozen so is far worse than on the body in eval mode."""
    torch.manual_seed(0)
    train, val = digits(0)
    model = DigitsResNet("batch").net
    fit(model, torch.optim.Adam(model.parameters(), 1e-3), *train, epochs=8)
    accuracy = {}
    for way in ("untracked", "eval mode"):
        other = copy.deepcopy(model)
        other[-1].reset_parameters()
        BaseFinetuning.freeze(other[:-1], train_bn=False)
        other[:-1].train(way == "untracked")
        fit(other, torch.optim.Adam(other[-1].parameters(), 1e-2), train[0] / 2, train[1], epochs=8)
        accuracy[way] = judged(other, val[0] / 2, val[1])[1]
    assert accuracy["untracked"] < accuracy["eval mode"] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "usual", "extreme"),
    [
        pytest.param(partial(torch.optim.AdamW, lr=1e-3), 0.05, 10.0, id="AdamW"),
        pytest.param(partial(torch.optim.SGD, lr=0.1), 5e-4, 0.1, id="SGD"),
        pytest.param(partial(torch.optim.Adam, lr=1e-2), 1e-4, 1.0, id="Adam"),
    ],
)
def test_a_decay_that_is_warned_of_does_harm(make, usual, extreme):
    """On γ and β alone it brings γ below a fifth and doubles the validation loss; a usual one does neither."""
    losses = {}
    for decay in (0.0, usual, extreme):
        torch.manual_seed(0)
        train, val = digits(0)
        model = DigitsMLP("batch").net
        norms = find_batchnorm(model).values()
        affine = [x for norm in norms for x in norm.parameters()]
        rest = [x for x in model.parameters() if not any(x is y for y in affine)]
        fit(model, make([{"params": rest, "weight_decay": 0.0}, {"params": affine, "weight_decay": decay}]), *train)
        gamma = torch.cat([norm.weight.detach().abs() for norm in norms]).median().item()
        assert (gamma < 0.2) == (decay == extreme)
        losses[decay] = judged(model, *val)[0]
    assert losses[extreme] > 2 * losses[0.0]
    assert losses[usual] < 1.2 * losses[0.0]


@pytest.mark.slow
def test_a_layer_that_stays_in_eval_mode_from_the_start_does_harm():
    """A residual network whose BatchNorm normalises nothing learns much less in the same time."""
    accuracy = {}
    for training in (True, False):
        torch.manual_seed(0)
        train, val = digits(0)
        model = DigitsResNet("batch").net
        for norm in find_batchnorm(model).values():
            norm.train(training)
        fit(model, torch.optim.Adam(model.parameters(), 1e-3), *train, epochs=6)
        accuracy[training] = judged(model, *val)[1]
    assert accuracy[False] < accuracy[True] - 0.05
