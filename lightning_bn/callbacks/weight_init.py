# SPDX-License-Identifier: Apache-2.0
"""Initialise weights where it is safe: after the layers exist, before a checkpoint is restored."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_bn.callbacks.arguments import check_strings
from lightning_bn.callbacks.base import Monitor, gather_objects, is_compiled, shielded
from lightning_bn.callbacks.console import print_above_bar
from lightning_bn.callbacks.eager_pass import goes_apart, has_compiled, hear_apart
from lightning_bn.callbacks.first_batch import find_factors, first_pass, foretell, judge_loss, publish
from lightning_bn.callbacks.late_layers import after_building
from lightning_bn.callbacks.mark import Mark, close_mark, mark_of, set_mark
from lightning_bn.callbacks.rehearsal import rehearse
from lightning_bn.first_signal import SignalRecorder
from lightning_bn.init_plan import LAZY, Plan, Wishes, plan, without
from lightning_bn.init_report import init_console
from lightning_bn.initialization import Report, carry_out, merge, rescale, seem_loaded
from lightning_bn.rules.not_initialised import could_not_fill, left_alone, not_scaled, remark, replaced_by_checkpoint
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.rules.overwritten_weights import overwritten_weights
from lightning_bn.rules.unmatched_layers import unmatched_layers
from lightning_bn.schemes import Scheme
from lightning_bn.taps import listen

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class WeightInit(Monitor):
    """Initialise the model before training, and show what the first forward pass made of it.

    Weights of Linear, Conv, ConvTranspose, Embedding, attention and recurrent layers are drawn from the scheme, biases
    become 0, normalisation layers get γ = 1, β = 0 and fresh running statistics. Recurrent weights are orthogonal, gate
    by gate, unless the scheme is naive, uniform or a number. Frozen parameters (``requires_grad=False``) keep what they
    have. A resumed run keeps its checkpoint's weights, and a model that was initialised once is left alone by every
    later fit. Each parameter has its own random stream: the global random state is untouched, all ranks agree, and
    adding a layer does not change the others. Weights that look loaded or trained are warned about before they are
    overwritten. TensorBoard's Text tab gets one row for each parameter (``bn_init``) and the signal over depth in the
    first training batch (``bn_init_signal``, with a figure); ``init.json`` beside the findings holds both. Costs
    nothing after the first batch.

    Args:
        scheme: ``he`` = N(0, gain² / fan_in), for ReLU networks (He et al. 2015, eq. 10), ``he_fan_out`` with the other
            fan; ``xavier`` = N(0, gain² · 2 / (fan_in + fan_out)), for tanh, sigmoid or linear ones (Glorot & Bengio
            2010, eq. 12); each also as ``..._uniform`` of the same variance; ``naive`` = N(0, 0.01²); ``uniform`` =
            U(−0.05, 0.05); ``orthogonal`` (Saxe et al. 2014); ``lsuv``, which scales orthogonal weights to outputs of
            variance 1 on the first training batch (Mishkin & Matas 2016); ``pytorch`` touches nothing and only
            reports; a number σ = N(0, σ²).
        nonlinearity: the nonlinearity that the gain of he, xavier and orthogonal is for, such as ``relu``, ``tanh``,
            ``linear``, for all layers or by shell pattern on module names; None takes what follows each layer in the
            order of the modules, and where that is unknown ReLU for he and none for the others.
        include: shell patterns on module or parameter names, or names of module classes, one or a list; a module that
            matches is meant with all below it. None is everything.
        exclude: the same, to leave alone.
        zero_init_residual: True puts γ = 0 on the BatchNorm layers that close a residual branch (Goyal et al. 2017),
            and on no other; None keeps a γ = 0 that the model itself has there; False puts γ = 1 everywhere.
        forget_bias: bias of the forget gate of LSTM layers, such as 1 (Jozefowicz et al. 2015); None is 0.
        show: print the table of parameters on the console.
        seed: seed of the weights, at least 0; None takes the seed of ``seed_everything``, or else of this process.
        ignore: slugs of findings that are not to be reported, out of not-initialised, overwritten-weights,
            unmatched-layers, overflow-by-initialisation, large-initial-loss, not-watched.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.WeightInit("he")])``
    """

    def __init__(
        self,
        scheme: Scheme | float = "he",
        *,
        nonlinearity: str | dict[str, str] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        zero_init_residual: bool | None = None,
        forget_bias: float | None = None,
        show: bool = False,
        seed: int | None = None,
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__(ignore=ignore)
        included = check_strings("include", include)
        excluded = check_strings("exclude", exclude) or ()
        self.wishes = Wishes(scheme, nonlinearity, included, excluded, zero_init_residual, forget_bias)
        if not isinstance(show, bool):
            raise ValueError(f"show must be true or false, got {show!r}")  # noqa: TRY004  (as for all other arguments)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ValueError(f"seed must be a whole number of at least 0, or None, got {seed!r}")
        self.scheme = self.wishes.scheme
        vars(self).update(vars(self.wishes))  # each argument under its own name, as in the other callbacks
        self.show = show
        self.seed = seed
        self.report: Report | None = None
        self._forget()

    def _forget(self) -> None:
        self._leaves_alone = False
        self._awaits_batch = False
        self._others: set[str] = set()
        self._recorder: SignalRecorder | None = None
        self._ear = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the weights to be set when the layers are built; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()
            self._arrange(trainer, pl_module)

    @shielded
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was done; called by Lightning."""
        self.live.hooks.close()
        if self.report is not None:
            self._tell(trainer, pl_module, self.report)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether a checkpoint has replaced the weights; called by Lightning."""
        close_mark(pl_module)
        # Not before: sharded strategies restore after on_fit_start. And the same on all ranks, also where this monitor
        # has failed on one, as what awaits the first batch may be a collective.
        self._awaits_batch = not self._leaves_alone and not trainer.ckpt_path
        self._tell_restored(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Scale the weights on the first batch for LSUV, and listen to that batch; called by Lightning."""
        if self._awaits_batch:
            self._awaits_batch = False
            if self.scheme == "lsuv":
                # Outside the shield, as every rank takes part: all scale by the factors of the first, or none.
                by_rank = gather_objects(trainer, self._factors(trainer, pl_module, batch, batch_idx))
                self._scale(pl_module, None if None in by_rank else by_rank[0])
            self._listen(trainer, pl_module, batch, batch_idx)

    @shielded
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Say what the first forward pass showed; called by Lightning."""
        self._conclude(pl_module, loss)

    @shielded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say it where the step had no backward pass of Lightning's; called by Lightning."""
        self._conclude(pl_module, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model; called by Lightning."""
        self._recorder = None
        close_mark(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model; called by Lightning."""
        close_mark(pl_module)
        super().teardown(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to a first batch in progress."""
        return {**super().__getstate__(), "_recorder": None, "_ear": ExitStack()}

    @shielded
    def _arrange(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = None
        seed = int(trainer.strategy.broadcast(self._seed()))
        self.live.hooks.callback(after_building(pl_module, lambda: self._apply(pl_module, seed)))

    @shielded
    def _apply(self, pl_module: LightningModule, seed: int) -> None:
        before = mark_of(pl_module) or Mark(str(self.scheme), set())
        planned = plan(pl_module, self.wishes)
        if self.report is None:
            # What another instance of this fit has initialised is its own; what an earlier fit has, is trained.
            self._others = set(before.names)
            free = before.open and any(entry.fill and entry.name not in self._others for entry in planned.entries)
            if self._others and not free:
                self._leaves_alone = True
                self.emit(left_alone(before.scheme, same_fit=before.open))
                return
        planned = without(planned, self._others, "initialised before")
        for argument, entry, nearest in self.wishes.scope.unmatched(pl_module):
            what = "a module, a parameter or a module class"
            self.emit(unmatched_layers(entry, nearest, argument=argument, what=what))
        loaded = seem_loaded(pl_module, planned)
        number = sum(entry.fill is not None for entry in planned.entries)
        self.emit(overwritten_weights(loaded, number, str(self.scheme)))
        self.report = carry_out(pl_module, planned, self.scheme, seed)
        before.names |= {row.name for row in self.report.filled}
        if before.names:
            set_mark(pl_module, before)

    def _plan(self, pl_module: LightningModule) -> Plan:
        return without(plan(pl_module, self.wishes), self._others, "initialised before")

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) if self.seed is None else self.seed

    def _tell(self, trainer: Trainer, pl_module: LightningModule, report: Report) -> None:
        lazy = {name for name, why in report.skipped.items() if why == LAZY}
        self.emit(could_not_fill({name: why for name, why in report.skipped.items() if name not in lazy}))
        for text in report.remarks:
            self.emit(remark(text))
        if trainer.ckpt_path:
            self.emit(replaced_by_checkpoint(str(trainer.ckpt_path)))
            return
        if lazy:
            self._await_layers(pl_module)
        self.emit(foretell(trainer, pl_module, report))
        publish(self.live, report)
        if self.show and trainer.is_global_zero:
            print_above_bar(trainer, init_console(report))

    @shielded
    def _tell_restored(self, trainer: Trainer) -> None:
        if self.report is not None and trainer.ckpt_path:
            self.emit(replaced_by_checkpoint(str(trainer.ckpt_path)))

    def _await_layers(self, pl_module: LightningModule) -> None:
        """Fill lazy layers when they get their parameters, in their first forward pass."""
        seed = self.report.seed if self.report else 0
        waiting = {
            entry.layer: pl_module.get_submodule(entry.layer)
            for entry in self._plan(pl_module).entries
            if entry.why == LAZY
        }

        def fill(name: str, module: nn.Module, inputs: Any) -> None:  # noqa: ARG001  (signature of taps.Expect)
            if waiting.pop(name, None) is not None:
                self._fill_layer(pl_module, name, seed)

        self.live.hooks.enter_context(listen(dict(waiting), lambda *_: None, fill))

    @shielded
    def _fill_layer(self, pl_module: LightningModule, layer: str, seed: int) -> None:
        planned = self._plan(pl_module)
        entries = tuple(entry for entry in planned.entries if entry.layer == layer)
        late = carry_out(pl_module, Plan(entries), self.scheme, seed)
        self.report = merge(self.report, late) if self.report else late

    @shielded
    def _factors(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> dict[str, float] | None:
        if self.report is None:
            return None
        factors, why = find_factors(trainer, pl_module, self._plan(pl_module), batch, batch_idx)
        if why:
            self.emit(not_scaled(why), any_rank=True)
        return factors

    @shielded
    def _scale(self, pl_module: LightningModule, factors: dict[str, float] | None) -> None:
        if factors is not None and self.report is not None:
            self.report, unscaled = rescale(self._plan(pl_module), self.report, factors)
            if unscaled:
                self.emit(not_scaled("no output, or a constant one, on the first batch", unscaled))

    @shielded
    def _listen(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.report is None:
            return
        apart = goes_apart(trainer, pl_module)
        if has_compiled(pl_module) and not apart:
            self.emit(not_watched("what is compiled (torch.compile), in the first forward pass", "it cannot run twice"))
        self._recorder = recorder = SignalRecorder(pl_module, eager=apart)
        listening = listen(recorder.layers if apart or not is_compiled(pl_module) else {}, self._hear)
        if apart:
            self.emit(hear_apart(partial(rehearse, trainer, pl_module, batch, batch_idx, listening)))
        else:
            self._ear = self.live.hooks.enter_context(ExitStack())
            self._ear.enter_context(listening)

    @shielded
    def _hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._recorder is not None:
            self._recorder.hear(name, module, inputs, output)

    def _conclude(self, pl_module: LightningModule, loss: Tensor | None) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None or self.report is None:
            return
        self._ear.close()
        self.emit(could_not_fill({name: why for name, why in self.report.skipped.items() if why == LAZY}))
        shown = first_pass(self.live.trainer, pl_module, recorder.finish(), loss)
        self.emit(judge_loss(shown))
        publish(self.live, self.report, shown)
