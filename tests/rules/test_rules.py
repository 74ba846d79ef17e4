# SPDX-License-Identifier: Apache-2.0
"""Each rule speaks of its fault, stays silent on a healthy twin, and keeps evidence and advice apart."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_bn import rules
from lightning_bn.findings import Severity
from lightning_bn.first_pass import Call
from lightning_bn.operations import Fault, Operation, Range
from lightning_bn.outlook import Prediction
from lightning_bn.rules.affine_drift import Watched, affine_drift
from lightning_bn.rules.affine_driven_overfitting import affine_driven_overfitting
from lightning_bn.rules.affine_outnumbers_samples import affine_outnumbers_samples
from lightning_bn.rules.attached_twice import attached_twice
from lightning_bn.rules.batchnorm_in_eval_mode import batchnorm_in_eval_mode
from lightning_bn.rules.bias_before_batchnorm import bias_before_batchnorm
from lightning_bn.rules.collapsed_gamma import collapsed_gamma
from lightning_bn.rules.dead_units import dead_units
from lightning_bn.rules.decayed_gamma import decayed_gamma
from lightning_bn.rules.diverged_by_learning_rate import History, diverged_by_learning_rate
from lightning_bn.rules.dropout_before_batchnorm import dropout_before_batchnorm
from lightning_bn.rules.exploding_gradient import exploding_gradient
from lightning_bn.rules.exploding_signal import exploding_signal
from lightning_bn.rules.fast_affine import fast_affine
from lightning_bn.rules.few_values_per_channel import few_values_per_channel
from lightning_bn.rules.huge_updates import huge_updates
from lightning_bn.rules.interval_widened import interval_widened
from lightning_bn.rules.invalid_gradient import invalid_gradient
from lightning_bn.rules.invalid_operation import invalid_operation
from lightning_bn.rules.large_initial_loss import large_initial_loss
from lightning_bn.rules.large_momentum import large_momentum
from lightning_bn.rules.little_headroom import little_headroom
from lightning_bn.rules.lost_callbacks import lost_callbacks, replaced_callbacks
from lightning_bn.rules.mismatched_statistics import mismatched_statistics
from lightning_bn.rules.monitor_failed import monitor_failed
from lightning_bn.rules.no_gradient import no_gradient
from lightning_bn.rules.no_overfitting import no_overfitting
from lightning_bn.rules.noisy_batch_statistics import noisy_batch_statistics
from lightning_bn.rules.non_finite_input import non_finite_input
from lightning_bn.rules.non_finite_loss import non_finite_loss, untraced_loss
from lightning_bn.rules.non_finite_output import culprit_of, non_finite_output
from lightning_bn.rules.non_finite_parameter import non_finite_parameter
from lightning_bn.rules.non_finite_target import non_finite_target
from lightning_bn.rules.not_assessed import not_assessed
from lightning_bn.rules.not_initialised import could_not_fill, left_alone, replaced_by_checkpoint
from lightning_bn.rules.not_re_estimated import fewer_samples, left_as_they_are, not_reestimated, spoilt
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.rules.one_value_per_channel import one_value_per_channel
from lightning_bn.rules.overfitting_elsewhere import overfitting_elsewhere
from lightning_bn.rules.overflow_by_initialisation import overflow_by_initialisation, overflowed_at_start
from lightning_bn.rules.overflow_by_range import overflow_by_range
from lightning_bn.rules.overflowed_running_statistics import overflowed_running_statistics
from lightning_bn.rules.overwritten_weights import overwritten_weights
from lightning_bn.rules.poisoned_running_statistics import poisoned_running_statistics
from lightning_bn.rules.saturated_units import saturated_units
from lightning_bn.rules.shared_overfitting import shared_overfitting
from lightning_bn.rules.single_sample_statistics import single_sample_statistics
from lightning_bn.rules.small_momentum import small_momentum
from lightning_bn.rules.statistics_differ_between_ranks import Apart, statistics_differ_between_ranks
from lightning_bn.rules.statistics_stopped import Stop, statistics_stopped
from lightning_bn.rules.statistics_updated_twice import statistics_updated_twice
from lightning_bn.rules.swapped_batchnorm import (
    at_initial_statistics,
    nothing_swapped,
    other_than_saved,
    swapped,
)
from lightning_bn.rules.tiny_updates import tiny_updates
from lightning_bn.rules.unmatched_layers import unmatched_layers
from lightning_bn.rules.unsynchronised_batchnorm import unsynchronised_batchnorm
from lightning_bn.rules.untracked_statistics import untracked_statistics
from lightning_bn.rules.vanishing_gradient import Weight, vanishing_gradient
from lightning_bn.rules.vanishing_signal import vanishing_signal
from lightning_bn.rules.variance_below_epsilon import variance_below_epsilon
from lightning_bn.rules.verdict import Case
from lightning_bn.rules.wrong_running_statistics import wrong_running_statistics
from lightning_bn.rules.zero_gamma import zero_gamma
from lightning_bn.source import Line, Spot
from lightning_bn.stats.attribution import Losses
from lightning_bn.stats.finite import Census

FINE = Census(8, 0, 0, 0, 2.5)
NAN = Census(8, 3, 0, 0, 2.5)
POSINF = Census(8, 0, 2, 0, 2.5)
NEGINF = Census(8, 0, 0, 4, 2.5)
CALL = Call("net.2", "Softplus", FINE, FINE, torch.float32, ((4, 2),), 0.75)
SICK = replace(CALL, outputs=NAN)
WATCHED = Watched("val_loss", 0.5, 3, 0.8)
LINE = Line("model.py", 7, "forward", "y = torch.log(x)")
FAULT = Fault(
    Operation(5, "log", Spot("net.2", "Softplus", LINE)),
    (Range((4, 2), "float32", -1.0, 2.5, 3, FINE, "net.2.weight"),),
    (2.0,),
    Range((4, 2), "float32", 0.0, 2.5, 0, POSINF),
    "finite",
    (Operation(4, "relu", Spot("net.1", "ReLU", None)),),
    (("net.0", 1e2), ("net.1", 1e8)),
)
SLOPE = replace(FAULT, operation=replace(FAULT.operation, node="LogBackward0", at=LINE))
WEIGHT = Weight((8, 8), 1.0, 1.0, 1e-3, 1e-3, 1e-3)


def chain(**changes):
    """Five due steps of twelve layers; each change is a factor per layer, or one value for all."""
    rows = {}
    for place in range(12):
        values = {name: change(place) if callable(change) else change for name, change in changes.items()}
        rows[f"net.{place}.weight"] = replace(WEIGHT, **values)
    return [rows] * 5


def cut():
    """Five due steps in which one layer of twelve has no gradient."""
    rows = dict(chain()[0])
    rows["net.0.weight"] = replace(WEIGHT, gradient=None, update=0.0)
    return [rows] * 5


DIVERGED = History(9, 2.0, (4.0, 9.0), 0.5, 20.0, (0.1,))


def case(first=1.0, last=1.0, stored=1.0, as_trained=1.0, best=1.0, now=1.5):
    """A run of ten batches whose losses differ from setting to setting."""

    def around(loss):
        return [loss * (1 + 0.001 * place) for place in range(10)]

    losses = Losses([20] * 10, *map(around, (stored, now, as_trained, best, first, last)))
    return Case("val_loss", 7, losses, 0.2, train_fell=True)


def stopped(**how):
    """The finding about two layers that stopped in one way."""
    how = {"by_batch": False, "alone": False, "frozen": False, "amid_learning": True, **how}
    (finding,) = statistics_stopped([Stop("net.1", 20, **how), Stop("net.4", 10, **how)])
    return finding


EXAMPLES = [
    pytest.param(
        "affine-driven-overfitting", affine_driven_overfitting(case(first=1.4, last=1.1)), id="driven by gamma and beta"
    ),
    pytest.param("shared-overfitting", shared_overfitting(case(first=1.1, last=1.1)), id="shared"),
    pytest.param("overfitting-elsewhere", overfitting_elsewhere(case(first=1.05, last=1.45)), id="elsewhere"),
    pytest.param("no-overfitting", no_overfitting(case(now=1.02)), id="no overfitting"),
    pytest.param("not-assessed", not_assessed("there is no validation loop"), id="not assessed"),
    pytest.param(
        "wrong-running-statistics",
        wrong_running_statistics(case(stored=2.0), {"net.1": 0.001}),
        id="wrong running statistics",
    ),
    pytest.param(
        "mismatched-statistics", mismatched_statistics(case(as_trained=1.7), "net.2"), id="mismatched statistics"
    ),
    pytest.param("noisy-batch-statistics", noisy_batch_statistics({"net.1": 3.0}, 20), id="noise"),
    pytest.param(
        "statistics-differ-between-ranks",
        statistics_differ_between_ranks({"net.1": Apart(0.3, 50.0, 0.0, 0.1)}, 2),
        id="ranks",
    ),
    pytest.param("statistics-stopped", stopped(by_batch=True), id="stopped, by batch"),
    pytest.param("statistics-stopped", stopped(by_batch=True, frozen=True), id="stopped, by batch and frozen"),
    pytest.param("statistics-stopped", stopped(alone=True), id="stopped, alone"),
    pytest.param("statistics-stopped", stopped(), id="stopped, with others"),
    pytest.param("statistics-updated-twice", statistics_updated_twice({"net.1": 4}, 0.1), id="updated twice"),
    pytest.param("collapsed-gamma", collapsed_gamma("net.1", 9, 16, 0.0, 10.0), id="collapsed gamma"),
    pytest.param("dead-units", dead_units("net.2", 16, 16, 512, None), id="dead units"),
    pytest.param(
        "dropout-before-batchnorm", dropout_before_batchnorm("net.4", "net.2", 0.5), id="dropout in front of BatchNorm"
    ),
    pytest.param("exploding-gradient", exploding_gradient(chain(gradient=lambda k: 10.0**-k)), id="exploding gradient"),
    pytest.param("exploding-signal", exploding_signal({f"net.{k}": 10.0**k for k in range(12)}), id="exploding signal"),
    pytest.param("huge-updates", huge_updates(chain(update=5.0)), id="huge updates"),
    pytest.param("interval-widened", interval_widened(0.1, 0.02, 1, 5), id="interval"),
    pytest.param("no-gradient", no_gradient(cut()), id="no gradient"),
    pytest.param("saturated-units", saturated_units("net.2", "tanh", 0.9, 8, 16, 512, None), id="saturated units"),
    pytest.param("tiny-updates", tiny_updates(chain(weight=1e6, update=1.0)), id="tiny updates"),
    pytest.param("vanishing-gradient", vanishing_gradient(chain(gradient=lambda k: 10.0**k)), id="vanishing gradient"),
    pytest.param(
        "vanishing-signal", vanishing_signal({f"net.{k}": 10.0**-k for k in range(12)}), id="vanishing signal"
    ),
    pytest.param("variance-below-epsilon", variance_below_epsilon("net.2", 1e-7, 1e-5, step=60), id="epsilon"),
    pytest.param("affine-drift", affine_drift({"norm": (0.25, 0.1)}, {"norm": (0.2, 0.1)}, WATCHED), id="drift"),
    pytest.param(
        "diverged-by-learning-rate", diverged_by_learning_rate(FAULT, DIVERGED, what="a thing"), id="diverged"
    ),
    pytest.param(
        "diverged-by-learning-rate", diverged_by_learning_rate(None, DIVERGED, what="a thing"), id="diverged weight"
    ),
    pytest.param(
        "invalid-gradient", invalid_gradient(SLOPE, parameter="a.weight", parameters=2, loss=0.5), id="gradient"
    ),
    pytest.param(
        "invalid-gradient", invalid_gradient(None, parameter="a.weight", parameters=2, loss=None), id="no slope"
    ),
    pytest.param("invalid-operation", invalid_operation(FAULT, after="so it went"), id="operation"),
    pytest.param("little-headroom", little_headroom("net.2", 3e4, torch.float16), id="headroom"),
    pytest.param("large-initial-loss", large_initial_loss(100.0, 2.3), id="initial loss"),
    pytest.param(
        "overflow-by-initialisation",
        overflow_by_initialisation(Prediction("net.2", 2, 6, 7.8, 8000.0, torch.float16), "1000"),
        id="overflow",
    ),
    pytest.param("overflow-by-initialisation", overflowed_at_start(FAULT), id="overflow at the start"),
    pytest.param("overflow-by-range", overflow_by_range(FAULT, after="so it went"), id="range"),
    pytest.param("overflow-by-range", overflow_by_range(SLOPE, after="so it went"), id="range of a slope"),
    pytest.param(
        "overflowed-running-statistics", overflowed_running_statistics("n", FINE, POSINF, used=True), id="overflowed"
    ),
    pytest.param("overwritten-weights", overwritten_weights({"net.0.weight": "trained"}, 2, "he"), id="overwritten"),
    pytest.param("monitor-failed", monitor_failed("NaNGuard", "setup", KeyError("x")), id="monitor failed"),
    pytest.param("non-finite-input", non_finite_input("batch[0]", (2, 5), NAN, spread=True), id="input"),
    pytest.param("non-finite-input", non_finite_input("batch[0]", (2, 5), NAN, spread=False), id="masked input"),
    pytest.param(
        "non-finite-input", non_finite_input("batch[0]", (2,), NAN, spread=True, after="so it went"), id="traced input"
    ),
    pytest.param("non-finite-target", non_finite_target("batch[1]", (2,), NAN, after="so it went"), id="target"),
    pytest.param("non-finite-loss", untraced_loss(math.inf), id="untraced loss"),
    pytest.param("non-finite-loss", untraced_loss(math.inf, "val_loss"), id="logged loss"),
    pytest.param("non-finite-loss", non_finite_loss(NAN, heard=9, arrived=None, unseen={}), id="loss"),
    pytest.param(
        "non-finite-output", non_finite_output(SICK, harmless=False, outcome="so it went", unseen={}), id="output"
    ),
    pytest.param(
        "non-finite-output",
        non_finite_output(SICK, harmless=True, outcome="so it went", unseen={}),
        id="harmless output",
    ),
    pytest.param("non-finite-parameter", non_finite_parameter("net.0.weight", NAN, spread=True), id="parameter"),
    pytest.param("non-finite-parameter", non_finite_parameter("net.0.weight", NAN, spread=False), id="unused"),
    pytest.param("not-initialised", replaced_by_checkpoint("last.ckpt"), id="checkpoint"),
    pytest.param("not-initialised", left_alone("he"), id="second fit"),
    pytest.param("not-initialised", left_alone("he", same_fit=True), id="second of a fit"),
    pytest.param("not-initialised", could_not_fill({"a.weight": "frozen"}), id="skipped"),
    pytest.param("not-re-estimated", not_reestimated("the step cannot be run again"), id="not re-estimated"),
    pytest.param("not-re-estimated", left_as_they_are({"net.1": "it was not called"}), id="kept statistics"),
    pytest.param("not-re-estimated", spoilt("net.1", 2), id="spoilt statistics"),
    pytest.param("not-re-estimated", fewer_samples(64, 8192, 1.0), id="fewer samples"),
    pytest.param("attached-twice", attached_twice("NaNGuard"), id="twice"),
    pytest.param("attached-twice", attached_twice("NaNGuard", "LIGHTNING_BN=nan"), id="twice, by the environment"),
    pytest.param("lost-callbacks", lost_callbacks("lbn://why_nan", ["NaNGuard"]), id="ours lost"),
    pytest.param("lost-callbacks", replaced_callbacks("my.yaml", "my.yaml is read too early"), id="others lost"),
    pytest.param("not-watched", not_watched("the inside of net", "it is compiled", "fit without"), id="not watched"),
    pytest.param("poisoned-running-statistics", poisoned_running_statistics("n", FINE, NAN, used=True), id="poisoned"),
    pytest.param("swapped-batchnorm", swapped({"net.1": "instance norm"}), id="swapped"),
    pytest.param("swapped-batchnorm", swapped({"net.1": "instance norm"}, ["net.1"]), id="swapped, trained"),
    pytest.param("swapped-batchnorm", nothing_swapped(0, 0), id="nothing to swap"),
    pytest.param("swapped-batchnorm", at_initial_statistics(["net.1"], 1), id="frozen, not trained"),
    pytest.param("swapped-batchnorm", other_than_saved({"net.1": "a"}, {"net.1": "b"}), id="other groups"),
    pytest.param("unmatched-layers", unmatched_layers("head*", ["had", ""]), id="unmatched"),
    pytest.param("affine-outnumbers-samples", affine_outnumbers_samples(1536, 1536, 100), id="affine alone"),
    pytest.param("batchnorm-in-eval-mode", batchnorm_in_eval_mode(["net.1"], fresh=True), id="eval mode"),
    pytest.param("batchnorm-in-eval-mode", batchnorm_in_eval_mode(["a", "b"], fresh=False), id="eval mode, learned"),
    pytest.param("bias-before-batchnorm", bias_before_batchnorm({"net.0": 16}), id="bias"),
    pytest.param("decayed-gamma", decayed_gamma(["net.1"], "adamw", 1e-3, 100.0), id="decay"),
    pytest.param("decayed-gamma", decayed_gamma(["a", "b"], "sgd", 0.1, 0.5), id="decay of SGD"),
    pytest.param("decayed-gamma", decayed_gamma(["a", "b"], "adam", 0.1, 5.0), id="decay of Adam"),
    pytest.param("fast-affine", fast_affine(0.05, 5e-5), id="fast affine"),
    pytest.param("few-values-per-channel", few_values_per_channel(["net.1"], 2), id="few values"),
    pytest.param("large-momentum", large_momentum({"net.1": 0.9}), id="large momentum"),
    pytest.param("one-value-per-channel", one_value_per_channel(["net.1"], 16, 1, sure=True), id="one value"),
    pytest.param("one-value-per-channel", one_value_per_channel(["a", "b"], 1, 1, sure=False), id="perhaps one value"),
    pytest.param("single-sample-statistics", single_sample_statistics(["net.1"]), id="one sample"),
    pytest.param("small-momentum", small_momentum({"net.1": 0.001}, 270.0), id="small momentum"),
    pytest.param("unsynchronised-batchnorm", unsynchronised_batchnorm(["net.1"], 4, 8, flat=True), id="apart"),
    pytest.param("unsynchronised-batchnorm", unsynchronised_batchnorm(["net.1"], 1, 8, flat=False), id="apart, maps"),
    pytest.param("untracked-statistics", untracked_statistics(["net.1"]), id="untracked"),
    pytest.param("zero-gamma", zero_gamma(["net.1"], zero_beta=True, sure=True), id="zero gamma"),
    pytest.param("zero-gamma", zero_gamma(["a", "b"], zero_beta=False, sure=False), id="zero gamma, not seen"),
]


def test_the_list_of_slugs_names_every_rule():
    """``SLUGS`` holds the slug of every module of the package that has one, once."""
    names = (f"{rules.__name__}.{found.name}" for found in pkgutil.iter_modules(rules.__path__))
    slugs = [module.RULE for module in map(importlib.import_module, names) if hasattr(module, "RULE")]
    assert sorted(rules.SLUGS) == sorted(set(slugs))
    assert len(slugs) == len(set(slugs)) > 0


def test_a_slug_is_its_modules_name():
    """A rule is found in the file that is named after it."""
    names = {found.name.replace("_", "-") for found in pkgutil.iter_modules(rules.__path__)}
    assert set(rules.SLUGS) <= names


def test_every_rule_has_an_example_here():
    """No rule is left out of the checks that hold for all of them."""
    assert {example.values[0] for example in EXAMPLES} == set(rules.SLUGS)


@pytest.mark.parametrize(("slug", "finding"), EXAMPLES)
def test_a_finding_carries_its_slug_and_plain_data(slug, finding):
    """A finding is named after its rule, and its data are plain JSON types as they are."""
    assert finding.rule == slug
    assert json.loads(json.dumps(dict(finding.data))) == dict(finding.data)


@pytest.mark.parametrize(("slug", "finding"), EXAMPLES)
def test_evidence_gives_no_advice(slug, finding):
    """Evidence says what was seen, never what should be done, and the advice is not part of it."""
    words = set(finding.evidence.lower().replace(",", " ").replace(";", " ").split())
    assert not words & {"should", "must", "try", "consider", "please", "recommended"}, slug
    assert not finding.advice or finding.advice not in finding.evidence


@pytest.mark.parametrize(("slug", "finding"), [entry for entry in EXAMPLES if entry.values[1].severity != "info"])
def test_a_fault_comes_with_an_action(slug, finding):
    """What is worse than a note says what to do."""
    assert finding.advice, slug


@pytest.mark.parametrize(
    ("seen", "spread", "severity"),
    [
        pytest.param(FINE, True, None, id="clean"),
        pytest.param(NEGINF, True, None, id="-inf alone is a mask"),
        pytest.param(NAN, True, Severity.ERROR, id="NaN that spread"),
        pytest.param(POSINF, True, Severity.ERROR, id="+inf that spread"),
        pytest.param(NAN, False, "quiet", id="NaN that did not spread"),
    ],
)
def test_batch_and_parameters_are_judged_by_what_they_did(seen, spread, severity):
    """NaN or +inf is an error where it spread, else a note (batch) or warning (parameter); -inf alone is neither."""
    batch = non_finite_input("batch[0]", (2, 5), seen, spread=spread)
    parameter = non_finite_parameter("net.0.weight", seen, spread=spread)
    assert (batch and batch.severity) == (Severity.INFO if severity == "quiet" else severity)
    assert (parameter and parameter.severity) == (Severity.WARNING if severity == "quiet" else severity)


def test_a_parameter_finding_names_parameter_layer_and_numbers():
    """The evidence has the parameter's path and the counts; the layer is the module that owns it."""
    finding = non_finite_parameter("net.0.weight", NAN, spread=True)
    assert finding.evidence == "net.0.weight: 3 of 8 values are NaN before the forward pass"
    assert finding.layer == "net.0"


