# SPDX-License-Identifier: Apache-2.0
"""What the runs of the study ``small_data`` say, in tables and in a few sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import cast

from lightning_bn.studies.small_data.rows import (
    NAMES,
    PLACES,
    STARTS,
    Run,
    in_words,
    is_sure,
    mean_and_error,
    paired,
    runs_of,
    values_of,
)
from lightning_bn.studies.small_data.verdicts import affine_verdicts, overfits
from lightning_bn.studies.study import Row

COLUMNS = {
    "best_loss": ("best val. loss", ".2f"),
    "last_loss": ("last", ".2f"),
    "rise": ("rise", ".2f"),
    "relative_rise": ("rise, relative", ".0%"),
    "best_epoch": ("best epoch", ".0f"),
    "best_acc": ("best accuracy", ".3f"),
    "last_acc": ("last", ".3f"),
    "train_loss": ("train loss", ".3f"),
    "memorised": ("wrong labels given back", ".0%"),
}
MEASURES = {
    "rise": ("rise of the validation loss", ".2f", 1),
    "relative_rise": ("the same, relative", ".0%", 1),
    "last_loss": ("last validation loss", ".2f", 1),
    "last_acc": ("last accuracy", ".3f", -1),
    "gap": ("last validation loss − training loss", ".2f", 1),
    "best_loss": ("best validation loss, where early stopping would end", ".2f", 1),
}
"""What is taken for overfitting: its name, its form, and 1 where more of it is worse."""


def tables(rows: list[Row]) -> str:
    """All runs, who overfits by which measure, and what BatchNormMonitor says."""
    rows = [with_gap(row) for row in rows]
    runs = (
        "**All runs.** Mean ± standard error over seeds; *rise*: last − best validation loss of a run. Train loss in "
        "eval mode after the last epoch, on the labels as given."
    )
    measures = (
        "**Who overfits by which measure?** Without dropout. *Worst*: the network with the worst mean, and those that "
        "it is worse than by three standard errors, in pairs of one seed."
    )
    monitor = (
        "**What BatchNormMonitor says.** *Share*: median bounds of the part of the rise that γ and β carry, where the "
        "run overfits; *statistics*: how much higher the validation loss is with the running statistics than with "
        "those of large batches without dropout (median); *effective samples* per channel, of 8."
    )
    parts = [(runs, all_runs), (measures, by_measure), (monitor, by_monitor)]
    return "\n\n".join(f"{words}\n\n{_joined(lines(rows))}" for words, lines in parts)


def _joined(lines: Iterator[str]) -> str:
    return "\n".join(lines)


def with_gap(row: Row) -> Row:
    """A row with the gap between training and validation."""
    return {**row, "gap": cast("float", row["last_loss"]) - cast("float", row["train_loss"])}


def all_runs(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each run."""
    yield "| labels | network | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"
    yield "|---|---|" + "---:|" * len(COLUMNS)
    for run in sorted(
        runs_of(rows),
        key=lambda run: (run.depth, run.noise, run.start != "pytorch", ["no", "all", "last"].index(run.dropout)),
    ):
        cells = (in_words(values_of(rows, run, name), form) for name, (_, form) in COLUMNS.items())
        yield f"| {run.place} | {run.label} | {' | '.join(cells)} |"


