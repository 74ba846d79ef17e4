# SPDX-License-Identifier: Apache-2.0
"""Callbacks for PyTorch Lightning that tell why a network does not train.

Public names are loaded when they are first used: ``import lightning_bn`` alone imports neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bn.callbacks.activation_monitor import ActivationMonitor
    from lightning_bn.callbacks.batchnorm_monitor import BatchNormMonitor
    from lightning_bn.callbacks.diagnosis import diagnose
    from lightning_bn.callbacks.nan_guard import NaNGuard
    from lightning_bn.callbacks.precise_batchnorm import PreciseBatchNorm
    from lightning_bn.callbacks.preflight_audit import PreflightAudit
    from lightning_bn.callbacks.swap_batchnorm import SwapBatchNorm
    from lightning_bn.callbacks.weight_init import WeightInit
    from lightning_bn.findings import Finding, NonFiniteError, Severity
    from lightning_bn.initialization import initialize
    from lightning_bn.locate import locate_nonfinite
    from lightning_bn.norms import find_batchnorm
    from lightning_bn.precise import precise_statistics
    from lightning_bn.sinks import read_findings
    from lightning_bn.swap import swap_batchnorm

__version__ = "0.1.0"

__all__ = [
    "ActivationMonitor",
    "BatchNormMonitor",
    "Finding",
    "NaNGuard",
    "NonFiniteError",
    "PreciseBatchNorm",
    "PreflightAudit",
    "Severity",
    "SwapBatchNorm",
    "WeightInit",
    "diagnose",
    "find_batchnorm",
    "initialize",
    "locate_nonfinite",
    "precise_statistics",
    "read_findings",
    "swap_batchnorm",
]

_HOMES = {
    "ActivationMonitor": "callbacks.activation_monitor",
    "BatchNormMonitor": "callbacks.batchnorm_monitor",
    "Finding": "findings",
    "NaNGuard": "callbacks.nan_guard",
    "NonFiniteError": "findings",
    "PreciseBatchNorm": "callbacks.precise_batchnorm",
    "PreflightAudit": "callbacks.preflight_audit",
    "Severity": "findings",
    "SwapBatchNorm": "callbacks.swap_batchnorm",
    "WeightInit": "callbacks.weight_init",
    "diagnose": "callbacks.diagnosis",
    "find_batchnorm": "norms",
    "initialize": "initialization",
    "locate_nonfinite": "locate",
    "precise_statistics": "precise",
    "read_findings": "sinks",
    "swap_batchnorm": "swap",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
