# SPDX-License-Identifier: Apache-2.0
"""One cause is reported for each sick network, and none for its healthy twin."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import specimens
import torch
from torch import nn

from lightning_bn.findings import Severity
from lightning_bn.first_pass import Recorder
from lightning_bn.rules.root_cause import root_cause

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batch():
    """Inputs and labels, as the loader of the specimens gives them."""
    return next(iter(specimens.loader()))


def verdict(model, data, step=None, *, failed=False):
    """What is found when a model sees a batch; ``step`` makes the loss, by default that of the specimens."""
    recorder = Recorder(model, data)
    loss = None
    with recorder.listen(), suppress(ArithmeticError):
        loss = step(model) if step else nn.functional.cross_entropy(model(data[0]), data[1])
    return root_cause(recorder.finish(loss, failed=failed))


def kinds(findings):
    return [(finding.rule, finding.severity.value, finding.layer) for finding in findings]


def plant(tensor, place, value):
    with torch.no_grad():
        tensor[place] = value


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "no norm"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_healthy_network_is_silent(norm, mode):
    """Nothing is found where nothing is wrong."""
    assert verdict(specimens.network(norm).train(mode), batch()) == []


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "no norm"])
@pytest.mark.parametrize("value", [NAN, INF], ids=["NaN", "+inf"])
def test_a_bad_value_in_the_batch_is_named_and_no_layer_is(norm, value):
    """The tensor's path and the sample are named; modules and statistics, which only passed it on, are not."""
    data = batch()
    plant(data[0], (3, 5), value)
    (finding,) = verdict(specimens.network(norm), data)
    assert (finding.rule, finding.severity, finding.layer) == ("non-finite-input", Severity.ERROR, None)
    assert finding.evidence.startswith("batch[0], sample 3: 1 of 96 values are ")
    assert (finding.data["path"], finding.data["index"]) == ("batch[0]", [3, 5])


@pytest.mark.parametrize(
    ("plant_labels", "expected"),
    [
        pytest.param(True, [("non-finite-input", "info", None)], id="masked labels"),
        pytest.param(False, [], id="healthy twin"),
    ],
)
def test_labels_that_the_loss_masks_are_a_note(plant_labels, expected):
    """NaN in the batch that neither outputs nor loss repeat is a note and no fault."""
    inputs, labels = batch()[0], torch.zeros(8)
    if plant_labels:
        plant(labels, slice(2, 5), NAN)
    findings = verdict(specimens.network(), [inputs, labels], lambda net: net(inputs).mean() + labels.nansum())
    assert kinds(findings) == expected


def test_a_masking_module_is_healthy():
    """Scores that are -inf on purpose are no finding while nothing comes of them."""
    assert verdict(specimens.with_module(specimens.MaskedAttention()), batch()) == []


def test_a_mask_over_everything_is_a_fault():
    """Where a mask leaves nothing over, the softmax that turns it into NaN or the mask is named."""
    module = specimens.MaskedAttention()
    module.mask.mask.fill_(-INF)
    (finding,) = verdict(specimens.with_module(module), batch())
    assert finding.severity is Severity.ERROR
    assert finding.layer in {"2.mask", "2.softmax"}


@pytest.mark.parametrize("value", [NAN, INF], ids=["NaN", "+inf"])
def test_a_bad_parameter_is_named_and_no_module_is(value):
    """The parameter is the cause of what its module and all later ones give out."""
    net = specimens.network()
    plant(net[3].weight, (0, 0), value)
    (finding,) = verdict(net, batch())
    assert kinds([finding]) == [("non-finite-parameter", "error", "3")]
    assert finding.evidence.startswith("3.weight: 1 of 256 values are ")


def test_a_bad_parameter_that_is_not_used_is_a_warning():
    """A NaN in a layer that this pass passes by has done no harm yet."""
    net = specimens.network()
    net.unused = nn.Linear(2, 2)
    plant(net.unused.bias, 0, NAN)
    findings = verdict(net, batch(), lambda model: model[:-1](batch()[0]).sum())
    assert kinds(findings) == [("non-finite-parameter", "warning", "unused")]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        pytest.param(specimens.LogOfNegative(), [("non-finite-output", "error", "2")], id="logarithm"),
        pytest.param(specimens.BetweenModules(), [("non-finite-output", "error", "2")], id="between submodules"),
        pytest.param(nn.Linear(specimens.WIDTH, specimens.WIDTH), [], id="healthy twin"),
    ],
)
def test_the_module_that_made_nan_is_named(module, expected):
    """The culprit is the module, or the container whose own code made NaN, and never the submodule that got it."""
    assert kinds(verdict(specimens.with_module(module), batch())) == expected


