# SPDX-License-Identifier: Apache-2.0
"""A monitor of this package failed and switched itself off."""

from __future__ import annotations

import traceback

from lightning_bn.findings import Finding, Severity

RULE = "monitor-failed"


def monitor_failed(monitor: str, place: str, error: BaseException) -> Finding:
    """Report an internal error; training goes on without the monitor.

    Args:
        monitor: class name of the monitor.
        place: the hook in which it failed.
        error: what was raised.

    Returns:
        A ``warning`` with the traceback in its data.
    """
    evidence = f"{monitor} failed in {place} ({type(error).__name__}: {error}) and is off for the rest of this run"
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    advice = "training is not affected; please report this with the traceback in the finding's data"
    return Finding(RULE, Severity.WARNING, evidence, advice, data={"traceback": "".join(lines)})
