# SPDX-License-Identifier: Apache-2.0
"""What is to blame for a bad step, told from hand-made replays and histories."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_bn.findings import Severity
from lightning_bn.operations import Fault, Operation, Outside, Range
from lightning_bn.replay import Replayed
from lightning_bn.rules.diverged_by_learning_rate import History
from lightning_bn.rules.little_headroom import little_headroom
from lightning_bn.rules.overflowed_running_statistics import overflowed_running_statistics
from lightning_bn.rules.poisoned_running_statistics import poisoned_running_statistics
from lightning_bn.rules.root_cause import statistics_fault
from lightning_bn.rules.traced_cause import traced_cause
from lightning_bn.source import Line, Spot
from lightning_bn.stats.finite import Census

FINE = Census(8, 0, 0, 0, 2.5)
NAN = Census(8, 3, 0, 0, 2.5)
POSINF = Census(8, 0, 2, 0, 2.5)
NEGINF = Census(8, 0, 0, 4, 2.5)
NOTHING = Census(0, 0, 0, 0, 0.0)
SPOT = Spot("net.2", "Softplus", Line("model.py", 7, "forward", "y = f(x)"))
INPUT = Range((4, 2), "float32", -1.0, 2.5, 3, FINE)
GROWING = (("net.0", 1e2), ("net.2", 1e8))
STEADY = (("net.0", 2.0), ("net.2", 2.5))
FELL = History(9, 2.0, (2.0, 1.0), 0.5, 0.6, (0.1,))
ROSE = replace(FELL, losses=(4.0, 9.0), weight=2.0)
GREW = replace(FELL, weight=60.0)
SAMPLE = Outside("batch", "batch[0]", (2, 5), NAN, mixed="parameter")


def fault(name="log", *, out=NAN, dtype="float32", node="", **values):
    """An operation in ``net.2`` that made NaN or infinity of finite values; by default NaN in float64 too."""
    output = Range((4, 2), dtype, -2.5, 2.5, 0, out)
    given = {"inputs": (INPUT,), "wide": "non-finite", "sizes": STEADY, "before": (), **values}
    return Fault(Operation(5, name, SPOT, node), scalars=(), output=output, **given)


def overflow(**values):
    """A matrix product whose result is finite in float64."""
    return fault("addmm", out=POSINF, wide="finite", **values)


def judged(origin, history=FELL, phase="loss", **values):
    """The one finding of a replay that ended in a bad loss."""
    (finding,) = traced_cause(Replayed(origin, phase, math.nan, **values), history)
    assert finding.severity is Severity.ERROR
    return finding


@pytest.mark.parametrize("name", ["log", "log_", "xlogy"])
@pytest.mark.parametrize("step", [0, 9])
def test_an_operation_is_reported_in_any_step(name, step):
    """A fault of its own is an invalid operation in the first step and in later ones."""
    finding = judged(fault(name), replace(FELL, step=step))
    assert (finding.rule, finding.layer, finding.data["operation"]) == ("invalid-operation", "net.2", name)


KINDS = {
    "clamp(min=1e-7)": ("log", "log2_", "xlogy"),
    "inside the root": ("sqrt", "sqrt_", "rsqrt"),
    "divisor away from 0": ("div", "reciprocal", "remainder"),
    "correction=0": ("var", "std", "var_mean"),
    "every label is ignored": ("nll_loss_forward", "nll_loss2d_forward"),
    "masked with -inf": ("_softmax", "_log_softmax"),
    "open interval": ("acos", "atanh_", "erfinv"),
    "clamp the base": ("pow",),
    "fill the memory": ("empty", "empty_like"),
    "look at what lgamma computes": ("lgamma",),
}


@pytest.mark.parametrize(("words", "name"), [(words, name) for words, names in KINDS.items() for name in names])
def test_each_kind_of_operation_gets_its_own_advice(words, name):
    """The advice has the words of its kind and of no other."""
    advice = judged(fault(name)).advice
    assert [kind for kind in KINDS if kind in advice] == [words]


@pytest.mark.parametrize("name", ["mean", "var", "std_mean"])
def test_a_mean_over_nothing_is_told_from_one_over_values(name):
    """Without any value in its input the selection is what is to blame."""
    nothing = replace(INPUT, shape=(0, 2), seen=NOTHING)
    assert judged(fault(name, inputs=(nothing,))).advice.startswith("nothing was selected")
    assert not judged(fault(name)).advice.startswith("nothing was selected")


def test_the_evidence_has_operation_module_line_ranges_and_outcome():
    """All that a person needs to find the line is in one sentence, and in the data."""
    before = (Operation(4, "relu", replace(SPOT, layer="net.1")),)
    finding = judged(fault(before=before))
    for part in (
        "log in net.2 (Softplus), at model.py:7 in forward: `y = f(x)`: 3 of 8 values are NaN",
        "out of finite values: (4, 2) float32 in [-1, 2.5]",
        "before it: relu in net.1",
        "the loss is NaN",
    ):
        assert part in finding.evidence
    assert (finding.data["file"], finding.data["line"], finding.data["code"]) == ("model.py", 7, "y = f(x)")
    assert finding.data["inputs"][0]["zeros"] == 3


def test_infinities_that_were_meant_are_not_called_finite():
    """A softmax of a row of -inf had no finite input."""
    finding = judged(fault("_softmax", inputs=(replace(INPUT, seen=NEGINF),)))
    assert "out of infinities that were meant" in finding.evidence


def test_nan_that_was_written_out_is_not_laid_to_the_operation_that_met_it():
    """The first operation to see a constant of NaN is named as such, whatever it computes."""
    finding = judged(fault("log", inputs=(INPUT, replace(INPUT, seen=NAN))))
    assert finding.rule == "invalid-operation"
    assert "out of NaN that no operation made" in finding.evidence
    assert finding.advice.startswith("keep this NaN out")


@pytest.mark.parametrize("wide", ["finite", "non-finite", ""])
@pytest.mark.parametrize("name", ["exp", "exp_", "expm1", "cosh"])
def test_an_exponential_that_is_infinite_is_an_overflow(name, wide):
    """An exponential is defined everywhere: even where float64 overflows too, the argument is too large."""
    finding = judged(fault(name, out=POSINF, wide=wide), replace(FELL, step=0))
    assert finding.rule == "overflow-by-range"
    assert finding.advice.startswith("subtract the maximum")


@pytest.mark.parametrize(
    ("dtype", "sizes", "rule"),
    [
        pytest.param("float16", GROWING, "overflow-by-range", id="float16"),
        pytest.param("float32", GROWING, "overflow-by-initialisation", id="float32"),
        pytest.param("bfloat16", GROWING, "overflow-by-initialisation", id="bfloat16"),
        pytest.param("float32", (("a", 1.0), ("b", 3.0), ("c", 4.0)), "overflow-by-initialisation", id="twofold"),
        pytest.param("float32", (("a", 1.0), ("b", 3.0), ("c", 3.99)), "overflow-by-range", id="less"),
        pytest.param("float32", GROWING[1:], "overflow-by-range", id="one layer"),
        pytest.param("float32", (("a", 0.0), ("b", 4.0)), "overflow-by-range", id="from 0"),
        pytest.param("float32", (), "overflow-by-range", id="no layer"),
    ],
)
def test_the_start_is_blamed_where_the_signal_doubled_from_layer_to_layer(dtype, sizes, rule):
    """In the first step, in a wide dtype, and from a growth of two on; else the range is."""
    finding = judged(overflow(dtype=dtype, sizes=sizes), History())
    assert finding.rule == rule
    assert finding.layer == "net.2"


def test_a_start_that_overflows_is_told_with_growth_and_place():
    """From 1e2 to 1e8 in one step is a factor of a million, and the next layer is the third."""
    finding = judged(overflow(sizes=GROWING), History())
    assert "grew by 1e+06 a layer from 100 behind net.0 to 1e+08 behind net.2, and this is layer 3" in finding.evidence
    assert (finding.data["place"], finding.data["dtype"]) == (3, "float32")
    assert finding.data["growth"] == pytest.approx(1e6)


def test_a_growing_signal_of_a_later_step_is_not_laid_to_the_start():
    """Weights that were trained are no start."""
    assert judged(overflow(sizes=GROWING), FELL).rule == "overflow-by-range"


def test_an_overflow_of_a_backward_pass_is_told_as_such():
    """It is laid to the range, in the first step too, with the line that it differentiates."""
    finding = judged(overflow(node="MmBackward0", sizes=GROWING), History(), "gradient", parameter="a", parameters=2)
    assert finding.rule == "overflow-by-range"
    assert "backward of what ran in net.2 (Softplus), at model.py:7" in finding.evidence


@pytest.mark.parametrize(
    ("history", "diverged"),
    [
        pytest.param(ROSE, True, id="loss rose"),
        pytest.param(GREW, True, id="weights grew"),
        pytest.param(FELL, False, id="loss fell"),
        pytest.param(replace(ROSE, losses=(4.0,)), False, id="loss just twice the first"),
        pytest.param(replace(ROSE, losses=(9.0, 1.0)), False, id="loss came back"),
        pytest.param(replace(ROSE, weight=1.5), False, id="loss rose, weights just threefold"),
        pytest.param(replace(ROSE, first=0.5, losses=(-3.0,)), False, id="loss fell below 0"),
        pytest.param(replace(FELL, weight=50.0), False, id="weights just a hundredfold"),
        pytest.param(replace(ROSE, step=0, weight=20.0), False, id="first step"),
        pytest.param(History(9), False, id="nothing known"),
        pytest.param(replace(FELL, first=None, weight_at_start=None), False, id="first values not known"),
        pytest.param(replace(ROSE, losses=()), False, id="no finite loss"),
        pytest.param(replace(GREW, weight_at_start=0.0), False, id="weights of 0"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_overflow_is_a_divergence_where_loss_or_weights_had_grown(history, diverged, dtype):
    """A hundredfold weight, or a threefold one with twice the loss, and never in the first step or a healthy run."""
    finding = judged(overflow(dtype=dtype), history)
    assert finding.rule == ("diverged-by-learning-rate" if diverged else "overflow-by-range")


def test_a_divergence_is_told_with_its_course():
    """Step, loss, weights, learning rate and the operation in which it ended."""
    finding = judged(overflow(), replace(ROSE, weight=20.0, learning_rates=(0.1, 0.01)))
    for part in (
        "first in step 9",
        "the loss was 2 in the first step and 4, 9 in the last ones",
        "the largest weight was 0.5 and is 20",
        "learning rate 0.1, 0.01",
        "addmm in net.2 (Softplus), at model.py:7",
    ):
        assert part in finding.evidence
    assert finding.data["first_step"] == 9
    assert finding.data["losses"] == [4.0, 9.0]


def test_an_invalid_operation_is_no_divergence_but_the_course_is_told():
    """A logarithm of 0 stays to blame where the loss had risen, and the evidence says that it had."""
    finding = judged(fault(), ROSE)
    assert finding.rule == "invalid-operation"
    assert "the loss was 2 in the first step and 4, 9 in the last ones" in finding.evidence
    assert "in the first step" not in judged(fault(), FELL).evidence


@pytest.mark.parametrize(
    ("node", "words"),
    [
        pytest.param("SqrtBackward0", "inside the root", id="root"),
        pytest.param("LogBackward0", "before the operation, not by torch.where behind it", id="logarithm"),
        pytest.param("DivBackward0", "before the operation, not by torch.where behind it", id="quotient"),
        pytest.param("PowBackward0", "clamp the base", id="power"),
        pytest.param("AcosBackward0", "open interval", id="inverse cosine"),
        pytest.param("LinalgEighBackward0", "distinct singular values", id="eigenvectors"),
        pytest.param("MineBackward", "look at the derivative of this line", id="own function"),
    ],
)
def test_a_bad_gradient_gets_the_advice_of_what_is_differentiated(node, words):
    """The node decides, whatever its backward pass computes."""
    origin = fault("div", node=node)
    (finding,) = traced_cause(Replayed(origin, "gradient", 0.5, "net.0.weight", 4), FELL)
    assert (finding.rule, finding.severity, finding.layer) == ("invalid-gradient", Severity.ERROR, "net.2")
    assert words in finding.advice
    assert f"{node}, backward of what ran in net.2 (Softplus), at model.py:7" in finding.evidence
    assert "the loss is 0.5 and finite; the gradients of 4 parameters are not" in finding.evidence


def test_a_bad_value_that_the_loss_masks_is_told_from_a_bad_derivative():
    """A forward operation behind bad gradients is named, with the word that something masks it."""
    (finding,) = traced_cause(Replayed(fault(), "gradient", 0.5, "net.0.weight", 4), FELL)
    assert finding.rule == "invalid-operation"
    assert "masks these values in the loss, but not in the gradients" in finding.evidence


@pytest.mark.parametrize(
    ("mixed", "rule"),
    [
        pytest.param("activation", "non-finite-target", id="target"),
        pytest.param("parameter", "non-finite-input", id="input"),
        pytest.param("", "non-finite-input", id="met neither"),
    ],
)
@pytest.mark.parametrize("history", [FELL, ROSE], ids=["healthy", "risen"])
def test_a_bad_sample_is_a_target_where_it_met_only_what_was_computed(mixed, rule, history):
    """Path, sample and outcome are told, and no learning rate is blamed for a sample."""
    finding = judged(replace(SAMPLE, mixed=mixed), history, without=True)
    assert (finding.rule, finding.layer, finding.data["index"]) == (rule, None, [2, 5])
    assert finding.evidence.startswith("batch[0], sample 2: 3 of 8 values are NaN, the first at index [2, 5]")
    assert finding.evidence.endswith("the loss is NaN; with zeros in their place the same step is finite")


@pytest.mark.parametrize("without", [None, False])
def test_a_step_is_called_finite_without_the_sample_only_where_that_was_seen(without):
    """Where zeros did not help, or were not tried, nothing is said of them."""
    assert "zeros" not in judged(SAMPLE, without=without).evidence


def test_all_bad_tensors_of_the_batch_that_are_to_blame_are_reported():
    """An input and a target that are both bad are two errors."""
    target = Outside("batch", "batch[1]", (0,), POSINF, mixed="activation")
    found = traced_cause(Replayed(SAMPLE, "loss", math.nan, more=(target,)), FELL)
    assert [(finding.rule, finding.severity.value) for finding in found] == [
        ("non-finite-input", "error"),
        ("non-finite-target", "error"),
    ]


def test_a_bad_sample_that_is_not_to_blame_is_a_note():
    """Beside the error on the operation the sample is an info."""
    found = traced_cause(Replayed(fault(), "loss", math.nan, also=(SAMPLE,)), FELL)
    assert [(finding.rule, finding.severity.value) for finding in found] == [
        ("invalid-operation", "error"),
        ("non-finite-input", "info"),
    ]


@pytest.mark.parametrize(
    ("kind", "path", "seen", "history", "rule"),
    [
        pytest.param("parameter", "net.0.weight", NAN, ROSE, "diverged-by-learning-rate", id="loss rose"),
        pytest.param("parameter", "net.0.weight", POSINF, GREW, "diverged-by-learning-rate", id="weights grew"),
        pytest.param("parameter", "net.0.weight", NAN, FELL, "non-finite-parameter", id="healthy before"),
        pytest.param("parameter", "net.0.weight", NAN, History(), "non-finite-parameter", id="first step"),
        pytest.param("buffer", "net.0.scale", NAN, ROSE, "non-finite-parameter", id="buffer"),
        pytest.param("buffer", "net.1.running_mean", NAN, ROSE, "poisoned-running-statistics", id="running mean"),
        pytest.param("buffer", "net.1.running_var", POSINF, FELL, "overflowed-running-statistics", id="running var"),
    ],
)
def test_what_the_model_held_is_named_by_what_it_is(kind, path, seen, history, rule):
    """A weight that a diverging run made bad is laid to the learning rate; buffers never are."""
    finding = judged(Outside(kind, path, (0,), seen), history)
    assert finding.rule == rule
    assert (path in finding.evidence) or finding.layer == path.rpartition(".")[0]


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(Replayed(), id="finite"),
        pytest.param(Replayed(None, "", 0.5), id="finite loss"),
        pytest.param(Replayed(None, "", 0.5, error="KeyError: 'x'"), id="an exception of another kind"),
        pytest.param(Replayed(Outside("batch", "batch[0]", (), NEGINF), "loss", math.nan), id="a mask"),
    ],
)
def test_a_replay_that_shows_no_cause_is_no_finding(seen):
    """Nothing is made up where nothing was seen."""
    assert traced_cause(seen, ROSE) == []


def test_a_cause_that_cannot_be_traced_is_said_as_far_as_it_is_known():
    """A bad loss and bad gradients are reported without an operation."""
    assert judged(None).rule == "non-finite-loss"
    (finding,) = traced_cause(Replayed(None, "gradient", 0.5, "net.0.weight", 4), FELL)
    assert (finding.rule, finding.layer) == ("invalid-gradient", "net.0")
    assert "detect_anomaly" in finding.advice


def test_an_exception_over_bad_values_is_told():
    """What the step ended in is part of the evidence."""
    (finding,) = traced_cause(Replayed(fault(), "exception", error="ValueError: no NaN, please"), FELL)
    assert "the step then ended in ValueError: no NaN, please" in finding.evidence


@pytest.mark.parametrize(
    ("after", "rule"),
    [
        pytest.param(FINE, None, id="finite"),
        pytest.param(NAN, "poisoned-running-statistics", id="NaN"),
        pytest.param(POSINF, "overflowed-running-statistics", id="overflow"),
        pytest.param(NEGINF, "overflowed-running-statistics", id="-inf"),
        pytest.param(NAN + POSINF, "poisoned-running-statistics", id="both"),
    ],
)
def test_running_statistics_are_judged_where_they_are_used(after, rule):
    """NaN is poison, infinity alone an overflow; in a layer that did not run neither is a finding."""
    rules = (poisoned_running_statistics, overflowed_running_statistics, statistics_fault)
    found = [finding for judge in rules if (finding := judge("norm", FINE, after, used=True))]
    assert [finding.rule for finding in found] == [rule] * 2 * (rule is not None)
    assert [judge("norm", FINE, after, used=False) for judge in rules] == [None] * 3


@pytest.mark.parametrize("after", [NAN, POSINF], ids=["NaN", "+inf"])
@pytest.mark.parametrize(
    ("before", "words"),
    [
        pytest.param(FINE, "they were finite before", id="new"),
        pytest.param(NAN, "they were not finite before either", id="inherited"),
    ],
)
def test_bad_statistics_say_whether_they_were_before(before, words, after):
    """What this pass did is told from what it inherited."""
    finding = statistics_fault("norm", before, after, used=True)
    assert finding.evidence.startswith(f"running mean and variance: {after.describe()}; {words}")
    assert finding.data["finite_before"] is before.is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("share", "warns"),
    [
        pytest.param(0.2499, False, id="below a quarter"),
        pytest.param(0.25, True, id="a quarter"),
        pytest.param(1.0, True, id="the end"),
        pytest.param(1.01, False, id="beyond the range"),
        pytest.param(0.0, False, id="zero"),
        pytest.param(math.inf, False, id="inf"),
        pytest.param(math.nan, False, id="NaN"),
    ],
)
def test_headroom_is_little_from_a_quarter_of_the_range_on(dtype, share, warns):
    """A finite value from 25 % to the end of its dtype's range is a warning, anything else is none."""
    finding = little_headroom("net.2", share * torch.finfo(dtype).max, dtype)
    assert (finding is not None) is warns
    assert finding is None or finding.severity is Severity.WARNING


def test_headroom_is_told_in_doublings():
    """A quarter of the range leaves two."""
    finding = little_headroom("net.2", 16376.0, torch.float16)
    assert finding.evidence.startswith("the largest |value| of its output is 1.638e+04, 25 % of the range of float16")
    assert finding.evidence.endswith("2.0 doublings are left")
    assert (finding.layer, finding.data["share"]) == ("net.2", 0.25)
