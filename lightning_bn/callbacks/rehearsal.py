# SPDX-License-Identifier: Apache-2.0
"""Run the training step of a LightningModule without a trace in its training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_bn.precise import eagerly
from lightning_bn.quarantine import lazy_tensors, quarantine
from lightning_bn.replay import copied

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

SIMPLE = frozenset({"SingleDeviceStrategy", "DDPStrategy"})
"""Strategies under which a step can be run without the strategy's own wrapper, by name: importing them is heavy."""
KNOWN_OF_A_LOGGER = ("name", "version", "save_dir", "log_dir", "root_dir")
"""What a silent logger answers as the real one does: a step may build a path of it."""


def rehearse(
    trainer: Trainer,
    pl_module: LightningModule,
    batch: Any,
    batch_idx: int,
    listening: AbstractContextManager[Any] | None = None,
    *,
    backward: bool = False,
) -> Any:
    """Run ``training_step`` on a batch in quarantine: the real step that follows will compute the same, bit for bit.

    The step runs on a copy of the batch, under the trainer's precision, with silent loggers, eagerly where the model
    is compiled, and not through a DDP wrapper. What it writes past all this stays: prints, files, attributes of the
    trainer, large things in objects of its own classes. See :func:`~lightning_bn.quarantine.quarantine` for what is put
    back.

    Args:
        trainer: the trainer, between the hooks of a fit.
        pl_module: its model.
        batch: what ``training_step`` gets, on the model's device.
        batch_idx: its number in the epoch.
        listening: the block of a :func:`~lightning_bn.taps.listen` that is to hear the step; None where nobody is.
        backward: whether to run the backward pass of its loss too, which is divided as Lightning divides it for
            gradient accumulation, and not scaled. Not with several processes, where it would set off the exchange of
            gradients.

    Returns:
        What ``training_step`` returned. To run another backward pass on it, be in a ``quarantine`` of your own.

    Raises:
        ValueError: where :func:`cannot_rehearse` has a reason.
        TypeError: where the batch cannot be copied.
    """
    reason = cannot_rehearse(pl_module)
    if reason is not None:
        raise ValueError(f"pl_module must have a training_step that can be rehearsed, but {reason}")
    step = pl_module.training_step
    with apart(trainer, pl_module), listening or nullcontext():
        args, kwargs = arguments(step, copied(batch), batch_idx)
        with trainer.precision_plugin.train_step_context():
            output = step(*args, **kwargs)
        loss = loss_of(output) if backward else None
        if loss is not None and loss.requires_grad:
            pl_module.backward(loss / getattr(trainer, "accumulate_grad_batches", 1))
        return output


def rehearse_evaluation(  # noqa: PLR0917  (what says which step it is)
    trainer: Trainer,
    pl_module: LightningModule,
    stage: str,
    batch: Any,
    batch_idx: int,
    dataloader_idx: int,
    listening: AbstractContextManager[Any],
) -> Any:
    """Run ``validation_step`` or ``test_step`` on a copy of a batch without a trace, as :func:`rehearse` does training.

    Args:
        trainer: the trainer, between the hooks of its loop.
        pl_module: its model.
        stage: name of the step.
        batch: what it gets, on the model's device.
        batch_idx: its number.
        dataloader_idx: the number of its loader.
        listening: the block of a :func:`~lightning_bn.taps.listen` that is to hear the step.

    Returns:
        What the step returned.

    Raises:
        TypeError: where the batch cannot be copied.
    """
    step = getattr(pl_module, stage)
    with apart(trainer, pl_module), listening, torch.no_grad(), trainer.precision_plugin.val_step_context():
        args, kwargs = arguments(step, copied(batch), batch_idx, dataloader_idx)
        return step(*args, **kwargs)


@contextmanager
def apart(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """A quarantine for a model that belongs to a trainer: loggers are silent, and compiled parts run eagerly."""
    with quarantine(pl_module), _silent_loggers(trainer), eagerly():
        yield


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a step returned; None where there is none."""
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) and loss.is_floating_point() else None


def cannot_unwrap(trainer: Trainer) -> str | None:
    """Why steps cannot be run past the strategy's own wrapper of the model, in words; None where they can."""
    names = {base.__name__ for base in type(trainer.strategy).__mro__}
    if names & SIMPLE and "DeepSpeedStrategy" not in names:  # which is a DDPStrategy by birth
        return None
    return f"under {type(trainer.strategy).__name__} a step cannot be run without the wrapper"


def cannot_rehearse(pl_module: LightningModule) -> str | None:
    """Why a training step cannot be run without a trace, in words; None where it can."""
    if not pl_module.automatic_optimization:
        return "its training_step steps the optimizers (manual optimisation)"
    return cannot_repeat(pl_module, "training_step")


def cannot_repeat(pl_module: LightningModule, stage: str) -> str | None:
    """Why a step cannot be run a second time, in words; None where it can, be it with optimizers that stand still."""
    if "dataloader_iter" in inspect.signature(getattr(pl_module, stage)).parameters:
        return f"its {stage} takes batches from the loader (dataloader_iter)"
    if lazy := lazy_tensors(pl_module):
        return f"its lazy modules have not seen data yet ({lazy[0]})"
    return None


class SilentLogger:
    """Takes the place of a logger, and of all that hangs on it: every attribute and every call gives itself.

    Args:
        real: the logger. ``isinstance`` takes the silent one for it, lest a step goes another way.
    """

    def __init__(self, real: Any) -> None:
        self._real = real

    @property  # type: ignore[misc]  # what isinstance asks, as it does of a mock
    def __class__(self) -> type:
        """The class of the real one."""
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        """What is known of the real one, and silence."""
        if name.startswith("__"):  # protocols that it does not have
            raise AttributeError(name)
        return getattr(self._real, name) if name in KNOWN_OF_A_LOGGER else _Silence()


class _Silence:
    """Whatever is asked of it or done with it, it is itself, and empty."""

    def __getattr__(self, name: str) -> _Silence:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _Silence:
        return self

    def __getitem__(self, _: Any) -> _Silence:
        return self

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        return False


@contextmanager
def _silent_loggers(trainer: Trainer) -> Iterator[None]:
    loggers = trainer.loggers
    if not loggers:  # the setter would put another empty list in its place
        yield
        return
    silent: list[Any] = [SilentLogger(logger) for logger in loggers]
    trainer.loggers = silent
    try:
        yield
    finally:
        trainer.loggers = loggers


def arguments(
    step: Callable[..., Any], batch: Any, batch_idx: int, dataloader_idx: int = 0
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that a step takes: the batch, its number and that of its loader where there is a place for them."""
    parameters = inspect.signature(step).parameters.values()
    offered = {"batch": batch, "batch_idx": batch_idx, "dataloader_idx": dataloader_idx}
    places = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    args = [*offered.values()][: 3 if "dataloader_idx" in places[2:3] else min(len(places), 2)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        args = [batch, batch_idx]
    return args, {p.name: offered[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in offered}
