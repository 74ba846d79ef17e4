# SPDX-License-Identifier: Apache-2.0
"""Statistics of every layer's output, pooled over accumulation and ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning_bn.callbacks.album import Album, Page
from lightning_bn.callbacks.arguments import check_flag, check_interval, check_share, check_strings
from lightning_bn.callbacks.base import Monitor, gather_objects, log_interval, shielded, step_of
from lightning_bn.callbacks.due import window_closes
from lightning_bn.callbacks.layer_watch import OFF, REST, SPENT
from lightning_bn.callbacks.reach import reach
from lightning_bn.callbacks.rehearsal import rehearse
from lightning_bn.callbacks.turns import Turns
from lightning_bn.callbacks.updates import Updates
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.sinks import Loggers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_bn.callbacks.hearing import Heard
    from lightning_bn.callbacks.layer_watch import LayerWatch
    from lightning_bn.callbacks.windows import Window
    from lightning_bn.rules.vanishing_gradient import Weight
    from lightning_bn.stats.moments import Rows, Summary


class ActivationMonitor(Monitor):
    """Measure every layer's output: mean, spread, range, share of zeros, dead and saturated units.

    On due steps the outputs of all chosen layers are measured on their device; one transfer brings all numbers to the
    host. They are pooled exactly over the micro-batches of an accumulated step and over all processes. A BatchNorm
    layer in training is not measured but asked: mean and spread of its output follow from γ, β and the batch variance
    that it computed anyway; its range and zeros stay unknown. Units of ReLU, tanh, sigmoid and their hard variants are
    counted over windows of at least 512 samples. Of a model behind ``torch.compile`` the due step is run once more in
    advance, eagerly and without a trace, and that pass is heard.

    The loggers get an overview (``bn_overview/...``: median, largest and smallest over the layers) at the pace of the
    trainer's ``log_every_n_steps``, TensorBoard's Text tab the last measured step layer by layer (``bn_activations``);
    ``statistics`` holds the same, ``units`` the last window of each activation layer. Besides the due steps only the
    first step of a fit is measured, for later ones to be judged against; on all others, and in validation, nothing.

    Args:
        layers: shell patterns on module names, such as ``encoder.*``, one or a list; a star also crosses dots. A
            module that matches is measured, whether or not it has submodules. ``leaf`` stands for every module without
            submodules, ``norm`` for normalisation layers, ``activation`` for activation modules, ``all`` for every
            module; other words without dot or star that name a class, such as ``Conv2d``, stand for modules of it.
            None is ``leaf``.
        every_n_steps: measure each so many optimizer steps, at least 1; None follows the trainer's
            ``log_every_n_steps``.
        parameters: whether to measure weights, gradients and updates too: their norms, parameter by parameter, kept in
            ``weights``, and the rules about vanishing, exploding and missing gradients and about updates that are tiny
            or huge. The weights are copied on due steps. Sharded and sparse parameters are left out.
        gradients: whether to measure the gradient of the loss with respect to each layer's output too; kept in
            ``gradients``, pooled like the outputs. It is that of each process's own loss, of which accumulation leaves
            a part; each backward pass counts. The factor of the Trainer's gradient scaler is taken out, that of a
            scaler of your own or of DeepSpeed is not.
        effective_rank: whether to measure the participation ratio (tr Σ)²/‖Σ‖²_F, Σ being the covariance of the
            channels (Gao et al. 2017), of what linear layers, convolutions and activations put out: 1 to min(channels,
            samples - 1). Kept in ``ranks``; of this process, its last micro-batch, and at most 8192 samples of it.
        pictures: whether TensorBoard gets, when the fit ends, maps of layer by step (``bn_heatmap/std``,
            ``bn_heatmap/dead_share``), and at the pace of the overview histograms of the first eight layers that a
            warning or an error named (``bn_flagged/...``, of the first process).
        max_overhead: largest share of the training time that measuring may take, above 0 and at most 1; where it takes
            more, the interval is widened and a finding says so. None for no limit.
        ignore: slugs of findings that are not to be reported, out of unmatched-layers, not-watched, dead-units,
            saturated-units, vanishing-signal, exploding-signal, variance-below-epsilon, dropout-before-batchnorm,
            vanishing-gradient, exploding-gradient, no-gradient, tiny-updates, huge-updates, interval-widened.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.ActivationMonitor()])``
    """

    watches = ("layers",)

    def __init__(
        self,
        layers: str | list[str] | None = None,
        *,
        every_n_steps: int | None = None,
        parameters: bool = False,
        gradients: bool = False,
        effective_rank: bool = False,
        pictures: bool = True,
        max_overhead: float | None = 0.02,
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__(ignore=ignore)
        self.layers = check_strings("layers", layers)
        self.every_n_steps = check_interval("every_n_steps", every_n_steps, default="the trainer's log_every_n_steps")
        self.parameters = check_flag("parameters", parameters)
        self._feels_gradients = check_flag("gradients", gradients)
        self.effective_rank = check_flag("effective_rank", effective_rank)
        self.pictures = check_flag("pictures", pictures)
        self.max_overhead = check_share("max_overhead", max_overhead, default="no limit")
        self._restored: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self.statistics: dict[str, Summary] = {}
        self.units: dict[str, Window] = {}
        self.weights: dict[str, Weight] = {}
        self.ranks: dict[str, float] = {}
        self.gradients: dict[str, Summary] = {}
        self._updates: Updates | None = None
        self._watch: LayerWatch | None = None
        self._turns = Turns(self.every_n_steps, self.max_overhead)
        self._switched_off = self._is_due_now = False
        self._signals: tuple[float, ...] | None = None  # of the last measured step
        self._album = Album(pictures=self.pictures)
        self._page: Page | None = None  # the last measured step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin new windows; those of a restored checkpoint replace them; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        self._restored = {}

    @shielded
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the layers; called by Lightning."""
        # Not in setup: layers may not exist yet, and SyncBatchNorm conversion would replace them.
        self._forget()
        heard = reach(trainer, pl_module, self.layers, gradients=self._feels_gradients)
        for finding in (*heard.findings, self._turns.never(trainer)):
            self.emit(finding)
        if not heard.layers:
            return
        self._watch = heard.watch(pl_module, ranked=self.effective_rank, feel=self._feel)
        self._updates = Updates(pl_module) if self.parameters else None
        for name, state in self._restored.items():
            (self._watch.resume if name == "windows" else self._album.load_state_dict)(state)
            self._turns.started = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree with the other ranks on who measures; called by Lightning."""
        # Outside the shield, as every rank has to take part: all measure, or none.
        nothing = self.off or self._watch is None
        self._switched_off = trainer.strategy.reduce_boolean_decision(nothing, all=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen on due steps; called by Lightning."""
        self._is_due_now = not self._switched_off and self._watch is not None and self._turns.is_measured(trainer)
        if self._is_due_now:
            self._turns.budget.begin()
            with self._turns.budget:
                self._listen(trainer, pl_module, batch, batch_idx)

    @shielded
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let go of the model when the forward pass is over; called by Lightning."""
        if self._watch is not None and self._is_due_now:
            with self._turns.budget:
                self._watch.enter_backward(trainer, loss, last=pl_module.automatic_optimization)

    @shielded
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know of no scale of the loss any longer; called by Lightning."""
        if self._watch is not None and self._is_due_now:
            self._watch.leave_backward()

    @shielded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at weights and gradients on due steps; called by Lightning."""
        if self._updates is not None and self._is_due_now:
            with self._turns.budget:
                self._updates.before(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pool and log what was heard; called by Lightning."""
        if not self._is_due_now or (watch := self._watch) is None:
            return
        with self._turns.budget:
            self._stop_listening()
            if not window_closes(trainer):
                return
            if not watch.agreed or trainer.world_size == 1:
                watch.agree(gather_objects(trainer, watch.sizes()))
            heard = self._fetch()
            message = watch.message(heard, *self._turns.budget.latest)
            ranks = watch.gather(message, trainer.strategy.all_gather if trainer.world_size > 1 else None)
            self._signals = None if heard is None else self._take(watch, heard, ranks)
            self._switched_off = self.off if self._signals is None else bool(self._signals[OFF])
            self._publish(trainer)
        self._turns.budget.end()

    @shielded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the model where a batch was broken off; called by Lightning."""
        self.live.hooks.close()
        if self._watch is not None:
            self._watch.forget()

    @shielded
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last measured step layer by layer; called by Lightning."""
        self.emit(self._turns.too_few(trainer) if self._watch else None)
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what was measured up to here, and let go of the model; called by Lightning."""
        self._finish(trainer)
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """What was reported, and the windows of the units; called by Lightning."""
        if self._watch is None or not self._turns.started:
            return {**super().state_dict(), **self._restored}
        own = {"windows": self._watch.windows.state_dict(), "pictures": self._album.state_dict()}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; called by Lightning."""
        super().load_state_dict(state_dict)
        self._restored = {name: state_dict[name] for name in ("windows", "pictures") if name in state_dict}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model's layers."""
        return {**super().__getstate__(), "_watch": None, "_updates": None}

    @shielded
    def _listen(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.live.hooks.close()
        watch, binned = self._watch, self._album.binned(step_of(trainer), log_interval(trainer))
        listening = watch.listen(pl_module, self._hear, binned) if watch is not None else nullcontext()
        if watch is not None and watch.eager:
            rehearse(trainer, pl_module, batch, batch_idx, listening, backward=watch.feels)
        else:
            self.live.hooks.enter_context(listening)

    @shielded
    def _hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._watch is not None:
            with self._turns.budget:
                self._watch.hear(name, module, inputs, output)

    @shielded
    def _feel(self, name: str, gradient: Tensor) -> None:
        if self._watch is not None:
            with self._turns.budget:
                self._watch.feel(name, gradient)

    @shielded
    def _stop_listening(self) -> None:
        self.live.hooks.close()

    @shielded
    def _fetch(self) -> Heard | None:
        more = self._updates.after() if self._updates is not None else ()
        return self._watch.fetch(more) if self._watch is not None else None

    @shielded
    def _take(self, watch: LayerWatch, heard: Heard, ranks: Rows) -> tuple[float, ...]:
        step = step_of(self.live.trainer)
        taken = watch.take(heard, ranks, step)
        if taken.signals[OFF]:
            self.emit(not_watched("any further step", "the monitor failed on another process"))
            return taken.signals
        self.statistics, self.gradients, self.ranks = taken.statistics, taken.gradients, heard.ranks
        self.units |= taken.closed
        found = taken.findings
        if self._updates is not None:
            # Where layers were chosen, a module that was not heard may have run.
            found += self._updates.read(heard.more, heard.order if self.layers is None else None)
            self.weights = self._updates.latest
        for finding in found:
            self.emit(finding)
        self._album.flag(found, watch.layers)
        order, more = tuple(heard.order), (heard.bins, self.ranks, self.gradients)
        self._page = Page(step, order, self.statistics, dict(self.units), self.weights, *more)
        return taken.signals

    @shielded
    def _publish(self, trainer: Trainer) -> None:
        self.emit(self._watch.unheard() if self._watch else None)
        due = self._turns.pass_by(trainer)
        if due and self._page and self.statistics and trainer.is_global_zero:
            self._album.log(Loggers(trainer.loggers), self._page, log_interval(trainer))
        if self._signals is not None and not self._switched_off:
            self.emit(self._turns.judge(trainer, self._signals[SPENT], self._signals[REST]), repeat=True)

    @shielded
    def _finish(self, trainer: Trainer) -> None:
        if self._page and self.statistics and trainer.is_global_zero:
            self._album.finish(Loggers(trainer.loggers), self._page, log=self._turns.was_any)
