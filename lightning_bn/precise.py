# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of what each BatchNorm layer gets, measured anew with fixed weights ("precise BN")."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.norms import find_batchnorm
from lightning_bn.quarantine import quarantine
from lightning_bn.stats.finite import is_measurable
from lightning_bn.stats.population import Distance, Population, distance, pool, population_of
from lightning_bn.taps import listen, tensors_in

NOT_CALLED = "it was not called"
NOT_FINITE = "a batch was not finite"
NOT_REAL = "its input is complex, sparse or nested"
FROZEN = "it is frozen (eval mode)"
SWITCHED_OFF = "its running statistics are switched off (track_running_stats=False)"

UNKNOWN = Population(0, torch.zeros(0), torch.zeros(0))
"""Of a layer whose input has no mean and variance of real numbers."""


@dataclass(frozen=True)
class Estimate:
    """Population statistics of the BatchNorm layers of a model.

    Args:
        layers: what each layer got, by module path, on the host.
        skipped: layers that there is no estimate of, with the reason.
        samples: how many samples were run, by the first axis of the first tensor of each batch.
    """

    layers: dict[str, Population] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    samples: int = 0

    def apply(self, model: nn.Module) -> tuple[str, ...]:
        """Write the estimate into the running statistics of a model, in place.

        ``running_var`` gets the unbiased variance, as ``F.batch_norm`` gives it one. ``num_batches_tracked`` stays.

        Args:
            model: the network that was estimated, or one with the same layers.

        Returns:
            The layers that were written. Those without running statistics are not, nor those whose dtype cannot hold
            the numbers.

        Raises:
            ValueError: where the model lacks a layer, or has another number of channels there; nothing is written.
        """
        fitting = self._fitting(model)
        with torch.no_grad():
            for layer, mean, var in fitting.values():
                cast("Tensor", layer.running_mean).copy_(mean)
                cast("Tensor", layer.running_var).copy_(var)
        return tuple(fitting)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[tuple[str, ...]]:
        """Let a model have the estimate while a ``with`` block lasts; afterwards the same buffers are back.

        Args:
            model: as in :meth:`apply`.

        Raises:
            ValueError: as in :meth:`apply`.
        """
        fitting = self._fitting(model)
        before = [(layer, layer.running_mean, layer.running_var) for layer, *_ in fitting.values()]
        try:
            for layer, mean, var in fitting.values():
                layer.running_mean, layer.running_var = mean, var
            yield tuple(fitting)
        finally:
            for layer, old_mean, old_var in before:
                layer.running_mean, layer.running_var = old_mean, old_var

    def distances(self, model: nn.Module) -> dict[str, Distance]:
        """How far the running statistics of each layer are from the estimate; reads the host."""
        layers = find_batchnorm(model)
        return {
            name: distance(mean.cpu(), var.cpu(), found, layers[name].eps)
            for name, found in self.layers.items()
            if (mean := layers[name].running_mean) is not None and (var := layers[name].running_var) is not None
        }

    def _fitting(self, model: nn.Module) -> dict[str, tuple[_BatchNorm, Tensor, Tensor]]:
        """The layers whose running statistics can hold the estimate, with the values that they would hold."""
        layers = find_batchnorm(model)
        fitting: dict[str, tuple[_BatchNorm, Tensor, Tensor]] = {}
        for name, found in self.layers.items():
            layer = layers.get(name)
            if layer is None or layer.num_features != len(found.mean):
                got = "none" if layer is None else f"{layer.num_features} channels"
                raise ValueError(f"model must have a BatchNorm layer {name!r} of {len(found.mean)} channels, got {got}")
            if layer.running_mean is not None and layer.running_var is not None:
                mean = found.mean.to(layer.running_mean, copy=True)
                var = found.unbiased_var.to(layer.running_var, copy=True)
                if bool((mean.isfinite() & var.isfinite()).all()):
                    fitting[name] = (layer, mean, var)
        return fitting


