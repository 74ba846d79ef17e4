# SPDX-License-Identifier: Apache-2.0
"""Runs, as their findings files tell of them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import chain, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lightning_bn.findings import Finding
from lightning_bn.sinks import FILE, FOLDER, read_rows

NEEDS = (
    "LOGDIR must be the log directory of a run, a folder of such, a findings file (.jsonl) or the URL of one of them"
)
EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)")
"""A file of TensorBoard; its name has the time of its first entry, in seconds."""
LEFT_BY_LOGGERS = ("hparams.yaml", "metrics.csv")
"""What Lightning's loggers leave in the log directory of a run."""
Note = Callable[[str], None]


@dataclass(frozen=True)
class Said:
    """One finding, and what its line in the file says besides.

    Args:
        finding: the finding.
        monitor: class name of the monitor that said it.
        time: when it said so.
        start: when it began to watch the run.
    """

    finding: Finding
    monitor: str | None
    time: datetime | None
    start: datetime | None

    @property
    def speaker(self) -> tuple[str | None, Any]:
        """The monitor, and its process where that is known."""
        return self.monitor, self.finding.data.get("rank")


@dataclass(frozen=True)
class RunFindings:
    """What was found in one run: one call of ``fit``, ``validate`` or ``test``.

    Args:
        path: log directory, absolute or a URL; of a file that lies in no folder ``lightning_bn``, the file itself.
        name: the end of the path, as long as it takes to tell the runs apart, and the start where that is not enough.
        start: when it began; None if unknown.
        said: the findings, in the order in which they were said.
        has_file: whether it has a findings file. Without one, nothing was found or no monitor was attached.
        asked: False for a run without a findings file that merely lies beside others below a folder.
    """

    path: str
    name: str = ""
    start: datetime | None = None
    said: tuple[Said, ...] = ()
    has_file: bool = True
    asked: bool = True

    @property
    def findings(self) -> list[Finding]:
        """The findings alone."""
        return [said.finding for said in self.said]

    @property
    def monitors(self) -> list[str]:
        """The monitors that found something, in alphabetical order; others may have been attached."""
        return sorted({said.monitor for said in self.said if said.monitor})


def collect(logdirs: str | Sequence[str], *, note: Note = warnings.warn) -> list[RunFindings]:
    """Read runs, in the order of their start; in the order given where the start of one is not known.

    Args:
        logdirs: log directories of runs, folders of such, findings files, or URLs of any of them.
        note: takes a sentence for each line that is no finding and for whatever else could not be used.

    Returns:
        The runs, those that were not asked for at the end. A LOGDIR without any findings is one run without findings.

    Raises:
        ValueError: where one of ``logdirs`` is not there, is something else, or cannot be read.
    """
    logdirs = [logdirs] if isinstance(logdirs, str | os.PathLike) else logdirs
    if not logdirs:
        raise ValueError(f"{NEEDS}, got none")
    places: dict[str, _Place] = {}
    for place in chain.from_iterable(_places(os.fspath(logdir), note) for logdir in logdirs):
        if place.asked or place.path not in places:
            places[place.path] = place
    runs = _named([run for place in places.values() for run in _runs_at(place, note)])
    asked, beside = ([run for run in runs if run.asked is wanted] for wanted in (True, False))
    dated = [(run.start, run) for run in asked if run.start is not None]
    if len(dated) == len(asked):
        return [*(run for _, run in sorted(dated, key=itemgetter(0))), *beside]
    if len(asked) > 1:
        undated = ", ".join(run.name for run in asked if run.start is None)
        note(f"the start of {undated} is not known, so the runs stand in the order given")
    return [*asked, *beside]


@dataclass(frozen=True)
class _Place:
    """Where a run is: with a findings file on a file system, or without one."""

    path: str
    filesystem: Any
    file: str | None = None
    start: datetime | None = None
    asked: bool = True


def _places(logdir: str, note: Note) -> Iterator[_Place]:
    try:
        filesystem, root, files = _files(logdir, note)
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"{NEEDS}, got {logdir!r}: {error}") from error
    shown = str if isinstance(filesystem, LocalFileSystem) else filesystem.unstrip_protocol
    written = files if files == [root] else [file for file in files if _log_dir(file) != file]
    for file in written:
        yield _Place(shown(_log_dir(file)), filesystem, file)
    if not written:
        yield _Place(shown(root), filesystem, start=_first_event(files))
    elif files != [root]:
        silent = _silent(files, {_log_dir(file) for file in written})
        yield from (_Place(shown(folder), filesystem, asked=folder == root) for folder in silent)