def test_an_input_finding_names_path_sample_and_numbers():
    """The evidence has the tensor's path, the sample (a scalar has none), the counts and the index."""
    finding = non_finite_input("batch['image']", (2, 5), NAN, spread=True)
    assert finding.evidence.startswith("batch['image'], sample 2: 3 of 8 values are NaN, the first at index [2, 5]")
    assert finding.data == {"path": "batch['image']", "index": [2, 5], "nan": 3, "posinf": 0, "neginf": 0}
    assert non_finite_input("batch[0]", (), NAN, spread=True).evidence.startswith("batch[0]: 3 of 8")


@pytest.mark.parametrize("judge", [non_finite_target, partial(non_finite_input, spread=True)], ids=["target", "input"])
def test_what_became_of_the_step_is_told_of_a_bad_sample(judge):
    """What a replay showed ends the evidence, and takes the place of what the modules alone can say."""
    evidence = judge("batch[1]", (2, 5), NAN, after="the loss is NaN").evidence
    assert evidence.startswith("batch[1], sample 2: 3 of 8 values are NaN, the first at index [2, 5]")
    assert evidence.endswith("; the loss is NaN")
    assert "outputs or the loss" not in evidence


def test_a_loss_that_is_known_by_its_log_alone_is_named():
    """The name that it was logged under is told, and the advice is to return it."""
    finding = untraced_loss(math.nan, "val_loss")
    assert finding.evidence.startswith("val_loss is nan over the whole loop")
    assert finding.advice.startswith("return the loss")


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        pytest.param(FINE, None, id="finite"),
        pytest.param(Census(1, 1, 0, 0, 0.0), "NaN", id="NaN"),
        pytest.param(Census(1, 0, 1, 0, 0.0), "+inf", id="+inf"),
        pytest.param(Census(1, 0, 0, 1, 0.0), "-inf", id="-inf"),
    ],
)
def test_a_loss_is_named_by_its_kind(loss, kind):
    """A loss that is not finite is an error that says what it is; a finite one is silent."""
    finding = non_finite_loss(loss, heard=9, arrived=None, unseen={})
    assert (finding and finding.evidence.split(";")[0]) == (kind and f"the loss is {kind}")
    assert finding is None or finding.severity is Severity.ERROR


