# SPDX-License-Identifier: Apache-2.0
"""ActivationMonitor measures gradients with respect to outputs on request, and leaves backward and its graph alone."""

from __future__ import annotations

import gc
import io
import math
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from specimens import CLASSES, FEATURES, WIDTH, Healthy, NoHostRead, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import ActivationMonitor, Severity
from lightning_bn.callbacks.base import shielded


def feeling(**options):
    return ActivationMonitor(every_n_steps=1, max_overhead=None, gradients=True, **options)


def fit(make_trainer, model, *, monitor=None, data=None, **options):
    monitor = monitor or feeling()
    make_trainer(monitor, num_sanity_val_steps=0, **options).fit(model, data or loader())
    return monitor


class Known(Healthy):
    """Linear, ReLU, linear, of which the gradients are known in closed form; keeps what they follow from."""

    def __init__(self, inplace=False, parts=1):
        super().__init__(nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(inplace), nn.Linear(WIDTH, CLASSES)))
        self.steps, self.parts = [], parts

    def training_step(self, batch, batch_idx):
        weights = [parameter.detach().double().numpy().copy() for parameter in self.parameters()]
        self.steps.append((batch[0].double().numpy(), batch[1].numpy(), *weights))
        return super().training_step(batch, batch_idx)

    def expected(self, step):
        """Gradients of the mean cross-entropy, by layer: (p - y)/N at the head, and back through W and the ReLU."""
        x, labels, w1, b1, w2, b2 = self.steps[step]
        hidden = x @ w1.T + b1
        logits = np.maximum(hidden, 0) @ w2.T + b2
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        head = (shares - np.eye(CLASSES)[labels]) / len(x) / self.parts
        return {"net.2": head, "net.1": head @ w2, "net.0": head @ w2 * (hidden > 0)}


def assert_agree(row, values, rel=1e-5):
    """A summary says what float64 NumPy says of the values."""
    assert row.count == values.size
    assert row.nonfinite == 0
    assert row.std == pytest.approx(values.std(), rel=rel)
    assert row.mean == pytest.approx(values.mean(), rel=0, abs=rel * values.std())
    assert (row.low, row.high) == pytest.approx((values.min(), values.max()), rel=rel)
    assert row.zero_share == pytest.approx((values == 0).mean())


@pytest.mark.parametrize("inplace", [False, True], ids=["a ReLU of its own memory", "in place"])
@pytest.mark.parametrize("steps", [1, 4], ids=["first step", "later step"])
def test_gradients_agree_with_their_closed_form(make_trainer, inplace, steps):
    """Mean, spread, range and zeros are those of a float64 computation, however they were measured.

    A ReLU in place does not hide the gradient in front of it, which is 0 where the ReLU is shut.
    """
    model = Known(inplace)
    monitor = fit(make_trainer, model, max_steps=steps)
    expected = model.expected(steps - 1)
    assert monitor.gradients.keys() == {*expected} == monitor.statistics.keys() - {"loss"}
    for name, values in expected.items():
        assert_agree(monitor.gradients[name], values)
    assert monitor.gradients["net.0"].zero_share > 0.2 > monitor.gradients["net.1"].zero_share


def test_gradients_of_unequal_micro_batches_pool_exactly(make_trainer):
    """With accumulation the values of all micro-batches count, each with the part of the loss that Lightning leaves."""
    model = Known(parts=3)
    monitor = fit(make_trainer, model, data=loader(size=19), accumulate_grad_batches=3)  # batches of 8, 8 and 3
    parts = [model.expected(place) for place in range(3)]
    for name in parts[0]:
        assert_agree(monitor.gradients[name], np.concatenate([part[name] for part in parts]))