def test_the_innermost_module_is_named():
    """Of nested modules that all give out NaN the innermost one is the culprit."""
    nested = nn.Sequential(nn.Identity(), nn.Sequential(specimens.LogOfNegative()))
    assert kinds(verdict(specimens.with_module(nested), batch())) == [("non-finite-output", "error", "2.1.0")]


def test_a_culprit_that_the_loss_does_not_see_is_a_warning():
    """NaN that the loss leaves out has done no harm."""
    net = specimens.with_module(specimens.LogOfNegative())
    findings = verdict(net, batch(), lambda model: model(batch()[0]).nansum())
    assert kinds(findings) == [("non-finite-output", "warning", "2")]


def test_a_loss_that_takes_the_logarithm_of_zero_is_named_alone():
    """Where every module is finite the loss is the finding."""
    model, data = specimens.LogOfZeroInLoss(), batch()
    findings = verdict(model, data, lambda module: module.training_step(data, 0))
    assert kinds(findings) == [("non-finite-loss", "error", None)]


def test_a_running_variance_that_overflows_is_named():
    """The loss stays finite for this step; the layer whose variance overflowed is named all the same."""
    (finding,) = verdict(specimens.variance_overflow(), batch())
    assert kinds([finding]) == [("overflowed-running-statistics", "error", "1")]
    assert finding.data["posinf"] > 0
    assert finding.data["finite_before"] is True


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        pytest.param(NAN, "poisoned-running-statistics", id="NaN"),
        pytest.param(INF, "overflowed-running-statistics", id="+inf"),
    ],
)
def test_statistics_that_were_bad_before_are_named_and_no_module_is(statistic, mode, value, rule):
    """Running statistics loaded with NaN or infinity are the cause, in training as in evaluation."""
    net = specimens.network().train(mode)
    getattr(net[4], statistic)[0] = value
    (finding,) = verdict(net, batch())
    assert kinds([finding]) == [(rule, "error", "4")]
    assert finding.data["finite_before"] is False


def test_statistics_with_nan_and_infinity_are_poisoned_alone():
    """NaN outweighs an overflow of the same layer: one finding, with both counts."""
    net = specimens.network()
    net[4].running_var[0], net[4].running_var[1] = NAN, INF
    (finding,) = verdict(net, batch())
    assert kinds([finding]) == [("poisoned-running-statistics", "error", "4")]
    assert (finding.data["nan"], finding.data["posinf"]) == (1, 1)


def test_bad_statistics_of_a_layer_that_does_not_run_are_no_finding():
    """A layer that this pass leaves out is not judged."""
    net = specimens.network()
    net.unused = nn.BatchNorm1d(2)
    net.unused.running_var.fill_(NAN)
    assert verdict(net, batch(), lambda model: model[:-1](batch()[0]).sum()) == []


def fails(model):
    model(batch()[0])
    raise ArithmeticError


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        pytest.param(specimens.LogOfNegative(), [("non-finite-output", "error", "2")], id="after NaN"),
        pytest.param(nn.Identity(), [], id="healthy twin"),
    ],
)
def test_an_exception_is_explained_by_what_was_heard_before(module, expected):
    """A step that ended in an exception is judged without a loss, and its NaN is no mere warning."""
    assert kinds(verdict(specimens.with_module(module), batch(), fails, failed=True)) == expected


def no_loss(model):
    model(batch()[0])


@pytest.mark.parametrize(
    ("failed", "words"), [(False, "loss was not seen"), (True, "exception")], ids=["went on", "failed"]
)
def test_without_a_loss_nan_in_an_output_is_an_error_that_says_so(failed, words):
    """A loss that was not seen is not called finite."""
    findings = verdict(specimens.with_module(specimens.LogOfNegative()), batch(), no_loss, failed=failed)
    assert kinds(findings) == [("non-finite-output", "error", "2")]
    assert words in findings[0].evidence


def test_a_bad_batch_and_a_bad_parameter_are_reported_together():
    """Two causes from outside of the network do not hide each other."""
    net, data = specimens.network(norm=False), batch()
    plant(net[0].weight, (0, 0), NAN)
    plant(data[0], (1, 1), NAN)
    assert [finding.rule for finding in verdict(net, data)] == ["non-finite-input", "non-finite-parameter"]
