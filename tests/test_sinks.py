# SPDX-License-Identifier: Apache-2.0
"""Findings reach the file, the console, a report and the loggers unharmed."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from datetime import datetime
from html import unescape
from pathlib import Path

import markdown
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_bn.figures import signal_propagation
from lightning_bn.findings import Finding, Severity
from lightning_bn.sinks import (
    FindingsFile,
    Loggers,
    console_text,
    findings_table,
    markdown_report,
    read_findings,
    tally,
    worst_first,
)

ERROR = Finding("non-finite-loss", Severity.ERROR, "the loss is NaN", "look", None, 7, 2, {"nan": 1})
WARNING = Finding("unmatched-layers", Severity.WARNING, "got 'a|b',\nno match", "see net[0]", layer="net")
INFO = Finding("not-watched", Severity.INFO, "[net] is compiled, μ = 0.5", "")
ALL = [INFO, ERROR, WARNING]


@pytest.fixture
def written(tmp_path):
    """A run whose file holds three findings."""
    file = FindingsFile(str(tmp_path))
    for finding in ALL:
        file.append(finding)
    return tmp_path


def lines_of(run):
    return (run / "lightning_bn" / "findings.jsonl").read_text().splitlines(keepends=True)


def test_findings_are_read_back_in_the_order_in_which_they_were_said(written):
    """What was appended is what is read, line by line."""
    assert [line[-1] for line in lines_of(written)] == ["\n"] * 3
    assert read_findings(str(written)) == ALL


@pytest.mark.parametrize("suffix", ["", "/", "/lightning_bn/findings.jsonl"], ids=["folder", "slash", "file"])
def test_a_run_is_read_by_folder_or_by_file(written, suffix):
    """The folder of a run and the path of its file mean the same."""
    assert read_findings(f"{written}{suffix}") == ALL


def test_a_line_has_time_and_context(written):
    """Beside the finding a line says when (UTC) and whatever the caller adds."""
    FindingsFile(str(written)).append(INFO, run="r1", monitor="NaNGuard")
    row = json.loads(lines_of(written)[-1])
    assert datetime.fromisoformat(row["time"]).utcoffset().total_seconds() == 0
    assert (row["run"], row["monitor"], row["rule"]) == ("r1", "NaNGuard", "not-watched")


def test_non_finite_numbers_are_written_as_strings(tmp_path):
    """The file is JSON that any reader takes: NaN and infinities are strings."""
    numbers = {"a": math.nan, "b": [math.inf, -math.inf], "c": 1.5}
    FindingsFile(str(tmp_path)).append(Finding("r", Severity.INFO, "e", "", data=numbers))
    row = json.loads(lines_of(tmp_path)[0], parse_constant=pytest.fail)
    assert row["data"] == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": 1.5}


def test_a_run_without_findings_reads_as_none(tmp_path):
    """Where nothing was ever found there is no file, and the list is empty."""
    assert read_findings(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        pytest.param(lambda lines: [*lines[:2], lines[2][:30]], 3, id="last line cut short"),
        pytest.param(lambda lines: [*lines[:2], "garbage\n"], 3, id="no JSON"),
        pytest.param(lambda lines: [*lines[:2], "{}\n"], 3, id="no finding"),
        pytest.param(lambda lines: [lines[0], lines[1], '{"rule": "x", "severity": "fatal"}\n'], 3, id="no severity"),
        pytest.param(lambda lines: [lines[0], "gar\0bage\n", lines[1]], 2, id="in the middle"),
    ],
)
def test_a_damaged_line_is_passed_over_with_a_warning(written, damage, number):
    """The others are still read, and the warning has the number of the line."""
    (written / "lightning_bn" / "findings.jsonl").write_text("".join(damage(lines_of(written))))
    with pytest.warns(UserWarning, match=rf"findings.jsonl, line {number}: needs one finding as JSON, got '"):
        assert read_findings(str(written)) == ALL[:2]


def test_bytes_that_are_no_text_are_passed_over_with_a_warning(written):
    """A line of broken bytes does not hide the others."""
    with (written / "lightning_bn" / "findings.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    with pytest.warns(UserWarning, match="line 4"):
        assert read_findings(str(written)) == ALL


@pytest.mark.parametrize(
    ("log_dir", "shown"),
    [
        pytest.param("{here}/logs/run", "logs/run/lightning_bn/findings.jsonl", id="below"),
        pytest.param("{here}-other", "{here}-other/lightning_bn/findings.jsonl", id="beside"),
        pytest.param("logs", "logs/lightning_bn/findings.jsonl", id="relative"),
        pytest.param("s3://bucket/run", "s3://bucket/run/lightning_bn/findings.jsonl", id="URL"),
    ],
)
def test_the_path_is_shown_as_a_person_would_type_it(tmp_path, monkeypatch, log_dir, shown):
    """A path below the working directory is shown relative to it, any other as it is."""
    monkeypatch.chdir(tmp_path)
    assert FindingsFile(log_dir.format(here=tmp_path)).shown == shown.format(here=tmp_path)


def test_a_file_can_lie_behind_a_url(tmp_path):
    """Any file system that fsspec can append to will do."""
    url = f"memory://{tmp_path.name}"
    FindingsFile(url).append(ERROR)
    FindingsFile(url).append(INFO)
    assert read_findings(url) == [ERROR, INFO]


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        pytest.param(
            ERROR,
            "lightning_bn error: non-finite-loss (epoch 2, step 7)\n  the loss is NaN\n  -> look",
            id="without a layer",
        ),
        pytest.param(INFO, "lightning_bn info: not-watched\n  [net] is compiled, μ = 0.5", id="without advice"),
        pytest.param(
            Finding("r", Severity.WARNING, "e", "a", layer="net.0", data={"rank": 3}),
            "lightning_bn warning: r net.0 on rank 3\n  e\n  -> a",
            id="with layer and rank",
        ),
    ],
)
def test_the_console_shows_severity_rule_place_evidence_and_advice(finding, text):
    """A finding is two or three lines: what and where, what was seen, what to do."""
    assert console_text(finding) == text


def test_the_report_has_one_item_for_each_finding_worst_first():
    """Errors, then warnings and notes: what and where in bold, below it what was seen and what to do."""
    lines = markdown_report(ALL).split("\n")
    assert [line.split(":")[0] for line in lines if line.startswith("- ")] == ["- **error", "- **warning", "- **info"]
    assert lines[:3] == ["- **error: non-finite-loss (epoch 2, step 7)**", "    - the loss is NaN", "    - → look"]


def test_the_report_shows_every_letter():
    """What markdown would take for a sign of its own is escaped, so that its text reads as the finding does."""
    finding = replace(WARNING, layer="net_a_b", evidence="a*b*c of `x` <b> [1] and a|b", advice="")
    html = markdown.markdown(markdown_report([finding]))
    text = unescape(re.sub(r"</?(?:ul|li|strong|p)>", "", html))
    assert " ".join(text.split()) == " ".join(console_text(finding).removeprefix("lightning_bn ").split())


def test_an_empty_report_says_so():
    """Without findings the report is a sentence and no empty table."""
    assert markdown_report([]) == "No findings."


def test_findings_of_one_severity_keep_their_order():
    """Sorting moves no finding past another of the same severity."""
    twins = [Finding("a", Severity.INFO, "1", ""), ERROR, Finding("b", Severity.INFO, "2", "")]
    assert worst_first(twins) == [twins[1], twins[0], twins[2]]


def test_the_table_shows_text_as_it_is():
    """Brackets are no markup: every word of every finding is on the console."""
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(findings_table(ALL))
    text = console.export_text()
    words = ["[net] is compiled, μ = 0.5", "see net[0]", "non-finite-loss", "unmatched-layers", "-> look", "net"]
    assert [word for word in words if word not in text] == []
    assert text.index("error") < text.index("warning") < text.index("info")


@pytest.mark.parametrize(
    ("findings", "text"),
    [
        pytest.param([], "no findings", id="none"),
        pytest.param([INFO], "1 info", id="one"),
        pytest.param([INFO, ERROR, ERROR, WARNING], "2 error, 1 warning, 1 info", id="every severity"),
    ],
)
def test_the_tally_counts_by_severity(findings, text):
    """Each severity there is, worst first, with its number."""
    assert tally(findings) == text


class InMemory:
    """A logger that keeps the scalars it gets and has no text to write to."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((metrics, step))


