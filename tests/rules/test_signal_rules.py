# SPDX-License-Identifier: Apache-2.0
"""Vanishing, exploding, dead and saturated signals are said with their numbers; healthy ones and NaN are not."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
from torch import nn

from lightning_bn.findings import Severity
from lightning_bn.initialization import initialize
from lightning_bn.rules.dead_units import dead_units
from lightning_bn.rules.dropout_before_batchnorm import dropout_before_batchnorm
from lightning_bn.rules.exploding_signal import exploding_signal
from lightning_bn.rules.saturated_units import saturated_units
from lightning_bn.rules.vanishing_signal import vanishing_signal
from lightning_bn.rules.variance_below_epsilon import variance_below_epsilon

ODD = (math.nan, math.inf, -math.inf, -1.0)


def course(*stds):
    """Standard deviations by layer."""
    return {f"net.{place}": std for place, std in enumerate(stds)}


def chain(factor, layers=6, start=0.1):
    """A signal that changes by a factor per layer."""
    return course(*(start * factor**place for place in range(layers)))


def severity(finding):
    return finding and finding.severity


FOUND = [
    pytest.param(vanishing_signal(chain(0.08)), ("net.0", "net.5", "0.08 per layer over 6 layers"), id="vanishing"),
    pytest.param(
        vanishing_signal(chain(0.9), chain(0.08, 8)),
        ("from sample to sample", "0.08 per layer"),
        id="vanishing samples",
    ),
    pytest.param(exploding_signal(chain(8.0)), ("net.0", "net.5", "8 per layer over 6 layers"), id="exploding"),
    pytest.param(
        dead_units("act", 120, 128, 640, 0.1), ("120 of 128 units", "640 samples", "94%", "10% in the first"), id="dead"
    ),
    pytest.param(
        saturated_units("act", "tanh", 0.8, 3, 128, 640, None), ("80% of the values", "3 of 128 units"), id="saturated"
    ),
    pytest.param(
        variance_below_epsilon("bn", 1e-6, 1e-5, step=50), ("1e-06", "0.1 times its ε (1e-05)", "30.2%"), id="variance"
    ),
    pytest.param(variance_below_epsilon("bn", 0.0, 1e-5, step=50), ("constant", "variance 0"), id="no variance"),
    pytest.param(dropout_before_batchnorm("bn", "drop", 0.5), ("drop drops 50%", "2 times the variance"), id="dropout"),
]


@pytest.mark.parametrize(("finding", "parts"), FOUND)
def test_a_fault_is_a_warning_with_layer_numbers_and_one_action(finding, parts):
    """Evidence has the numbers and no advice; advice is one line; the data are plain."""
    assert finding.severity is Severity.WARNING
    assert finding.layer
    assert [part for part in parts if part not in finding.evidence] == []
    assert not set(finding.evidence.split()) & {"should", "must", "try", "consider"}
    assert finding.advice
    assert "." not in finding.advice.replace(finding.data.get("dropout", ""), "")
    assert json.loads(json.dumps(dict(finding.data))) == dict(finding.data)


@pytest.mark.parametrize(
    ("stds", "far"),
    [
        pytest.param(chain(0.08), "net.4", id="naive, five hidden layers"),
        pytest.param(chain(0.113), "net.5", id="naive, 256 wide"),
        pytest.param(chain(0.01), "net.3", id="as if by 30 per layer at most"),
        pytest.param(chain(0.3, 10), "net.8", id="slower and deeper"),
        pytest.param(course(5.0, 0.1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5), "net.6", id="after a rise"),
        pytest.param({**chain(0.08), "net.6": 0.0, "net.7": 0.0}, "net.4", id="underflow behind it"),
    ],
)
def test_a_signal_that_shrinks_ten_thousandfold_has_vanished(stds, far):
    """The first layer where it has happened is named."""
    assert vanishing_signal(stds).layer == far


@pytest.mark.parametrize(
    "stds",
    [
        pytest.param({}, id="no layers"),
        pytest.param(course(1.0), id="one layer"),
        pytest.param(course(1.0, 0.0), id="head from zero"),
        pytest.param(course(0.0, 0.0, 0.0), id="all exactly zero"),
        pytest.param(chain(0.08, 4), id="naive, three hidden layers, which trains"),
        pytest.param(chain(0.42, 10), id="PyTorch's start"),
        pytest.param(course(1.0, 1e-3, 1e-6, 1e-9, 0.9), id="a later layer recovers"),
        pytest.param(course(1.0, 1.1, 0.0, 0.9, 1.0, 0.0, 1.2), id="branches that close at zero"),
        pytest.param(course(1.0, 0.9, 1.0, 1e-5), id="small head"),
        pytest.param(course(1.0, 0.9, 1.0, 1e-4, 1e-5), id="low-rank update of the head"),
        pytest.param(course(1e6, 1.0, 1.0, 1.0, 0.5), id="large inputs, normalised"),
        pytest.param(chain(8.0), id="it grows"),
    ],
)
def test_a_signal_that_recovers_or_changes_once_has_not_vanished(stds):
    """A single small layer is no chain, and what a later layer brings back is not lost."""
    assert vanishing_signal(stds) is None
    assert vanishing_signal(stds, stds) is None


def test_biases_hide_a_loss_that_only_the_samples_show():
    """Whole tensors keep the spread of the biases; over the samples a millionfold fall is said, less is not."""
    assert vanishing_signal(chain(0.9, 12), chain(0.2, 12)).layer == "net.9"
    assert vanishing_signal(chain(0.9, 12), chain(0.4, 12)) is None
    assert vanishing_signal(chain(0.9, 12)) is None


@pytest.mark.parametrize(
    ("stds", "far"),
    [
        pytest.param(chain(5.7), "net.4", id="N(0, 1), 64 wide"),
        pytest.param(chain(8000.0), "net.3", id="N(0, 1000²)"),
        pytest.param(chain(1.9, 20), "net.11", id="slower and deeper"),
        pytest.param({**chain(8.0), "net.6": math.inf}, "net.4", id="overflow behind it"),
        pytest.param(chain(1.7, 23), "net.14", id="very deep"),
    ],
)
def test_a_signal_that_grows_a_thousandfold_explodes(stds, far):
    """Quick growth is said from a thousandfold on, slow growth from a hundred-thousandfold on."""
    assert exploding_signal(stds).layer == far


@pytest.mark.parametrize(
    "stds",
    [
        pytest.param({}, id="no layers"),
        pytest.param(course(1.0, 50.0), id="large logits"),
        pytest.param(chain(1.19, 48), id="24 residual blocks without norm"),
        pytest.param(chain(1.6, 20), id="slow and not deep"),
        pytest.param(course(1.0, 30.0, 900.0, 3e4, 1.0, 1.2), id="a later layer tames it"),
        pytest.param(course(1.0, 1.0, 1e9, 1e9), id="one step"),
        pytest.param(course(1e-6, 1.0, 1.0, 1.0), id="small inputs, normalised"),
        pytest.param(chain(0.08), id="it shrinks"),
    ],
)
def test_a_signal_that_is_tamed_or_grows_slowly_does_not_explode(stds):
    """Residual networks without norm, large logits and single steps are not spoken of."""
    assert exploding_signal(stds) is None


def test_a_signal_that_grew_by_learning_is_not_said_to_explode():
    """A regression to large targets grows layer by layer while it learns; a start that explodes is said later too."""
    assert exploding_signal(chain(8.0), chain(1.1)) is None
    assert exploding_signal(chain(8.0), chain(7.0)).layer == "net.4"
    assert exploding_signal(chain(1.1), chain(8.0)) is None


@pytest.mark.parametrize("judge", [vanishing_signal, exploding_signal])
@pytest.mark.parametrize("odd", [*ODD, 0.0])
def test_a_course_without_numbers_is_not_judged(judge, odd):
    """NaN, infinity and nonsense are left out and never raise."""
    assert judge(course(odd)) is None
    assert judge(course(*[odd] * 8)) is None
    assert judge(course(1.0, odd, 1.0, odd)) is None


@pytest.mark.parametrize(
    ("dead", "units", "samples", "first", "expected"),
    [
        pytest.param(109, 128, 512, 0.1, Severity.WARNING, id="died"),
        pytest.param(108, 128, 512, 0.1, Severity.INFO, id="below the warning"),
        pytest.param(65, 128, 512, 0.1, Severity.INFO, id="more than half"),
        pytest.param(64, 128, 512, 0.1, None, id="half"),
        pytest.param(109, 128, 511, 0.1, None, id="too few samples"),
        pytest.param(90, 128, 512, 0.51, None, id="at the start already"),
        pytest.param(112, 128, 512, 0.675, Severity.WARNING, id="risen by just enough"),
        pytest.param(109, 128, 512, None, None, id="first window"),
        pytest.param(116, 128, 512, None, Severity.WARNING, id="almost all from the start"),
        pytest.param(115, 128, 512, None, None, id="below almost all"),
        pytest.param(128, 128, 512, None, Severity.ERROR, id="all"),
        pytest.param(128, 128, 512, 1.0, Severity.ERROR, id="all, still"),
        pytest.param(7, 8, 512, 0.0, None, id="narrow"),
        pytest.param(8, 8, 512, 0.0, Severity.INFO, id="all of a narrow one"),
        pytest.param(1, 1, 512, None, Severity.INFO, id="all of one"),
        pytest.param(9, 9, 512, None, Severity.ERROR, id="all of nine"),
        pytest.param(51, 128, 1100, 0.3, None, id="He, 20 layers"),
        pytest.param(0, 128, 512, 0.0, None, id="none"),
        pytest.param(0, 0, 512, None, None, id="no units"),
        pytest.param(109, 128, 512, math.nan, None, id="unknown first"),
    ],
)
def test_dead_units_are_judged_by_share_rise_and_width(dead, units, samples, first, expected):
    """Above half a note and above 85 % a warning, if it rose, above 90 % in any case; all are an error, few a note."""
    assert severity(dead_units("act", dead, units, samples, first)) == expected


def test_advice_on_dead_units_depends_on_when_they_died():
    """Units that were dead from the start have their biases named, those that died the learning rate."""
    assert "biases" in dead_units("act", 128, 128, 512, None).advice
    assert "learning rate" in dead_units("act", 128, 128, 512, 0.1).advice


@pytest.mark.parametrize(
    ("kind", "share", "full", "samples", "first", "speaks"),
    [
        pytest.param("tanh", 0.65, 0, 64, None, True, id="tanh at first"),
        pytest.param("tanh", 0.64, 0, 64, None, False, id="tanh below"),
        pytest.param("sigmoid", 0.5, 0, 64, None, True, id="sigmoid at first"),
        pytest.param("sigmoid", 0.49, 0, 64, None, False, id="sigmoid below"),
        pytest.param("hardtanh", 0.8, 0, 64, None, True, id="hardtanh at first"),
        pytest.param("tanh", 0.8, 0, 31, None, False, id="too few samples"),
        pytest.param("tanh", 0.7, 0, 64, 0.8, True, id="still, from the start"),
        pytest.param("tanh", 0.6, 0, 64, 0.8, False, id="recovered"),
        pytest.param("tanh", 0.97, 20, 640, 0.0, False, id="steep after training"),
        pytest.param("sigmoid", 0.84, 55, 640, 0.0, False, id="binary code after training"),
        pytest.param("tanh", 1.0, 116, 512, 0.02, True, id="stuck after training"),
        pytest.param("tanh", 1.0, 115, 512, 0.02, False, id="units below"),
        pytest.param("tanh", 1.0, 128, 511, 0.02, False, id="too few samples for units"),
        pytest.param("relu", 1.0, 128, 512, None, False, id="another kind"),
        pytest.param("tanh", math.nan, 0, 512, None, False, id="NaN"),
    ],
)
def test_saturation_is_judged_by_values_at_first_and_by_units_later(kind, share, full, samples, first, speaks):
    """A start at the bounds is said; layers that became steep while they learned are not, those that are stuck are."""
    assert (saturated_units("act", kind, share, full, 128, samples, first) is not None) is speaks


@pytest.mark.parametrize("options", [{"last": True}, {"direct": False}], ids=["last", "gate"])
@pytest.mark.parametrize("first", [None, 0.0, 1.0])
def test_outputs_and_gates_may_saturate(options, first):
    """A trained binary classifier, a generator's tanh and a closed gate are not spoken of."""
    assert saturated_units("act", "sigmoid", 1.0, 64, 64, 640, first, **options) is None


