# SPDX-License-Identifier: Apache-2.0
"""The pages of the studies show what the studies measured."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from lightning_bn.studies import STUDIES, load_study
from lightning_bn.studies.results import Results
from lightning_bn.studies.runner import page

FOLDER = Path(__file__).parents[2] / "docs" / "studies"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem in STUDIES)
MAKE = runpy.run_path(str(FOLDER / "make.py"))
SKELETON = "# A page\n\nBefore.\n\n<!-- results: begin -->\nold\n<!-- results: end -->\n\nAfter.\n"


def without_origin(text):
    """A fragment without its line on the number of runs, the version of torch and the machine."""
    return re.sub(r"^Measured by `lightning-bn study .*\n", "", text)


def test_a_fragment_replaces_what_is_between_the_markers():
    """The rest of a page stays as it is, and the picture is looked for in the folder of results."""
    made = MAKE["filled"](SKELETON, "Text.\n\n![Runs](undo.png)\n", "undo")
    fragment = "Text.\n\n![Runs](results/undo.png)"
    assert made == f"# A page\n\nBefore.\n\n{MAKE['BEGIN']}\n{fragment}\n{MAKE['END']}\n\nAfter.\n"
    assert MAKE["filled"](made, "Text.\n\n![Runs](undo.png)\n", "undo") == made


@pytest.mark.parametrize(
    ("skeleton", "fragment", "message"),
    [
        pytest.param("# A page\n", "![Runs](undo.png)", "undo.md needs", id="no markers"),
        pytest.param(SKELETON * 2, "![Runs](undo.png)", "got 2 and 2", id="markers twice"),
        pytest.param(SKELETON, "![Runs](init.png)", "needs the picture undo.png", id="another picture"),
    ],
)
def test_a_page_or_fragment_that_does_not_fit_is_an_error(skeleton, fragment, message):
    """What is missing is named, and nothing is written."""
    with pytest.raises(ValueError, match=message):
        MAKE["filled"](skeleton, fragment, "undo")


def test_the_page_about_initialisation_has_the_accuracies_of_the_study():
    """``python docs/studies/make.py`` would change nothing; there are two tables, of all six starts."""
    text = (FOLDER.parent / "initialisation.md").read_text(encoding="utf-8")
    tables = MAKE["of_starts"]((FOLDER / "results" / "init.md").read_text(encoding="utf-8"))
    assert text == MAKE["replaced"](text, tables, "initialisation.md")
    assert tables.startswith("Measured by `lightning-bn study init`")
    assert [tables.count(start) for start in ("| He |", "| Xavier, gain 1 |", "| N(0, 1000²) |")] == [2, 2, 2]


def test_accuracies_that_are_not_there_are_an_error():
    """What was looked for is named."""
    with pytest.raises(ValueError, match="needs 'Accuracy after' and then 'First forward pass', got places -1 and -1"):
        MAKE["of_starts"]("Measured.\n\nNothing.\n")


def test_results_and_pages_belong_together():
    """Each study with a page has a table, a picture and a fragment of results, and the other way round."""
    kinds = ("csv", "png", "md")
    results = {kind: sorted(path.stem for path in (FOLDER / "results").glob(f"*.{kind}")) for kind in kinds}
    assert results == dict.fromkeys(kinds, PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_up_to_date_with_its_results(name):
    """``python docs/studies/make.py`` would change nothing."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    fragment = (FOLDER / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert text == MAKE["filled"](text, fragment, name)


@pytest.mark.parametrize("name", PAGES)
def test_results_are_what_the_study_says_of_its_rows(name):
    """Tables, verdicts and summary in a fragment are those that the code makes of the rows beside it."""
    study, results = load_study(name), Results(FOLDER / "results" / f"{name}.csv")
    seeds = len({row["seed"] for row in results.rows})
    assert seeds >= study.seeds
    rows = [results.row_of(setting) for setting in study.settings(range(seeds))]
    assert None not in rows
    assert len(rows) == len(results.rows)
    fragment = (FOLDER / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert without_origin(page(study, rows)) == without_origin(fragment)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name):
    """Every relative link and picture of a page names a file of the repository."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    broken = [link for link in re.findall(r"\]\((?!http)([^)#]+)\)", text) if not (FOLDER / link).exists()]
    assert broken == []
