# SPDX-License-Identifier: Apache-2.0
"""Find the operation that makes a model's loss or gradients non-finite, in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_bn.findings import Finding
from lightning_bn.first_pass import running_statistics
from lightning_bn.operations import FINITE, Outside, state
from lightning_bn.quarantine import quarantine
from lightning_bn.replay import Judge, replay
from lightning_bn.rules.diverged_by_learning_rate import History
from lightning_bn.rules.root_cause import statistics_fault
from lightning_bn.rules.traced_cause import traced_cause
from lightning_bn.taps import tensors_in


def locate_nonfinite(
    model: nn.Module, *args: Any, loss_fn: Callable[[Any], Tensor] | None = None, **kwargs: Any
) -> Finding | None:
    """Run a model and say which operation, on which line, made NaN or infinity, or which input or weight held it.

    Forward and, with a loss, backward are run in quarantine, in the mode (``train`` or ``eval``) that the model is
    in: weights, buffers, gradients and random streams are afterwards what they were before. Every operation is looked
    at on the host, which takes several times as long as a plain pass.

    Args:
        model: the network.
        args: what it is called with.
        loss_fn: makes the loss, a scalar, of what the model returns; it is then differentiated. Without, every
            floating-point tensor that the model returns is looked at, and nothing is differentiated.
        kwargs: what it is called with by name.

    Returns:
        The finding for the first cause, whose evidence names module, operation, source line and ranges; None where
        everything is finite.

    Raises:
        TypeError: where ``model`` is no module, or ``loss_fn`` makes no tensor.
        ValueError: where lazy modules have not seen data yet.

    Example:
        >>> import torch
        >>> found = locate_nonfinite(nn.Softplus(), torch.ones(2), loss_fn=lambda y: torch.log(y - y).sum())
        >>> found.rule, found.data["operation"]
        ('invalid-operation', 'log')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    statistics: list[Finding] = []
    seen = replay(
        model,
        (args, kwargs),
        partial(_step, model, loss_fn, statistics),
        partial(quarantine, model),
        _backward if loss_fn is not None else None,
    )
    if seen.phase == "" and seen.error:
        raise RuntimeError(f"model must run on these arguments, got {seen.error}")
    # Whether these are the weights that the model started from is not known here: hence no first step.
    if isinstance(seen.origin, Outside):
        path = seen.origin.path.replace("batch[0]", "args", 1).replace("batch[1]", "kwargs", 1)
        seen = replace(seen, origin=replace(seen.origin, path=path))
    return next(iter([*traced_cause(seen, History(step=1)), *statistics]), None)


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _step(
    model: nn.Module, loss_fn: Callable[[Any], Tensor] | None, statistics: list[Finding], batch: Any, judge: Judge
) -> None:
    args, kwargs = batch
    before = running_statistics(model)
    output = model(*args, **kwargs)
    after = running_statistics(model)
    judged = (statistics_fault(name, row, after[name], used=row != after[name]) for name, row in before.items())
    statistics[:] = [finding for finding in judged if finding is not None]
    if loss_fn is None:
        bad = (x for _, x in tensors_in(output) if state(x) != FINITE)
        worst = next((x for x in bad if judge.lineage.origin_of(x) is not None), None)
        if worst is not None:
            judge(worst)
        return
    loss = loss_fn(output)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    judge(loss)