def test_every_logger_gets_the_numbers():
    """Scalars go to all loggers with their step, each in a dictionary of its own."""
    loggers, values = [InMemory(), InMemory()], {"a": 1.0}
    Loggers(loggers).numbers(values, 5)
    assert [logger.rows for logger in loggers] == [[({"a": 1.0}, 5)]] * 2
    assert loggers[0].rows[0][0] is not values


def test_a_logger_without_text_is_left_alone():
    """Text goes to TensorBoard alone; another logger sees nothing of it."""
    logger = InMemory()
    Loggers([logger]).text("report", "# text", 5)
    assert logger.rows == []


def test_numbers_reach_a_csv_logger(tmp_path):
    """Lightning's CSVLogger has the scalars in its file, and passes text over."""
    logger = CSVLogger(str(tmp_path))
    Loggers([logger]).numbers({"bn_overview/mean_max": 2.5}, 3)
    Loggers([logger]).text("report", "# text", 3)
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"bn_overview/mean_max": "2.5", "step": "3"}]


@pytest.fixture
def read_tensorboard(tmp_path):
    """A TensorBoard logger, and what its files hold."""
    logger = TensorBoardLogger(str(tmp_path))
    yield logger, lambda: EventAccumulator(logger.log_dir).Reload()
    logger.experiment.close()