@pytest.mark.parametrize(
    ("inputs", "outputs", "blamed"),
    [
        pytest.param(FINE, FINE, False, id="healthy"),
        pytest.param(FINE, NAN, True, id="makes NaN"),
        pytest.param(FINE, POSINF, True, id="makes +inf"),
        pytest.param(NAN, NAN, False, id="victim"),
        pytest.param(POSINF, NAN, False, id="victim of +inf"),
        pytest.param(NEGINF, NEGINF, False, id="passes a mask on"),
        pytest.param(NEGINF, FINE, False, id="removes a mask"),
        pytest.param(NAN, FINE, False, id="repairs"),
    ],
)
def test_only_the_module_that_made_it_worse_is_blamed(inputs, outputs, blamed):
    """A module is to blame where its output is worse than its input, not where it passes something on."""
    call = replace(CALL, inputs=inputs, outputs=outputs)
    assert (culprit_of([call]) is not None) is blamed


def test_the_first_culprit_is_named():
    """Of several modules to blame the one that returned first is named."""
    calls = [CALL, replace(SICK, layer="first"), replace(SICK, layer="second")]
    assert culprit_of(calls).layer == "first"


def test_an_output_finding_has_the_numbers():
    """Counts, dtype, input range, shapes and weight range are in the evidence and in the data."""
    finding = non_finite_output(SICK, harmless=False, outcome="so it went", unseen={})
    numbers = ["net.2 (Softplus)", "3 of 8 values are NaN", "float32", "largest |x| 2.5", "(4, 2)", "|weight| 0.75"]
    assert [part for part in numbers if part not in finding.evidence] == []
    assert finding.data["largest_input"] == 2.5
    assert finding.data["largest_weight"] == 0.75
    assert finding.data["shapes"] == [[4, 2]]


