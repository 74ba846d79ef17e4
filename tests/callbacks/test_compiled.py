# SPDX-License-Identifier: Apache-2.0
"""What is behind torch.compile is heard in a pass of its own that leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compiling import Chain, Counting, Mute, as_a_part, in_parts, in_place
from harm import Manual, assert_identical, everything_after
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from specimens import FEATURES, Healthy, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchmetrics import MeanMetric

from lightning_bn import ActivationMonitor, NaNGuard, WeightInit, diagnose
from lightning_bn.callbacks.rehearsal import cannot_unwrap

pytestmark = [
    pytest.mark.slow,
    # torch.compile's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


def texts(trainer, tag):
    """What was written to TensorBoard's Text tab under a tag."""
    return EventAccumulator(trainer.log_dir).Reload().Tensors(f"{tag}/text_summary")


WAYS = pytest.mark.parametrize(
    "compile_it", [torch.compile, as_a_part, in_place, in_parts], ids=lambda way: way.__name__
)


def fit(make_trainer, compile_it, *callbacks, **options):
    """Two epochs of four steps; everything afterwards, and what the backend did."""
    torch._dynamo.reset()
    seed_everything(3)
    model, backend = Mute(), Counting()
    trainer = make_trainer(*callbacks, max_epochs=2, **options)
    trainer.fit(compile_it(model, backend=backend) if compile_it else model, loader())
    return everything_after(trainer, model), vars(backend)


@WAYS
def test_training_is_identical_and_nothing_compiles_again(make_trainer, compile_it):
    """With a pass of its own on every step, weights, streams and what the compiler did are as without the monitor."""
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None, effective_rank=True)
    plain, heard = (fit(make_trainer, compile_it, *callbacks) for callbacks in ((), (monitor,)))
    assert plain[1]["ran"] >= 8
    assert monitor.statistics
    assert_identical(plain, heard)


@WAYS
def test_the_layers_and_their_numbers_are_those_of_the_model_uncompiled(make_trainer, compile_it):
    """Names without what the compiler inserts, in the order in which they ran, and the same statistics and units."""
    found = []
    for way in (None, compile_it):
        monitor = ActivationMonitor(every_n_steps=1, max_overhead=None)
        fit(make_trainer, way, monitor)
        assert monitor.findings == []
        found.append(monitor.statistics)
    plain, compiled = found
    assert list(plain) == list(compiled) == ["net.0.0", "net.0.1", "net.0.2", "net.1", "net.2"]
    assert plain == compiled


def test_the_default_compiler_is_heard_too(make_trainer):
    """With the compiler that users have, training is identical and every layer is measured."""

    def run(*callbacks):
        torch._dynamo.reset()
        seed_everything(3)
        model = Mute()
        trainer = make_trainer(*callbacks)
        trainer.fit(as_a_part(model), loader())
        return everything_after(trainer, model)

    monitor = ActivationMonitor(every_n_steps=2)
    plain, heard = run(), run(monitor)
    assert_identical(plain, heard)
    assert len(monitor.statistics) == 5


def test_micro_batches_are_all_heard(make_trainer):
    """With accumulation the numbers are of all micro-batches of the step."""
    monitor = ActivationMonitor(every_n_steps=1)
    fit(make_trainer, as_a_part, monitor, accumulate_grad_batches=2)
    assert monitor.statistics["net.2"].count == 2 * 8 * 4


@WAYS
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_outputs_are_those_of_the_model_uncompiled(make_trainer, compile_it, accumulate):
    """The pass of its own goes backward too, training is identical, and the numbers are those without a compiler."""
    found, ends = [], []
    for way in (None, compile_it):
        monitor = ActivationMonitor(every_n_steps=1, max_overhead=None, gradients=True)
        ends.append(fit(make_trainer, way, monitor, accumulate_grad_batches=accumulate)[0])
        assert monitor.findings == []
        found.append(monitor.gradients)
    plain, compiled = found
    assert list(plain) == list(compiled) == ["net.0.0", "net.0.1", "net.0.2", "net.1", "net.2"]
    for name, row in plain.items():
        assert vars(compiled[name]) == pytest.approx(vars(row), rel=1e-4, abs=1e-9), name
    assert_identical(fit(make_trainer, compile_it, accumulate_grad_batches=accumulate)[0], ends[1])


def test_what_cannot_be_run_twice_is_said_and_the_rest_is_heard(make_trainer):
    """Under manual optimisation a compiled layer gets an info with the reason; the layers around it are measured."""
    model, monitor = Manual(), ActivationMonitor()
    names = [f"net.{name}" for name, _ in model.net.named_children()]
    model.net[0] = torch.compile(model.net[0], backend="eager")
    make_trainer(monitor).fit(model, loader())
    (finding,) = monitor.findings
    assert (finding.rule, finding.layer) == ("not-watched", "net.0")
    assert "manual optimisation" in finding.evidence
    assert list(monitor.statistics) == names[1:]


def test_a_sick_compiled_network_is_found_and_its_healthy_twin_is_silent(make_trainer):
    """A layer of dead units behind the compiler is named."""
    for bias, rules in ((0.0, set()), (-50.0, {"dead-units"})):
        torch._dynamo.reset()
        seed_everything(5)
        net = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 4))
        nn.init.constant_(net[0].bias, bias)
        model, monitor = Healthy(net), ActivationMonitor(every_n_steps=1, max_overhead=None)
        model.net = torch.compile(model.net, backend="eager")
        make_trainer(monitor, max_epochs=3).fit(model, loader(size=512, batch_size=64))
        found = {finding.rule for finding in monitor.findings if finding.severity.value != "info"}
        assert found >= rules, bias
        assert rules or not found, found


