# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gradients.py trains beside zoo.py: schedules, optimizers, loose parameters, and faults of gradients.

``HEALTHY`` and ``SICK`` map a name to a ``Run``: a specimen of zoo_cases.py, a schedule of the learning rate, and the
slug that has to be found. A healthy run may get a note, no warning; a sick one may get other warnings too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import zoo
from gradient_networks import (
    Actor,
    Bag,
    Chain,
    Collapsed,
    Cut,
    Distilled,
    Elman,
    Heads,
    Pair,
    Parted,
    Rare,
    Skipping,
    Stack,
    Targeted,
    Variational,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from zoo_cases import Specimen, adam, classify, dead_bias, digits, explained, fill, paired, pretrained, sgd
from zoo_models import mlp, resnet, transformer, vgg
from zoo_networks import PIXELS, Around, perceptron, tokens

Schedule = Callable[[torch.optim.Optimizer], Callable[[int], Any]]


def constant(_: torch.optim.Optimizer) -> Callable[[int], Any]:
    """The learning rate stays."""
    return lambda _: None


def scheduled(make: Callable[[torch.optim.Optimizer], Any]) -> Schedule:
    """One of torch's schedulers."""

    def schedule(optimizer: torch.optim.Optimizer) -> Callable[[int], Any]:
        scheduler = make(optimizer)
        return lambda step: scheduler.step() if step else None

    return schedule


def by_hand(rate: Callable[[int], float]) -> Schedule:
    """The loop sets the rate by itself, and nothing tells what it will be."""

    def schedule(optimizer: torch.optim.Optimizer) -> Callable[[int], Any]:
        return lambda step: [group.update(lr=rate(step)) for group in optimizer.param_groups]

    return schedule


@dataclass(frozen=True)
class Run:
    """A training.

    Args:
        specimen: network, data, optimizer.
        schedule: learning rates.
        fault: slug of the rule that has to find it; empty where there is nothing to find.
        trains: whether it has to reach the specimen's score, where it is healthy.
    """

    specimen: Specimen
    schedule: Schedule = constant
    fault: str = ""
    trains: bool = True


warm = scheduled(lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 60)))
cosine = scheduled(lambda optimizer: CosineAnnealingLR(optimizer, 150))
cycle = scheduled(lambda optimizer: OneCycleLR(optimizer, 3e-3, 152))
finder = by_hand(lambda step: 1e-8 * 10 ** (8 * step / 150))
HAND = by_hand(lambda step: 1e-3 * min(1.0, step / 60))
vae = partial(classify, loss=Variational.loss, score=Variational.score, enough=0.2)
grey = paired(digits, lambda x, _: x, lambda x, _: x.flatten(1) / 4)
few = paired(digits, lambda x, _: x[:64], lambda _, y: y[:64])


def grown(net: Callable[[], nn.Module], steps: int = 1500) -> Callable[[], nn.Module]:
    """A network that has learned 64 images by heart."""

    def make() -> nn.Module:
        from zoo_cases import train  # noqa: PLC0415

        model = net()
        train(replace(classify(lambda: model, sgd(0.1), data=few).build(0), model=model), steps)
        return model

    return make


