# SPDX-License-Identifier: Apache-2.0
"""Two processes with gloo: statistics are pooled, decisions are shared, and there is one report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from processes import in_two_processes
from specimens import FEATURES, Healthy, loader, network
from test_precise import by_loop
from torch import nn

from lightning_bn import ActivationMonitor, read_findings

SCRIPT = Path(__file__).parent / "ddp_script.py"
pytestmark = pytest.mark.slow


def run(scenario, root):
    """Start both processes; their reports by rank."""
    printed = in_two_processes(SCRIPT, scenario, root, root=root)
    reports = sorted(Path(root).glob("rank*.json"))
    assert len(reports) == 2, printed
    return [json.loads(report.read_text()) for report in reports]


def test_both_ranks_run_the_demo_with_all_callbacks_and_write_one_report(tmp_path):
    """The demo ends on both ranks with equal weights; the first rank alone reports."""
    ranks = run("demo", tmp_path)
    assert ranks[0]["steps"] == ranks[1]["steps"] == 18
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert not any(ranks[0]["off"] + ranks[1]["off"])
    said = ["affine-drift", "wrong-running-statistics", "no-overfitting"]  # after 18 steps the average still lags
    assert (ranks[0]["findings"], ranks[1]["findings"]) == (said, [])
    assert [finding.rule for finding in read_findings(tmp_path / "run" / "version_0")] == said


def test_statistics_are_those_of_the_joined_batch(tmp_path, make_trainer):
    """Unequal halves of a batch on two ranks give the same numbers, and count the same units, as one process."""
    ranks = run("pooled", tmp_path)
    seed_everything(1)
    alone = ActivationMonitor(every_n_steps=1, max_overhead=None)
    make_trainer(alone, max_epochs=2, num_sanity_val_steps=0).fit(Healthy(network(norm=False), lr=0.0), loader())
    spoilt = [rank["rows"].pop("side") for rank in ranks]
    assert [(row["count"], row["nonfinite"]) for row in spoilt] == [(8 * FEATURES, 2)] * 2
    assert set(ranks[0]["rows"]) == set(alone.statistics)
    for name, row in ranks[0]["rows"].items():
        assert row == pytest.approx(vars(alone.statistics[name]), rel=1e-6, abs=1e-7), name
    assert ranks[1]["rows"] == ranks[0]["rows"]
    assert set(ranks[0]["ranks"]) == set(alone.statistics)
    assert ranks[0]["ranks"] != ranks[1]["ranks"]  # each of its own samples
    assert ranks[1]["windows"] == ranks[0]["windows"] == alone.state_dict()["windows"]["state"].tolist()
    assert sum(ranks[0]["windows"]) > 0


def test_gradients_of_all_ranks_are_pooled(tmp_path):
    """Every rank counts with the gradients of its own loss, whatever the size of its part of the batch."""
    ranks = run("pooled", tmp_path)
    seed_everything(1)
    net, (x, y) = network(norm=False), [*loader()][-1]
    outputs = []
    for part in (slice(0, 5), slice(5, 8)):
        through = [x[part]]
        for layer in net:
            through.append(layer(through[-1]))
            through[-1].retain_grad()
        nn.functional.cross_entropy(through[-1], y[part]).backward()
        outputs.append([out.grad.double() for out in through[1:]])
    assert set(ranks[0]["slopes"]) == {f"net.{place}" for place in range(len(net))}
    for place, parts in enumerate(zip(*outputs, strict=True)):
        row, values = ranks[0]["slopes"][f"net.{place}"], torch.cat(parts)
        assert (row["count"], row["nonfinite"]) == (values.numel(), 0)
        assert row["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-5)
        assert (row["low"], row["high"]) == pytest.approx((values.min().item(), values.max().item()), rel=1e-5)
    assert ranks[1]["slopes"] == ranks[0]["slopes"]


def test_precise_statistics_are_those_of_the_joined_batches_or_of_none(tmp_path):
    """Unequal batches on two ranks pool to a float64 loop over all of them; where one rank fails, none is changed."""
    ranks = run("precise", tmp_path / "both")
    seed_everything(1)
    model, joined = network(), [part for x, _ in loader() for part in (x[:5], x[5:])]
    for name, values in by_loop(model, joined).items():
        for statistic, value in zip(("running_mean", "running_var"), values, strict=True):
            found = ranks[0]["statistics"][f"net.{name}.{statistic}"]
            assert found == pytest.approx(value.tolist(), rel=1e-5, abs=1e-6)
    assert ranks[0]["statistics"] == ranks[1]["statistics"]
    assert ranks[0]["findings"] == ranks[1]["findings"] == []
    alone = run("precise on rank 0", tmp_path / "one")
    assert alone[0]["statistics"] != ranks[0]["statistics"]
    assert (alone[0]["findings"], alone[1]["findings"]) == (["not-re-estimated"], [])
    assert not any(alone[0]["off"] + alone[1]["off"])


def test_the_verdict_on_overfitting_is_one_of_all_ranks_and_leaves_no_trace(tmp_path):
    """Unequal batches and steps that talk to other ranks: equal losses, one finding, and training is bit-identical."""
    ranks = run("overfits", tmp_path / "watched")
    assert ranks[0]["losses"] == ranks[1]["losses"] != "None"
    assert "last=[" in ranks[0]["losses"]
    assert [rule for rule in ranks[0]["findings"] if "overfitting" in rule or rule == "not-assessed"] == [
        "overfitting-elsewhere"
    ]
    assert ranks[1]["findings"] == []
    plain = run("overfits, unwatched", tmp_path / "plain")
    assert [rank["digest"] for rank in ranks] == [rank["digest"] for rank in plain]


def test_an_assessment_that_fails_on_one_rank_ends_on_all_without_a_verdict(tmp_path):
    """Nobody waits, the note gives the error, and the run ends well on both."""
    ranks = run("overfits, fails on rank 1", tmp_path)
    assert ranks[0]["losses"] == ranks[1]["losses"] == "None"
    assert not any(ranks[0]["off"] + ranks[1]["off"])
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[1]["findings"] == []
    (finding,) = (entry for entry in read_findings(tmp_path / "run" / "version_0") if entry.rule == "not-assessed")
    assert "validation_step failed when it was run again: RuntimeError: no second run on rank 1" in finding.evidence


def test_ranks_start_from_the_weights_of_the_first_rank(tmp_path):
    """Different seeds on the ranks do not matter: the first rank's counts."""
    ranks = run("init", tmp_path)
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_ranks_scale_by_the_factors_of_the_first_rank(tmp_path):
    """LSUV measures each rank's own batch, and all take the numbers of one."""
    ranks = run("lsuv", tmp_path)
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert not any(ranks[0]["off"] + ranks[1]["off"])
    assert ranks[0]["findings"] == ranks[1]["findings"] == []


