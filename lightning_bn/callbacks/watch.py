# SPDX-License-Identifier: Apache-2.0
"""Look at every step's loss, gradients and running statistics at a cost that nobody notices."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bn.norms import find_batchnorm
from lightning_bn.stats.finite import census, read

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

SMALL = 1 << 17
"""Number of values up to which gradients are looked at in one piece."""


class LossReader:
    """Bring the loss of each step to the host, on a GPU without waiting for what is queued behind it.

    On a GPU the number is copied to page-locked memory in the same stream, with an event behind the copy. Reading it
    once backward has been queued waits for the forward pass alone, while the device goes on.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._event: Any = None
        self._locked: Tensor | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a number was sent off and not read."""
        return self._value is not None

    def send(self, loss: Tensor) -> None:
        """Send a loss to the host; of one with several elements, their sum."""
        value = loss.detach()
        value = value if value.numel() == 1 else value.sum()
        if value.device.type == "cuda":
            if self._locked is None:
                self._locked = torch.empty((), dtype=torch.float64, pin_memory=True)
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._locked.copy_(value.reshape(()), non_blocking=True)
            self._event.record(torch.cuda.current_stream(value.device))
            value = self._locked
        self._value = value

    def read(self) -> float:
        """The number that was sent off."""
        value, self._value = self._value, None
        if value is None:
            raise RuntimeError("read needs a loss that was sent off")
        if value is self._locked:
            self._event.synchronize()
        return float(value.item())


def are_bad(tensors: Sequence[Tensor]) -> bool:
    """Whether any of many tensors holds NaN or infinity; on a GPU it waits once where all is well.

    The fused 2-norm takes NaN and infinity along, and overflows on large finite values: what it suspects is
    confirmed value by value.

    Args:
        tensors: floating-point or complex tensors, such as all gradients; others are passed over.
    """
    if all(type(x) is Tensor for x in tensors):
        try:
            finite = _norms_are_finite(list(tensors))
        except (RuntimeError, NotImplementedError):  # sparse ones, integers, several devices
            finite = False
        if finite:
            return False
    norms = [torch.stack(torch._foreach_norm(group)) for group in _groups(tensors)]  # noqa: SLF001  (no public name)
    if all(math.isfinite(norm.sum().item()) for norm in norms):
        return False
    return any(not bool(torch.isfinite(_local(x)).all()) for x in tensors)


def _norms_are_finite(tensors: list[Tensor]) -> bool:
    if not tensors:
        return True
    if sum(map(Tensor.numel, tensors)) <= SMALL:  # one copy of all costs less than one norm of each
        return cmath.isfinite(torch._C._nn.flatten_dense_tensors(tensors).sum().item())  # noqa: SLF001  (no public name)
    norms = torch._foreach_norm(tensors)  # noqa: SLF001  (the same)
    if tensors[0].device.type == "cpu":  # where reading a number costs less than adding two up
        return all(math.isfinite(norm.item()) for norm in norms)
    return math.isfinite(torch.stack(norms).sum().item())


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that an optimizer is about to use."""
    return [x.grad for group in optimizer.param_groups for x in group["params"] if x.grad is not None]


def gradients_in(pl_module: LightningModule) -> list[Tensor]:
    """All gradients that a model has."""
    return [x.grad for x in pl_module.parameters() if x.grad is not None]


def statistics_in(pl_module: LightningModule) -> list[Tensor]:
    """Running means and variances of all BatchNorm layers."""
    both = ((layer.running_mean, layer.running_var) for layer in find_batchnorm(pl_module).values())
    return [x for pair in both for x in pair if x is not None and x.numel()]


def has_scaler(trainer: Trainer) -> bool:
    """Whether losses are scaled for fp16, so that a step whose gradients overflow is skipped and that is normal."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def scale_is_spent(trainer: Trainer) -> bool:
    """Whether a gradient scaler has come below 1, where bad gradients are not the scale's doing; reads the host."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() < 1


def unscaled(trainer: Trainer, loss: Tensor) -> Tensor:
    """The loss without the factor of the gradient scaler, which Lightning multiplies it by before backward.

    The factor is read on its device, from the attribute that ``GradScaler`` keeps it in; without it the loss stays.
    """
    scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
    return loss.detach() / scale.to(loss.device) if isinstance(scale, Tensor) else loss.detach()


def learning_rates(trainer: Trainer) -> list[float]:
    """The distinct learning rates of all parameter groups, largest first."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return sorted({float(group["lr"]) for group in groups if "lr" in group}, reverse=True)


def largest_weight(pl_module: LightningModule) -> float | None:
    """Largest finite absolute value of all parameters; reads the host. None where there are none to look at."""
    found = read([census(x) for x in pl_module.parameters() if _is_dense(x)])
    return max((row.largest for row in found), default=None)


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """What one fused call can take: dense tensors of one device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in tensors:
        if _is_dense(x) and x.numel():
            by_device.setdefault(x.device, []).append(_local(x))
        elif x.layout == torch.sparse_coo:
            by_device.setdefault(x.device, []).append(x._values())  # noqa: SLF001  (values() needs it coalesced)
    yield from by_device.values()


def _is_dense(x: Tensor) -> bool:
    dense = x.layout == torch.strided and (x.is_floating_point() or x.is_complex())
    return dense and not torch.nn.parameter.is_lazy(x) and not x.is_meta


def _local(x: Tensor) -> Tensor:
    if x.layout == torch.sparse_coo:
        return x._values()  # noqa: SLF001  (the same)
    return x.to_local() if hasattr(x, "to_local") else x
