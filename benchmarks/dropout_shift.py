# SPDX-License-Identifier: Apache-2.0
"""What dropout in front of BatchNorm costs in evaluation: what the rule dropout-before-batchnorm stands on.

Run:     python benchmarks/dropout_shift.py [--seeds 4]
Data:    scikit-learn's digits, 1100 or 100 of them to train on, 600 to validate; Adam 1e-3. Dropout stands behind each
         ReLU, so that it reaches the next BatchNorm through one layer with weights.
Output:  a markdown table. *Shift* is how much larger the validation loss is with running statistics taken as in
         training, with dropout, than with such as were taken over the same images without it; median over the seeds,
         smallest and largest. The last columns are the mean accuracies with both.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from zoo import mlp
from zoo_cases import accuracy, classify, train
from zoo_networks import CLASSES

from lightning_bn.norms import find_batchnorm

RATES = (0.0, 0.1, 0.3, 0.4, 0.5, 0.6)
PASSES = 4  # over the images, to average the masks


def convolutional(rate: float) -> nn.Sequential:
    """Four convolutions with BatchNorm, ReLU and dropout, and a head on their mean over the pixels."""
    layers: list[nn.Module] = []
    for inner, outer in ((1, 16), (16, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(), nn.Dropout(rate)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def perceptron(rate: float) -> nn.Sequential:
    """Three hidden layers of 128 with BatchNorm, ReLU and dropout."""
    return mlp(3, "batch", dropout=rate)


SETTINGS: dict[str, tuple[Callable[[float], nn.Module], int, int, int]] = {
    "MLP, 1100 images, batch 64": (perceptron, 1100, 64, 400),
    "MLP, 100 images, batch 8": (perceptron, 100, 8, 400),
    "CNN, 1100 images, batch 64": (convolutional, 1100, 64, 200),
}


@torch.no_grad()
def restated(model: nn.Module, images: Tensor, *, dropout: bool, batch: int) -> nn.Module:
    """A copy in evaluation mode with running statistics that were averaged over all batches."""
    model = copy.deepcopy(model).train()
    for norm in find_batchnorm(model).values():
        norm.reset_running_stats()
        norm.momentum = None
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(dropout)
    for _ in range(PASSES):
        for rows in torch.randperm(len(images)).split(batch):
            if len(rows) == batch:
                model(images[rows])
    return model.eval()


@torch.no_grad()
def measure(build: Callable[[], nn.Module], images: int, batch: int, steps: int, seed: int) -> tuple[float, ...]:
    """The shift, and the accuracies with and without it."""
    case = classify(build).build(seed)
    rows = torch.randperm(len(case.train[0]), generator=torch.Generator().manual_seed(seed))[:images]
    case = replace(case, train=(case.train[0][rows], case.train[1][rows]))
    with torch.enable_grad():
        train(case, steps, batch=batch, seed=seed)
    x, y = case.val
    as_trained = restated(case.model, case.train[0], dropout=True, batch=batch)(x)
    as_used = restated(case.model, case.train[0], dropout=False, batch=images)(x)
    losses = [F.cross_entropy(logits, y).item() for logits in (as_trained, as_used)]
    return losses[0] / losses[1] - 1, accuracy(as_trained, y), accuracy(as_used, y)


def row(name: str, rate: float, found: Sequence[tuple[float, ...]]) -> str:
    """One row of the table."""
    shifts, kept, without = zip(*found, strict=True)
    span = f"{median(shifts):+.0%} ({min(shifts):+.0%} to {max(shifts):+.0%})"
    return f"| {name} | {rate:g} | {span} | {mean(kept):.3f} | {mean(without):.3f} |"


def main() -> None:
    """Measure every setting at every rate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="runs of each row (default: %(default)s)")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, CPU; {options.seeds} seeds\n")
    print("| network | rate | shift of the loss | accuracy | accuracy without the shift |\n|---|---:|---:|---:|---:|")
    for name, (build, images, batch, steps) in SETTINGS.items():
        for rate in RATES:
            runs = [measure(partial(build, rate), images, batch, steps, seed) for seed in range(options.seeds)]
            print(row(name, rate, runs), flush=True)


if __name__ == "__main__":
    main()
