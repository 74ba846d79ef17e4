# SPDX-License-Identifier: Apache-2.0
"""What the monitors cost: paired with plain training, in one process.

Run:     python benchmarks/overhead.py [--steps 60] [--rounds 7]
         OMP_NUM_THREADS=1 python benchmarks/overhead.py --only nan_guard [--device cuda] [--rounds 21]
Output:  a markdown table: median over the rounds of (time with monitors) / (time without), with the smallest and the
         largest ratio. The first row pairs plain training with itself: what it differs from 1 by is noise.
         With --only, the guard comes and goes in one and the same fit, a few steps at a time, and a second table
         counts the values that it brings to the host.
"""

from __future__ import annotations

import argparse
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from networks import ON_CPU, ON_GPU, Subject
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn import ActivationMonitor, BatchNormMonitor, NaNGuard
from lightning_bn.demo import DigitsData, DigitsMLP, DigitsResNet

NETWORKS: dict[str, Callable[[], LightningModule]] = {
    "MLP, 2 x 128": DigitsMLP,
    "ResNet, 0.04 M": DigitsResNet,
    "ResNet, 0.7 M": lambda: DigitsResNet(width=64),
}
MONITORS: dict[str, Callable[[], list[Callback]]] = {
    "none (noise)": list,
    "all three, defaults": lambda: [NaNGuard(), ActivationMonitor(), BatchNormMonitor()],
    "ActivationMonitor, every step": lambda: [ActivationMonitor(every_n_steps=1)],
    "BatchNormMonitor, every step": lambda: [BatchNormMonitor(every_n_steps=1)],
}
ONLY: dict[str, Callable[[], Callback]] = {"nan_guard": NaNGuard}
READS = ("_local_scalar_dense", "equal", "nonzero")
MOVES = ("_to_copy", "copy_")
COUNTED = 12

Variant = AbstractContextManager[object]
"""What is there in some blocks of steps and not in the others; entered once for each such block."""


class Clock(Callback):
    """Times the training steps after the first few, which warm up."""

    warm_up = 5

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        """Start when the warm-up is over."""
        if trainer.global_step == self.warm_up:
            self.started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, *_: object) -> None:
        """Stop."""
        self.seconds = (time.perf_counter() - self.started) / (trainer.global_step - self.warm_up)


class Idle(Callback):
    """Does nothing, in the hooks of a training step: what it costs is Lightning's."""

    def on_train_batch_start(self, *_: object) -> None:
        """Nothing."""

    def on_before_backward(self, *_: object) -> None:
        """Nothing."""

    def on_after_backward(self, *_: object) -> None:
        """Nothing."""

    def on_before_optimizer_step(self, *_: object) -> None:
        """Nothing."""

    def on_train_batch_end(self, *_: object) -> None:
        """Nothing."""


@dataclass
class Pairs:
    """Seconds of a step, round by round: without a variant, and with it."""

    plain: list[float] = field(default_factory=list)
    with_it: list[float] = field(default_factory=list)

    def row(self) -> str:
        """Plain step, extra time, ratio, the middle half and the range of the ratios, as cells of a table."""
        ratios = [b / a for a, b in zip(self.plain, self.with_it, strict=True)]
        extra = median(b - a for a, b in zip(self.plain, self.with_it, strict=True))
        low, _, high = quantiles(ratios, n=4)
        shown = f"{1e3 * median(self.plain):.2f} ms | {1e6 * extra:+.0f} µs | {median(ratios):.3f}"
        return f"{shown} | {low:.3f} to {high:.3f} | {min(ratios):.3f} to {max(ratios):.3f}"


