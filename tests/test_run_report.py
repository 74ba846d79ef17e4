# SPDX-License-Identifier: Apache-2.0
"""What ``lightning-bn report`` reads, compares and prints, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import fsspec
import pytest
from rich.console import Console
from specimens import Healthy, LogOfNegative, loader, with_module

from lightning_bn import NaNGuard, NonFiniteError, PreflightAudit
from lightning_bn.cli import command_parser
from lightning_bn.findings import Finding, Severity
from lightning_bn.run_report import RunFindings, Said, collect, compare, document, report

PAGE = (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
BEGIN = datetime(2026, 1, 2, 10, tzinfo=timezone.utc)
ERROR = Finding("overflowed-running-statistics", Severity.ERROR, "running variance is inf", "look", "net.bn", 7, 0)
WARNING = Finding("dead-units", Severity.WARNING, "12 of 64 units were [0], μ = 0.5", "wait", "net[0]", 120, 2)
INFO = Finding("affine-drift", Severity.INFO, "γ moved by 2%", "", None, 36, 1)
ALL = [INFO, ERROR, WARNING]


def write(folder, findings, *, begin=BEGIN, monitor="NaNGuard", run=None):
    """Append the lines of a run that begins at ``begin`` and says its findings in the seconds after it."""
    path = Path(folder, "lightning_bn", "findings.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for number, finding in enumerate(findings, start=1):
            time = (begin + timedelta(seconds=number)).isoformat(timespec="milliseconds")
            start = (run or begin).isoformat(timespec="seconds")
            file.write(f"{json.dumps({'time': time, 'run': start, 'monitor': monitor, **finding.to_dict()})}\n")
    return Path(folder)


@pytest.fixture
def two_runs(tmp_path):
    """Two runs: the error goes, the warning comes, the note stays."""
    write(tmp_path / "logs" / "version_0", [INFO, ERROR])
    write(tmp_path / "logs" / "version_1", [WARNING, INFO], begin=BEGIN + timedelta(hours=1))
    return tmp_path / "logs"


def printed(*logdirs, width=100, **options):
    """What the report prints on a console, and its exit status."""
    console = Console(file=io.StringIO(), width=width)
    status = report([str(logdir) for logdir in logdirs], console=console, **options)
    return console.file.getvalue(), status


def as_json(*logdirs):
    """The JSON document, read by a reader that refuses NaN."""
    text, status = printed(*logdirs, as_json=True)
    assert status == 0
    return json.loads(text, parse_constant=pytest.fail)


def cells(text):
    """The cells of all rows of a printed table, without the border."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_one_run_is_a_table_worst_first(tmp_path):
    """Name, start and every word of every finding; errors, then warnings, then notes; who said it and where."""
    text, status = printed(write(tmp_path / "logs" / "version_3", ALL))
    assert status == 0
    words = ["version_3, begun 2026-01-02 10:00:00 UTC", ERROR.evidence, WARNING.evidence, INFO.evidence, "-> look"]
    words += ["overflowed-running-statistics", "net.bn", "net[0]", "epoch 2, step 120", "-> wait"]
    assert [word for word in words if word not in text] == []
    assert text.index("│ error") < text.index("│ warning") < text.index("│ info")
    assert f"1 error, 1 warning, 1 info, said by NaNGuard; {tmp_path}/logs/version_3\n" in text


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_word_of_a_finding_is_cut(tmp_path, width):
    """A path longer than its column goes on in the next line, and all lines fit the console."""
    long = Finding("dead-units", Severity.WARNING, "x" * 150, "y" * 120, "model." + "z" * 90, 1, 0)
    text, _ = printed(write(tmp_path, [long]), width=width)
    table = text[: text.index("└")]
    assert max(map(len, table.splitlines())) <= width
    letters = "".join(cell for row in cells(table) for cell in row)
    assert [letters.count(letter) for letter in "xz"] == [150, 90]
    assert "…" not in table


