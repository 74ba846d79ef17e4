# SPDX-License-Identifier: Apache-2.0
"""Gradients that fade, grow or are missing, and steps that are too small or too large, are said; usual ones are not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_bn.demo import DigitsMLP, DigitsResNet
from lightning_bn.findings import Severity
from lightning_bn.initialization import initialize
from lightning_bn.rules.exploding_gradient import EVEN, GREW, LAYERS, exploding_gradient
from lightning_bn.rules.huge_updates import huge_updates
from lightning_bn.rules.no_gradient import no_gradient
from lightning_bn.rules.tiny_updates import tiny_updates
from lightning_bn.rules.vanishing_gradient import FADED, Weight, front_share, parts, vanishing_gradient

SHAPE = (64, 64)
USUAL = Weight(SHAPE, weight=8.0, gradient=0.1, update=0.008, lr=1e-3, largest_lr=1e-3)
SLOPES = (math.nan, math.inf, -math.inf)
LARGE = replace(USUAL, weight=8000.0, update=0.008)
JUMP = replace(USUAL, weight=8.0, update=16.0)


def chain(gradients, row=USUAL, bias=0.1):
    """A step of weights one behind the other, and the bias of the last one."""
    step = {f"net.{place}.weight": replace(row, gradient=slope) for place, slope in enumerate(gradients)}
    return {**step, "net.head.bias": replace(row, shape=(10,), gradient=bias)}


def fading(share, layers=8):
    """Gradients that fade to a share of the largest over the layers."""
    return chain([0.1 * share ** ((layers - 1 - place) / (layers - 1)) for place in range(layers)])


def growing(factor, layers=LAYERS):
    """Gradients that grow by a factor from the last layer to the first."""
    return chain([factor ** ((layers - 1 - place) / (layers - 1)) for place in range(layers)], bias=0.1)


FADING, GROWING = [fading(1e-8)] * 2, [growing(2 * GREW)]
CUT = {**chain([None] * 4), "tail.weight": USUAL}
SHUT = chain([0.0] * 4)
FOUND = {
    "vanishing": vanishing_gradient(FADING),
    "exploding": exploding_gradient(GROWING),
    "cut": no_gradient([CUT] * 3, {"net.0", "net.1", "net.2", "net.3"}, set()),
    "zero": no_gradient([SHUT] * 3),
    "large weights": tiny_updates([chain([0.1] * 4, LARGE)] * 2),
    "low rate": tiny_updates([chain([0.1] * 4, replace(USUAL, update=1e-9, lr=1e-9, largest_lr=1e-9))] * 2),
    "huge": huge_updates([chain([0.1] * 4, JUMP)]),
}
RULES = (vanishing_gradient, exploding_gradient, no_gradient, tiny_updates, huge_updates)


@pytest.mark.parametrize("name", FOUND)
def test_a_fault_is_a_warning_with_numbers_and_an_action(name):
    """Each fault is found, its evidence has digits, its advice is one phrase, and its data are plain."""
    finding = FOUND[name]
    assert finding.severity is Severity.WARNING
    assert any(sign.isdigit() for sign in finding.evidence)
    assert finding.advice
    assert not finding.advice.endswith(".")
    assert ". " not in finding.advice
    assert json.loads(json.dumps(dict(finding.data))) == dict(finding.data)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_usual_steps_are_silent(rule):
    """Even gradients and relative steps of a thousandth are no finding, however many due steps there are."""
    assert [rule([chain([0.1] * 20)] * number) for number in range(6)] == [None] * 6


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("field", ["weight", "gradient", "update", "lr", "largest_lr"])
@pytest.mark.parametrize("value", [*SLOPES, 0.0])
def test_what_was_not_measured_never_raises_nor_speaks(rule, field, value):
    """NaN, infinity or zero in all weights of all steps, in any field, is survived, and zeros alone are no fade."""
    finding = rule([chain([0.1] * 20, replace(USUAL, **{field: value}))] * 5)
    assert finding is None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("steps", [[], [{}], [{}] * 5], ids=["no step", "an empty step", "empty steps"])
def test_nothing_is_said_of_nothing(rule, steps):
    """Without steps, or without parameters in them, nothing is found."""
    assert rule(steps) is None


@pytest.mark.parametrize("value", SLOPES)
def test_a_gradient_that_is_not_finite_hides_no_fade(value):
    """Of single parameters that are not finite the rule knows nothing, and judges the others."""
    steps = [{**step, "net.3.weight": replace(USUAL, gradient=value)} for step in FADING]
    assert vanishing_gradient(steps).layer == "net.0"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_missing_gradients_are_survived(rule):
    """Parameters that have no gradient at all are no reason to raise, in any rule."""
    assert rule([chain([None] * 20, bias=None)] * 5) is None


@pytest.mark.parametrize(
    ("share", "steps", "speaks"),
    [
        pytest.param(1e-8, 2, True, id="faded"),
        pytest.param(1e-8, 1, False, id="faded in one due step"),
        pytest.param(FADED**2, 2, True, id="beyond the threshold"),
        pytest.param(FADED, 2, False, id="the second layer has more"),
        pytest.param(0.1, 2, False, id="healthy"),
    ],
)
def test_a_fade_is_judged_by_the_first_quarter_of_the_weights(share, steps, speaks):
    """The largest gradient of the first two of eight layers must be below the threshold, in two due steps."""
    assert (vanishing_gradient([fading(share)] * steps) is not None) is speaks


@pytest.mark.parametrize(("share", "speaks"), [(FADED * 0.999, True), (FADED * 1.001, False)])
def test_the_threshold_of_a_fade_is_sharp(share, speaks):
    """A share of just the threshold is what decides."""
    steps = [chain([0.1 * share] * 2 + [0.1] * 6)] * 2
    assert (vanishing_gradient(steps) is not None) is speaks


def test_a_fade_that_ended_goes_unsaid():
    """The newest due steps count: a network that has recovered is not spoken of."""
    assert vanishing_gradient([fading(1e-8), fading(1e-8), fading(0.1)]) is None


def test_a_fade_into_zero_is_a_fade():
    """Zeros in front of next to nothing are a gradient that went on fading, for both rules that could speak."""
    steps = [chain([0.0] * 4 + [1e-20, 1e-15, 1e-10, 1e-5])] * 5
    assert vanishing_gradient(steps).data["first"] == 0
    assert no_gradient(steps) is None


def test_zeros_in_front_of_usual_gradients_are_no_fade():
    """Behind what starts at zero there is no gradient, and the layers after it have a usual one."""
    assert vanishing_gradient([chain([0.0] * 6 + [0.1] * 2)] * 2) is None


def test_a_fade_names_the_first_layer_and_both_gradients():
    """Layer, share and the two norms are told."""
    finding = FOUND["vanishing"]
    assert finding.layer == "net.0"
    assert "first 2 of 8" in finding.evidence
    assert "1e-09 in net.0.weight, 0.1 in net.7.weight" in finding.evidence
    assert finding.data["largest_in"] == "net.7.weight"


def test_parts_side_by_side_are_judged_apart():
    """A critic with gradients of a thousand does not make those of an actor small, and a fade in one part is found."""
    actor = {f"model.actor.{name}": row for name, row in chain([0.01] * 4).items()}
    critic = {f"model.critic.{name}": replace(row, gradient=1e3) for name, row in chain([0.1] * 4).items()}
    faded = {f"model.critic.{name}": row for name, row in fading(1e-12).items()}
    assert vanishing_gradient([actor | critic] * 2) is None
    assert vanishing_gradient([actor | faded] * 2).layer == "model.critic.net.0"


def test_layers_that_differ_in_a_number_are_one_part():
    """``fc1`` to ``fc5`` and a head belong together, as do the entries of a sequence; three weights are too few."""
    rows = {f"fc{place}.weight": USUAL for place in range(1, 6)} | {"head.weight": USUAL}
    assert [len(part) for part in parts(rows)] == [6]
    assert [len(part) for part in parts({f"net.{place}.weight": USUAL for place in range(5)})] == [5]
    assert parts({f"net.{place}.weight": USUAL for place in range(3)}) == []
    assert math.isnan(front_share({"weight": USUAL}))


@pytest.mark.parametrize(
    ("step", "speaks"),
    [
        pytest.param(growing(GREW * 1.01), True, id="just above"),
        pytest.param(growing(GREW * 0.99), False, id="just below"),
        pytest.param(growing(1e9, LAYERS - 1), False, id="too few layers"),
        pytest.param(growing(1e-9), False, id="fades"),
        pytest.param(chain([1e9] + [1.0] * 11), False, id="one layer stands out"),
        pytest.param(chain([1e9] * 6 + [1.0] * 6), False, id="two parts of their own"),
        pytest.param(growing(1e300, 50), True, id="beyond float32"),
    ],
)
def test_an_explosion_is_growth_over_many_layers(step, speaks):
    """Eight weights of one shape must follow a line that rises towards the input by the threshold."""
    assert (exploding_gradient([step]) is not None) is speaks


def test_an_explosion_does_not_depend_on_the_scale_of_weights_behind_a_norm():
    """A weight that grew has a smaller gradient there, and the product of both stays the same."""
    step = growing(2 * GREW)
    scaled = {
        name: replace(row, weight=row.weight * 10**place, gradient=row.gradient / 10**place)
        for place, (name, row) in enumerate(step.items())
    }
    assert exploding_gradient([scaled]).data["growth"] == pytest.approx(2 * GREW)


def test_an_explosion_names_the_ends_and_the_factor_of_a_layer():
    """First layer, number of layers, total and factor for each are told."""
    finding = exploding_gradient([growing(1e4, 49)])
    assert finding.layer == "net.0"
    assert "over 49 weights of shape 64 x 64 the gradient grows 1e+04 times from net.48.weight" in finding.evidence
    assert "1.21 times a layer" in finding.evidence
    assert 0 < EVEN < 1


@pytest.mark.parametrize(
    ("called", "heard", "words", "severity"),
    [
        pytest.param({"net.0"}, {"net.0"}, "the loss does not depend on them", Severity.WARNING, id="cut off"),
        pytest.param(set(), {"net.0"}, "under no_grad alone", Severity.INFO, id="no_grad"),
        pytest.param(set(), set(), "did not run", Severity.INFO, id="unused"),
        pytest.param(set(), None, "did not run", Severity.INFO, id="unused, no_grad not known"),
        pytest.param(None, None, "is not known", Severity.INFO, id="not known"),
    ],
)
def test_a_missing_gradient_is_judged_by_whether_its_layer_ran(called, heard, words, severity):
    """A layer that ran with gradients recorded is cut off; one that did not run, or not so, is a note."""
    finding = no_gradient([chain([None, 0.1, 0.1])] * 3, called, heard)
    assert words in finding.evidence
    assert finding.severity is severity
    assert (severity is Severity.WARNING) == bool(finding.advice)
    assert finding.layer == "net.0"


@pytest.mark.parametrize(("steps", "speaks"), [(2, False), (3, True)])
def test_a_gradient_must_be_missing_in_three_steps(steps, speaks):
    """What starts at zero leaves the weights behind it without a gradient for two steps at most."""
    assert (no_gradient([SHUT] * steps) is not None) is speaks


@pytest.mark.parametrize("late", [0.1, math.nan])
def test_a_gradient_once_is_enough(late):
    """Parameters that had one in one of the due steps, or of which it is not known, are not spoken of."""
    assert no_gradient([SHUT, SHUT, SHUT, chain([late] * 4)]) is None


def test_steps_that_changed_nothing_do_not_count():
    """Under a loss scale that is too large, or a rate of 0, what starts at zero stays there."""
    skipped = {name: replace(row, update=0.0) for name, row in SHUT.items()}
    assert no_gradient([skipped] * 4 + [SHUT]) is None


@pytest.mark.parametrize(
    ("gradients", "severity"),
    [
        pytest.param([0.0] * 4, Severity.WARNING, id="all"),
        pytest.param([0.0, 0.1, 0.1, 0.1, 0.1], Severity.WARNING, id="the first"),
        pytest.param([0.1, 0.0, 0.0, 0.1], Severity.WARNING, id="half"),
        pytest.param([0.1, 0.1, 0.0, 0.1], Severity.INFO, id="one behind the first"),
    ],
)
def test_zeros_are_a_fault_where_they_block_the_way_to_the_input(gradients, severity):
    """Zeros that begin with the first weight, or make up half, are a warning; a branch at rest is a note."""
    assert no_gradient([chain(gradients)] * 3).severity is severity


def test_a_bias_without_a_gradient_is_no_reason_by_itself():
    """In front of a norm it has none that matters, and keys of attention need none; beside weights it is counted."""
    assert no_gradient([chain([0.1] * 4, bias=0.0)] * 3) is None
    assert no_gradient([{**SHUT, "net.0.bias": replace(USUAL, shape=(64,), gradient=0.0)}] * 3).evidence.startswith(
        "5 of 6 parameters"
    )


def test_where_nothing_has_a_gradient_nothing_is_said():
    """A loss that reaches no parameter at all raises in torch, or was not measured."""
    assert no_gradient([chain([None] * 4, bias=None)] * 3, {"net.0"}, {"net.0"}) is None
    assert no_gradient([chain([0.0] * 4, bias=0.0)] * 3) is None


def test_a_copy_that_is_detached_is_a_note():
    """A target network has the shapes of the part that learns; layers that differ in a number alone are no copies."""
    online = {f"model.online.{name}": row for name, row in chain([0.1] * 3).items()}
    target = {f"model.target.{name}": row for name, row in chain([None] * 3, bias=None).items()}
    ran = {f"model.target.net.{place}" for place in (0, 1, 2, "head")}
    assert no_gradient([online | target] * 3, ran, ran).severity is Severity.INFO
    blocks = {
        name.replace("target", "block1").replace("online", "block2"): row for name, row in (target | online).items()
    }
    ran = {layer.replace("target", "block1") for layer in ran}
    assert no_gradient([blocks] * 3, ran, ran).severity is Severity.WARNING


def test_missing_gradients_are_one_finding_with_the_first_names():
    """Three names and how many more there are; all are in the data."""
    finding = no_gradient([chain([None] * 5 + [0.1])] * 4, {f"net.{place}" for place in range(5)})
    assert finding.evidence.startswith(
        "5 of 7 parameters that the optimizer holds had no gradient in 4 due steps in a row: "
        "5 (net.0.weight, net.1.weight, net.2.weight, and 2 more)"
    )
    assert len(finding.data["cut"]) == 5


@pytest.mark.parametrize(
    ("change", "steps", "speaks"),
    [
        pytest.param({}, 2, True, id="weights of a thousand"),
        pytest.param({}, 1, False, id="one due step"),
        pytest.param({"weight": 700.0}, 2, False, id="weights below 100 for each unit"),
        pytest.param({"update": 0.2}, 2, False, id="a step that counts"),
        pytest.param({"largest_lr": 0.011}, 2, False, id="the end of a schedule"),
        pytest.param({"update": 0.0}, 2, False, id="a step that was skipped"),
        pytest.param({"lr": math.nan}, 2, True, id="a rate that is not known"),
    ],
)
def test_tiny_steps_are_laid_to_large_weights(change, steps, speaks):
    """Both the relative step and the size of the weights must say so, at a rate near its largest."""
    assert (tiny_updates([chain([0.1] * 4, replace(LARGE, **change))] * steps) is not None) is speaks


@pytest.mark.parametrize(
    ("rates", "speaks"),
    [
        pytest.param((1e-9, 1e-9), True, id="a rate that stays"),
        pytest.param((1e-9, 2e-9), False, id="a rate that rises"),
        pytest.param((2e-7, 2e-7), False, id="a rate for fine-tuning"),
    ],
)
def test_tiny_steps_are_laid_to_the_learning_rate(rates, speaks):
    """A rate of at most 1e-7 that does not rise is told; what is being warmed up or looked for is not."""
    steps = [chain([0.1] * 4, replace(USUAL, update=1e-8, lr=rate, largest_lr=rate)) for rate in rates]
    assert (tiny_updates(steps) is not None) is speaks


def test_tiny_steps_of_weights_of_a_usual_size_are_silent():
    """A network that has learned, or is fine-tuned by SGD, has them too."""
    assert tiny_updates([chain([1e-7] * 4, replace(USUAL, update=1e-8))] * 5) is None


@pytest.mark.parametrize(
    ("change", "speaks"),
    [
        pytest.param({}, True, id="a step of twice the weight"),
        pytest.param({"update": 7.9}, False, id="less than the weight"),
        pytest.param({"weight": 0.1, "update": 1.0}, False, id="small weights"),
        pytest.param({"update": 11.9}, False, id="just below 1.5 for each unit"),
        pytest.param({"update": 12.1}, True, id="just above"),
    ],
)
def test_huge_steps_are_huge_for_the_weight_and_for_the_unit(change, speaks):
    """Weights that start at next to nothing take large relative steps, and are not spoken of."""
    assert (huge_updates([chain([0.1] * 4, replace(JUMP, **change))]) is not None) is speaks


def test_a_rate_that_rises_is_not_judged():
    """A learning rate finder ends in steps that are too large, on purpose."""
    steps = [chain([0.1] * 4, replace(JUMP, lr=rate)) for rate in (0.5, 0.6)]
    assert huge_updates(steps) is None
    assert huge_updates(steps[::-1]) is not None


def measured(model, loss_scale=1.0, steps=3, lr=1e-3):
    """A few steps of Adam on noise, as the rules see them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    seen = []
    for _ in range(steps):
        x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
        optimizer.zero_grad()
        (loss_scale * nn.functional.cross_entropy(model(x), y)).backward()
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        optimizer.step()
        seen.append(
            {
                name: Weight(
                    tuple(weight.shape),
                    before[name].norm().item(),
                    None if weight.grad is None else weight.grad.norm().item(),
                    (weight.detach() - before[name]).norm().item(),
                    lr,
                    lr,
                )
                for name, weight in model.named_parameters()
            }
        )
    return seen