@pytest.mark.parametrize(
    ("scenario", "layer", "words"),
    [
        pytest.param("nan on rank 1", None, "batch[0], sample 5", id="one rank"),
        pytest.param("nan on both", "net.2", "LogOfNegative", id="both ranks"),
    ],
)
def test_a_fault_raises_on_all_ranks_together_and_is_reported_once(tmp_path, scenario, layer, words):
    """Both ranks leave the fit with the same message; the file has one line, which names the rank."""
    ranks = run(scenario, tmp_path)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert words in ranks[0]["error"]
    (finding,) = read_findings(tmp_path / "run" / "version_0")
    assert finding.layer == layer
    assert finding.data["rank"] == (0 if layer else 1)


def test_a_fault_in_the_loss_is_none_of_the_models(tmp_path):
    """The verdict is that of one process, although the loss passes through the model's own call."""
    run("nan in the loss", tmp_path)
    assert [finding.rule for finding in read_findings(tmp_path / "run" / "version_0")] == ["invalid-operation"]


def test_stop_ends_all_ranks_cleanly(tmp_path):
    """A fault on one rank stops both after the same step, without an error."""
    ranks = run("stop on rank 1", tmp_path)
    assert ranks[0]["error"] is ranks[1]["error"] is None
    assert ranks[0]["steps"] == ranks[1]["steps"] == 1
    assert ranks[0]["weights"] == ranks[1]["weights"]


