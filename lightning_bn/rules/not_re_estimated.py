# SPDX-License-Identifier: Apache-2.0
"""Running statistics were not estimated anew, or not all of them, or from less than was asked for."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bn.findings import Finding, Severity

RULE = "not-re-estimated"
SHOWN = 3


def not_reestimated(why: str, remedy: str = "") -> Finding:
    """Say that all running statistics are left as training made them.

    Args:
        why: the reason.
        remedy: what the user can do about it, if anything.

    Returns:
        An ``info``.
    """
    return Finding(RULE, Severity.INFO, f"running statistics were not re-estimated: {why}", remedy)


def left_as_they_are(skipped: Mapping[str, str]) -> Finding | None:
    """Say which layers keep their running statistics, and why.

    Args:
        skipped: reason by layer.

    Returns:
        An ``info``; None without such layers.
    """
    if not skipped:
        return None
    names = [f"{name} ({why})" for name, why in skipped.items()]
    shown = "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    what = "1 layer keeps its" if len(names) == 1 else f"{len(names)} layers keep their"
    return Finding(RULE, Severity.INFO, f"{what} running statistics: {shown}", "", data={"skipped": dict(skipped)})


def spoilt(layer: str, layers: int) -> Finding:
    """Say that a batch with NaN or infinity came to a layer while it was measured.

    Args:
        layer: the first such layer, in the order of the model.
        layers: how many there are.

    Returns:
        A ``warning``.
    """
    more = "" if layers == 1 else f", and {layers - 1} more layers,"
    evidence = f"a batch with NaN or infinity reached {layer}{more} in the re-estimation: the old statistics stay there"
    advice = "add NaNGuard: it names the sample, the weight or the operation that NaN or infinity comes from"
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=layer, data={"layers": layers})


def fewer_samples(samples: int, wanted: int, gigabytes: float) -> Finding:
    """Say that fewer samples are used than were asked for, since more would not fit into memory.

    Args:
        samples: how many are kept on this process.
        wanted: how many were to be.
        gigabytes: the limit, in units of 10⁹ bytes.

    Returns:
        An ``info``.
    """
    evidence = (
        f"running statistics are re-estimated on {samples} samples a process, where {wanted} were asked for: "
        f"more would take over {gigabytes:g} GB of memory"
    )
    return Finding(RULE, Severity.INFO, evidence, "raise max_gigabytes", data={"samples": samples, "wanted": wanted})
