# SPDX-License-Identifier: Apache-2.0
"""All monitors at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_bn.callbacks.activation_monitor import ActivationMonitor
from lightning_bn.callbacks.batchnorm_monitor import BatchNormMonitor
from lightning_bn.callbacks.nan_guard import NaNGuard
from lightning_bn.callbacks.preflight_audit import PreflightAudit
from lightning_bn.rules import dropout_before_batchnorm

if TYPE_CHECKING:
    from lightning_bn.callbacks.base import Monitor


def diagnose() -> list[Monitor]:
    """The monitors, none of which changes the training of a healthy run.

    Returns:
        New instances of PreflightAudit, NaNGuard, ActivationMonitor (with gradients and updates) and BatchNormMonitor,
        for ``Trainer(callbacks=[*lightning_bn.diagnose()])``.

    Example:
        >>> [type(monitor).__name__ for monitor in diagnose()]
        ['PreflightAudit', 'NaNGuard', 'ActivationMonitor', 'BatchNormMonitor']
    """
    said_before = [dropout_before_batchnorm.RULE]
    return [PreflightAudit(), NaNGuard(), ActivationMonitor(parameters=True, ignore=said_before), BatchNormMonitor()]
