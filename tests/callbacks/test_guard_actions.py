# SPDX-License-Identifier: Apache-2.0
"""What NaNGuard does about a bad step, and that a replay leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from harm import Busy, Manual, assert_identical, everything_after
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sick import Gan, LateLog, LogOfZero, RootAtZero
from specimens import Healthy, LogOfNegative, loader, network, with_module
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import NaNGuard, NonFiniteError
from lightning_bn.callbacks.inquest import inquire
from lightning_bn.callbacks.retrace import retrace


class Replays(NaNGuard):
    """Replays every step, forward and backward, although nothing is wrong."""

    def __init__(self):
        super().__init__("warn")
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        super().on_before_backward(trainer, pl_module, loss)
        self._replay(trainer, pl_module, backward=False)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._replay(trainer, pl_module, backward=True)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _replay(self, trainer, pl_module, *, backward):
        if self._watch.case is not None:
            self.seen.append(retrace(trainer, pl_module, self._watch.case, backward=backward).loss)


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(float(loss.detach()))


def run(make_trainer, build, callbacks, **options):
    seed_everything(3)
    model = build()
    trainer = make_trainer(*callbacks, **{"max_epochs": 2, **options})
    trainer.fit(model, loader(), loader(seed=1))
    return everything_after(trainer, model)


class Teacher(Healthy):
    """Its step moves the average of another network's weights and fills a queue."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net)
        self.register_buffer("queue", torch.zeros(16, 4))
        self.place = 0

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.mul_(0.9).add_(other, alpha=0.1)
            self.queue[self.place : self.place + 8] = self.teacher(batch[0])
            self.place = (self.place + 8) % 16
        return super().training_step(batch, batch_idx) + (self(batch[0]) - self.queue.mean(0)).pow(2).mean()


VARIATIONS = {
    "plain": (Busy, {}),
    "accumulation": (Busy, {"accumulate_grad_batches": 3}),
    "bf16-mixed": (Busy, {"precision": "bf16-mixed"}),
    "clipping": (Busy, {"gradient_clip_val": 0.1}),
    "manual, two optimizers": (Manual, {}),
    "GAN": (lambda: Gan(sick=False), {}),
    "a step that writes to weights": (Teacher, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "options"), VARIATIONS.values(), ids=VARIATIONS)
def test_a_replay_at_every_step_leaves_training_bit_identical(make_trainer, build, options):
    """Weights, buffers, optimizer state, random streams and metrics are those of plain training."""
    guard = Replays()
    assert_identical(run(make_trainer, build, [], **options), run(make_trainer, build, [guard], **options))
    assert len(guard.seen) >= 8
    assert guard.findings == []


@pytest.mark.slow
def test_a_replay_computes_the_loss_of_the_step_to_the_last_bit(make_trainer):
    """Dropout, noise from three libraries and running statistics are those that the step had."""
    guard, losses = Replays(), Losses()
    seed_everything(3)
    make_trainer(losses, guard).fit(Busy(), loader())
    assert guard.seen[::2] == losses.seen == guard.seen[1::2]


class SkipsOne(Healthy):
    """The third batch of four gives NaN, in the loss or in the gradients alone."""

    def __init__(self, where, optimizer):
        super().__init__(nn.Sequential(network(), nn.Identity()))
        self.where, self.optimizer = where, optimizer

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.where == "loss":
            loss = loss * torch.log(loss * 0 - 1)
        if batch_idx == 2 and self.where == "gradient":
            loss = loss + torch.sqrt(loss * 0)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD, momentum, decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "RMSprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_skip_leaves_everything_as_if_the_batch_had_not_been_seen(make_trainer, optimizer, where):
    """Weights, optimizer state and running statistics equal those of a run without the batch."""

    def state(batches, guards, where):
        torch.manual_seed(0)
        model = SkipsOne(where, optimizer)
        trainer = make_trainer(*guards)
        data = list(zip(*(x.split(8) for x in loader().dataset.tensors), strict=True))
        rows = [data[k] for k in batches]
        x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
        trainer.fit(model, DataLoader(TensorDataset(x, y), 8))
        return {"model": model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}

    guard = NaNGuard("skip")
    skipped = state([0, 1, 2, 3], [guard], where)
    plain = state([0, 1, 3], [], "nowhere")
    assert [finding.step for finding in guard.findings if finding.severity.value == "error"] == [2]
    assert_identical(skipped, plain)


