# SPDX-License-Identifier: Apache-2.0
"""Six starts, with and without BatchNorm, at three depths: what the first forward pass shows, and which ones train."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_bn.demo import DigitsMLP, DigitsResNet
from lightning_bn.initialization import Report, initialize
from lightning_bn.norms import find_batchnorm
from lightning_bn.schemes import Scheme
from lightning_bn.studies.init.figure import draw
from lightning_bn.studies.init.report import summary, tables
from lightning_bn.studies.init.rows import DEPTHS, GAMMAS, NORMS, STARTS
from lightning_bn.studies.init.verdicts import verdicts
from lightning_bn.studies.starts import (
    BATCH,
    DTYPES,
    LN_C,
    OPTIMIZERS,
    Digits,
    digits,
    first_pass,
    predicted_end,
    rounded,
    train,
)
from lightning_bn.studies.study import Row, Setting, Study

DRAWN: dict[str, Scheme | float] = {
    "he": "he",
    "xavier": "xavier",
    "naive": "naive",
    "uniform": "uniform",
    "normal_1": 1.0,
    "normal_1000": 1000.0,
}
"""What :func:`~lightning_bn.initialize` calls each start; Xavier is drawn with gain 1, by the plain formula."""


COLUMNS = ("network", "start", "norm", "depth", "gamma")


def settings(seeds: Sequence[int]) -> list[Setting]:
    """Every start, norm and depth with γ = 1, then He with other γ; the deep networks first, as they take longest."""
    runs: list[Setting] = []
    for seed in seeds:
        table = product(reversed(DEPTHS), NORMS, STARTS)
        cells: list[tuple[str, str, str, int, float | None]] = [
            *(("mlp", start, norm, depth, None if norm == "none" else 1.0) for depth, norm, start in table),
            *(("mlp", "he", "batch", DEPTHS[0], gamma) for gamma in GAMMAS if gamma != 1),
            *(("resnet", "he", "batch", 2, gamma) for gamma in (1.0, 0.0)),
        ]
        runs += [{**dict(zip(COLUMNS, cell, strict=True)), "seed": seed} for cell in cells]
    return runs


def measure(setting: Setting) -> Row:
    """One start: the first forward pass in three precisions, the first gradients, a training with each optimizer."""
    seed = int(setting["seed"] or 0)
    data, (model, report) = digits(seed), started(setting)
    return {**_first_signals(model, report, data), **_trainings(model.net, data, seed)}


def started(setting: Setting) -> tuple[DigitsMLP | DigitsResNet, Report]:
    """The network of a setting with its weights drawn."""
    seed, gamma = int(setting["seed"] or 0), setting["gamma"]
    build = DigitsMLP if setting["network"] == "mlp" else DigitsResNet
    model = build("none" if setting["norm"] == "none" else "batch", depth=int(setting["depth"] or 0))
    start = str(setting["start"])
    report = initialize(
        model,
        DRAWN[start],
        nonlinearity="linear" if start == "xavier" else None,
        zero_init_residual=setting["network"] == "resnet" and gamma == 0,
        seed=seed,
    )
    if setting["network"] == "mlp" and gamma is not None:
        for norm in find_batchnorm(model).values():
            nn.init.constant_(norm.weight, float(gamma))
    return model, report


def _first_signals(model: DigitsMLP | DigitsResNet, report: Report, data: Digits) -> Row:
    images, labels = data.images[:BATCH], data.labels[:BATCH]
    row: Row = {}
    for name, dtype in DTYPES.items():
        seen = first_pass(copy.deepcopy(model.net), images, labels, dtype)
        if name == "float32":
            row |= {"std": rounded(seen.std), "loss_ratio": rounded(seen.loss / LN_C)}
        row[f"{name}_ends"] = seen.ends
        row[f"{name}_predicted"] = predicted_end(model, report, dtype) if isinstance(model, DigitsMLP) else None
    net = copy.deepcopy(model.net).train()
    torch.autograd.backward(cross_entropy(net(images), labels))
    return {**row, "gradient_growth": rounded(growth(net))}


def _trainings(net: nn.Module, data: Digits, seed: int) -> Row:
    row: Row = {}
    for name, make in OPTIMIZERS.items():
        trained = copy.deepcopy(net)
        done = train(trained, make(trained.parameters()), data, seed=seed)
        row[name] = rounded(done.accuracies[-1])
        row[f"{name}_loss_first"] = rounded(done.losses[0] / LN_C)
        row[f"{name}_loss_last"] = rounded(done.losses[-1] / LN_C)
        row[f"{name}_nan_step"] = done.nan_step
    return row


def growth(net: nn.Module) -> float:
    """Factor by which the gradient grows from one hidden layer to the one before it, in the geometric mean.

    Taken from the norms of the gradients of the square weights, which are those of all hidden layers but the first.

    Args:
        net: a perceptron with gradients.

    Returns:
        The factor; NaN where there are fewer than two such layers, or where a gradient is 0 or not finite.
    """
    gradients = [layer.weight.grad for layer in net.modules() if isinstance(layer, nn.Linear)]
    norms = [grad.double().norm().item() for grad in gradients if grad is not None and _is_square(grad)]
    if len(norms) < 2 or not all(math.isfinite(norm) and norm > 0 for norm in norms):  # noqa: PLR2004  (a ratio of two)
        return math.nan
    return float((norms[0] / norms[-1]) ** (1 / (len(norms) - 1)))


def _is_square(x: torch.Tensor) -> bool:
    return x.size(0) == x.size(1)


STUDY = Study("init", settings, measure, tables, verdicts, summary, draw, seeds=5)
