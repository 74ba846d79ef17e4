# SPDX-License-Identifier: Apache-2.0
"""What else goes on in a run while hooks are open: copies, exports, other processes, broken streams."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from specimens import FEATURES, WIDTH, Healthy, LogOfNegative, loader, network, with_module
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lightning_bn import ActivationMonitor, BatchNormMonitor, NaNGuard, read_findings


def monitors():
    return [NaNGuard(), ActivationMonitor(every_n_steps=1), BatchNormMonitor(every_n_steps=1)]


class Uses(Callback):
    """Does something with the network at the end of each batch, before the monitors do theirs."""

    def __init__(self, use):
        self.use = use

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.use(pl_module.net)


USES = {
    "pickle": lambda net: pickle.loads(pickle.dumps(net))(torch.randn(2, FEATURES)),  # noqa: S301
    "torch.save": lambda net: torch.save(net, io.BytesIO()),
    "deepcopy": lambda net: copy.deepcopy(net)(torch.randn(2, FEATURES)),
    "script": torch.jit.script,
    "trace": lambda net: torch.jit.trace(net, torch.randn(8, FEATURES)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")  # the exports are what is tried here
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_network_can_be_copied_and_exported_in_the_middle_of_training(make_trainer, use):
    """Other callbacks save, copy and export the model: the monitors are not in their way."""
    watching = monitors()
    make_trainer(Uses(use), *watching).fit(Healthy(), loader())
    assert not any(monitor.off for monitor in watching)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])  # noqa: S301
def test_a_copy_made_inside_a_step_is_deaf(make_trainer, clone):
    """A copy of the network that is made while hooks are open does not report to the monitor."""

    class Copies(Healthy):
        def training_step(self, batch, batch_idx):
            twin = clone(self.net)
            twin(torch.full((50, FEATURES), 1e6))
            return super().training_step(batch, batch_idx)

    monitor = ActivationMonitor(every_n_steps=1)
    make_trainer(monitor).fit(Copies(), loader())
    assert monitor.statistics["net.0"].count == 8 * WIDTH


class Block(nn.Module):
    """A block whose own operations are cached by selective checkpointing."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.one(x)
        return self.other(torch.tanh(h) * (1 + h.mean() ** 2))


class Selective(nn.Module):
    """Keeps some results of a block and computes the others again in backward."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(FEATURES, WIDTH), Block(), nn.Linear(WIDTH, 4)

    def forward(self, x):
        kept = [torch.ops.aten.addmm.default, torch.ops.aten.mean.default]
        contexts = partial(create_selective_checkpoint_contexts, kept)
        return self.head(checkpoint(self.block, self.stem(x), use_reentrant=False, context_fn=contexts))


class Distills(Healthy):
    """Learns from a transformer in eval mode, through which torch takes a faster way while nothing listens."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 8, 256, batch_first=True, norm_first=True)
        self.teacher = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        self.embed, self.out = nn.Linear(1, 128), nn.Linear(128, 4)

    def on_train_start(self):
        self.teacher.eval()

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            padding = torch.zeros(batch[0].shape, dtype=torch.bool)
            padding[1:, 6:] = True
            wanted = self.out(self.teacher(self.embed(batch[0][..., None]), src_key_padding_mask=padding).mean(1))
        return nn.functional.mse_loss(self(batch[0]), wanted)


BUILDS = {"selective checkpointing": lambda: Healthy(Selective()), "a teacher in eval mode": Distills}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")  # the teacher, on purpose
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_training_stays_bit_identical_beside_torchs_own_shortcuts(make_trainer, build):
    """Hooks neither enter the cache of selective checkpointing nor switch off a fast path."""

    def weights(callbacks):
        seed_everything(3)
        model = build()
        make_trainer(*callbacks, max_epochs=3).fit(model, loader())
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights([]), weights(monitors()), strict=True))


class ClosedStream(io.StringIO):
    """Standard error whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("sick", [True, False], ids=["sick", "healthy"])
def test_a_closed_stream_neither_ends_the_run_nor_loses_a_finding(make_trainer, monkeypatch, sick):
    """What cannot be printed is on disk, and training goes on."""
    monkeypatch.setattr(sys, "stderr", ClosedStream())
    trainer = make_trainer(NaNGuard("warn"), BatchNormMonitor())
    trainer.fit(Healthy(with_module(LogOfNegative()) if sick else network()), loader(), loader(seed=1))
    assert trainer.global_step == 4
    assert ("invalid-operation" if sick else "affine-drift") in {f.rule for f in read_findings(trainer.log_dir)}


def test_a_file_system_without_its_driver_hides_no_exception(make_trainer):
    """The project's own exception leaves the fit, whatever happens to the findings file."""

    class Raises(Healthy):
        def training_step(self, batch, batch_idx):
            self.loss(self(batch[0]), batch[1])
            raise FloatingPointError

    guard = NaNGuard()
    trainer = make_trainer(guard, logger=False)
    trainer._default_root_dir = "nosuchprotocol://bucket"
    with pytest.raises(FloatingPointError):
        trainer.fit(Raises(with_module(LogOfNegative())), loader())
    assert [finding.rule for finding in guard.findings] == ["non-finite-output"]


def test_batchnorm_without_beta_is_no_error(make_trainer):
    """A layer whose β was taken away is passed over."""
    net = network()
    net[1].bias = None
    monitor = BatchNormMonitor(assess=False)
    make_trainer(monitor).fit(Healthy(net), loader(), loader(seed=1))
    assert list(monitor.findings[-1].data["since_start"]) == ["net.4"]


def test_a_fit_shorter_than_the_interval_is_said_to_be_unmeasured(make_trainer):
    """Four steps with an interval of 50: only the first one is measured, and an info says so."""
    monitor = ActivationMonitor()
    make_trainer(monitor, log_every_n_steps=1).fit(Healthy(), loader())
    make_trainer(monitor, log_every_n_steps=50).fit(Healthy(), loader())
    assert monitor.statistics["net.0"].count == 8 * 16
    assert "4 steps were taken, and every 50th is measured" in monitor.findings[-1].evidence


def test_vmap_over_a_layer_switches_nothing_off(make_trainer):
    """Values inside a functorch transform are passed over."""

    class Maps(Healthy):
        def training_step(self, batch, batch_idx):
            return torch.func.vmap(self.net[0])(batch[0]).square().mean()

    watching = monitors()
    make_trainer(*watching).fit(Maps(network(norm=False)), loader())
    assert not any(monitor.off for monitor in watching)
