# SPDX-License-Identifier: Apache-2.0
"""The study ``small_data``, and the quiet Trainer that it trains with."""

from __future__ import annotations

import logging
import random
import signal
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormMonitor, find_batchnorm
from lightning_bn.demo import DigitsData, DigitsMLP
from lightning_bn.stats.attribution import Change
from lightning_bn.studies.fitting import LOGGERS, batches, fit
from lightning_bn.studies.small_data import measure as small_data
from lightning_bn.studies.small_data import verdicts as small_data_verdicts
from lightning_bn.studies.small_data.measure import STUDY, Digits, measure, network, settings, training, validation
from lightning_bn.studies.small_data.report import with_gap, worst
from lightning_bn.studies.small_data.rows import MARKS, NAMES, Run, in_words, judged, paired, runs_of

SEEDS = range(6)


class Failing(Digits):
    """Breaks off in the third step."""

    def __init__(self, error):
        super().__init__("none")
        self.error, self.steps = error, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        if self.steps == 3:
            raise self.error
        return super().training_step(batch, batch_idx)


def digits(noise=0.0, size=40):
    """A small training set and the validation set."""
    data = DigitsData(8, train_size=size, label_noise=noise)
    data.setup("fit")
    return data.train_set, data.val_set


def loaders(**options):
    """Loaders for them."""
    train, valid = digits(**options)
    return batches(train, 8, shuffle=True), batches(valid, 600)


def rows(effect=lambda run: {}, seeds=SEEDS):
    """A row for each setting, all alike but for a little chance and what the effect of a run adds to its columns."""
    chance = random.Random(0)
    made = []
    for setting in settings(seeds):
        run = Run(**{name: value for name, value in setting.items() if name != "seed"})
        base = {
            "best_loss": 0.5,
            "last_loss": 0.8,
            "rise": 0.3,
            "relative_rise": 0.6,
            "best_epoch": 20,
            "best_acc": 0.9,
            "last_acc": 0.8,
            "train_loss": 0.01,
            "train_acc": 1.0,
            "memorised": 0.9 if run.noise else None,
            "verdict": "overfitting-elsewhere" if run.norm == "batch" else None,
            "share_low": 0.0 if run.norm == "batch" else None,
            "share_high": 0.2 if run.norm == "batch" else None,
            "statistics": 0.03 if run.norm == "batch" else None,
            "wrong_statistics": 0 if run.norm == "batch" else None,
            "effective": 8.0 if run.norm == "batch" else None,
            **{f"loss_{epoch}": 1.0 for epoch in MARKS},
        }
        added = effect(run)
        numbers = ("rise", "last_loss", "last_acc", "loss_3")
        jittered = {name: base[name] + 0.001 * chance.gauss(0, 1) + added.get(name, 0) for name in numbers}
        others = {name: value for name, value in added.items() if name not in numbers}
        made.append({**setting, **base, **jittered, **others})
    return made


def test_batches_hold_every_sample_once_in_the_order_of_the_set():
    """Without shuffling they are the batches of a plain loader, the short last one among them."""
    train, _ = digits(size=20)
    plain = list(DataLoader(train, 8))
    assert [len(labels) for _, labels in batches(train, 8)] == [8, 8, 4]
    for (images, labels), (expected, right) in zip(batches(train, 8), plain, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, right)


def test_shuffled_batches_are_decided_by_the_seed():
    """The order of an epoch is another one each time and the same with the same seed; no sample is lost."""
    train = TensorDataset(torch.arange(20))
    torch.manual_seed(1)
    first, second = ([int(x) for (batch,) in batches(train, 8, shuffle=True) for x in batch] for _ in range(2))
    torch.manual_seed(1)
    again = [int(x) for (batch,) in batches(train, 8, shuffle=True) for x in batch]
    assert first == again != second
    assert sorted(first) == list(range(20))


@pytest.mark.slow
def test_the_trainer_gives_what_a_plain_loop_gives():
    """Losses and accuracies of each epoch are to the last digit those of a loop in plain torch."""
    torch.manual_seed(0)
    curve = fit(Digits("batch"), *loaders(noise=0.3), epochs=3)
    torch.manual_seed(0)
    net, expected = Digits("batch").net, []
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    train, valid = loaders(noise=0.3)
    for _ in range(3):
        net.train()
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        net.eval()
        for images, labels in valid:
            logits = net(images).detach()
            correct = (logits.argmax(1) == labels).sum() / 600
            expected.append({"val_loss": float(nn.functional.cross_entropy(logits, labels)), "val_acc": float(correct)})
    assert curve == expected