@pytest.mark.parametrize(
    ("ratio", "step", "expected"),
    [
        pytest.param(10.0, 50, None, id="at ten times"),
        pytest.param(9.9, 50, Severity.INFO, id="below ten times"),
        pytest.param(1.0, 50, Severity.INFO, id="at epsilon"),
        pytest.param(0.99, 50, Severity.WARNING, id="below epsilon"),
        pytest.param(0.99, 49, Severity.INFO, id="early"),
        pytest.param(0.99, None, Severity.WARNING, id="step unknown"),
        pytest.param(0.0, 50, Severity.WARNING, id="constant"),
        pytest.param(0.0, 0, Severity.INFO, id="constant at first"),
        pytest.param(-1.0, 50, None, id="no variance"),
        pytest.param(math.nan, 50, None, id="NaN"),
        pytest.param(math.inf, 50, None, id="infinite"),
    ],
)
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_variance_is_judged_by_its_ratio_to_epsilon(ratio, step, expected, eps):
    """Below ten times epsilon is a note, below epsilon a warning once the first 50 steps are over."""
    assert severity(variance_below_epsilon("bn", ratio * eps, eps, step=step)) == expected


def test_constant_channels_of_the_data_are_a_note():
    """Sparse features are constant in many a batch; a variance that is small throughout is still a warning."""
    assert severity(variance_below_epsilon("bn", 0.0, 1e-5, step=50, data=True)) is Severity.INFO
    assert severity(variance_below_epsilon("bn", 1e-9, 1e-5, step=50, data=True)) is Severity.WARNING


