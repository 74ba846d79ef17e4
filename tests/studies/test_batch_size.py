# SPDX-License-Identifier: Apache-2.0
"""The study of batch sizes trains what it says, and its verdicts follow from its rows."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from lightning_bn.callbacks.noise import Noise
from lightning_bn.studies.batch_size import measure as batch_size
from lightning_bn.studies.batch_size.rows import BATCHES, FEWER, NETWORKS, Gap, Run, gap, mismatch, samples
from lightning_bn.studies.batch_size.verdicts import IMAGENET

STUDY = batch_size.STUDY
CLAIMS = {
    "noisier": "The smaller the batch, the noisier its statistics.",
    "avoid": "Avoid BatchNorm below a batch of 16.",
    "unstable": "Small batches destabilise training.",
    "others": "Use LayerNorm or GroupNorm there.",
    "mismatched": "What small batches cost is the running statistics in evaluation, not the training.",
    "accumulated": "Accumulating gradients does for BatchNorm what a larger batch does.",
    "chasing": "γ and β chase the noise of small batches.",
}


def row(setting, **changes):
    """A row in which no normalisation is better than another and m_eff is the batch size."""
    found = {"rate": 1e-3, "train_loss": 0.1, "val_loss": 0.2, "val_acc": 0.95}
    found |= {"gamma_mean": 1.0, "gamma_drift": 0.1, "beta_drift": 0.1}
    if setting["norm"] == "batch":
        found |= {"m_eff": 1.0 * setting["batch"], "m_eff_min": 0.9 * setting["batch"], "pairs": 64}
        found |= {"precise_loss": 0.2, "precise_acc": 0.95, "whole_loss": 0.2, "batch_loss": 0.3}
    else:
        found |= dict.fromkeys(batch_size.BATCHNORM_ONLY)
    return {**setting, **found, **changes}


def rows_with(change, seeds=3):
    """All rows, each with what ``change`` makes of its setting."""
    return [row(setting, **change(setting)) for setting in STUDY.settings(range(seeds))]


def worse_below(limit, networks=("mlp", "conv"), *, loss=0.4, precise=0.35):
    """BatchNorm is worse below a batch size, in some networks, with a little chance in it."""

    def change(setting):
        if setting["norm"] != "batch" or setting["batch"] >= limit or setting["network"] not in networks:
            return {}
        return {"val_loss": loss + 0.001 * setting["seed"], "precise_loss": precise, "val_acc": 0.8}

    return change


def verdict(rows, name):
    (found,) = [found for found in STUDY.verdicts(rows) if found.claim == CLAIMS[name]]
    return found


def test_every_claim_has_its_verdict():
    """No claim is left out and none is said twice."""
    assert sorted(found.claim for found in STUDY.verdicts(rows_with(lambda _: {}))) == sorted(CLAIMS.values())


@pytest.mark.parametrize(
    ("name", "change", "seeds", "expected"),
    [
        pytest.param("noisier", lambda _: {}, 3, "holds", id="m_eff rises"),
        pytest.param(
            "noisier",
            lambda s: {"m_eff": 9.0} if (s["network"], s["norm"]) == ("mlp", "batch") else {},
            3,
            "holds if",
            id="m_eff rises in one network",
        ),
        pytest.param("avoid", worse_below(16), 3, "holds", id="worse below 16"),
        pytest.param("avoid", worse_below(16), 1, "not shown", id="one seed"),
        pytest.param("avoid", worse_below(16, ["mlp"]), 3, "holds if", id="worse below 16 in one network"),
        pytest.param("avoid", worse_below(32), 3, "holds if", id="worse at 16 too"),
        pytest.param("avoid", worse_below(99, loss=0.1), 3, "does not hold", id="better"),
        pytest.param("avoid", lambda _: {}, 3, "not shown", id="no difference"),
        pytest.param("avoid", worse_below(99, loss=0.215), 3, "not shown", id="less than a tenth"),
        pytest.param("unstable", worse_below(4), 3, "holds", id="accuracy lost"),
        pytest.param("unstable", worse_below(4, ["conv"]), 3, "holds if", id="accuracy lost in one network"),
        pytest.param("unstable", lambda _: {}, 3, "does not hold", id="no accuracy lost"),
        pytest.param("others", worse_below(16), 3, "holds", id="both others better"),
        pytest.param("others", worse_below(4), 3, "holds if", id="both others better at batch 2"),
        pytest.param("others", lambda _: {}, 3, "does not hold", id="others no better"),
        pytest.param("mismatched", worse_below(16, precise=0.25), 3, "holds", id="most goes"),
        pytest.param("mismatched", worse_below(16, precise=0.35), 3, "does not hold", id="most stays"),
        pytest.param("mismatched", lambda _: {}, 3, "not shown", id="nothing lost"),
        pytest.param("accumulated", lambda _: {}, 3, "does not hold", id="m_eff of the small batch"),
        pytest.param(
            "accumulated",
            lambda s: {"m_eff": 16.0} if s["accumulate"] > 1 and s["norm"] == "batch" else {},
            3,
            "holds if",
            id="m_eff of the large batch",
        ),
        pytest.param(
            "accumulated",
            lambda s: {"val_loss": 0.1} if s["accumulate"] > 1 and s["norm"] == "batch" else {},
            3,
            "holds if",
            id="loss falls",
        ),
        pytest.param("chasing", lambda _: {}, 3, "does not hold", id="moved no further"),
        pytest.param(
            "chasing",
            lambda s: {"gamma_drift": 0.5} if (s["norm"], s["batch"]) == ("batch", 2) else {},
            3,
            "not shown",
            id="moved further",
        ),
    ],
)
def test_a_verdict_follows_from_the_rows(name, change, seeds, expected):
    """Each criterion is met by rows that were made to meet it, and by no others."""
    assert verdict(rows_with(change, seeds), name).verdict == expected


def test_the_boundary_is_between_the_noisiest_of_the_good_and_the_best_of_the_bad():
    """The measured m_eff at which BatchNorm becomes worse is said with the verdict."""
    said = verdict(rows_with(worse_below(8)), "avoid").measured
    assert "m_eff up to 3.6, and nowhere from 7.2 on" in said
    said = verdict(rows_with(worse_below(8, ["mlp"])), "avoid").measured
    assert "m_eff 1.8 to 3.6, and not always there" in said


def test_published_differences_are_those_of_the_paper():
    """BatchNorm less GroupNorm as in table 2 of Wu & He 2018, from their two rows."""
    assert [round(ours - theirs, 1) for ours, theirs in IMAGENET.values()] == [-0.5, -0.5, 0.8, 3.1, 10.6]


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        pytest.param([0.30, 0.31, 0.32], 1, id="larger"),
        pytest.param([0.10, 0.11, 0.12], -1, id="smaller"),
        pytest.param([0.21, 0.21, 0.215], 0, id="less than a tenth"),
        pytest.param([0.10, 0.60, 0.20], 0, id="within two errors"),
        pytest.param([0.90], 0, id="one seed"),
    ],
)
def test_a_gap_has_a_sign_where_it_is_large_and_sure(ours, expected):
    """More than two standard errors and a tenth of the other value, in pairs of one seed."""
    theirs = [0.2] * len(ours)
    runs = {"batch": ours, "group": theirs}
    rows = [
        {**Run("mlp", norm, 2)._asdict(), "seed": seed, "val_loss": value}
        for norm, values in runs.items()
        for seed, value in enumerate(values)
    ]
    found = gap(rows, Run("mlp", "batch", 2), Run("mlp", "group", 2))
    assert found.sign == expected
    assert found.mean == pytest.approx(statistics.fmean(ours) - 0.2)
    if len(ours) > 1:
        assert found.error == pytest.approx(statistics.stdev(ours) / math.sqrt(len(ours)))


def test_a_gap_pairs_the_seeds():
    """Rows in any order are compared seed by seed."""
    rows = [{**Run("mlp", "batch", 2)._asdict(), "seed": seed, "val_loss": 1.0 + seed} for seed in (2, 0, 1)]
    rows += [{**Run("mlp", "group", 2)._asdict(), "seed": seed, "val_loss": 0.5 + seed} for seed in (1, 2, 0)]
    assert gap(rows, Run("mlp", "batch", 2), Run("mlp", "group", 2)) == Gap(0.5, 0.0, 1.5)


def test_the_part_of_the_mismatch_is_what_re_estimation_takes_away():
    """(0.4 − 0.25) of (0.4 − 0.2), and the noisiest layer's m_eff beside it."""
    rows = rows_with(worse_below(16, loss=0.4, precise=0.2505))
    assert mismatch(rows, "mlp", 4) == pytest.approx(0.1505 / 0.201)
    assert samples(rows, "mlp", 4) == pytest.approx(3.6)


