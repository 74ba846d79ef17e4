# SPDX-License-Identifier: Apache-2.0
"""What is said before training is what happens: where a forward pass overflows, which losses are cross-entropies."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from lightning.pytorch import Callback
from specimens import Healthy, NoHostRead, loader
from torch import nn

from lightning_bn.demo import DigitsData
from lightning_bn.outlook import Stage, cross_entropy_start, predicted_overflow

WIDTH = 128
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def plain(std, depth=60):
    """Linear layers of width 128 behind 64 inputs, with ReLU between them, drawn from N(0, std²): closed form."""
    return [Stage(f"net.{k}", std * math.sqrt(WIDTH / 2 if k else 64), resets=False) for k in range(depth)]


@pytest.fixture(scope="module")
def digits():
    data = DigitsData()
    data.setup("fit")
    return data.train_set.tensors[0][:64].flatten(1)


def first_overflow(x, std, dtype, seed, depth=60):
    """The first linear layer of a real forward pass whose output is not finite, counted from 1."""
    generator, x = torch.Generator().manual_seed(seed), x.to(dtype)
    for place in range(1, depth + 1):
        weight = torch.empty(WIDTH, x.shape[1]).normal_(0, std, generator=generator)
        z = F.linear(x, weight.to(dtype))
        if not z.isfinite().all():
            return place
        x = z.relu()
    return None


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("std", [1000.0, 50.0], ids=["N(0, 1000²)", "N(0, 50²)"])
def test_an_overflow_is_predicted_for_the_layer_in_which_it_happens(digits, std, dtype):
    """The layer and its place are those at which real forward passes of several seeds stop being finite."""
    ahead = predicted_overflow(plain(std), dtype)
    assert {first_overflow(digits, std, dtype, seed) for seed in range(4)} == {ahead.place}
    assert (ahead.layer, ahead.of, ahead.dtype, ahead.kind) == (f"net.{ahead.place - 1}", 60, dtype, "value")


@pytest.mark.parametrize(("dtype", "off"), [pytest.param(F16, 0, id="float16"), pytest.param(F32, 1, id="float32")])
def test_chance_adds_up_over_depth_to_one_layer_at_most(digits, dtype, off):
    """N(0, 1), where each layer multiplies by 8 only: exact in layer 5, and within one layer of 42 after 40 layers."""
    place = predicted_overflow(plain(1.0), dtype).place
    seen = [first_overflow(digits, 1.0, dtype, seed) for seed in range(16)]
    assert max(abs(place - there) for there in seen) == off


@pytest.mark.parametrize(
    ("std", "dtype", "place"),
    [
        pytest.param(1000.0, F32, 10, id="1000, float32"),
        pytest.param(1000.0, F16, 2, id="1000, float16"),
        pytest.param(1.0, F16, 5, id="1, float16"),
        pytest.param(math.sqrt(2 / WIDTH), F16, None, id="He"),
        pytest.param(0.01, F16, None, id="naive"),
    ],
)
def test_the_table_of_starts(std, dtype, place):
    """Which starts of a perceptron of width 128 overflow, and where."""
    ahead = predicted_overflow(plain(std), dtype)
    assert (ahead and ahead.place) == place


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
def test_logarithms_give_what_exact_fractions_give(dtype):
    """Random layers, multiplied up as fractions without rounding, overflow where they are said to."""
    rng = random.Random(0)
    for _ in range(20):
        growths = [Fraction(rng.randint(1, 10**6), 100) for _ in range(200)]
        rms, exact = Fraction(1), None
        for place, growth in enumerate(growths, start=1):
            rms *= growth
            if rms * 9 / 2 > torch.finfo(dtype).max:
                exact = place
                break
        ahead = predicted_overflow([Stage("", float(growth), resets=False) for growth in growths], dtype)
        assert ahead.place == exact
        # log10 of a fraction that may be beyond float64's range
        assert ahead.log10_rms == pytest.approx(math.log10(rms.numerator) - math.log10(rms.denominator))


def test_input_and_peak_count_as_factors():
    """An input a hundred times as large, or a peak, moves the prediction from layer 2 to layer 1."""
    assert predicted_overflow(plain(1000.0), F16, input_rms=100.0).place == 1
    assert predicted_overflow(plain(1000.0), F16, peak=100.0).place == 1


def test_a_norm_sets_the_signal_back():
    """N(0, 1000²) before a norm in every layer is finite at any depth in float32."""
    stages = [each for stage in plain(1000.0) for each in (stage, Stage("norm", 1.0, resets=True, is_norm=True))]
    assert predicted_overflow(stages, F32) is None


@pytest.mark.parametrize(("fan_in", "place"), [pytest.param(128, None, id="narrow"), pytest.param(2048, 1, id="wide")])
def test_in_float16_a_wide_layer_overflows_before_its_norm_can_act(fan_in, place):
    """N(0, 1000²) leaves float16 in the layer itself from a fan-in of some hundreds on, as a real layer does."""
    stages = [Stage("fc", 1000 * math.sqrt(fan_in), resets=False), Stage("norm", 1.0, resets=True, is_norm=True)]
    ahead = predicted_overflow(stages, F16)
    z = F.linear(torch.randn(64, fan_in).half(), (torch.randn(WIDTH, fan_in) * 1000).half())
    assert ((ahead and ahead.place), bool(z.isfinite().all())) == (place, place is None)


@pytest.mark.parametrize("std", [1e16, 1e19], ids=["healthy twin", "sick"])
def test_a_variance_that_overflows_in_a_norm_is_predicted(digits, std):
    """BatchNorm puts out β alone and keeps an infinite variance exactly where the prediction says so."""
    net = nn.Sequential(nn.Linear(64, WIDTH, bias=False), nn.BatchNorm1d(WIDTH))
    nn.init.normal_(net[0].weight, 0, std)
    nn.init.constant_(net[1].bias, 0.25)
    constant = bool((net(digits) == 0.25).all())
    ahead = predicted_overflow([Stage("0", 8 * std, resets=False), Stage("1", 1.0, resets=True, is_norm=True)], F32)
    assert constant == bool(net[1].running_var.isinf().all()) == (ahead is not None) == (std == 1e19)
    assert ahead is None or (ahead.layer, ahead.place, ahead.of, ahead.kind) == ("1", 1, 1, "variance")


@pytest.mark.parametrize(
    ("dtype", "is_norm", "kind"),
    [
        pytest.param(BF16, True, "variance", id="a norm under bfloat16 computes in float32"),
        pytest.param(F64, True, None, id="float64 has room"),
        pytest.param(BF16, False, None, id="tanh computes no variance"),
    ],
)
def test_only_a_norm_squares_what_it_gets(dtype, is_norm, kind):
    """A signal of 10^20 is harmless before a bounded nonlinearity, and in float64."""
    stages = [Stage("fc", 1e20, resets=False), Stage("then", 1.0, resets=True, is_norm=is_norm)]
    ahead = predicted_overflow(stages, dtype)
    assert (ahead and ahead.kind) == kind


@pytest.mark.parametrize("growth", [0.0, math.nan], ids=["zero weights", "NaN"])
def test_a_growth_that_says_nothing_predicts_nothing(growth):
    """Behind weights that are 0 there is no signal; behind NaN there is nothing to predict."""
    assert predicted_overflow([Stage("a", growth, resets=False), Stage("b", 1e9, resets=False)], F16) is None


LABELS, IMAGE_LABELS = torch.tensor([0, 2, 1, 3]), torch.tensor([[[0, 1], [2, 3]]])
SHARES = torch.full((4, 5), 0.2)
WEIGHTS = torch.tensor([0.1, 2.0, 3.0, 0.5, 7.0])


def zeros(*shape):
    """Logits of equal probabilities, with a graph."""
    return torch.zeros(*shape, requires_grad=True) * 1.0


CROSS_ENTROPIES = [
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS), 5, id="(N, C)"),
    pytest.param(lambda: nn.CrossEntropyLoss()(zeros(4, 5), LABELS), 5, id="module"),
    pytest.param(lambda: F.cross_entropy(zeros(5), LABELS[0]), 5, id="(C,)"),
    pytest.param(lambda: F.cross_entropy(zeros(1, 5, 4), LABELS[None]), 5, id="(N, C, L)"),
    pytest.param(lambda: F.cross_entropy(zeros(1, 5, 2, 2), IMAGE_LABELS), 5, id="(N, C, H, W)"),
    pytest.param(lambda: F.cross_entropy(zeros(1, 5, 2, 2, 1), IMAGE_LABELS[..., None]), 5, id="(N, C, D, H, W)"),
    pytest.param(lambda: F.nll_loss(F.log_softmax(zeros(4, 5), 1), LABELS), 5, id="log_softmax, nll_loss"),
    pytest.param(lambda: F.nll_loss(F.log_softmax(zeros(4, 5), -1), LABELS), 5, id="dim=-1"),
    pytest.param(lambda: F.nll_loss(F.log_softmax(zeros(1, 5, 4), -2), LABELS[None]), 5, id="dim=-2"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS, weight=WEIGHTS), 5, id="class weights"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS, ignore_index=2), 5, id="ignore_index"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5).bfloat16().float(), LABELS), 5, id="cast logits"),
    pytest.param(lambda: F.binary_cross_entropy_with_logits(zeros(4, 5), SHARES), 2, id="binary"),
]
OTHERS = [
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS, label_smoothing=0.1), id="smoothed labels"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), SHARES), id="class probabilities"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS, reduction="sum"), id="sum"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS, reduction="none"), id="one for each sample"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS) + F.mse_loss(zeros(4), LABELS.float()), id="two added"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS) / 4, id="divided by the user"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS) * zeros(1).exp().sum(), id="learned factor"),
    pytest.param(lambda: F.nll_loss(F.log_softmax(zeros(4, 5), 0), LABELS), id="over samples, not classes"),
    pytest.param(lambda: F.nll_loss(zeros(4, 5), LABELS), id="no softmax"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 1), LABELS * 0), id="one class"),
    pytest.param(lambda: F.mse_loss(zeros(4), LABELS.float()), id="squared error"),
    pytest.param(lambda: F.binary_cross_entropy_with_logits(zeros(4, 5), SHARES, pos_weight=WEIGHTS), id="pos_weight"),
    pytest.param(lambda: F.binary_cross_entropy_with_logits(zeros(4, 5), SHARES, weight=WEIGHTS), id="binary weight"),
    pytest.param(lambda: F.binary_cross_entropy_with_logits(zeros(4, 5), SHARES, reduction="sum"), id="binary sum"),
    pytest.param(lambda: F.cross_entropy(torch.zeros(4, 5), LABELS), id="no graph"),
    pytest.param(lambda: F.cross_entropy(zeros(4, 5), LABELS).detach(), id="detached"),
]


@pytest.mark.parametrize(("build", "classes"), CROSS_ENTROPIES)
def test_a_mean_cross_entropy_is_recognised(build, classes):
    """Whatever its shape and weights: equal probabilities, which all of these have, give exactly what is expected."""
    start = cross_entropy_start(build())
    assert start.classes == classes
    assert start.expected == pytest.approx(math.log(classes))
    assert start.loss.item() == pytest.approx(start.expected, rel=1e-6)
    assert not start.loss.requires_grad


@pytest.mark.parametrize("build", OTHERS)
def test_any_other_loss_is_not_assessed(build):
    """Equal probabilities give another value than ln C there, or nobody can tell: no claim is made."""
    assert cross_entropy_start(build()) is None


@pytest.mark.parametrize(("build", "classes"), CROSS_ENTROPIES)
def test_the_factors_that_were_announced_are_undone(build, classes):
    """One division by Lightning, and a gradient scaler's factor on top of it; not more and not fewer."""
    divided = build() / 4
    assert cross_entropy_start(divided, scale=4.0).loss.item() == pytest.approx(math.log(classes), rel=1e-6)
    scaled = divided * torch.tensor(1024.0)
    assert cross_entropy_start(scaled, scale=4 / 1024, constants=2).loss.item() == pytest.approx(math.log(classes))
    assert cross_entropy_start(build(), scale=1.0) is None
    assert cross_entropy_start(scaled, scale=4.0) is None
    assert cross_entropy_start(torch.tensor(4.0) / build(), scale=4.0) is None


