# SPDX-License-Identifier: Apache-2.0
"""An initialisation overwrites weights that do not look freshly drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile

from lightning_bn.findings import Finding, Severity

RULE = "overwritten-weights"


def overwritten_weights(marks: Mapping[str, str], total: int, scheme: str) -> Finding | None:
    """Say which parameters hold more than a fresh initialisation before they are overwritten.

    Args:
        marks: for each parameter with such values, by path, what tells them from fresh ones, in words; from
            ``why_not_drawn`` and ``why_not_new`` of :mod:`lightning_bn.stats.freshness`.
        total: number of parameters that are to be overwritten, those included.
        scheme: what they are to be overwritten by, as in the report.

    Returns:
        A ``warning``; None without marks.

    Example:
        >>> overwritten_weights({"backbone.0.weight": "mean 7.1 standard errors from 0"}, 2, "he").advice
        "to keep it, pass exclude=['backbone.0.*']"
    """
    if not marks:
        return None
    named = [f"{name} ({mark})" for name, mark in marks.items()]
    shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")  # noqa: PLR2004
    hold = "holds" if len(named) == 1 else "hold"
    were = "it was" if len(named) == 1 else "they were"
    evidence = (
        f"{len(named)} of {total} parameters that {scheme} is about to overwrite {hold} values that no usual "
        f"initialisation leaves: {shown}; {were} loaded, trained or set on purpose"
    )
    exclude = _globs(marks)
    advice = f"to keep {'it' if len(named) == 1 else 'them'}, pass exclude={exclude}"
    data = {"scheme": scheme, "total": total, "marks": dict(marks), "exclude": exclude}
    return Finding(RULE, Severity.WARNING, evidence, advice, data=data)


def _globs(names: Iterable[str]) -> list[str]:
    """One pattern for the deepest module that holds all parameters, or one for each of the outermost modules."""
    modules = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
    common = ".".join(parts[0] for parts in shared)
    if common:
        return [f"{common}.*"]
    return list(dict.fromkeys(f"{name.split('.')[0]}.*" if "." in name else name for name in names))
