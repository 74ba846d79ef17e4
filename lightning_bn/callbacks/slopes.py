# SPDX-License-Identifier: Apache-2.0
"""Gradients of the loss with respect to the outputs of layers, measured as backward passes them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_bn.callbacks.tally import Reader, Tally
from lightning_bn.stats.finite import is_measurable
from lightning_bn.stats.moments import Rows, pool

Feel = Callable[[str, Tensor], None]
"""Called in backward with the name of a layer and the gradient with respect to a tensor of its output."""


class Slopes:
    """Follows the outputs of one due step into backward; the numbers stay on the device until they are asked for.

    A hook on an output changes nothing: it returns nothing, and it holds on neither to the output nor to its graph.
    All of them are taken off by :meth:`let_go`, so that a graph that lives on is not followed any further. An output
    that is changed in place behind the layer is followed as it was before.

    Args:
        layers: names, in the order of the rows.
        device: where numbers are put together.
        feel: is called for each gradient, and is to call :meth:`feel`.
    """

    def __init__(self, layers: Iterable[str], device: torch.device, feel: Feel) -> None:
        self._places = {name: place for place, name in enumerate(layers)}
        self._feel, self._tally = feel, Tally(device)
        self._handles: list[RemovableHandle] = []
        self.careful = set(self._places)
        """Layers whose gradients plain sums would lose, or of which nothing is known yet: measured in two passes."""
        self.factor: Tensor | None = None
        """What gradients are multiplied by to undo the scaling of the loss, 0-dimensional; None where there is none."""

    def begin(self) -> None:
        """Forget what was felt."""
        self.let_go()
        self._tally.clear()

    def let_go(self) -> None:
        """Take the hooks off the outputs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def follow(self, name: str, output: Tensor) -> None:
        """Have the gradient with respect to an output felt, if there will be one."""
        if output.requires_grad:
            handle = output.register_hook(_Hook(name, self._feel))  # type: ignore[no-untyped-call]  # torch's own
            self._handles.append(handle)

    def feel(self, name: str, gradient: Tensor) -> None:
        """Measure a gradient; without recording operations for another backward pass, nor in half precision."""
        x = gradient.detach()
        x = x.to_local() if hasattr(x, "to_local") else x  # a DTensor: this rank's shard
        if self.factor is not None:
            x = (x if x.dtype == torch.float64 else x.float()) * self.factor.to(x.device)
        self._tally.add(self._places[name], x, careful=name in self.careful)

    def parts(self) -> list[Tensor]:
        """What is to come to the host."""
        return self._tally.parts()

    def read(self, host: Reader) -> Rows:
        """Take it there: the pooled row of each layer, ``(layers, 8)``."""
        self._tally.read(host)
        return pool(*self._tally.rows(), len(self._places))


class _Hook:
    """Tells of the gradient of one output."""

    __torch_unserializable__ = True  # who saves the output meanwhile is not warned that this stays behind

    def __init__(self, name: str, feel: Feel) -> None:
        self._name, self._feel = name, feel

    def __call__(self, gradient: Tensor | None) -> None:
        # None where a function has no gradient for this one of its outputs.
        if gradient is None or not is_measurable(gradient) or gradient.is_complex():
            return
        kind = gradient.device.type
        # Backward may record itself (create_graph), and may have been called inside of autocast.
        with torch.no_grad(), torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            self._feel(self._name, gradient)
