# SPDX-License-Identifier: Apache-2.0
"""What an initialisation costs: a ResNet-50-sized model, paired with the plain torch.nn.init calls in one process.

Run:     python benchmarks/init_speed.py [--rounds 7]
Output:  a markdown table: median over the rounds of (time of lightning_bn.initialize) / (time of the plain calls), with
         the smallest and the largest ratio. The plain calls are nn.init.kaiming_normal_ for weights, zeros_ for biases
         and β, ones_ for γ. "pytorch" only looks and reports.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from lightning_bn import initialize


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolution with a skip connection (He et al. 2016)."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        outer = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outer, 1, bias=False), nn.BatchNorm2d(outer)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if inner != outer or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block."""
        h = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out: torch.Tensor = self.relu(self.bn3(self.conv3(h)) + self.shortcut(x))
        return out


def resnet50() -> nn.Sequential:
    """A model with the parameters of ResNet-50: 25.6 M in 161 tensors."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inner = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            width = 64 * 2**stage
            layers.append(Bottleneck(inner, width, 2 if stage and not block else 1))
            inner = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


@torch.no_grad()
def plain(model: nn.Module) -> None:
    """What a project writes by hand."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "the plain calls again (noise)": plain,
    "he": lambda model: initialize(model, "he"),
    "he, zero_init_residual": lambda model: initialize(model, "he", zero_init_residual=True),
    "pytorch (report only)": lambda model: initialize(model, "pytorch"),
}


def seconds(way: Callable[[nn.Module], Any]) -> float:
    """Time of one initialisation of a new model."""
    model = resnet50()
    start = time.perf_counter()
    way(model)
    return time.perf_counter() - start


def main() -> None:
    """Measure all ways, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of initialisations (default: %(default)s)")
    rounds = parser.parse_args().rounds
    size = sum(parameter.numel() for parameter in resnet50().parameters())
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {size / 1e6:.1f} M parameters\n")
    print("| way | plain calls | x plain | range |\n|---|---:|---:|---:|")
    for name, way in WAYS.items():
        seconds(plain), seconds(way)  # warm up
        base, ratios = [], []
        for _ in range(rounds):
            base.append(seconds(plain))
            ratios.append(seconds(way) / base[-1])
        print(
            f"| {name} | {1e3 * median(base):.0f} ms | {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
