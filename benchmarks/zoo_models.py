# SPDX-License-Identifier: Apache-2.0
"""The networks of zoo.py, by kind; all take images of 8 x 8 pixels where nothing else is said."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from zoo_networks import (
    CLASSES,
    PIXELS,
    SIDE,
    Act,
    Adversaries,
    Around,
    Attention,
    Experts,
    Gate,
    Highway,
    LowRank,
    Modulated,
    Swapped,
    convolutions,
    perceptron,
    tokens,
)

from lightning_bn.demo import DigitsResNet
from lightning_bn.norms import residual_closing


def mlp(depth: int, norm: str = "none", act: Act = nn.ReLU, width: int = 128, dropout: float = 0.0) -> nn.Sequential:
    """A perceptron of some hidden layers for the digits."""
    return nn.Sequential(nn.Flatten(), perceptron([PIXELS, *[width] * depth, CLASSES], act, norm, dropout=dropout))


def vgg(norm: str = "none", act: Act = nn.ReLU) -> nn.Sequential:
    """Six convolutions in three stages, and two linear layers."""
    stages = [convolutions(*channels, act=act, norm=norm) for channels in ((1, 16, 16), (16, 32, 32), (32, 64, 64))]
    pooled = [part for stage in stages for part in (stage, nn.MaxPool2d(2))]
    return nn.Sequential(*pooled, nn.Flatten(), perceptron([64, 64, CLASSES], act))


def resnet(norm: str = "batch", depth: int = 2, act: str = "relu") -> nn.Module:
    """Twice ``depth`` residual blocks."""
    return DigitsResNet(norm, depth=depth, activation=act).net  # type: ignore[arg-type]


def wide_resnet() -> nn.Sequential:
    """Three pre-activation blocks with dropout 0.3 between their convolutions (Zagoruyko & Komodakis 2016)."""
    blocks = [
        Around(
            nn.Sequential(
                *(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Dropout(0.3)),
                *(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)),
            )
        )
        for _ in range(3)
    ]
    return pooled(nn.Conv2d(1, 16, 3, padding=1), *blocks, nn.BatchNorm2d(16), nn.ReLU(), channels=16)


def pooled(*parts: nn.Module, channels: int) -> nn.Sequential:
    """Parts, global average pooling, and a head."""
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def squeeze(channels: int, reduced: int, gate: Act = nn.Sigmoid) -> Gate:
    """A squeeze-and-excitation gate (Hu et al. 2018)."""
    layers = [nn.Conv2d(channels, reduced, 1), nn.ReLU(), nn.Conv2d(reduced, channels, 1), gate()]
    return Gate(nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers))


def squeezed() -> nn.Sequential:
    """Three residual blocks with BatchNorm and gates."""
    blocks = [
        Around(nn.Sequential(convolutions(16, 16, 16, norm="batch"), squeeze(16, reduced))) for reduced in (8, 4, 2)
    ]
    return pooled(convolutions(1, 16, norm="batch"), *blocks, channels=16)


def mobile(eps: float = 1e-5, act: Act = nn.Hardswish) -> nn.Sequential:
    """Three inverted residual blocks: depthwise convolutions, gates, BatchNorm (Howard et al. 2019)."""

    def block() -> Around:
        wide = [nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32, eps), act()]
        deep = [nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32, eps), act()]
        return Around(
            nn.Sequential(
                *wide, *deep, squeeze(32, 8, nn.Hardsigmoid), nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16, eps)
            )
        )

    return pooled(convolutions(1, 16, norm="batch"), *(block() for _ in range(3)), channels=16)


def transformer(act: Act, *, first: bool, width: int = 32, depth: int = 3) -> nn.Sequential:
    """Blocks of attention and a perceptron, with LayerNorm in front of each branch or behind each sum."""
    branches = [part for _ in range(depth) for part in (Attention(width), perceptron([width, 4 * width, width], act))]
    if first:
        return tokens(*(Around(nn.Sequential(nn.LayerNorm(width), branch)) for branch in branches))
    return tokens(*(part for branch in branches for part in (Around(branch), nn.LayerNorm(width))))


def vit() -> nn.Sequential:
    """Torch's own encoder layers on patches."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
    return tokens(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))


