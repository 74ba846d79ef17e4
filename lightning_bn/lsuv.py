# SPDX-License-Identifier: Apache-2.0
"""Layer-sequential unit variance: scale each layer's weight so that its output has variance 1 on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def unit_variance(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, float]:
    """Find the factors that give each layer's output variance 1, in one run of the model.

    Mishkin & Matas 2016, alg. 1, repeats the forward pass until the variance is near 1. A linear layer's output
    without its bias is proportional to its weight, so that one division is exact: each output is divided as it
    passes by, and the layers behind it see what they will see with the scaled weights. Weights are not changed.

    Args:
        layers: linear and convolution layers by path; those that share a weight share its factor.
        run: runs the model on a batch.

    Returns:
        Factor by path, for the layers that ran; NaN where the output is constant, empty or not finite, and passes by
        unchanged. Variance is the biased one over all elements of the output without the bias, computed in float32.
        Read on the host once, at the end.
    """
    factors: dict[int, Tensor] = {}
    heard: dict[str, int] = {}

    def hook(name: str) -> Callable[..., Tensor]:
        def scale(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG001  (signature of a forward hook)
            bias = _bias_of(module, output)
            product = output if bias is None else output - bias
            which = id(module.weight)
            factors.setdefault(which, _inverse_std(product))
            heard[name] = which
            scaled = product * factors[which].nan_to_num(1.0).to(output.dtype)
            return scaled if bias is None else scaled + bias

        return scale

    with ExitStack() as handles:
        for name, layer in layers.items():
            handles.callback(layer.register_forward_hook(hook(name)).remove)
        run()
    values = torch.stack(list(factors.values())).tolist() if factors else []
    known = dict(zip(factors, values, strict=True))
    return {name: known[which] for name, which in heard.items()}


def _inverse_std(x: Tensor) -> Tensor:
    with torch.no_grad():
        variance = x.detach().float().var(correction=0) if x.numel() else x.new_zeros((), dtype=torch.float32)
        usable = torch.isfinite(variance) & (variance > 0)
        return torch.where(usable, variance, torch.nan).rsqrt()


def _bias_of(module: nn.Module, output: Tensor) -> Tensor | None:
    bias = getattr(module, "bias", None)
    if bias is None:
        return None
    spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
    shaped: Tensor = bias.view(-1, *[1] * spatial)
    return shaped.to(output.dtype)
