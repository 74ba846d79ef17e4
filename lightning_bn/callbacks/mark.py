# SPDX-License-Identifier: Apache-2.0
"""Remember on a LightningModule what was initialised, so that nothing is initialised twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

MARK = "_lightning_bn_initialised"
"""Attribute of a LightningModule that was initialised: it travels with copies of the module, not with its weights."""


@dataclass
class Mark:
    """What was initialised in a model.

    Args:
        scheme: by what; of several instances in one fit, by the first.
        names: the parameters, by path.
        open: whether the fit has not begun to train: another instance may still initialise others.
    """

    scheme: str
    names: set[str]
    open: bool = True


def mark_of(pl_module: LightningModule) -> Mark | None:
    """What was initialised in a model; None for nothing."""
    mark = vars(pl_module).get(MARK)
    return mark if isinstance(mark, Mark) else None


def set_mark(pl_module: LightningModule, mark: Mark) -> None:
    """Leave a mark on a model."""
    vars(pl_module)[MARK] = mark


def close_mark(pl_module: LightningModule) -> None:
    """From now on a model is trained, and no other fit may initialise it."""
    mark = mark_of(pl_module)
    if mark is not None:
        mark.open = False