def test_text_and_numbers_reach_tensorboard(read_tensorboard):
    """Lightning's TensorBoardLogger has markdown in its Text tab, at once, and scalars, both with their step."""
    logger, read = read_tensorboard
    Loggers([logger]).numbers({"bn_overview/mean_max": 2.5}, 3)
    Loggers([logger]).text("bn_report", markdown_report(ALL), 4)
    events = read()
    (text,), (number,) = events.Tensors("bn_report/text_summary"), events.Scalars("bn_overview/mean_max")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (4, markdown_report(ALL))
    assert (number.step, number.value) == (3, 2.5)


def a_figure():
    return signal_propagation(["a", "b"], [1.0, 2.0], absmax=[4.0, 8.0], dtype_max=65504.0, title="")


def test_a_figure_reaches_tensorboard(read_tensorboard):
    """Lightning's TensorBoardLogger has the picture under its tag at once, with its step, in its own size."""
    logger, read = read_tensorboard
    figure = a_figure()
    Loggers([logger]).figure("bn_init/signal", figure, 4)
    (image,) = read().Images("bn_init/signal")
    assert (image.step, (image.width, image.height)) == (4, figure.canvas.get_width_height())
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_a_figure_stays_usable_and_reaches_every_tensorboard(read_tensorboard):
    """Two loggers get a picture of the same size: it is not closed behind the first one."""
    logger, read = read_tensorboard
    Loggers([logger, InMemory(), logger]).figure("bn_init/signal", a_figure(), 4)
    one, other = read().Images("bn_init/signal")
    assert (one.width, one.height) == (other.width, other.height)


def test_a_logger_without_pictures_is_left_alone(tmp_path):
    """A logger in memory and a CSVLogger see nothing of a figure."""
    memory, file = InMemory(), CSVLogger(str(tmp_path))
    Loggers([memory, file]).figure("bn_init/signal", a_figure(), 4)
    assert memory.rows == []
    assert list(tmp_path.iterdir()) == []