@WAYS
def test_all_monitors_together_leave_training_as_it_is(make_trainer, compile_it):
    """With the four of ``diagnose()``, and validation between the epochs, everything ends as without them."""

    def run(*callbacks):
        torch._dynamo.reset()
        seed_everything(3)
        model, backend = Mute(), Counting()
        trainer = make_trainer(*callbacks, max_epochs=4)
        trainer.fit(compile_it(model, backend=backend), loader(), loader(seed=1))
        return everything_after(trainer, model), vars(backend)

    assert_identical(run(), run(*diagnose()))


@WAYS
def test_the_first_pass_of_a_compiled_model_is_looked_at_in_full(make_trainer, compile_it):
    """NaNGuard's table has every layer with its numbers, and nothing is said to be out of sight."""
    guard = NaNGuard()
    torch._dynamo.reset()
    trainer = make_trainer(guard)
    trainer.fit(compile_it(Mute(), backend="eager"), loader())
    assert guard.findings == []
    (text,) = (entry.tensor_proto.string_val[0] for entry in texts(trainer, "bn_first_pass"))
    assert [name in text.decode() for name in ("`net.0.0`", "`net.0.1`", "`net.1`", "`net.2`")] == [True] * 4


@WAYS
@pytest.mark.parametrize("sanity", [0, 2])
def test_the_first_validation_batch_of_a_compiled_model_is_looked_at_in_full(make_trainer, compile_it, sanity):
    """Also in the sanity check; nothing compiles again, and no metric or logged value counts the batch twice."""

    class Measured(Mute):
        def __init__(self):
            super().__init__()
            self.seen = MeanMetric()

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if not torch.compiler.is_compiling():
                self.seen.update(batch[0])

        def on_validation_epoch_end(self):
            ends.append((self.trainer.callback_metrics.get("val_loss"), self.seen.update_count))

    runs = []
    for callbacks in ((), (NaNGuard(),)):
        torch._dynamo.reset()
        seed_everything(3)
        ends, backend, model = [], Counting(), Measured()
        trainer = make_trainer(*callbacks, num_sanity_val_steps=sanity)
        trainer.fit(compile_it(model, backend=backend), loader(), loader(seed=1))
        runs.append((everything_after(trainer, model), vars(backend), ends))
    assert_identical(*runs)
    assert callbacks[0].findings == []
    (text,) = (entry.tensor_proto.string_val[0] for entry in texts(trainer, "bn_first_validation"))
    assert [name in text.decode() for name in ("`net.0.0`", "`net.0.1`", "`net.1`", "`net.2`")] == [True] * 4


@WAYS
def test_a_layer_that_is_sick_in_evaluation_alone_is_named(make_trainer, compile_it):
    """Behind the compiler too, and its healthy twin is silent, in a validation of its own."""

    class InEval(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return x if self.training else torch.sqrt(self.scale * x.square())

    for scale in (1.0, -1.0):
        torch._dynamo.reset()
        seed_everything(5)
        guard, model = NaNGuard("warn"), Mute(Chain(network()[:3], InEval(scale), nn.Linear(16, 4)))
        make_trainer(guard).validate(compile_it(model, backend="eager"), loader())
        found = [(finding.rule, finding.layer) for finding in guard.findings]
        assert found == ([] if scale > 0 else [("invalid-operation", "net.1")])


def test_an_exception_in_the_pass_of_its_own_leaves_the_guard_on(make_trainer):
    """The user's own exception comes again in the real step and passes on; a note says that the pass ended early."""

    class Raises(Mute):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("loss is NaN")

    guard = NaNGuard()
    with pytest.raises(RuntimeError, match="loss is NaN"):
        make_trainer(guard).fit(in_parts(Raises(), backend="eager"), loader())
    assert [finding.rule for finding in guard.findings] == ["not-watched"]
    assert "RuntimeError: loss is NaN" in guard.findings[0].evidence


@WAYS
def test_the_first_pass_behind_a_start_is_shown_as_if_nothing_was_compiled(make_trainer, compile_it):
    """WeightInit's table of the first batch, and its loss, are those of the model uncompiled."""
    shown = []
    for way in (None, compile_it):
        torch._dynamo.reset()
        seed_everything(3)
        start = WeightInit("he", seed=1)
        model = Mute()
        trainer = make_trainer(start)
        trainer.fit(way(model, backend="eager") if way else model, loader())
        assert start.findings == []
        shown.append(json.loads(Path(trainer.log_dir, "lightning_bn", "init.json").read_text())["first_batch"])
    assert shown[0] == shown[1]
    assert len(shown[0]["signal"]) == 5


def test_layers_beside_a_compiled_one_are_heard_in_the_real_pass(make_trainer):
    """Where no compiled layer is wanted, no step is run a second time."""

    class Counts(Mute):
        calls = 0

        def training_step(self, batch, batch_idx):
            Counts.calls += 1
            return super().training_step(batch, batch_idx)

    monitor = ActivationMonitor(["net.2"], every_n_steps=1, max_overhead=None)
    make_trainer(monitor).fit(in_parts(Counts(), backend="eager"), loader())
    assert list(monitor.statistics) == ["net.2"]
    assert Counts.calls == 4


def test_no_step_is_run_past_the_wrapper_of_deepspeed():
    """Its strategy is one of DDP by birth, and its model is not to be called without it."""
    for name, bases, reason in (
        ("DeepSpeedStrategy", (DDPStrategy,), "under DeepSpeedStrategy a step cannot be run"),
        ("Mine", (DDPStrategy,), None),
        ("FSDPStrategy", (), "under FSDPStrategy a step cannot be run"),
    ):
        trainer = SimpleNamespace(strategy=object.__new__(type(name, bases, {})))
        found = cannot_unwrap(trainer)
        assert (found is None) is (reason is None)
        assert reason is None or found.startswith(reason)
