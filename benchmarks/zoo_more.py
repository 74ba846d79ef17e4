# SPDX-License-Identifier: Apache-2.0
"""More specimens as in zoo.py, of kinds that are not there; no threshold was chosen on any but ``CONTROLS``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from zoo import grey, mlp, vgg
from zoo_cases import Specimen, accuracy, adam, classify, explained, fill, paired, sgd, teacher
from zoo_models import Scaled, pooled, resnet
from zoo_networks import CLASSES, PIXELS, SIDE, Around, Gate, Mean, Turned, convolutions, perceptron


class Joined(nn.Module):
    """The input beside what a part makes of it (Huang et al. 2017).

    Args:
        part: makes more channels.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """Both, one behind the other."""
        return torch.cat([x, self.part(x)], 1)


class Twins(nn.Module):
    """A shared trunk that is called twice, with an auxiliary head; the second view is noisy."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), perceptron([PIXELS, 96, 48], nn.ReLU, "batch"), nn.ReLU())
        self.head, self.aside = nn.Linear(48, CLASSES), nn.Sequential(nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 48))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and how far the views are apart."""
        one, other = self.trunk(x), self.trunk(x + 0.2 * torch.randn_like(x))
        return self.head(one), (self.aside(one) - other.detach()).square().mean()


class Variational(nn.Module):
    """A variational autoencoder of 8 latent numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread = perceptron([PIXELS, 64, 32], nn.ReLU), nn.Linear(32, 8), nn.Linear(32, 8)
        self.decoder = nn.Sequential(perceptron([8, 32, 64, PIXELS], nn.ReLU), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """What is left of an image."""
        hidden = torch.relu(self.encoder(x.flatten(1)))
        mean, spread = self.mean(hidden), torch.exp(0.5 * self.spread(hidden) - 3)
        y: Tensor = self.decoder(mean + spread * torch.randn_like(spread))
        return y


def grouped(norm: str = "batch") -> nn.Sequential:
    """Blocks of grouped convolutions (Xie et al. 2017)."""
    blocks = [
        Around(
            nn.Sequential(
                *(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
                *(nn.Conv2d(32, 32, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
                *(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)),
            )
        )
        for _ in range(3)
    ]
    return pooled(convolutions(1, 16, norm=norm), *blocks, nn.ReLU(), channels=16)


def next_blocks() -> nn.Sequential:
    """Depthwise convolutions and channel perceptrons with a layer scale of 1e-6 (Liu et al. 2022)."""
    blocks = [
        Around(
            nn.Sequential(
                nn.Conv2d(24, 24, 5, padding=2, groups=24),
                nn.GroupNorm(1, 24),
                *(nn.Conv2d(24, 48, 1), nn.GELU(), nn.Conv2d(48, 24, 1)),
            ),
            1e-6,
        )
        for _ in range(3)
    ]
    return pooled(nn.Conv2d(1, 24, 2, 2), nn.GroupNorm(1, 24), *blocks, nn.GroupNorm(1, 24), channels=24)


def dense_blocks() -> nn.Sequential:
    """Four layers that each see all before them, norm and activation first."""
    widths = range(16, 64, 12)
    layers = [Joined(nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 12, 3, padding=1))) for w in widths]
    return pooled(nn.Conv2d(1, 16, 3, padding=1), *layers, nn.BatchNorm2d(64), nn.ReLU(), channels=64)


def temporal() -> nn.Sequential:
    """Dilated convolutions over the rows of an image, gated."""
    layers = [
        Around(nn.Sequential(Gate(nn.Sequential(nn.Conv1d(32, 32, 3, padding=d, dilation=d), nn.Sigmoid())), nn.ReLU()))
        for d in (1, 2, 4)
    ]
    return nn.Sequential(
        nn.Flatten(),
        nn.Unflatten(1, (SIDE, SIDE)),
        nn.Conv1d(SIDE, 32, 1),
        *layers,
        Turned(),
        Mean(),
        nn.Linear(32, CLASSES),
    )


def twin_loss(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy and the distance."""
    return F.cross_entropy(outputs[0], labels) + 0.1 * outputs[1]


def twin_score(outputs: Any, labels: Tensor) -> float:
    """Share of right answers."""
    return accuracy(outputs[0], labels)


