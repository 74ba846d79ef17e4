# SPDX-License-Identifier: Apache-2.0
"""Training with monitors is bit-identical to training without them."""

from __future__ import annotations

import random

import pytest
import torch
from harm import Busy, Manual, assert_identical, everything_after
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision
from specimens import Healthy, loader
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import ActivationMonitor, BatchNormMonitor, NaNGuard, PreflightAudit, WeightInit
from lightning_bn.demo import DigitsData, DigitsResNet


def run(make_trainer, build, callbacks, **options):
    seed_everything(3)
    model = build()
    trainer = make_trainer(*callbacks, **{"max_epochs": 3, **options})
    trainer.fit(model, loader(), loader(seed=1))
    return everything_after(trainer, model)


MONITORS = {
    "NaNGuard raise": lambda: [NaNGuard()],
    "NaNGuard stop": lambda: [NaNGuard("stop")],
    "NaNGuard warn": lambda: [NaNGuard("warn")],
    "ActivationMonitor every step": lambda: [ActivationMonitor(every_n_steps=1)],
    "ActivationMonitor interval": lambda: [ActivationMonitor(every_n_steps=3)],
    "ActivationMonitor parameters": lambda: [ActivationMonitor(every_n_steps=2, parameters=True)],
    "ActivationMonitor gradients and ranks": lambda: [
        ActivationMonitor(every_n_steps=1, max_overhead=None, gradients=True, effective_rank=True)
    ],
    "ActivationMonitor globs": lambda: [ActivationMonitor(["net.*", "loss"])],
    "BatchNormMonitor": lambda: [BatchNormMonitor()],
    "BatchNormMonitor interval": lambda: [BatchNormMonitor(every_n_steps=5)],
    "BatchNormMonitor, few samples": lambda: [BatchNormMonitor(num_samples=8, max_gigabytes=1e-9)],
    "BatchNormMonitor without a verdict": lambda: [BatchNormMonitor(assess=False)],
    "WeightInit, report only": lambda: [WeightInit("pytorch")],
    "PreflightAudit": lambda: [PreflightAudit()],
    "all, twice": lambda: (
        [NaNGuard(), ActivationMonitor(), BatchNormMonitor()] * 1
        + [NaNGuard(), ActivationMonitor(), BatchNormMonitor()]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("monitors", MONITORS.values(), ids=MONITORS)
def test_every_monitor_in_every_mode_leaves_training_bit_identical(make_trainer, monitors):
    """Weights, buffers, optimizer states, random streams and logged metrics are equal to those of plain training."""
    assert_identical(run(make_trainer, Busy, []), run(make_trainer, Busy, monitors()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"accumulate_grad_batches": 3}, id="accumulation"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"precision": "64-true"}, id="64-true"),
        pytest.param({"gradient_clip_val": 0.1}, id="clipping"),
        pytest.param({"val_check_interval": 0.5}, id="validation inside the epoch"),
        pytest.param({"num_sanity_val_steps": 2}, id="sanity check"),
        pytest.param({"enable_progress_bar": True}, id="progress bar"),
    ],
)
def test_all_monitors_together_leave_every_kind_of_training_bit_identical(make_trainer, options):
    """The same under the Trainer's own variations."""
    monitors = [PreflightAudit(), NaNGuard(), ActivationMonitor(every_n_steps=2), BatchNormMonitor()]
    assert_identical(run(make_trainer, Busy, [], **options), run(make_trainer, Busy, monitors, **options))


class Block(nn.Module):
    """Layers with ReLUs in place, BatchNorm, dropout and a sum, to be computed again in backward."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.act = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True)
        self.other, self.drop, self.out = nn.Linear(16, 16), nn.Dropout(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.out(self.drop(self.other(self.act(self.norm(self.one(x))))) + x)


class Repeats(nn.Module):
    """A block within a network, under activation checkpointing or not."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.stem, self.act, self.block, self.head = nn.Linear(12, 16), nn.ReLU(inplace=True), Block(), nn.Linear(16, 4)

    def forward(self, x):
        x = self.act(self.stem(x))
        return self.head(checkpoint(self.block, x, **self.options) if self.options else self.block(x))


