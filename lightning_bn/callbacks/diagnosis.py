# SPDX-License-Identifier: Apache-2.0
"""All monitors at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_bn.callbacks.activation_monitor import ActivationMonitor
from lightning_bn.callbacks.batchnorm_monitor import BatchNormMonitor
from lightning_bn.callbacks.nan_guard import NaNGuard

if TYPE_CHECKING:
    from lightning_bn.callbacks.base import Monitor


def diagnose() -> list[Monitor]:
    """The monitors, none of which changes the training of a healthy run.

    Returns:
        New instances of NaNGuard, ActivationMonitor (with gradients and updates) and BatchNormMonitor, for
        ``Trainer(callbacks=[*lightning_bn.diagnose()])``.

    Example:
        >>> [type(monitor).__name__ for monitor in diagnose()]
        ['NaNGuard', 'ActivationMonitor', 'BatchNormMonitor']
    """
    return [NaNGuard(), ActivationMonitor(parameters=True), BatchNormMonitor()]
