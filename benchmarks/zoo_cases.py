# SPDX-License-Identifier: Apache-2.0
"""What a specimen of zoo.py consists of, and the data, losses, optimizers and starts to make one from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)

from lightning_bn import initialize
from lightning_bn.demo import DigitsData
from lightning_bn.norms import find_batchnorm

Pair = tuple[Tensor, Tensor]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Prepare = Callable[[nn.Module, int], Any]


@dataclass(frozen=True)
class Case:
    """A network with all that its training needs.

    Args:
        model: the network; maps a batch of inputs to what ``loss`` and ``score`` take.
        train: inputs and targets to train on.
        val: inputs and targets to validate on.
        loss: loss of outputs and targets.
        score: score of outputs and targets, the larger the better.
        enough: a score that only a network that learned has; chance is far below.
        optimizer: makes the optimizer from the parameters that are trained.
        each_step: called with the model before each step.
    """

    model: nn.Module
    train: Pair
    val: Pair
    loss: Callable[[Any, Tensor], Tensor]
    score: Callable[[Any, Tensor], float]
    enough: float
    optimizer: Optimizer
    each_step: Callable[[nn.Module], Any] = lambda _: None


@dataclass(frozen=True)
class Specimen:
    """How to build a case, and what is wrong with it.

    Args:
        build: makes the case of a seed.
        fault: slug of the rule that has to find it; empty for a healthy one.
    """

    build: Callable[[int], Case]
    fault: str = ""

    @property
    def healthy(self) -> bool:
        """Whether there is nothing to find."""
        return not self.fault

    def sick(self, fault: str) -> Specimen:
        """The same with a fault."""
        return replace(self, fault=fault)


def adam(lr: float = 1e-3, *, decay: float = 0.0) -> Optimizer:
    """Adam with decoupled weight decay."""
    return partial(torch.optim.AdamW, lr=lr, weight_decay=decay)


def sgd(lr: float, momentum: float = 0.9, decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent."""
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=decay)


@cache
def digits() -> tuple[Pair, Pair]:
    """Standardised digits and labels: 1100 to train on, 600 to validate."""
    data = DigitsData()
    data.setup("fit")
    if data.train_set is None or data.val_set is None:
        raise RuntimeError("the digits need to be there after setup, and are not")
    (x, y), (x_val, y_val) = data.train_set.tensors, data.val_set.tensors
    return (x, y), (x_val, y_val)


@cache
def teacher(classes: int = 0) -> tuple[Pair, Pair]:
    """Inputs from N(0, 1) of 20 features, and what a fixed random network makes of them: a number, or a class."""
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(2600, 20, generator=draw)
    y = torch.tanh(x @ torch.randn(20, 16, generator=draw) / 20**0.5) @ torch.randn(16, max(classes, 1), generator=draw)
    y = y.argmax(1) if classes else (y - y.mean()) / y.std()
    return (x[:2000], y[:2000]), (x[2000:], y[2000:])


def paired(data: Callable[[], tuple[Pair, Pair]], inputs: Any, targets: Any) -> Callable[[], tuple[Pair, Pair]]:
    """Data with other inputs and targets, which are made from both."""
    return lambda: tuple((inputs(x, y), targets(x, y)) for x, y in data())  # type: ignore[return-value]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return (logits.argmax(1) == labels).float().mean().item()


def decided(p: Tensor, labels: Tensor) -> float:
    """Share of right answers of probabilities."""
    return ((p > 0.5) == (labels > 0.5)).float().mean().item()  # noqa: PLR2004  (a probability)


def explained(y: Tensor, target: Tensor) -> float:
    """Share of the variance that is explained."""
    return 1 - F.mse_loss(y, target).item() / target.var().item()


def likeness(outputs: tuple[Tensor, ...], images: Tensor) -> float:
    """Correlation of the mean fake with the mean image."""
    means = torch.stack([outputs[0].mean(0).flatten(), images.mean(0).flatten()])
    return torch.corrcoef(means)[0, 1].item()


def rivalry(outputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """Sum of a discriminator's loss and the generator's."""
    _, real, fake, taught = outputs
    pairs = ((real, 1.0), (fake, 0.0), (taught, 1.0))
    return torch.stack([F.binary_cross_entropy(p, torch.full_like(p, aim)) for p, aim in pairs]).sum()


def fill(scheme: str | float, *, biases: bool = True) -> Prepare:
    """All weights of a scheme or from N(0, scheme²); biases 0, or left as they are."""

    def prepare(model: nn.Module, seed: int) -> None:
        if biases:
            initialize(model, scheme, seed=seed)  # type: ignore[arg-type]
            return
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, 0, float(scheme))

    return prepare


def glorot(model: nn.Module, _: int) -> None:
    """Xavier's weights with gain 1, which halves the variance behind each ReLU."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)


def classify(
    net: Callable[[], nn.Module],
    optimizer: Optimizer | None = None,
    *,
    prepare: Prepare | None = None,
    data: Callable[[], tuple[Pair, Pair]] = digits,
    loss: Any = F.cross_entropy,
    score: Any = accuracy,
    enough: float = 0.6,
    each_step: Callable[[nn.Module], Any] = lambda _: None,
) -> Specimen:
    """A specimen that maps data to targets; without more, digits to their classes under Adam 1e-3."""

    def build(seed: int) -> Case:
        torch.manual_seed(seed)
        model = net()
        if prepare:
            prepare(model, seed)
        train, val = data()
        return Case(model, train, val, loss, score, enough, optimizer or adam(), each_step)

    return Specimen(build)


def train(case: Case, steps: int, *, batch: int = 64, seed: int = 0, watch: Callable[[int], Any] | None = None) -> None:
    """Train for some steps; ``watch`` is called with the number of the step before each."""
    x, y = case.train
    order = torch.Generator().manual_seed(seed)
    optimizer = case.optimizer([weight for weight in case.model.parameters() if weight.requires_grad])
    rows = torch.empty(0, dtype=torch.long)
    case.model.train()
    for step in range(steps):
        if len(rows) < batch:
            rows = torch.randperm(len(x), generator=order)
        case.each_step(case.model)
        if watch:
            watch(step)
        loss = case.loss(case.model(x[rows[:batch]]), y[rows[:batch]])
        rows = rows[batch:]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()


@torch.no_grad()
def validate(case: Case) -> float:
    """Score on the validation data, in evaluation mode."""
    case.model.eval()
    score = case.score(case.model(case.val[0]), case.val[1])
    case.model.train()
    return score


def pretrained(net: Callable[[], nn.Module], change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """A network that was trained on the digits and then changed."""

    def make() -> nn.Module:
        model = net()
        train(classify(lambda: model).build(int(torch.initial_seed())), 200)
        change(model)
        return model

    return make


def dead_bias(layer: int, bias: float = -10.0) -> Prepare:
    """He's weights, and one BatchNorm layer whose frozen bias shuts the rectifier behind it."""

    def prepare(model: nn.Module, seed: int) -> None:
        initialize(model, "he", seed=seed)
        norm = list(find_batchnorm(model).values())[layer]
        nn.init.constant_(norm.bias, bias)
        norm.requires_grad_(False)

    return prepare
