# SPDX-License-Identifier: Apache-2.0
"""The one door to Lightning: a base class for both of its packages, and what is read off a Trainer."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar, cast

import torch

from lightning_bn.callbacks.arguments import check_rules
from lightning_bn.callbacks.console import print_above_bar
from lightning_bn.callbacks.identity import Identity, adopted_state
from lightning_bn.findings import Finding, NonFiniteError, Severity
from lightning_bn.rules.attached_twice import attached_twice
from lightning_bn.rules.monitor_failed import monitor_failed
from lightning_bn.sinks import FindingsFile, Loggers, console_text, markdown_report, tally

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
    from lightning.pytorch import LightningModule, Trainer
else:

    def _callback_classes() -> tuple[type, ...]:
        """``Callback`` of ``lightning.pytorch`` and of ``pytorch_lightning``, which know nothing of each other."""
        found, reason = [], None
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                found.append(__import__(package, fromlist=["Callback"]).Callback)
            except Exception as error:  # noqa: BLE001  (a broken second package must not take the first one away)
                reason = error
        if not found:
            raise ImportError("lightning_bn needs lightning or pytorch_lightning; neither can be imported") from reason
        return tuple(dict.fromkeys(found))

    class _Callback(*_callback_classes()):
        """A callback for the Trainer and the LightningCLI of either package."""


P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="Monitor")


def shielded(hook: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R | None]:
    """Keep an internal error away from training: it is reported once and switches the monitor off.

    Args:
        hook: method of a monitor. It is skipped, and gives None, while the monitor is off.
    """

    @functools.wraps(hook)
    def safe(self: M, *args: P.args, **kwargs: P.kwargs) -> R | None:
        if self.off:
            return None
        try:
            return hook(self, *args, **kwargs)
        except NonFiniteError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, it is ours and not the user's)
            self.fail(hook.__name__, error)
            return None

    return cast("Callable[Concatenate[M, P], R | None]", safe)


@dataclass
class Live:
    """What a monitor holds while a fit lasts; never copied or pickled with it.

    Args:
        trainer: the trainer that the fit runs on.
        file: the findings file of the run.
        run: start time of the fit (UTC), the same in all findings that one monitor writes.
        hooks: everything that has to be undone, at the latest in ``on_exception`` or ``teardown``.
    """

    trainer: Trainer
    file: FindingsFile
    run: str
    hooks: ExitStack = field(default_factory=ExitStack)


class Monitor(Identity, _Callback):
    """What every callback of this package shares.

    Args:
        ignore: slugs of rules that are not to be reported.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"fit"})
    """What the trainer may be asked to do for this monitor to have something to watch."""

    def __init__(self, *, ignore: list[str] | None = None) -> None:
        self.ignore = check_rules("ignore", ignore)
        self.findings: list[Finding] = []
        self.off = False
        self._earlier = 0  # findings of earlier fits
        self._said: dict[tuple[str, str | None, str], Severity] = {}
        self._live: Live | None = None

    @property
    def live(self) -> Live:
        """The fit in progress."""
        if self._live is None:
            raise RuntimeError(f"{type(self).__name__} was called outside of a fit")
        return self._live

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the findings file of this run; called by Lightning."""
        self.take_place(callbacks_of(trainer))
        if stage in self.stages:
            self.off = False
            self._begin(trainer)
            self._rest_if_twice(callbacks_of(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report; called by Lightning."""
        self._report()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the report and let go of the model; called by Lightning."""
        self._report()
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model; called by Lightning."""
        self._end()

    def emit(self, finding: Finding | None, *, any_rank: bool = False, repeat: bool = False) -> None:
        """Report a finding: keep it, write it to disk, print it. Said once, and again only if it got worse.

        Args:
            finding: the finding; None is no finding.
            any_rank: report from this rank even if it is not the first one, where ranks see different things.
            repeat: say it even if it was said before.
        """
        if finding is None or finding.rule in self.ignore:
            return
        # Of faults, the same rule on the same layer is the same fault; notes are the same if they say the same.
        which = str(finding.data.get("path") or finding.data.get("name") or "")
        note = finding.evidence if finding.severity is Severity.INFO else which
        trainer, key = self.live.trainer, (finding.rule, finding.layer, note)
        said = self._said.get(key)
        if not (any_rank or trainer.is_global_zero) or (said and not repeat and not finding.severity.outweighs(said)):
            return
        self._said[key] = finding.severity
        if any_rank and trainer.world_size > 1:
            finding = replace(finding, data={"rank": trainer.global_rank, **finding.data})
        finding = replace(finding, step=step_of(trainer), epoch=epoch_of(trainer))
        self.findings.append(finding)
        trouble = ""
        try:
            self.live.file.append(finding, run=self.live.run, monitor=type(self).__name__)
        except Exception as error:  # noqa: BLE001  (a full disk, a missing driver of a remote file system, ...)
            trouble = f"\nlightning_bn: {self.live.file.path} cannot be written: {error}"
        print_above_bar(trainer, console_text(finding) + trouble)

    def fail(self, place: str, error: Exception) -> None:
        """Report an internal error and switch this monitor off until the next fit."""
        self.off = True
        try:
            self.live.hooks.close()
            self.emit(monitor_failed(type(self).__name__, place, error), any_rank=True)
        except Exception as second:  # noqa: BLE001  (not even the report of an error may stop a healthy run)
            with contextlib.suppress(Exception):
                print(f"lightning_bn: {type(self).__name__} is off: {error!r}; {second!r}", file=sys.stderr)  # noqa: T201

    def state_dict(self) -> dict[str, Any]:
        """What was reported so far, so that a resumed run does not repeat it; called by Lightning."""
        return {"said": [[*key, severity.value] for key, severity in self._said.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; called by Lightning."""
        said = state_dict.get("said", [])
        self._said = {(rule, layer, note): Severity(severity) for rule, layer, note, severity in said}

    @shielded
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find this monitor's state where its key changed; called by Lightning."""
        state = adopted_state(self, callbacks_of(trainer), checkpoint.get("callbacks") or {})
        if state:
            self.load_state_dict(copy.deepcopy(state))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to a fit in progress: copies and pickles are as good as new."""
        # Lightning hangs two methods of the model, and with them the model, on every callback of a fit.
        state = {name: value for name, value in self.__dict__.items() if name not in {"log", "log_dict"}}
        return {**state, "_live": None, "_place": None, "_key": None}

    @shielded
    def _begin(self, trainer: Trainer) -> None:
        self._end()
        self._said = {}
        self._earlier = len(self.findings)
        # Trainer.log_dir is a broadcast: every rank asks for it here, once.
        log_dir = trainer.log_dir or trainer.default_root_dir
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._live = Live(trainer, FindingsFile(str(log_dir)), now)

    @shielded
    def _rest_if_twice(self, callbacks: Sequence[Any]) -> None:
        """Leave the work to a callback that does the same: a recipe may have been given twice."""
        if self.is_doubled(callbacks):
            self.emit(attached_twice(type(self).__name__, self.added_by))
            self.off = True

    def _end(self) -> None:
        if self._live is not None:
            self._live.hooks.close()
            self._live = None

    @shielded
    def _report(self) -> None:
        """Write one report for all monitors of the trainer: the last that is not off does it, when all have spoken."""
        if self._live is None or not self.live.trainer.is_global_zero:
            return
        trainer = self.live.trainer
        monitors = [entry for entry in callbacks_of(trainer) if isinstance(entry, Monitor)]
        if next((entry for entry in reversed(monitors) if not entry.off), None) is not self:
            return
        findings = [finding for entry in monitors for finding in entry.findings[entry._earlier :]]  # noqa: SLF001  (our own)
        loggers, step = Loggers(trainer.loggers), step_of(trainer)
        loggers.numbers({"bn_overview/findings": float(len(findings))}, step)
        loggers.text("bn_report", markdown_report(findings), step)
        where = f"; {self.live.file.shown}" if findings else ""
        print_above_bar(trainer, f"lightning_bn: {tally(findings)}{where}")


def callbacks_of(trainer: Trainer) -> list[Any]:
    """All callbacks of a trainer, in order; a public attribute that Lightning declares nowhere."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def log_interval(trainer: Trainer) -> int:
    """``log_every_n_steps`` of a trainer, 0 for never; likewise declared nowhere."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]


def epoch_of(trainer: Trainer) -> int:
    """The epoch that runs or ran last, counted from 0; ``current_epoch`` is one ahead when training has ended."""
    progress = getattr(trainer.fit_loop, "epoch_progress", None)
    return max(progress.current.ready - 1, 0) if progress else trainer.current_epoch


def step_of(trainer: Trainer) -> int:
    """The step that ``self.log`` writes: batches that ended an accumulation window, counted from 0.

    ``global_step`` is one ahead at the end of a batch, and counts every optimizer of a manual loop. Private, as no
    public attribute has this number; without it ``global_step`` serves.
    """
    stepped = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if stepped is None else stepped)


def is_compiled(pl_module: LightningModule) -> bool:
    """Whether the whole LightningModule went through ``torch.compile``: Lightning keeps that in a private attribute."""
    return getattr(pl_module, "_compiler_ctx", None) is not None


def gather_objects(trainer: Trainer, item: Any) -> list[Any]:
    """The item of every rank of a trainer, in the order of ranks; a collective, so every rank has to call it."""
    if trainer.world_size == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [item]
    items: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items
