# SPDX-License-Identifier: Apache-2.0
"""Run something when a LightningModule has built all its layers, and before a checkpoint is restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

ACTS, WRAPS = "_lightning_bn_acts", "_lightning_bn_wraps"
"""Attributes of a wrapper: what is called behind it, and what stood in its place on the instance, or None."""


def after_building(pl_module: LightningModule, act: Callable[[], None]) -> Callable[[], None]:
    """Call ``act`` when the layers are built: now, or after the project's own ``setup`` or ``configure_model``.

    No callback hook runs between those two and the restore of a checkpoint. Lightning calls an attribute of the
    instance in place of the method. ``configure_model`` may be called twice (WeightAveraging does that), and
    ``act`` with it. ``configure_model`` is wrapped only where the project has one: Lightning asks whether it is
    overridden, and sharded strategies insist on it. Who asks first acts first.

    Args:
        pl_module: the model, in a callback's ``setup``.
        act: what to do; it may run more than once.

    Returns:
        What takes it back; when the last one has, the hook is that of its class again, or the user's own.
    """
    hook = next((name for name in ("configure_model", "setup") if _is_own(getattr(pl_module, name))), None)
    if hook is None:
        act()
        return lambda: None
    acts = _acts_behind(pl_module, hook)
    acts.append(act)
    return lambda: _take_back(pl_module, hook, acts, act)


def _acts_behind(pl_module: LightningModule, hook: str) -> list[Callable[[], None]]:
    """What is called behind a hook; it is wrapped if it is not yet."""
    present = getattr(pl_module, hook)
    known: list[Callable[[], None]] | None = getattr(present, ACTS, None)
    if known is not None:
        return known
    acts: list[Callable[[], None]] = []

    def then_act(*args: Any, **kwargs: Any) -> None:
        present(*args, **kwargs)
        for act in [*acts]:
            act()

    setattr(then_act, ACTS, acts)
    setattr(then_act, WRAPS, vars(pl_module).get(hook))
    vars(pl_module)[hook] = then_act
    return acts


def _take_back(pl_module: LightningModule, hook: str, acts: list[Callable[[], None]], act: Callable[[], None]) -> None:
    acts[:] = [other for other in acts if other is not act]
    wrapper = vars(pl_module).get(hook)
    if acts or getattr(wrapper, ACTS, None) is not acts:
        return
    before = getattr(vars(pl_module).pop(hook), WRAPS)
    if before is not None:
        vars(pl_module)[hook] = before


def _is_own(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(("lightning.pytorch.", "pytorch_lightning."))