def test_an_output_finding_has_no_more_than_there_is():
    """Without parameters no weight is mentioned, and a culprit without a name is the model's own forward."""
    finding = non_finite_output(
        replace(SICK, layer="", largest_weight=None), harmless=False, outcome="so it went", unseen={}
    )
    assert finding.evidence.startswith("the model's own forward (Softplus)")
    assert "weight" not in finding.evidence


def test_a_culprit_that_did_no_harm_is_a_warning():
    """The severity follows what became of the loss, and the evidence says what it was."""
    harmless, harmful = (
        non_finite_output(SICK, harmless=value, outcome="so it went", unseen={}) for value in (True, False)
    )
    assert (harmless.severity, harmful.severity) == (Severity.WARNING, Severity.ERROR)
    assert harmless.evidence == harmful.evidence
    assert harmless.evidence.endswith("; so it went")


@pytest.mark.parametrize(
    ("outputs", "overflow"),
    [
        pytest.param(Census(8, 0, 1, 0, 257.0), True, id="infinite beside large values"),
        pytest.param(Census(8, 0, 1, 0, 255.0), False, id="infinite beside moderate values"),
        pytest.param(Census(8, 1, 1, 0, 257.0), False, id="NaN beside large values"),
    ],
)
def test_overflow_is_told_from_a_bad_operation(outputs, overflow):
    """Infinity beside finite values above √max of the dtype (256 in float16) is called an overflow of that dtype."""
    finding = non_finite_output(
        replace(CALL, outputs=outputs, dtype=torch.float16), harmless=False, outcome="so it went", unseen={}
    )
    assert ("outgrew float16" in finding.advice) is overflow


