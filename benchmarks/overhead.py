# SPDX-License-Identifier: Apache-2.0
"""What the monitors cost: paired with plain training, in one process.

Run:     python benchmarks/overhead.py [--steps 60] [--rounds 7]
Output:  a markdown table: median over the rounds of (time with monitors) / (time without), with the smallest and the
         largest ratio. The first row pairs plain training with itself: what it differs from 1 by is noise.
"""

from __future__ import annotations

import argparse
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from statistics import median

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

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


def main() -> None:
    """Measure every network with every set of monitors, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps in each run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs (default: %(default)s)")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    setting = f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, batch 64"
    print(f"{setting}, {options.rounds} rounds of {options.steps} steps\n")
    print("| network | plain step | monitors | x plain | range |\n|---|---:|---|---:|---:|")
    for network, build in NETWORKS.items():
        for name, monitors in MONITORS.items():
            plain, ratios = [], []
            with redirect_stderr(io.StringIO()):  # the monitors' findings
                for _ in range(options.rounds):
                    plain.append(seconds_per_step(build, [], options.steps))
                    ratios.append(seconds_per_step(build, monitors(), options.steps) / plain[-1])
            row = f"| {network} | {1e3 * median(plain):.1f} ms | {name} | {median(ratios):.2f}"
            print(f"{row} | {min(ratios):.2f} to {max(ratios):.2f} |", flush=True)


if __name__ == "__main__":
    main()