@pytest.mark.parametrize("eps", [0.0, math.nan])
def test_without_an_epsilon_nothing_is_said(eps):
    """An epsilon of 0 has no variance below it."""
    assert variance_below_epsilon("bn", 0.0, eps, step=100) is None


@pytest.mark.parametrize(
    ("p", "speaks"),
    [(0.0, False), (0.3, False), (0.4, False), (0.5, True), (0.9, True), (1.0, False), (math.nan, False)],
)
def test_dropout_in_front_of_batchnorm_is_said_from_a_half_on(p, speaks):
    """A rate of 0.3 is a control, 0.5 is a fault, and a rate of 1 leaves no variance at all."""
    assert (dropout_before_batchnorm("bn", "drop", p) is not None) is speaks


def test_odd_numbers_never_raise():
    """No rule raises or speaks for NaN, infinity or negative numbers."""
    for a, b in product(ODD, ODD):
        assert dead_units("act", 128, 128, -1, a) is None
        assert saturated_units("act", "tanh", math.nan if a < 0 else -1.0, 0, 8, 512, None) is None
        assert variance_below_epsilon("bn", math.nan, b, step=100) is None
        assert dropout_before_batchnorm("bn", "drop", a if a != b else math.nan) is None


@torch.no_grad()
def measured(scheme, depth):
    """Standard deviations over whole tensors and over samples, of a perceptron without norm."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(128, 128), nn.ReLU())))
    initialize(model, scheme)
    x, stds, varied = torch.randn(512, 128), {}, {}
    for name, layer in model.named_children():
        x = layer(x)
        if isinstance(layer, nn.Linear):
            stds[name] = x.std(correction=0).item()
            varied[name] = x.var(0, correction=0).mean().sqrt().item()
    return stds, varied


@pytest.mark.parametrize(
    ("scheme", "depth", "vanishes", "explodes"),
    [
        pytest.param("he", 20, False, False, id="He, 20"),
        pytest.param("pytorch", 10, False, False, id="PyTorch, 10"),
        pytest.param("pytorch", 20, True, False, id="PyTorch, 20"),
        pytest.param("naive", 6, True, False, id="naive, 6"),
        pytest.param("naive", 20, True, False, id="naive, 20"),
        pytest.param(1.0, 6, False, True, id="N(0, 1), 6"),
        pytest.param(1.0, 20, False, True, id="N(0, 1), 20"),
    ],
)
def test_networks_without_norm_are_judged_by_their_start(scheme, depth, vanishes, explodes):
    """Starts that are known to work are not spoken of, and those that are known to fail are."""
    stds, varied = measured(scheme, depth)
    assert (vanishing_signal(stds, varied) is not None) is vanishes
    assert (exploding_signal(stds) is not None) is explodes
