# SPDX-License-Identifier: Apache-2.0
"""Make the table of all rules.

Run:     python docs/rules/make_index.py
Writes:  docs/rules/index.md
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import lightning_bn
from lightning_bn.callbacks.base import Monitor
from lightning_bn.findings import Severity
from lightning_bn.rules import SLUGS

HERE = Path(__file__).parent
COMMON = {"attached-twice", "monitor-failed"}
"""What every callback says, so that no argument ``ignore`` lists it."""
OTHERS = {"lost-callbacks": "a witness, in every run whose config or command line names one of these callbacks"}
"""What none of the public callbacks says."""
HEAD = """\
<!-- made by docs/rules/make_index.py -->
# All rules

A rule is named after its fault. The name stands in the finding, and `ignore=["the-name"]` of the callback silences it.
What the severities mean stands on [the page about reading](../reading.md).

| rule | severity | what it says | said by |
|---|---|---|---|
"""


def index() -> str:
    """The page: one row for each rule, in alphabetical order."""
    speakers = {name: spoken(name) for name in monitors()}
    return HEAD + "".join(map(row, SLUGS, ([name for name in speakers if slug in speakers[name]] for slug in SLUGS)))


def monitors() -> list[str]:
    """Names of the callbacks of this package, in the order of its public names."""
    found = ((name, getattr(lightning_bn, name)) for name in lightning_bn.__all__)
    return [name for name, value in found if inspect.isclass(value) and issubclass(value, Monitor)]


def spoken(name: str) -> set[str]:
    """The rules that a callback may speak: those that its argument ``ignore`` names.

    Args:
        name: public name of the callback.
    """
    text = inspect.getdoc(getattr(lightning_bn, name)) or ""
    entry = re.search(r"^ *ignore:(.*?)^\S", text, re.DOTALL | re.MULTILINE)
    words = set(re.findall(r"[a-z]+(?:-[a-z]+)+", entry.group(1) if entry else ""))
    return words & set(SLUGS)


def severities(slug: str) -> list[str]:
    """The severities that the file of a rule gives, worst first.

    Args:
        slug: name of the rule.
    """
    source = inspect.getsource(import_module(f"lightning_bn.rules.{slug.replace('-', '_')}"))
    return [kind.value for kind in reversed(Severity) if f"Severity.{kind.name}" in source]


def row(slug: str, speakers: list[str]) -> str:
    """One line of the table.

    Args:
        slug: name of the rule.
        speakers: names of the callbacks that say it.
    """
    first = (HERE / f"{slug}.md").read_text(encoding="utf-8").splitlines()[2]
    links = ", ".join(f"[{name}](../callbacks/{page(name)})" for name in speakers)
    said_by = "every callback" if slug in COMMON else OTHERS.get(slug, links)
    return f"| [`{slug}`]({slug}.md) | {', '.join(severities(slug))} | {first} | {said_by} |\n"


def page(name: str) -> str:
    """File name of the page of a callback.

    Args:
        name: its public name.

    Example:
        >>> page("NaNGuard"), page("PreciseBatchNorm")
        ('nan_guard.md', 'precise_batchnorm.md')
    """
    words = re.findall(r"NaN|BatchNorm|[A-Z][a-z]+", name)
    return f"{'_'.join(words).lower()}.md"


if __name__ == "__main__":
    (HERE / "index.md").write_text(index(), encoding="utf-8")