LATE = {
    "sample": ("non-finite-input", 2, "batch[0], sample 5"),
    "gradient": ("invalid-gradient", 2, "SqrtBackward0"),
    "loss": ("invalid-operation", 2, "log"),
    "statistics": ("overflowed-running-statistics", 3, "+inf"),
    "loss without gradient": ("invalid-operation", 3, "log"),
}


@pytest.mark.parametrize(("kind", "expected"), LATE.items(), ids=LATE)
def test_a_later_fault_on_one_rank_is_raised_on_all_with_its_culprit(tmp_path, kind, expected):
    """Both ranks raise the report of the one in the same step: at once where gradients tell, else at the interval."""
    ranks = run(f"late {kind}", tmp_path)
    rule, step, words = expected
    assert ranks[0]["error"] == ranks[1]["error"]
    assert words in ranks[0]["error"]
    assert ranks[0]["steps"] == ranks[1]["steps"] <= step + 1
    first = next(finding for finding in read_findings(tmp_path / "run" / "version_0"))
    assert (first.rule, first.data["rank"]) == (rule, 0 if kind == "statistics" else 1)


def test_a_step_that_talks_to_other_ranks_is_not_replayed_and_nobody_waits(tmp_path):
    """All ranks raise what can be seen without a replay, and the reason why there is no more."""
    ranks = run("late talks", tmp_path)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "non-finite-loss" in ranks[0]["error"]
    findings = read_findings(tmp_path / "run" / "version_0")
    assert any("in a replay that other ranks may not run" in finding.evidence for finding in findings)


def test_sharded_gradients_are_agreed_on_before_any_rank_raises(tmp_path):
    """Under FSDP2 each rank sees its part: they ask each other, raise together, and say why nothing was replayed."""
    ranks = run("late sharded", tmp_path)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "invalid-gradient" in ranks[0]["error"]
    assert ranks[0]["steps"] == ranks[1]["steps"] == 2
    assert ranks[0]["finite"] and ranks[1]["finite"]  # noqa: PT018


def test_sharded_affine_parameters_are_not_followed_and_a_note_says_so(tmp_path):
    """Under FSDP2 no process has all of γ and β: their drift is not watched, and the monitor goes on."""
    ranks = run("sharded norm", tmp_path)
    assert [rank["off"] for rank in ranks] == [[False], [False]]
    assert ranks[0]["steps"] == ranks[1]["steps"] == 8
    evidence = {finding.rule: finding.evidence for finding in read_findings(tmp_path / "run" / "version_0")}
    assert "monitor-failed" not in evidence
    assert "sharded over processes" in evidence["not-watched"]
    assert "not-assessed" in evidence


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skip_drops_the_step_on_all_ranks(tmp_path, kind):
    """A bad batch on one rank is dropped on both: training goes on with equal and finite weights and statistics."""
    ranks = run(f"skip {kind}", tmp_path)
    assert ranks[0]["error"] is ranks[1]["error"] is None
    assert ranks[0]["steps"] == ranks[1]["steps"] == 8
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["finite"] and ranks[1]["finite"]  # noqa: PT018


def test_skip_drops_a_first_step_that_is_bad_on_one_rank_alone(tmp_path):
    """The verdict on the first pass binds all ranks, and none waits for the other."""
    ranks = run("skip first", tmp_path)
    assert ranks[0]["error"] is ranks[1]["error"] is None
    assert ranks[0]["steps"] == ranks[1]["steps"] == 8
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["finite"] and ranks[1]["finite"]  # noqa: PT018
    assert {finding.rule for finding in read_findings(tmp_path / "run" / "version_0")} == {"non-finite-input"}


