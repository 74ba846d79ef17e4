# SPDX-License-Identifier: Apache-2.0
"""Where findings and numbers go: a JSONL file, the console, the user's loggers."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from lightning_bn.findings import Finding, Severity

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FOLDER = "lightning_bn"
FILE = "findings.jsonl"
Print = Callable[[str], None]


class FindingsFile:
    """``findings.jsonl``: one JSON object a line, on disk as soon as it is said.

    The file is opened, appended to and closed for each finding, so that nothing is lost with the process and
    nothing stays open in a copied or pickled callback.

    Args:
        log_dir: directory of the run, local or any URL that fsspec can append to.
    """

    def __init__(self, log_dir: str) -> None:
        root = log_dir if log_dir.endswith("://") else f"{log_dir.rstrip('/')}/"
        self.path = f"{root}{FOLDER}/{FILE}"

    @property
    def shown(self) -> str:
        """The path as a person would type it: relative where it lies below the working directory."""
        path, here = Path(self.path), Path.cwd()
        return str(path.relative_to(here)) if path.is_relative_to(here) else self.path

    def append(self, finding: Finding, **context: Any) -> None:
        """Write one finding with the present time (UTC) and the given context."""
        row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            **context,
            **finding.to_dict(),
        }
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        filesystem, path = fsspec.core.url_to_fs(self.path)
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)  # noqa: SLF001  (fsspec's own path splitting)
        cut_off = filesystem.exists(path) and filesystem.tail(path, 1) not in {b"", b"\n"}  # by a killed process
        with filesystem.open(path, "ab") as file:
            file.write((b"\n" if cut_off else b"") + f"{line}\n".encode())

    def write_beside(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the same folder, in place of the one that is there.

        Args:
            name: file name.
            content: plain JSON types.
        """
        filesystem, path = fsspec.core.url_to_fs(f"{self.path.removesuffix(FILE)}{name}")
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)  # noqa: SLF001  (fsspec's own path splitting)
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1)
        filesystem.pipe_file(path, f"{text}\n".encode())


def read_findings(log_dir: str | os.PathLike[str]) -> list[Finding]:
    """The findings of a run, in the order in which they were said.

    A line that is no finding, such as one that a killed process left unfinished, is passed over with a warning:
    the others are still readable.

    Args:
        log_dir: directory of the run, or the path of a ``.jsonl`` file.

    Returns:
        The findings; an empty list where nothing was ever found.
    """
    path = os.fspath(log_dir)
    path = path if path.endswith(".jsonl") else FindingsFile(path).path
    filesystem, place = fsspec.core.url_to_fs(path)
    notes: list[str] = []
    findings = [finding for finding, _ in read_rows(filesystem, place, notes.append)]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return findings


