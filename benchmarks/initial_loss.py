# SPDX-License-Identifier: Apache-2.0
"""The first loss of usual and unusual starts: what the thresholds of the rule large-initial-loss stand on.

Run:     python benchmarks/initial_loss.py [--seeds 20]
Data:    64 images of scikit-learn's digits, another draw for each seed; no training.
Output:  a markdown table: smallest, median and largest initial loss over ln 10.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from statistics import median

import torch
from lightning.pytorch import LightningModule

from lightning_bn import initialize
from lightning_bn.demo import DigitsData, DigitsMLP, DigitsResNet

NETWORKS: dict[str, Callable[[], LightningModule]] = {
    **{
        f"MLP, {depth} layers, {'BatchNorm' if norm == 'batch' else 'no norm'}": (
            lambda norm=norm, depth=depth: DigitsMLP(norm, depth=depth)  # type: ignore[misc]
        )
        for norm in ("none", "batch")
        for depth in (2, 5, 20, 50)
    },
    **{
        f"ResNet, {2 * depth} blocks, BatchNorm": (lambda depth=depth: DigitsResNet("batch", depth=depth))  # type: ignore[misc]
        for depth in (2, 5, 8, 12)
    },
}
SCHEMES = ("he", "xavier", "orthogonal", "naive", "pytorch", 1.0, 1000.0)
BATCH, CLASSES = 64, 10


def ratio(build: Callable[[], LightningModule], scheme: str | float, seed: int) -> float:
    """Initial loss over ln C on one batch."""
    torch.manual_seed(seed)
    model = build()
    initialize(model, scheme, seed=seed)  # type: ignore[arg-type]
    data = DigitsData()
    data.setup("fit")
    images, labels = data.train_set.tensors  # type: ignore[union-attr]
    rows = torch.randperm(len(images))[:BATCH]
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).item() / math.log(CLASSES)


def main() -> None:
    """Measure every network from every start, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="draws of weights and batch (default: %(default)s)")
    seeds = parser.parse_args().seeds
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, CPU; {seeds} seeds\n")
    print(f"| network | {' | '.join(map(str, SCHEMES))} |\n|---|{'---|' * len(SCHEMES)}")
    for name, build in NETWORKS.items():
        cells = []
        for scheme in SCHEMES:
            found = sorted(ratio(build, scheme, seed) for seed in range(seeds))
            cells.append(f"{found[0]:.2g} / {median(found):.2g} / {found[-1]:.2g}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