@pytest.mark.slow
def test_a_fit_says_nothing_and_leaves_nothing(capfd, tmp_path, monkeypatch):
    """Screen and folder stay empty though the monitor has something to say; levels and filters are put back."""
    monkeypatch.chdir(tmp_path)
    levels, filters = [logging.getLogger(name).level for name in LOGGERS], list(warnings.filters)
    monitor = BatchNormMonitor()
    fit(Digits("batch"), *loaders(), epochs=2, callbacks=[monitor])
    assert monitor.findings
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert [logging.getLogger(name).level for name in LOGGERS] == levels
    assert list(warnings.filters) == filters


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("a fault")], ids=["Ctrl-C", "a fault"])
def test_what_ends_a_fit_comes_out_of_it(error):
    """Neither an error nor Ctrl-C is swallowed or turned into an exit, and the next Ctrl-C is heard."""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(type(error)):
        fit(Failing(error), *loaders(), epochs=1)
    assert signal.getsignal(signal.SIGINT) is handler


def test_settings_hold_the_whole_grid_seed_by_seed():
    """Each norm is combined with each dropout and noise, no setting is there twice, and a seed is made as a whole."""
    made = settings([4, 7])
    half = len(made) // 2
    assert [setting["seed"] for setting in made] == [4] * half + [7] * half
    assert len({tuple(setting.items()) for setting in made}) == len(made)
    grid = {(s["norm"], s["noise"], s["dropout"]) for s in made if s["depth"] == 2 and s["start"] == "pytorch"}
    assert grid >= {(norm, noise, dropout) for norm in NAMES for noise in (0.0, 0.3) for dropout in ("no", "all")}
    assert {s["norm"] for s in made if s["depth"] == 6 and s["noise"] == 0.3} >= {"batch", "none"}


@pytest.mark.parametrize(
    ("run", "drops", "norms", "trained"),
    [
        pytest.param(Run("batch"), [], 2, True, id="BatchNorm"),
        pytest.param(Run("none"), [], 0, True, id="none"),
        pytest.param(Run("batch", depth=6), [], 6, True, id="six layers"),
        pytest.param(Run("batch", dropout="all"), [0.5, 0.5], 2, True, id="dropout"),
        pytest.param(Run("batch", dropout="last"), [0.0, 0.5], 2, True, id="dropout in front of the head"),
        pytest.param(Run("batch", affine="fixed"), [], 2, False, id="fixed"),
    ],
)
def test_a_network_is_what_its_run_says(run, drops, norms, trained):
    """Depth, norm, place of dropout and whether γ and β learn are those of the run; all else learns."""
    model = network(run)
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == drops
    found = find_batchnorm(model)
    assert len(found) == norms
    affine = {id(x) for layer in found.values() for x in layer.parameters()}
    assert {x.requires_grad for x in model.parameters() if id(x) in affine} <= {trained}
    assert all(x.requires_grad for x in model.parameters() if id(x) not in affine)


def test_networks_of_a_seed_start_from_the_same_weights():
    """The linear layers of all norms and dropouts are equal at the start, so that runs can be compared in pairs."""
    weights = []
    for run in [run for run in runs_of(rows(seeds=[0])) if run.depth == 2 and run.start == "pytorch"]:
        torch.manual_seed(3)
        weights.append([layer.weight for layer in network(run).modules() if isinstance(layer, nn.Linear)])
    assert len(weights) == 20
    assert all(torch.equal(a, b) for mine in weights for a, b in zip(mine, weights[0], strict=True))


def test_a_rise_goes_from_the_best_to_the_last_validation():
    """Best and last are told apart by loss, epochs count from 1, and the best accuracy may be of another epoch."""
    losses, shares = [1.0, 0.5, 0.75, 0.7], [0.3, 0.6, 0.8, 0.7]
    found = validation([{"val_loss": loss, "val_acc": share} for loss, share in zip(losses, shares, strict=True)])
    assert found == {
        "best_loss": 0.5,
        "last_loss": 0.7,
        "rise": pytest.approx(0.2),
        "relative_rise": pytest.approx(0.4),
        "best_epoch": 2,
        "best_acc": 0.8,
        "last_acc": 0.7,
    }


