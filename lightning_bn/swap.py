# SPDX-License-Identifier: Apache-2.0
"""Put another normalisation in the place of BatchNorm, with the same γ and β."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_bn.norms import find_batchnorm
from lightning_bn.taps import plain_name

VECTORS, MAPS = 16, 2
"""Fewest channels in a group: of inputs that may be vectors, one value a channel; and of feature maps."""


class InstanceNorm(nn.Module):
    """Normalises each channel of each sample over its positions, whatever the number of axes.

    Args:
        name: what to call the layer where it cannot be.
        channels: number of channels C.
        eps: ε.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, name: str, channels: int, eps: float) -> None:
        super().__init__()
        self.name, self.num_features, self.eps = name, channels, eps
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, *)``; same shape and dtype.

        Raises:
            ValueError: where a channel has a single value, as all channels of ``(N, C)`` have.
        """
        if x.shape[2:].numel() < 2:  # noqa: PLR2004  (of a single value nothing would be left)
            need = "instance norm needs inputs (N, C, *) with more than one value per channel"
            raise ValueError(f"{self.name}: {need}, got {tuple(x.shape)}; swap this layer to 'group' or 'layer'")
        return nn.functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


class FrozenBatchNorm(nn.Module):
    """Normalises by running statistics that nothing changes, in training mode too: BatchNorm as in eval mode.

    It is no ``_BatchNorm``, so that neither ``model.train()`` nor a conversion to SyncBatchNorm makes one of it. Its
    state has the names of BatchNorm's: checkpoints fit in both directions.

    Args:
        layer: the layer whose statistics, ε, γ and β it takes; the same tensors.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.num_features, self.eps = layer.num_features, layer.eps
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, *)``; same shape and dtype."""
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


def swap_batchnorm(
    model: nn.Module,
    to: Literal["group", "layer", "instance", "frozen"] = "group",
    *,
    layers: Sequence[str] | None = None,
    groups: int = 32,
    fewest: int | None = None,
    train_affine: bool = True,
) -> dict[str, nn.Module]:
    """Replace BatchNorm layers of a model, in place, by a normalisation that does not look at the batch.

    γ and β stay the same ``Parameter`` objects, so that an optimizer that has them goes on with them. Everything else
    about the new layers is new: hooks are not carried over, and running statistics are dropped (but by ``frozen``),
    so that a checkpoint of the old model has keys too many. A layer in several places has one replacement in all of
    them. All layers are looked at before the first is replaced: on an error the model is as it was.

    Args:
        model: the network. But for ``frozen`` it computes something else afterwards, and has to be trained again.
        to: ``group``: GroupNorm (Wu & He 2018), ``layer``: GroupNorm with one group, which for ``(N, C, *)`` is
            LayerNorm over all but N with γ and β per channel; ``instance``: each channel of each sample by itself;
            ``frozen``: running statistics in training too.
        layers: shell patterns on module paths; None for all BatchNorm layers.
        groups: most groups of ``group``. It gets the largest divisor of C that is not above it and leaves at least
            ``fewest`` channels in a group; 1 where there is none.
        fewest: see ``groups``; None is 2 for ``BatchNorm2d`` and ``BatchNorm3d``, and 16 for all others, whose inputs
            may be vectors ``(N, C)``: a group of 2 values becomes ±1.
        train_affine: False freezes γ and β of ``frozen``.

    Returns:
        The new layers by module path; the first path of a layer in several places.

    Raises:
        ValueError: where an argument is out of its range, or a layer cannot be replaced: the model itself, a lazy one
            that has not seen data, one with a ``forward`` or submodules of its own, which the new one would lack, one
            without running statistics for ``frozen``, a vector of one channel for ``group`` and ``layer``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
        >>> swap_batchnorm(net)["1"].num_groups
        32
    """
    _check(to, groups, fewest, train_affine=train_affine)
    chosen = _choose(model, layers)
    build = _BUILDERS[to]
    fresh: dict[_BatchNorm, nn.Module] = {}
    for name, layer in chosen.items():
        if refusal := _refuse(name, layer):
            raise ValueError(f"{name or 'the model'} cannot be swapped: {refusal}")
        fresh[layer] = build(name, layer, groups, fewest)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():  # noqa: SLF001  (named_children leaves out the second of the same)
            if isinstance(child, _BatchNorm) and child in fresh:
                parent._modules[key] = fresh[child]  # noqa: SLF001  (the same)
    for layer, new in fresh.items():
        _hand_over(layer, new, trainable=train_affine)
    return {name: fresh[layer] for name, layer in chosen.items()}


def group_count(channels: int, groups: int, fewest: int) -> int:
    """The largest divisor of ``channels`` up to ``groups`` that leaves ``fewest`` channels in a group; 1 without one.

    Example:
        >>> group_count(64, 32, 2), group_count(64, 32, 16), group_count(7, 32, 2)
        (32, 4, 1)
    """
    fitting = (g for g in range(groups, 1, -1) if channels % g == 0 and channels // g >= fewest)
    return next(fitting, 1)


def _check(to: object, groups: object, fewest: object, *, train_affine: bool) -> None:
    if to not in _BUILDERS:
        raise ValueError(f"to must be one of {', '.join(_BUILDERS)}, got {to!r}")
    for name, value in (("groups", groups), ("fewest", 1 if fewest is None else fewest)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not train_affine and to != "frozen":
        raise ValueError(f"train_affine must be True but for 'frozen', got {train_affine!r} for {to!r}")


def _choose(model: nn.Module, globs: Sequence[str] | None) -> dict[str, _BatchNorm]:
    """The layers that any of the patterns matches by any of their paths, under their first ones."""
    every = find_batchnorm(model)
    if globs is None:
        return every
    paths = {
        plain_name(path): m for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)
    }
    wanted: set[nn.Module] = set()
    for glob in [globs] if isinstance(globs, str) else globs:
        matched = {layer for path, layer in paths.items() if fnmatchcase(path, glob)}
        if not matched:
            nearest = ", ".join(get_close_matches(glob, paths, n=3, cutoff=0.0))
            raise ValueError(f"layers needs patterns that match BatchNorm layers (nearest: {nearest}), got {glob!r}")
        wanted |= matched
    return {name: layer for name, layer in every.items() if layer in wanted}


def _refuse(name: str, layer: _BatchNorm) -> str:
    """Why a layer cannot be replaced; empty where it can."""
    if not name:
        return "it is a BatchNorm layer itself, which nothing holds"
    if isinstance(layer, LazyModuleMixin):  # another class as soon as it has seen data
        return "it is lazy and has not seen data yet; run the model on a batch first"
    if next(layer.children(), None) is not None or not _is_plain(layer):
        return f"its class {type(layer).__name__} does more than normalise, which would be lost; leave it out by layers"
    return ""


def _is_plain(layer: _BatchNorm) -> bool:
    """Whether the forward is one of torch's own."""
    return type(layer).forward in {_BatchNorm.forward, nn.SyncBatchNorm.forward}


