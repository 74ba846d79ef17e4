# SPDX-License-Identifier: Apache-2.0
"""LSUV in a Trainer: on the first training batch as it passes by, without a trace but the weights."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from specimens import Healthy, loader, network
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_bn import ActivationMonitor, NaNGuard, WeightInit, initialize


class Busy(Healthy):
    """Drops out, draws, keeps a metric, counts, and looks at its logger."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), *network()[3:]))
        self.accuracy = MulticlassAccuracy(4)
        self.steps = 0
        self.losses = []

    def training_step(self, batch, batch_idx):
        self.steps += 1
        logits = self(batch[0] + 1e-3 * torch.randn_like(batch[0]) * random.random() * np.random.rand())  # noqa: NPY002
        self.accuracy(logits, batch[1])
        loss = self.loss(logits, batch[1])
        self.losses.append(loss.detach())
        self.log("train_acc", self.accuracy)
        self.logger.experiment.add_scalar("mine", loss.detach(), self.steps)
        return loss


class Records:
    """What a fit leaves: everything that training depends on."""

    def __init__(self, trainer, model):
        self.model = {name: value.clone() for name, value in model.state_dict().items()}
        self.streams = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
        self.metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.python = (model.steps, [loss.item() for loss in model.losses])
        self.optimizer = trainer.optimizers[0].state_dict()["state"]


def assert_same(one, other):
    assert all(torch.equal(value, other.model[name]) for name, value in one.model.items())
    assert (one.streams, one.metrics, one.python) == (other.streams, other.metrics, other.python)
    for state, twin in zip(one.optimizer.values(), other.optimizer.values(), strict=True):
        assert all(torch.equal(value, twin[key]) for key, value in state.items())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_training_is_that_of_a_model_that_was_given_the_same_weights(make_trainer, options):
    """The rehearsal leaves no trace: a twin that starts from the scaled weights trains bit for bit alike."""
    seed_everything(3, verbose=False)
    model, init = Busy(), WeightInit("lsuv", seed=5)
    start = {}
    init_start = init.on_train_batch_start

    def keep(trainer, pl_module, batch, batch_idx):
        init_start(trainer, pl_module, batch, batch_idx)
        start.setdefault("weights", {name: value.clone() for name, value in pl_module.state_dict().items()})

    init.on_train_batch_start = keep
    trainer = make_trainer(init, max_epochs=2, **options)
    trainer.fit(model, loader())
    with_us = Records(trainer, model)
    seed_everything(3, verbose=False)
    twin = Busy()
    twin.load_state_dict(start["weights"])
    trainer = make_trainer(max_epochs=2, **options)
    trainer.fit(twin, loader())
    assert_same(Records(trainer, twin), with_us)


def test_the_scaled_weights_are_those_that_the_notebook_function_finds(make_trainer):
    """The factors come from the first training batch itself."""
    batch = next(iter(loader()))
    model, twin = Healthy(), Healthy()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    make_trainer(WeightInit("lsuv", seed=5)).fit(model, loader())
    initialize(twin, "lsuv", seed=5, batch=batch[0])
    assert all(torch.equal(value, dict(twin.named_parameters())[name]) for name, value in model.named_parameters())


def test_the_loader_is_not_asked_twice(make_trainer):
    """The rehearsal runs on the batch that passes by; no second iterator is made."""

    class Counts(torch.utils.data.DataLoader):
        made = 0

        def __iter__(self):
            type(self).made += 1
            return super().__iter__()

    data = Counts(loader().dataset, 8)
    make_trainer(WeightInit("lsuv")).fit(Healthy(), data)
    assert Counts.made == 1


def test_other_monitors_do_not_hear_the_rehearsal(make_trainer):
    """Listed before or after it, they see the step once."""
    activations = ActivationMonitor(every_n_steps=1)
    callbacks = [NaNGuard(), activations, WeightInit("lsuv")]
    make_trainer(*callbacks, max_steps=1).fit(Healthy(), loader())
    assert activations.statistics["net.0"].count == 8 * 16
    assert not any(callback.off for callback in callbacks)


def test_a_resumed_run_is_not_scaled(make_trainer, tmp_path):
    """The checkpoint's weights stay as they are, and the note says where they come from."""
    first, path = Healthy(), tmp_path / "first.ckpt"
    trainer = make_trainer(WeightInit("he", seed=1))
    trainer.fit(first, loader())
    trainer.save_checkpoint(path)
    trained = {name: value.clone() for name, value in first.named_parameters()}
    again, init = Healthy(), WeightInit("lsuv", seed=2)
    again.configure_optimizers = lambda: torch.optim.SGD(again.parameters(), lr=0.0, momentum=0.9)
    make_trainer(init, max_epochs=2).fit(again, loader(), ckpt_path=path)
    init_notes = [finding.evidence for finding in init.findings]
    assert len(init_notes) == 1
    assert "first.ckpt" in init_notes[0]
    assert init.report.rows[0].why == ""
    assert set(trained) == {name for name, _ in again.named_parameters()}


class Manual(Healthy):
    """Manual optimisation: its step moves the weights."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Fails(Healthy):
    """Its first training step raises."""

    def training_step(self, batch, batch_idx):
        raise ZeroDivisionError("mine")


def test_where_the_step_cannot_be_rehearsed_a_note_says_so(make_trainer):
    """Weights stay orthogonal under manual optimisation, and training goes on."""
    model, init = Manual(), WeightInit("lsuv", seed=5)
    make_trainer(init).fit(model, loader())
    (finding,) = init.findings
    assert finding.evidence.startswith("lsuv left all weights orthogonal, not scaled to unit variance: ")
    assert "manual" in finding.evidence
    assert not init.off


def test_an_error_of_the_step_itself_comes_out_as_it_is(make_trainer):
    """The rehearsal meets it first; the user sees his own exception all the same."""
    init = WeightInit("lsuv")
    with pytest.raises(ZeroDivisionError, match="mine"):
        make_trainer(init).fit(Fails(), loader())
    assert "ZeroDivisionError: mine" in init.findings[0].evidence


def test_lazy_layers_are_scaled_once_they_have_parameters(make_trainer):
    """With a sanity check they have seen data before the first training batch; without one a note says so."""

    def lazy():
        model = Healthy()
        model.net[0] = nn.LazyLinear(16)
        return model

    init = WeightInit("lsuv")
    make_trainer(init, num_sanity_val_steps=1).fit(lazy(), loader(), loader())
    assert init.findings == []
    init = WeightInit("lsuv")
    make_trainer(init).fit(lazy(), loader())
    assert "net.0.weight" in init.findings[0].evidence