@pytest.mark.parametrize(
    "logdir",
    [
        pytest.param("{here}/logs/version_0", id="log directory"),
        pytest.param("{here}/logs/version_0/", id="with a slash"),
        pytest.param("{here}/logs/version_0/lightning_bn", id="folder of the findings"),
        pytest.param("{here}/logs/version_0/lightning_bn/findings.jsonl", id="findings file"),
        pytest.param("file://{here}/logs/version_0", id="URL"),
        pytest.param("{here}", id="folder above"),
    ],
)
def test_a_run_is_found_by_whatever_leads_to_it(tmp_path, logdir):
    """A log directory, its findings file, a folder above and a URL are the same run."""
    (write(tmp_path / "logs" / "version_0", ALL) / "hparams.yaml").write_text("")
    (run,) = collect([logdir.format(here=tmp_path)])
    assert (run.name, run.path, run.findings) == ("version_0", f"{tmp_path}/logs/version_0", ALL)
    assert (run.start, run.monitors, run.has_file) == (BEGIN, ["NaNGuard"], True)


def test_a_findings_file_that_was_copied_elsewhere_is_read(tmp_path):
    """A file of another name and place is a run of that name."""
    kept = tmp_path / "kept.jsonl"
    (write(tmp_path / "run", ALL) / "lightning_bn" / "findings.jsonl").rename(kept)
    (run,) = collect([str(kept)])
    assert (run.name, run.path, run.findings) == ("kept.jsonl", str(kept), ALL)


