# SPDX-License-Identifier: Apache-2.0
"""Look at one pass in full: batch, weights, what every module gets and puts out, running statistics, loss."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_bn.callbacks.base import is_compiled
from lightning_bn.figures import signal_propagation
from lightning_bn.findings import Finding
from lightning_bn.first_pass import Pass, Recorder
from lightning_bn.first_signal import SignalRecorder
from lightning_bn.overview import first_pass_table
from lightning_bn.rules.little_headroom import little_headroom
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.rules.root_cause import root_cause
from lightning_bn.sinks import Loggers, markdown_report
from lightning_bn.stats.moments import Summary

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class FirstLook:
    """Record a pass and judge it.

    Args:
        pl_module: the model.
        batch: what it is about to see.
        tag: TensorBoard tag of the report.
        title: first line of the report.
        eager: whether a pass is heard in which compiled modules run eagerly.
    """

    def __init__(self, pl_module: LightningModule, batch: Any, tag: str, title: str, *, eager: bool = False) -> None:
        self._recorder = Recorder(pl_module, batch, compiled=is_compiled(pl_module) and not eager, eager=eager)
        self._signal = SignalRecorder(pl_module, eager=eager)
        self._tag, self._title = tag, title
        self.layers = self._recorder.layers
        self.seen: Pass | None = None
        self.signal: dict[str, Summary] = {}
        self.saw_loss = False

    def unseen(self) -> list[Finding]:
        """Notes about modules that could not be listened to."""
        notes = []
        for name, why in self._recorder.unseen.items():
            how = "to see inside, fit once without torch.compile" if "compile" in why else ""
            notes.append(not_watched(f"the inside of {name or 'the model'}", why, how, layer=name or None))
        return notes

    def expect(self, name: str, module: nn.Module, inputs: Any) -> None:
        """Take note of what a module is about to see."""
        self._recorder.expect(name, module, inputs)

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Take note of what a module put out."""
        self._recorder.hear(name, module, inputs, output)
        if name in self._signal.layers:
            self._signal.hear(name, module, inputs, output)

    def conclude(self, loss: Tensor | None, *, failed: bool = False) -> list[Finding]:
        """Judge what was recorded; reads the host. With several losses in one batch, called for each.

        Args:
            loss: the loss; None where there is none, or where all were judged before.
            failed: whether the step ended in an exception.
        """
        self.saw_loss = self.saw_loss or loss is not None
        # At the end of a batch of several losses the last one was judged: what is left are the modules.
        told = torch.zeros(()) if loss is None and self.saw_loss and not failed else loss
        self.seen = self._recorder.finish(told, failed=failed)
        self.signal = self._signal.finish()
        found = root_cause(self.seen)
        return [*found, *([] if found else self._outlook())]

    @property
    def largest_weight(self) -> float | None:
        """Largest absolute weight before the pass."""
        rows = self.seen.weights.values() if self.seen else ()
        return max((row.largest for row in rows), default=None)

    def report(self, loggers: Loggers, found: list[Finding], step: int) -> None:
        """Write text and figure to TensorBoard.

        Args:
            loggers: the loggers.
            found: what was found in the pass.
            step: the step to write them at.
        """
        if self.seen is None:
            return
        checked = (
            f"{len(self.seen.calls)} module calls, {len(self.seen.weights)} parameters, the batch, "
            f"{'and the loss' if self.saw_loss else 'but no loss was seen'}"
        )
        verdict = markdown_report(found) if found else f"All finite: {checked}."
        dtypes = self._dtypes()
        table = first_pass_table(self.signal, {name: torch.finfo(dtype).max for name, dtype in dtypes.items()})
        loggers.text(self._tag, f"{self._title}\n\n{verdict}\n\n{table}", step)
        if self.signal and loggers.have_tensorboard and find_spec("matplotlib"):
            names = list(self.signal)
            narrowest = min((torch.finfo(dtype).max for dtype in dtypes.values()), default=torch.finfo().max)
            rows = [self.signal[name] for name in names]
            figure = signal_propagation(
                names,
                [row.std for row in rows],
                absmax=[row.absmax for row in rows],
                dtype_max=narrowest,
                title=self._title,
            )
            loggers.figure(f"{self._tag}/signal", figure, step)

    def _dtypes(self) -> dict[str, torch.dtype]:
        return {call.layer: call.dtype for call in (self.seen.calls if self.seen else ())}

    def _outlook(self) -> list[Finding]:
        """Layers whose finite output is close to the end of its dtype's range."""
        # Only layers with weights: masks are filled with the lowest number that there is, on purpose.
        weighted = {call.layer for call in (self.seen.calls if self.seen else ()) if call.largest_weight is not None}
        judged = (
            little_headroom(name, self.signal[name].absmax, dtype)
            for name, dtype in self._dtypes().items()
            if name in self.signal and name in weighted
        )
        close = [finding for finding in judged if finding is not None]
        return close[:1]  # the first one; those behind it follow from it