def _files(logdir: str, note: Note) -> tuple[Any, str, list[str]]:
    """The file system of a LOGDIR, its path there, and all files below, in natural order; a file is its own."""
    if not logdir:
        raise ValueError("it is empty")
    filesystem, root = fsspec.core.url_to_fs(logdir)
    if isinstance(filesystem, LocalFileSystem):
        root = Path(root).resolve().as_posix()
    if filesystem.isfile(root):
        if not root.endswith(".jsonl"):
            raise ValueError("it is another file")
        return filesystem, root, [root]
    if not filesystem.exists(root):
        raise FileNotFoundError("it does not exist")
    filesystem.ls(root, detail=False)  # raises where it may not be read, which a search passes over
    files = _local_files(root, note) if isinstance(filesystem, LocalFileSystem) else filesystem.find(root)
    return filesystem, root, sorted(files, key=_natural)


def _local_files(root: str, note: Note) -> Iterator[str]:
    """All files below a folder; unlike fsspec's search it says which folders it may not read."""
    for folder, _, names in os.walk(root, onerror=lambda error: note(f"not looked into: {error}")):
        yield from (f"{Path(folder).as_posix()}/{name}" for name in names)


def _log_dir(file: str) -> str:
    """The log directory that a findings file belongs to; of any other file, the file itself."""
    return file.removesuffix(f"/{FOLDER}/{FILE}")


def _silent(files: Sequence[str], written: set[str]) -> list[str]:
    """Folders that a logger of Lightning wrote a run into, and that lie in none with findings nor in each other."""
    folders, taken = [], set(written)
    for file in files:
        folder, _, name = file.rpartition("/")
        if name in LEFT_BY_LOGGERS or EVENTS.match(name):
            folders.append(folder)
    found = []
    for folder in sorted(set(folders), key=_natural):
        if folder not in taken and not any(folder.startswith(f"{other}/") for other in taken):
            taken.add(folder)
            found.append(folder)
    return found


def _first_event(files: Sequence[str]) -> datetime | None:
    stamps = [int(match[1]) for file in files if (match := EVENTS.match(file.rpartition("/")[2]))]
    return datetime.fromtimestamp(min(stamps), timezone.utc) if stamps else None


def _runs_at(place: _Place, note: Note) -> list[RunFindings]:
    if place.file is None:
        return [RunFindings(place.path, start=place.start, has_file=False, asked=place.asked)]
    try:
        rows = list(read_rows(place.filesystem, place.file, note))
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"{NEEDS}, got {place.path!r}: {error}") from error
    said = [_said(finding, row) for finding, row in rows]
    starts = _starts(said)
    runs: dict[datetime | None, list[Said]] = {}
    for entry in said:
        runs.setdefault(starts[entry.start], []).append(entry)
    return [RunFindings(place.path, start=start, said=tuple(runs[start])) for start in runs] or [
        RunFindings(place.path)
    ]


def _said(finding: Finding, row: Mapping[str, Any]) -> Said:
    monitor = row.get("monitor")
    return Said(finding, None if monitor is None else str(monitor), _moment(row.get("time")), _moment(row.get("run")))


def _starts(said: Sequence[Said]) -> dict[datetime | None, datetime | None]:
    """For each start that the lines of one file have, that of its run.

    Monitors and processes of one run begin one after another and write down seconds, so their starts may differ.
    Two are of one run if the later monitor began before the earlier one had said its last, and is another one.
    """
    starts: dict[datetime | None, datetime | None] = {None: None}
    begin, end, speakers = None, None, set[Any]()
    for start in sorted({entry.start for entry in said if entry.start}):
        own = [entry for entry in said if entry.start == start]
        names = {entry.speaker for entry in own}
        if end is None or start > end or names & speakers:
            begin, end, speakers = start, start, set()
        speakers |= names
        end = max([end, *(entry.time for entry in own if entry.time)])
        starts[start] = begin
    return starts


def _named(runs: Sequence[RunFindings]) -> list[RunFindings]:
    paths = [run.path.split("/") for run in runs]
    levels = zip(*(path[:-1] for path in paths), strict=False)  # as deep as the shortest path
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    names = ["/".join(path[shared:]) for path in paths]
    named = []
    for run, name in zip(runs, names, strict=True):
        fits = sum(other.path == run.path for other in runs)
        named.append(replace(run, name=f"{name} {shown_time(run.start)}" if fits > 1 else name))
    return named


def shown_time(moment: datetime | None) -> str:
    """A time as a person reads it, in UTC.

    Example:
        >>> shown_time(datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc))
        '2026-01-02 03:04:05'
    """
    return "start unknown" if moment is None else f"{moment.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}"


def _moment(text: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _natural(path: str) -> list[tuple[str, int]]:
    """A key that sorts ``version_9`` before ``version_10``."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", path)]
