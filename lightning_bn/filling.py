# SPDX-License-Identifier: Apache-2.0
"""Fill one parameter as planned, on any device, in any precision, whole or sharded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from lightning_bn.init_plan import Planned, is_sharded
from lightning_bn.schemes import Fill, draw, stream_seed

FEW = 1 << 16  # a tensor up to this size gets the exact, slower standard deviation


@dataclass(frozen=True)
class Row:
    """One parameter after initialisation.

    Args:
        name: parameter path in the model.
        shape: its shape.
        scheme: what it was filled by: a scheme's name, ``zeros``, ``ones``, or ``kept``.
        fan_in: inputs that feed one output element; 0 for biases, γ and β.
        fan_out: outputs that one input element feeds; 0 for biases, γ and β.
        follows: the nonlinearity behind the layer; empty where it is unknown or does not matter.
        gain: factor for that nonlinearity; None where none was used.
        target_std: standard deviation of the distribution it was drawn from; None if it was kept.
        actual_std: biased standard deviation of what it holds; None where that cannot be read.
        why: why it was kept, or what is particular about it.
        chosen: whether it was kept because the user asked for it.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    fan_in: int = 0
    fan_out: int = 0
    follows: str = ""
    gain: float | None = None
    target_std: float | None = None
    actual_std: float | None = None
    why: str = ""
    chosen: bool = False


def fill_one(entry: Planned, seed: int) -> Row:
    """Fill a parameter, or leave it alone, as planned; the global random state is neither read nor moved.

    Args:
        entry: the parameter and what is planned for it.
        seed: seed of all streams; the parameter's own is made from it and its name.
    """
    slot, fill = entry.slot, entry.fill
    known = Row(
        entry.name,
        tuple(entry.tensor.shape) if _has_shape(entry.tensor) else (),
        "kept",
        fan_in=slot.fan_in if slot else 0,
        fan_out=slot.fan_out if slot else 0,
        follows=entry.follower.nonlinearity if entry.follower else "",
        gain=entry.follower.gain if entry.follower else None,
        why=entry.why,
        chosen=entry.chosen,
    )
    if fill is None:
        return replace(known, actual_std=_readable_std(entry.tensor))
    padding = slot.padding if slot else None
    return replace(known, scheme=fill.label, target_std=fill.std, actual_std=_fill(entry, fill, seed, padding))


@torch.no_grad()
def _fill(entry: Planned, fill: Fill, seed: int, padding: int | None) -> float:
    # Drawn on the CPU in float32: the same numbers on every device, in every dtype, on every rank.
    parameter = entry.tensor.detach()
    in_place = parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous()
    in_place = in_place and not is_sharded(entry.tensor)
    values = parameter if in_place else torch.empty(parameter.shape)
    draw(values, fill, stream_seed(seed, entry.name))
    if padding is not None:
        values[padding] = 0.0
    if is_sharded(entry.tensor):
        _store_sharded(parameter, values)
    elif not in_place:
        parameter.copy_(values)
    return _std(values)


def _store_sharded(parameter: Tensor, values: Tensor) -> None:
    """Keep this process's part of values that every process has drawn alike: nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415  (a heavy import, seldom needed)

    if not isinstance(parameter, DTensor):
        raise TypeError(f"parameter must be a DTensor, got {type(parameter).__name__}")
    mesh, placements = parameter.device_mesh, parameter.placements
    whole = values.to(parameter.device, parameter.dtype)
    parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))


def _std(values: Tensor) -> float:
    if not values.numel():
        return 0.0
    if values.numel() <= FEW:
        return values.std(correction=0).item()
    flat = values.reshape(-1)  # about 40 times as fast, and exact enough for values around 0
    return math.sqrt(max(float(flat.dot(flat)) / flat.numel() - float(flat.mean()) ** 2, 0.0))


def _readable_std(tensor: Tensor) -> float | None:
    if isinstance(tensor, UninitializedParameter) or tensor.is_meta or not tensor.is_floating_point():
        return None
    values = tensor.detach()
    return _std(values.float()) if type(values) is Tensor and values.numel() else None


def _has_shape(tensor: Tensor) -> bool:
    return not isinstance(tensor, UninitializedParameter)
