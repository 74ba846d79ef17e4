# SPDX-License-Identifier: Apache-2.0
"""What an initialisation does on the first training batch, and what it shows there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bn.callbacks.base import Live, step_of
from lightning_bn.callbacks.console import print_above_bar
from lightning_bn.callbacks.rehearsal import cannot_rehearse, rehearse
from lightning_bn.figures import signal_propagation
from lightning_bn.findings import Finding
from lightning_bn.first_signal import stages
from lightning_bn.gains import followers
from lightning_bn.init_plan import Plan
from lightning_bn.init_report import init_markdown, signal_markdown
from lightning_bn.initialization import Report, scalable
from lightning_bn.lsuv import unit_variance
from lightning_bn.outlook import cross_entropy_start, predicted_overflow
from lightning_bn.quarantine import lazy_tensors
from lightning_bn.rules.large_initial_loss import large_initial_loss
from lightning_bn.rules.overflow_by_initialisation import overflow_by_initialisation
from lightning_bn.sinks import Loggers
from lightning_bn.stats.moments import Summary

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

FILE = "init.json"


@dataclass(frozen=True)
class Shown:
    """What the first training batch showed.

    Args:
        signal: each layer's output, in the order in which they ran.
        dtype: what the activations are computed in.
        loss: the initial loss, where it is a mean cross-entropy; else None.
        expected: loss of equal probabilities, ln C; None where there is no such loss.
    """

    signal: Mapping[str, Summary]
    dtype: torch.dtype
    loss: float | None = None
    expected: float | None = None

    @property
    def words(self) -> str:
        """The initial loss in words."""
        if self.loss is None or self.expected is None:
            return "initial loss: not assessed, as it is no plain mean cross-entropy"
        ratio = self.loss / self.expected
        return f"initial loss: {self.loss:.4g}, {ratio:.3g} times that of equal probabilities ({self.expected:.4g})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not finite becomes None."""
        rows = [{"layer": name, **asdict(row)} for name, row in self.signal.items()]
        plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "initial_loss": _plain(self.loss),
            "loss_of_equal_probabilities": self.expected,
            "signal": plain,
        }


def foretell(trainer: Trainer, pl_module: LightningModule, report: Report) -> Finding | None:
    """What the weights alone say about the forward pass to come: an overflow, and where."""
    dtype = compute_dtype(trainer, pl_module)
    prediction = predicted_overflow(stages(pl_module, report, followers(pl_module)), dtype)
    return overflow_by_initialisation(prediction, report.scheme) if prediction else None


def find_factors(
    trainer: Trainer, pl_module: LightningModule, planned: Plan, batch: Any, batch_idx: int
) -> tuple[dict[str, float] | None, str]:
    """The factors of LSUV from a rehearsal of the first step; or None, and why there are none."""
    lazy = lazy_tensors(pl_module)
    why = cannot_rehearse(pl_module) or (f"{', '.join(lazy[:3])} have not seen data yet" if lazy else "")
    if why:
        return None, why
    layers = scalable(pl_module, planned)
    try:
        return unit_variance(layers, lambda: rehearse(trainer, pl_module, batch, batch_idx)), ""
    except Exception as error:  # noqa: BLE001  (the step's own error, which the real step will show as well)
        return None, f"the rehearsed step failed: {type(error).__name__}: {error}"
    finally:
        _reshard(pl_module)


def _reshard(pl_module: LightningModule) -> None:
    """Let FSDP2 drop the whole weights that a forward pass gathered: what changes now are the shards."""
    for module in pl_module.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            module.reshard()  # type: ignore[operator]  # by name, as the class is a heavy import


def first_pass(trainer: Trainer, pl_module: LightningModule, signal: Mapping[str, Summary], loss: Any) -> Shown:
    """Put together what the first training batch showed; reads the loss on the host."""
    dtype = compute_dtype(trainer, pl_module)
    # Lightning divides the loss by the number of micro-batches, be it 1; under manual optimisation it does not.
    divided = float(getattr(trainer, "accumulate_grad_batches", 1)) if pl_module.automatic_optimization else None
    start = cross_entropy_start(loss, scale=divided) if isinstance(loss, Tensor) else None
    return Shown(signal, dtype) if start is None else Shown(signal, dtype, float(start.loss), start.expected)


def judge_loss(shown: Shown) -> Finding | None:
    """What there is to say about the initial loss."""
    if shown.loss is None or shown.expected is None:
        return None
    return large_initial_loss(shown.loss, shown.expected)


def publish(live: Live, report: Report, shown: Shown | None = None) -> None:
    """Write the report, and what the first batch showed, to TensorBoard and to ``init.json`` beside the findings."""
    trainer = live.trainer
    if not trainer.is_global_zero:
        return
    loggers, step = Loggers(trainer.loggers), step_of(trainer)
    content = report.to_dict()
    if shown is None:
        loggers.text("bn_init", init_markdown(report), step)
    else:
        content["first_batch"] = shown.to_dict()
        loggers.text("bn_init_signal", signal_markdown(shown.signal, shown.dtype, [shown.words]), step)
        _draw(loggers, report, shown, step)
    if getattr(trainer, "fast_dev_run", False):
        return  # Lightning writes no files in a trial run either
    try:
        live.file.write_beside(FILE, content)
    except Exception as error:  # noqa: BLE001  (a full disk, a missing driver of a remote file system, ...)
        print_above_bar(trainer, f"lightning_bn: {FILE} cannot be written: {error}")


def compute_dtype(trainer: Trainer, pl_module: LightningModule) -> torch.dtype:
    """What activations are computed in: half precision where the trainer says so, else that of the first weight."""
    precision = str(trainer.precision)
    for start, dtype in (("bf16", torch.bfloat16), ("16", torch.float16)):
        if precision.startswith(start):
            return dtype
    return next((x.dtype for x in pl_module.parameters() if x.is_floating_point()), torch.float32)


def _draw(loggers: Loggers, report: Report, shown: Shown, step: int) -> None:
    if not (shown.signal and loggers.have_tensorboard and find_spec("matplotlib")):
        return
    names = list(shown.signal)
    figure = signal_propagation(
        names,
        [shown.signal[name].std for name in names],
        absmax=[shown.signal[name].absmax for name in names],
        dtype_max=torch.finfo(shown.dtype).max,
        title=f"First training batch, initialised by {report.scheme}",
    )
    loggers.figure("bn_init/signal_propagation", figure, step)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