HEALTHY: dict[str, Run] = {
    **{name: Run(specimen) for name, specimen in zoo.HEALTHY.items()},
    "MLP 5, BatchNorm, SGD 0.1, cosine to 0": Run(classify(partial(mlp, 5, "batch"), sgd(0.1)), cosine),
    "MLP 3, Adam, cosine to 0": Run(classify(partial(mlp, 3)), cosine),
    "transformer, warm-up from 0": Run(classify(partial(transformer, nn.GELU, first=True), enough=0.3), warm),
    "MLP 5, BatchNorm, SGD 0.1, warm-up from 0": Run(classify(partial(mlp, 5, "batch"), sgd(0.1)), warm),
    "MLP 5, warm-up by hand": Run(classify(partial(mlp, 5)), HAND),
    "VGG, BatchNorm, one cycle": Run(classify(partial(vgg, "batch")), cycle),
    "fine-tuned, Adam 1e-6": Run(classify(pretrained(partial(vgg, "batch"), lambda _: None), adam(1e-6))),
    "fine-tuned, SGD 1e-5": Run(classify(pretrained(partial(vgg, "batch"), lambda _: None), sgd(1e-5))),
    "fine-tuned transformer, SGD 1e-5": Run(
        classify(pretrained(partial(transformer, nn.GELU, first=True), lambda _: None), sgd(1e-5), enough=0.4)
    ),
    "LBFGS": Run(classify(partial(mlp, 2), partial(torch.optim.LBFGS, lr=0.1, max_iter=4))),
    "LBFGS, line search": Run(
        classify(partial(mlp, 2), partial(torch.optim.LBFGS, max_iter=4, line_search_fn="strong_wolfe"), enough=0.4)
    ),
    "learning rate finder, SGD": Run(classify(partial(mlp, 3), sgd(1e-8)), finder, trains=False),
    "learning rate finder, Adam, BatchNorm": Run(classify(partial(mlp, 3, "batch"), adam(1e-8)), finder, trains=False),
    "learned by heart, SGD 0.1": Run(classify(grown(partial(mlp, 3)), sgd(0.1), data=few)),
    "learned by heart, BatchNorm, SGD 0.1": Run(classify(grown(partial(mlp, 3, "batch")), sgd(0.1), data=few)),
    "embedding": Run(classify(Bag, adam(1e-2))),
    "heads, one unused": Run(classify(partial(Heads, weight=None))),
    "heads, one of weight 0": Run(classify(partial(Heads, weight=0.0))),
    "siamese": Run(classify(partial(Pair, stop=False), loss=Pair.loss, score=Pair.score)),
    "siamese, stopped gradient": Run(classify(partial(Pair, stop=True), loss=Pair.loss, score=Pair.score)),
    "experts, one never chosen": Run(classify(partial(Collapsed, dense=False))),
    "experts, one masked out": Run(classify(partial(Collapsed, dense=True))),
    "experts, 32 rarely chosen": Run(classify(Rare)),
    "distilled, teacher in the optimizer": Run(classify(Distilled, loss=Distilled.loss, score=Distilled.score)),
    "target network in the optimizer": Run(classify(Targeted, loss=Targeted.loss, score=Targeted.score)),
    "actor and critic": Run(classify(Actor, loss=Actor.loss, score=Actor.score)),
    "transformer 12, pre-norm": Run(classify(partial(transformer, nn.GELU, first=True, depth=12), enough=0.3)),
    "transformer 8, post-norm": Run(classify(partial(transformer, nn.GELU, first=False, depth=8), enough=0.2)),
    "transformer, keys with a bias": Run(
        classify(lambda: tokens(*(Around(nn.Sequential(nn.LayerNorm(32), Parted(32))) for _ in range(4))), enough=0.3)
    ),
    "residual 24, BatchNorm": Run(classify(partial(Chain, 24, skip=True))),
    "MLP 20, BatchNorm, SGD": Run(classify(partial(mlp, 20, "batch"), sgd(0.01), prepare=fill("he"), enough=0.4)),
    "MLP 15, BatchNorm": Run(classify(partial(mlp, 15, "batch"), prepare=fill("he"), enough=0.4)),
    "MLP 20, tanh, orthogonal": Run(classify(partial(mlp, 20, act=nn.Tanh), prepare=fill("orthogonal"), enough=0.4)),
    "MLP 10, SELU": Run(classify(partial(mlp, 10, act=nn.SELU))),
    "MLP 10, LayerNorm": Run(classify(partial(mlp, 10, "layer"), prepare=fill("he"))),
    "MLP 20, LayerNorm": Run(classify(partial(mlp, 20, "layer"), prepare=fill("he"))),
    "MLP 3, sigmoid": Run(classify(partial(mlp, 3, act=nn.Sigmoid), adam(3e-3), enough=0.4)),
    "MLP 10, sigmoid, BatchNorm": Run(classify(partial(mlp, 10, "batch", nn.Sigmoid), enough=0.3)),
    "RNN, 64 steps": Run(classify(Elman, adam(3e-3), enough=0.15), trains=False),
    "LSTM, three layers": Run(classify(Stack, adam(1e-2))),
    "variational autoencoder": Run(vae(Variational, adam(3e-3), data=grey)),
    "autoencoder, ten layers": Run(
        classify(
            lambda: nn.Sequential(nn.Flatten(), perceptron([PIXELS, *[64] * 5, 8, *[64] * 4, PIXELS], nn.ReLU)),
            loss=F.mse_loss,
            score=explained,
            enough=0.2,
            data=grey,
        )
    ),
    "steps skipped at first": Run(classify(partial(mlp, 3, "batch"), partial(Skipping, lr=0.1, skipped=6))),
    "residual, γ = 0, steps skipped at first": Run(
        classify(partial(resnet, "batch"), partial(Skipping, lr=0.1, skipped=6), prepare=lambda m, _: _zero(m))
    ),
    "MLP 3, BatchNorm, decay 0.1": Run(classify(partial(mlp, 3, "batch"), adam(1e-3, decay=0.1))),
    "MLP 3, N(0, 0.01²), Adam 0.01": Run(classify(partial(mlp, 3), adam(1e-2), prepare=fill("naive"))),
    "MLP 3, BatchNorm, N(0, 0.001²)": Run(classify(partial(mlp, 3, "batch"), prepare=fill(1e-3))),
    "MLP 3, BatchNorm, SGD 1": Run(classify(partial(mlp, 3, "batch"), sgd(1.0, 0.0), prepare=fill("he"))),
    "MLP 30, BatchNorm": Run(classify(partial(mlp, 30, "batch"), enough=0.3)),
    "MLP 4, N(0, 0.01²)": Run(classify(partial(mlp, 4), prepare=fill("naive"), enough=0.4)),
    "MLP 3, BatchNorm, N(0, 0.01²), SGD 1": Run(
        classify(partial(mlp, 3, "batch"), sgd(1.0, 0.0), prepare=fill("naive"))
    ),
    "MLP 3, BatchNorm, N(0, 100²), SGD 0.1": Run(
        classify(partial(mlp, 3, "batch"), sgd(0.1), prepare=fill(100.0), enough=0.4)
    ),
    "MLP 3, BatchNorm, Adam 0.1": Run(classify(partial(mlp, 3, "batch"), adam(0.1))),
    "MLP 3, Adam 0.05": Run(classify(partial(mlp, 3), adam(0.05))),
    "softmax regression, SGD 0.5": Run(classify(partial(mlp, 0), sgd(0.5))),
    "ResNet, SGD 1": Run(classify(resnet, sgd(1.0, 0.0))),
    "MLP 2, SGD 0.5": Run(classify(partial(mlp, 2), sgd(0.5, 0.0), prepare=fill("he"))),
}


