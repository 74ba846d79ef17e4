# SPDX-License-Identifier: Apache-2.0
"""The weights of the best validation, kept on the host, and put in place of the present ones for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_bn.norms import find_batchnorm


@dataclass(frozen=True)
class Weights:
    """Copies of all parameters and buffers of a model, on the host.

    Args:
        parameters: by name.
        buffers: by name, running statistics included.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """A copy of what a model holds now."""
        return cls(_copies(dict(model.named_parameters())), _copies(dict(model.named_buffers())))

    def fits(self, model: nn.Module) -> bool:
        """Whether a model still has these parameters, in these shapes, and whole on this process."""
        now = dict(model.named_parameters())
        return now.keys() == self.parameters.keys() and all(
            x.shape == self.parameters[name].shape and not hasattr(x, "to_local") for name, x in now.items()
        )

    @contextmanager
    def in_place(self, model: nn.Module, *, affine: bool, others: bool) -> Iterator[None]:
        """Let a model have these parameters while a ``with`` block lasts; afterwards the same memory is back.

        Args:
            model: the network.
            affine: whether γ and β of its BatchNorm layers are put in place.
            others: whether all other parameters are.
        """
        gammas = {
            id(x) for layer in find_batchnorm(model).values() for x in (layer.weight, layer.bias) if x is not None
        }
        homes: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name, x in model.named_parameters():
                if affine if id(x) in gammas else others:
                    homes.append((x, x.data))
                    x.data = self.parameters[name].to(x.device, copy=True)
            yield
        finally:
            for x, home in homes:
                x.data = home

    def write_buffers(self, model: nn.Module) -> None:
        """Write the buffers; to be called in a quarantine, which puts the present ones back."""
        with torch.no_grad():
            for name, x in model.named_buffers():
                if name in self.buffers and self.buffers[name].shape == x.shape:
                    x.copy_(self.buffers[name])

    def state_dict(self) -> dict[str, Any]:
        """Plain types and CPU tensors."""
        return {"parameters": dict(self.parameters), "buffers": dict(self.buffers)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Weights:
        """What :meth:`state_dict` gave."""
        return cls(dict(state["parameters"]), dict(state["buffers"]))


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """Σ|x| of each tensor, on the host: by this weights are known again. Reads the host."""
    numbers = (x.detach() for x in tensors if not is_lazy(x) and (x.is_floating_point() or x.is_complex()))
    sums = [(x.abs() if x.is_complex() else x.float().abs()).sum().float() for x in numbers]
    return torch.stack([x.to(sums[0].device) for x in sums]).cpu() if sums else torch.zeros(0)


def is_same(here: Tensor, there: Tensor) -> bool:
    """Whether two fingerprints are of the same weights, but for the last digits; NaN is like NaN."""
    return here.shape == there.shape and bool(torch.isclose(here, there, rtol=1e-6, atol=0.0, equal_nan=True).all())


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items() if not is_lazy(x)}