def precise_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    num_samples: int | None = 8192,
    dropout: bool = False,
    frozen: bool = False,
) -> Estimate:
    """Estimate mean and variance of the input of every BatchNorm layer, with the weights as they are.

    Running statistics are an average over steps whose weights are gone. Here all batches are run with the present
    weights, each layer normalises by its batch, and the moments of the batches are pooled: μ = E[μ_B] and
    σ² = E[μ_B² + σ_B²] − E[μ_B]² (Wu & Johnson 2021, arXiv 2105.07576), weighted by the number of values, in float64,
    by a formula that does not cancel. Nothing is written to the model: it is run in quarantine
    (:func:`~lightning_bn.quarantine.quarantine`), modes, buffers, momentum and random streams are as before, on an
    exception too. ``.apply(model)`` puts the estimate into the running statistics, ``with .applied(model):`` for a
    while.

    Args:
        model: the network; a layer that is used in several places has one estimate, of all its calls.
        batches: an iterable of batches, such as a DataLoader; no more is drawn from it than is run.
        forward: runs a batch; None calls the model with the batch, or with its first entry where it is a tuple or
            list, on the device of the model's first parameter.
        num_samples: stop when so many samples have been run, at least 1; None for all there are.
        dropout: False puts every other module in eval mode, which is how the statistics are used. True leaves a model
            that is in training mode as it is, and puts one that is not in training mode: what the running average
            was made of.
        frozen: whether layers are measured that stay in eval mode while the model trains, or whose running statistics
            are switched off by ``track_running_stats=False`` after the fact.

    Returns:
        The estimate. Layers that were never called, and those that got a batch with NaN or infinity, are skipped.

    Raises:
        ValueError: where an argument is out of its range, or lazy modules have not seen data yet.

    Example:
        >>> norm, x = nn.BatchNorm1d(1), torch.tensor([[0.0], [2.0], [4.0], [6.0]])
        >>> found = precise_statistics(norm, [x[:3], x[3:].repeat(2, 1)])
        >>> found.layers[""].mean
        tensor([3.6000], dtype=torch.float64)
        >>> found.apply(norm), norm.running_var
        (('',), tensor([6.8000]))
    """
    if num_samples is not None and (
        isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1
    ):
        raise ValueError(f"num_samples must be a whole number of at least 1, or None (all), got {num_samples!r}")
    if isinstance(batches, Tensor):
        raise ValueError("batches must be an iterable of batches, such as a list, got a tensor")  # noqa: TRY004  (as all)
    if not find_batchnorm(model):
        return Estimate()
    run = forward or _Plain(model)
    samples = 0
    with quarantine(model), torch.no_grad(), eagerly():
        chosen, skipped = choose_layers(model, frozen=frozen)
        set_modes(model, chosen, dropout=dropout)
        with measure(chosen) as sums:
            for batch in batches:
                run(batch)
                samples += length_of(batch)
                if num_samples is not None and samples >= num_samples:
                    break
    return conclude(chosen, sums, samples, skipped)


def choose_layers(model: nn.Module, *, frozen: bool = False) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """The layers to measure, and the others with the reason; may put the model in training mode to find out.

    A layer is frozen if it is in eval mode while the model trains. A model that is in eval mode as a whole does not
    tell; its own ``train()`` does, as that is where some models keep layers frozen.

    Args:
        model: the network, in a quarantine.
        frozen: choose frozen layers too.
    """
    if not model.training:
        model.train()
    layers = find_batchnorm(model)
    skipped: dict[str, str] = {}
    if not frozen:
        skipped |= {name: SWITCHED_OFF for name, layer in layers.items() if _is_switched_off(layer)}
        skipped |= {name: FROZEN for name, layer in layers.items() if not layer.training}
    return {name: layer for name, layer in layers.items() if name not in skipped}, skipped


def set_modes(model: nn.Module, chosen: Mapping[str, _BatchNorm], *, dropout: bool) -> None:
    """Let the chosen layers normalise by the batch; every other module is in eval mode, or left with ``dropout``."""
    if not dropout:
        model.eval()
    for layer in chosen.values():
        layer.train()


@contextmanager
def measure(layers: Mapping[str, _BatchNorm]) -> Iterator[dict[str, Population]]:
    """Pool what the given layers get in training mode, call by call, until the block is left.

    Args:
        layers: layer by name.

    Yields:
        A dictionary that fills up; what it holds is on the layers' devices, and NaN where a batch was not finite.
        Each rank of a SyncBatchNorm measures its own part of the batch. Nothing is read on the host.
    """
    sums: dict[str, Population] = {}

    def hear(name: str, module: nn.Module, inputs: Any) -> None:
        x = next((x for _, x in tensors_in(inputs)), None)
        known = sums.get(name)
        if not module.training or x is None or known is UNKNOWN:
            return
        if not is_measurable(x) or x.is_complex():
            sums[name] = UNKNOWN
        elif x.dim() > 1 and x.numel():
            found = population_of(x)
            sums[name] = found if known is None else pool(known, found)

    with listen(layers, lambda *_: None, hear):
        yield sums


def conclude(
    layers: Iterable[str], sums: Mapping[str, Population], samples: int, skipped: Mapping[str, str] | None = None
) -> Estimate:
    """Bring what was measured to the host and set aside what is no estimate.

    Args:
        layers: names of those that were to be measured.
        sums: what :func:`measure` gave, of one process or pooled over several.
        samples: how many samples were run.
        skipped: layers that were left out before, with the reason.
    """
    good, bad = {}, dict(skipped or {})
    for name in layers:
        found = sums.get(name)
        if found is None or not found.count:
            bad[name] = NOT_CALLED if found is None else NOT_REAL
        elif not found.is_finite:
            bad[name] = NOT_FINITE
        else:
            good[name] = found.cpu()
    return Estimate(good, bad, samples)


def length_of(batch: Any) -> int:
    """Samples in a batch: the first axis of its first tensor that has one; 1 without such a tensor."""
    return next((len(x) for _, x in tensors_in(batch) if x.dim()), 1)


def eagerly() -> AbstractContextManager[Any]:
    """Let compiled parts run uncompiled, where hooks are heard; without the compiler's import nothing is compiled."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # torch 2.6
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()


class _Plain:
    """Calls a model with a batch, or with the first entry of a tuple or list."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._device = next((x.device for x in model.parameters()), None)

    def __call__(self, batch: Any) -> Any:
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(x, Tensor):
            kind = type(x).__name__
            raise ValueError(f"forward must be given where a batch begins with no tensor, got {kind}")  # noqa: TRY004  (one kind)
        return self._model(x if self._device is None else x.to(self._device))


def _is_switched_off(layer: _BatchNorm) -> bool:
    """Whether running statistics are there, and training is not to change them."""
    return layer.running_mean is not None and not layer.track_running_stats