def _zero(model: nn.Module) -> None:
    from zoo_models import zero_closers  # noqa: PLC0415

    zero_closers(model)


def _unscaled(model: nn.Module, _: int) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.zeros_(layer.weight)


def _sick(fault: str, **specimens: Specimen) -> dict[str, Run]:
    return {name: Run(specimen, fault=fault) for name, specimen in specimens.items()}


VANISHING = {
    **{name: zoo.VANISHING[name] for name in zoo.VANISHING},
    **{
        f"MLP {depth}, sigmoid, {width} wide, {title}": classify(
            partial(mlp, depth, act=nn.Sigmoid, width=width), rate, prepare=start
        )
        for depth, width, title, rate, start in (
            (6, 128, "Adam", adam(), None),
            (6, 64, "SGD", sgd(0.1), None),
            (8, 128, "Adam", adam(), None),
            (8, 128, "Xavier", sgd(0.1), fill("xavier")),
            (12, 64, "Adam", adam(), None),
        )
    },
}
EXPLODING = {
    **{
        f"MLP {depth}, BatchNorm, {width} wide, {scheme}, {title}": classify(
            partial(mlp, depth, "batch", width=width), rate, prepare=fill(scheme)
        )
        for depth, width, scheme, title, rate in (
            (50, 128, "he", "Adam", adam()),
            (50, 128, "he", "SGD", sgd(0.01)),
            (50, 128, "xavier", "Adam", adam()),
            (50, 128, "naive", "Adam", adam()),
            (50, 64, "he", "Adam", adam()),
            (40, 128, "he", "Adam", adam()),
            (60, 64, "he", "SGD", sgd(0.1)),
        )
    },
    "chain of 48 convolutions, BatchNorm": classify(partial(Chain, 48, skip=False)),
}
NONE = {
    "trunk cut off": classify(partial(Cut, by="detach")),
    "trunk cut off, unseen": classify(partial(Cut, by="data")),
    "tower cut off": classify(partial(Cut, by="tower")),
    "γ = β = 0": classify(partial(mlp, 3, "batch"), prepare=_unscaled),
    "γ = β = 0, six layers, SGD": classify(partial(mlp, 6, "batch"), sgd(0.1), prepare=_unscaled),
    "BatchNorm, bias -10": classify(partial(mlp, 3, "batch"), prepare=dead_bias(1)),
    "BatchNorm, bias -10, VGG": classify(partial(vgg, "batch"), prepare=dead_bias(3)),
    "inputs - 50": zoo.DEAD["MLP 2, inputs - 50"],
}
TINY = {
    **{
        f"MLP {depth}, BatchNorm, N(0, {std:g}²), {title}": classify(
            partial(mlp, depth, "batch"), rate, prepare=fill(std)
        )
        for depth, std, title, rate in (
            (5, 1000.0, "Adam", adam()),
            (5, 1000.0, "SGD", sgd(0.01)),
            (3, 1000.0, "Adam", adam()),
            (5, 1000.0, "AdamW, decay 0.01", adam(decay=0.01)),
            (2, 10000.0, "Adam", adam()),
            (5, 300.0, "Adam", adam()),
            (5, 100.0, "Adam", adam()),
        )
    },
    "VGG, BatchNorm, N(0, 1000²)": classify(partial(vgg, "batch"), prepare=fill(1000.0)),
    "MLP 3, Adam 1e-9": classify(partial(mlp, 3), adam(1e-9)),
    "MLP 3, SGD 1e-9": classify(partial(mlp, 3), sgd(1e-9)),
}
HUGE = {
    **{f"MLP 3, SGD {rate:g}": classify(partial(mlp, 3), sgd(rate, 0.0), prepare=fill("he")) for rate in (3.0, 10.0)},
    **{
        f"MLP {depth}, {norm}, SGD {rate:g}": classify(partial(mlp, depth, norm), sgd(rate, 0.0), prepare=fill("he"))
        for depth, norm, rate in ((3, "batch", 10.0), (5, "batch", 100.0), (5, "layer", 10.0))
    },
    **{f"MLP 3, Adam {rate:g}": classify(partial(mlp, 3), adam(rate)) for rate in (0.3, 1.0, 10.0)},
    "MLP 5, BatchNorm, Adam 1": classify(partial(mlp, 5, "batch"), adam(1.0)),
    "VGG, Adam 0.1": zoo.DEAD["VGG, Adam 0.1"],
    "transformer, Adam 0.3": classify(partial(transformer, nn.GELU, first=True), adam(0.3)),
}
SICK: dict[str, Run] = {
    **_sick("vanishing-gradient", **VANISHING),
    **_sick("exploding-gradient", **EXPLODING),
    **_sick("no-gradient", **NONE),
    **_sick("tiny-updates", **TINY),
    **_sick("huge-updates", **HUGE),
}