@pytest.mark.parametrize(
    ("watched", "said", "unsaid"),
    [
        pytest.param(None, "not assessed", "rose by", id="no validation"),
        pytest.param(replace(WATCHED, last=0.5), "is at its best (0.5, epoch 3)", "rose by", id="at its best"),
        pytest.param(replace(WATCHED, last=0.51), "rose by 0.01 (+2%)", "not assessed", id="just above its best"),
        pytest.param(replace(WATCHED, best=-2.0, last=-1.0), "rose by 1 (+50%)", "best (0.5", id="negative metric"),
        pytest.param(replace(WATCHED, best=0.0), "rose by 0.8 (from 0)", "inf", id="best is 0"),
        pytest.param(replace(WATCHED, last=math.nan), "val_loss ended as nan", "rose by", id="ended as NaN"),
        pytest.param(replace(WATCHED, last=math.inf), "val_loss ended as inf", "rose by", id="ended as inf"),
    ],
)
def test_drift_is_told_with_what_validation_did(watched, said, unsaid):
    """Movement is set beside the watched metric, and nothing is claimed that was not seen."""
    finding = affine_drift({"norm": (0.0, 0.0)}, {"norm": (0.0, 0.0)}, watched)
    assert said in finding.evidence
    assert unsaid not in finding.evidence


