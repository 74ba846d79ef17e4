# SPDX-License-Identifier: Apache-2.0
"""What the order of the modules tells: which axis counts channels, and which activations lie inside the network."""

from __future__ import annotations

from torch import nn

from lightning_bn.taps import plain_name

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,  # noqa: SLF001  (torch has no public base class of convolutions)
    nn.modules.batchnorm._NormBase,  # noqa: SLF001  (nor of BatchNorm and InstanceNorm)
    nn.GroupNorm,
)


def channel_axes(model: nn.Module) -> dict[nn.Module, int]:
    """For each module the axis of its output that counts channels, by the module with weights in front of it.

    Behind convolutions and BatchNorm it is 1, behind everything else with weights (linear layers, LayerNorm, attention,
    recurrent layers) the last one. Only the order of the modules is used.

    Args:
        model: the network.

    Returns:
        1 or -1 by module; 1 where no module with weights comes before it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Conv1d(1, 1, 1), nn.ReLU())
        >>> [axis for module, axis in channel_axes(net).items() if isinstance(module, nn.ReLU)]
        [-1, 1]
    """
    axes, axis = {}, 1
    for module in model.modules():
        if _has_weights(module, recurse=False):
            first = isinstance(module, (*_CHANNELS_FIRST, nn.PReLU))
            axis = axis if isinstance(module, nn.PReLU) else 1 if first else -1
        axes[module] = axis
    return axes


def inner_modules(model: nn.Module) -> frozenset[str]:
    """Names of the modules that some module with weights comes after, in the order of the modules.

    A child of the model that holds several modules and weights is a network of its own: what ends it, as tanh ends a
    generator, or sigmoid a classifier, is not among them.

    Args:
        model: the network.

    Returns:
        Names as ``named_modules`` gives them, without what ``torch.compile`` inserts.
    """
    inner: set[str] = set()
    for name, child in model.named_children():
        if next(child.children(), None) is not None and _has_weights(child):
            inner |= {f"{name}.{below}" for below in _followed(child)}
    alone = {name for name, child in model.named_children() if next(child.children(), None) is None}
    inner |= _followed(model) & alone
    return frozenset(plain_name(name) for name in inner)


def _followed(model: nn.Module) -> set[str]:
    names: list[str] = []
    followed: set[str] = set()
    for path, module in model.named_modules():
        if _has_weights(module, recurse=False):
            followed.update(names)
        names.append(path)
    return followed


def _has_weights(module: nn.Module, *, recurse: bool = True) -> bool:
    return next(module.parameters(recurse=recurse), None) is not None
