# SPDX-License-Identifier: Apache-2.0
"""Run a step again and find the operation that made its loss, or its gradients, non-finite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from lightning_bn.lineage import CollectiveError, Lineage
from lightning_bn.operations import FINITE, Fault, Origin, Outside, state
from lightning_bn.source import Names
from lightning_bn.taps import plain_name, tensors_in

Step = Callable[[Any, "Judge"], Any]
"""Runs a batch through the model, and calls the judge that it gets with each loss."""


@dataclass(frozen=True)
class Replayed:
    """What a replay showed.

    Args:
        origin: where the bad values came from; None where everything was finite, or it cannot be told.
        phase: where they were seen: in the loss, in gradients, or by code that then raised or decided upon them;
            empty where everything was finite.
        loss: the loss, NaN or infinite too; None where none was computed.
        parameter: the first parameter, in the order of the backward pass, whose gradient is not finite.
        parameters: how many such parameters there are.
        without: whether the step is finite with the bad values of the batch replaced by zeros; None if not tried.
        error: the exception that the step raised, in words; empty without.
        more: further bad tensors of the batch that are to blame like the first.
        also: bad values of the batch that are not to blame, as the step is not finite without them either.
    """

    origin: Origin | None = None
    phase: Literal["loss", "gradient", "exception", ""] = ""
    loss: float | None = None
    parameter: str = ""
    parameters: int = 0
    without: bool | None = None
    error: str = ""
    more: tuple[Outside, ...] = ()
    also: tuple[Outside, ...] = ()


@dataclass
class _Found(Exception):  # noqa: N818  (no error: it ends a replay that has seen enough)
    seen: Replayed


@dataclass
class Judge:
    """Looks at losses and gradients of the pass that a lineage follows, and ends it where one is bad.

    Args:
        model: the network.
        lineage: what follows the pass.
        run_backward: the backward pass of a loss; None for the forward pass alone.
    """

    model: nn.Module
    lineage: Lineage
    run_backward: Callable[[Tensor], Any] | None
    loss: float | None = None
    order: list[tuple[str, Tensor]] = field(default_factory=list)

    def __call__(self, loss: Tensor) -> None:
        """Judge a loss, run its backward pass, judge the gradients."""
        self.loss = float(loss.detach().float().sum()) if loss.numel() else None
        if state(loss) != FINITE:
            raise _Found(Replayed(self.lineage.origin_of(loss), "loss", self.loss))
        if self.run_backward is not None:
            self.run_backward(loss)
            self.gradients()

    def gradients(self) -> None:
        """Judge the gradients as they are, in the order in which the parameters got theirs."""
        bad = [(name, x.grad) for name, x in self.order if x.grad is not None and state(x.grad) != FINITE]
        if bad:
            origins = [self.lineage.origin_of(grad) for _, grad in bad]
            origin = next((entry for entry in origins if entry is not None), None)
            raise _Found(Replayed(origin, "gradient", self.loss, bad[0][0], len({name for name, _ in bad})))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note in which order the parameters get their gradients, until the block is left."""
        with ExitStack() as handles:
            for name, x in self.model.named_parameters():
                if x.requires_grad and x.is_leaf:
                    entry = (plain_name(name), x)
                    hook: Any = x.register_post_accumulate_grad_hook  # torch leaves it untyped
                    handles.callback(hook(lambda _, entry=entry: self.order.append(entry)).remove)
            yield


def replay(
    model: nn.Module,
    batch: Any,
    step: Step,
    quarantined: Callable[[], AbstractContextManager[Any]],
    run_backward: Callable[[Tensor], Any] | None = None,
    *,
    alone: bool = False,
) -> Replayed:
    """Run a step in quarantine and follow bad values back to where they came from.

    Where they came from a tensor of the batch, the step is run once more with zeros in their place: that shows whether
    this tensor is to blame, another one too, or an operation that has nothing to do with it. The host is read for
    every operation.

    Args:
        model: the network.
        batch: the batch, any nested container; the step gets copies of its tensors.
        step: runs the batch; see :data:`Step`.
        quarantined: what to run the step in, so that it leaves no trace; entered once or twice.
        run_backward: the backward pass of a loss; None for the forward pass alone.
        alone: whether other ranks may not do the same.

    Returns:
        What was seen. An exception of the step becomes a part of it.

    Raises:
        CollectiveError: where the pass would wait for ranks that do not run it.
    """
    first = seen = _once(model, copied(batch), step, quarantined, run_backward, alone=alone)
    blamed: list[Outside] = []
    while isinstance(seen.origin, Outside) and seen.origin.kind == "batch" and seen.origin not in blamed:
        blamed.append(seen.origin)
        clean = frozenset(entry.path for entry in blamed)
        seen = _once(model, copied(batch, clean), step, quarantined, run_backward, alone=alone)
    if not blamed:
        return first
    if isinstance(seen.origin, Fault) and seen.phase == first.phase:
        return replace(seen, also=tuple(blamed))
    return replace(first, more=tuple(blamed[1:]), without=seen.phase == "")


def follow(lineage: Lineage, model: nn.Module) -> None:
    """Make the parameters and buffers of a model known."""
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for path, x in named:
            if not is_lazy(x):
                lineage.enter(kind, plain_name(path), x)


def _once(
    model: nn.Module,
    batch: Any,
    step: Step,
    quarantined: Callable[[], AbstractContextManager[Any]],
    run_backward: Callable[[Tensor], Any] | None,
    *,
    alone: bool,
) -> Replayed:
    with quarantined(), Lineage(Names(model), _once.__code__, alone=alone) as lineage:
        judge = Judge(model, lineage, run_backward)
        follow(lineage, model)
        for path, x in tensors_in(batch, "batch"):
            lineage.enter("batch", path, x)
        try:
            with judge.listening():
                step(batch, judge)
        except _Found as found:
            return found.seen
        except CollectiveError:
            raise
        except Exception as error:  # noqa: BLE001  (the step's own, which is what may have to be explained)
            return _broken(error, lineage, judge.loss)
        finally:
            with _disable_current_modes():
                lineage.writes.put_back()
        return Replayed(None, "", judge.loss)


def _broken(error: Exception, lineage: Lineage, loss: float | None) -> Replayed:
    words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    suspect = lineage.suspect
    return Replayed(suspect, "exception" if suspect is not None else "", loss, error=words)


def copied(batch: Any, clean: Collection[str] = ()) -> Any:
    """A batch with copies of its tensors.

    Args:
        batch: any nested container that :func:`copy.deepcopy` can copy.
        clean: paths of the tensors in which zeros take the place of NaN and infinity, such as ``batch[0]``.

    Raises:
        TypeError: where the batch cannot be copied.
    """
    # A deep copy of a slice would take the whole tensor along, and one of a tensor with a graph fails.
    memo = {id(x): _twin(x, clean=path in clean) for path, x in tensors_in(batch, "batch")}
    try:
        return copy.deepcopy(batch, memo)
    except Exception as error:
        raise TypeError(f"batch must be what copy.deepcopy can copy, got {type(batch).__name__} ({error})") from error


def _twin(x: Tensor, *, clean: bool) -> Tensor:
    twin = x.detach().clone()
    if clean and (x.is_floating_point() or x.is_complex()):
        twin = torch.where(torch.isfinite(twin), twin, torch.zeros_like(twin))
    return twin.requires_grad_(x.requires_grad)