def _is_map(layer: _BatchNorm) -> bool:
    """Whether inputs have positions for certain."""
    return isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d)


def _group(name: str, layer: _BatchNorm, groups: int, fewest: int | None) -> nn.Module:
    if layer.num_features == 1 and isinstance(layer, nn.BatchNorm1d):
        raise ValueError(f"{name} cannot be swapped: it has one channel, and of a single value nothing would be left")
    least = fewest or (MAPS if _is_map(layer) else VECTORS)
    return nn.GroupNorm(group_count(layer.num_features, groups, least), layer.num_features, layer.eps, affine=False)


def _layer(name: str, layer: _BatchNorm, groups: int, fewest: int | None) -> nn.Module:  # noqa: ARG001  (as the others)
    return _group(name, layer, 1, fewest)


def _instance(name: str, layer: _BatchNorm, groups: int, fewest: int | None) -> nn.Module:  # noqa: ARG001  (the same)
    return InstanceNorm(name, layer.num_features, layer.eps)


def _frozen(name: str, layer: _BatchNorm, groups: int, fewest: int | None) -> nn.Module:  # noqa: ARG001  (the same)
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{name} cannot be swapped: it has no running statistics to normalise by")
    return FrozenBatchNorm(layer)


_BUILDERS: dict[str, Callable[[str, _BatchNorm, int, int | None], nn.Module]] = {
    "group": _group,
    "layer": _layer,
    "instance": _instance,
    "frozen": _frozen,
}


def _hand_over(layer: _BatchNorm, new: nn.Module, *, trainable: bool) -> None:
    """Give the new layer γ and β, the very objects, and the mode of the old one."""
    new.register_parameter("weight", layer.weight)
    new.register_parameter("bias", layer.bias)
    if isinstance(new, nn.GroupNorm):
        new.affine = layer.weight is not None
    if not trainable:
        new.requires_grad_(requires_grad=False)
    new.train(layer.training)
