# SPDX-License-Identifier: Apache-2.0
"""Listens to the layers of a model on due steps, and turns what all ranks heard into numbers and findings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bn.callbacks.hearing import Ear, Heard
from lightning_bn.callbacks.slopes import Feel, Slopes
from lightning_bn.callbacks.verdicts import of_batchnorm, of_signal, of_units
from lightning_bn.callbacks.watch import has_scaler, unscaled
from lightning_bn.callbacks.windows import Window, Windows
from lightning_bn.callbacks.wiring import WEIGHTED
from lightning_bn.channels import channel_axes, inner_modules
from lightning_bn.findings import Finding
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.stats.moments import WIDTH, Rows, Summary, blank, is_plain, pool, summarize, wide_dtype
from lightning_bn.stats.units import kind_of
from lightning_bn.taps import FAST_IN_EVAL, GROUPS, Hear, listen, reachable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

OFF, SPENT, REST = range(3)
"""What a rank says of itself: it is off; seconds that measuring its last due step took, and seconds of that step
without."""
SIGNALS = 3


@dataclass(frozen=True)
class Taken:
    """One due step on the host.

    Args:
        statistics: summary of each layer that was heard on any rank.
        gradients: the same of the gradients with respect to the outputs; empty where they are not followed.
        closed: by activation layer its window, where one has become long enough in this step.
        signals: the largest of each signal over the ranks.
        findings: what the rules say.
    """

    statistics: dict[str, Summary]
    gradients: dict[str, Summary]
    closed: dict[str, Window]
    signals: tuple[float, ...]
    findings: list[Finding]


class LayerWatch:
    """The layers of one fit, what is known of them, and what is heard in the present due step.

    Args:
        model: the whole network.
        layers: those of it that are measured, by name.
        device: where numbers are put together before they come to the host.
        ranked: whether the effective rank of the outputs of layers with weights and of activations is wanted.
        feel: is called for each gradient with respect to an output, and is to call :meth:`feel`; None where none are
            wanted.
        eager: whether the layers are heard in passes of their own, which run compiled parts eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        device: torch.device,
        *,
        ranked: bool = False,
        feel: Feel | None = None,
        eager: bool = False,
    ) -> None:
        self._heard, self.eager = False, eager
        self.layers = dict(layers)
        axes, kinds = channel_axes(model), {name: kind_of(module) for name, module in layers.items()}
        self._kinds = {name: (kind, axes[layers[name]]) for name, kind in kinds.items() if kind}
        self.windows = Windows([name for name, (kind, _) in self._kinds.items() if kind.bounded])
        self._inner = inner_modules(model)
        self._weighted = {name for name, module in layers.items() if isinstance(module, WEIGHTED)}
        self._direct: frozenset[str] = frozenset()
        self._dropouts: dict[str, tuple[str, float]] = {}
        self._fickle = any(isinstance(module, FAST_IN_EVAL) for module in model.modules())
        self._device = device
        self._first: dict[str, float] | None = None
        wide = {name: axes[module] for name, module in layers.items() if ranked and _has_rank(module)}
        self._slopes = None if feel is None else Slopes(layers, device, feel)
        self._rows = len(self.layers) * (1 if feel is None else 2)
        self._forward = ExitStack()
        self._ear = Ear(layers, self._kinds, device, ranked=wide, slopes=self._slopes)
        self.hear = self._ear.hear
        self.forget = self._ear.begin

    @contextmanager
    def listen(self, model: nn.Module, hear: Hear, binned: Collection[str] = ()) -> Iterator[None]:
        """Have the layers heard while the block lasts; further blocks of the same due step add to the first.

        Forward passes are heard until the last backward pass begins, gradients are felt until the block is left.

        Args:
            model: the whole network.
            hear: is called for each output, and is to call :attr:`hear`.
            binned: layers of which histograms are wanted too.
        """
        self._ear.binned = binned
        # Modules may have gone into eval mode meanwhile.
        within = reachable(model, eager=self.eager)[0] if self._fickle else self.layers
        try:
            with ExitStack() as self._forward:
                layers = {name: module for name, module in self.layers.items() if name in within}
                self._forward.enter_context(listen(layers, hear))
                yield
        finally:
            if self._slopes is not None:
                self._slopes.let_go()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with the windows of an earlier run, whose first step is not known."""
        self.windows.load_state_dict(state)
        self._first = {}

    def feel(self, name: str, gradient: Tensor) -> None:
        """Measure the gradient with respect to an output."""
        if self._slopes is not None:
            self._slopes.feel(name, gradient)

    def enter_backward(self, trainer: Trainer, loss: Tensor, *, last: bool) -> None:
        """A backward pass begins.

        Args:
            trainer: the trainer, whose gradient scaler may have multiplied the loss.
            loss: what the pass begins with.
            last: whether no forward pass will be heard after it.
        """
        if last:
            self._forward.close()
        if self._slopes is not None and has_scaler(trainer):
            self._slopes.factor = unscaled(trainer, torch.ones((), device=loss.device))

    def leave_backward(self) -> None:
        """It is over: gradients of others are not scaled."""
        if self._slopes is not None:
            self._slopes.factor = None

    def fetch(self, more: Sequence[Tensor] = ()) -> Heard:
        """The numbers of a due step that is over; one transfer brings all of them to the host.

        Args:
            more: further 0-dimensional numbers for the same transfer.
        """
        heard = self._ear.tell(more)
        self._heard = self._heard or bool(heard.order)
        return heard

    def message(self, heard: Heard | None, spent: float, rest: float) -> Rows:
        """What this rank has to say of a due step, one vector; it has the same length on every rank.

        Args:
            heard: what :meth:`fetch` gave; None of a rank whose monitor is off.
            spent: seconds that measuring the last due step took.
            rest: seconds of that step without.
        """
        if heard is None:
            return np.concatenate([[1.0, 0.0, 0.0], blank(self._rows).ravel(), self.windows.message({})])
        rows = [heard.rows.ravel(), heard.slopes.ravel()]
        return np.concatenate([[0.0, spent, rest], *rows, self.windows.message(heard.units)])

    def gather(self, message: Rows, all_gather: Callable[[Tensor], Tensor] | None) -> Rows:
        """The messages of all ranks, ``(ranks, length)``.

        Args:
            message: that of this rank.
            all_gather: gives the tensors of all ranks, stacked; a collective. None where there is one rank only.
        """
        if all_gather is None:
            return message[None]
        mine = torch.from_numpy(message).to(self._device, wide_dtype(self._device))
        return all_gather(mine).reshape(-1, len(message)).cpu().double().numpy()

    @property
    def feels(self) -> bool:
        """Whether gradients with respect to outputs are followed."""
        return self._slopes is not None

    @property
    def agreed(self) -> bool:
        """Whether the layers whose units are counted have their places, the same on all ranks."""
        return bool(self.windows.layout) or not self._kinds

    def unheard(self) -> Finding | None:
        """Say it where no layer has been heard yet."""
        how = "call modules, not their forward methods"
        why = "no forward pass was heard in a whole step"
        return None if self._heard else not_watched(", ".join(self.layers), why, how)

    def sizes(self) -> dict[str, int]:
        """Number of units of each layer that this rank heard in the present due step."""
        return self._ear.sizes

    def agree(self, ranks: Sequence[Mapping[str, int]]) -> None:
        """Give every layer a place whose units any rank heard.

        Args:
            ranks: :meth:`sizes` of all ranks.
        """
        for sizes in ranks:
            self.windows.extend(sizes)

    def take(self, heard: Heard, ranks: Rows, step: int) -> Taken:
        """Pool the messages of all ranks.

        Args:
            heard: what this rank heard.
            ranks: messages, ``(ranks, length)``.
            step: optimizer steps taken before.
        """
        width = SIGNALS + WIDTH * self._rows
        rows = ranks[:, SIGNALS:width].reshape(-1, WIDTH)
        pooled = rows if len(ranks) == 1 else pool(rows, [*range(self._rows)] * len(ranks), self._rows)
        self.windows.add(ranks[:, width:])
        summaries = list(map(summarize, pooled.tolist()))
        found, slopes = (dict(zip(self.layers, summaries[at:], strict=False)) for at in (0, len(self.layers)))
        closed = self.windows.close()
        self._ear.careful = {name for name, row in found.items() if not is_plain(row)}
        if self._slopes is not None:
            self._slopes.careful = {name for name, row in slopes.items() if not is_plain(row)}
        self._learn_wiring()
        stds = {name: found[name].std for name in heard.order if name in self._weighted}
        findings = [
            *of_units(closed, self._kinds, inner=self._inner, direct=self._direct),
            *of_signal(stds, heard.varied, self._first),
            *of_batchnorm(self.layers, heard.variances, self._dropouts, step),
        ]
        self._first = stds if self._first is None else self._first
        measured, felt = ({name: row for name, row in rows.items() if row.count} for rows in (found, slopes))
        return Taken(measured, felt, closed, tuple(ranks[:, :SIGNALS].max(0).tolist()), findings)

    def _learn_wiring(self) -> None:
        """Let go of the wiring when the first step is over, and keep what it told."""
        wiring, self._ear.wiring = self._ear.wiring, None
        if wiring is not None:
            self._direct, self._dropouts = frozenset(wiring.direct), dict(wiring.dropouts)


def _has_rank(module: nn.Module) -> bool:
    return isinstance(module, WEIGHTED) or GROUPS["activation"](module)