def by_measure(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each place and measure: the norms side by side, and which is the worst."""
    known = runs_of(rows)
    yield "| labels | measure | " + " | ".join(NAMES.values()) + " | worst |"
    yield "|---|---|" + "---:|" * len(NAMES) + "---|"
    for place in STARTS:
        mine = [run for norm in NAMES if (run := replace(place, norm=norm)) in known]
        for column, (name, form, sign) in MEASURES.items():
            found = {run: values for run in mine if (values := values_of(rows, run, column))}
            if not found:
                continue
            cells = (in_words(found.get(replace(place, norm=norm), []), form) for norm in NAMES)
            yield f"| {place.place} | {name} | {' | '.join(cells)} | {worst(rows, list(found), column, sign)} |"


def worst(rows: Sequence[Row], runs: Sequence[Run], column: str, sign: int) -> str:
    """The run with the worst mean, and those that it is worse than for sure; empty where there are none."""
    last = max(runs, key=lambda run: sign * mean_and_error(values_of(rows, run, column))[0])
    surely = [run.label for run in runs if run != last and is_sure(paired(rows, run, last, column), sign)]
    return f"{last.label}: worse than {', '.join(surely)}" if surely else ""


def by_monitor(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each run with BatchNorm."""
    yield "| labels | network | said, in how many runs | share of γ, β | statistics | effective samples |"
    yield "|---|---|---|---:|---:|---:|"
    for run in runs_of(rows):
        if run.norm != "batch":
            continue
        said = Counter(row["verdict"] for row in run.rows(rows))
        words = ", ".join(f"{rule}: {count}" for rule, count in said.most_common())
        wrong = sum(values_of(rows, run, "wrong_statistics"))
        words += f", wrong-running-statistics: {wrong:.0f}" if wrong else ""
        low, high = (_median(shares(rows, run, name), ".0%") for name in ("share_low", "share_high"))
        statistics = _median(values_of(rows, run, "statistics"), "+.0%")
        noise = _median(values_of(rows, run, "effective"), ".1f")
        share = f"{low} to {high}" if low else ""
        yield f"| {run.place} | {run.label} | {words} | {share} | {statistics} | {noise} |"


def shares(rows: Sequence[Row], run: Run, column: str) -> list[float]:
    """Bounds of the share of γ and β in those runs that overfit: of a rise that is none it would be any number."""
    return [cast("float", row[column]) for row in run.rows(rows) if overfits(row) and row[column] is not None]


def summary(rows: list[Row]) -> str:
    """Rise against accuracy, who is the worst by which, who carries the rise, and what dropout does."""
    rows = [with_gap(row) for row in rows]
    parts = (_rises(rows), _accuracies(rows), _worst_by_both(rows), _carriers(rows), _dropout(rows))
    return " ".join(filter(None, parts))


def _rises(rows: Sequence[Row]) -> str:
    words = "; ".join(_compared(rows, "rise", ".2f", place) for place in STARTS[1:])
    return f"From its best to its last epoch the validation loss rises by {words}."


def _accuracies(rows: Sequence[Row]) -> str:
    words = "; ".join(_compared(rows, "last_acc", ".3f", place) for place in STARTS)
    return f"The last accuracy is {words}."


def _compared(rows: Sequence[Row], column: str, form: str, place: Run) -> str:
    found = paired(rows, replace(place, norm="none"), place, column)
    sure = "surely different" if is_sure(found, 1) or is_sure(found, -1) else "not surely different"
    return (
        f"{found.after:{form}} with BatchNorm and {found.before:{form}} without for {place.place} "
        f"({sure}, z = {found.z:+.2f})"
    )


def _worst_by_both(rows: Sequence[Row]) -> str:
    runs = [Run(norm, noise=PLACES[1].noise) for norm in NAMES]
    found = {name: worst(rows, runs, name, MEASURES[name][2]) for name in ("rise", "last_acc")}
    words = [f"by the {MEASURES[name][0]} {text}" for name, text in found.items() if text]
    return f"Who overfits most with {PLACES[1].place} depends on the measure: {'; '.join(words)}." if words else ""


def _carriers(rows: Sequence[Row]) -> str:
    said = affine_verdicts(rows)
    return (
        f"Of {said.total()} runs with BatchNorm that overfit, γ and β drive {said['affine-driven-overfitting']} and "
        f"share in {said['shared-overfitting']}."
    )


def _dropout(rows: Sequence[Row]) -> str:
    words = []
    for norm, name in NAMES.items():
        found = paired(rows, Run(norm, noise=0.3), Run(norm, noise=0.3, dropout="all"), "last_loss")
        words.append(f"{name} {found.before:.2f} → {found.after:.2f}")
    return (
        f"Dropout behind each hidden layer takes the last validation loss with 30% label noise from {', '.join(words)}."
    )


def _median(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}}" if values else ""