def test_logits_of_autocast_are_followed_through_their_casts():
    """Under bfloat16 autocast the logits are cast before the loss; its value is that of the loss, in float32."""
    head = nn.Linear(3, 5)
    with torch.autocast("cpu", dtype=BF16):
        loss = F.cross_entropy(head(torch.randn(4, 3)), LABELS)
    start = cross_entropy_start(loss)
    assert (start.classes, start.loss.dtype, start.loss.item()) == (5, F32, loss.item())
    assert cross_entropy_start(F.cross_entropy(zeros(4, 5).bfloat16(), LABELS)).loss.dtype is F32


@pytest.mark.slow
def test_a_compiled_loss_is_not_assessed():
    """A compiled graph is one opaque node."""
    compiled = torch.compile(lambda x: F.cross_entropy(x * 1.0, LABELS), backend="aot_eager")
    assert cross_entropy_start(compiled(torch.zeros(4, 5, requires_grad=True))) is None


def refuse(_):
    raise AssertionError("a saved tensor was unpacked")


@pytest.mark.parametrize(
    "build", [*(entry.values[0] for entry in CROSS_ENTROPIES), *(entry.values[0] for entry in OTHERS[:-2])]
)
def test_the_loss_is_left_as_it_was(build):
    """Nothing is read on the host, and no saved tensor is unpacked, which may lie on disk or be computed anew."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, refuse):
        loss = build()
    with NoHostRead():
        cross_entropy_start(loss)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_divides_every_loss_once(make_trainer, accumulate):
    """The loss that Lightning hands to ``on_before_backward`` is recognised with ``scale`` alone."""
    seen = []

    class Listen(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(cross_entropy_start(loss, scale=float(trainer.accumulate_grad_batches)))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["loss"] * accumulate)

    make_trainer(Listen(), accumulate_grad_batches=accumulate, limit_train_batches=1).fit(Healthy(), loader())
    start, loss = seen
    assert (start.classes, start.loss.item()) == (4, pytest.approx(loss.item()))
