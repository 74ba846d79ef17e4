# SPDX-License-Identifier: Apache-2.0
"""Initialise a model in place, and say of every parameter what became of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_bn.filling import Row, fill_one
from lightning_bn.init_plan import Plan, Planned, Wishes, plan
from lightning_bn.layers import Role
from lightning_bn.lsuv import unit_variance
from lightning_bn.quarantine import quarantine
from lightning_bn.schemes import Scheme
from lightning_bn.stats.freshness import why_not_drawn, why_not_new
from lightning_bn.taps import plain_name

GLANCES, GLANCE = 16, 1 << 13
"""How many weights are looked at first for signs of training, and how many values of each."""
UNSCALED = "not scaled: no output, or a constant one, on the batch"


@dataclass(frozen=True)
class Report:
    """What an initialisation did.

    Args:
        scheme: what was asked for.
        seed: seed of all streams.
        rows: one for each parameter, in the order of the modules.
        remarks: what else is worth saying.
    """

    scheme: str
    seed: int
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()

    @property
    def filled(self) -> tuple[Row, ...]:
        """The parameters that were filled."""
        return tuple(row for row in self.rows if row.scheme != "kept")

    @property
    def skipped(self) -> dict[str, str]:
        """The parameters that kept their values although nobody asked for it, with the reason."""
        return {row.name: row.why for row in self.rows if row.scheme == "kept" and not row.chosen}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        rows = [{**asdict(row), "shape": list(row.shape)} for row in self.rows]
        return {"scheme": self.scheme, "seed": self.seed, "remarks": list(self.remarks), "parameters": rows}


def initialize(
    model: nn.Module,
    scheme: Scheme | float = "he",
    *,
    nonlinearity: str | Mapping[str, str] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    zero_init_residual: bool | None = None,
    forget_bias: float | None = None,
    seed: int = 0,
    batch: Any = None,
) -> Report:
    """Initialise a model in place; the global random state is neither read nor moved.

    Weights of linear, convolution, transposed convolution, embedding, attention and recurrent layers are drawn from
    the scheme, biases are set to 0. Normalisation layers get γ = 1, β = 0 and fresh running statistics. Each
    parameter has a random stream of its own, made from ``seed`` and the parameter's name, so that adding a layer
    leaves the others as they were. A parameter that several layers share is filled once, under its first name.
    Frozen parameters (``requires_grad=False``) keep their values: they are as good as always pretrained. So does
    what belongs to no known kind of layer.

    Args:
        model: the network.
        scheme: ``he``, ``he_uniform``, ``he_fan_out``, ``he_fan_out_uniform`` (He et al. 2015), ``xavier``,
            ``xavier_uniform`` (Glorot & Bengio 2010), ``naive`` = N(0, 0.01²), ``uniform`` = U(−0.05, 0.05),
            ``orthogonal`` (Saxe et al. 2014), ``lsuv`` (Mishkin & Matas 2016; needs ``batch``), ``pytorch`` (touches
            nothing, only reports), or a number σ = N(0, σ²).
        nonlinearity: the nonlinearity that gains are for, for all layers or by shell pattern on module paths; None
            takes what follows each layer, and where that is unknown ReLU for He and none for the others.
        include: shell patterns on module or parameter paths, and names of module classes; None is everything.
        exclude: the same, to leave alone.
        zero_init_residual: True puts γ = 0 on the BatchNorm layers that close a residual branch (Goyal et al. 2017);
            None keeps a zero that the model has there; False puts γ = 1 everywhere.
        forget_bias: bias of the forget gate of LSTM layers (Jozefowicz et al. 2015); None is 0.
        seed: seed of all streams.
        batch: what the model is called with, for ``lsuv``: a tensor, a tuple of arguments or a dict of keywords.

    Returns:
        One row for each parameter.

    Raises:
        ValueError: where an argument is out of its range, or ``lsuv`` has no batch.

    Example:
        >>> report = initialize(nn.Sequential(nn.Linear(200, 200), nn.BatchNorm1d(200)), "he")
        >>> [(row.name, row.scheme, row.target_std) for row in report.filled][:2]
        [('0.weight', 'he', 0.1), ('0.bias', 'zeros', 0.0)]
    """
    wishes = Wishes(scheme, nonlinearity, include, exclude, zero_init_residual, forget_bias)
    if scheme == "lsuv" and batch is None:
        raise ValueError("batch must be what the model is called with, as lsuv looks at outputs, got None")
    for argument, entry, nearest in wishes.scope.unmatched(model):
        warnings.warn(f"{argument}: {entry!r} matches nothing; nearest: {', '.join(nearest)}", stacklevel=2)
    planned = plan(model, wishes)
    loaded = seem_loaded(model, planned)
    if loaded:
        listed = ", ".join(f"{name} ({why})" for name, why in list(loaded.items())[:3])
        warnings.warn(f"{len(loaded)} parameters held values that look loaded or trained: {listed}", stacklevel=2)
    report = carry_out(model, planned, scheme, seed)
    if scheme == "lsuv":
        with quarantine(model):
            scales = unit_variance(scalable(model, planned), lambda: _call(model, batch))
        report, unscaled = rescale(planned, report, scales)
        if unscaled:
            warnings.warn(f"lsuv did not scale {', '.join(unscaled)}: no output, or a constant one", stacklevel=2)
    return report


def carry_out(model: nn.Module, planned: Plan, scheme: Scheme | float, seed: int) -> Report:
    """Fill the parameters of a model as planned, and reset the running statistics of its normalisation layers."""
    rows = tuple(fill_one(entry, seed) for entry in planned.entries)
    filled = {id(entry.tensor) for entry in planned.entries if entry.fill is not None}
    for module in model.modules():
        # Without γ nothing tells a frozen layer from another.
        if isinstance(module, _NormBase) and id(module.weight) in filled:
            module.reset_running_stats()
    return Report(f"{scheme:g}" if not isinstance(scheme, str) else scheme, seed, rows, planned.remarks)


def seem_loaded(model: nn.Module, planned: Plan) -> dict[str, str]:
    """The parameters that are about to be overwritten and hold values that no usual initialisation leaves, with why.

    Of a model of many weights a few are looked at first, of few values each; all of them, and more closely, only
    where one of those, or a norm, was found to hold more than a fresh start. That costs little where all is fresh.
    """
    modules = {plain_name(path): module for path, module in model.named_modules()}
    filled = [entry for entry in planned.entries if entry.fill is not None and entry.slot is not None]
    of_norms = [entry for entry in filled if entry.slot and entry.slot.role in {Role.GAMMA, Role.BETA}]
    weights = [entry for entry in filled if entry.slot and entry.slot.role not in {Role.GAMMA, Role.BETA}]
    large = [entry for entry in weights if entry.slot and entry.slot.fan_in]
    found = {entry.name: why for entry in of_norms if (why := why_not_new(modules[entry.layer]))}
    first = large[:: math.ceil(len(large) / GLANCES) or 1]
    with _one_thread():
        if found or any(why_not_drawn(entry.tensor, budget=GLANCE) for entry in first):
            found |= {entry.name: why for entry in weights if (why := why_not_drawn(entry.tensor))}
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices are faster on one thread, by far where other processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def scalable(model: nn.Module, planned: Plan) -> dict[str, nn.Module]:
    """The layers that LSUV scales, by path: linear and convolution layers whose weight is being initialised."""
    meant = {id(entry.tensor) for entry in planned.entries if _is_scaled(entry)}
    return {
        plain_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd) and id(module.weight) in meant
    }


@torch.no_grad()
def rescale(planned: Plan, report: Report, factors: Mapping[str, float]) -> tuple[Report, list[str]]:
    """Multiply the weights by what :func:`~lightning_bn.lsuv.unit_variance` found.

    Args:
        planned: the plan of the initialisation.
        report: what it did.
        factors: factor by layer; without one, or with one that is not finite, a weight stays as it is.

    Returns:
        The report with the new standard deviations, and the layers that were meant and not scaled.
    """
    rows = {row.name: row for row in report.rows}
    unscaled = []
    for entry in filter(_is_scaled, planned.entries):
        factor, row = factors.get(entry.layer, math.nan), rows[entry.name]
        if not math.isfinite(factor):
            unscaled.append(entry.layer)
            rows[entry.name] = replace(row, why=UNSCALED)
            continue
        entry.tensor.mul_(factor)
        scaled = [None if std is None else std * factor for std in (row.target_std, row.actual_std)]
        rows[entry.name] = replace(row, target_std=scaled[0], actual_std=scaled[1])
    return replace(report, rows=tuple(rows.values())), unscaled


def merge(report: Report, late: Report) -> Report:
    """A report in which rows of a later one, about lazy layers that got their parameters, replace the earlier ones."""
    rows = {row.name: row for row in report.rows} | {row.name: row for row in late.rows}
    return replace(report, rows=tuple(rows.values()))


def _is_scaled(entry: Planned) -> bool:
    slot = entry.slot
    return entry.fill is not None and entry.fill.label == "lsuv" and slot is not None and slot.nonlinearity is None


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
