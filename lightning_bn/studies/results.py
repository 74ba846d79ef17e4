# SPDX-License-Identifier: Apache-2.0
"""The results of a study in a CSV file that grows run by run, so that a study can go on where it was stopped."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightning_bn.studies.study import Row, Setting, Value


class Results:
    """Rows in a CSV file.

    Args:
        path: the file; it is made with the first row.

    Raises:
        ValueError: where the file is there and holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)

    def row_of(self, setting: Setting) -> Row | None:
        """The row that was measured for a setting, if it was.

        Raises:
            ValueError: where the file has no column for a part of the setting.
        """
        missing = sorted(set(setting) - set(self.rows[0])) if self.rows else []
        if missing:
            raise ValueError(f"{self.path} needs a column {missing[0]!r}, got {', '.join(self.rows[0])}; move it away")
        return next((row for row in self.rows if all(row[name] == value for name, value in setting.items())), None)

    def append(self, row: Row) -> None:
        """Add a row, on disk at once.

        Raises:
            ValueError: where its columns are not those of the rows before it.
        """
        if self.rows and list(row) != list(self.rows[0]):
            raise ValueError(f"{self.path} needs rows of {', '.join(self.rows[0])}, got {', '.join(row)}; move it away")
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        if not self.rows:
            writer.writeheader()
        writer.writerow(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
        self.rows.append(row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; one that a killed process left unfinished is cut off the file.

    Args:
        path: the file; one that is not there has no rows.

    Raises:
        ValueError: where a line has more or fewer values than the header.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8", newline="")
    header, *lines = list(csv.reader(io.StringIO(whole))) or [[]]
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise ValueError(f"{path}, line {number}: needs {len(header)} values, got {len(line)}; move the file away")
    if not lines:  # a header alone: it would be written again
        path.unlink()
    return [dict(zip(header, map(value_of, line), strict=True)) for line in lines]


def value_of(word: str) -> Value:
    """A value as it was before it was written.

    Example:
        >>> [value_of(word) for word in ("", "3", "0.5", "nan", "he")]
        [None, 3, 0.5, nan, 'he']
    """
    if not word:
        return None
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
