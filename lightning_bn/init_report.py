# SPDX-License-Identifier: Apache-2.0
"""What an initialisation did and showed, as tables."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from lightning_bn.filling import Row
from lightning_bn.initialization import Report
from lightning_bn.stats.moments import Summary

HEADINGS = ("parameter", "shape", "scheme", "fan-in", "fan-out", "behind it", "target std", "actual std", "remark")
RIGHT = frozenset({"fan-in", "fan-out", "target std", "actual std"})
CONSOLE_WIDTH = 160


def init_markdown(report: Report) -> str:
    """One row for each parameter, in markdown; then the remarks."""
    rules = "|".join("---:" if heading in RIGHT else "---" for heading in HEADINGS)
    rows = [f"| {' | '.join(HEADINGS)} |", f"|{rules}|"]
    rows.extend(f"| {' | '.join(map(_escaped, _cells(row)))} |" for row in report.rows)
    head = f"Scheme {report.scheme}, seed {report.seed}; {_count(report)}"
    return "\n\n".join([head, "\n".join(rows), *(f"- {text}" for text in report.remarks)])


def init_console(report: Report) -> str:
    """The same as plain text for a console."""
    from rich.console import Console  # noqa: PLC0415  (only where a table is asked for)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=f"lightning_bn: initialised by {report.scheme}, seed {report.seed}", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in RIGHT else "left", no_wrap=heading != "remark")
    for row in report.rows:
        table.add_row(*map(Text, _cells(row)))
    paper = Console(file=io.StringIO(), width=CONSOLE_WIDTH, color_system=None)
    paper.print(table)
    text = str(paper.file.getvalue())  # type: ignore[attr-defined]  # it is the StringIO from above
    return "\n".join(line.rstrip() for line in text.splitlines())


def signal_markdown(layers: Mapping[str, Summary], dtype: torch.dtype, remarks: Iterable[str] = ()) -> str:
    """The signal over depth in one forward pass, one row for each layer in the order in which they ran.

    Args:
        layers: summary by layer.
        dtype: what the activations are computed in; the share of its range that a layer used is given.
        remarks: what else the pass showed.
    """
    largest = torch.finfo(dtype).max
    rows = [
        "| # | layer | mean | std | largest abs | share of the range | zeros |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for place, (name, row) in enumerate(layers.items(), start=1):
        zeros = "undefined" if math.isnan(row.zero_share) else f"{row.zero_share:.1%}"
        numbers = f"{row.mean:.3g} | {row.std:.3g} | {row.absmax:.3g} | {row.absmax / largest:.1e} | {zeros}"
        rows.append(f"| {place} | `{name or '(the model)'}` | {numbers} |")
    return "\n\n".join(
        [f"First training batch, in {_plain(dtype)}", "\n".join(rows), *(f"- {text}" for text in remarks)]
    )


def _cells(row: Row) -> Sequence[str]:
    fans = (str(row.fan_in), str(row.fan_out)) if row.fan_in else ("", "")
    behind = f"{row.follows} (gain {row.gain:.3g})" if row.follows and row.gain is not None else ""
    shape = " × ".join(map(str, row.shape)) or "scalar"
    return (row.name, shape, row.scheme, *fans, behind, _number(row.target_std), _number(row.actual_std), row.why)


def _count(report: Report) -> str:
    kept = len(report.rows) - len(report.filled)
    return f"{len(report.filled)} parameters filled, {kept} kept"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("*", "\\*")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