def spoken(seen):
    """The slugs of what the rules say."""
    return {finding.rule for finding in (rule(seen) for rule in RULES) if finding}


def filled(build, norm, depth, scheme):
    """A demo network from a scheme."""
    torch.manual_seed(0)
    model = build(norm, depth=depth)
    initialize(model, scheme, seed=0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1024.0], ids=["loss", "scaled loss"])
@pytest.mark.parametrize(
    ("norm", "depth", "scheme", "rule"),
    [
        pytest.param("none", 20, "naive", "vanishing-gradient", id="naive"),
        pytest.param("batch", 50, "he", "exploding-gradient", id="deep BatchNorm"),
        pytest.param("batch", 5, 1000.0, "tiny-updates", id="huge weights"),
        pytest.param("batch", 20, "he", None, id="healthy, BatchNorm"),
        pytest.param("none", 20, "he", None, id="healthy, He"),
        pytest.param("batch", 5, "naive", None, id="healthy, naive with BatchNorm"),
    ],
)
def test_networks_are_found_by_their_fault(norm, depth, scheme, rule, scale):
    """The first steps of sick perceptrons name their fault and no other, and healthy ones none, at any loss scale."""
    assert spoken(measured(filled(DigitsMLP, norm, depth, scheme), scale)) == ({rule} if rule else set())


@pytest.mark.slow
def test_residual_closing_norms_of_zero_are_silent():
    """Convolutions of branches that start at zero have no gradient in the first step, and one from then on."""
    model = filled(DigitsResNet, "batch", 3, "he")
    initialize(model, "he", seed=0, zero_init_residual=True)
    assert spoken(measured(model, steps=5)) == set()


@pytest.mark.slow
def test_affine_parameters_of_zero_everywhere_are_found():
    """γ = β = 0 in a plain network leaves the bias of the head alone with a gradient."""
    model = filled(DigitsMLP, "batch", 5, "he")
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.zeros_(layer.weight)
    assert spoken(measured(model)) == {"no-gradient"}
