# SPDX-License-Identifier: Apache-2.0
"""The right one is blamed where several things are not finite at once."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
from specimens import (
    CLASSES,
    FEATURES,
    WIDTH,
    LogOfNegative,
    MaskedAttention,
    loader,
    network,
    variance_overflow,
    with_module,
)
from torch import nn

from lightning_bn.first_pass import Recorder
from lightning_bn.rules.root_cause import root_cause

NAN, INF = math.nan, math.inf


class InPlaceLog(nn.Module):
    """Makes NaN out of finite values, in the memory of its input."""

    def forward(self, x):
        return x.sub_(1000).log_()


class Exponential(nn.Module):
    """Overflows to +inf, without NaN."""

    def forward(self, x):
        return torch.exp(x.abs() + 1000)


class Branches(nn.Module):
    """Two branches: one masks and absorbs, the other makes NaN before that."""

    def __init__(self):
        super().__init__()
        self.log, self.attention, self.head = LogOfNegative(), MaskedAttention(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.log(x) + self.attention(x))


def cross_entropy(model, inputs, labels):
    return nn.functional.cross_entropy(model(inputs), labels)


def blamed(model, batch=None, step=cross_entropy, **options):
    """Rule, severity and layer of what is found in one pass."""
    torch.manual_seed(0)
    batch = batch or next(iter(loader()))
    recorder, loss = Recorder(model, batch), None
    with recorder.listen(), suppress(ArithmeticError):
        loss = step(model, *batch)
    findings = root_cause(recorder.finish(loss, **options))
    return [(finding.rule, finding.severity.value, finding.layer) for finding in findings], findings


def log_loss(model, inputs, labels):
    p = torch.softmax(model(inputs), 1) * 0
    return -(torch.log(p) * nn.functional.one_hot(labels, CLASSES)).sum()


def before_the_model(model, inputs, labels):
    return cross_entropy(model, inputs / torch.zeros_like(inputs), labels)


class FunctionalAttention(nn.Module):
    """Masks in a module, and takes the softmax in its own code."""

    def __init__(self):
        super().__init__()
        self.mask, self.head = MaskedAttention.Mask(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        scores = self.mask(x.unsqueeze(2) * x.unsqueeze(1))
        return self.head((torch.softmax(scores, -1) @ x.unsqueeze(2)).squeeze(2))


def with_buffer(model, value):
    """A model that keeps ``value`` in a buffer, as an observer or a best score does."""
    model.register_buffer("best", torch.tensor(value))
    return model


def labels_of_nan():
    inputs, _ = next(iter(loader()))
    return [inputs, torch.full((len(inputs), CLASSES), NAN)]


def squares(model, inputs, _):
    return model(inputs).square().mean()


SICK = nn.Sequential(with_module(MaskedAttention()), LogOfNegative())
CASES = {
    "a mask that softmax absorbs is innocent of a later NaN": (SICK, cross_entropy, "non-finite-output", "1"),
    "and of a NaN in the loss": (with_module(MaskedAttention()), log_loss, "non-finite-loss", None),
    "NaN in one branch, a mask in the other": (
        nn.Sequential(nn.Linear(FEATURES, WIDTH), Branches()),
        cross_entropy,
        "non-finite-output",
        "1.log",
    ),
    "a module that works in place": (
        nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.Identity(), InPlaceLog(), nn.Linear(WIDTH, CLASSES)
        ).requires_grad_(requires_grad=False),
        cross_entropy,
        "non-finite-output",
        "2",
    ),
    "a mask that a container absorbs is innocent of a NaN in the loss": (
        nn.Sequential(nn.Linear(FEATURES, WIDTH), FunctionalAttention()),
        log_loss,
        "non-finite-loss",
        None,
    ),
    "a buffer of inf is innocent of a NaN in the loss": (
        with_buffer(network(), INF),
        log_loss,
        "non-finite-loss",
        None,
    ),
    "NaN made before the model": (network(norm=False), before_the_model, "non-finite-loss", None),
}


@pytest.mark.parametrize(("model", "step", "rule", "layer"), CASES.values(), ids=CASES)
def test_the_origin_is_blamed_and_no_bystander(model, step, rule, layer):
    """One error, on what made the first value that stayed non-finite."""
    assert blamed(model, step=step)[0] == [(rule, "error", layer)]


def test_masked_labels_do_not_hide_the_module_that_made_nan():
    """NaN in labels that nothing uses is a note beside the error on the module."""
    rows, _ = blamed(with_module(LogOfNegative()), labels_of_nan(), squares)
    assert rows == [("non-finite-input", "info", None), ("non-finite-output", "error", "2")]


def test_an_unused_nan_weight_does_not_hide_the_module_that_made_nan():
    """The same for a weight that the pass does not use: a warning beside the error."""
    model = with_module(LogOfNegative())
    model.unused = nn.Parameter(torch.tensor(NAN))
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)), x)
    rows, _ = blamed(model)
    assert rows == [("non-finite-parameter", "warning", ""), ("non-finite-output", "error", "2")]


def test_a_buffer_of_infinity_is_no_finding():
    """Best scores and the observers of quantisation start from infinity."""
    assert blamed(with_buffer(network(), INF))[0] == []


def test_a_note_beside_a_culprit_does_not_call_the_step_finite():
    """What is said of masked labels stays true where another cause is found."""
    _, (note, _) = blamed(with_module(LogOfNegative()), labels_of_nan(), squares)
    assert "finite all the same" not in note.evidence


def test_running_statistics_that_nan_came_into_are_victims():
    """NaN made before the model poisons BatchNorm: the finding says where it came in, and blames no layer."""
    rows, (finding,) = blamed(network(), step=before_the_model)
    assert rows == [("non-finite-loss", "error", None)]
    assert "came into 0" in finding.evidence


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_nested_tensor_does_not_disturb_the_recording():
    """A tensor without a shape is passed over."""
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    recorder = Recorder(nn.Sequential(nn.Identity()), nested)
    with recorder.listen():
        recorder.layers["0"](nested)
    assert root_cause(recorder.finish(None)) == []


def test_a_nan_weight_is_blamed_and_not_its_module():
    """The module that puts out NaN has a NaN weight: the weight is the cause."""
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0] = NAN
    assert blamed(model)[0] == [("non-finite-parameter", "error", "3")]


def test_nan_from_before_the_model_is_said_to_have_arrived():
    """The evidence names the module that it came into, and the advice points before it."""
    _, (finding,) = blamed(network(norm=False), step=before_the_model)
    assert "NaN or +inf came into 0 already" in finding.evidence
    assert "what feeds 0" in finding.advice


def test_inputs_of_minus_infinity_are_not_called_finite():
    """A module that turns -inf of the batch into NaN is named with what came in."""
    inputs, labels = next(iter(loader()))
    inputs[3, 2] = -INF
    _, findings = blamed(network(norm=False), [inputs, labels])
    assert "its inputs held 1 of 96 values are -inf" in findings[-1].evidence


def test_the_sample_named_is_that_of_the_nan_and_not_of_a_mask():
    """-inf at an earlier sample is not what has to be repaired."""
    inputs, labels = next(iter(loader()))
    inputs[3, 2], inputs[5, 1] = -INF, NAN
    _, (finding,) = blamed(network(), [inputs, labels])
    assert "sample 5" in finding.evidence


def test_an_exception_after_an_overflow_is_explained():
    """Where the step fails with +inf in an output, the module that overflowed is the error."""
    model = with_module(Exponential())
    rows, _ = blamed(model, step=lambda model, inputs, _: 1 / int(model(inputs).isfinite().all()), failed=True)
    assert rows == [("non-finite-output", "error", "2")]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch.compile's own
def test_a_variance_overflow_inside_a_compiled_module_is_found():
    """Running statistics are looked at where no hook reaches: what the pass changed, it used."""
    rows, _ = blamed(torch.compile(variance_overflow(), backend="eager"))
    assert rows == [("overflowed-running-statistics", "error", "1")]


@pytest.mark.parametrize("compiled", [True, False], ids=["the whole model", "a submodule"])
def test_what_could_not_be_listened_to_is_said(compiled):
    """A verdict behind a compiled module does not claim that everything was finite."""
    inner = with_module(LogOfNegative())
    torch.manual_seed(0)
    model = nn.Sequential(inner)
    recorder = Recorder(model, next(iter(loader())), compiled=compiled)
    if not compiled:
        recorder.unseen["0"] = "it is compiled (torch.compile)"
        recorder.layers = {"": model}
    inputs, labels = next(iter(loader()))
    with recorder.listen():
        loss = cross_entropy(model, inputs, labels)
    (finding,) = root_cause(recorder.finish(loss))
    assert "not listened to" in finding.evidence
    assert "it is compiled" in finding.evidence
