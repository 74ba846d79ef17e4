# SPDX-License-Identifier: Apache-2.0
"""Loss and weights of runs that diverge and of runs that do not: what the rule diverged-by-learning-rate stands on.

Run:     python benchmarks/divergence.py [--seeds 5] [--steps 360]
Data:    scikit-learn's digits, 1100 to train on, 600 to validate; batch 64 where nothing else is said.
Output:  two markdown tables. Of healthy runs, over all steps and seeds: the largest ratio of a loss to the first loss,
         the share of steps in which the rule would take loss or weights for a divergence, the largest weight over that
         before the first step, and the lowest accuracy at the end. Of runs without norm at large learning rates: how
         many ended in a loss or gradient that is not finite, and from the smallest to the largest of those the step,
         the last finite loss over the first, the largest weight over that before the first step.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice

import torch
from torch import Tensor, nn

from lightning_bn import initialize
from lightning_bn.demo import DigitsData, DigitsMLP, DigitsResNet
from lightning_bn.rules.diverged_by_learning_rate import History
from lightning_bn.schemes import Scheme

Build = Callable[[int], nn.Module]
Optimise = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
BATCH = 64
TUNED = 360  # steps of the training that a fine-tuning starts from
DEPTHS, RATES = (2, 3, 5), (10.0, 3.0, 1.0)


@dataclass
class Run:
    """One training, step by step; the last entries are those of the step that was not finite, where one was."""

    first: float = math.nan
    losses: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    ended: bool = False
    accuracy: float = math.nan

    @property
    def ratios(self) -> list[float]:
        """Each finite loss over the first."""
        return [loss / self.first for loss in self.losses]

    @property
    def growths(self) -> list[float]:
        """The largest weight before each step over that before the first."""
        return [weight / self.weights[0] for weight in self.weights]

    def history(self, step: int) -> History:
        """What a guard knows in a step."""
        losses = self.losses[: step + 1]
        return History(step, self.first, losses[-1:], self.weights[0], self.weights[step])


def mlp(norm: str, scheme: Scheme | float, seed: int, depth: int = 3) -> nn.Module:
    """A perceptron of 128 units a layer."""
    torch.manual_seed(seed)
    model = DigitsMLP(norm, depth=depth)  # type: ignore[arg-type]
    initialize(model, scheme, seed=seed)
    return model


def resnet(seed: int) -> nn.Module:
    """A residual network of 4 blocks with BatchNorm."""
    torch.manual_seed(seed)
    model = DigitsResNet("batch")
    initialize(model, "he", seed=seed)
    return model


def tuned(norm: str, seed: int) -> nn.Module:
    """A perceptron that was trained before."""
    model = mlp(norm, "he", seed)
    train(model, adam(1e-3), seed, steps=TUNED)
    return model


def adam(lr: float) -> Optimise:
    """Adam."""
    return partial(torch.optim.Adam, lr=lr)


def sgd(lr: float, momentum: float = 0.0) -> Optimise:
    """Stochastic gradient descent."""
    return partial(torch.optim.SGD, lr=lr, momentum=momentum)


HEALTHY: dict[str, tuple[Build, Optimise, int]] = {
    "MLP, He, Adam 1e-3": (partial(mlp, "none", "he"), adam(1e-3), BATCH),
    "MLP, He, SGD 0.1": (partial(mlp, "none", "he"), sgd(0.1), BATCH),
    "MLP, He, SGD 0.01, batch 4": (partial(mlp, "none", "he"), sgd(0.01), 4),
    "MLP, N(0, 0.01²), Adam 1e-3": (partial(mlp, "none", "naive"), adam(1e-3), BATCH),
    "MLP, N(0, 0.01²), SGD 0.1, momentum 0.9": (partial(mlp, "none", "naive"), sgd(0.1, 0.9), BATCH),
    "MLP, U(−0.05, 0.05), SGD 0.1, momentum 0.9": (partial(mlp, "none", "uniform"), sgd(0.1, 0.9), BATCH),
    "MLP with BatchNorm, He, Adam 1e-3": (partial(mlp, "batch", "he"), adam(1e-3), BATCH),
    "MLP with BatchNorm, He, SGD 0.1, momentum 0.9": (partial(mlp, "batch", "he"), sgd(0.1, 0.9), BATCH),
    "ResNet with BatchNorm, He, Adam 1e-3": (resnet, adam(1e-3), BATCH),
    "ResNet with BatchNorm, He, SGD 0.1, momentum 0.9": (resnet, sgd(0.1, 0.9), BATCH),
    "trained MLP, Adam 1e-4, batch 8": (partial(tuned, "none"), adam(1e-4), 8),
    "trained MLP with BatchNorm, Adam 1e-4, batch 8": (partial(tuned, "batch"), adam(1e-4), 8),
}


@cache
def digits() -> tuple[Tensor, ...]:
    """Images and labels, to train on and to validate."""
    data = DigitsData()
    data.setup("fit")
    if data.train_set is None or data.val_set is None:
        raise RuntimeError("the digits need to be there after setup, and are not")
    return (*data.train_set.tensors, *data.val_set.tensors)


def largest(model: nn.Module) -> float:
    """The largest finite absolute weight, of parameters of all kinds."""
    return max(x.detach().nan_to_num(0, 0, 0).abs().max().item() for x in model.parameters())


def batches(images: int, batch: int, seed: int) -> Iterator[Tensor]:
    """The numbers of the images in each batch, one epoch after the other."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(images, generator=order), batch)


