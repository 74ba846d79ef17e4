# SPDX-License-Identifier: Apache-2.0
"""Put what each study showed into its page.

Run:     python docs/studies/make.py
Reads:   docs/studies/results/NAME.md, which ``lightning-bn study NAME --out docs/studies/results`` writes
Writes:  docs/studies/NAME.md, and docs/initialisation.md with two of the tables of the study init, between markers
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
STARTS = ("Accuracy after", "First forward pass")
"""How the tables of accuracies begin in what the study init writes, and what comes behind them."""


def filled(page: str, fragment: str, name: str) -> str:
    """A page with what stands between its markers replaced by a fragment.

    Args:
        page: the page; it has each marker once.
        fragment: what a study wrote, with its picture beside it.
        name: name of the study; its picture is looked for in ``results/``.

    Raises:
        ValueError: where the page lacks a marker or has one twice, or the fragment shows no picture.
    """
    if f"]({name}.png)" not in fragment:
        raise ValueError(f"results/{name}.md needs the picture {name}.png, got none")
    return replaced(page, fragment.replace(f"]({name}.png)", f"](results/{name}.png)"), f"{name}.md")


def replaced(page: str, text: str, name: str) -> str:
    """A page with another text between its markers.

    Args:
        page: the page; it has each marker once.
        text: what is put there.
        name: name of the page.

    Raises:
        ValueError: where the page lacks a marker or has one twice.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{name} needs {BEGIN} and {END} once each, got {page.count(BEGIN)} and {page.count(END)}")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.partition(END)[2]}"


def of_starts(fragment: str) -> str:
    """The accuracies in what the study init wrote, with the line that says how they were measured.

    Raises:
        ValueError: where they are not there.
    """
    origin, _, rest = fragment.partition("\n")
    start, stop = rest.find(STARTS[0]), rest.find(STARTS[1])
    if not 0 <= start < stop:
        raise ValueError(f"results/init.md needs {STARTS[0]!r} and then {STARTS[1]!r}, got places {start} and {stop}")
    return f"{origin}\n\n{rest[start:stop]}"


def main() -> None:
    """Fill the page of every study that has results, and the one about initialisation."""
    for fragment in sorted((HERE / "results").glob("*.md")):
        page = HERE / fragment.name
        if not page.exists():
            print(f"{page} is missing")
            continue
        text = filled(page.read_text(encoding="utf-8"), fragment.read_text(encoding="utf-8"), fragment.stem)
        page.write_text(text, encoding="utf-8")
        print(page)
    starts = HERE.parent / "initialisation.md"
    tables = of_starts((HERE / "results" / "init.md").read_text(encoding="utf-8"))
    starts.write_text(replaced(starts.read_text(encoding="utf-8"), tables, starts.name), encoding="utf-8")
    print(starts)


if __name__ == "__main__":
    main()
