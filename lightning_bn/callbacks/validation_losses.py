# SPDX-License-Identifier: Apache-2.0
"""The losses that ``validation_step`` gives to kept batches, run without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_bn.callbacks.kept import Kept
from lightning_bn.callbacks.rehearsal import apart, arguments

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Capture:
    """Takes the place of ``log`` and ``log_dict`` and keeps the watched value of the present batch.

    Args:
        watch: name of the metric; with several loaders it may end as Lightning lets it, in ``/dataloader_idx_1``.
        several: whether there are several validation loaders.
    """

    def __init__(self, watch: str, *, several: bool) -> None:
        self._watch, self._several = watch, several
        self._loader = 0
        self._value: Any = None
        self.size: int | None = None
        """Samples of the batch, as the step itself said to ``log``; None where it did not."""

    def begin(self, loader: int) -> None:
        """Another batch comes, of this loader."""
        self._loader, self._value, self.size = loader, None, None

    def log(self, name: str, value: Any, *_: Any, **options: Any) -> None:
        """What ``self.log`` does."""
        suffix = f"/dataloader_idx_{self._loader}" if self._several and options.get("add_dataloader_idx", True) else ""
        forked = options.get("on_step") and options.get("on_epoch", True)  # Lightning then knows it by two names
        if self._watch in {f"{name}{suffix}", f"{name}_epoch{suffix}" if forked else ""}:
            self._value, self.size = value, options.get("batch_size")

    def log_dict(self, dictionary: Mapping[str, Any], *_: Any, **options: Any) -> None:
        """What ``self.log_dict`` does."""
        for name, value in dictionary.items():
            self.log(name, value, **options)

    def loss(self, returned: Any) -> Tensor | float | None:
        """The loss of the batch: what was logged under the name; else what the step returned; None without either."""
        value = self._value
        named = isinstance(returned, Mapping)
        if value is None and named and self._watch in returned:
            value = returned[self._watch]
        elif value is None and self._loader_is_watched:
            value = returned.get("loss") if named else returned
        if hasattr(value, "sync_on_compute"):  # a torchmetrics Metric, which was reset before this batch
            value.sync_on_compute = False
            value = value.compute()
        if isinstance(value, Tensor):
            return value.detach().float() if value.numel() == 1 else None
        return float(value) if isinstance(value, int | float) else None

    @property
    def _loader_is_watched(self) -> bool:
        _, _, number = self._watch.partition("/dataloader_idx_")
        return not self._several or number == str(self._loader)


def validation_losses(
    trainer: Trainer, pl_module: LightningModule, batches: Sequence[tuple[int, Kept]], watch: str, *, several: bool
) -> tuple[list[float], list[int]]:
    """Run ``validation_step`` on kept batches without a trace, without gradients and in eval mode.

    Metrics of torchmetrics begin anew with each batch, and do not talk to other processes.

    Args:
        trainer: the trainer, between the hooks of a fit.
        pl_module: its model.
        batches: number of its loader and batch.
        watch: name under which the loss is logged.
        several: whether there are several validation loaders.

    Returns:
        The loss of each batch, NaN where none was given; and its samples: where the batch does not show how many there
        are, as the step tells ``log``.
    """
    step = pl_module.validation_step
    capture = Capture(watch, several=several)
    found: list[Tensor | float | None] = []
    sizes: list[int] = []
    with apart(trainer, pl_module), as_if(trainer, "validating"), torch.no_grad():
        pl_module.eval()
        for module in pl_module.modules():
            if hasattr(type(module), "log") and hasattr(type(module), "log_dict"):
                vars(module).update(log=capture.log, log_dict=capture.log_dict)
        metrics: list[Any] = [module for module in pl_module.modules() if hasattr(module, "sync_on_compute")]
        for loader, entry in batches:
            for metric in metrics:
                metric.reset()
            capture.begin(loader)
            args, kwargs = arguments(step, entry.again(), entry.number, loader)
            with trainer.precision_plugin.val_step_context():
                found.append(capture.loss(step(*args, **kwargs)))
            sizes.append(int(capture.size or 1) if entry.samples == 1 else entry.samples)
    return list(_numbers(found)), sizes


@contextmanager
def as_if(trainer: Trainer, stage: Literal["training", "validating"]) -> Iterator[None]:
    """Let a trainer say that it trains or validates: a step may ask, and do the one or the other.

    Args:
        trainer: the trainer, in a fit.
        stage: what it is to say.
    """
    before = trainer.state.stage
    setattr(trainer, stage, True)
    try:
        yield
    finally:
        trainer.state.stage = before


def _numbers(values: Sequence[Tensor | float | None]) -> Iterator[float]:
    """On the host, by one transfer."""
    tensors = [value.reshape(()) for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    for value in values:
        yield math.nan if value is None else next(read) if isinstance(value, Tensor) else value
