# SPDX-License-Identifier: Apache-2.0
"""Initialisation schemes: how wide a weight is drawn, and drawing it from a generator of its own."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_bn.layers import Role, Slot

Scheme = Literal[
    "he",
    "he_uniform",
    "he_fan_out",
    "he_fan_out_uniform",
    "xavier",
    "xavier_uniform",
    "naive",
    "uniform",
    "orthogonal",
    "lsuv",
    "pytorch",
]
SCHEMES: tuple[str, ...] = get_args(Scheme)
NAIVE_STD = 0.01
UNIFORM_BOUND = 0.05
ASSUMED = {"he": math.sqrt(2.0)}
"""Gain where the nonlinearity is unknown: that of ReLU for He, 1 for all others, as in the papers."""

Shape = Literal["normal", "uniform", "orthogonal", "constant"]


@dataclass(frozen=True)
class Fill:
    """How one parameter is filled.

    Args:
        label: what the report calls it: a scheme, ``zeros``, ``ones``, ...
        shape: the distribution.
        std: standard deviation of the distribution; 0 for a constant.
        value: the constant; with ``raised`` the value of one block of it.
        blocks: matrices stacked along axis 0, each orthogonal by itself.
        swapped: whether the first two axes are input and output.
        raised: the block along axis 0, of four, that alone has ``value``; the others are 0.
    """

    label: str
    shape: Shape
    std: float = 0.0
    value: float = 0.0
    blocks: int = 1
    swapped: bool = False
    raised: int | None = None


def check_scheme(scheme: object) -> Scheme | float:
    """A scheme's name, or the standard deviation of a plain normal.

    Raises:
        ValueError: where it is neither.
    """
    if isinstance(scheme, str) and scheme in SCHEMES:
        return scheme  # type: ignore[return-value]
    number = isinstance(scheme, int | float) and not isinstance(scheme, bool)
    if number and math.isfinite(scheme) and scheme > 0:  # type: ignore[arg-type, operator]
        return float(scheme)  # type: ignore[arg-type]
    names = ", ".join(SCHEMES)
    raise ValueError(f"scheme must be one of {names}, or a standard deviation above 0, got {scheme!r}")


def family(scheme: Scheme | float) -> str:
    """The scheme without its distribution and fan: ``he`` for ``he_fan_out_uniform``; ``normal`` for a number."""
    return scheme.split("_", maxsplit=1)[0] if isinstance(scheme, str) else "normal"


def uses_gain(scheme: Scheme | float) -> bool:
    """Whether a scheme asks for the nonlinearity behind a layer; for an orthogonal start too (Saxe et al. 2014)."""
    return family(scheme) in {"he", "xavier", "orthogonal"}


def target_std(scheme: Scheme | float, fan_in: int, fan_out: int, gain: float | None = None) -> float:
    """Standard deviation that a scheme draws weights with; their mean is 0.

    He: gain/√fan_in, or gain/√fan_out (He et al. 2015, eq. 10 and 14). Xavier: gain·√(2/(fan_in + fan_out))
    (Glorot & Bengio 2010, eq. 12; uniform: eq. 16). Naive: 0.01 (Krizhevsky et al. 2012, sec. 5). Uniform: that of
    U(−0.05, 0.05), 0.05/√3. A number: itself.

    Args:
        scheme: a scheme's name, or a standard deviation.
        fan_in: inputs of one output element.
        fan_out: outputs of one input element.
        gain: factor for the nonlinearity; None assumes ReLU for He and none for Xavier.

    Raises:
        ValueError: for ``orthogonal``, ``lsuv`` and ``pytorch``, whose spread fans do not decide.

    Example:
        >>> target_std("he", 50, 10), target_std("xavier", 50, 50)
        (0.2, 0.1414213562373095)
    """
    if not isinstance(scheme, str):
        return float(scheme)
    fixed = {"naive": NAIVE_STD, "uniform": UNIFORM_BOUND / math.sqrt(3)}
    if scheme in fixed:
        return fixed[scheme]
    kind = family(scheme)
    if kind not in {"he", "xavier"}:
        raise ValueError(f"scheme must be one whose spread the fans decide, got {scheme!r}")
    fan = (fan_in + fan_out) / 2 if kind == "xavier" else fan_out if "fan_out" in scheme else fan_in
    return (ASSUMED.get(kind, 1.0) if gain is None else gain) / math.sqrt(max(fan, 1))


def fill_for(slot: Slot, scheme: Scheme | float, gain: float | None = None) -> Fill:
    """How a scheme fills a weight.

    Recurrent weights are orthogonal, gate by gate, under every scheme that looks at fans (Saxe et al. 2014; Le et
    al. 2015 for its use), and drawn like all others under those that do not. Embeddings are looked up, not
    multiplied: under ``orthogonal`` and ``lsuv`` they are drawn as by ``he``.

    Args:
        slot: a weight, recurrent weight or embedding.
        scheme: a scheme's name, or a standard deviation.
        gain: factor for the nonlinearity behind the layer; None where it is unknown.
    """
    kind = family(scheme)
    label = scheme if isinstance(scheme, str) else f"normal({scheme:g})"
    if slot.role is Role.EMBEDDING and kind in {"orthogonal", "lsuv"}:
        return Fill("he", "normal", target_std("he", slot.fan_in, slot.fan_out, gain))
    if kind in {"orthogonal", "lsuv"} or (slot.role is Role.RECURRENT and kind in {"he", "xavier"}):
        rows, columns = matrix_shape(slot)
        std = (1.0 if gain is None else gain) / math.sqrt(max(rows, columns, 1))
        name = label if kind in {"orthogonal", "lsuv"} else "orthogonal"
        return Fill(name, "orthogonal", std, blocks=slot.blocks, swapped=slot.swapped)
    uniform = isinstance(scheme, str) and scheme.endswith("uniform")
    std = target_std(scheme, slot.fan_in, slot.fan_out, gain)
    return Fill(label, "uniform" if uniform else "normal", std)


def matrix_shape(slot: Slot) -> tuple[int, int]:
    """Rows and columns of each of the matrices of a weight: outputs, and inputs times the kernel."""
    shape = tuple(slot.tensor.shape)
    taps = math.prod(shape[2:])
    first, second = shape[0] // slot.blocks, math.prod(shape[1:2])
    return (second, first * taps) if slot.swapped else (first, second * taps)


def stream_seed(seed: int, name: str) -> int:
    """Seed of one parameter's random stream: 63 bits of SHA-256 over the seed and the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def draw(values: Tensor, fill: Fill, seed: int) -> None:
    """Fill a tensor in place, from a generator of its own.

    Args:
        values: float32 tensor on the CPU.
        fill: what to fill it with.
        seed: seed of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    if fill.shape == "normal":
        nn.init.normal_(values, 0.0, fill.std, generator=generator)
    elif fill.shape == "uniform":
        bound = math.sqrt(3) * fill.std
        nn.init.uniform_(values, -bound, bound, generator=generator)
    elif fill.shape == "orthogonal":
        _draw_orthogonal(values, fill, generator)
    else:
        nn.init.constant_(values, 0.0 if fill.raised is not None else fill.value)
        if fill.raised is not None:
            values.chunk(4)[fill.raised].fill_(fill.value)


def _draw_orthogonal(values: Tensor, fill: Fill, generator: torch.Generator) -> None:
    for block in values.chunk(fill.blocks):
        turned = block.transpose(0, 1) if fill.swapped else block
        matrix = torch.empty(turned.shape[0], math.prod(turned.shape[1:]))
        if matrix.numel():
            nn.init.orthogonal_(matrix, fill.std * math.sqrt(max(matrix.shape)), generator=generator)
        turned.copy_(matrix.reshape(turned.shape))