def test_skip_raises_after_so_many_in_a_row(make_trainer):
    """Two may be dropped; the third raises, with the report."""
    guard = NaNGuard("skip", max_skips=2)
    trainer = make_trainer(guard, max_epochs=3)
    model = LateLog(bad=1)
    with pytest.raises(NonFiniteError, match="3 steps in a row were not finite"):
        trainer.fit(model, loader())
    assert trainer.global_step == 3
    assert all(torch.isfinite(x).all() for x in model.state_dict().values())


def test_skip_counts_anew_after_a_good_step(make_trainer):
    """One bad batch in each epoch is never too much."""
    guard = NaNGuard("skip", max_skips=1)
    trainer = make_trainer(guard, max_epochs=4)
    trainer.fit(SkipsOne("loss", torch.optim.Adam), loader())
    assert trainer.global_step == 16


def test_skip_works_with_manual_optimisation(make_trainer):
    """The optimizer that would use bad gradients does not step."""
    model = Gan()
    before = copy.deepcopy(model.generator.state_dict())
    make_trainer(NaNGuard("skip")).fit(model, loader())
    assert_identical(dict(model.generator.state_dict()), dict(before))


@pytest.mark.parametrize("build", [LogOfZero, RootAtZero])
def test_stop_keeps_weights_statistics_and_checkpoint_clean(make_trainer, tmp_path, build):
    """Bad loss or bad gradients: fit returns, and the checkpoint holds the state before the bad step."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    keeper = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer = make_trainer(NaNGuard("stop"), keeper, max_epochs=3, enable_checkpointing=True)
    trainer.fit(model, loader())
    assert trainer.global_step == 1
    saved = torch.load(keeper.last_model_path, weights_only=True)["state_dict"]
    assert_identical(dict(saved), dict(before))


@pytest.mark.parametrize("build", [LogOfZero, RootAtZero])
def test_raise_leaves_the_state_before_the_step(make_trainer, build):
    """Weights and running statistics are those before the batch."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError):
        make_trainer(NaNGuard()).fit(model, loader())
    assert_identical(dict(model.state_dict()), dict(before))


def test_warn_replays_once_and_not_at_every_step_that_follows(make_trainer, monkeypatch):
    """Weights that are NaN after the first bad update are not looked into again and again."""
    calls = []
    monkeypatch.setattr(
        "lightning_bn.callbacks.guard.inquire", lambda *args, **kwargs: calls.append(1) or inquire(*args, **kwargs)
    )
    guard = NaNGuard("warn")
    trainer = make_trainer(guard, max_epochs=3)
    trainer.fit(LateLog(bad=2), loader(), loader())
    assert trainer.global_step == 12
    assert len(calls) == 1
    assert [finding.rule for finding in guard.findings if finding.severity.value == "error"] == ["invalid-operation"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"max_skips": 0}, "max_skips must be a whole number of at least 1, got 0", id="max_skips"),
        pytest.param({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1", id="every_n_steps"),
        pytest.param({"save_batch": 1}, "save_batch must be True or False, got 1", id="save_batch"),
    ],
)
def test_a_wrong_argument_is_refused_with_name_need_and_got(options, words):
    """The error names the argument, what it may be and what it got."""
    with pytest.raises(ValueError, match=words):
        NaNGuard(**options)


def test_an_error_of_the_guard_itself_never_stops_training(make_trainer, monkeypatch):
    """A bug in the snapshot is reported once and switches the guard off."""

    def breaks(_):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("lightning_bn.callbacks.snapshot.Snapshot.take", breaks)
    guard = NaNGuard()
    trainer = make_trainer(guard)
    trainer.fit(Healthy(), loader())
    assert trainer.global_step == 4
    assert [finding.rule for finding in guard.findings] == ["monitor-failed"]


def test_an_error_in_the_replay_still_leaves_a_finding(make_trainer, monkeypatch):
    """Where the replay breaks, what the modules showed is reported, and why there is no more."""

    def breaks(*_, **__):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("lightning_bn.callbacks.inquest.retrace", breaks)
    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match="non-finite-output"):
        make_trainer(guard).fit(Healthy(with_module(LogOfNegative())), loader())
