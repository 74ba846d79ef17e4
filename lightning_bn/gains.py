# SPDX-License-Identifier: Apache-2.0
"""The nonlinearity behind each layer, and the gain that keeps the size of the signal through it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.parameter import is_lazy

from lightning_bn.layers import NORMS, holds_weights
from lightning_bn.taps import is_below, plain_name

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "mish": F.mish,
    "relu6": F.relu6,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
}
GAIN_ONE = ("linear", "sigmoid", "hardsigmoid", "softmax", "selu")
KNOWN = (*GAIN_ONE, "relu", "leaky_relu", "tanh")
NONLINEARITIES: tuple[str, ...] = (*KNOWN, *FUNCTIONS)
"""The names that an argument ``nonlinearity`` may have."""

_SOFTMAX = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
_NOT_ELEMENTWISE = (*_SOFTMAX, nn.GLU, nn.MultiheadAttention)
_PASSES = ("dropout", "pooling", "padding", "flatten", "upsampling", "pixelshuffle", "channelshuffle", "fold", "loss")


@dataclass(frozen=True)
class Follower:
    """What a layer's output goes through next.

    Args:
        nonlinearity: its name; ``linear`` where it is known that there is none.
        gain: factor that keeps the signal's size through it.
    """

    nonlinearity: str
    gain: float


LINEAR = Follower("linear", 1.0)


def gain(nonlinearity: str, slope: float = 0.01) -> float:
    """Factor of the weights' standard deviation that keeps the signal's size through a nonlinearity.

    torch's recommendations where there is one: 1 for none and for sigmoids, 5/3 for tanh, √2 for ReLU,
    √(2 / (1 + slope²)) for leaky ReLU (He et al. 2015, eq. 15). For SELU 1, so that the weights have variance
    1 / fan_in (Klambauer et al. 2017, sec. 3). For all others 1/√E[f(z)²] with z ~ N(0, 1), the argument of
    He et al. 2015, eq. 7, which gives √2 for ReLU.

    Args:
        nonlinearity: one of ``NONLINEARITIES``.
        slope: slope of ``leaky_relu`` below 0.

    Raises:
        ValueError: for any other name.

    Example:
        >>> round(gain("relu"), 4), round(gain("gelu"), 4), gain("linear")
        (1.4142, 1.5335, 1.0)
    """
    if nonlinearity in GAIN_ONE:
        return 1.0
    if nonlinearity in FUNCTIONS:
        return _measured_gain(FUNCTIONS[nonlinearity])
    if nonlinearity not in KNOWN:
        raise ValueError(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
    return float(nn.init.calculate_gain(nonlinearity, slope if nonlinearity == "leaky_relu" else None))  # type: ignore[arg-type]


def follower_of(module: nn.Module) -> Follower | None:
    """What an activation module is as a follower; None for a module that is no activation of torch.

    Example:
        >>> follower_of(nn.LeakyReLU(1.0)).gain, follower_of(nn.Flatten())
        (1.0, None)
    """
    slope = _slope(module)
    if slope is not None:
        return Follower("leaky_relu", gain("leaky_relu", slope))
    if isinstance(module, _SOFTMAX):
        return Follower("softmax", 1.0)
    if type(module).__module__ != activation.__name__ or isinstance(module, _NOT_ELEMENTWISE):
        return None
    name = type(module).__name__.lower()
    return Follower(name, gain(name) if name in KNOWN else _measured_gain(module.forward))


def followers(model: nn.Module) -> dict[str, Follower | None]:
    """The activation behind each layer that holds weights, as far as the order of the modules tells.

    Norms, dropout, pooling and reshaping are passed over. Where another layer with weights, or the end of the model,
    comes before an activation module, what follows is unknown: code may call a function there.

    Args:
        model: the network.

    Returns:
        Follower by module path; None where it is unknown. A layer in several places has the follower of the first.

    Example:
        >>> found = followers(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Tanh(), nn.Linear(1, 1)))
        >>> [follower and follower.nonlinearity for follower in found.values()]
        ['tanh', None]
    """
    modules = {plain_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    order = list(leaves(modules))
    found: dict[str, Follower | None] = {}
    seen: set[int] = set()
    for place, path in enumerate(order):
        if holds_weights(modules[path]) and id(modules[path]) not in seen:
            seen.add(id(modules[path]))
            behind = (modules[later] for later in order[place + 1 :])
            found[path] = follower_of(next((module for module in behind if not _is_passed(module)), nn.Identity()))
    for path, module in modules.items():
        found |= {f"{path}.{name}" if path else name: known for name, known in _inside_composite(module)}
    return found


def leaves(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths of the modules that are looked at as a whole, in order: layers with weights, and what has no children."""
    whole = ""
    for path, module in modules.items():
        if whole and is_below(path, whole):
            continue
        if holds_weights(module) or next(module.children(), None) is None:
            whole = path
            yield path


def _is_passed(module: nn.Module) -> bool:
    """Whether the signal keeps its shape of distribution, near enough, on its way through a module."""
    home = type(module).__module__
    if isinstance(module, (*NORMS, nn.Identity)) or home.startswith("torchmetrics."):
        return True
    return any(home == f"torch.nn.modules.{kind}" for kind in _PASSES)


def _slope(module: nn.Module) -> float | None:
    if isinstance(module, nn.LeakyReLU):
        return float(module.negative_slope)
    if isinstance(module, nn.RReLU):
        return (module.lower + module.upper) / 2
    if isinstance(module, nn.PReLU):
        readable = not (is_lazy(module.weight) or module.weight.is_meta)
        return float(module.weight.detach().float().mean()) if readable else 0.25
    return None


def _inside_composite(module: nn.Module) -> Iterator[tuple[str, Follower]]:
    """Followers inside torch's own composites, whose forward is known."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        between = module.activation
        name = getattr(between, "__name__", "")
        known = follower_of(between) if isinstance(between, nn.Module) else None
        if known is None and name in NONLINEARITIES:
            known = Follower(name, gain(name))
        if known is not None:
            yield "linear1", known
        yield "linear2", LINEAR


@functools.cache
def _grid() -> tuple[Tensor, Tensor]:
    z = torch.linspace(-12.0, 12.0, 24001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return z, density * (z[1] - z[0])


def _measured_gain(function: Callable[[Tensor], Tensor]) -> float:
    z, weight = _grid()
    with torch.no_grad():
        second_moment = float((function(z.clone()).square() * weight).sum())
    return 1 / math.sqrt(second_moment) if second_moment > 0 and math.isfinite(second_moment) else 1.0
