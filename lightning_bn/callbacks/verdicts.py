# SPDX-License-Identifier: Apache-2.0
"""What the rules say of one due step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.updates import ratios
from lightning_bn.callbacks.windows import Window
from lightning_bn.findings import Finding
from lightning_bn.overview import activation_overview, gradient_overview, rank_overview, unit_overview, update_overview
from lightning_bn.rules.dead_units import dead_units
from lightning_bn.rules.dropout_before_batchnorm import dropout_before_batchnorm
from lightning_bn.rules.exploding_signal import exploding_signal
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.rules.saturated_units import saturated_units
from lightning_bn.rules.unmatched_layers import unmatched_layers
from lightning_bn.rules.vanishing_gradient import Weight
from lightning_bn.rules.vanishing_signal import vanishing_signal
from lightning_bn.rules.variance_below_epsilon import variance_below_epsilon
from lightning_bn.stats.moments import Summary
from lightning_bn.stats.units import Kind
from lightning_bn.taps import COMPILED, Choice


def of_choice(choice: Choice, *, compiled: bool = False, reason: str = "") -> Iterator[Finding]:
    """Say which of the chosen layers there are not, and which cannot be seen.

    Args:
        choice: what was chosen.
        compiled: whether the whole LightningModule went through ``torch.compile``, so that none can be seen.
        reason: why what is compiled cannot be run eagerly either.
    """
    for glob, nearest in choice.unmatched.items():
        yield unmatched_layers(glob, nearest)
    unseen = {"": COMPILED} if compiled else choice.unseen
    for name, why in unseen.items():
        hidden = why == COMPILED
        told, how = (f"{why}, and {reason}", "fit once without torch.compile") if hidden else (why, "")
        yield not_watched(name or "the model", told, how, layer=name or None)


def of_units(
    closed: Mapping[str, Window],
    kinds: Mapping[str, tuple[Kind, int]],
    *,
    inner: Collection[str],
    direct: Collection[str],
) -> Iterator[Finding]:
    """Judge the windows that are long enough.

    Args:
        closed: window by layer.
        kinds: kind of each activation, with the axis of its channels.
        inner: modules that do not end a network.
        direct: activations whose output a layer takes as it is.
    """
    for name, window in closed.items():
        kind, _ = kinds[name]
        dead, shut = window.first or (None, None)
        if kind.bounded:
            last, share = name not in inner, 1 - window.passing
            counts = (window.rare, window.units, window.samples)
            finding = saturated_units(name, kind.name, share, *counts, shut, last=last, direct=name in direct)
        else:
            finding = dead_units(name, window.dead, window.units, window.samples, dead)
        if finding is not None:
            yield finding


def of_signal(
    stds: Mapping[str, float], varied: Mapping[str, float], first: Mapping[str, float] | None
) -> Iterator[Finding]:
    """Judge the signal over depth.

    Args:
        stds: standard deviation of the output of each layer with weights, in the order in which they ran.
        varied: the same over samples alone; empty where it was not measured.
        first: ``stds`` of the first measured step; None if this is it, empty where it is not known.
    """
    found = vanishing_signal(stds, {name: varied[name] for name in stds if name in varied} or None)
    for finding in (found, exploding_signal(stds, first)):
        if finding is not None:
            yield finding


def of_batchnorm(
    layers: Mapping[str, nn.Module],
    variances: Mapping[str, float],
    dropouts: Mapping[str, tuple[str, float]],
    step: int,
) -> Iterator[Finding]:
    """Judge what BatchNorm layers are fed.

    Args:
        layers: module by name.
        variances: median batch variance of the input, by layer.
        dropouts: by layer the dropout, and its rate, in front of it.
        step: optimizer steps taken before.
    """
    for name, variance in variances.items():
        layer = layers[name]
        finding = (
            variance_below_epsilon(name, variance, layer.eps, step=step) if isinstance(layer, _BatchNorm) else None
        )
        if finding is not None:
            yield finding
    for name, (dropout, rate) in dropouts.items():
        found = dropout_before_batchnorm(name, dropout, rate)
        if found is not None:
            yield found


def overview(
    statistics: Mapping[str, Summary],
    units: Mapping[str, Window],
    weights: Mapping[str, Weight],
    ranks: Mapping[str, float],
    gradients: Mapping[str, Summary],
) -> dict[str, float]:
    """Overview scalars of the last due step.

    Args:
        statistics: summary by layer.
        units: last window by activation layer.
        weights: what the step did, by parameter; empty where that is not measured.
        ranks: effective rank by layer; likewise.
        gradients: summary of the gradient with respect to each layer's output; likewise.
    """
    dead = (window.dead / window.units for window in units.values() if not window.bounded)
    saturated = (1 - window.passing for window in units.values() if window.bounded)
    updates = update_overview(ratios(weights))
    more = {**rank_overview(ranks), **gradient_overview(gradients)}
    return {**activation_overview(statistics), **unit_overview(dead, saturated), **updates, **more}
