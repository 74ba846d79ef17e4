# SPDX-License-Identifier: Apache-2.0
"""What a monitor has to say: a severity, a finding, and the exception that carries findings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any


class Severity(str, Enum):
    """How bad a finding is.

    Example:
        >>> Severity.ERROR.outweighs(Severity.WARNING)
        True
    """

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    def outweighs(self, other: Severity) -> bool:
        """Whether this severity is strictly worse than ``other``."""
        order = list(Severity)
        return order.index(self) > order.index(other)


@dataclass(frozen=True)
class Finding:
    """One fault, or one fact, about a run.

    Args:
        rule: stable slug named after the fault, such as ``non-finite-output``.
        severity: ``info``, ``warning`` or ``error``.
        evidence: what was seen, with numbers and units, and no "should".
        advice: one action; empty where none is needed.
        layer: module path in the model, if one layer is meant.
        step: number of optimizer steps taken before, as ``self.log`` counts them.
        epoch: epoch, counted from 0.
        data: the numbers behind the evidence, plain JSON types only.

    Example:
        >>> finding = Finding("non-finite-loss", Severity.ERROR, "the loss is NaN", "look at the loss")
        >>> Finding.from_dict(finding.to_dict()) == finding
        True
    """

    rule: str
    severity: Severity
    evidence: str
    advice: str
    layer: str | None = None
    step: int | None = None
    epoch: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN and infinities become the strings ``NaN``, ``Infinity``, ``-Infinity``."""
        row = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        row["severity"] = self.severity.value
        return {name: _plain(value) for name, value in row.items()}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Finding:
        """The finding that :meth:`to_dict` wrote; keys that a finding does not have are passed over.

        Raises:
            KeyError: where ``rule``, ``severity``, ``evidence`` or ``advice`` is missing.
        """
        known = {entry.name for entry in fields(cls)}
        values = {name: value for name, value in row.items() if name in known}
        values["severity"] = Severity(row["severity"])
        values["data"] = dict(values.get("data") or {})
        for required in ("rule", "evidence", "advice"):
            values[required] = row[required]
        return cls(**values)


class NonFiniteError(RuntimeError):
    """NaN or infinity was found and ``action="raise"`` was asked for; the message is the report.

    Args:
        message: the report, as printed on the console.
        findings: what the report was made from.
    """

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, tuple[Finding, ...]]]:
        """Keep the findings when a spawned process hands the exception to its parent."""
        return type(self), (str(self), self.findings)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