def test_drift_is_a_note_with_median_and_largest_layer():
    """Movement alone is a note: median over the layers, and the layer that moved most; without layers it is silent."""
    finding = affine_drift({"a": (0.1, 0.3), "b": (0.6, 0.02), "c": (0.2, 0.04)}, None, None)
    assert finding.severity is Severity.INFO
    assert "3 BatchNorm layers" in finding.evidence
    assert "γ moved by 20.0% of its norm (median; most 60.0% in b), β by 4.0% (most 30.0%)" in finding.evidence
    assert finding.data["since_start"]["b"] == [0.6, 0.02]
    assert affine_drift({}, None, None) is None


def test_a_failed_monitor_tells_where_and_keeps_the_traceback():
    """The evidence names monitor, hook and error; the traceback is in the data."""
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    finding = monitor_failed("NaNGuard", "setup", caught.value)
    assert finding.severity is Severity.WARNING
    assert "NaNGuard failed in setup (ZeroDivisionError: division by zero)" in finding.evidence
    assert "test_rules.py" in finding.data["traceback"]


@pytest.mark.parametrize(
    ("number", "shown"),
    [pytest.param(3, "p1 (frozen); p2 (frozen)", id="three"), pytest.param(4, "p2 (frozen); and 1 more", id="four")],
)
def test_parameters_that_kept_their_values_are_counted(number, shown):
    """At most three are named with their reason, all are in the data, and none is no finding."""
    skipped = {f"p{place}": "frozen" for place in range(number)}
    finding = could_not_fill(skipped)
    assert finding.evidence.startswith(f"{number} parameters kept their values: p0 (frozen); ")
    assert finding.evidence.endswith(shown)
    assert finding.data == {"skipped": skipped}
    assert could_not_fill({}) is None