@pytest.mark.parametrize(
    ("true", "memorised"),
    [
        pytest.param([0, 1, 2, 3], None, id="no wrong label"),
        pytest.param([0, 1, 2, 5], 0.0, id="the wrong one is not given back"),
        pytest.param([9, 1, 8, 3], 1.0, id="both are"),
        pytest.param([9, 1, 2, 5], 0.5, id="one of two is"),
    ],
)
def test_memorised_is_the_share_of_wrong_labels_that_come_back(true, memorised):
    """Of labels 0, 1, 2, 3 the network answers 0, 1, 2, 2: wrong labels among the first three are given back."""
    model = Digits("none")
    answers = nn.functional.one_hot(torch.tensor([0, 1, 2, 2]), 10) * 2.0
    model.net = nn.Flatten()
    labels = torch.tensor([0, 1, 2, 3])
    found = training(model, answers, labels, torch.tensor(true))
    assert found["memorised"] == memorised
    assert found["train_acc"] == 0.75
    assert found["train_loss"] == pytest.approx(float(nn.functional.cross_entropy(answers, labels)))


def test_hes_start_is_that_of_the_hidden_layers():
    """Their weights have variance 2/fan_in, the head keeps PyTorch's 1/(3·fan_in); with and without norm they agree."""
    nets = {}
    for norm in ("batch", "none"):
        torch.manual_seed(0)
        model = network(Run(norm, depth=3, start="he"))
        nets[norm] = [layer.weight.detach() for layer in model.modules() if isinstance(layer, nn.Linear)]
    variances = [float(weight.var() * weight.shape[1]) for weight in nets["batch"]]
    assert variances == pytest.approx([2, 2, 2, 1 / 3], rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(*nets.values(), strict=True))


@pytest.mark.slow
def test_a_run_is_decided_by_its_setting():
    """A network with BatchNorm, wrong labels and no dropout memorises them and overfits, each time the same way."""
    (setting,) = [s for s in settings([0]) if Run("batch", noise=0.3) == Run(**{k: s[k] for k in s if k != "seed"})]
    row = measure(setting)
    torch.manual_seed(99)
    assert measure(setting) == row
    assert row["verdict"] == "overfitting-elsewhere"
    assert row["share_low"] <= row["share_high"] < 0.5
    assert row["memorised"] > 0.9
    assert row[f"loss_{MARKS[-1]}"] == row["last_loss"] == pytest.approx(row["best_loss"] + row["rise"])
    assert 4 < row["effective"] < 12
    assert list({**setting, **row}) == list(rows(seeds=[0])[0])


@pytest.mark.slow
def test_a_run_without_batchnorm_has_no_verdict():
    """What the monitor would say is empty, and the labels are those of the digits where there is no noise."""
    row = measure(next(s for s in settings([0]) if s["norm"] == "none" and not s["noise"]))
    assert row["memorised"] is row["verdict"] is row["share_high"] is row["wrong_statistics"] is None
    assert row["last_acc"] > 0.8


def test_pairs_are_of_one_seed_whatever_the_order_of_the_rows():
    """A change is taken seed by seed; a seed that one of both lacks is left out."""
    one, other = Run("none"), Run("batch")
    made = [{**vars(one), "seed": seed, "rise": float(seed)} for seed in (0, 1, 2)]
    made += [{**vars(other), "seed": seed, "rise": seed + 0.5 + 0.01 * seed} for seed in (3, 2, 1, 0)]
    found = paired(made, one, other, "rise")
    assert (found.before, found.after) == (1.0, pytest.approx(1.51))
    assert found.z > 3
    assert paired(made, other, one, "rise").z == pytest.approx(-found.z)