MORE_HEALTHY: dict[str, Specimen] = {
    "DenseNet-like": classify(dense_blocks),
    "ResNeXt-like": classify(grouped),
    "ConvNeXt-like, layer scale": classify(next_blocks, adam(3e-3), enough=0.4),
    "temporal convolutions, gated": classify(temporal, adam(3e-3)),
    "shared trunk, two heads": classify(Twins, loss=twin_loss, score=twin_score),
    "variational autoencoder": classify(
        Variational, adam(3e-3), data=grey, loss=F.mse_loss, score=explained, enough=0.2
    ),
    "MLP 8, LeakyReLU, orthogonal": classify(partial(mlp, 8, act=nn.LeakyReLU), prepare=fill("orthogonal")),
    "MLP 4, ELU": classify(partial(mlp, 4, act=nn.ELU)),
    "MLP 8, ReLU, orthogonal, SGD": classify(partial(mlp, 8), sgd(0.05), prepare=fill("orthogonal")),
    "MLP 4, hardswish, BatchNorm": classify(partial(mlp, 4, "batch", nn.Hardswish)),
    "MLP 4, tanh, BatchNorm, SGD 0.3": classify(partial(mlp, 4, "batch", nn.Tanh), sgd(0.3)),
    "MLP 4, softsign, Adam 3e-3": classify(partial(mlp, 4, act=nn.Softsign), adam(3e-3)),
    "MLP 12, BatchNorm, 64 wide, SGD": classify(partial(mlp, 12, "batch", width=64), sgd(0.05)),
    "MLP 3, 16 wide, LayerNorm": classify(partial(mlp, 3, "layer", width=16), adam(1e-2)),
    "MLP 3, dropout 0.5": classify(partial(mlp, 3, dropout=0.5)),
    "VGG, GroupNorm, SGD": classify(partial(vgg, "group"), sgd(0.03)),
    "MLP 2, AdamW, decay 0.1": classify(partial(mlp, 2), adam(3e-3, decay=0.1)),
    "teacher, 3 classes, wide": classify(lambda: perceptron([20, 256, 3], nn.ReLU), data=partial(teacher, 3)),
}
MORE_SICK: dict[str, Specimen] = {
    name: specimen.sick(fault)
    for name, fault, specimen in (
        ("MLP 7, ELU, N(0, 0.01²)", "vanishing-signal", classify(partial(mlp, 7, act=nn.ELU), prepare=fill("naive"))),
        ("MLP 9, 96 wide, N(0, 0.02²)", "vanishing-signal", classify(partial(mlp, 9, width=96), prepare=fill(0.02))),
        ("MLP 25, 48 wide", "vanishing-signal", classify(partial(mlp, 25, width=48), sgd(0.05))),
        (
            "MLP 7, LeakyReLU, N(0, 1)",
            "exploding-signal",
            classify(partial(mlp, 7, act=nn.LeakyReLU), prepare=fill(1.0)),
        ),
        ("VGG, GELU, N(0, 0.5²)", "exploding-signal", classify(partial(vgg, act=nn.GELU), prepare=fill(0.5))),
        ("MLP 4, Adam 0.3", "dead-units", classify(partial(mlp, 4, width=64), adam(0.3))),
        ("MLP 3, inputs - 100", "dead-units", classify(lambda: nn.Sequential(Scaled(1.0, -100.0), mlp(3)), sgd(0.03))),
        (
            "MLP 4, tanh, N(0, 2²)",
            "saturated-units",
            classify(partial(mlp, 4, act=nn.Tanh, width=96), prepare=fill(2.0)),
        ),
        ("MLP 4, tanh, Adam 0.3", "saturated-units", classify(partial(mlp, 4, act=nn.Tanh), adam(0.3))),
        ("inputs x 10⁻⁶", "variance-below-epsilon", classify(lambda: nn.Sequential(Scaled(1e-6), mlp(2, "batch")))),
        ("VGG, inputs x 3·10⁻⁵", "variance-below-epsilon", classify(lambda: nn.Sequential(Scaled(3e-5), vgg("batch")))),
    )
}
CONTROLS: dict[str, Specimen] = {
    f"teacher, {depth} hidden layers, targets x {scale:g}": classify(
        lambda depth=depth: perceptron([20, *[64] * depth, 1], nn.ReLU),  # type: ignore[misc]
        adam(1e-2),
        data=paired(teacher, lambda x, _: x, lambda _, y, scale=scale: scale * (1 + y)),
        loss=F.mse_loss,
        score=explained,
        enough=0.3,
    )
    for depth, scale in ((4, 1e3), (4, 1e5), (3, 1e-2))
} | {
    "MLP 3, N(0, 0.01²)": classify(partial(mlp, 3), adam(3e-3), prepare=fill("naive")),
    "ResNet 16 blocks, no norm, He": classify(partial(resnet, "none", 8), prepare=fill("he"), enough=0.4),
}
"""Healthy ones at the edge: regressions to targets as they come, starts that are almost too small and too large."""
