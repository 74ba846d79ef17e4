# SPDX-License-Identifier: Apache-2.0
"""What parameters each kind of layer holds, and what each of them multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

NORMS: tuple[type[nn.Module], ...] = (
    _NormBase,  # BatchNorm and InstanceNorm of every dimension
    nn.LayerNorm,
    nn.GroupNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
CELLS: tuple[tuple[type[nn.Module], str], ...] = ((nn.LSTMCell, "LSTM"), (nn.GRUCell, "GRU"))


class Role(str, Enum):
    """What a parameter does in its layer."""

    WEIGHT = "weight"
    RECURRENT = "recurrent weight"
    EMBEDDING = "embedding"
    BIAS = "bias"
    LSTM_BIAS = "LSTM bias"
    GAMMA = "gamma"
    BETA = "beta"


@dataclass(frozen=True)
class Slot:
    """One parameter of a layer.

    Args:
        name: attribute of the layer.
        tensor: the parameter, or what a parametrization computes in its place.
        role: what it does.
        fan_in: inputs that feed one output element; 0 for biases, γ and β.
        fan_out: output elements that one input feeds; 0 for biases, γ and β.
        blocks: how many matrices of their own lie stacked along axis 0: gates, attention's projections, groups.
        swapped: whether the first two axes are input and output, as in transposed convolutions.
        nonlinearity: what its product goes through, where the layer itself decides that.
        padding: row that stays 0, in an embedding with a padding index.
    """

    name: str
    tensor: Tensor
    role: Role
    fan_in: int = 0
    fan_out: int = 0
    blocks: int = 1
    swapped: bool = False
    nonlinearity: str | None = None
    padding: int | None = None


def fans(module: nn.Module) -> tuple[int, int]:
    """Fan-in and fan-out of a linear, convolution, transposed convolution or embedding layer.

    Fan-in is the number of inputs that feed one output element, fan-out the number of output elements that one
    input feeds, both at stride 1 and away from borders (He et al. 2015, sec. 2.2; Glorot & Bengio 2010,
    sec. 4.2). A transposed convolution stores its weight as ``(in, out / groups, *)``, so torch's own count
    takes one for the other; groups divide both. An embedding multiplies a one-hot vector: one input feeds an
    output, whatever the size of the vocabulary.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``nn.ConvTranspose1d/2d/3d``, ``nn.Embedding`` or
            ``nn.EmbeddingBag``.

    Returns:
        ``(fan_in, fan_out)``.

    Raises:
        TypeError: for any other module.

    Example:
        >>> fans(nn.Conv2d(8, 16, 3, groups=4)), fans(nn.ConvTranspose2d(8, 16, 3)), fans(nn.Embedding(1000, 64))
        ((18, 36), (72, 144), (1, 64))
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _ConvNd):
        taps = math.prod(module.kernel_size)
        return module.in_channels // module.groups * taps, module.out_channels // module.groups * taps
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 1, module.embedding_dim
    raise TypeError(f"module must be Linear, Conv, ConvTranspose or Embedding, got {type(module).__name__}")


def slots(module: nn.Module) -> list[Slot]:
    """The parameters of a layer itself, without those of its submodules.

    Args:
        module: any module.

    Returns:
        One slot for each parameter of a kind of layer that is known here; empty for any other module.

    Example:
        >>> [(slot.name, slot.role.value, slot.fan_in, slot.blocks) for slot in slots(nn.GRUCell(3, 5, bias=False))]
        [('weight_ih', 'weight', 3, 3), ('weight_hh', 'recurrent weight', 5, 3)]
    """
    make = next((make for kinds, make in _TABLE if isinstance(module, kinds)), None)
    return [] if make is None else [slot for slot in make(module) if isinstance(slot.tensor, Tensor)]


def holds_weights(module: nn.Module) -> bool:
    """Whether a module is a layer that multiplies its input by weights."""
    return isinstance(module, tuple(kind for kinds, _ in _TABLE[1:] for kind in kinds))


def _norm(module: nn.Module) -> Iterator[Slot]:
    yield Slot("weight", getattr(module, "weight", None), Role.GAMMA)  # type: ignore[arg-type]
    yield Slot("bias", getattr(module, "bias", None), Role.BETA)  # type: ignore[arg-type]


def _dense(module: nn.Module) -> Iterator[Slot]:
    fan_in, fan_out = fans(module)
    swapped, groups = isinstance(module, _ConvTransposeNd), getattr(module, "groups", 1)
    # The projection of attention's output, which attention calls by its weight, not as a module.
    behind = "linear" if isinstance(module, NonDynamicallyQuantizableLinear) else None
    yield Slot("weight", module.weight, Role.WEIGHT, fan_in, fan_out, groups, swapped, behind)  # type: ignore[arg-type]
    yield Slot("bias", module.bias, Role.BIAS)  # type: ignore[arg-type]


def _embedding(module: nn.Module) -> Iterator[Slot]:
    fan_in, fan_out = fans(module)
    padding: Any = module.padding_idx
    yield Slot("weight", module.weight, Role.EMBEDDING, fan_in, fan_out, nonlinearity="linear", padding=padding)  # type: ignore[arg-type]


def _attention(module: nn.Module) -> Iterator[Slot]:
    # Packed or not, query, key and value are three projections onto embed_dim outputs; the projection of the output
    # is a submodule.
    out = module.embed_dim
    for name, fan_in, blocks in (
        ("in_proj_weight", out, 3),
        ("q_proj_weight", out, 1),
        ("k_proj_weight", module.kdim, 1),
        ("v_proj_weight", module.vdim, 1),
    ):
        yield Slot(name, getattr(module, name), Role.WEIGHT, fan_in, out, blocks, nonlinearity="linear")  # type: ignore[arg-type]
    yield Slot("in_proj_bias", module.in_proj_bias, Role.BIAS)  # type: ignore[arg-type]


def _recurrent(module: nn.Module) -> Iterator[Slot]:
    mode = module.mode if isinstance(module, nn.RNNBase) else _mode_of_cell(module)
    gates = GATES[str(mode)]
    # A gate's own sigmoid and tanh are near linear at the start: gain 1 (Glorot & Bengio 2010, sec. 4.2).
    between = "relu" if mode == "RNN_RELU" else "linear"
    for name, tensor in module.named_parameters(recurse=False):
        rows, columns = tensor.shape[0] // gates, tensor.shape[-1]
        if name.startswith("weight_ih"):
            yield Slot(name, tensor, Role.WEIGHT, columns, rows, gates, nonlinearity=between)
        elif name.startswith("weight_hh"):
            yield Slot(name, tensor, Role.RECURRENT, columns, rows, gates, nonlinearity="linear")
        elif name.startswith("weight_hr"):
            yield Slot(name, tensor, Role.WEIGHT, columns, tensor.shape[0], nonlinearity="linear")
        elif name.startswith("bias"):
            forget = mode == "LSTM" and name.startswith("bias_ih")
            yield Slot(name, tensor, Role.LSTM_BIAS if forget else Role.BIAS)


def _mode_of_cell(module: nn.Module) -> str:
    known = next((mode for kind, mode in CELLS if isinstance(module, kind)), None)
    return known or f"RNN_{str(module.nonlinearity).upper()}"


_TABLE: tuple[tuple[tuple[type[nn.Module], ...], Callable[[nn.Module], Iterator[Slot]]], ...] = (
    (NORMS, _norm),
    ((nn.Linear, _ConvNd), _dense),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.MultiheadAttention,), _attention),
    ((nn.RNNBase, nn.RNNCellBase), _recurrent),
)
