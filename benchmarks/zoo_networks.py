# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the networks in zoo.py: small ones of many kinds, for images of 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_bn.demo.models import norm_layer

CLASSES, PIXELS, SIDE = 10, 64, 8
Act = Callable[[], nn.Module]


class Around(nn.Module):
    """A branch beside a skip connection.

    Args:
        branch: what is added.
        scale: start of a learned factor of the branch (ReZero, SkipInit); None for none.
    """

    def __init__(self, branch: nn.Module, scale: float | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.scale = None if scale is None else nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        y: Tensor = self.branch(x)
        return x + (y if self.scale is None else self.scale * y)


class Gate(nn.Module):
    """The input times a gate that is computed from it.

    Args:
        gate: maps the input to factors.
    """

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        y: Tensor = x * self.gate(x)
        return y


class Swapped(nn.Module):
    """A module that mixes tokens instead of channels.

    Args:
        inner: works on the last axis.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The same, on the second last axis."""
        y: Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return y


class Turned(nn.Module):
    """Pixels as tokens: the last two axes change places."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) to (N, T, C)."""
        return x.transpose(1, 2)


class Mean(nn.Module):
    """The mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, C)."""
        return x.mean(1)


class Attention(nn.Module):
    """Self-attention of two heads with projections that are modules.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        parts = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Recurrent(nn.Module):
    """An LSTM over the rows of an image, with a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(SIDE, 48, batch_first=True), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.lstm(x.flatten(1).unflatten(1, (SIDE, SIDE)))[0][:, -1])
        return logits


class GatedCell(nn.Module):
    """A gated recurrent cell whose gates are modules, over the rows of an image.

    Args:
        width: units.
        bias: start of the gate's bias.
    """

    def __init__(self, width: int = 48, bias: float = 0.0) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(SIDE + width, width), nn.Linear(SIDE + width, width)
        self.sigmoid, self.tanh, self.head = nn.Sigmoid(), nn.Tanh(), nn.Linear(width, CLASSES)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        rows = x.flatten(1).unflatten(1, (SIDE, SIDE))
        state = rows.new_zeros(len(rows), self.new.out_features)
        for row in rows.unbind(1):
            both = torch.cat([row, state], 1)
            gate = self.sigmoid(self.gate(both))
            state = gate * state + (1 - gate) * self.tanh(self.new(both))
        logits: Tensor = self.head(state)
        return logits


class Highway(nn.Module):
    """A layer that its gate, closed at first, passes round (Srivastava et al. 2015).

    Args:
        width: units.
        bias: start of the gate's bias.
    """

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.new, self.gate = nn.Sequential(nn.Linear(width, width), nn.ReLU()), nn.Linear(width, width)
        self.sigmoid = nn.Sigmoid()
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of both ways."""
        gate = self.sigmoid(self.gate(x))
        y: Tensor = gate * self.new(x) + (1 - gate) * x
        return y


class UNet(nn.Module):
    """One level down and up again, with an attention gate on the skip connection.

    Args:
        width: channels.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = convolutions(1, width, width)
        self.low = nn.Sequential(nn.MaxPool2d(2), convolutions(width, 2 * width, width), nn.Upsample(scale_factor=2))
        self.attend = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1), nn.Sigmoid())
        self.up = nn.Sequential(convolutions(2 * width, width), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a mask."""
        high = self.down(x)
        low = self.low(high)
        high = high * self.attend(torch.cat([high, low], 1))
        y: Tensor = self.up(torch.cat([high, low], 1))
        return y


class Modulated(nn.Module):
    """A transformer block behind adaptive norms that start as the identity (Peebles & Xie 2023).

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention, self.mlp = Attention(width), perceptron([width, 2 * width, width], nn.GELU)
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same; the mean token is the condition."""
        a, b, c, d, e, f = self.modulate(x.mean(1, keepdim=True)).chunk(6, -1)
        x = x + c * self.attention(self.norm(x) * (1 + a) + b)
        y: Tensor = x + f * self.mlp(self.norm(x) * (1 + d) + e)
        return y


class LowRank(nn.Module):
    """A frozen layer and a low-rank update that starts at zero (Hu et al. 2021).

    Args:
        base: the layer.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer with its update."""
        y: Tensor = self.base(x) + 4 * self.b(self.a(x))
        return y


class Adversaries(nn.Module):
    """A generator and a discriminator; one loss trains both, each on its own terms.

    Args:
        generator: noise of 16 to images.
        discriminator: images to a probability.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fakes, and what a discriminator says of images, of fakes to learn from, and of fakes to teach by."""
        fakes = self.generator(torch.randn(len(x), 16))
        fixed = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        taught = functional_call(self.discriminator, fixed, (fakes,))
        return fakes, self.discriminator(x), self.discriminator(fakes.detach()), taught


class Experts(nn.Module):
    """A mixture of experts of which each sample is sent to one.

    Args:
        width: channels.
        count: experts.
    """

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(perceptron([width, width, width], nn.ReLU) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """The output of the expert, weighted by the router's trust in it."""
        weights, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                y = y.index_add(0, rows, weights[rows, None] * expert(x[rows]))
        return y


def perceptron(widths: Sequence[int], act: Act, norm: str = "none", *, dropout: float = 0.0) -> nn.Sequential:
    """Linear, norm, activation, dropout for each hidden width, and a linear layer at the end."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths[:-1]):
        layers += [nn.Linear(inner, outer), *norm_layer(norm, outer, spatial=False), act()]  # type: ignore[arg-type]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def convolutions(*channels: int, act: Act = nn.ReLU, norm: str = "none") -> nn.Sequential:
    """Convolutions of 3 x 3, each with norm and activation."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(channels):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), *norm_layer(norm, outer, spatial=True), act()]  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def tokens(*blocks: nn.Module, width: int = 32) -> nn.Sequential:
    """Blocks over the 16 patches of an image, with a head on their mean."""
    embed = nn.Sequential(nn.Conv2d(1, width, 2, 2), nn.Flatten(2), Turned())
    return nn.Sequential(embed, *blocks, nn.LayerNorm(width), Mean(), nn.Linear(width, CLASSES))
