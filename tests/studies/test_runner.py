# SPDX-License-Identifier: Apache-2.0
"""Studies can be stopped and go on, give the same with any number of processes, and say what is in their way."""

from __future__ import annotations

import io
import sys
import types

import pytest
from matplotlib.figure import Figure
from rich.console import Console

import lightning_bn.studies
from lightning_bn.cli import main
from lightning_bn.studies import STUDIES, Study, Verdict, load_study, runner
from lightning_bn.studies.results import Results, read_rows, value_of

MADE: list[dict] = []
NAME = "sums"
HEADER = "a,word,seed,total,odd,none\n"


def settings(seeds):
    return [{"a": a, "word": "he", "seed": seed} for seed in seeds for a in (0.5, 2.0)]


def measure(setting):
    MADE.append(dict(setting))
    if setting["a"] == 99.0:
        raise KeyboardInterrupt
    return {"total": setting["a"] + setting["seed"], "odd": float("nan"), "none": None}


def verdicts(rows):
    return [Verdict("Sums | grow.", "holds", f"{sum(row['total'] for row in rows):g}", "none\nknown")]


def draw(rows):
    figure = Figure()
    figure.add_subplot().plot([row["total"] for row in rows])
    return figure


def study(**changes):
    parts = {"settings": settings, "measure": measure, "verdicts": verdicts, "draw": draw, "seeds": 2}
    words = {"tables": lambda rows: f"| rows |\n|---|\n| {len(rows)} |", "summary": lambda rows: f"{len(rows)} sums."}
    return Study(NAME, **{**parts, **words, **changes})


