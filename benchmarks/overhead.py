# SPDX-License-Identifier: Apache-2.0
"""What the monitors cost: paired with plain training, in one process.

Run:     python benchmarks/overhead.py [--steps 60] [--rounds 7]
         OMP_NUM_THREADS=1 python benchmarks/overhead.py --only nan_guard [--device cuda] [--rounds 31]
         OMP_NUM_THREADS=1 python benchmarks/overhead.py --only activation_monitor [--device cuda] [--rounds 31]
         OMP_NUM_THREADS=1 python benchmarks/overhead.py --only batchnorm_monitor [--device cuda] [--rounds 31]
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import partial
from statistics import mean, median, quantiles
from typing import Any

import torch
from host_reads import print_reads
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from networks import ON_CPU, ON_GPU, Subject, fit
from plain_sketch import PlainSketch

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
ONLY: dict[str, dict[str, Callable[[], Callback]]] = {
    "nan_guard": {"NaNGuard": NaNGuard},
    "activation_monitor": {
        "a plain sketch, every step": PlainSketch,
        "ActivationMonitor, every step": lambda: ActivationMonitor(every_n_steps=1, max_overhead=None),
        "ActivationMonitor, every 50th": lambda: ActivationMonitor(every_n_steps=50),
    },
    "batchnorm_monitor": {
        "BatchNormMonitor, every 50th": lambda: BatchNormMonitor(assess=False),
        "BatchNormMonitor, every step": lambda: BatchNormMonitor(every_n_steps=1, assess=False),
        "BatchNormMonitor, defaults": BatchNormMonitor,
    },
}
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)

INTERVAL = 50
"""Steps from one that is due by default to the next."""
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

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Stop, until the next step; what is drawn when the fit ends is no part of a step."""
        self.seconds = (time.perf_counter() - self.started) / max(trainer.global_step - self.warm_up, 1)


class Switch(Callback):
    """Lets variants come and go within one fit: without, with, with, without, a block of steps each.

    Args:
        variants: makes each variant anew for each of its blocks; the trainer's callbacks may be changed in it.
        block: steps in a block.
        rounds: how often all variants take their turn.
    """

    def __init__(self, variants: Mapping[str, Callable[[Trainer], Variant]], *, block: int, rounds: int) -> None:
        self.pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        """Seconds of a step without and with each variant, round by round."""
        self._variants, self._block, self._rounds = variants, block, rounds
        self._left = Clock.warm_up

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        """Make ready; the first few steps run with every callback that the trainer was given."""
        self._blocks = self._switch(trainer)

    def on_train_batch_end(self, *_: object) -> None:
        """Count; this is the last callback of the trainer, so that all others are done."""
        self._left -= 1
        if not self._left:
            self._left = next(self._blocks)

    def _switch(self, trainer: Any) -> Iterator[int]:
        """The number of steps in each block; what comes between two of them is not timed."""
        everyone = trainer.callbacks
        for name in [name for _ in range(self._rounds) for name in self._variants]:
            spent = []
            for there in (False, True, True, False):
                trainer.callbacks = [self]
                with self._variants[name](trainer) if there else nullcontext():
                    started = now()
                    yield self._block
                    spent.append((now() - started) / self._block)
            self.pairs[name].append(((spent[0] + spent[3]) / 2, (spent[1] + spent[2]) / 2))
        trainer.callbacks, trainer.should_stop = everyone, True
        yield 1


def now() -> float:
    """Seconds, when all that was queued on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def row(pairs: list[tuple[float, float]]) -> str:
    """Plain step, extra time, ratio, the middle half and the range of the ratios, as cells of a table."""
    ratios = [b / a for a, b in pairs]
    low, _, high = quantiles(ratios, n=4)
    shown = f"{1e3 * median(a for a, _ in pairs):.2f} ms | {1e6 * median(b - a for a, b in pairs):+.0f} µs"
    return f"{shown} | {median(ratios):.3f} | {low:.3f} to {high:.3f} | {min(ratios):.3f} to {max(ratios):.3f}"


@contextmanager
def present(callback: Callback, trainer: Any) -> Iterator[None]:
    """One more callback in a trainer, until its callbacks are set anew."""
    trainer.callbacks = [callback, *trainer.callbacks]
    yield


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


def paired(
    subject: Subject,
    callbacks: Mapping[str, Callback],
    others: Mapping[str, Callable[[Trainer], Variant]],
    rounds: int,
    device: str = "cpu",
    *,
    validates: bool = False,
) -> dict[str, list[tuple[float, float]]]:
    """Pair plain steps of a network with steps in which one more callback, or another variant, is there."""
    variants = {**others, **{name: partial(present, callback) for name, callback in callbacks.items()}}
    switch = Switch(variants, block=subject.block, rounds=rounds)
    fit(subject, [*callbacks.values(), switch], device, validates=validates)
    return switch.pairs


def only(name: str, device: str, rounds: int) -> None:
    """Measure one monitor closely, and print three tables."""
    subjects = ON_GPU if device == "cuda" else ON_CPU
    hooks = {}
    print("| network | with | plain step | extra | x plain | middle half | range |\n|---|---|---:|---:|---:|---|---|")
    for network, subject in subjects.items():
        empty = LambdaCallback(**dict.fromkeys(HOOKS, lambda *_: None))
        callbacks = {"an empty callback": empty, **{label: make() for label, make in ONLY[name].items()}}
        hooks |= {(network, label): timed(callback) for label, callback in callbacks.items()}
        noise: dict[str, Callable[[Trainer], Variant]] = {"nothing (noise)": lambda _: nullcontext()}
        validates = name == "batchnorm_monitor"
        for variant, pairs in paired(subject, callbacks, noise, rounds, device, validates=validates).items():
            print(f"| {network}, batch {subject.batch} | {variant} | {row(pairs)} |", flush=True)
    print(
        f"\n| µs in its hooks, a mean step | with | {' | '.join(HOOKS)} | all |\n|---|---|{'---:|' * (len(HOOKS) + 1)}"
    )
    for (network, label), spent in hooks.items():
        each = [1e6 * typical(spent[hook]) for hook in HOOKS]
        print(f"| {network} | {label} | {' | '.join(f'{value:.0f}' for value in [*each, sum(each)])} |")
    print_reads(next(make for make in ONLY[name].values() if make is not PlainSketch), subjects, device)


def typical(seconds: list[float]) -> float:
    """Mean of a step without the first tenth, which warms up.

    It is the median over stretches of so many steps as lie between two that are due: what else holds up a step now and
    then is left out, and due steps are not.
    """
    late = seconds[len(seconds) // 10 :]
    stretches = [late[at : at + INTERVAL] for at in range(0, len(late) - INTERVAL + 1, INTERVAL)]
    return median(mean(stretch) for stretch in stretches or [late or [0.0]])


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
    parser.add_argument("--rounds", type=int, help="pairs of runs (default: 7; with --only: 31)")
    parser.add_argument("--only", choices=ONLY, help="measure one monitor alone, and closely")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="with --only: where (%(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use")
    logging.disable()
    warnings.simplefilter("ignore")
    rounds = options.rounds or (31 if options.only else 7)
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
