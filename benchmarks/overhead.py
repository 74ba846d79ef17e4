# SPDX-License-Identifier: Apache-2.0
"""What the monitors cost: paired with plain training, in one process.

Run:     python benchmarks/overhead.py [--steps 60] [--rounds 7]
         OMP_NUM_THREADS=1 python benchmarks/overhead.py --only nan_guard [--device cuda] [--rounds 21]
Output:  a markdown table: median over the rounds of (time with monitors) / (time without), with the smallest and the
         largest ratio. The first row pairs plain training with itself: what it differs from 1 by is noise.
         With --only, the monitor comes and goes in one and the same fit, a few steps at a time; two more tables say
         how long its hooks take, and count the values that it brings to the host in a step.
"""

from __future__ import annotations

import argparse
import io
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from networks import ON_CPU, ON_GPU, Subject, Switch, fit, present
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
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
READS = ("_local_scalar_dense", "equal", "nonzero")
MOVES = ("_to_copy", "copy_")
COUNTED = 12


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


Idle = type("Idle", (Callback,), {hook: lambda *_: None for hook in HOOKS})
"""Does nothing, in the hooks of a training step: what it costs is Lightning's."""


def timed(callback: Callback) -> dict[str, list[float]]:
    """Let a callback note the seconds of each call of its hooks."""
    spent: dict[str, list[float]] = defaultdict(list)

    def call(hook: str, inner: Callable[..., None], *args: Any) -> None:
        started = time.perf_counter()
        inner(*args)
        spent[hook].append(time.perf_counter() - started)

    for hook in HOOKS:
        setattr(callback, hook, partial(call, hook, getattr(callback, hook)))
    return spent


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
    """Measure one monitor closely, and print three tables."""
    subjects = ON_GPU if device == "cuda" else ON_CPU
    hooks = {}
    print("| network | with | plain step | extra | x plain | middle half | range |\n|---|---|---:|---:|---:|---|---|")
    for network, subject in subjects.items():
        monitor, idle = ONLY[name](), Idle()
        hooks[network] = timed(monitor)
        variants = {"nothing (noise)": lambda _: nullcontext(), "an empty callback": present(idle)}
        switch = Switch({**variants, name: present(monitor)}, block=subject.block, rounds=rounds)
        fit(subject, [monitor, idle, switch], device)
        for variant, pairs in switch.pairs.items():
            print(f"| {network}, batch {subject.batch} | {variant} | {pairs.row()} |", flush=True)
    print(f"\n| µs in {name} | {' | '.join(HOOKS)} | all |\n|---|{'---:|' * (len(HOOKS) + 1)}")
    for network, spent in hooks.items():
        each = [1e6 * median(spent[hook]) for hook in HOOKS]
        print(f"| {network} | {' | '.join(f'{value:.0f}' for value in [*each, sum(each)])} |")
    print_reads(name, subjects, device)


def print_reads(name: str, subjects: dict[str, Subject], device: str) -> None:
    """Count what a monitor brings to the host in a step, beyond what plain training does."""
    print("\n| host reads of a step | forward pass | rest | forward pass, due | rest, due |\n|---|---:|---:|---:|---:|")
    for network, subject in subjects.items():
        plain, watched = (host_reads(subject, made, device) for made in ([], [ONLY[name]()]))
        beyond = [[b - a for a, b in zip(*both, strict=True)] for both in zip(plain, watched, strict=True)]
        usual, due = beyond[COUNTED // 2], beyond[-1]
        print(f"| {network} | {usual[0]} | {usual[1]} | {due[0]} | {due[1]} |", flush=True)


def seconds_per_step(build: Callable[[], LightningModule], monitors: list[Callback], steps: int) -> float:
    """Mean duration of a training step."""
    seed_everything(1, verbose=False)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=steps + Clock.warm_up,
            limit_val_batches=0,
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[*monitors, clock],
        )
        trainer.fit(build(), datamodule=DigitsData())
    return clock.seconds


def everything(rounds: int, steps: int) -> None:
    """Measure every network with every set of monitors, and print the table."""
    print("| network | plain step | monitors | x plain | range |\n|---|---:|---|---:|---:|")
    for network, build in NETWORKS.items():
        for name, monitors in MONITORS.items():
            plain, ratios = [], []
            with redirect_stderr(io.StringIO()):  # the monitors' findings
                for _ in range(rounds):
                    plain.append(seconds_per_step(build, [], steps))
                    ratios.append(seconds_per_step(build, monitors(), steps) / plain[-1])
            row = f"| {network} | {1e3 * median(plain):.1f} ms | {name} | {median(ratios):.2f}"
            print(f"{row} | {min(ratios):.2f} to {max(ratios):.2f} |", flush=True)


def main() -> None:
    """Print the setting, and what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps in each run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="pairs of runs (default: 7; with --only: 21)")
    parser.add_argument("--only", choices=ONLY, help="measure one monitor alone, and closely")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="with --only: where (%(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use")
    logging.disable()
    warnings.simplefilter("ignore")
    rounds = options.rounds or (21 if options.only else 7)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    setting = f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads"
    if options.only:
        print(f"{setting}, {rounds} rounds of without, with, with, without in one fit\n")
        only(options.only, options.device, rounds)
    else:
        print(f"{setting}, batch 64, {rounds} rounds of {options.steps} steps\n")
        everything(rounds, options.steps)


if __name__ == "__main__":
    main()
