# SPDX-License-Identifier: Apache-2.0
"""A training script for two processes, started by test_ddp.py; each rank leaves a JSON file."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from overfits import Overfits, sets
from specimens import Healthy, LogOfNegative, LogOfZeroInLoss, loader, network, with_module
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationMonitor, BatchNormMonitor, NaNGuard, NonFiniteError, PreciseBatchNorm, WeightInit
from lightning_bn.callbacks import assessment
from lightning_bn.callbacks.base import shielded
from lightning_bn.demo import DigitsData, DigitsResNet

warnings.simplefilter("ignore")
RANK = int(os.environ.get("LOCAL_RANK", "0"))


class BreaksOnRankOne(ActivationMonitor):
    """Has an error of its own on one rank alone, in its second measured step."""

    @shielded
    def _hear(self, *args):
        assert not (RANK == 1 and self.statistics), "a bug of ours on rank 1"
        return super()._hear(*args)


class Sharded(Healthy):
    """Rank 0 sees the first 5 samples of each batch of 8, rank 1 the other 3."""

    def __init__(self, norm=False):
        super().__init__(network(norm=norm), lr=0.0)

    def train_dataloader(self):
        x, y = (torch.cat(parts) for parts in zip(*loader(), strict=True))
        mine = [i for i in range(len(x)) if (i % 8 < 5) == (RANK == 0)]
        return DataLoader(TensorDataset(x[mine], y[mine]), 5 if RANK == 0 else 3)


class Spoils(nn.Module):
    """Makes NaN of two values on rank 1 alone."""

    def forward(self, x):
        return x.masked_fill(torch.arange(x.numel()).view_as(x) < 2 * RANK, float("nan"))


class Beside(Sharded):
    """Spoils a copy of the input, of which the loss knows nothing."""

    def __init__(self):
        super().__init__()
        self.side = Spoils()

    def forward(self, x):
        self.side(x)
        return super().forward(x)


class NotAgain(Sharded):
    """On rank 1 alone, the step does not run a second time."""

    def training_step(self, batch, batch_idx):
        if RANK == 1 and batch_idx in self.__dict__.setdefault("seen", set()):
            raise RuntimeError("no second run")
        self.seen.add(batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        self.__dict__["seen"] = set()


class OwnData(Healthy):
    """The same batches on both ranks, with a planted NaN on rank 1 on request."""

    def __init__(self, net=None, plant=False):
        super().__init__(net)
        self.plant = plant

    def train_dataloader(self):
        def change(inputs):
            inputs[5, 3] = float("nan")

        return loader(plant=change if self.plant and RANK == 1 else None)


class OwnLoss(LogOfZeroInLoss):
    """log(0) in training_step, which a distributed Trainer calls through the model itself."""

    def train_dataloader(self):
        return loader()


class Late(OwnData):
    """A fault on rank 1 alone, in the third batch alone, of one of several kinds."""

    def __init__(self, kind):
        super().__init__(network(norm=kind == "statistics"), plant=False)
        self.kind = kind

    def train_dataloader(self):
        def change(inputs):
            if RANK == 1 and self.kind == "sample":
                inputs[16 + 5, 3] = float("nan")
            if RANK == 0 and self.kind == "statistics":  # DDP gives those of rank 0 to all
                inputs[16:24] *= 1e30

        return loader(plant=change)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        bad = RANK == 1 and batch_idx == 2
        if self.kind == "talks":
            loss = loss + 0 * self.all_gather(loss.detach()).sum()
        if bad and self.kind == "gradient":
            loss = loss + torch.sqrt(loss * 0)
        if bad and self.kind in {"loss", "talks"}:
            loss = loss * torch.log(loss * 0 - 1)
        if bad and self.kind == "loss without gradient":
            loss = loss + torch.log(loss.detach() * 0 - 1)
        return loss


class LateValidation(OwnData):
    """Rank 1 validates on a bad sample."""

    def validation_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def val_dataloader(self):
        def change(inputs):
            inputs[16 + 5, 3] = float("nan")

        return loader(plant=change if RANK == 1 else None)


class LateSharded(OwnData):
    """FSDP2: each rank holds a part of each gradient, and rank 1 alone makes them bad."""

    def __init__(self):
        super().__init__(network(norm=False))

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  (a heavy import)

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch[0]), batch[1])
        return loss + torch.sqrt(loss * 0) if RANK == 1 and batch_idx == 2 else loss


class ShardedNorm(OwnData):
    """FSDP2: each rank holds a part of γ and of β."""

    def __init__(self):
        super().__init__(network(norm=True))

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  (the same)

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Halves(Overfits):
    """Each rank has its own samples, in batches of its own size: those that rank 1 validates on are harder."""

    def __init__(self, fails=False, talks=True):
        super().__init__()
        self.fails, self.talks = fails, talks
        assessment.LARGE = 12  # the batches of rank 0 make two large ones, those of rank 1 make one

    def train_dataloader(self):
        x, y = sets()[0].tensors
        mine = [i for i in range(len(x)) if (i % 8 < 5) == (RANK == 0)]
        return DataLoader(TensorDataset(x[mine], y[mine]), 5 if RANK == 0 else 3)

    def val_dataloader(self):
        x, y = sets()[1].tensors
        mine = slice(0, 120) if RANK == 0 else slice(120, 240)
        return DataLoader(TensorDataset(x[mine], y[mine].roll(30 * RANK)), 20)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 0 * self.all_gather(loss.detach()).sum() if self.talks else loss

    def validation_step(self, batch, batch_idx):
        if self.fails and RANK == 1 and self.current_epoch == self.trainer.max_epochs:
            raise RuntimeError("no second run on rank 1")
        loss = self.loss(self(batch[0] + 1e-3 * torch.randn_like(batch[0])), batch[1])
        self.log("val_loss", loss + 0 * self.all_gather(loss).sum() if self.talks else loss)


class Domains(Overfits):
    """Each rank draws from data of its own kind, or both from the same."""

    def __init__(self, shift):
        super().__init__(lr=1e-3)
        self.shift = shift * RANK

    def train_dataloader(self):
        x, y = sets(800)[0].tensors
        mine, generator = torch.arange(len(x)) % 2 == RANK, torch.Generator().manual_seed(RANK)
        return DataLoader(TensorDataset(x[mine] + self.shift, y[mine]), 8, shuffle=True, generator=generator)

    def val_dataloader(self):
        return DataLoader(sets()[1], 60)


class BreaksInTheEnd(BatchNormMonitor):
    """Has an error of its own on rank 1 alone, when the fit ends."""

    @shielded
    def _conclude(self, *args):
        assert RANK == 0, "a bug of ours on rank 1"
        return super()._conclude(*args)


class Compiled(Sharded):
    """The network is compiled, and has dropout in front."""

    def __init__(self):
        super().__init__(norm=True)
        self.lr = 1e-2
        self.net = torch.compile(nn.Sequential(nn.Dropout(0.2), self.net), backend="eager")


class Nobody(Callback):
    """Watches nothing."""

    off, findings = False, ()


LATE = ("sample", "statistics", "gradient", "loss", "talks", "loss without gradient")


EVERYTHING = {"every_n_steps": 1, "max_overhead": None, "parameters": True, "gradients": True, "effective_rank": True}


def demo():
    return [WeightInit(), NaNGuard(), ActivationMonitor(every_n_steps=2), BatchNormMonitor()], DigitsResNet()


SCENARIOS = {
    "demo": demo,
    "pooled": lambda: ([ActivationMonitor(**EVERYTHING)], Beside()),
    "init": lambda: ([WeightInit(seed=None if RANK else 5)], OwnData()),
    "lsuv": lambda: ([WeightInit("lsuv", seed=5)], Sharded()),
    "nan on rank 1": lambda: ([NaNGuard("raise")], OwnData(plant=True)),
    "stop on rank 1": lambda: ([NaNGuard("stop")], OwnData(plant=True)),
    "nan on both": lambda: ([NaNGuard("raise")], OwnData(with_module(LogOfNegative()))),
    "nan in the loss": lambda: ([NaNGuard("raise")], OwnLoss()),
    **{f"late {kind}": (lambda kind=kind: ([NaNGuard("raise")], Late(kind))) for kind in LATE},
    **{f"skip {kind}": (lambda kind=kind: ([NaNGuard("skip")], Late(kind))) for kind in ("loss", "gradient")},
    "skip first": lambda: ([NaNGuard("skip")], OwnData(plant=True)),
    "late sharded": lambda: ([NaNGuard("raise")], LateSharded()),
    "sharded norm": lambda: ([BatchNormMonitor()], ShardedNorm()),
    "late validation": lambda: ([NaNGuard("raise")], LateValidation()),
    "precise": lambda: ([PreciseBatchNorm(when="end")], Sharded(norm=True)),
    "precise on rank 0": lambda: ([PreciseBatchNorm(when="end")], NotAgain(norm=True)),
    "overfits": lambda: ([BatchNormMonitor()], Halves()),
    "overfits, unwatched": lambda: ([Nobody()], Halves()),
    "overfits, fails on rank 1": lambda: ([BatchNormMonitor()], Halves(fails=True, talks=False)),
    "domains": lambda: ([BatchNormMonitor(assess=False)], Domains(1.0)),
    "domains, kept": lambda: ([BatchNormMonitor(assess=False)], Domains(1.0)),
    "domains, unwatched": lambda: ([Nobody()], Domains(1.0)),
    "domains alike": lambda: ([BatchNormMonitor(assess=False)], Domains(0.0)),
    "domains alike, kept": lambda: ([BatchNormMonitor(assess=False)], Domains(0.0)),
    "domains, breaks on rank 1": lambda: ([BreaksInTheEnd(assess=False)], Domains(1.0)),
    "compiled": lambda: ([ActivationMonitor(every_n_steps=1, max_overhead=None)], Compiled()),
    "compiled, unwatched": lambda: ([Nobody()], Compiled()),
    "breaks on rank 1": lambda: ([BreaksOnRankOne(every_n_steps=1), BatchNormMonitor()], OwnData()),
}


def digest_of(trainer: Trainer, model: LightningModule) -> str:
    """Weights, buffers, gradients, optimizer and random streams in one number."""
    gradients = {name: x.grad for name, x in model.named_parameters()}
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    buffer = io.BytesIO()
    torch.save([dict(model.state_dict()), gradients, optimizers, torch.get_rng_state(), random.getstate()], buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def weights_of(model: LightningModule) -> float:
    whole = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in model.parameters())
    return sum(float(parameter.double().abs().sum()) for parameter in whole)


def strategy_of(scenario: str) -> DDPStrategy | ModelParallelStrategy:
    if "sharded" in scenario:
        return ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", timeout=timedelta(seconds=60)
        )
    kept = scenario.endswith("kept")
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), broadcast_buffers=not kept)


def main(scenario: str, root: str) -> None:
    seed_everything(1 if scenario != "init" else 1 + RANK)
    callbacks, model = SCENARIOS[scenario]()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy_of(scenario),
        use_distributed_sampler=scenario == "demo",
        max_epochs=13 if "overfits" in scenario else 2,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        logger=TensorBoardLogger(root, name="run", version=0),
    )
    error = None
    try:
        trainer.fit(model, datamodule=DigitsData() if scenario == "demo" else None)
    except NonFiniteError as raised:
        error = str(raised)
    monitor = callbacks[0]
    rows = {name: vars(row) for name, row in getattr(monitor, "statistics", {}).items()}
    apart = [finding for finding in monitor.findings if finding.rule == "statistics-differ-between-ranks"]
    slopes = {name: vars(row) for name, row in (getattr(monitor, "gradients", None) or {}).items()}
    report = {
        "rank": RANK,
        "steps": trainer.global_step,
        "error": error,
        "off": [callback.off for callback in callbacks],
        "findings": [finding.rule for callback in callbacks for finding in callback.findings],
        "weights": weights_of(model),
        "finite": all(math.isfinite(float(x.double().sum())) for x in model.buffers())
        and math.isfinite(weights_of(model)),
        "rows": rows,
        "slopes": slopes,
        "ranks": getattr(monitor, "ranks", {}),
        "statistics": {name: x.tolist() for name, x in model.named_buffers() if "running" in name},
        "losses": repr(getattr(monitor, "losses", None)),
        "apart": next((dict(finding.data["layers"]["net.1"]) for finding in apart), None),
        "digest": digest_of(trainer, model) if scenario.startswith(("overfits", "domains", "compiled")) else "",
        "windows": monitor.state_dict().get("windows", {}).get("state", torch.zeros(0)).tolist(),
    }
    Path(root, f"rank{RANK}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