def train(model: nn.Module, optimise: Optimise, seed: int, *, steps: int, batch: int = BATCH) -> Run:
    """Train for some steps, or until loss or gradients are not finite."""
    images, labels, val_images, val_labels = digits()
    run = Run()
    optimizer = optimise(model.parameters())
    for rows in islice(batches(len(images), batch, seed), steps):
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        run.weights.append(largest(model))
        if math.isfinite(loss.item()):
            run.first = run.losses[0] if run.losses else loss.item()
            run.losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        finite = all(x.grad is None or bool(x.grad.isfinite().all()) for x in model.parameters())
        if not math.isfinite(loss.item()) or not finite:
            run.ended = True
            return run
        optimizer.step()
    with torch.no_grad():
        run.accuracy = (model.eval()(val_images).argmax(1) == val_labels).float().mean().item()
    return run


def healthy_row(name: str, runs: Sequence[Run]) -> str:
    """One row of the table of healthy runs."""
    past = [run.history(step) for run in runs for step in range(len(run.losses))]
    said = sum(row.diverged for row in past)
    ratio, growth = (max(max(values) for values in rows) for rows in zip(*map(_courses, runs), strict=True))
    lowest = min(run.accuracy for run in runs)
    return f"| {name} | {ratio:.3g} | {growth:.3g} | {said} of {len(past)} steps | {lowest:.2f} |"


def diverging_row(name: str, runs: Sequence[Run]) -> str:
    """One row of the table of runs at large learning rates."""
    ended = [run for run in runs if run.ended]
    if not ended:
        return f"| {name} | 0 of {len(runs)} | | | | |"
    spans = (
        _span([len(run.weights) - 1 for run in ended], "d"),
        _span([run.ratios[-1] for run in ended], ".2g"),
        _span([run.growths[-1] for run in ended], ".2g"),
    )
    last = [run.history(len(run.weights) - 1) for run in ended]
    said = sum(row.diverged for row in last)
    return f"| {name} | {len(ended)} of {len(runs)} | {' | '.join(spans)} | {said} of {len(ended)} |"


def main() -> None:
    """Train every network, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=360, help="steps of each run (default: %(default)s)")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, CPU; {options.seeds} seeds, {options.steps} steps\n")
    print("| healthy run | loss / first | weight / first | would be called diverged | accuracy |")
    print("|---|---:|---:|---:|---:|")
    for name, (build, optimise, batch) in HEALTHY.items():
        runs = [train(build(seed), optimise, seed, steps=options.steps, batch=batch) for seed in range(options.seeds)]
        print(healthy_row(name, runs), flush=True)
    print("\n| MLP without norm, He, SGD | ended | step | last loss / first | weight / first | called diverged |")
    print("|---|---:|---:|---:|---:|---:|")
    for depth, rate in ((depth, rate) for depth in DEPTHS for rate in RATES):
        runs = [
            train(mlp("none", "he", seed, depth), sgd(rate), seed, steps=options.steps) for seed in range(options.seeds)
        ]
        print(diverging_row(f"{depth} layers, rate {rate:g}", runs), flush=True)


def _courses(run: Run) -> tuple[list[float], list[float]]:
    return run.ratios, run.growths


def _span(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


if __name__ == "__main__":
    main()
