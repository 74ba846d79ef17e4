# SPDX-License-Identifier: Apache-2.0
"""Do γ = √(σ² + ε) and β = μ undo BatchNorm: in evaluation, in training, and in networks that were trained?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.noise import Noise
from lightning_bn.norms import find_batchnorm
from lightning_bn.precise import precise_statistics
from lightning_bn.stats.attribution import effective_samples
from lightning_bn.studies.batch_size.measure import EPOCHS, RATES, network_of, train
from lightning_bn.studies.batch_size.rows import USUAL
from lightning_bn.studies.seeds import mean
from lightning_bn.studies.starts import digits
from lightning_bn.studies.study import Row, Setting, Study, Value
from lightning_bn.studies.undo.figure import draw
from lightning_bn.studies.undo.report import summary, tables, verdicts
from lightning_bn.studies.undo.rows import (
    BATCHES,
    DTYPES,
    INPUTS,
    NETWORKS,
    RATIOS,
    constant_error,
    shrinkage,
)

EPS = 1e-5
CHANNELS, VALUES = 64, 4096
"""Of the normal inputs: channels, and values of each in evaluation mode."""
DRAWS = 400
"""Batches over which the error in training mode is averaged."""
STEPS, RATE = 600, 0.05
"""Of the layer that is trained to undo itself: steps, and Adam's first learning rate, which falls to 0."""
MEASURED = (
    "error",
    "predicted",
    "eval_error",
    "start_error",
    "gamma_ratio",
    "gamma_distance",
    "start_distance",
    "still_distance",
    "correlation",
    "m_eff",
)


class Moments(NamedTuple):
    """Mean and standard deviation √(σ² + ε) of each channel, ``(C,)``, float64."""

    mean: Tensor
    sd: Tensor


Draw = Callable[[int], Tensor]
"""Gives a batch ``(N, C, *)`` of N samples."""


def settings(seeds: Sequence[int]) -> list[Setting]:
    """Networks first, as they take longest; then layers trained to undo themselves, constants, evaluation mode."""
    runs: list[Setting] = []
    for seed in seeds:
        runs += [_setting("network", network, seed, batch=USUAL) for network in NETWORKS]
        runs += [_setting("layer", "normal", seed, batch=batch) for batch in BATCHES]
        runs += [_setting("training", name, seed, batch=batch) for name in INPUTS for batch in BATCHES]
        runs += [
            _setting("evaluation", "normal", seed, dtype=dtype, gamma=gamma, ratio=ratio)
            for dtype in DTYPES
            for gamma in ("with ε", "without ε")
            for ratio in RATIOS
        ]
    return runs


def _setting(
    part: str,
    name: str,
    seed: int,
    *,
    dtype: str = "float32",
    gamma: str = "with ε",
    ratio: float | None = None,
    batch: int | None = None,
) -> Setting:
    row: dict[str, Value] = {"part": part, "input": name, "dtype": dtype, "gamma": gamma, "ratio": ratio}
    return {**row, "batch": batch, "seed": seed}


def measure(setting: Setting) -> Row:
    """One run of one of the four parts."""
    torch.manual_seed(int(setting["seed"] or 0))
    parts = {"evaluation": in_evaluation, "training": in_training, "layer": trained_layer, "network": trained_network}
    found = {**dict.fromkeys(MEASURED), **parts[str(setting["part"])](setting)}
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in found.items()}


def in_evaluation(setting: Setting) -> Row:
    """Running statistics that are those of the input, β = μ, and γ with or without ε."""
    ratio, dtype = float(setting["ratio"] or 0), getattr(torch, str(setting["dtype"]))
    layer = nn.BatchNorm1d(CHANNELS, dtype=dtype).eval()
    z = torch.randn(VALUES, CHANNELS, dtype=torch.float64)
    scale = (ratio * layer.eps) ** 0.5
    x = (scale * (z + 2 * torch.randn(CHANNELS, dtype=torch.float64))).to(dtype)
    average, var = x.double().mean(0), x.double().var(0, correction=0)
    forgets = setting["gamma"] != "with ε"
    gamma = (var + (0 if forgets else layer.eps)).sqrt()
    statistics = {"running_mean": average, "running_var": var, "num_batches_tracked": torch.tensor(1)}
    layer.load_state_dict({**statistics, "weight": gamma, "bias": average})
    missing = 1 - (var / (var + layer.eps)).sqrt() if forgets else torch.zeros(CHANNELS)
    with torch.no_grad():
        error = error_of(layer(x), x, var.sqrt())
    return {"error": error, "predicted": missing.square().mean().sqrt().item()}


