# SPDX-License-Identifier: Apache-2.0
"""What the BatchNorm layers of a model and the attributes of its loaders say before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler

from lightning_bn.norms import find_batchnorm
from lightning_bn.taps import plain_name, tensors_in


@dataclass(frozen=True)
class Loader:
    """What the attributes of one loader say of the batches of this process.

    Args:
        batch_size: samples in a batch; None where no attribute says so.
        last: samples in the smallest batch of an epoch, which is its last; None where that is not known.
        dataset: samples in the data set, over all processes; None where it has no length.
    """

    batch_size: int | None = None
    last: int | None = None
    dataset: int | None = None


@dataclass(frozen=True)
class Run:
    """What is known of a fit that is about to take its first step.

    Args:
        loaders: the training loaders; with several, which of them feeds which layer is not known.
        shapes: shapes of the tensors in the first batch of this process.
        processes: number of processes that see different samples.
        batches: batches that the fit will train on; infinite if unknown.
        steps: optimizer steps likewise.
    """

    loaders: tuple[Loader, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    processes: int = 1
    batches: float = math.inf
    steps: float = math.inf

    @property
    def batch_size(self) -> int | None:
        """Samples in a batch of this process, from the first batch where the loader does not say; None if unknown."""
        if len(self.loaders) != 1:
            return None
        rows = {shape[0] for shape in self.shapes}
        return self.loaders[0].batch_size or (rows.pop() if len(rows) == 1 else None)

    @property
    def by_row(self) -> tuple[tuple[int, ...], ...]:
        """The shapes whose first axis has the length of the batch."""
        return tuple(shape for shape in self.shapes if shape[0] == self.batch_size)


@dataclass(frozen=True)
class Norm:
    """One BatchNorm layer before the first step.

    Args:
        name: module path.
        training: whether it is in training mode.
        tracks: whether training updates its running statistics.
        stored: whether it has running statistics.
        momentum: weight of the newest batch in them; None for a cumulative average.
        fresh: whether they are still mean 0 and variance 1; None where they cannot be read.
        learns: whether γ or β is trained.
        amid_learning: whether its module, or the one around it, has a parameter that is trained.
        zero_gamma: whether all of γ is 0; None where it cannot be read, or where the layer has a forward of its own.
        zero_beta: the same for β.
        synchronised: whether its batch statistics are those of all processes.
        lazy: whether it has no parameters before its first batch.
    """

    name: str
    training: bool = True
    tracks: bool = True
    stored: bool = True
    momentum: float | None = 0.1
    fresh: bool | None = True
    learns: bool = True
    amid_learning: bool = True
    zero_gamma: bool | None = False
    zero_beta: bool | None = True
    synchronised: bool = False
    lazy: bool = False

    @property
    def by_batch(self) -> bool:
        """Whether it normalises by the statistics of the batch in a training step."""
        return self.training or not self.stored

    @property
    def updates(self) -> bool:
        """Whether a training step moves its running statistics."""
        return self.training and self.stored and self.tracks and self.momentum != 0


def loaders_in(value: Any) -> list[Any]:
    """Every loader of a nested collection of loaders; one that is no collection is a loader."""
    return [leaf for leaf in tree_leaves(value) if leaf is not None]


def loader_facts(loader: Any, batches: float = math.inf) -> Loader:
    """Read the attributes of a loader; it is not iterated, and nothing is taken from its data set or samplers.

    The size of the last batch is known where batches are formed as ``torch.utils.data.BatchSampler`` does it, from
    a sampler of known length. A data set or sampler without a length, an ``IterableDataset``, a batch sampler of
    one's own and a loader without ``batch_size`` leave None.

    Args:
        loader: any object that Lightning takes for a loader.
        batches: number of batches that an epoch is cut to.

    Returns:
        The facts.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader_facts(DataLoader(range(65), batch_size=16))
        Loader(batch_size=16, last=1, dataset=65)
    """
    sampler = _read(loader, "batch_sampler")
    size = _whole(_read(loader, "batch_size")) or _whole(_read(sampler, "batch_size"))
    dataset = _length(_read(loader, "dataset"))
    usual = isinstance(sampler, BatchSampler) and type(sampler).__iter__ is BatchSampler.__iter__
    samples = _length(_read(sampler, "sampler")) if usual else None
    if size is None or not samples:
        return Loader(size, None, dataset)
    whole, rest = divmod(samples, size)
    if rest and not _read(sampler, "drop_last") and batches > whole:
        return Loader(size if whole else rest, rest, dataset)
    return Loader(size, size, dataset)


def shapes_in(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of all tensors in a batch that have a first axis; their values are not looked at."""
    return tuple(tuple(x.shape) for _, x in tensors_in(batch) if x.dim())