class Block(nn.Module):
    """Two layers that are computed again in backward, or not, and a head."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.front, self.a, self.act, self.b = (
            nn.Linear(FEATURES, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Tanh(),
            nn.Linear(WIDTH, WIDTH),
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def block(self, x):
        return self.b(self.act(self.a(x)))

    def forward(self, x):
        x = self.front(x)
        return self.head(checkpoint(self.block, x, **self.options) if self.options else self.block(x))


def blocks(make_trainer, **options):
    torch.manual_seed(5)
    return fit(make_trainer, Healthy(Block(**options)), max_steps=3)


def test_checkpointing_counts_no_gradient_twice(make_trainer):
    """Layers whose forward pass runs again in backward have the gradients that they have without that."""
    plain, repeated = blocks(make_trainer), blocks(make_trainer, use_reentrant=False)
    assert plain.gradients == repeated.gradients
    assert plain.gradients["net.a"].count == 8 * WIDTH


def test_inside_of_reentrant_checkpointing_outputs_have_no_gradient_to_be_felt(make_trainer):
    """There the first forward pass records nothing; the layers around the block are measured as ever."""
    plain, hidden = blocks(make_trainer), blocks(make_trainer, use_reentrant=True)
    assert hidden.gradients == {name: plain.gradients[name] for name in ("net.front", "net.head")}


def test_outputs_that_no_gradient_reaches_have_no_row(make_trainer):
    """A frozen front, and a branch whose output nobody uses, have none; what lies between the two has."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.used, self.idle = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), nn.Linear(8, 3)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            x = self.frozen(x)
            self.idle(x)
            return self.used(x)

    monitor = fit(make_trainer, Healthy(Branches()))
    assert list(monitor.gradients) == ["net.used"]
    assert {"net.frozen", "net.idle"} < monitor.statistics.keys()
    assert not monitor.off


def test_every_tensor_of_an_output_and_every_call_counts(make_trainer):
    """A shared layer has the gradients of both calls, an LSTM those of the outputs that the loss depends on."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.first = nn.Tanh(), nn.Linear(FEATURES, FEATURES)
            self.lstm, self.head = nn.LSTM(FEATURES, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            _, (hidden, _) = self.lstm(self.act(self.act(self.first(x))))
            return self.head(hidden).expand(len(x), -1)

    monitor = fit(make_trainer, Healthy(Twice()))
    assert monitor.gradients["net.act"].count == 2 * 8 * FEATURES
    assert monitor.gradients["net.lstm"].count == 5


class Adversarial(Healthy):
    """Two networks that learn in turn; the loss of the first runs through the second."""

    def __init__(self):
        super().__init__(None)
        self.net, self.other = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 1)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            made = self.net(batch[0])
            loss = self.other(made if optimizer is first else made.detach()).mean()
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.net, self.other)]


def test_all_backward_passes_of_a_step_count(make_trainer):
    """In manual optimisation a layer has the gradients of every loss that runs through it: 1/N, twice."""
    monitor = fit(make_trainer, Adversarial())
    row = monitor.gradients["other"]
    assert (row.count, row.mean, row.std) == (16, pytest.approx(1 / 8), pytest.approx(0, abs=1e-9))
    assert monitor.gradients["net"].count == 8 * FEATURES


class Penalised(Known):
    """Adds a penalty on the gradient with respect to the input, which backward runs through once more."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return super().training_step(batch, batch_idx) + slope.square().mean()


def scaled():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


def test_the_factor_of_a_gradient_scaler_is_taken_out(make_trainer):
    """In fp16 the gradients are those of the loss, not 1024 times as large, to the precision of fp16."""
    model = Known()
    monitor = fit(make_trainer, model, plugins=[scaled()], max_steps=4)
    assert not monitor.off
    for name, values in model.expected(3).items():
        assert monitor.gradients[name].std == pytest.approx(values.std(), rel=0.01)


def test_a_backward_pass_of_ones_own_is_not_divided_by_the_scale(make_trainer):
    """What autograd.grad is called on inside of the step is not scaled: the gradient of a sum is 1."""
    monitor = fit(make_trainer, Penalised(), plugins=[scaled()], max_steps=2)
    assert not monitor.off
    assert monitor.gradients["net.2"].high == 1.0


