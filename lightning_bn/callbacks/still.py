# SPDX-License-Identifier: Apache-2.0
"""Let a ``training_step`` with manual optimisation run while its optimizers and schedulers stand still."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class Judge(Protocol):
    """Looks at losses and gradients; see :mod:`lightning_bn.replay`."""

    def __call__(self, loss: Tensor) -> None:
        """Judge a loss, run its backward pass, judge the gradients."""

    def gradients(self) -> None:
        """Judge the gradients as they are."""


class Still:
    """Takes the place of an optimizer or a scheduler: everything works but ``step``, which only judges.

    Args:
        real: what it takes the place of.
        judge: called where the real one would have changed the weights.
    """

    def __init__(self, real: Any, judge: Callable[[], None]) -> None:
        self._real = real
        self._judge = judge

    @property  # type: ignore[misc]  # what isinstance asks
    def __class__(self) -> type:
        """The class of the real one."""
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        """Whatever the real one has."""
        return getattr(self._real, name)

    def step(self, *args: Any, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Run the closure, if there is one, and judge the gradients in place of a step."""
        closure = closure or next((entry for entry in args if callable(entry)), None)
        result = closure() if closure is not None else None
        self._judge()
        return result


def hold_still(pl_module: LightningModule, judge: Judge) -> None:
    """Give a LightningModule optimizers that stand still; to be undone by the quarantine around it.

    Args:
        pl_module: the model, in a quarantine, which removes what is set here.
        judge: gets each loss that the step differentiates.
    """
    optimizers, schedulers = pl_module.optimizers, pl_module.lr_schedulers

    def stand_in(real: Any, look: Callable[[], None]) -> Any:
        if isinstance(real, list | tuple):
            return type(real)([stand_in(entry, look) for entry in real])
        return None if real is None else Still(real, look)

    vars(pl_module).update(
        optimizers=lambda *args, **kwargs: stand_in(optimizers(*args, **kwargs), judge.gradients),
        lr_schedulers=lambda: stand_in(schedulers(), lambda: None),
        manual_backward=lambda loss, *_, **__: judge(loss),
    )
