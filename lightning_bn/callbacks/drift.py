# SPDX-License-Identifier: Apache-2.0
"""γ and β of all BatchNorm layers of a model: copies, and distances between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_bn.findings import Finding
from lightning_bn.norms import find_batchnorm, residual_closing
from lightning_bn.parameter_groups import groups_of
from lightning_bn.rules.affine_drift import Pace, Watched, affine_drift
from lightning_bn.rules.collapsed_gamma import SMALL, collapsed_gamma
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.stats.batchnorm import Affine, distances, flat, on_host
from lightning_bn.taps import is_below

Pairs = dict[str, tuple[float, float]]


def affine_of(model: nn.Module) -> dict[str, Affine]:
    """Copies of γ and β of every BatchNorm layer that has both, in one piece, by layer."""
    return copied(with_affine(find_batchnorm(model)))


def copied(layers: Mapping[str, _BatchNorm]) -> dict[str, Affine]:
    """Copies of γ and β of layers that :func:`with_affine` gave."""
    return {name: Affine.of(layer.weight, layer.bias) for name, layer in layers.items()}


def with_affine(layers: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Those BatchNorm layers that have γ and β, in one piece, by name."""
    return {
        name: layer
        for name, layer in layers.items()
        if layer.weight is not None and layer.bias is not None and not is_lazy(layer.weight)
        if not _is_sharded(layer)
    }


def drift_by_layer(now: Mapping[str, Affine], *references: Mapping[str, Affine]) -> list[Pairs]:
    """Drift of γ and β from each reference, for the layers that it knows; one transfer brings all to the host."""
    return measured(now, references)[0]


def measured(
    now: Mapping[str, Affine], references: Sequence[Mapping[str, Affine]], beside: Sequence[Tensor] = ()
) -> tuple[list[Pairs], list[float]]:
    """Drift as :func:`drift_by_layer` gives it, and further numbers, in one transfer.

    γ and β themselves come to the host, four values of each channel and reference: arithmetic on so few costs a device
    more in calls than in work.

    Args:
        now: present values, by layer.
        references: values to compare with.
        beside: ``(K,)`` each, on any device.

    Returns:
        Drift from each reference, and what ``beside`` holds.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, reference in enumerate(references):
        known = (name for name in reference if name in now and reference[name].gamma.shape == now[name].gamma.shape)
        groups.setdefault(tuple(known), []).append(place)
    parts: list[Tensor] = []
    for names, places in groups.items():
        for values in (now, *(references[place] for place in places)):
            parts += flat([values[name] for name in names])
    numbers, begin = on_host([*parts, *beside]), 0
    found: list[Pairs] = [{} for _ in references]
    for names, places in groups.items():
        sizes = [len(now[name].gamma) for name in names]
        end = begin + 2 * sum(sizes) * (1 + len(places))
        rows = distances(numbers[begin:end], sizes) if names else []
        for place, mine in zip(places, rows, strict=False):
            found[place] = dict(zip(names, mine, strict=True))
        begin = end
    return found, numbers[begin:].tolist()


class References:
    """Copies of γ and β on the device of the model, and what the watched metric was."""

    def __init__(self) -> None:
        self.awaits_start = True
        """Whether no step of this run was seen."""
        self.start: dict[str, Affine] = {}
        """γ and β at the start, by layer."""
        self.best: dict[str, Affine] = {}
        """The same at the best validation."""
        self.watched: Watched | None = None
        """The metric; None before it was logged."""

    def begin_from(self, model: nn.Module) -> None:
        """Take the present values for those of the start."""
        self.awaits_start = False
        self.start = affine_of(model)

    def validated(self, model: nn.Module, name: str, last: float, epoch: int) -> bool:
        """A validation is over.

        Args:
            model: the network.
            name: name of the metric.
            last: its value, smaller being better.
            epoch: epoch of the validation.

        Returns:
            Whether no validation before was as good.
        """
        before = self.watched
        if before is None or last < before.best or not math.isfinite(before.best):
            self.best = affine_of(model)
            self.watched = Watched(name, last, epoch, last)
            return True
        self.watched = Watched(name, before.best, before.best_epoch, last)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain types and CPU tensors."""
        watched = asdict(self.watched) if self.watched else None
        return {"start": stored(self.start), "best": stored(self.best), "watched": watched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.start, self.best = loaded(state["start"]), loaded(state["best"])
        self.awaits_start = not self.start
        self.watched = Watched(**state["watched"]) if state["watched"] else None


def of_drift(
    model: nn.Module,
    references: References,
    metric: tuple[str, Sequence[str]],
    optimizers: Sequence[Optimizer],
    pace: Pace | None = None,
) -> Iterator[Finding]:
    """What can be said of γ and β at the end of a fit, and what cannot.

    Args:
        model: the network.
        references: γ and β at the start and at the best validation, and the watched metric.
        metric: the name that was asked for, and all names that were logged.
        optimizers: what trains the model.
        pace: speed of γ and β, and their share of the gradient; None where no step was measured.
    """
    start = references.start
    if not find_batchnorm(model):
        yield not_watched("BatchNorm", "the model has no BatchNorm layer")
        return
    sharded = any(map(_is_sharded, find_batchnorm(model).values()))
    if sharded or not start:
        missing = "no BatchNorm layer has both, or no batch was trained on"
        yield not_watched("the drift of γ and β", "they are sharded over processes" if sharded else missing)
    if not start:
        return
    if references.watched is None:
        name, logged = metric
        nearest = get_close_matches(name, logged, n=3, cutoff=0.0)
        how = f"set watch to a logged metric, such as {', '.join(nearest)}" if nearest else "log a validation loss"
        yield not_watched("the rise of the validation loss", f"watch={name!r} was never logged", how)
    since_start, since_best = drift_by_layer(affine_of(model), start, references.best)
    found = affine_drift(since_start, since_best or None, references.watched, pace)
    if found is not None:
        yield found
    yield from collapsed(model, start, optimizers)


def collapsed(model: nn.Module, start: Mapping[str, Affine], optimizers: Sequence[Optimizer]) -> Iterator[Finding]:
    """Judge the γ of every layer that does not close a residual block; reads the host.

    Args:
        model: the network.
        start: γ and β at the start of the run, by layer.
        optimizers: what trains it.
    """
    closers = residual_closing(model)
    decays = {name: group.decay for group in groups_of(model, optimizers) for name in group.layers}
    for name, now in affine_of(model).items():
        if name in closers.closing or name not in start:
            continue
        small, first = (int((x.gamma.abs() < SMALL).sum()) for x in (now, start[name]))
        if first and any(is_below(name, top) for top in closers.unseen):
            continue  # it may close a branch
        found = collapsed_gamma(name, small, len(now.gamma), first / len(now.gamma), decays.get(name))
        if found is not None:
            yield found


def _is_sharded(layer: nn.Module) -> bool:
    """Whether this process holds but a part of γ or β, a DTensor."""
    return any(hasattr(parameter, "to_local") for parameter in layer.parameters(recurse=False))


def stored(values: Mapping[str, Affine]) -> dict[str, list[Tensor]]:
    """CPU tensors in plain containers."""
    return {name: [affine.gamma.cpu(), affine.beta.cpu()] for name, affine in values.items()}


def loaded(values: Mapping[str, Sequence[Tensor]]) -> dict[str, Affine]:
    """What :func:`stored` gave."""
    return {name: Affine(gamma, beta) for name, (gamma, beta) in values.items()}
