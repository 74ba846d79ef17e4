# SPDX-License-Identifier: Apache-2.0
"""γ and β of all BatchNorm layers of a model: copies, and distances between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_bn.findings import Finding
from lightning_bn.norms import find_batchnorm, residual_closing
from lightning_bn.parameter_groups import groups_of
from lightning_bn.rules.affine_drift import Watched, affine_drift
from lightning_bn.rules.collapsed_gamma import SMALL, collapsed_gamma
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.stats.batchnorm import Affine, drift
from lightning_bn.taps import is_below

Pairs = dict[str, tuple[float, float]]


def affine_of(model: nn.Module) -> dict[str, Affine]:
    """Copies of γ and β of every BatchNorm layer that has both, by layer."""
    return {
        name: Affine.of(layer.weight, layer.bias)
        for name, layer in find_batchnorm(model).items()
        if layer.weight is not None and layer.bias is not None and not is_lazy(layer.weight)
    }


def drift_by_layer(now: Mapping[str, Affine], *references: Mapping[str, Affine]) -> list[Pairs]:
    """Drift of γ and β from each reference, for the layers that it knows; one transfer brings all to the host."""
    pairs = [
        (place, name)
        for place, reference in enumerate(references)
        for name in reference
        if name in now and reference[name].gamma.shape == now[name].gamma.shape
    ]
    found: list[Pairs] = [{} for _ in references]
    if pairs:
        here = [now[name] for _, name in pairs]
        there = [references[place][name].to(now[name].gamma.device) for place, name in pairs]
        for (place, name), (gamma, beta) in zip(pairs, drift(here, there).tolist(), strict=True):
            found[place][name] = (gamma, beta)
    return found


def of_drift(
    model: nn.Module,
    references: tuple[Mapping[str, Affine], Mapping[str, Affine]],
    watched: Watched | None,
    metric: tuple[str, Sequence[str]],
    optimizers: Sequence[Optimizer],
) -> Iterator[Finding]:
    """What can be said of γ and β at the end of a fit, and what cannot.

    Args:
        model: the network.
        references: γ and β at the start, and at the best validation.
        watched: the watched metric; None where it was never logged.
        metric: the name that was asked for, and all names that were logged.
        optimizers: what trains the model.
    """
    start, best = references
    if not find_batchnorm(model):
        yield not_watched("BatchNorm", "the model has no BatchNorm layer")
        return
    if not start:
        yield not_watched("the drift of γ and β", "no BatchNorm layer has both, or no batch was trained on")
        return
    if watched is None:
        name, logged = metric
        nearest = get_close_matches(name, logged, n=3, cutoff=0.0)
        how = f"set watch to a logged metric, such as {', '.join(nearest)}" if nearest else "log a validation loss"
        yield not_watched("the rise of the validation loss", f"watch={name!r} was never logged", how)
    since_start, since_best = drift_by_layer(affine_of(model), start, best)
    found = affine_drift(since_start, since_best or None, watched)
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


def stored(values: Mapping[str, Affine]) -> dict[str, list[Tensor]]:
    """CPU tensors in plain containers."""
    return {name: [affine.gamma.cpu(), affine.beta.cpu()] for name, affine in values.items()}


def loaded(values: Mapping[str, Sequence[Tensor]]) -> dict[str, Affine]:
    """What :func:`stored` gave."""
    return {name: Affine(gamma, beta) for name, (gamma, beta) in values.items()}
