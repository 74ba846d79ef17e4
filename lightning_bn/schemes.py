# SPDX-License-Identifier: Apache-2.0
"""Initialisation schemes: fill weights from a generator of their own, and say what was filled."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from lightning_bn.norms import find_batchnorm
from lightning_bn.taps import plain_name

Scheme = Literal["he", "xavier", "naive"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
NAIVE_STD = 0.01


@dataclass(frozen=True)
class Filled:
    """One parameter after initialisation.

    Args:
        name: parameter path in the model.
        shape: its shape.
        scheme: what it was filled by: a scheme's name, ``zeros`` or ``ones``.
        fan_in: inputs that feed one output element; 0 for biases, γ and β.
        fan_out: outputs that one input element feeds; 0 for biases, γ and β.
        target_std: standard deviation of the distribution it was drawn from.
        actual_std: biased standard deviation of what was drawn.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    fan_in: int
    fan_out: int
    target_std: float
    actual_std: float


@dataclass(frozen=True)
class Report:
    """What an initialisation did.

    Args:
        filled: one entry for each parameter that was filled.
        skipped: parameters of layers that the scheme covers but could not fill, by name, with the reason.
    """

    filled: tuple[Filled, ...]
    skipped: dict[str, str]


def fans(module: nn.Module) -> tuple[int, int]:
    """Fan-in and fan-out of a linear, convolution or transposed convolution layer.

    Fan-in is the number of inputs that feed one output element, fan-out the number of output elements that one
    input feeds, both at stride 1 and away from borders (He et al. 2015, sec. 2.2; Glorot & Bengio 2010,
    sec. 4.2). A transposed convolution stores its weight as ``(in, out / groups, *)``, so torch's own count
    takes one for the other; groups divide both.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d/2d/3d`` or ``nn.ConvTranspose1d/2d/3d``.

    Returns:
        ``(fan_in, fan_out)``.

    Raises:
        TypeError: for any other module.

    Example:
        >>> fans(nn.Conv2d(8, 16, 3, groups=4)), fans(nn.ConvTranspose2d(8, 16, 3))
        ((18, 36), (72, 144))
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _ConvNd):
        taps = math.prod(module.kernel_size)
        return module.in_channels // module.groups * taps, module.out_channels // module.groups * taps
    raise TypeError(f"module must be Linear, Conv or ConvTranspose, got {type(module).__name__}")


def target_std(scheme: Scheme, fan_in: int, fan_out: int) -> float:
    """Standard deviation that a scheme draws weights with, mean 0, normal.

    He: √(2 / fan_in), He et al. 2015, eq. 10. Xavier: √(2 / (fan_in + fan_out)), Glorot & Bengio 2010, eq. 12.
    Naive: 0.01 whatever the layer, Krizhevsky et al. 2012, sec. 5.

    Args:
        scheme: ``he``, ``xavier`` or ``naive``.
        fan_in: inputs of one output element.
        fan_out: outputs of one input element.

    Example:
        >>> target_std("he", 50, 10), target_std("xavier", 50, 50)
        (0.2, 0.1414213562373095)
    """
    if scheme == "naive":
        return NAIVE_STD
    fan = fan_in if scheme == "he" else (fan_in + fan_out) / 2
    gain = math.sqrt(2.0) if scheme == "he" else 1.0
    return gain / math.sqrt(max(fan, 1))


def initialize(model: nn.Module, scheme: Scheme = "he", *, seed: int = 0) -> Report:
    """Initialise a model in place; the global random state is neither read nor moved.

    Weights of linear, convolution and transposed convolution layers are drawn from the scheme, their biases are
    set to 0. BatchNorm layers get γ = 1, β = 0 and fresh running statistics. Each parameter has a random stream
    of its own, made from ``seed`` and the parameter's name, so that adding a layer leaves the others as they
    were. A parameter that several layers share is filled once, under its first name. Frozen parameters
    (``requires_grad=False``) keep their values: they are as good as always pretrained. Layers of other types are
    left as they are.

    Args:
        model: the network.
        scheme: ``he`` (before ReLU), ``xavier`` (before tanh, sigmoid or none) or ``naive`` (N(0, 0.01²)).
        seed: seed of all streams.

    Returns:
        What was filled and what could not be.

    Raises:
        ValueError: where ``scheme`` is not one of the three.

    Example:
        >>> report = initialize(nn.Sequential(nn.Linear(200, 200), nn.BatchNorm1d(200)), "he")
        >>> [(row.name, row.scheme, row.target_std) for row in report.filled][:2]
        [('0.weight', 'he', 0.1), ('0.bias', 'zeros', 0.0)]
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    filled: list[Filled] = []
    skipped: dict[str, str] = {}
    done: set[int] = set()
    for name, parameter, fill in _plan(model, scheme):
        reason = _unfillable(parameter)
        if reason is not None:
            skipped[name] = reason
        elif id(parameter) not in done:
            filled.append(_fill(name, parameter, fill, seed))
            done.add(id(parameter))
    for name, layer in find_batchnorm(model).items():
        if isinstance(layer.weight, nn.Parameter) and _inside(name, "weight") not in skipped:
            layer.reset_running_stats()  # without γ nothing tells a frozen layer from another
    return Report(tuple(filled), skipped)


def stream_seed(seed: int, name: str) -> int:
    """Seed of one parameter's random stream: 63 bits of SHA-256 over the seed and the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class _Fill:
    scheme: str
    std: float = 0.0
    value: float = 0.0
    fan_in: int = 0
    fan_out: int = 0


def _plan(model: nn.Module, scheme: Scheme) -> Iterator[tuple[str, Tensor, _Fill]]:
    norms = {id(layer) for layer in find_batchnorm(model).values()}
    for path, module in model.named_modules():
        if id(module) in norms:
            weight_fill = _Fill("ones", value=1.0)
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            continue  # the output projection of attention, of which the rest is not covered either
        elif isinstance(module, nn.Linear | _ConvNd | _ConvTransposeNd):
            fan_in, fan_out = fans(module)
            weight_fill = _Fill(scheme, target_std(scheme, fan_in, fan_out), fan_in=fan_in, fan_out=fan_out)
        else:
            continue
        for name, fill in (("weight", weight_fill), ("bias", _Fill("zeros"))):
            tensor = getattr(module, name)
            if isinstance(tensor, Tensor):
                yield _inside(plain_name(path), name), tensor, fill


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unfillable(parameter: Tensor) -> str | None:
    if not isinstance(parameter, nn.Parameter):
        return "computed from other parameters (a parametrization)"
    if not parameter.requires_grad:
        return "frozen (requires_grad=False)"
    if isinstance(parameter, UninitializedParameter):
        return "a lazy module that has not seen its first batch"
    if parameter.is_meta:
        return "on the meta device, without memory"
    if type(parameter.data) is not Tensor:
        return f"held as {type(parameter.data).__name__}, sharded over processes"
    return None if parameter.is_floating_point() else f"of dtype {parameter.dtype}"


@torch.no_grad()
def _fill(name: str, parameter: Tensor, fill: _Fill, seed: int) -> Filled:
    # Drawn on the CPU in float32: the same numbers on every device, in every dtype, on every rank.
    values = torch.full(parameter.shape, fill.value)
    if fill.std:
        generator = torch.Generator().manual_seed(stream_seed(seed, name))
        nn.init.normal_(values, 0.0, fill.std, generator=generator)
    parameter.copy_(values)
    actual = values.std(correction=0).item() if values.numel() else 0.0
    shape = tuple(parameter.shape)
    return Filled(name, shape, fill.scheme, fill.fan_in, fill.fan_out, fill.std, actual)
