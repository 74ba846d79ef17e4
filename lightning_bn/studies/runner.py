# SPDX-License-Identifier: Apache-2.0
"""Make the runs of a study that are missing, side by side, and write down what they show."""

from __future__ import annotations

import multiprocessing
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lightning_bn.studies import load_study
from lightning_bn.studies.results import Results
from lightning_bn.studies.study import Row, Setting, Study, Verdict


def run_study(name: str, out: Path, *, seeds: int | None = None, jobs: int = 2, console: Console | None = None) -> None:
    """Run a study, or what is missing of it, and write ``NAME.csv``, ``NAME.png`` and ``NAME.md``.

    Args:
        name: which study.
        out: folder for the files; the runs that ``NAME.csv`` there holds are not made again.
        seeds: how many seeds; None takes the study's own number.
        jobs: how many processes, of one thread each.
        console: where progress and verdicts are shown.

    Raises:
        ValueError: for a name that is none, fewer than one seed or job, or a file of another study in the way.
    """
    study, console = load_study(name), console or Console()
    for argument, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    settings = study.settings(range(seeds or study.seeds))
    results = Results(out / f"{name}.csv")
    missing = [setting for setting in settings if results.row_of(setting) is None]
    try:
        make_runs(study, missing, results, jobs=jobs, console=console)
    except KeyboardInterrupt:
        console.print(f"Stopped. {results.path} keeps {len(results.rows)} runs; the same command makes the others.")
        raise
    rows = [row for setting in settings if (row := results.row_of(setting)) is not None]
    try:
        write_report(study, rows, out)
        show(study, rows, console)
    except KeyError as error:  # all runs are there, and were made by another version
        raise ValueError(f"{results.path} needs a column {error}, got {', '.join(rows[0])}; move it away") from error
    console.print(f"{out / name}.csv, .png and .md", highlight=False, soft_wrap=True)


def make_runs(study: Study, settings: Sequence[Setting], results: Results, *, jobs: int, console: Console) -> None:
    """Make runs and keep each as soon as it is there, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        measured(study, settings, jobs) as rows,
    ):
        task = progress.add_task(f"study {study.name}", total=len(settings))
        for row in rows:
            results.append(row)
            progress.advance(task)


@contextmanager
def measured(study: Study, settings: Sequence[Setting], jobs: int) -> Iterator[Iterator[Row]]:
    """The rows of settings, in the order in which they are ready; of one job in this process."""
    if jobs == 1 or len(settings) < 2:  # noqa: PLR2004  (a single run needs no second process)
        yield (measure(study.name, setting) for setting in settings)
        return
    # Spawned, as torch's threads do not survive a fork; an interrupt goes to the parent, which cancels what waits.
    pool = ProcessPoolExecutor(min(jobs, len(settings)), mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = [pool.submit(measure, study.name, setting) for setting in settings]
        yield (future.result() for future in as_completed(waiting))
    finally:
        pool.shutdown(cancel_futures=True)


def measure(name: str, setting: Setting) -> Row:
    """One run of a study, on one thread: the setting and what was measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order, whatever the number of jobs
    try:
        return {**setting, **load_study(name).measure(setting)}
    finally:
        torch.set_num_threads(threads)


def write_report(study: Study, rows: list[Row], out: Path) -> None:
    """Write the figure and the page of a study."""
    out.mkdir(parents=True, exist_ok=True)
    study.draw(rows).savefig(out / f"{study.name}.png", dpi=120)
    (out / f"{study.name}.md").write_text(page(study, rows), encoding="utf-8")


def page(study: Study, rows: list[Row]) -> str:
    """What a study showed, as markdown: how it was measured, tables, figure, verdicts and a summary."""
    seeds = len({row["seed"] for row in rows})
    made = f"{len(rows)} runs, {seeds} seed{'s' * (seeds != 1)}; torch {torch.__version__}, {platform.machine()}, CPU"
    command = f"lightning-bn study {study.name}" + f" --seeds {seeds}" * (seeds != study.seeds)
    lines = ["| claim | verdict | measured here | published |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(_cells(verdict)) + " |" for verdict in study.verdicts(rows)]
    parts = [
        f"Measured by `{command}` ({made}).",
        study.summary(rows),
        study.tables(rows),
        f"![The runs of the study {study.name}]({study.name}.png)",
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


def show(study: Study, rows: list[Row], console: Console) -> None:
    """Print the verdicts and the summary."""
    table = Table(title=f"study {study.name}", show_lines=True, title_justify="left")
    table.add_column("claim", ratio=3)
    table.add_column("verdict", no_wrap=True)
    table.add_column("measured here", ratio=4)
    table.add_column("published", ratio=3)
    for verdict in study.verdicts(rows):
        table.add_row(verdict.claim, verdict.verdict, verdict.measured, verdict.published)
    console.print(table)
    console.print(study.summary(rows), highlight=False)


def default_jobs() -> int:
    """Two processes, or one on a machine with one core."""
    return min(2, os.cpu_count() or 1)


def _cells(verdict: Verdict) -> list[str]:
    words = (verdict.claim, verdict.verdict, verdict.measured, verdict.published)
    return [word.replace("|", "\\|").replace("\n", " ") for word in words]
