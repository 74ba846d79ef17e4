# SPDX-License-Identifier: Apache-2.0
"""Run something when a LightningModule has built all its layers, and before a checkpoint is restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

WRAPS = "_lightning_bn_wraps"
"""Attribute of a wrapper: what stood in its place on the instance, or None."""


def after_building(pl_module: LightningModule, act: Callable[[], None]) -> None:
    """Call ``act`` when the layers are built: now, or after the project's own ``setup`` or ``configure_model``.

    No callback hook runs between those two and the restore of a checkpoint. Lightning calls an attribute of the
    instance in place of the method. ``configure_model`` may be called twice (WeightAveraging does that), and
    ``act`` with it. ``configure_model`` is wrapped only where the project has one: Lightning asks whether it is
    overridden, and sharded strategies insist on it.

    Args:
        pl_module: the model, in a callback's ``setup``.
        act: what to do; it may run more than once.
    """
    hook = next((name for name in ("configure_model", "setup") if _is_own(getattr(pl_module, name))), None)
    if hook is None:
        act()
        return
    present = getattr(pl_module, hook)

    def then_act(*args: Any, **kwargs: Any) -> None:
        present(*args, **kwargs)
        act()

    setattr(then_act, WRAPS, vars(pl_module).get(hook))
    vars(pl_module)[hook] = then_act


def as_before(pl_module: LightningModule) -> None:
    """Take all wrappers off a model: its hooks are those of its class again, or the user's own."""
    for hook in ("configure_model", "setup"):
        present = vars(pl_module).pop(hook, None)
        while hasattr(present, WRAPS):
            present = getattr(present, WRAPS)
        if present is not None:
            vars(pl_module)[hook] = present


def _is_own(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith(("lightning.pytorch.", "pytorch_lightning."))
