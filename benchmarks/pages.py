# SPDX-License-Identifier: Apache-2.0
"""Puts what a benchmark printed into a page of the docs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def write_between(page: Path, name: str, lines: Iterable[str]) -> None:
    """Put lines between the markers ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` of a page.

    Raises:
        ValueError: where the page has no such markers.
    """
    text = page.read_text()
    before, begin, rest = text.partition(f"<!-- {name}: begin -->")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if not begin or not end:
        raise ValueError(f"{page} must have the markers of {name!r}, got none or one of them")
    page.write_text("\n".join([f"{before}{begin}", *lines, f"{end}{after}"]))