def test_a_bad_sample_that_one_rank_validates_on_is_raised_on_all(tmp_path):
    """The ranks meet at the end of the loop."""
    ranks = run("late validation", tmp_path)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "batch[0], sample 5" in ranks[0]["error"]


def test_a_monitor_that_fails_on_one_rank_is_off_on_all_and_training_goes_on(tmp_path):
    """No rank waits for the other's statistics: training ends as planned, and the file says what happened."""
    ranks = run("breaks on rank 1", tmp_path)
    assert ranks[0]["steps"] == ranks[1]["steps"] == 8
    assert ranks[0]["weights"] == ranks[1]["weights"]
    findings = read_findings(tmp_path / "run" / "version_0")
    assert [finding.data["rank"] for finding in findings if finding.rule == "monitor-failed"] == [1]
    assert sum("the monitor failed on another process" in finding.evidence for finding in findings) == 1
    assert [finding.rule for finding in findings][-1] == "affine-drift"


@pytest.mark.parametrize("buffers", ["", ", kept"], ids=["broadcast", "kept"])
def test_ranks_with_data_of_their_own_are_told_whether_their_statistics_are_broadcast_or_not(tmp_path, buffers):
    """By default the running statistics are equal and those of rank 0, and the data show it all the same."""
    ranks = run(f"domains{buffers}", tmp_path)
    assert ranks[0]["findings"].count("statistics-differ-between-ranks") == 1
    assert ranks[1]["findings"] == []
    assert not any(ranks[0]["off"] + ranks[1]["off"])
    assert (ranks[0]["statistics"] == ranks[1]["statistics"]) is not bool(buffers)
    apart = ranks[0]["apart"]
    assert apart["batches"] > 0.3
    assert apart["stored"] == pytest.approx(apart["batches"], rel=0.3) if buffers else apart["stored"] == 0


@pytest.mark.parametrize("buffers", ["", ", kept"], ids=["broadcast", "kept"])
def test_ranks_with_halves_of_the_same_data_are_silent(tmp_path, buffers):
    """Statistics that each rank keeps differ by noise, and nothing is said of it."""
    ranks = run(f"domains alike{buffers}", tmp_path)
    assert "affine-drift" in ranks[0]["findings"]
    assert "statistics-differ-between-ranks" not in ranks[0]["findings"] + ranks[1]["findings"]
    assert not any(ranks[0]["off"] + ranks[1]["off"])
    assert (ranks[0]["statistics"] == ranks[1]["statistics"]) is not bool(buffers)


def test_a_comparison_that_fails_on_one_rank_is_made_by_none_and_nobody_waits(tmp_path):
    """The run ends well on both, and the file says what happened."""
    ranks = run("domains, breaks on rank 1", tmp_path)
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert "statistics-differ-between-ranks" not in ranks[0]["findings"]
    assert ranks[1]["findings"] == ["monitor-failed"]


def test_comparing_ranks_leaves_training_bit_identical(tmp_path):
    """Weights, buffers, gradients, optimizers and random streams of both are those of an unwatched run."""
    watched, plain = (run(f"domains{rest}", tmp_path / str(place)) for place, rest in enumerate(("", ", unwatched")))
    assert [rank["digest"] for rank in watched] == [rank["digest"] for rank in plain]


def test_a_compiled_model_is_heard_on_all_ranks_and_trains_as_before(tmp_path):
    """The eager passes of both ranks are pooled, and the digest of everything is that of a run without the monitor."""
    ranks = run("compiled", tmp_path / "watched")
    assert ranks[0]["rows"] == ranks[1]["rows"]
    assert {row["count"] for name, row in ranks[0]["rows"].items() if name == "net.1.0"} == {8 * 16}
    assert ranks[0]["findings"] == ranks[1]["findings"] == []
    plain = run("compiled, unwatched", tmp_path / "plain")
    assert [rank["digest"] for rank in ranks] == [rank["digest"] for rank in plain]