def test_gradients_that_are_not_finite_are_counted(make_trainer):
    """The root of 0 sends back infinity: the layer in front has as many non-finite gradients as it made zeros."""

    class Roots(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.act, self.head = nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.head(self.act(self.front(x)).sqrt())

    monitor = fit(make_trainer, Healthy(Roots()), max_steps=1)
    assert monitor.gradients["net.act"].nonfinite == monitor.statistics["net.act"].zero_share * 8 * WIDTH > 0
    assert monitor.gradients["net.head"].nonfinite == 0


class NoReads(Healthy):
    """Raises where a value is read on the host during backward."""

    plant = False

    def backward(self, loss):
        if self.plant:
            self.logits.register_hook(lambda gradient: gradient.sum().item() and None)
        with NoHostRead():
            loss.backward()

    def forward(self, x):
        self.logits = super().forward(x)
        return self.logits


def test_nothing_is_read_on_the_host_in_backward(make_trainer):
    """No operation of a due backward pass brings a value to the host; a planted read is seen."""
    model = NoReads(network())
    monitor = fit(make_trainer, model)
    assert not monitor.off
    assert len(monitor.gradients) == 7
    model.plant = True
    with pytest.raises(AssertionError, match="read on the host"):
        fit(make_trainer, model)


class Marked(torch.autograd.Function):
    """Leaves a mark in the graph, which lives as long as the graph does."""

    marks: list = []  # noqa: RUF012  (of this test alone)

    @staticmethod
    def forward(ctx, x):
        ctx.mark = Known()
        Marked.marks.append(weakref.ref(ctx.mark))
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient


class Mark(nn.Module):
    """A layer whose output and node are watched by weak references."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def forward(self, x):
        out = Marked.apply(x)
        self.outputs.append(weakref.ref(out))
        return out


class AliveAtTheEnd(Callback):
    """Counts graphs and outputs that are alive when all others are done with a batch."""

    def __init__(self):
        self.alive = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        outputs = pl_module.net[1].outputs
        self.alive.append((sum(m() is not None for m in Marked.marks), sum(x() is not None for x in outputs)))


def test_graph_and_outputs_are_free_when_a_step_is_over(make_trainer):
    """Without help of the garbage collector none lives on in the next step, as without the monitor."""
    found = {}
    for monitor in (None, feeling(effective_rank=True)):
        Marked.marks, watch = [], AliveAtTheEnd()
        net = nn.Sequential(nn.Linear(FEATURES, WIDTH), Mark(), nn.Linear(WIDTH, CLASSES))
        trainer = make_trainer(*([monitor] if monitor else []), watch, num_sanity_val_steps=0)
        gc.collect()
        gc.disable()
        try:
            trainer.fit(Healthy(net), loader())
        finally:
            gc.enable()
        found[monitor is None] = watch.alive
    assert monitor.gradients["net.1"].count == 8 * WIDTH
    assert found[True] == found[False]
    assert found[False] == [(0, 0)] * 4


class Hoards(Healthy):
    """Keeps the graphs of all steps, and goes back through the last one again in the next step."""

    def __init__(self):
        super().__init__(network(norm=False))
        self.__dict__["hoard"] = []

    def training_step(self, batch, batch_idx):
        for loss, logits in self.hoard[-1:]:
            torch.autograd.grad(loss, logits, retain_graph=True)
        logits = self(batch[0])
        loss = self.loss(logits, batch[1])
        self.hoard.append((loss, logits))
        return loss

    def backward(self, loss):
        loss.backward(retain_graph=True)


def test_a_graph_that_lives_on_holds_nothing_of_the_monitor(make_trainer):
    """When a step is over its hooks are gone: a later backward pass is not felt, and the monitor can be freed."""
    model = Hoards()
    monitor = fit(make_trainer, model)
    assert monitor.gradients["net.4"].count == 8 * CLASSES
    reference = weakref.ref(monitor)
    del monitor
    model.trainer = None
    gc.collect()
    assert reference() is None
    assert len(model.hoard) == 4


class Prompt(nn.Module):
    """Puts out its own parameter, a leaf of the graph."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.ones(FEATURES))

    def forward(self, x):
        return self.values


class Prompted(nn.Module):
    """Adds a learnt input."""

    def __init__(self, breaks=False):
        super().__init__()
        self.prompt, self.head, self.breaks = Prompt(), nn.Linear(FEATURES, CLASSES), breaks

    def forward(self, x):
        x = x + self.prompt(x)
        if self.breaks:
            raise KeyError("mine")
        return self.head(x)


def test_no_hook_stays_on_a_parameter_that_a_layer_puts_out(make_trainer):
    """Also where the batch breaks off in the middle of the forward pass."""
    model = Healthy(Prompted())
    assert fit(make_trainer, model).gradients["net.prompt"].count == FEATURES
    assert not model.net.prompt.values._backward_hooks
    model.net.breaks = True
    with pytest.raises(KeyError, match="mine"):
        fit(make_trainer, model)
    assert not model.net.prompt.values._backward_hooks


def test_an_error_of_ours_in_backward_switches_the_monitor_off_and_training_goes_on(make_trainer):
    """Weights are those of plain training, and a finding says what happened."""

    class Breaks(ActivationMonitor):
        @shielded
        def _feel(self, name, gradient):
            assert name != "net.2", "a bug of ours"
            super()._feel(name, gradient)

    def weights(*callbacks):
        torch.manual_seed(3)
        model = Healthy(network(norm=False))
        make_trainer(*callbacks, num_sanity_val_steps=0).fit(model, loader())
        return [parameter.detach() for parameter in model.parameters()]

    monitor = Breaks(every_n_steps=1, gradients=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(monitor), strict=True))
    assert monitor.off
    assert [(finding.rule, finding.severity) for finding in monitor.findings] == [("monitor-failed", Severity.WARNING)]