def planned(batches: float, max_epochs: int | None, max_steps: int, accumulate: int) -> float:
    """Batches that a whole fit will train on, as far as the trainer's limits tell.

    Args:
        batches: batches of an epoch; infinite where the loader has no length.
        max_epochs: as the trainer has it; None and -1 are no limit.
        max_steps: likewise; -1 is no limit.
        accumulate: batches for each optimizer step.

    Returns:
        The number; infinite where there is no limit.
    """
    by_epochs = math.inf if max_epochs is None or max_epochs < 0 else batches * max_epochs
    return min(by_epochs, math.inf if max_steps < 0 else max_steps * accumulate)


def norms_of(model: nn.Module, held: set[int] | None = None) -> list[Norm]:
    """The BatchNorm layers of a model as they are now, in order; reads a few flags from the device.

    Args:
        model: the network.
        held: ids of the parameters that an optimizer holds; None takes ``requires_grad`` alone.
    """
    layers = find_batchnorm(model)
    around: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        for child in module.children():
            around.setdefault(child, module)

    def learns(module: nn.Module, *, recurse: bool) -> bool:
        own = (x for x in module.parameters(recurse=recurse) if x.requires_grad)
        return any(held is None or id(x) in held for x in own)

    asked = {(name, part): flag for name, layer in layers.items() for part, flag in _flags(layer)}
    said = dict(zip(asked, _on_host(list(asked.values())), strict=True))
    return [
        Norm(
            name,
            training=layer.training,
            tracks=layer.track_running_stats,
            stored=layer.running_mean is not None and layer.running_var is not None,
            momentum=layer.momentum,
            fresh=said.get((name, "fresh")),
            learns=learns(layer, recurse=False),
            amid_learning=learns(around.get(layer, layer), recurse=True),
            zero_gamma=said.get((name, "gamma")),
            zero_beta=said.get((name, "beta")),
            synchronised=isinstance(layer, nn.SyncBatchNorm),
            lazy=any(map(is_lazy, [*layer.parameters(recurse=False), *layer.buffers(recurse=False)])),
        )
        for name, layer in layers.items()
    ]


def scripted_norms(model: nn.Module) -> list[str]:
    """Paths of the ScriptModules of a model that are BatchNorm layers: nothing in them can be read as in others."""
    return [
        plain_name(path)
        for path, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in str(module.original_name)
    ]


def _flags(layer: _BatchNorm) -> Iterator[tuple[str, Tensor]]:
    """What is asked of the values of a layer, as tensors of one bool that stay on their device."""
    computes_as_torch = type(layer).forward.__module__.startswith("torch.nn.modules.")
    asked: dict[str, tuple[tuple[Tensor | None, int], ...]] = {
        "fresh": ((layer.running_mean, 0), (layer.running_var, 1))
    }
    asked |= {"gamma": ((layer.weight, 0),), "beta": ((layer.bias, 0),)} if computes_as_torch else {}
    for part, pairs in asked.items():
        same = [torch.eq(here, value).all() for x, value in pairs if (here := _local(x)) is not None]
        if len(same) == len(pairs):
            yield part, torch.stack(same).all()


def _local(x: Tensor | None) -> Tensor | None:
    """What this process holds of a tensor; None where that is nothing."""
    if x is None or is_lazy(x) or x.is_meta:
        return None
    here: Tensor = (x.to_local() if hasattr(x, "to_local") else x).detach()
    return here if here.numel() else None


def _on_host(flags: list[Tensor]) -> list[bool]:
    return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []


def _read(owner: Any, name: str) -> Any:
    """An attribute, None where there is none: what stands behind a name may be the user's own code."""
    try:
        return getattr(owner, name, None)
    except Exception:  # noqa: BLE001  (whatever it raises, it says nothing)
        return None


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except Exception:  # noqa: BLE001  (an object without a length, or one that cannot tell it)
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
