# SPDX-License-Identifier: Apache-2.0
"""A training step can be rehearsed at any time of a fit, and training goes on as if it had not been."""

from __future__ import annotations

import copy
from collections import defaultdict
from contextlib import nullcontext
from functools import wraps

import numpy as np
import pytest
import torch
from callbacks.test_do_no_harm import Busy, Manual, assert_identical, everything_after
from compiling import Counting, Mute, as_a_part
from identical import everything
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from specimens import Healthy, loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchmetrics import CatMetric

from lightning_bn.callbacks.rehearsal import SilentLogger, cannot_rehearse, rehearse
from lightning_bn.quarantine import quarantine


class Untidy(Busy):
    """Leaves a trace of every kind in each step: in lists, tensors, metrics, generators, its batch and the log."""

    def __init__(self):
        super().__init__()
        self.seen = CatMetric()
        self.outputs, self.by_label, self.calls = [], defaultdict(list), 0
        self.ema, self.counted = torch.zeros(()), []
        self.generator = torch.Generator().manual_seed(1)

    def training_step(self, batch, batch_idx):
        batch[0].mul_(1 + 0.1 * torch.rand(1, generator=self.generator))
        loss = super().training_step(batch, batch_idx)
        self.calls += 1
        self.by_label[int(batch[1][0])].append(self.calls)
        self.ema.mul_(0.9).add_(0.1 * loss.detach())
        self.seen(loss.detach())
        self.log_dict({"ema": self.ema, "seen": self.seen})
        self.logger.experiment.add_scalar("direct", loss.item(), self.calls)
        self.outputs.append((loss + 0.01 * self.ema).detach())
        return loss + 0.01 * self.ema

    def on_train_epoch_end(self):
        self.log("calls", float(self.calls))
        for metric in (self.seen, self.accuracy):  # Lightning resets them afterwards
            self.counted.append([metric.update_count, copy.deepcopy(metric.metric_state)])