def test_tables_and_summary_have_every_run():
    """Each batch size has a line in each table of losses, and a summary says where BatchNorm is worse."""
    rows = rows_with(worse_below(8, ["mlp"]))
    lines = STUDY.tables(rows).splitlines()
    assert [sum(line.startswith(f"| {batch} |") for line in lines) for batch in BATCHES] == [3, 2, 3, 2, 2, 2]
    assert sum(line.startswith("| 4 × 4 |") for line in lines) == 2
    assert "In the MLP BatchNorm is worse than GroupNorm at batch 2, 4." in STUDY.summary(rows)
    assert "In the conv net BatchNorm is worse than GroupNorm at no batch size." in STUDY.summary(rows)
    assert "One seed" in STUDY.summary(rows_with(lambda _: {}, 1))


def test_the_picture_shows_every_loss_inside_its_axes():
    """Each line has a point for each batch size, and no text is cut off."""
    figure = STUDY.draw(rows_with(worse_below(8)))
    FigureCanvasAgg(figure).draw()
    width, height = figure.canvas.get_width_height()
    for axes, _ in zip(figure.axes, NETWORKS, strict=False):
        low, high = axes.get_ylim()
        lines = [container.lines[0] for container in axes.containers]
        assert [len(line.get_xdata()) for line in lines] == [6, 6, 6, len(FEWER)]
        assert all(low < value < high for line in lines for value in line.get_ydata())
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, *axes.get_legend().get_texts()):
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height


