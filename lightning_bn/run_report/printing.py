# SPDX-License-Identifier: Apache-2.0
"""The report as a person reads it, and the exit status that a CI job reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_bn.findings import Finding, Severity
from lightning_bn.run_report.comparison import Comparison, Fault, Seen, compare, document
from lightning_bn.run_report.runs import Note, RunFindings, collect, shown_time
from lightning_bn.sinks import STYLES, tally, worst_first

FailOn = Literal["error", "warning", "info", "never"]
UNKNOWN = "either no monitor found anything, or none was attached; the files do not tell which"


def report(
    logdirs: Sequence[str], *, as_json: bool = False, fail_on: FailOn = "never", console: Console | None = None
) -> int:
    """Print what was found in one run, or compare several.

    Args:
        logdirs: log directories of runs, folders of such, findings files, or URLs of any of them.
        as_json: print one JSON document in place of tables.
        fail_on: the mildest severity that makes the exit status 1.
        console: where to print; None is standard output. Notes and errors go to standard error.

    Returns:
        The exit status: 0; 1 where a finding is as bad as ``fail_on`` or worse; 2 for bad input.
    """
    out, errors = console or Console(), Console(stderr=True)

    def note(text: str) -> None:
        errors.print(Text(f"lightning-bn report: {text}"), soft_wrap=True)

    try:
        limit = _limit(fail_on)
        everything = collect(logdirs, note=note)
    except ValueError as error:
        note(str(error))
        return 2
    runs, beside = ([run for run in everything if run.asked is wanted] for wanted in (True, False))
    if as_json:
        out.file.write(f"{json.dumps(document(everything), allow_nan=False, indent=1)}\n")
    else:
        _print(out, runs, beside)
    return _status(runs, limit, note)


def _limit(fail_on: str) -> Severity | None:
    if fail_on not in get_args(FailOn):
        raise ValueError(f"fail_on must be one of {', '.join(get_args(FailOn))}, got {fail_on!r}")
    return None if fail_on == "never" else Severity(fail_on)


def _status(runs: Sequence[RunFindings], limit: Severity | None, note: Note) -> int:
    if limit is None:
        return 0
    bad = [finding for run in runs for finding in run.findings if not limit.outweighs(finding.severity)]
    if bad:
        note(f"{tally(bad)}: exit status 1, as --fail-on {limit.value} asks")
    return 1 if bad else 0


def _print(console: Console, runs: Sequence[RunFindings], beside: Sequence[RunFindings]) -> None:
    if len(runs) == 1:
        _print_run(console, runs[0])
    elif any(run.said for run in runs):
        _print_comparison(console, runs)
    else:
        for run in runs:
            _say(console, _silence(run))
    if beside:
        names = ", ".join(run.name for run in beside)
        _say(console, f"Left out, as without a findings file: {names}. There, {UNKNOWN}. Name them to have them in.")


def _print_run(console: Console, run: RunFindings) -> None:
    if not run.said:
        _say(console, _silence(run))
        return
    console.print(_details(f"{run.name}, {_began(run)}", run.findings))
    _say(console, f"{tally(run.findings)}, said by {', '.join(run.monitors) or 'unknown'}; {_shown(run.path)}")


def _silence(run: RunFindings) -> str:
    if run.has_file:
        return f"{run.name}: nothing to show; the findings file of {_shown(run.path)} has no readable finding."
    return f"{run.name}: nothing found; no findings file lies below {_shown(run.path)}. That is, {UNKNOWN}."


def _print_comparison(console: Console, runs: Sequence[RunFindings]) -> None:
    comparison = compare(runs)
    names, numbers = [run.name for run in runs], [str(number) for number in range(1, len(runs) + 1)]
    tables = [
        _in_columns(comparison.faults, names),
        _in_columns(comparison.faults, names, stacked=True),
        _in_columns(comparison.faults, numbers, stacked=True),
    ]
    unbound = console.options.update(width=10_000)
    fitting = [table for table in tables if console.measure(table, options=unbound).maximum <= console.width]
    console.print(fitting[0] if fitting else _in_words(comparison.faults))
    _print_changes(console, runs[0], runs[-1], comparison)
    console.print(_counts(runs))


def _in_columns(faults: Sequence[Fault], heads: Sequence[str], *, stacked: bool = False) -> Table:
    """A row for each fault, a column for each run; ``stacked`` takes two lines for a row, and less width."""
    table = _table(f"{len(heads)} runs, fault by fault", show_lines=stacked)
    places = ["rule, layer"] if stacked else ["rule", "layer"]
    for head in (*places, *heads):
        table.add_column(Text(head), no_wrap=True)
    for fault in faults:
        where = (fault.rule, fault.layer or "")
        first = [Text("\n".join(where).strip())] if stacked else [Text(part) for part in where]
        table.add_row(*first, *(_cell(seen, "\n" if stacked else ", ") for seen in fault.seen))
    return table


def _in_words(faults: Sequence[Fault]) -> Table:
    """A row for each fault, which names the runs by number: for more of them than there is room for columns."""
    table = _table(f"{len(faults[0].seen)} runs, fault by fault", show_lines=True)
    table.add_column("rule, layer", overflow="fold")
    table.add_column("run@first step")
    for fault in faults:
        said = Text()
        for kind in reversed(Severity):
            runs = [(number, seen) for number, seen in enumerate(fault.seen, start=1) if seen]
            words = [f"{number}{_step(seen, '@{}')}" for number, seen in runs if seen.severity is kind]
            if words:
                said.append(f"{kind.value}: {', '.join(words)}\n", STYLES[kind])
        said.rstrip()
        table.add_row(Text(f"{fault.rule}\n{fault.layer or ''}".strip()), said)
    return table


def _details(title: str, findings: Sequence[Finding]) -> Table:
    """A row for each finding, worst first; the words get most of the width, and none of them is cut."""
    table = _table(title, show_lines=True)
    table.add_column("finding", overflow="fold", max_width=40)
    table.add_column("what was seen, and what to do", overflow="fold", ratio=1)
    for finding in worst_first(findings):
        numbers = {"epoch": finding.epoch, "step": finding.step}
        when = ", ".join(f"{name} {number}" for name, number in numbers.items() if number is not None)
        where = [finding.severity.value, finding.rule, finding.layer, when]
        words = f"{finding.evidence}\n-> {finding.advice}" if finding.advice else finding.evidence
        table.add_row(Text("\n".join(filter(None, where))), Text(words), style=STYLES[finding.severity])
    return table


def _print_changes(console: Console, first: RunFindings, last: RunFindings, comparison: Comparison) -> None:
    both = sum(bool(fault.seen[0] and fault.seen[-1]) for fault in comparison.faults)
    new, gone = comparison.new, comparison.gone
    _say(console, f"From {first.name} to {last.name}: {len(new)} new, {len(gone)} gone, {both} in both.")
    for fault, seen in ((fault, fault.seen[0]) for fault in gone):
        _say(console, f"  gone: {seen.severity.value if seen else ''} {fault.rule} {fault.layer or ''}".rstrip())
    if gone:
        _say(console, "  Gone is not cured: the last run may have had other monitors.")
    for run in (first, last):
        if not run.has_file:
            _say(console, f"  {run.name} has no findings file: {UNKNOWN}.")
    if new:
        keys = {(fault.rule, fault.layer) for fault in new}
        findings = [finding for finding in last.findings if (finding.rule, finding.layer) in keys]
        console.print(_details(f"new in {last.name}", findings))


def _counts(runs: Sequence[RunFindings]) -> Table:
    table = _table("how many in each run")
    table.add_column("", no_wrap=True)
    table.add_column("run", overflow="fold")
    table.add_column("start (UTC)", no_wrap=True)
    for kind in reversed(Severity):
        table.add_column(kind.value, justify="right")
    for number, run in enumerate(runs, start=1):
        counts = [str(sum(finding.severity is kind for finding in run.findings)) for kind in reversed(Severity)]
        remark = "" if run.said else "\nno readable finding" if run.has_file else "\nno findings file"
        start = "" if run.start is None else shown_time(run.start)
        table.add_row(*map(Text, (str(number), f"{run.name}{remark}", start, *counts)))
    return table


def _table(title: str, *, show_lines: bool = False) -> Table:
    return Table(title=Text(title), title_justify="left", show_lines=show_lines)


def _cell(seen: Seen | None, between: str) -> Text:
    return (
        Text(f"{seen.severity.value}{_step(seen, f'{between}step {{}}')}", STYLES[seen.severity]) if seen else Text("-")
    )


def _step(seen: Seen, text: str) -> str:
    return "" if seen.step is None else text.format(seen.step)


def _shown(path: str) -> str:
    """A path as a person would type it: relative where it lies below the working directory."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _began(run: RunFindings) -> str:
    return "start unknown" if run.start is None else f"begun {shown_time(run.start)} UTC"


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