class Rehearses(Callback):
    """Rehearses in one hook of every step, then runs backward if it is told to, and keeps the losses."""

    def __init__(self, hook, *, backward=True):
        self.losses, self.batch = [], None
        self.hook, self.backward = hook, backward

    def rehearse(self, hook, trainer, pl_module):
        if hook != self.hook:
            return
        with quarantine(pl_module) if self.backward else nullcontext():
            loss = rehearse(trainer, pl_module, *self.batch)
            self.losses.append(loss.detach())
            if self.backward:
                loss.backward()
                assert all(p.grad is not None for p in pl_module.parameters())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = [x.clone() for x in batch], batch_idx
        self.rehearse("on_train_batch_start", trainer, pl_module)

    def on_before_backward(self, trainer, pl_module, loss):
        self.rehearse("on_before_backward", trainer, pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rehearse("on_before_optimizer_step", trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rehearse("on_train_batch_end", trainer, pl_module)


def numbers_written(folder):
    """Every scalar on disk, with its step."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run(make_trainer, folder, callbacks, **options):
    """Everything after a fit that a step could have left a trace in."""
    seed_everything(3)
    model = Untidy()
    trainer = make_trainer(*callbacks, max_epochs=2, logger=TensorBoardLogger(str(folder)), **options)
    trainer.fit(model, loader(), loader(seed=1))
    state = everything_after(trainer, model)
    own = {name: vars(model)[name] for name in ("outputs", "by_label", "calls", "ema", "counted")}
    return {
        **state,
        **own,
        "generator": model.generator.get_state(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002
        "written": numbers_written(trainer.logger.log_dir),
    }


OPTIONS = {
    "plain": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulation": {"accumulate_grad_batches": 3},
    "accumulation and bf16-mixed": {"accumulate_grad_batches": 3, "precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
}
REHEARSALS = {
    "before every step": lambda: Rehearses("on_train_batch_start", backward=False),
    "before every step, with backward": lambda: Rehearses("on_train_batch_start"),
    "between forward and backward": lambda: Rehearses("on_before_backward"),
    "before the optimizer steps": lambda: Rehearses("on_before_optimizer_step"),
    "after every step": lambda: Rehearses("on_train_batch_end"),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_with_rehearsals_is_bit_identical_to_training_without(make_trainer, tmp_path, options):
    """Weights, buffers, optimizer, random streams, metrics, the model's own state and what was logged are equal."""
    plain = run(make_trainer, tmp_path / "plain", [], **options)
    assert plain["calls"] == len(plain["written"]["direct"]) == 8
    for name, build in REHEARSALS.items():
        rehearsing = build()
        rehearsed = run(make_trainer, tmp_path / name, [rehearsing], **options)
        assert len(rehearsing.losses) == (plain["step"] if rehearsing.hook == "on_before_optimizer_step" else 8)
        assert_identical(plain, rehearsed, name)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_rehearsed_loss_is_the_loss_of_the_real_step(make_trainer, tmp_path, options):
    """Before a step its rehearsal gives its loss, bit for bit, in every step and precision."""
    rehearsing = Rehearses("on_train_batch_start")
    real = run(make_trainer, tmp_path, [rehearsing], **options)["outputs"]
    assert_identical(rehearsing.losses, real)
    assert len({float(loss) for loss in real}) == 8


@pytest.mark.slow
def test_training_with_a_naive_second_call_is_not_the_same(make_trainer, tmp_path):
    """The comparison is not blind: calling ``training_step`` without quarantine changes each part of it."""

    class Naive(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.training_step([x.clone() for x in batch], batch_idx)

    plain = run(make_trainer, tmp_path / "plain", [])
    naive = run(make_trainer, tmp_path / "naive", [Naive()])
    for part in plain.keys() - {"step"}:
        with pytest.raises(AssertionError, match=part):
            assert_identical(plain[part], naive[part], part)


@pytest.mark.slow
@pytest.mark.parametrize("compile_it", [torch.compile, as_a_part], ids=["the model", "a part"])
def test_what_is_compiled_is_rehearsed_eagerly_and_stays_compiled(make_trainer, compile_it):
    """Rehearsals neither compile anything, nor run what is compiled, nor let anything compile again."""

    def fit(*callbacks):
        torch._dynamo.reset()
        seed_everything(3)
        backend, model = Counting(), Mute()
        trainer = make_trainer(*callbacks, max_epochs=2)
        trainer.fit(compile_it(model, backend=backend), loader())
        return everything_after(trainer, model), vars(backend)

    rehearsing = Rehearses("on_train_batch_start")
    plain, rehearsed = fit(), fit(rehearsing)
    assert rehearsed[1]["ran"] >= 8
    assert len(rehearsing.losses) == 8
    assert_identical(plain, rehearsed)


def steps(step):
    """A model with this ``training_step``."""
    return type("Steps", (Healthy,), {"training_step": step})()


class Plain(Healthy):
    def training_step(self, batch, batch_idx):
        return batch, batch_idx


def decorated(step):
    @wraps(step)
    def call(*args, **kwargs):
        return step(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("step", "taken"),
    [
        pytest.param(lambda self, batch: (batch,), ("b",), id="batch"),
        pytest.param(Plain.training_step, ("b", 7), id="batch and number"),
        pytest.param(lambda self, x, i: (x, i), ("b", 7), id="other names"),
        pytest.param(lambda self, x, i, dataloader_idx: (x, i, dataloader_idx), ("b", 7, 0), id="loader"),
        pytest.param(lambda self, x, i, more="more": (x, i, more), ("b", 7, "more"), id="default"),
        pytest.param(lambda self, x, *, batch_idx, more=1: (x, batch_idx), ("b", 7), id="keyword"),
        pytest.param(lambda self, *args: args, ("b", 7), id="any"),
        pytest.param(lambda self, *args, **kwargs: (*args, kwargs), ("b", 7, {}), id="any keyword"),
        pytest.param(decorated(Plain.training_step), ("b", 7), id="decorated"),
    ],
)
def test_a_step_gets_the_arguments_that_it_takes(make_trainer, step, taken):
    """The batch, its number and the first loader, as far as the signature has places for them."""
    assert rehearse(make_trainer(), steps(step), "b", 7) == taken


def test_the_batch_is_not_changed(make_trainer):
    """A step that writes to its batch writes to a copy, which is cut off from the batch's graph."""
    x = torch.ones(2, requires_grad=True) * 2
    batch = {"x": [x], "ids": [1]}

    class Writes(Healthy):
        def training_step(self, batch):
            batch["ids"].append(2)
            return batch["x"][0].detach().mul_(3)

    assert rehearse(make_trainer(), Writes(), batch, 0).tolist() == [6, 6]
    assert (x.tolist(), batch["ids"]) == ([2, 2], [1])


def test_a_batch_that_cannot_be_copied_is_an_error(make_trainer):
    """An iterator in the batch would be used up, and is refused before the step runs."""
    letters = (letter for letter in "ab")
    with pytest.raises(TypeError, match=r"batch must be what copy\.deepcopy can copy, got list \(.*generator"):
        rehearse(make_trainer(), Plain(), [letters], 0)


class FromLoader(Healthy):
    def training_step(self, dataloader_iter):
        pass


class Lazy(Healthy):
    def __init__(self):
        super().__init__(nn.LazyLinear(4))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        pytest.param(Manual, "steps the optimizers", id="manual"),
        pytest.param(FromLoader, "dataloader_iter", id="dataloader_iter"),
        pytest.param(Lazy, r"lazy .*net\.weight", id="lazy"),
    ],
)
def test_what_cannot_be_rehearsed_is_said_in_words(make_trainer, build, reason):
    """A step that would leave a trace has a reason not to be rehearsed, and is refused."""
    with pytest.raises(ValueError, match=f"but its .*{reason}"):
        rehearse(make_trainer(), build(), None, 0)


@pytest.mark.parametrize("build", [Healthy, Busy, Untidy])
def test_what_can_be_rehearsed_has_no_reason(build):
    """Ordinary training steps have no reason against a rehearsal."""
    assert cannot_rehearse(build()) is None


def test_an_exception_in_the_step_leaves_nothing_behind(make_trainer):
    """Model, random streams and loggers are as before when the step raises, and the exception goes through."""

    class Breaks(Untidy):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx).backward()
            raise RuntimeError("in the step")

    model, trainer, batch = Breaks(), make_trainer(), next(iter(loader()))
    model.trainer = trainer
    before, loggers = everything(model), trainer.loggers
    with pytest.raises(RuntimeError, match="in the step"):
        rehearse(trainer, model, batch, 0)
    assert_identical(before, everything(model))
    assert trainer.loggers is loggers


def test_no_logger_is_no_logger_in_a_rehearsal(make_trainer):
    """A trainer without loggers has none inside either, and the same empty list afterwards."""
    trainer = make_trainer(logger=False)
    loggers = trainer.loggers
    assert rehearse(trainer, steps(lambda self, batch: list(batch.loggers)), Handle(trainer), 0) == []
    assert trainer.loggers is loggers


class Handle:
    """Gives a step's body access to a trainer without its being copied."""

    def __init__(self, trainer):
        self.loggers = trainer.loggers


def test_a_silent_logger_takes_anything_and_is_taken_for_the_real_one(tmp_path):
    """Calls, attributes, items, ``with`` and ``for`` do nothing; class and folder are the real logger's."""
    real = TensorBoardLogger(str(tmp_path), name="run", version=0)
    silent = SilentLogger(real)
    assert isinstance(silent, TensorBoardLogger)
    assert silent.log_dir == real.log_dir
    silent.log_metrics({"a": 1}, step=0)
    silent.experiment.config["a"].b = 1
    silent.experiment["a"] = silent.experiment["b"]
    with silent.experiment.start(run=1) as started:
        assert list(started.things()) == []
    assert not (tmp_path / "run").exists()