def test_runs_behind_a_url_are_read_and_named_by_it(two_runs):
    """A folder on another file system is walked likewise, and its paths can be given to the report again."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(two_runs), f"/{two_runs.parent.name}/logs", recursive=True)
    runs = collect(f"memory://{two_runs.parent.name}/logs")
    assert [run.name for run in runs] == ["version_0", "version_1"]
    assert [again.findings for run in runs for again in collect([run.path])] == [[INFO, ERROR], [WARNING, INFO]]


def test_a_run_that_is_named_twice_is_one_run(two_runs):
    """A folder, a run in it, its file and a link to it do not count twice."""
    (two_runs.parent / "best").symlink_to(two_runs / "version_1")
    ways = ["", "version_1", "version_1/lightning_bn/findings.jsonl", "../best"]
    assert len(collect([str(two_runs / way) for way in ways])) == 2


def test_runs_stand_in_the_order_of_their_start(tmp_path):
    """Neither the order of the arguments nor that of the names counts."""
    for hour, name in enumerate(["z", "m", "a"]):
        write(tmp_path / name, [INFO], begin=BEGIN + timedelta(hours=hour))
    assert [run.name for run in collect([str(tmp_path / name) for name in "maz"])] == ["z", "m", "a"]


def test_runs_of_unknown_start_stand_in_the_order_of_their_numbers(tmp_path):
    """Without any start, version_9 comes before version_10, and a note says that the order is not that of time."""
    for number in (10, 9, 1):
        write(tmp_path / f"version_{number}", [INFO])
        path = tmp_path / f"version_{number}" / "lightning_bn" / "findings.jsonl"
        path.write_text(json.dumps(INFO.to_dict()))
    notes = []
    runs = collect([str(tmp_path)], note=notes.append)
    assert [run.name for run in runs] == ["version_1", "version_9", "version_10"]
    assert {run.start for run in runs} == {None}
    assert notes == ["the start of version_1, version_9, version_10 is not known, so the runs stand in the order given"]


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path):
    """Of equal folder names the parents are shown too."""
    for hour, name in enumerate(["wide/version_0", "deep/version_0"]):
        write(tmp_path / name, [INFO], begin=BEGIN + timedelta(hours=hour))
    assert [run.name for run in collect([str(tmp_path)])] == ["wide/version_0", "deep/version_0"]


def test_each_fit_of_one_log_directory_is_a_run_of_its_own(tmp_path):
    """Two fits in one file are told apart by their start."""
    write(tmp_path / "run", [INFO, ERROR])
    write(tmp_path / "run", [INFO], begin=BEGIN + timedelta(minutes=5))
    runs = collect([str(tmp_path / "run")])
    assert [run.name for run in runs] == ["run 2026-01-02 10:00:00", "run 2026-01-02 10:05:00"]
    assert [run.findings for run in runs] == [[INFO, ERROR], [INFO]]


@pytest.mark.parametrize(
    ("monitor", "rank", "seconds", "runs"),
    [
        pytest.param("ActivationMonitor", None, 1, 1, id="another monitor"),
        pytest.param("NaNGuard", 1, 1, 1, id="another process"),
        pytest.param("NaNGuard", None, 1, 2, id="the same monitor again"),
        pytest.param("ActivationMonitor", None, 60, 2, id="after the other's last word"),
    ],
)
def test_monitors_that_began_within_one_run_are_one_run(tmp_path, monitor, rank, seconds, runs):
    """Starts that overlap and are of different monitors or processes are one fit; the lines keep their order."""
    data = {} if rank is None else {"rank": rank}
    later = [Finding("dead-units", Severity.WARNING, "e", "a", data=data)]
    write(tmp_path, [INFO, ERROR])
    write(tmp_path, later, begin=BEGIN + timedelta(seconds=seconds), monitor=monitor)
    write(tmp_path, [INFO], begin=BEGIN + timedelta(seconds=1), run=BEGIN)
    found = collect([str(tmp_path)])
    assert len(found) == runs
    whole = [[INFO, ERROR, *later, INFO]] if runs == 1 else [[INFO, ERROR, INFO], later]
    assert [run.findings for run in found] == whole


def test_a_torn_line_is_a_note_on_standard_error(two_runs, capsys):
    """What a killed process left unfinished is passed over, and the JSON on standard output stays whole."""
    with (two_runs / "version_1" / "lightning_bn" / "findings.jsonl").open("a") as file:
        file.write('{"time": "2026-01-02T1')
    assert report([str(two_runs)], as_json=True) == 0
    out, err = capsys.readouterr()
    assert [len(run["findings"]) for run in json.loads(out)["runs"]] == [2, 2]
    assert re.fullmatch(r"lightning-bn report: .*version_1.*, line 3: needs one finding as JSON, got '.*'\n", err)


@pytest.mark.parametrize(
    "change",
    [{"layer": ["net"]}, {"rule": 3}, {"step": "7"}, {"evidence": None}],
    ids=["list for a layer", "number for a rule", "text for a step", "null for evidence"],
)
def test_a_line_of_wrong_types_is_passed_over(tmp_path, change):
    """JSON that looks like a finding and is none does not stop the report."""
    path = write(tmp_path, [INFO]) / "lightning_bn" / "findings.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({**ERROR.to_dict(), **change}))
    notes = []
    (run,) = collect([str(tmp_path)], note=notes.append)
    assert run.findings == [INFO]
    assert len(notes) == 1
    assert "line 2: needs one finding as JSON" in notes[0]


@pytest.mark.parametrize(
    ("logdir", "reason"),
    [
        pytest.param("nosuch", "got 'nosuch': it does not exist", id="no such path"),
        pytest.param("", "got '': it is empty", id="empty word"),
        pytest.param("model.ckpt", "got 'model.ckpt': it is another file", id="another file"),
        pytest.param("nosuch://x", "got 'nosuch://x': Protocol not known: nosuch", id="no such protocol"),
        pytest.param("memory://nosuch/x", "got 'memory://nosuch/x': it does not exist", id="no such URL"),
    ],
)
def test_a_bad_path_ends_with_2_and_says_what_is_needed(tmp_path, monkeypatch, capsys, logdir, reason):
    """The message names the argument, what it needs and what it got; nothing is on standard output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    write(tmp_path / "run", [ERROR])
    assert report(["run", logdir], as_json=True, fail_on="info") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-bn report: LOGDIR must be the log directory of a run, a folder of such, a find")
    assert err.endswith(f"{reason}\n")


