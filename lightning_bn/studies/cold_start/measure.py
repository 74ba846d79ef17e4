# SPDX-License-Identifier: Apache-2.0
"""Weights from N(0, σ²) with a large σ in front of BatchNorm: NaN or not, silent or not, trained or not."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import batch_norm, linear

from lightning_bn.demo.models import PIXELS
from lightning_bn.initialization import initialize
from lightning_bn.outlook import Stage, predicted_overflow
from lightning_bn.studies.cold_start.figure import draw
from lightning_bn.studies.cold_start.networks import WIDTH, heard, network, silence_of, trainings
from lightning_bn.studies.cold_start.report import summary, tables
from lightning_bn.studies.cold_start.rows import (
    BATCHES,
    CASES,
    DEPTH,
    EXTRA_NORMS,
    GAPS,
    HE_LAYERS,
    HUGE,
    RAISED,
    STDS,
    WIDTHS,
    deepest,
)
from lightning_bn.studies.cold_start.verdicts import verdicts
from lightning_bn.studies.starts import BATCH, DTYPES, OPTIMIZERS, digits, rounded
from lightning_bn.studies.study import Row, Setting, Study

EMPTY: Row = dict.fromkeys(
    (
        *(f"{name}_{what}" for name in DTYPES for what in ("ends", "predicted", "bad")),
        *("silent", "running_var_inf", "loss_ratio"),
        *(f"{name}{what}" for name in OPTIMIZERS for what in ("", "_nan_step", "_change", "_update")),
    )
)
"""The columns; what a part does not measure stays empty."""


def settings(seeds: Sequence[int]) -> list[Setting]:
    """Four parts for each seed; the widest networks first, as they take longest.

    ``range``: the first forward pass in three precisions, by fan-in and σ. ``silence``: one BatchNorm layer alone, by
    the standard deviation of what it gets. ``gap``: BatchNorm behind every second, fifth or tenth layer only.
    ``training``: what helps.
    """
    runs: list[Setting] = []
    for seed in seeds:
        runs += [
            _setting("range", norm, seed, width=width, std=std, depth=deepest(width))
            for width in reversed(WIDTHS)
            for norm in ("batch", "none")
            for std in STDS
        ]
        runs += [_setting("training", case, seed, std=std) for case, stds in CASES.items() for std in stds]
        runs += [_setting("gap", f"norm behind every {gap}", seed, depth=max(GAPS)) for gap in GAPS]
        runs += [_setting("silence", "norm alone", seed, depth=1, std=std, batch=n) for n in BATCHES for std in HUGE]
    return runs


def _setting(
    part: str,
    case: str,
    seed: int,
    *,
    width: int = WIDTH,
    std: float = 1000.0,
    depth: int = DEPTH,
    batch: int = BATCH,
) -> Setting:
    return {"part": part, "case": case, "width": width, "std": std, "depth": depth, "batch": batch, "seed": seed}


def measure(setting: Setting) -> Row:
    """One run of one of the parts."""
    return {**EMPTY, **PARTS[str(setting["part"])](setting)}


def _whole(setting: Setting, name: str) -> int:
    return int(setting[name] or 0)


@torch.no_grad()
def forward_range(setting: Setting) -> Row:
    """Send a batch of digits through layer after layer, in three precisions, until its last layer or its overflow.

    The weights of a layer are drawn, used in all precisions and dropped, so that wide networks fit into memory.
    """
    width, depth, std = _whole(setting, "width"), _whole(setting, "depth"), float(setting["std"] or 0)
    generator = torch.Generator().manual_seed(_whole(setting, "seed"))
    images = digits(_whole(setting, "seed")).images[: _whole(setting, "batch")].flatten(1)
    signals = {name: images.to(dtype) for name, dtype in DTYPES.items()}
    row: Row = {}
    for place, (fan_in, fan_out) in enumerate(pairwise([PIXELS, *[width] * depth]), start=1):
        weight = torch.randn(fan_out, fan_in, generator=generator) * std
        for name, dtype in DTYPES.items():
            if name in signals:
                out = linear(signals.pop(name), weight.to(dtype))
                if bool(out.isfinite().all()):
                    out = batch_norm(out, None, None, training=True) if setting["case"] == "batch" else out
                    signals[name] = out.relu()
                else:
                    row[f"{name}_ends"] = place
        if not signals:
            break
    layers = list(stages_of(width, depth, std, normed=setting["case"] == "batch"))
    for name, dtype in DTYPES.items():
        ahead = predicted_overflow(layers, dtype)
        row[f"{name}_predicted"] = ahead.place if ahead and ahead.kind == "value" else None
    return row


def stages_of(width: int, depth: int, std: float, *, normed: bool) -> Iterable[Stage]:
    """What the weights of a perceptron with ReLU are expected to do to the signal, layer by layer."""
    for place in range(depth):
        mean_square = PIXELS if place == 0 else width / 2  # of the inputs of a unit, added up: ReLU cuts off half
        yield Stage(f"linear {place + 1}", std * math.sqrt(mean_square), resets=False)
        if normed:
            yield Stage(f"norm {place + 1}", 1.0, resets=True, is_norm=True)


@torch.no_grad()
def silence(setting: Setting) -> Row:
    """What one BatchNorm layer in float32 makes of values from N(0, std²)."""
    generator = torch.Generator().manual_seed(_whole(setting, "seed"))
    norm = nn.BatchNorm1d(_whole(setting, "width"))
    x = torch.randn(_whole(setting, "batch"), norm.num_features, generator=generator) * float(setting["std"] or 0)
    return silence_of([norm], [norm(x)])


def gap(setting: Setting) -> Row:
    """BatchNorm behind some layers only: the first forward pass in three precisions, and a training."""
    data, every = digits(_whole(setting, "seed")), int(str(setting["case"]).rpartition(" ")[2])
    net = network(depth=_whole(setting, "depth"), gap=every)
    initialize(net, float(setting["std"] or 0), seed=_whole(setting, "seed"))
    row: Row = {}
    for name, dtype in DTYPES.items():
        used = copy.deepcopy(net)
        ends, normed, logits = heard(used, data.images[:BATCH], dtype)
        row[f"{name}_ends"] = ends
        row[f"{name}_bad"] = rounded(1 - logits.isfinite().float().mean().item())
        if name == "float32":
            row |= silence_of([layer for layer in used if isinstance(layer, nn.BatchNorm1d)], normed)
    return {**row, **trainings(net, data, _whole(setting, "seed"))}


def training(setting: Setting) -> Row:
    """One remedy, or none: the first loss, a training with each optimizer, and how far the weights went."""
    case, std, seed = str(setting["case"]), float(setting["std"] or 0), _whole(setting, "seed")
    net = network(depth=_whole(setting, "depth"), gap=0 if case == "no norm" else 1, **EXTRA_NORMS.get(case, {}))
    linears = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    healthy = list(linears)[HE_LAYERS[case]] if case in HE_LAYERS else []
    initialize(net, std, exclude=healthy, seed=seed)
    if healthy:
        initialize(net, "he", include=healthy, seed=seed)
    factors = {name: std / math.sqrt(2 / layer.in_features) for name, layer in linears.items()}
    return trainings(net, digits(seed), seed, factors if case == RAISED else None)


PARTS = {"range": forward_range, "silence": silence, "gap": gap, "training": training}

STUDY = Study("cold_start", settings, measure, tables, verdicts, summary, draw, seeds=5)