@pytest.mark.parametrize(
    ("zs", "expected"),
    [
        pytest.param([4, 3], "holds", id="all"),
        pytest.param([4, 0.5], "holds if", id="some"),
        pytest.param([4, -4], "holds if", id="both"),
        pytest.param([2.9, -2.9], "not shown", id="none"),
        pytest.param([2.9, -3], "does not hold", id="the contrary"),
        pytest.param([float("nan")], "not shown", id="unknown"),
        pytest.param([], "not shown", id="nothing"),
    ],
)
def test_a_claim_is_judged_by_what_is_sure(zs, expected):
    """It holds where every difference is three standard errors, and fails only where the contrary is sure."""
    assert judged([Change(1.0, 1.0, z) for z in zs], 1) == expected
    assert judged([Change(1.0, 1.0, -z) for z in zs], -1) == expected


CLAIMS = {
    "noise_regularises": ("rise", lambda run: -0.1 * (run.norm == "batch")),
    "dropout_is_spared": ("last_loss", lambda run: 0.1 * (run.norm == "batch" and run.dropout == "all")),
    "affine_memorises": ("rise", lambda run: 0.1 * (run.norm == "batch" and run.affine == "trained")),
    "small_data_overfits_more": ("rise", lambda run: 0.1 * (run.norm == "batch")),
    "converges_faster": ("loss_3", lambda run: -0.1 * (run.norm == "batch")),
    "ends_worse": ("last_acc", lambda run: -0.1 * (run.norm == "batch")),
    "others_instead": ("last_acc", lambda run: 0.1 * (run.norm in {"group", "layer"})),
    "keep_dropout": ("last_loss", lambda run: -0.1 * (run.dropout == "all")),
    "dropout_behind_batchnorm": ("last_loss", lambda run: 0.1 * (run.dropout == "all")),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_verdict_follows_what_is_planted(name):
    """An effect holds, its contrary does not, without one nothing is shown, and where it is in part, it is said so."""
    column, effect = CLAIMS[name]
    judge = getattr(small_data_verdicts, name)
    assert judge(rows(lambda run: {column: effect(run)})).verdict == "holds"
    assert judge(rows(lambda run: {column: -effect(run)})).verdict == "does not hold"
    assert judge(rows()).verdict == "not shown"
    assert judge(rows(lambda run: {column: effect(run) * bool(run.noise)})).verdict == "holds if"


@pytest.mark.parametrize(
    ("verdict", "expected", "words"),
    [
        pytest.param(lambda run: "overfitting-elsewhere", "does not hold", "drive 0 and share in 0", id="elsewhere"),
        pytest.param(lambda run: "affine-driven-overfitting", "holds", "drive 54 and share in 0", id="driven"),
        pytest.param(
            lambda run: "shared-overfitting" if run.noise else "no-overfitting",
            "holds if",
            "drive 0 and share in 36",
            id="shared",
        ),
        pytest.param(lambda run: "no-overfitting", "not shown", "of 0 runs", id="none overfits"),
    ],
)
def test_the_verdict_on_gamma_and_beta_is_that_of_the_monitor(verdict, expected, words):
    """Only what it says of runs that overfit counts, and runs with fixed γ and β do not."""
    said = lambda run: {"verdict": verdict(run)} if run.norm == "batch" and run.affine == "trained" else {}  # noqa: E731
    found = small_data_verdicts.affine_drives(rows(said))
    assert found.verdict == expected
    assert words in found.measured


def test_the_worst_is_named_where_it_is_sure():
    """Most of what is bad, or least of what is good; whom it is not surely worse than is not named."""
    made = rows(lambda run: {"rise": 0.1 * (run.norm == "none"), "last_acc": -0.1 * (run.norm in {"group", "layer"})})
    runs = [Run(norm) for norm in NAMES]
    assert worst(made, runs, "rise", 1) == "no norm: worse than BatchNorm, GroupNorm, LayerNorm"
    assert worst(made, runs, "last_acc", -1).endswith("Norm: worse than BatchNorm, no norm")
    assert worst(rows(), runs, "rise", 1) == ""


def test_the_gap_is_between_training_and_validation():
    """More of it is worse."""
    assert with_gap({"last_loss": 1.5, "train_loss": 0.5})["gap"] == 1.0


def test_the_summary_says_what_the_rows_say():
    """Another rise, accuracy, verdict or effect of dropout gives other sentences."""
    plain = STUDY.summary(rows())
    assert plain.count("(not surely different") == 9
    assert "Of 54 runs with BatchNorm that overfit, γ and β drive 0 and share in 0." in plain
    assert "depends on the measure" not in plain
    other = STUDY.summary(
        rows(
            lambda run: {
                "rise": 0.5 * (run.norm == "none"),
                "last_acc": -0.05 * (run.norm == "batch"),
                "last_loss": -0.4 * (run.dropout == "all"),
            }
        )
    )
    assert "rises by 0.30 with BatchNorm and 0.80 without for 30% label noise (surely different" in other
    assert other.count("(surely different") == 9
    assert "by the rise of the validation loss no norm: worse than BatchNorm, GroupNorm, LayerNorm" in other
    assert "by the last accuracy BatchNorm: worse than no norm, GroupNorm, LayerNorm" in other
    assert "BatchNorm 0.80 → 0.40" in other


def test_a_verdict_says_where_it_holds():
    """Places where a claim or its contrary is sure are named if there are others; where all agree it need not be."""
    mixed = rows(lambda run: {"rise": 0.1 * (run.norm == "batch") * (-1 if run.depth == 6 else 1 if run.noise else 0)})
    found = small_data_verdicts.small_data_overfits_more(mixed)
    assert found.verdict == "holds if"
    plain, deep = "30% label noise", "30% label noise, 6 layers"
    words = f"; holds for {plain} / {plain}, He's start; the contrary for {deep} / {deep}, He's start"
    assert found.measured.endswith(words)
    everywhere = rows(lambda run: {"rise": 0.1 * (run.norm == "batch")})
    assert " for 30%" not in small_data_verdicts.small_data_overfits_more(everywhere).measured


@pytest.mark.parametrize("seeds", [range(1), SEEDS], ids=["one seed", "six seeds"])
def test_a_study_of_any_size_can_be_shown(seeds):
    """Tables, verdicts, summary and figure are made of one seed too, and of it nothing is claimed."""
    made = rows(lambda run: {"rise": 0.5 * (run.norm == "batch")}, seeds)
    found = STUDY.verdicts(made)
    texts = [STUDY.tables(made), STUDY.summary(made), *(verdict.measured for verdict in found)]
    assert not [text for text in texts if "nan" in text]
    assert all(line.count("|") == lines[0].count("|") for lines in _blocks(texts[0]) for line in lines)
    decided = {verdict.verdict for verdict in found if "γ and β" not in verdict.claim}
    assert decided == ({"not shown"} if len(seeds) == 1 else {"not shown", "holds", "does not hold"})


def _blocks(text):
    parts = [part.split("\n") for part in text.split("\n\n") if part.startswith("|")]
    assert len(parts) == 3
    return parts


def test_the_figure_shows_the_means_of_the_rows():
    """Curves run through the mean losses of their epochs, and points lie at the mean rise of a run."""
    made = rows(lambda run: {f"loss_{epoch}": 0.01 * epoch + (run.norm == "none") for epoch in MARKS if epoch != 3})
    above, below = STUDY.draw(made).axes[0], STUDY.draw(made).axes[3]
    curves = {line.get_label(): line.get_ydata() for line in above.get_lines()}
    assert list(curves) == list(NAMES.values())
    assert curves["no norm"][-1] == pytest.approx(1.6)
    assert curves["BatchNorm"][-1] == pytest.approx(0.6)
    heights = [line.get_ydata()[0] for line in below.get_lines() if len(line.get_xdata()) == 1]
    assert heights == pytest.approx([0.3] * len(heights), abs=0.01)
    assert "rise" in below.get_title()


def test_a_mean_of_one_has_no_error():
    """Of one seed the mean stands alone, and of none there is nothing."""
    assert (in_words([0.5], ".0%"), in_words([]), in_words([1.0, 3.0])) == ("50%", "", "2.00 ± 1.00")


def test_the_network_of_the_study_is_that_of_the_demo():
    """It gives the logits of ``DigitsMLP`` and logs what that logs, but for the training loss."""
    torch.manual_seed(5)
    mine = Digits("batch")
    torch.manual_seed(5)
    other = DigitsMLP("batch")
    images = torch.randn(8, 1, 8, 8)
    assert torch.equal(mine(images), other(images))
    assert small_data.STUDY.name == "small_data"
