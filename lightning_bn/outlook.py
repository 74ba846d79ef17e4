# SPDX-License-Identifier: Apache-2.0
"""What can be said of a start before it is trained: where the signal will overflow, and what loss to expect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

PEAK = 4.5
"""Largest absolute value in predicted root mean squares: 3.5 to 4.3 in the first two layers, 1.6 to 8 in layer 20
(64 digits, width 128, ten seeds). A factor of f in it moves a prediction by log f / log growth layers."""
MEAN = 1  # torch's code of reduction="mean"
BINARY = 2  # what an output decides between under binary cross-entropy
CASTS = ("ToCopyBackward0",)
VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
LIKELIHOODS = ("NllLossBackward0", "NllLoss2DBackward0")


@dataclass(frozen=True)
class Stage:
    """One layer on the way of the signal.

    Args:
        layer: module path.
        growth: factor by which the layer multiplies the root mean square of the signal.
        resets: whether the signal has root mean square 1 behind it, as behind a norm.
        is_norm: whether it computes a variance of what comes in.
    """

    layer: str
    growth: float
    resets: bool
    is_norm: bool = False


@dataclass(frozen=True)
class Prediction:
    """Where the signal is predicted to leave the range of a dtype.

    Args:
        layer: module path.
        place: its place among the layers that multiply, counted from 1.
        of: how many of them there are.
        log10_rms: decimal logarithm of the predicted root mean square there.
        growth: factor of that layer.
        dtype: the dtype whose range ends.
        kind: ``value``, or ``variance`` where only a norm's variance of the values overflows.
    """

    layer: str
    place: int
    of: int
    log10_rms: float
    growth: float
    dtype: torch.dtype
    kind: Literal["value", "variance"] = "value"


@dataclass(frozen=True)
class Start:
    """The loss of an untrained classifier beside that of equal probabilities.

    Args:
        loss: mean cross-entropy, a scalar on its device.
        classes: number of classes C; 2 for binary targets.
        expected: ln C, the loss of equal probabilities.
    """

    loss: Tensor
    classes: int
    expected: float


def predicted_overflow(
    stages: Sequence[Stage], dtype: torch.dtype, *, input_rms: float = 1.0, peak: float = PEAK
) -> Prediction | None:
    """The first layer whose output is predicted to leave the range of a dtype.

    From layer to layer the root mean square of the signal is multiplied by s·√(fan_in/2) behind a ReLU (He et al.
    2015, eq. 7); behind a norm it is 1. The largest of many values is ``peak`` times as large. A norm computes its
    variance in float32 at least, which overflows where the root mean square exceeds the root of float32's range:
    BatchNorm then puts out β, without any NaN. That is certain from there on; BatchNorm sums over N values for each
    channel, and on the CPU the sum overflows √N times earlier.

    Args:
        stages: the layers, in order.
        dtype: what activations are held in.
        input_rms: root mean square of the input, above 0; 1 for standardised data.
        peak: largest absolute value in units of the root mean square.

    Returns:
        The prediction; None where nothing overflows, or where a growth is NaN on the way.

    Example:
        >>> layers = [Stage(f"net.{k}", 1000 * 8.0, resets=False) for k in range(3)]
        >>> predicted_overflow(layers, torch.float16).layer, predicted_overflow(layers, torch.float32)
        ('net.1', None)
    """
    end = math.log10(torch.finfo(dtype).max / peak)
    square_end = math.log10(torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max) / 2
    multiplying = [stage for stage in stages if not stage.resets]
    rms, place, last = math.log10(input_rms), 0, None
    for stage in stages:
        if stage.is_norm and last is not None and rms > square_end:
            growth = last.growth
            return Prediction(stage.layer, place, len(multiplying), rms, growth, dtype, "variance")
        if stage.resets:
            rms, last = 0.0, None
            continue
        place, last = place + 1, stage
        rms += -math.inf if stage.growth == 0 else math.log10(stage.growth)
        if rms > end:
            return Prediction(stage.layer, place, len(multiplying), rms, stage.growth, dtype)
    return None


def cross_entropy_start(loss: Tensor, *, scale: float | None = None, constants: int = 1) -> Start | None:
    """Recognise a loss that is exactly a mean cross-entropy, by its autograd graph; nothing is read on the host.

    Recognised before the backward pass are ``F.cross_entropy``, ``nn.CrossEntropyLoss`` and ``log_softmax`` with
    ``nll_loss``, for class indices of any shape, and ``binary_cross_entropy_with_logits``; all with
    ``reduction="mean"``, under autocast too. Class weights and ``ignore_index`` are fine: torch divides by the sum
    of the weights, so that equal probabilities still give ln C. Weights of the binary loss are not. Saved tensors
    are not unpacked.

    Args:
        loss: scalar loss with its graph.
        scale: None takes the loss as it is. A number says that the cross-entropy was multiplied or divided by
            constants, and multiplies it back: Lightning divides every loss by ``accumulate_grad_batches``, by 1 too.
        constants: by how many, if ``scale`` is a number: 1, and 2 where a gradient scaler multiplied as well.

    Returns:
        The cross-entropy, detached, in float32 or wider, with what equal probabilities would give; None for anything
        else: smoothed labels, class probabilities, several losses, a sum, more or fewer constants, a compiled graph,
        no graph.

    Example:
        >>> logits = torch.zeros(4, 10, requires_grad=True)
        >>> start = cross_entropy_start(torch.nn.functional.cross_entropy(logits, torch.arange(4)))
        >>> start.classes, round(start.loss.item() / start.expected, 3)
        (10, 1.0)
    """
    if loss.dim() or loss.grad_fn is None:
        return None
    node: Any = _under(loss.grad_fn, CASTS)
    for _ in range(0 if scale is None else constants):
        node = _under(_under_constant(node), CASTS)
    classes = _classes(node)
    if classes is None or classes < BINARY:
        return None
    wide = torch.promote_types(loss.dtype, torch.float32)
    return Start(loss.detach().to(wide) * (1.0 if scale is None else scale), classes, math.log(classes))


def _classes(node: Any) -> int | None:
    """Number of classes of a mean cross-entropy; None if the node is none."""
    name = "" if node is None else node.name()
    if name == "BinaryCrossEntropyWithLogitsBackward0":
        plain = all(_is_absent(node, argument) for argument in ("weight", "pos_weight"))
        return BINARY if plain and node._saved_reduction == MEAN else None  # noqa: SLF001  (autograd's public names)
    if name not in LIKELIHOODS or node._saved_reduction != MEAN:  # noqa: SLF001  (the same)
        return None
    inner = _under(node.next_functions[0][0], CASTS)
    if name == "NllLoss2DBackward0":  # targets of one, three or more axes are folded into two
        inner = _under(inner, VIEWS)
    if inner is None or inner.name() != "LogSoftmaxBackward0":
        return None
    shape = tuple(inner._input_metadata[0].shape)  # noqa: SLF001  (the one place that has it without a saved tensor)
    axis = min(1, len(shape) - 1)
    over = inner._saved_dim  # noqa: SLF001  (autograd's public names)
    over -= 1 << 64 if over >= 1 << 63 else 0  # a negative one is shown without its sign
    return int(shape[axis]) if over % len(shape) == axis else None


def _is_absent(node: Any, argument: str) -> bool:
    """Whether a tensor argument was None; where only unpacking it would tell, it counts as given."""
    saved = getattr(node, f"_raw_saved_{argument}", node)
    return getattr(saved, "data", saved) is None


def _under(node: Any, names: Sequence[str]) -> Any:
    while node is not None and node.name() in names:
        node = node.next_functions[0][0]
    return node


def _under_constant(node: Any) -> Any:
    """What one node multiplies or divides by something without a graph; None if it does anything else."""
    if node is None or node.name() not in {"DivBackward0", "MulBackward0"}:
        return None
    factors = [factor for factor, _ in node.next_functions]
    if factors[0] is None and node.name() == "MulBackward0":
        factors.reverse()
    return factors[0] if factors[1:] == [None] else None
