# SPDX-License-Identifier: Apache-2.0
"""Networks of gradient_zoo.py: such as leave parameters without a gradient, on purpose and by mistake, and chains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from zoo_cases import accuracy, classify, train
from zoo_models import mlp
from zoo_networks import CLASSES, PIXELS, SIDE, Around, Recurrent, perceptron


class Bag(nn.Module):
    """The mean of embeddings of pixels, of which no batch has them all."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64 * PIXELS, 16), perceptron([16, 32, CLASSES], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        levels = (x.flatten(1) * 4 + 32).long().clamp(0, 63)
        logits: Tensor = self.head(self.table(levels + 64 * torch.arange(PIXELS)).mean(1) * 8)
        return logits


class Heads(nn.Module):
    """A trunk with two heads.

    Args:
        weight: of the second head in the output; None where it is not called.
    """

    def __init__(self, weight: float | None) -> None:
        super().__init__()
        self.trunk = perceptron([PIXELS, 64, 64, 64], nn.ReLU)
        self.main, self.other = nn.Linear(64, CLASSES), perceptron([64, 64, CLASSES], nn.ReLU)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.trunk(x.flatten(1))
        y: Tensor = self.main(h)
        return y if self.weight is None else y + self.weight * self.other(h)


class Pair(nn.Module):
    """One encoder for two noisy views, which learns them to agree, and a head.

    Args:
        stop: whether one of the views is only a target.
    """

    def __init__(self, *, stop: bool) -> None:
        super().__init__()
        self.stop = stop
        self.encoder, self.head = perceptron([PIXELS, 64, 64, 32], nn.ReLU, "batch"), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and what became of both views."""
        a, b = (self.encoder(x.flatten(1) + 0.1 * torch.randn(len(x), PIXELS)) for _ in range(2))
        return self.head(a), a, b.detach() if self.stop else b

    @staticmethod
    def loss(out: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy and distance."""
        return F.cross_entropy(out[0], labels) + 0.1 * F.mse_loss(out[1], out[2])

    @staticmethod
    def score(out: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> float:
        """Accuracy."""
        return accuracy(out[0], labels)


class Collapsed(nn.Module):
    """Four experts of which one is never chosen.

    Args:
        dense: whether all are computed, and masked, instead of the chosen ones alone.
    """

    def __init__(self, *, dense: bool) -> None:
        super().__init__()
        self.dense, self.stem, self.router = dense, nn.Linear(PIXELS, 32), nn.Linear(32, 4)
        self.experts = nn.ModuleList(perceptron([32, 32, 32], nn.ReLU) for _ in range(4))
        self.head = nn.Linear(32, CLASSES)
        nn.init.constant_(self.router.bias[2:3].data, -1e4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.stem(x.flatten(1))
        trust = self.router(h).softmax(-1)
        mask = F.one_hot(trust.argmax(-1), 4)
        used = [k for k in range(4) if self.dense or mask[:, k].any()]
        y = sum((trust[:, k] * mask[:, k])[:, None] * self.experts[k](h) for k in used)
        logits: Tensor = self.head(h + y)
        return logits


class Rare(nn.Module):
    """32 experts, each sample sent to one by chance of a fixed router, so that batches leave some out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(PIXELS, 32), nn.Linear(32, CLASSES)
        self.experts = nn.ModuleList(perceptron([32, 32, 32], nn.ReLU) for _ in range(32))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.stem(x.flatten(1))
        chosen = (torch.rand(len(x)) ** 3 * 32).long()
        mask = F.one_hot(chosen, 32).to(h.dtype)
        y = sum(mask[:, k, None] * self.experts[k](h) for k in range(32))
        logits: Tensor = self.head(h + y)
        return logits


class Distilled(nn.Module):
    """A student, and a teacher that is run without gradients but was not frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = mlp(2), mlp(1)
        case = classify(lambda: self.teacher).build(int(torch.initial_seed()))
        train(case, 150)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both."""
        with torch.no_grad():
            aim = self.teacher(x)
        return self.student(x), aim

    @staticmethod
    def loss(out: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy against both."""
        return F.cross_entropy(out[0], labels) + F.cross_entropy(out[0], out[1].softmax(-1))

    @staticmethod
    def score(out: tuple[Tensor, Tensor], labels: Tensor) -> float:
        """Accuracy."""
        return accuracy(out[0], labels)


class Targeted(Distilled):
    """A network that learns from a copy of itself, whose output is detached."""

    def __init__(self) -> None:
        super().__init__()
        del self.teacher, self.student
        self.target, self.online = mlp(2), mlp(2)
        self.target.load_state_dict(self.online.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both."""
        return self.online(x), self.target(x).detach()


class Actor(Distilled):
    """A network that decides, and one beside it that learns large numbers: an actor and its critic."""

    def __init__(self) -> None:
        super().__init__()
        del self.teacher, self.student
        self.actor, self.critic = mlp(3), perceptron([PIXELS, 64, 64, 64, 1], nn.ReLU)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and an estimate of 1000 times the mean pixel."""
        return self.actor(x), self.critic(x.flatten(1)) - 1e3 * x.flatten(1).mean(1, keepdim=True) - 1e3

    @staticmethod
    def loss(out: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy and squared error."""
        return F.cross_entropy(out[0], labels) + out[1].square().mean()


class Parted(nn.Module):
    """Attention of one head with a projection each for queries, keys and values.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        y: Tensor = self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return y


class Chain(nn.Sequential):
    """Convolutions with BatchNorm, one after the other or as residual blocks of two.

    Args:
        depth: convolutions.
        skip: whether there are skip connections.
        width: channels.
    """

    def __init__(self, depth: int, *, skip: bool, width: int = 12) -> None:
        def layer() -> list[nn.Module]:
            return [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

        stem = [nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        body = [Around(nn.Sequential(*layer(), *layer()[:2])) for _ in range(depth // 2)] if skip else []
        body = body or [part for _ in range(depth) for part in layer()]  # type: ignore[assignment]
        super().__init__(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class Elman(nn.Module):
    """A plain recurrent network of two layers over the 64 pixels, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(1, 48, 2, batch_first=True), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.rnn(x.flatten(1)[..., None])[0][:, -1])
        return logits


class Stack(Recurrent):
    """An LSTM of three layers over the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(SIDE, 32, 3, batch_first=True), nn.Linear(32, CLASSES)


class Variational(nn.Module):
    """An autoencoder whose middle is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = perceptron([PIXELS, 64, 16], nn.ReLU), perceptron([8, 64, PIXELS], nn.ReLU)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, means, logarithms of variances."""
        mean, log = self.encode(x.flatten(1)).chunk(2, 1)
        return self.decode(mean + torch.randn_like(mean) * (log / 2).exp()), mean, log

    @staticmethod
    def loss(out: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
        """Distance and divergence."""
        return F.mse_loss(out[0], images) + 1e-3 * (out[1] ** 2 + out[2].exp() - out[2]).mean()

    @staticmethod
    def score(out: tuple[Tensor, Tensor, Tensor], images: Tensor) -> float:
        """Share of the variance that is explained."""
        return 1 - F.mse_loss(out[0], images).item() / images.var().item()


class Cut(nn.Module):
    """A trunk, a second tower and a head, with a fault between them.

    Args:
        by: ``detach`` or ``data`` cut off all that is in front of the head, ``tower`` one of two.
    """

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.trunk = by, perceptron([PIXELS, 64, 64], nn.ReLU, "batch")
        self.side, self.head = perceptron([PIXELS, 32, 64], nn.ReLU), perceptron([64, 64, CLASSES], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h, side = self.trunk(x.flatten(1)), self.side(x.flatten(1))
        both = h + side.detach() if self.by == "tower" else h + side
        if self.by != "tower":
            both = both.detach() if self.by == "detach" else torch.from_numpy(both.detach().numpy())
        logits: Tensor = self.head(both)
        return logits


class Skipping(torch.optim.SGD):
    """SGD that skips its first steps, as under a loss scale that is too large at first.

    Args:
        params: parameters.
        lr: learning rate.
        skipped: steps.
    """

    def __init__(self, params: Any, lr: float, skipped: int) -> None:
        super().__init__(params, lr)
        self.skipped = skipped

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step, or none."""
        self.skipped -= 1
        return super().step(closure) if self.skipped < 0 else None