@pytest.fixture
def plant(monkeypatch):
    """A function that puts a study of sums, changed as asked, where studies are found."""
    MADE.clear()

    def put(**changes):
        module = types.ModuleType(f"lightning_bn.studies.{NAME}")
        module.STUDY = study(**changes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(lightning_bn.studies.STUDIES, NAME, "Do sums grow?")

    return put


def run(folder, **options):
    text = io.StringIO()
    runner.run_study(NAME, folder, **{"jobs": 1, **options}, console=Console(file=text, width=120))
    return text.getvalue()


def same(rows):
    """Rows as text, in which NaN equals NaN, in any order."""
    return sorted(map(str, rows))


def test_the_report_files_are_written(tmp_path, plant):
    """A run leaves every row in a CSV file, a picture, and a page with tables, verdicts and summary."""
    plant()
    shown = run(tmp_path / "new")
    assert len(read_rows(tmp_path / "new" / "sums.csv")) == 4
    assert (tmp_path / "new" / "sums.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "new" / "sums.md").read_text(encoding="utf-8")
    assert page.startswith("Measured by `lightning-bn study sums` (4 runs, 2 seeds; torch ")
    assert "\n\n4 sums.\n\n| rows |\n|---|\n| 4 |\n\n![The runs of the study sums](sums.png)\n\n" in page
    assert "| Sums \\| grow. | holds | 7 | none known |" in page
    assert "Sums | grow." in shown
    assert "sums.csv, .png and .md" in shown


def test_what_was_measured_is_not_measured_again(tmp_path, plant):
    """A second command of the same size makes no run, one of more seeds makes those that are missing."""
    plant()
    run(tmp_path)
    MADE.clear()
    run(tmp_path)
    assert MADE == []
    run(tmp_path, seeds=3)
    assert settings([2]) == MADE
    assert len(read_rows(tmp_path / "sums.csv")) == 6
    page = (tmp_path / "sums.md").read_text(encoding="utf-8")
    assert page.startswith("Measured by `lightning-bn study sums --seeds 3` (6 ")


def test_a_smaller_report_leaves_the_other_rows_in_the_file(tmp_path, plant):
    """With fewer seeds than the file has the report is of those seeds, and the file stays as it is."""
    plant()
    run(tmp_path)
    before = (tmp_path / "sums.csv").read_bytes()
    assert "2 sums." in run(tmp_path, seeds=1)
    assert (tmp_path / "sums.csv").read_bytes() == before


def test_an_interrupted_study_goes_on(tmp_path, plant):
    """Ctrl-C keeps the rows that are there and says so; the next command makes the others, none twice."""
    plant(settings=lambda seeds: [*settings(seeds), {"a": 99.0, "word": "he", "seed": 0}, *settings([9])])
    text = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        runner.run_study(NAME, tmp_path, jobs=1, console=Console(file=text, width=500))
    assert "keeps 4 runs; the same command makes the others" in text.getvalue()
    assert not (tmp_path / "sums.md").exists()
    MADE.clear()
    plant(settings=lambda seeds: [*settings(seeds), *settings([9])])
    run(tmp_path)
    assert settings([9]) == MADE
    assert len(read_rows(tmp_path / "sums.csv")) == 6


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_cut_and_measured_again(tmp_path, plant, cut):
    """A process that was killed while it wrote costs the run that it wrote, and no other."""
    plant()
    run(tmp_path)
    path = tmp_path / "sums.csv"
    whole, rows = path.read_bytes(), read_rows(path)
    path.write_bytes(whole[:-cut])
    MADE.clear()
    run(tmp_path)
    assert len(MADE) == 1
    assert path.read_bytes() == whole
    assert same(read_rows(path)) == same(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("x,y\n1,2\n", "needs a column 'a', got x, y; move it away", id="of another study"),
        pytest.param(HEADER + "0.5,he,0,0.5,nan,\n1,2\n", "line 3: needs 6 values, got 2", id="line too short"),
        pytest.param(
            "a,word,seed,total\n0.5,he,0,0.5\n", "needs rows of a, word, seed, total, got", id="older columns"
        ),
    ],
)
def test_a_foreign_file_is_a_clear_error(tmp_path, plant, text, message):
    """A file that holds something else is named with what it needs and has, and stays as it is."""
    plant()
    (tmp_path / "sums.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run(tmp_path)
    assert (tmp_path / "sums.csv").read_text(encoding="utf-8") == text


def test_a_complete_file_of_another_version_is_a_clear_error(tmp_path, plant):
    """All runs are there, but without a column that the report needs: it is named, and the file stays as it is."""
    plant()
    rows = [f"{row['a']},{row['word']},{row['seed']}\n" for row in settings(range(2))]
    text = "".join(["a,word,seed\n", *rows])
    (tmp_path / "sums.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="needs a column 'total', got a, word, seed; move it away"):
        run(tmp_path)
    assert (tmp_path / "sums.csv").read_text(encoding="utf-8") == text


def test_a_file_with_a_header_alone_is_begun_anew(tmp_path, plant):
    """A process that was killed behind the header leaves nothing in the way."""
    plant()
    (tmp_path / "sums.csv").write_text(HEADER, encoding="utf-8")
    run(tmp_path)
    assert len(read_rows(tmp_path / "sums.csv")) == 4


@pytest.mark.parametrize(
    "value", [None, 0, -3, 0.1, 1e-300, 12345678901234567890, float("nan"), float("inf"), "he, σ = 1"]
)
def test_a_value_is_read_as_it_was_written(tmp_path, value):
    """Numbers keep every digit, text its commas, and nothing stays nothing."""
    results = Results(tmp_path / "r.csv")
    results.append({"value": value, "seed": 0})
    (row,) = read_rows(tmp_path / "r.csv")
    assert str(row["value"]) == str(value)
    assert type(row["value"]) is type(value)


def test_text_stays_text():
    """What looks like no number is none."""
    assert [value_of(word) for word in ("he", "1e", "")] == ["he", "1e", None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"seeds": 0}, "--seeds must be at least 1, got 0", id="seeds"),
        pytest.param({"jobs": 0}, "--jobs must be at least 1, got 0", id="jobs"),
    ],
)
def test_no_seeds_and_no_jobs_are_refused(tmp_path, plant, options, message):
    """The argument is named, and nothing is written."""
    plant()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_study_ends_with_a_clear_message(tmp_path, monkeypatch):
    """The command ends with a sentence that lists the studies, without a traceback, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["study", "nosuch"])
    assert ended.value.code == f"lightning-bn: NAME must be one of {', '.join(STUDIES)}, got 'nosuch'"
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_the_studies_are_listed(capsys, monkeypatch):
    """Each with its question."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main(["study"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert all(name in printed and question in printed for name, question in STUDIES.items())


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_rows(tmp_path):
    """The rows of a study do not depend on where they are measured, to the last digit."""
    chosen = [setting for setting in load_study("cold_start").settings([0]) if setting["part"] == "training"][1:4]
    made = {}
    for jobs in (1, 2):
        results = Results(tmp_path / f"{jobs}.csv")
        runner.make_runs(load_study("cold_start"), chosen, results, jobs=jobs, console=Console(file=io.StringIO()))
        made[jobs] = same(read_rows(tmp_path / f"{jobs}.csv"))
    assert len(made[1]) == 3
    assert made[1] == made[2]