class Penalised(Healthy):
    """Adds a penalty on the gradient with respect to the input, so that backward runs through backward."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return super().training_step(batch, batch_idx) + slope.square().mean()


def in_fp16():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's own, in validation
@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(lambda: Healthy(Repeats()), dict, id="ReLU in place"),
        pytest.param(lambda: Healthy(Repeats(use_reentrant=False)), dict, id="checkpointing"),
        pytest.param(lambda: Healthy(Repeats(use_reentrant=True)), dict, id="reentrant checkpointing"),
        pytest.param(lambda: Penalised(Repeats()), dict, id="gradient penalty"),
        pytest.param(lambda: Healthy(Repeats()), in_fp16, id="gradient scaler"),
        pytest.param(Busy, lambda: {"accumulate_grad_batches": 3, "precision": "bf16-mixed"}, id="accumulation, bf16"),
        pytest.param(Manual, dict, id="manual optimisation"),
    ],
)
def test_gradients_that_are_felt_stay_as_they_are(make_trainer, build, options):
    """Hooks in backward leave every kind of training bit-identical, and have something to tell of each."""
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None, gradients=True, effective_rank=True)
    plain, watched = run(make_trainer, build, [], **options()), run(make_trainer, build, [monitor], **options())
    assert_identical(plain, watched)
    assert not monitor.off
    assert monitor.gradients


@pytest.mark.slow
def test_manual_optimisation_is_left_bit_identical(make_trainer):
    """The same with two optimizers that the user steps himself."""
    monitors = [PreflightAudit(), NaNGuard(), ActivationMonitor(), BatchNormMonitor()]
    assert_identical(run(make_trainer, Manual, []), run(make_trainer, Manual, monitors))


@pytest.mark.slow
def test_100_steps_of_the_demo_are_bit_identical_with_and_without_the_three_monitors(make_trainer):
    """The demo ResNet with WeightInit in both: same weights, buffers, optimizer state and random streams."""

    def run_demo(monitors):
        seed_everything(1)
        model = DigitsResNet()
        trainer = make_trainer(WeightInit("he"), *monitors, max_epochs=-1, max_steps=100)
        trainer.fit(model, datamodule=DigitsData())
        assert trainer.global_step == 100
        return everything_after(trainer, model)

    assert_identical(run_demo([]), run_demo([NaNGuard(), ActivationMonitor(every_n_steps=1), BatchNormMonitor()]))


def test_the_comparison_sees_a_callback_that_draws_one_random_number(make_trainer):
    """The check above is not blind: one draw from the global stream by a callback fails it."""

    class Draws(BatchNormMonitor):
        def on_train_end(self, trainer, pl_module):
            torch.rand(1)

    with pytest.raises(AssertionError, match="state"):
        assert_identical(run(make_trainer, Busy, []), run(make_trainer, Busy, [Draws()]))


def test_weight_init_does_not_move_the_random_streams(make_trainer):
    """After initialisation the streams stand where they stood without it."""

    def streams(callbacks):
        seed_everything(3)
        make_trainer(*callbacks, max_steps=0, num_sanity_val_steps=0).fit(Healthy(), loader())
        return torch.get_rng_state(), random.getstate()

    assert_identical(streams([]), streams([WeightInit("he")]))


def test_no_hook_stays_on_the_model_after_a_fit(make_trainer):
    """Modules have no forward hooks and no changed attributes left."""
    model = Healthy()
    monitors = [WeightInit(), NaNGuard(), ActivationMonitor(), BatchNormMonitor(), PreflightAudit()]
    make_trainer(*monitors).fit(model, loader())
    assert all(not module._forward_hooks for module in model.modules())
    assert "configure_model" not in vars(model)
    assert isinstance(model, LightningModule)