def test_settings_are_all_different_and_grow_by_seed():
    """A run is made once, and more seeds add runs without changing the others."""
    one, three = STUDY.settings(range(1)), STUDY.settings(range(3))
    assert len({tuple(setting.items()) for setting in three}) == len(three) == 3 * len(one)
    assert three[: len(one)] == one


def trained(norm, batch, accumulate, *, epochs=1):
    """An MLP after a short training, with what was heard."""
    torch.manual_seed(0)
    net = batch_size.network_of("mlp", norm)
    noise = Noise(net)
    data = batch_size.digits(0)
    batch_size.train(net, noise, data, batch=batch, accumulate=accumulate, rate=1e-3, epochs=epochs, seed=0)
    return net, noise, data


def test_accumulation_is_the_larger_batch_for_groupnorm_and_not_for_batchnorm():
    """The control of the study: four batches of 4 give GroupNorm's weights of 16, and not BatchNorm's."""
    for norm, same in (("group", True), ("batch", False)):
        weights = [nn.utils.parameters_to_vector(trained(norm, *sizes)[0].parameters()) for sizes in ((4, 4), (16, 1))]
        assert torch.allclose(*weights, atol=1e-4) is same


@pytest.mark.slow
def test_m_eff_is_that_of_the_forward_pass():
    """Batches of 4, accumulated or not, have about 4 effective samples in an MLP, batches of 16 about 16."""
    found = {}
    for batch, accumulate in ((4, 1), (4, 4), (16, 1)):
        net, noise, data = trained("batch", batch, accumulate, epochs=4)
        found[batch, accumulate] = batch_size.batchnorm_only(net.eval(), noise, data, batch)["m_eff"]
    assert 3 < found[4, 4] < 6
    assert 3 < found[4, 1] < 6
    assert 12 < found[16, 1] < 26


def test_whole_steps_take_each_image_at_most_once():
    """All steps of an epoch have one size, and what does not fill a step is left out."""
    parts = list(batch_size.whole_steps(torch.arange(10), 4))
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_evaluation_changes_nothing():
    """Re-estimated statistics and batch statistics are used for a while; weights, buffers and mode are as before."""
    net, noise, data = trained("batch", 16, 1)
    before = copy.deepcopy(net.eval().state_dict())
    row = batch_size.batchnorm_only(net, noise, data, 16)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training
    assert list(row) == list(batch_size.BATCHNORM_ONLY)


def test_losses_are_those_of_normalisation_by_hand():
    """Statistics of the training images, and those of each validation batch, give the losses of a plain computation."""
    torch.manual_seed(0)
    linear, norm = nn.Linear(64, 10), nn.BatchNorm1d(10)
    net, data = nn.Sequential(nn.Flatten(), linear, norm).eval(), batch_size.digits(0)
    with torch.no_grad():
        z, train = (linear(x.flatten(1)).double() for x in (data.val_images, data.images))
    spread = (train.var(0, correction=1) + norm.eps).sqrt()
    by_hand = nn.functional.cross_entropy((z - train.mean(0)) / spread, data.val_labels).item()
    row = batch_size.batchnorm_only(net, heard(net, data), data, 200)
    assert row["whole_loss"] == pytest.approx(by_hand, rel=1e-5)
    parts = z.split(200)
    logits = torch.cat([(part - part.mean(0)) / (part.var(0, correction=0) + norm.eps).sqrt() for part in parts])
    assert row["batch_loss"] == pytest.approx(nn.functional.cross_entropy(logits, data.val_labels).item(), rel=1e-5)


def heard(net, data):
    """Noise of a few batches of a network that does not learn."""
    noise = Noise(net)
    batch_size.train(net, noise, data, batch=16, accumulate=1, rate=0.0, epochs=1, seed=0)
    net.eval()
    return noise


def test_a_run_is_repeatable_and_batchnorm_alone_has_effective_samples(monkeypatch):
    """The seed decides a run, and columns that GroupNorm cannot have are empty."""
    monkeypatch.setattr(batch_size, "EPOCHS", {"mlp": 1, "conv": 1})
    settings = {
        s["norm"]: s for s in STUDY.settings([3]) if (s["network"], s["batch"], s["rule"]) == ("mlp", 32, "root")
    }
    for norm, setting in settings.items():
        first, again = STUDY.measure(setting), STUDY.measure(setting)
        assert first == again
        assert {name for name, value in first.items() if value is None} == (
            set() if norm == "batch" else set(batch_size.BATCHNORM_ONLY)
        )
        assert first["rate"] == 3e-3
