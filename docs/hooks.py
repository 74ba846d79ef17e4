# SPDX-License-Identifier: Apache-2.0
"""What the site needs beyond MkDocs: entries of ``nav`` with a star."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Put pages in place of stars; called by MkDocs.

    Args:
        config: the configuration of the site.
    """
    config.nav = list(expanded(config.nav, Path(config.docs_dir), named(config.nav)))
    return config


def named(entry: Any) -> set[str]:
    """All pages that ``nav`` names without a star.

    Args:
        entry: ``nav``, or a part of it.
    """
    if isinstance(entry, str):
        return set() if "*" in entry else {entry}
    return set().union(*map(named, entry.values() if isinstance(entry, dict) else entry))


def expanded(entries: list[Any], docs: Path, taken: set[str]) -> Iterator[Any]:
    """The entries of ``nav``, each star replaced by the pages that it matches and that are named nowhere else.

    Args:
        entries: a list of ``nav``.
        docs: folder of the pages.
        taken: pages that have their place.
    """
    for entry in entries:
        if isinstance(entry, str) and "*" in entry:
            found = sorted(path.relative_to(docs).as_posix() for path in docs.glob(entry))
            yield from (page for page in found if page not in taken)
        elif isinstance(entry, dict):
            yield {
                title: list(expanded(below, docs, taken)) if isinstance(below, list) else below
                for title, below in entry.items()
            }
        else:
            yield entry