def read_rows(filesystem: Any, path: str, note: Print) -> Iterator[tuple[Finding, dict[str, Any]]]:
    """Each finding of a file, with all that its line says: the time, and the context that it was written with.

    Args:
        filesystem: an fsspec file system.
        path: the file on it; one that is not there has no findings.
        note: takes a sentence for each line that is no finding, and is passed over.

    Yields:
        The finding and its row, in the order in which they were said.
    """
    if not filesystem.exists(path):
        return
    for number, line in enumerate(filesystem.cat_file(path).decode(errors="replace").split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            finding = _checked(Finding.from_dict(row))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            note(f"{path}, line {number}: needs one finding as JSON, got {line[:80]!r}")
        else:
            yield finding, row


class Loggers:
    """Numbers to every Lightning logger, text to those that write to TensorBoard.

    Args:
        loggers: the trainer's loggers, of either Lightning package.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        self._loggers = tuple(loggers)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars."""
        for logger in self._loggers:
            logger.log_metrics(dict(values), step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write markdown to TensorBoard's Text tab; other loggers are left alone."""
        for logger in self._loggers:
            if _writes_to_tensorboard(logger):
                logger.experiment.add_text(tag, markdown, step)
                logger.experiment.flush()

    def histogram(self, tag: str, raw: Mapping[str, Any], step: int) -> None:
        """Write a histogram that was binned already to TensorBoard; other loggers are left alone.

        Args:
            tag: its name.
            raw: what ``SummaryWriter.add_histogram_raw`` takes besides.
            step: its step.
        """
        for logger in self._loggers:
            if _writes_to_tensorboard(logger):
                logger.experiment.add_histogram_raw(tag, global_step=step, **raw)

    @property
    def have_tensorboard(self) -> bool:
        """Whether any of them shows text and pictures."""
        return any(map(_writes_to_tensorboard, self._loggers))

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a matplotlib figure to TensorBoard's Images; other loggers are left alone."""
        for logger in self._loggers:
            if _writes_to_tensorboard(logger):
                logger.experiment.add_figure(tag, figure, step, close=False)  # closing is pyplot's business
                logger.experiment.flush()


def console_text(finding: Finding) -> str:
    """A finding in two or three lines of plain text."""
    place = f" {finding.layer}" if finding.layer else ""
    when = "" if finding.step is None else f" (epoch {finding.epoch}, step {finding.step})"
    rank = finding.data.get("rank")
    head = f"lightning_bn {finding.severity.value}: {finding.rule}{place}{when}"
    lines = [head if rank is None else f"{head} on rank {rank}", f"  {finding.evidence}"]
    return "\n".join([*lines, f"  -> {finding.advice}"] if finding.advice else lines)


def markdown_report(findings: Sequence[Finding]) -> str:
    """All findings as a markdown list, worst first; a table's narrow columns would be cut up letter by letter."""
    return "\n".join(map(_item, worst_first(findings))) or "No findings."


def findings_table(findings: Iterable[Finding]) -> Table:
    """All findings as a Rich table, worst first."""
    from rich.table import Table  # noqa: PLC0415  (only the command line prints tables)
    from rich.text import Text  # noqa: PLC0415

    table = Table(title="lightning_bn findings", show_lines=True, title_justify="left")
    for name, options in (
        ("severity", {"no_wrap": True}),
        ("rule", {"no_wrap": True}),
        ("layer", {"overflow": "fold"}),
        ("epoch", {"justify": "right"}),
        ("step", {"justify": "right"}),
        ("what was seen, and what to do", {"ratio": 1, "overflow": "fold"}),
    ):
        table.add_column(name, **options)
    for finding in worst_first(findings):
        *cells, evidence, advice = _texts(finding)
        cells.append(f"{evidence}\n-> {advice}" if advice else evidence)
        table.add_row(*(Text(cell) for cell in cells), style=STYLES[finding.severity])
    return table


def tally(findings: Sequence[Finding]) -> str:
    """How many findings of each severity, worst first.

    Example:
        >>> tally([])
        'no findings'
    """
    counts = [(sum(finding.severity is kind for finding in findings), kind.value) for kind in reversed(Severity)]
    return ", ".join(f"{number} {kind}" for number, kind in counts if number) or "no findings"


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes; in each the order given."""
    return sorted(findings, key=lambda finding: list(Severity).index(finding.severity), reverse=True)


STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: ""}
"""How Rich shows each severity."""


def _checked(finding: Finding) -> Finding:
    texts, numbers = (finding.rule, finding.evidence, finding.advice), (finding.step, finding.epoch)
    if not all(isinstance(text, str) for text in texts) or not isinstance(finding.layer, str | None):
        raise TypeError("rule, evidence, advice and layer must be text")
    if not all(isinstance(number, int | None) for number in numbers):
        raise TypeError("step and epoch must be whole numbers")
    return finding


def _texts(finding: Finding) -> list[str]:
    numbers = ("" if number is None else str(number) for number in (finding.epoch, finding.step))
    return [
        finding.severity.value,
        finding.rule,
        finding.layer or "",
        *numbers,
        finding.evidence,
        finding.advice,
    ]


def _item(finding: Finding) -> str:
    text = console_text(finding).removeprefix("lightning_bn ").replace("  -> ", "→ ")
    head, *lines = (_escaped(line.strip()) for line in text.split("\n"))
    return "\n".join([f"- **{head}**", *(f"    - {line}" for line in lines)])


def _escaped(text: str) -> str:
    """Text that markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", text).replace("<", "&lt;")


def _writes_to_tensorboard(logger: Any) -> bool:
    # By name: Lightning has four such classes in three packages, and importing one here would need them all.
    return any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__)