def in_training(setting: Setting) -> Row:
    """The constants γ = √(σ² + ε), β = μ while the layer normalises by the batch."""
    name, seed, batch = str(setting["input"]), int(setting["seed"] or 0), int(setting["batch"] or 0)
    known, draw_batch = normal(seed) if name == "normal" else first_layer(name, seed)
    layer, squares, spreads = undoing(draw_batch(batch), known), [], []
    with torch.no_grad():
        for _ in range(DRAWS):
            x = draw_batch(batch)
            squares.append(error_of(layer(x), x, known.sd) ** 2)
            spreads.append(x.double().transpose(0, 1).flatten(1).std(1, correction=0))
    s = torch.stack(spreads)
    apart, middle = (s[::2] - s[1::2]).square().sum(0), (s[::2] + s[1::2]).sum(0) / 2
    samples = effective_samples(apart.numpy(), middle.numpy(), DRAWS // 2)
    predicted = constant_error(batch) if name == "normal" else None
    return {"error": mean(squares) ** 0.5, "predicted": predicted, "m_eff": samples}


def trained_layer(setting: Setting) -> Row:
    """γ and β of a BatchNorm layer, from 1 and 0, trained on the squared error of its output against its input."""
    batch = int(setting["batch"] or 0)
    known, draw_batch = normal(int(setting["seed"] or 0))
    layer, sd = nn.BatchNorm1d(CHANNELS), known.sd.float()
    optimizer = torch.optim.Adam(layer.parameters(), lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x = draw_batch(batch)
        optimizer.zero_grad()
        torch.autograd.backward(((layer(x) - x) / sd).square().mean())
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        squares = [error_of(layer(x), x, sd) ** 2 for x in map(draw_batch, [batch] * DRAWS)]
    return {
        "error": mean(squares) ** 0.5,
        "predicted": shrinkage(batch),
        "eval_error": distance(layer, known),
        "gamma_distance": gamma_distance(layer, known),
        "gamma_ratio": (layer.weight.detach() / known.sd).mean().item(),
    }


def trained_network(setting: Setting) -> Row:
    """How far γ and β of a network are from undoing its BatchNorm layers, before and after training on the digits."""
    name, seed, batch = str(setting["input"]), int(setting["seed"] or 0), int(setting["batch"] or 0)
    net, data = network_of(name, "batch"), digits(seed)
    start = condition(net, data.images)
    train(net, Noise(net), data, batch=batch, accumulate=1, rate=RATES[name], epochs=EPOCHS[name], seed=seed)
    end = condition(net, data.images)
    return {**end, "start_error": start["eval_error"], "start_distance": start["gamma_distance"]}


def condition(net: nn.Module, images: Tensor) -> Row:
    """How far the BatchNorm layers are from undoing themselves in evaluation mode, in the median over the layers."""
    layers = find_batchnorm(net)
    found = precise_statistics(net, [images]).layers
    known = {name: Moments(x.mean, (x.var + layers[name].eps).sqrt()) for name, x in found.items()}
    gammas = {name: layers[name].weight.detach().double() for name in known}
    pairs = [torch.stack([gammas[name], known[name].sd]) for name in known]
    return {
        "still_distance": median(((1 - x.sd).norm() / x.sd.norm()).item() for x in known.values()),
        "eval_error": median(distance(layers[name], known[name]) for name in known),
        "gamma_distance": median(gamma_distance(layers[name], known[name]) for name in known),
        "gamma_ratio": median((gammas[name] / known[name].sd).median().item() for name in known),
        "correlation": median(torch.corrcoef(pair)[0, 1].item() for pair in pairs),
    }


def error_of(y: Tensor, x: Tensor, sd: Tensor) -> float:
    """Root mean square of (y − x)/σ over all values.

    Args:
        y: output, ``(N, C, *)``.
        x: input, the same shape.
        sd: standard deviation of each channel, ``(C,)``.
    """
    apart = (y.double() - x.double()).transpose(0, 1).flatten(1) / sd.double().unsqueeze(1)
    return apart.square().mean().sqrt().item()


def distance(layer: _BatchNorm, known: Moments) -> float:
    """Root mean square of (y − x)/σ in evaluation mode, from γ and β alone: √((γ/σ − 1)² + ((β − μ)/σ)²)."""
    gamma, beta = (x.detach().double() for x in (layer.weight, layer.bias))
    apart = (gamma / known.sd - 1).square() + ((beta - known.mean) / known.sd).square()
    return apart.mean().sqrt().item()


def gamma_distance(layer: _BatchNorm, known: Moments) -> float:
    """‖γ − σ‖/‖σ‖ with σ = √(var + ε)."""
    apart: Tensor = torch.linalg.vector_norm(layer.weight.detach().double() - known.sd)
    return float(apart / torch.linalg.vector_norm(known.sd))


def undoing(x: Tensor, known: Moments) -> _BatchNorm:
    """A BatchNorm layer in training mode, for values ``(N, C, *)``, with γ = √(σ² + ε) and β = μ."""
    layer = (nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d)(len(known.mean))  # noqa: PLR2004  (vectors)
    with torch.no_grad():
        layer.weight.copy_(known.sd)
        layer.bias.copy_(known.mean)
    return layer


def normal(seed: int) -> tuple[Moments, Draw]:
    """Normal values whose channels have μ from N(0, 2²) and σ from U(0.5, 2)."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(CHANNELS, generator=generator)
    sd = 0.5 + 1.5 * torch.rand(CHANNELS, generator=generator)

    def draw_batch(batch: int) -> Tensor:
        return mean + sd * torch.randn(batch, CHANNELS, generator=generator)

    return Moments(mean.double(), (sd.double() ** 2 + EPS).sqrt()), draw_batch


def first_layer(network: str, seed: int) -> tuple[Moments, Draw]:
    """What the first BatchNorm layer of an untrained network gets from the digits."""
    net, images = network_of(network, "batch"), digits(seed).images
    first = next(layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    with torch.no_grad():
        values: Tensor = first(images.flatten(1) if network == "mlp" else images)
    generator = torch.Generator().manual_seed(seed)

    def draw_batch(batch: int) -> Tensor:
        return values[torch.randperm(len(values), generator=generator)[:batch]]

    columns = values.double().transpose(0, 1).flatten(1)
    return Moments(columns.mean(1), (columns.var(1, correction=0) + EPS).sqrt()), draw_batch


STUDY = Study("undo", settings, measure, tables, verdicts, summary, draw, seeds=5)