@pytest.mark.parametrize(
    ("logdirs", "fail_on", "message"),
    [([], "never", "LOGDIR must be .*, got none"), (["."], "fatal", "fail_on must be one of error, .*, got 'fatal'")],
    ids=["no LOGDIR", "no such severity"],
)
def test_bad_arguments_end_with_2(capsys, logdirs, fail_on, message):
    """The same holds for the other arguments."""
    assert report(logdirs, fail_on=fail_on) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_that_may_not_be_read_is_no_folder_without_findings(tmp_path, monkeypatch, capsys):
    """A LOGDIR that cannot be listed ends with 2; one below it is named, and the others are read."""
    write(tmp_path / "run", [INFO])
    (tmp_path / "locked").mkdir()
    listing = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert report([str(tmp_path / "locked")]) == 2
    assert "Permission denied" in capsys.readouterr().err
    assert report([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "affine-drift" in out
    assert re.search(r"not looked into: .*Permission denied.*locked", err)


def test_a_folder_without_findings_is_not_called_healthy(tmp_path, capsys):
    """It says that nothing was found, that perhaps nothing was looked for, and fails no job."""
    (tmp_path / "version_0").mkdir()
    text, status = printed(tmp_path / "version_0", fail_on="info")
    assert status == 0
    assert f"version_0: nothing found; no findings file lies below {tmp_path}/version_0." in text
    assert "either no monitor found anything, or none was attached; the files do not tell which" in text
    assert "healthy" not in text
    assert capsys.readouterr().err == ""


def test_a_file_without_a_readable_line_is_told_from_none(tmp_path, capsys):
    """Where every line is torn, the report does not say that nothing was found."""
    path = write(tmp_path / "run", [ERROR]) / "lightning_bn" / "findings.jsonl"
    path.write_text(path.read_text()[:40])
    text, _ = printed(tmp_path / "run")
    assert "has no readable finding" in text
    assert "nothing found" not in text
    assert "line 1: needs one finding" in capsys.readouterr().err


def test_runs_beside_others_that_have_no_findings_file_are_named_and_left_out(two_runs):
    """What a logger left of them is enough to name them; a folder of anything else is no run."""
    for name, file in (("version_2", "hparams.yaml"), ("version_3", "events.out.tfevents.1.host"), ("notes", "a.txt")):
        (two_runs / name).mkdir()
        (two_runs / name / file).write_text("")
    (two_runs / "version_0" / "hparams.yaml").write_text("")
    text, _ = printed(two_runs)
    assert "Left out, as without a findings file: version_2, version_3. There, either no monitor found" in text
    content = as_json(two_runs)
    assert [run["name"] for run in content["runs"]] == ["version_0", "version_1"]
    assert content["without_findings_file"] == [f"{two_runs}/version_2", f"{two_runs}/version_3"]


@pytest.mark.parametrize(("hours", "place"), [(-1, 0), (2, 2)], ids=["before the others", "after the others"])
def test_a_run_without_findings_that_is_named_is_compared(two_runs, hours, place):
    """It has a column like the others, in the place that its TensorBoard file tells."""
    stamp = int((BEGIN + timedelta(hours=hours)).timestamp())
    (two_runs / "quiet").mkdir()
    (two_runs / "quiet" / f"events.out.tfevents.{stamp}.host.1.0").write_bytes(b"")
    for logdirs in ([two_runs, two_runs / "quiet"], [two_runs / "quiet", two_runs]):
        runs = collect([str(logdir) for logdir in logdirs])
        assert [run.name for run in runs].index("quiet") == place
        assert (runs[place].start, runs[place].asked) == (BEGIN + timedelta(hours=hours), True)
    text, _ = printed(two_runs, two_runs / "quiet")
    assert "3 runs" in text
    assert "  quiet has no findings file: either no monitor found anything, or none was attached" in text
    assert ["", "no findings file", "", "", "", ""] in cells(text)
    assert "Left out" not in text


def test_a_comparison_says_what_came_and_what_went():
    """A fault is a rule on a layer; each run has its worst severity and its first step."""
    first, last = Finding("r", Severity.INFO, "e", "", "a", 9), Finding("r", Severity.ERROR, "e", "", "a", 30)
    other = Finding("r", Severity.WARNING, "e", "", "b")
    runs = [run_of([first, last]), run_of([other]), run_of([other, INFO])]
    comparison = compare(runs)
    seen = {(fault.rule, fault.layer): fault.seen for fault in comparison.faults}
    assert list(seen) == [("r", "a"), ("r", "b"), ("affine-drift", None)]
    assert [entry and (entry.severity, entry.step) for entry in seen["r", "a"]] == [(Severity.ERROR, 9), None, None]
    assert [entry and (entry.severity.value, entry.step) for entry in seen["r", "b"]] == [
        None,
        ("warning", None),
        ("warning", None),
    ]
    assert [(fault.rule, fault.layer) for fault in comparison.new] == [("r", "b"), ("affine-drift", None)]
    assert [(fault.rule, fault.layer) for fault in comparison.gone] == [("r", "a")]


def test_equal_runs_have_nothing_new_and_nothing_gone():
    """The healthy twin of the comparison; one run alone is compared with itself."""
    for runs in ([run_of(ALL)], [run_of(ALL), run_of([]), run_of(ALL)]):
        comparison = compare(runs)
        assert (comparison.new, comparison.gone, len(comparison.faults)) == ((), (), 3)
    with pytest.raises(ValueError, match="runs must be at least one run, got none"):
        compare([])


def run_of(findings):
    """A run that said these findings, without a file."""
    return RunFindings("/logs/run", said=tuple(Said(finding, None, None, None) for finding in findings))


def test_two_runs_stand_side_by_side(two_runs):
    """One line for each fault, one column for each run, then what came and went, and the counts."""
    text, _ = printed(two_runs)
    table, rest = text.split("From version_0 to version_1: 1 new, 1 gone, 1 in both.\n")
    assert cells(table) == [
        ["overflowed-running-statistics", "net.bn", "error, step 7", "-"],
        ["dead-units", "net[0]", "-", "warning, step 120"],
        ["affine-drift", "", "info, step 36", "info, step 36"],
    ]
    assert rest.startswith("  gone: error overflowed-running-statistics net.bn\n  Gone is not cured")
    new, counts = rest.split("how many in each run")
    assert WARNING.evidence in new
    assert INFO.evidence not in new
    assert cells(counts) == [
        ["1", "version_0", "2026-01-02 10:00:00", "1", "0", "1"],
        ["2", "version_1", "2026-01-02 11:00:00", "0", "1", "1"],
    ]


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("number", [2, 3, 5, 8, 30])
def test_every_layout_holds_every_step_within_the_console(tmp_path, number, width):
    """However many runs there are, each fault's step in each run is legible and no line is too long."""
    for place in range(number):
        found = [
            Finding(finding.rule, finding.severity, "e", "", finding.layer, 1000 * (place + 1) + kind)
            for kind, finding in enumerate(ALL)
            if (place + kind) % 3 or not place
        ]
        write(tmp_path / f"version_{place}", found, begin=BEGIN + timedelta(hours=place))
    text, _ = printed(tmp_path, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    table = text.split("From version_0")[0]
    for place in range(number):
        for kind, finding in enumerate(ALL):
            said = re.findall(rf"\b{1000 * (place + 1) + kind}\b", table)
            assert len(said) == int(bool((place + kind) % 3 or not place)), (place, finding.rule)
    assert [finding.rule for finding in ALL if finding.rule not in table] == []


@pytest.mark.parametrize(
    ("number", "width", "head"),
    [
        pytest.param(2, 100, ["rule", "layer", "version_0", "version_1"], id="named"),
        pytest.param(2, 80, ["rule, layer", "version_0", "version_1"], id="two lines for a fault"),
        pytest.param(5, 90, ["rule, layer", "1", "2", "3", "4", "5"], id="numbered"),
        pytest.param(12, 80, ["rule, layer", "run@first step"], id="in words"),
    ],
)
def test_the_layout_is_the_plainest_that_fits(tmp_path, number, width, head):
    """Names give way to numbers and columns to words where the console is too narrow for them."""
    for place in range(number):
        write(tmp_path / f"version_{place}", ALL[1:], begin=BEGIN + timedelta(hours=place))
    text, _ = printed(tmp_path, width=width)
    assert [cell.strip() for cell in text.splitlines()[2].split("┃")[1:-1]] == head


def test_in_words_a_run_has_its_number_and_its_step(tmp_path):
    """Severities that differ between runs are told apart, and the numbers are those of the counts."""
    for place in range(12):
        severity = Severity.ERROR if place in {2, 11} else Severity.WARNING
        finding = Finding("dead-units", severity, "e", "", None, None if place == 4 else place)
        write(tmp_path / f"version_{place}", [finding], begin=BEGIN + timedelta(hours=place))
    text, _ = printed(tmp_path, width=100)
    assert [row[1] for row in cells(text)[:2]] == [
        "error: 3@2, 12@11",
        "warning: 1@0, 2@1, 4@3, 5, 6@5, 7@6, 8@7, 9@8, 10@9, 11@10",
    ]
    assert ["12", "version_11"] in [row[:2] for row in cells(text)]


@pytest.mark.parametrize(
    ("findings", "statuses"),
    [
        pytest.param([], (0, 0, 0, 0), id="nothing"),
        pytest.param([INFO], (0, 0, 1, 0), id="a note"),
        pytest.param([INFO, WARNING], (0, 1, 1, 0), id="a warning"),
        pytest.param([INFO, ERROR], (1, 1, 1, 0), id="an error"),
    ],
)
@pytest.mark.parametrize("form", [False, True], ids=["tables", "json"])
def test_the_exit_status_follows_the_worst_finding(tmp_path, capsys, findings, statuses, form):
    """1 from the asked severity on, in any of the runs, and standard error says why."""
    write(tmp_path / "first", findings)
    write(tmp_path / "last", [], begin=BEGIN + timedelta(hours=1))
    for fail_on, status in zip(("error", "warning", "info", "never"), statuses, strict=True):
        _, got = printed(tmp_path / "first", tmp_path / "last", fail_on=fail_on, as_json=form)
        assert (fail_on, got) == (fail_on, status)
        assert (f"exit status 1, as --fail-on {fail_on} asks" in capsys.readouterr().err) == bool(status)


def test_the_json_document_holds_runs_and_comparison(two_runs):
    """Its keys and values are those of the files."""
    content = as_json(two_runs)
    assert list(content) == ["schema_version", "runs", "without_findings_file", "comparison"]
    first, last = content["runs"]
    assert {key: first[key] for key in first if key != "findings"} == {
        "name": "version_0",
        "path": str(two_runs / "version_0"),
        "run": "2026-01-02T10:00:00+00:00",
        "findings_file": True,
        "monitors": ["NaNGuard"],
        "counts": {"error": 1, "warning": 0, "info": 1},
    }
    times = [f"2026-01-02T11:00:0{second}+00:00" for second in (1, 2)]
    assert last["findings"] == [
        {"time": time, "monitor": "NaNGuard", **finding.to_dict()}
        for time, finding in zip(times, [WARNING, INFO], strict=True)
    ]
    comparison = content["comparison"]
    assert (comparison["first"], comparison["last"]) == ("version_0", "version_1")
    assert comparison["faults"][0] == {
        "rule": ERROR.rule,
        "layer": "net.bn",
        "runs": [{"severity": "error", "step": 7}, None],
    }
    assert comparison["new"] == [{"rule": WARNING.rule, "layer": "net[0]"}]
    assert comparison["gone"] == [{"rule": ERROR.rule, "layer": "net.bn"}]


def test_the_json_document_is_json_whatever_the_file_holds(tmp_path):
    """NaN and infinities of a file become strings; words of any alphabet and width come through unwrapped."""
    path = write(tmp_path, [Finding("r", Severity.INFO, f"γ :warning: [bold] {'x' * 300}", "")])
    path = path / "lightning_bn" / "findings.jsonl"
    path.write_text(path.read_text().replace('"data": {}', '"data": {"a": NaN, "b": [Infinity, -Infinity]}'))
    content = as_json(tmp_path)
    (found,) = content["runs"][0]["findings"]
    assert found["data"] == {"a": "NaN", "b": ["Infinity", "-Infinity"]}
    assert found["evidence"] == f"γ :warning: [bold] {'x' * 300}"
    assert content["comparison"] is None


def test_the_json_document_of_a_folder_without_findings_says_so(tmp_path):
    """There is one run, without a file, without findings and without a start."""
    (run,) = as_json(tmp_path)["runs"]
    assert (run["findings_file"], run["findings"], run["run"], run["monitors"]) == (False, [], None, [])
    assert run["counts"] == {"error": 0, "warning": 0, "info": 0}


def test_the_page_lists_every_key_of_the_json_document(two_runs):
    """The table of keys in the docs is that of a document with two runs."""

    def keys(value, path=""):
        if isinstance(value, dict) and not path.endswith("data"):
            for key, entry in value.items():
                yield f"{path}.{key}".lstrip(".")
                yield from keys(entry, f"{path}.{key}")
        elif isinstance(value, list):
            for entry in value:
                yield from keys(entry, f"{path}[]")

    table = PAGE[PAGE.index("| key |") : PAGE.index("## Exit status")]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == set(keys(document(collect([str(two_runs)]))))


def test_the_commands_on_the_page_are_commands():
    """Each ``lightning-bn report`` of the docs is one that the command line takes."""
    lines = [line[line.index("lightning-bn report") :] for line in PAGE.splitlines() if "lightning-bn report " in line]
    commands = [re.split(r"`|#|\|\|", line)[0] for line in lines if not line.startswith("lightning-bn report`")]
    words = [shlex.split(command)[1:] for command in commands]
    assert len(words) >= 8
    assert [command_parser().parse_args(entry).logdirs for entry in words] == [
        [word for word in entry[1:] if word.startswith("lightning_logs")] for entry in words
    ]


def test_paths_are_shown_as_a_person_would_type_them(tmp_path, monkeypatch):
    """Below the working directory a path is relative, in tables alone."""
    write(tmp_path / "logs" / "version_0", [INFO])
    monkeypatch.chdir(tmp_path)
    assert "said by NaNGuard; logs/version_0\n" in printed("logs")[0]
    assert as_json("logs")["runs"][0]["path"] == f"{tmp_path}/logs/version_0"


def test_neither_torch_nor_lightning_is_imported():
    """The report starts in a fraction of a second."""
    code = "import sys, lightning_bn.run_report; print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_a_healthy_run_and_a_sick_one_are_told_apart_on_the_command_line(make_trainer, tmp_path):
    """From two fits to the exit status: the sick run fails a job, alone and compared; the healthy one does not."""

    def fit(name, model, *monitors):
        make_trainer(*monitors, logger=False, default_root_dir=str(tmp_path / name)).fit(model, loader())

    def run(*words):
        environment = {**os.environ, "COLUMNS": "100"}
        command = [sys.executable, "-m", "lightning_bn", "report", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
        )

    (tmp_path / "quiet").mkdir()
    fit("quiet", Healthy(), NaNGuard())
    fit("healthy", Healthy(), PreflightAudit(), NaNGuard())
    with pytest.raises(NonFiniteError):
        fit("sick", Healthy(with_module(LogOfNegative())), PreflightAudit(), NaNGuard())
    quiet = run("quiet", "--fail-on", "info")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert "quiet: nothing found; no findings file lies below" in quiet.stdout
    healthy = run("healthy", "--fail-on", "warning")
    assert (healthy.returncode, healthy.stderr) == (0, "")
    assert "2 info, said by PreflightAudit" in healthy.stdout
    sick = run("sick", "--fail-on", "error")
    assert sick.returncode == 1
    assert "invalid-operation" in sick.stdout
    assert "said by NaNGuard" in sick.stdout
    both = run("healthy", "sick", "--json", "--fail-on", "warning")
    assert both.returncode == 1
    content = json.loads(both.stdout)
    assert [run["counts"]["error"] for run in content["runs"]] == [0, 1]
    assert content["comparison"]["new"] == [{"rule": "invalid-operation", "layer": "net.2"}]
    assert run("nosuch").returncode == 2