def test_an_output_can_be_saved_while_its_gradient_is_awaited(make_trainer):
    """Pickling a hooked tensor in the middle of a step gives no warning."""

    class Saves(Healthy):
        def forward(self, x):
            x = super().forward(x)
            torch.save(x, io.BytesIO())
            return x

    assert not fit(make_trainer, Saves(network(norm=False))).off


def test_by_default_outputs_have_no_hook_and_nothing_is_logged(make_trainer):
    """Neither gradients nor ranks are measured, logged or shown unless they are asked for."""

    class Looks(Healthy):
        def forward(self, x):
            x = super().forward(x)
            assert x._backward_hooks is None
            return x

    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None)
    trainer = make_trainer(monitor, num_sanity_val_steps=0)
    trainer.fit(Looks(network()), loader())
    assert monitor.statistics
    assert monitor.gradients == monitor.ranks == {}
    tags = EventAccumulator(trainer.log_dir).Reload().Tags()["scalars"]
    assert not [tag for tag in tags if "gradient" in tag or "rank" in tag]


def test_gradients_are_in_the_overview_and_in_the_table(make_trainer):
    """``gradient_std_log10`` as median, largest and smallest over the layers, and a column layer by layer."""
    monitor = feeling()
    trainer = make_trainer(monitor, num_sanity_val_steps=0)
    trainer.fit(Known(), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    logs = sorted(math.log10(row.std) for row in monitor.gradients.values())
    for part, value in zip(("min", "median", "max"), logs, strict=True):
        assert events.Scalars(f"bn_overview/gradient_std_log10_{part}")[-1].value == pytest.approx(value)
    table = events.Tensors("bn_activations/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"{monitor.gradients['net.2'].std:.4g}" in table


@pytest.mark.parametrize("name", ["gradients", "effective_rank"])
def test_a_flag_that_is_none_is_refused_with_name_need_and_got(name):
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'yes'"):
        ActivationMonitor(**{name: "yes"})