def mixer() -> nn.Sequential:
    """Perceptrons over tokens and over channels in turn (Tolstikhin et al. 2021)."""

    def branch(inner: nn.Module) -> Around:
        return Around(nn.Sequential(nn.LayerNorm(32), inner))

    pairs = [
        (branch(Swapped(perceptron([16, 32, 16], nn.GELU))), branch(perceptron([32, 64, 32], nn.GELU)))
        for _ in range(3)
    ]
    return tokens(*(part for pair in pairs for part in pair))


def autoencoder(act: Act, norm: str = "none") -> nn.Sequential:
    """64 pixels through 2 numbers and back, to a sigmoid."""
    return nn.Sequential(
        nn.Flatten(),
        perceptron([PIXELS, 64, 32, 2], act, norm),
        perceptron([2, 32, 64, PIXELS], act, norm),
        nn.Sigmoid(),
    )


def dictionary() -> nn.Sequential:
    """A sparse autoencoder of 256 features."""
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, PIXELS))


def adversaries(norm: str = "batch") -> Adversaries:
    """A generator that ends in tanh, and a discriminator that ends in a sigmoid."""
    make = nn.Sequential(perceptron([16, 64, 64, PIXELS], nn.ReLU, norm), nn.Tanh(), nn.Unflatten(1, (1, SIDE, SIDE)))
    judge = nn.Sequential(nn.Flatten(), perceptron([PIXELS, 64, 64, 1], partial(nn.LeakyReLU, 0.2)), nn.Sigmoid())
    return Adversaries(make, judge)


def small_head(gain: float) -> nn.Sequential:
    """Orthogonal weights, and a head that is scaled down, as in policy networks."""
    model = mlp(3, act=nn.Tanh)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain if layer.out_features == CLASSES else 2**0.5)
    return model


def rezero(scale: float, depth: int = 8) -> nn.Sequential:
    """Residual blocks without norm whose branches start at a factor of their own (Bachlechner et al. 2021)."""
    blocks = [Around(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), scale) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 64), *blocks, nn.Linear(64, CLASSES))


def fixup(depth: int = 6) -> nn.Sequential:
    """Residual blocks without norm whose last layers, and the head, start at zero (Zhang et al. 2019)."""
    model = rezero(1.0, depth)
    for layer in [*(block.branch[2] for block in model if isinstance(block, Around)), model[-1]]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def zero_closers(model: nn.Module) -> None:
    """γ = 0 on the norms that close a residual branch."""
    for name in residual_closing(model).closing:
        nn.init.zeros_(model.get_submodule(name).weight)


def low_rank(model: nn.Module) -> None:
    """Freeze, and add low-rank updates to every linear layer."""
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    model.requires_grad_(requires_grad=False)
    for path, layer in layers:
        model.set_submodule(path, LowRank(layer))


def new_head(model: nn.Module) -> None:
    """Freeze the trunk and start a new head."""
    model.requires_grad_(requires_grad=False)
    model[-1] = nn.Linear(model[-1].in_features, CLASSES)  # type: ignore[index, operator]


class Scaled(nn.Module):
    """The input times a number, plus a number.

    Args:
        factor: the factor.
        shift: the summand.
    """

    def __init__(self, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Factor times input plus shift."""
        return self.factor * x + self.shift


def highway(bias: float) -> nn.Sequential:
    """Six highway layers."""
    layers = [Highway(64, bias) for _ in range(6)]
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 64), *layers, nn.Linear(64, CLASSES))


def experts() -> nn.Sequential:
    """Two mixtures of experts."""
    mixed = [Around(nn.Sequential(nn.LayerNorm(32), Experts(32))) for _ in range(2)]
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32), *mixed, nn.Linear(32, CLASSES))


def modulated() -> nn.Sequential:
    """Four blocks that start as the identity, and a head that starts at zero."""
    model = tokens(*(Modulated(32) for _ in range(4)))
    nn.init.zeros_(model[-1].weight)
    return model


def dense() -> nn.Sequential:
    """Two hidden layers with BatchNorm, dropout 0.5 behind the last one."""
    layers = perceptron([PIXELS, 128, 128, CLASSES], nn.ReLU, "batch")
    return nn.Sequential(nn.Flatten(), *layers[:-1], nn.Dropout(0.5), layers[-1])