class Switch(Callback):
    """Lets variants come and go within one fit: without, with, with, without, a block of steps each.

    Args:
        variants: makes the block of each variant anew; the trainer's callbacks may be changed in it.
        block: steps in a block.
        rounds: how often all variants take their turn.
        warm_up: steps before the first block, which run with every callback that the trainer was given.
    """

    def __init__(
        self, variants: Mapping[str, Callable[[Trainer], Variant]], *, block: int, rounds: int, warm_up: int = 5
    ) -> None:
        self.pairs = {name: Pairs() for name in variants}
        self._variants = variants
        turns = [(name, there) for _ in range(rounds) for name in variants for there in (False, True, True, False)]
        self._turns = iter(turns)
        self._now: tuple[str, bool] | None = None
        self._open: Variant = nullcontext()
        self._block, self._left = block, warm_up
        self._spent: list[float] = []
        self._started = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Count, and switch at the end of a block; the last callback of the trainer, so that all others are done."""
        self._left -= 1
        if self._left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._note(time.perf_counter() - self._started)
        self._open.__exit__(None, None, None)
        self._now = next(self._turns, None)
        if self._now is None:
            trainer.should_stop = True
            return
        name, there = self._now
        trainer.callbacks = [self]  # type: ignore[attr-defined]  # declared nowhere
        self._open = self._variants[name](trainer) if there else nullcontext()
        self._open.__enter__()
        self._left = self._block
        self._started = time.perf_counter()

    def _note(self, seconds: float) -> None:
        if self._now is None:
            return
        self._spent.append(seconds / self._block)
        if len(self._spent) == 4:  # noqa: PLR2004  (without, with, with, without)
            first, second, third, last = self._spent
            self.pairs[self._now[0]].plain.append((first + last) / 2)
            self.pairs[self._now[0]].with_it.append((second + third) / 2)
            self._spent = []


def present(callback: Callback) -> Callable[[Trainer], Variant]:
    """A variant: one more callback."""

    @contextmanager
    def there(trainer: Trainer) -> Iterator[None]:
        trainer.callbacks.insert(0, callback)  # type: ignore[attr-defined]  # the same
        yield

    return there


def fit(subject: Subject, callbacks: list[Callback], device: str, **options: Any) -> None:
    """Train a network on one batch, over and over."""
    seed_everything(1, verbose=False)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        trainer = Trainer(
            accelerator=device,
            devices=1,
            precision="bf16-mixed" if device == "cuda" else "32-true",
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=callbacks,
            **{"max_epochs": 1, **options},
        )
        trainer.fit(subject.model(), subject.loader())


class Reads(TorchDispatchMode):
    """Counts the values that come to the host, step by step, apart for the forward pass and the rest."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.forward = False
        self.steps: list[list[int]] = [[0, 0]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation that makes the host wait; called by torch."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        source = args[1 if name == "copy_" else 0] if name in MOVES else None
        comes = isinstance(out, torch.Tensor) and isinstance(source, torch.Tensor) and out.device.type == "cpu"
        if name in READS or (comes and source.device.type != "cpu"):
            self.steps[-1][0 if self.forward else 1] += 1
        return out


class Border(Callback):
    """Tells the counter where the forward pass begins and ends.

    Args:
        reads: the counter.
        first: whether this is the trainer's first callback, which sees the forward pass end; the last one sees it
            begin, when the others have made ready.
    """

    def __init__(self, reads: Reads, *, first: bool) -> None:
        self.reads, self.first = reads, first

    @property
    def state_key(self) -> str:
        """A name for each of the two; read by Lightning."""
        return f"Border{self.first}"

    def on_train_batch_start(self, *_: object) -> None:
        """The forward pass begins; on a GPU nothing may wait for it from now on."""
        if not self.first:
            self.reads.forward = True
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("error")

    def on_before_backward(self, *_: object) -> None:
        """The forward pass is over."""
        if self.first:
            self.reads.forward = False
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")

    def on_train_batch_end(self, *_: object) -> None:
        """The step is over."""
        if not self.first:
            self.reads.steps.append([0, 0])


def host_reads(subject: Subject, callbacks: list[Callback], device: str) -> list[list[int]]:
    """Values brought to the host in each step: in the forward pass, and in the rest of it."""
    reads = Reads()
    with reads:
        around = [Border(reads, first=True), *callbacks, Border(reads, first=False)]
        fit(subject, around, device, max_steps=COUNTED, max_epochs=-1, log_every_n_steps=COUNTED)
    return reads.steps[:COUNTED]


def only(name: str, device: str, rounds: int) -> None:
    """Measure one monitor closely, and print both tables."""
    subjects = ON_GPU if device == "cuda" else ON_CPU
    columns = "plain step | more | extra | x plain | middle half | range"
    print(f"| network | with | {columns} |\n|---|---|---:|---:|---:|---|---|".replace("more | ", ""))
    for network, subject in subjects.items():
        monitor, idle = ONLY[name](), Idle()
        variants = {"nothing (noise)": lambda _: nullcontext(), "an empty callback": present(idle)}
        switch = Switch({**variants, name: present(monitor)}, block=subject.block, rounds=rounds)
        fit(subject, [monitor, idle, switch], device)
        for variant, pairs in switch.pairs.items():
            print(f"| {network}, batch {subject.batch} | {variant} | {pairs.row()} |", flush=True)
    print("\n| host reads of a step, beyond plain | forward pass | rest | forward pass, due | rest, due |")
    print("|---|---:|---:|---:|---:|")
    for network, subject in subjects.items():
        plain, watched = (host_reads(subject, made, device) for made in ([], [ONLY[name]()]))
        beyond = [[b - a for a, b in zip(*both, strict=True)] for both in zip(plain, watched, strict=True)]
        usual, due = beyond[COUNTED // 2], beyond[-1]
        print(f"| {network} | {usual[0]} | {usual[1]} | {due[0]} | {due[1]} |", flush=True)
