# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: which fault was said in which, and what came and went; the same as plain JSON types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lightning_bn.findings import Severity
from lightning_bn.run_report.runs import RunFindings, Said

SCHEMA_VERSION = 1
"""Raised where a key of the JSON document goes away or changes its meaning; new keys leave it as it is."""


@dataclass(frozen=True)
class Seen:
    """How one run said a fault.

    Args:
        severity: the worst.
        step: the first, if any was given.
    """

    severity: Severity
    step: int | None


@dataclass(frozen=True)
class Fault:
    """One fault in several runs.

    Args:
        rule: its rule.
        layer: its layer, if one is meant.
        seen: how each run said it; None where a run did not.
    """

    rule: str
    layer: str | None
    seen: tuple[Seen | None, ...]

    @property
    def worst(self) -> Severity:
        """Its worst severity in any run."""
        return _worst([seen.severity for seen in self.seen if seen])


@dataclass(frozen=True)
class Comparison:
    """The faults of two runs or more.

    Args:
        faults: all of them, worst first; in each severity, in the order in which they were first said.
        new: those that the last run said and the first did not.
        gone: those that the first run said and the last did not.
    """

    faults: tuple[Fault, ...]
    new: tuple[Fault, ...]
    gone: tuple[Fault, ...]


def compare(runs: Sequence[RunFindings]) -> Comparison:
    """Compare runs fault by fault; findings of one rule on one layer are one fault.

    Args:
        runs: at least one run, in order.

    Raises:
        ValueError: where there is none.
    """
    if not runs:
        raise ValueError("runs must be at least one run, got none")
    said = [_faults_of(run) for run in runs]
    keys = dict.fromkeys(key for faults in said for key in faults)
    faults = [Fault(*key, tuple(faults.get(key) for faults in said)) for key in keys]
    faults.sort(key=lambda fault: list(Severity).index(fault.worst), reverse=True)
    return Comparison(
        tuple(faults),
        new=tuple(fault for fault in faults if fault.seen[-1] and not fault.seen[0]),
        gone=tuple(fault for fault in faults if fault.seen[0] and not fault.seen[-1]),
    )


def document(runs: Sequence[RunFindings]) -> dict[str, Any]:
    """All runs and their comparison in plain JSON types.

    Args:
        runs: as :func:`~lightning_bn.run_report.collect` gives them.

    Returns:
        ``schema_version``, ``runs``, ``without_findings_file`` (paths of the runs that were not asked for) and
        ``comparison``, which is None for fewer than two runs.
    """
    asked = [run for run in runs if run.asked]
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [_run(run) for run in asked],
        "without_findings_file": [run.path for run in runs if not run.asked],
        "comparison": _comparison(asked) if len(asked) > 1 else None,
    }


def _faults_of(run: RunFindings) -> dict[tuple[str, str | None], Seen]:
    severities: dict[tuple[str, str | None], list[Severity]] = {}
    steps: dict[tuple[str, str | None], list[int]] = {}
    for finding in run.findings:
        key = (finding.rule, finding.layer)
        severities.setdefault(key, []).append(finding.severity)
        steps.setdefault(key, []).extend([] if finding.step is None else [finding.step])
    return {key: Seen(_worst(severities[key]), min(steps[key], default=None)) for key in severities}


def _worst(severities: Sequence[Severity]) -> Severity:
    return max(severities, key=list(Severity).index)


def _run(run: RunFindings) -> dict[str, Any]:
    return {
        "name": run.name,
        "path": run.path,
        "run": _time(run.start),
        "findings_file": run.has_file,
        "monitors": run.monitors,
        "findings": [_finding(said) for said in run.said],
        "counts": {
            kind.value: sum(finding.severity is kind for finding in run.findings) for kind in reversed(Severity)
        },
    }


def _finding(said: Said) -> dict[str, Any]:
    return {"time": _time(said.time), "monitor": said.monitor, **said.finding.to_dict()}


def _comparison(runs: Sequence[RunFindings]) -> dict[str, Any]:
    comparison = compare(runs)
    return {
        "first": runs[0].name,
        "last": runs[-1].name,
        "faults": [{**_fault(fault), "runs": [_seen(seen) for seen in fault.seen]} for fault in comparison.faults],
        "new": [_fault(fault) for fault in comparison.new],
        "gone": [_fault(fault) for fault in comparison.gone],
    }


def _fault(fault: Fault) -> dict[str, Any]:
    return {"rule": fault.rule, "layer": fault.layer}


def _seen(seen: Seen | None) -> dict[str, Any] | None:
    return None if seen is None else {"severity": seen.severity.value, "step": seen.step}


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