@pytest.mark.parametrize(
    ("nearest", "names"),
    [pytest.param(["head", ""], "head, (the model itself)", id="two"), pytest.param([], "none", id="none")],
)
def test_an_unmatched_pattern_comes_with_the_nearest_names(nearest, names):
    """The evidence has the pattern, the advice the names there are."""
    finding = unmatched_layers("hed*", nearest)
    assert "'hed*'" in finding.evidence
    assert finding.advice == f"the nearest names are: {names}"
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("apart", "severity"),
    [
        pytest.param(Apart(0.09, 99.0, 0.0, 1.0), None, id="near"),
        pytest.param(Apart(0.14, 99.0, 0.0, 1.0), Severity.INFO, id="noted"),
        pytest.param(Apart(0.16, 99.0, 0.0, 1.0), Severity.WARNING, id="far"),
        pytest.param(Apart(0.16, 3.0, 0.0, 1.0), None, id="far, and not sure"),
        pytest.param(Apart(0.0, 1.0, 0.16, 99.0), Severity.WARNING, id="stored"),
        pytest.param(Apart(0.0, 1.0, math.nan, math.nan), None, id="stored ones are not finite"),
    ],
)
def test_processes_apart_are_told_where_it_is_far_and_sure(apart, severity):
    """Both sides of each threshold, of batches and of stored statistics."""
    finding = statistics_differ_between_ranks({"a": Apart(0.0, 1.0, 0.0, 1.0), "b": apart}, 2)
    assert (finding and finding.severity) == severity
    assert finding is None or finding.layer == "b"


def test_layers_that_were_frozen_on_purpose_are_not_said_to_have_stopped():
    """Eval mode with frozen γ and β, or amid parameters that are not trained."""
    stop = Stop("a", 1, by_batch=False, alone=False, frozen=False, amid_learning=True)
    assert statistics_stopped([stop])[0].severity is Severity.WARNING
    assert statistics_stopped([replace(stop, frozen=True)]) == []
    assert statistics_stopped([replace(stop, amid_learning=False)]) == []
