# SPDX-License-Identifier: Apache-2.0
"""Running statistics are those of the weights when they are used, and nothing else of the training is changed."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from harm import Busy, Manual, assert_identical, everything_after
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from specimens import CLASSES, FEATURES, Healthy, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_precise import SINGLE, by_loop
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_bn import BatchNormMonitor, NaNGuard, PreciseBatchNorm

STATISTICS = ("running_mean", "running_var")
INPUTS = [x for x, _ in loader()]


def fit(trainer, build, *loaders):
    """Build a model from the seed, and train it."""
    seed_everything(3)
    model = build()
    trainer.fit(model, *(loaders or (loader(), loader(seed=1))))
    return model


def run(make_trainer, build, callbacks, **options):
    seed_everything(3)
    model = build()
    trainer = make_trainer(*callbacks, **{"max_epochs": 3, **options})
    trainer.fit(model, loader(), loader(seed=1))
    return everything_after(trainer, model)


def but_statistics(after):
    """Everything after a fit that is to be the same, and the running statistics."""
    statistics = {name: after["model"].pop(name) for name in list(after["model"]) if name.endswith(STATISTICS)}
    after["metrics"].pop("val_loss", None)
    return after, statistics


def assert_precise(model, batches=INPUTS, *, expected=None):
    """The running statistics of a model are the population statistics of its weights on these batches."""
    for name, (mean, var) in (expected or by_loop(model, batches)).items():
        torch.testing.assert_close(model.get_submodule(name).running_mean.double(), mean, **SINGLE)
        torch.testing.assert_close(model.get_submodule(name).running_var.double(), var, **SINGLE)


def is_precise(model):
    try:
        assert_precise(model)
    except AssertionError:
        return False
    return True


class Fast(Healthy):
    """With a learning rate at which averages differ from what they are made of."""

    def __init__(self):
        super().__init__(lr=0.1)


class Looks(Callback):
    """Notes, at each validation loop and at the end, whether the statistics are those of the weights."""

    def __init__(self):
        self.seen = {}

    def look(self, hook, model):
        self.seen.setdefault(hook, []).append(is_precise(model))

    def on_sanity_check_end(self, trainer, pl_module):
        self.look("sanity check", pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking and _[1] == 0:
            self.look("validation", pl_module)

    def on_fit_end(self, trainer, pl_module):
        self.look("end", pl_module)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate_grad_batches": 3, "val_check_interval": 0.5}, id="accumulation, inside the epoch"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"precision": "64-true", "gradient_clip_val": 0.1}, id="64-true, clipping"),
        pytest.param({"num_sanity_val_steps": 2, "when": "end"}, id="at the end"),
        pytest.param({"dropout": True}, id="dropout"),
    ],
)
def test_all_but_the_running_statistics_is_bit_identical_to_training_without(make_trainer, options):
    """Weights, counters, optimizer, random streams and metrics of training are equal; the statistics are not."""
    mine = {name: options.pop(name) for name in ("when", "dropout") if name in options}
    callback = PreciseBatchNorm(**mine)
    plain, left = but_statistics(run(make_trainer, Busy, [], **options))
    precise, written = but_statistics(run(make_trainer, Busy, [callback], **options))
    assert_identical(plain, precise)
    assert not callback.off
    assert callback.findings == []
    assert len(written) == 4
    assert all(not torch.equal(written[name], left[name]) for name in written)


@pytest.mark.parametrize("when", ["validation", "end"])
def test_statistics_are_those_of_the_weights_when_they_are_used(make_trainer, when):
    """In every validation and at the end they agree with a float64 loop; the sanity check sees the start."""
    looks = Looks()
    fit(make_trainer(PreciseBatchNorm(when=when), looks, max_epochs=3, num_sanity_val_steps=1), Healthy)
    assert looks.seen == {"sanity check": [False], "validation": [when == "validation"] * 3, "end": [True]}


def test_plain_training_does_not_have_them(make_trainer):
    """The test above is not blind: the running average is another."""
    looks = Looks()
    fit(make_trainer(looks, max_epochs=3), Healthy)
    assert looks.seen == {"sanity check": [False], "validation": [False] * 3, "end": [False]}


def test_checkpoints_hold_them(make_trainer, tmp_path):
    """What is saved after a validation are weights with statistics that fit."""
    saves = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, monitor="val_loss")
    options = {"max_epochs": 2, "enable_checkpointing": True}
    fit(make_trainer(PreciseBatchNorm(), saves, **options), Healthy)
    files = list((tmp_path / "saved").glob("*.ckpt"))
    assert len(files) == 2
    for file in files:
        model = Healthy()
        model.load_state_dict(torch.load(file)["state_dict"])
        assert_precise(model)


def test_without_a_validation_loop_the_final_weights_have_them(make_trainer):
    """There is nothing to do before the end, and nothing to say."""
    callback = PreciseBatchNorm()
    model = fit(make_trainer(callback, limit_val_batches=0), Healthy)
    assert_precise(model)
    assert callback.findings == []


def test_a_part_of_the_batches_is_used_where_fewer_samples_are_asked_for(make_trainer):
    """Two of four batches are kept, and the estimate is theirs."""
    callback = PreciseBatchNorm(16)
    kept = []

    class Spies(Callback):
        def on_train_end(self, trainer, pl_module):
            kept.extend(entry.batch[0] for entry in callback._batches.kept)

    model = fit(make_trainer(callback, Spies()), Healthy)
    assert [len(x) for x in kept] == [8, 8]
    assert_precise(model, kept)
    assert callback.findings == []


def test_memory_that_is_too_small_is_told(make_trainer):
    """Fewer samples are kept than were asked for; the finding has the numbers."""
    callback = PreciseBatchNorm(max_gigabytes=1000e-9)  # a batch takes 448 bytes
    model = fit(make_trainer(callback), Healthy)
    (finding,) = callback.findings
    assert finding.evidence == (
        "running statistics are re-estimated on 16 samples a process, where 8192 were asked for: "
        "more would take over 1e-06 GB of memory"
    )
    assert finding.advice == "raise max_gigabytes"
    assert not is_precise(model)


class Counted(IterableDataset):
    """Says how often it was begun, and how many samples were drawn from it."""

    def __init__(self):
        self.begun = self.drawn = 0

    def __iter__(self):
        self.begun += 1
        for x, y in loader().dataset:
            self.drawn += 1
            yield x, y


def test_the_training_loader_is_never_asked(make_trainer):
    """An iterable dataset is begun once an epoch and drained of nothing."""
    data = Counted()
    callback = PreciseBatchNorm()
    model = fit(make_trainer(callback, max_epochs=3), Healthy, DataLoader(data, 8), loader(seed=1))
    assert (data.begun, data.drawn) == (3, 96)
    assert_precise(model)


def test_how_far_the_average_was_off_is_logged_and_kept(make_trainer):
    """Before each validation, against the running average of training; the last estimate does not hide it."""
    callback = PreciseBatchNorm()
    trainer = make_trainer(callback, max_epochs=2)

    def build():
        model = Healthy()
        model.net[1].momentum = model.net[4].momentum = 0.001
        return model

    fit(trainer, build)
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    for name in ("running_mean_error", "running_var_error"):
        for statistic in ("median", "max"):
            rows = events.Scalars(f"bn_overview/{name}_{statistic}")
            assert [row.step for row in rows] == [3, 7]
            assert rows[0].value > 0.05
    assert list(callback.distances) == ["net.1", "net.4"]
    last = max(entry.log_var for entry in callback.distances.values())
    assert events.Scalars("bn_overview/running_var_error_max")[-1].value == pytest.approx(last)


def test_the_validation_curve_does_not_depend_on_momentum(make_trainer):
    """Momentum of 0.001, 0.9 or None (a mean over all batches) give the curve of 0.1, to the last digits."""

    class Curve(Callback):
        def __init__(self):
            self.losses = []

        def on_validation_end(self, trainer, pl_module):
            self.losses.append(float(trainer.callback_metrics["val_loss"]))

    def curve(momentum, *ours):
        def build():
            model = Fast()
            model.net[1].momentum = model.net[4].momentum = momentum
            return model

        seen = Curve()
        fit(make_trainer(*ours, seen, max_epochs=3, num_sanity_val_steps=0), build)
        return seen.losses

    usual = curve(0.1, PreciseBatchNorm())
    for momentum in (0.001, 0.9, None):
        assert curve(momentum, PreciseBatchNorm()) == pytest.approx(usual, rel=1e-6)
        assert curve(momentum) != pytest.approx(usual, rel=1e-2)


def test_frozen_layers_keep_their_statistics(make_trainer):
    """A layer in eval mode during training is left alone, the others are not."""

    class Frozen(Healthy):
        def on_train_epoch_start(self):
            self.net[1].eval()

    callback = PreciseBatchNorm()
    model = fit(make_trainer(callback), Frozen)
    assert torch.equal(model.net[1].running_mean, torch.zeros(16))
    assert_precise(model, expected={"net.4": by_loop_with(model, frozen="net.1")["net.4"]})
    assert callback.findings == []

    class AllFrozen(Frozen):
        def on_train_epoch_start(self):
            self.net.eval()

    fit(make_trainer(callback), AllFrozen)
    assert callback.findings[-1].evidence.endswith(
        "no BatchNorm layer has running statistics that training updates (frozen, or none)"
    )


def by_loop_with(model, frozen):
    """The loop, with one layer normalising by its running statistics."""
    twin = copy.deepcopy(model)
    layer = twin.get_submodule(frozen)
    parent, _, place = frozen.rpartition(".")
    plain = nn.Identity()
    plain.forward = lambda x: (
        (x - layer.running_mean.double()) / (layer.running_var.double() + layer.eps).sqrt() * layer.weight.double()
        + layer.bias.double()
    )
    setattr(twin.get_submodule(parent), place, plain)
    return by_loop(twin, INPUTS)


class Teacher(Healthy):
    """Its step moves a teacher's weights itself, in three ways, and asks the teacher in eval mode."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(requires_grad=False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for place, (mine, own) in enumerate(zip(self.teacher.parameters(), self.net.parameters(), strict=True)):
                if place % 3 == 0:
                    mine.mul_(0.9).add_(own, alpha=0.1)
                elif place % 3 == 1:
                    mine.data.mul_(0.9).add_(own.data, alpha=0.1)
                else:
                    mine.data = mine.data * 0.9 + own.data * 0.1
        self.teacher.eval()
        return super().training_step(batch, batch_idx) + self.teacher(batch[0]).square().mean()


def test_weights_that_the_step_itself_writes_to_are_put_back(make_trainer):
    """A moving average of a teacher moves once a step, however it is written."""
    plain, _ = but_statistics(run(make_trainer, Teacher, []))
    precise, _ = but_statistics(run(make_trainer, Teacher, [PreciseBatchNorm()]))
    assert_identical(plain, precise)


class ChangesItsBatch(Healthy):
    def training_step(self, batch, batch_idx):
        batch[0].mul_(2)
        return super().training_step(batch, batch_idx)


def test_a_step_that_changes_its_batch_gets_a_new_one_each_time(make_trainer):
    """The kept batches are as they came, at the second estimate too."""
    model = fit(make_trainer(PreciseBatchNorm(), max_epochs=2), ChangesItsBatch, DataLoader(loader().dataset, 8))
    assert_precise(model, [2 * x for x in INPUTS])


class Detector(nn.Module):
    """Computes losses in training mode and something else in eval mode, with dropout inside."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = network(), nn.Dropout(0.5)

    def forward(self, x, y):
        if not self.training:
            return [x]
        return {"loss": nn.functional.cross_entropy(self.net(self.drop(x)), y)}


class Detection(Healthy):
    def __init__(self):
        super().__init__(Detector())

    def training_step(self, batch, batch_idx):
        return self.net(*batch)["loss"]

    def validation_step(self, batch, batch_idx):
        assert len(self.net(*batch)) == 1


@pytest.mark.parametrize("dropout", [False, True])
def test_a_model_that_computes_losses_in_training_mode_alone_is_estimated(make_trainer, dropout):
    """Containers of the user's stay in training mode; dropout is off unless it is asked for."""
    callback = PreciseBatchNorm(dropout=dropout)
    model = fit(make_trainer(callback), Detection)
    assert callback.findings == []
    expected = {f"net.{name}": value for name, value in by_loop(model.net, INPUTS, run=through).items()}
    if dropout:
        with pytest.raises(AssertionError):
            assert_precise(model, expected=expected)
    else:
        assert_precise(model, expected=expected)


def through(detector, x):
    return detector.net(x)


class NotAgain(Healthy):
    """Its step does not run a second time."""

    def training_step(self, batch, batch_idx):
        if self.trainer.validating or self.trainer.state.stage is None:
            raise RuntimeError("no second run")
        return super().training_step(batch, batch_idx)


class TakesIterator(Healthy):
    def training_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        return self.loss(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        pytest.param(Manual, "its training_step steps the optimizers (manual optimisation)", id="manual"),
        pytest.param(TakesIterator, "takes batches from the loader (dataloader_iter)", id="iterator"),
        pytest.param(lambda: Healthy(network(norm=False)), "the model has no BatchNorm layer", id="no BatchNorm"),
        pytest.param(NotAgain, "the step failed when it was run again: RuntimeError: no second run", id="fails"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")  # Lightning's, that hooks see no batch there
def test_what_cannot_be_run_again_is_told_and_left_alone(make_trainer, build, words):
    """One note says why, and the whole training is bit-identical, running statistics included."""
    callback = PreciseBatchNorm()
    plain, precise = run(make_trainer, build, []), run(make_trainer, build, [callback])
    if build is NotAgain:  # at the end of the fit it does
        plain, precise = but_statistics(plain)[0], but_statistics(precise)[0]
    assert_identical(plain, precise)
    (finding,) = callback.findings
    assert finding.rule == "not-re-estimated"
    assert finding.evidence.startswith("running statistics were not re-estimated: ")
    assert words in finding.evidence
    assert not callback.off


class Locked(Healthy):
    def train_dataloader(self):
        return DataLoader(
            loader().dataset,
            8,
            collate_fn=lambda rows: {
                "x": torch.stack([x for x, _ in rows]),
                "y": torch.stack([y for _, y in rows]),
                "lock": threading.Lock(),
            },
        )

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_a_batch_that_cannot_be_copied_is_told(make_trainer):
    """Training goes on, and the note names the reason, once."""
    callback = PreciseBatchNorm()
    make_trainer(callback, max_epochs=2, limit_val_batches=0).fit(Locked())
    (finding,) = callback.findings
    assert "batch must be what copy.deepcopy can copy, got dict" in finding.evidence
    assert not callback.off


class SpoiltInside(Healthy):
    """One batch makes NaN behind the first layer, in the second run alone; one layer is never called."""

    def __init__(self):
        super().__init__()
        self.spare = nn.BatchNorm1d(4)

    def training_step(self, batch, batch_idx):
        x = self.net[2](self.net[1](self.net[0](batch[0])))
        if self.trainer.validating and batch_idx == 1:
            x = x * float("nan")
        loss = self.loss(self.net[3:](x), batch[1])
        self.log("train_loss", loss)
        return loss


def test_a_layer_that_a_bad_batch_reaches_keeps_its_statistics(make_trainer):
    """It is named with a warning, the layer before it is estimated, and the one that nothing reaches is noted."""

    class StopsBeforeTheEnd(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.seen = {name: x.clone() for name, x in pl_module.state_dict().items()}

    stops, callback = StopsBeforeTheEnd(), PreciseBatchNorm()
    options = {"num_sanity_val_steps": 0}
    fit(make_trainer(callback, stops, **options), SpoiltInside)
    plain = StopsBeforeTheEnd()
    fit(make_trainer(plain, **options), SpoiltInside)
    assert torch.equal(stops.seen["net.4.running_mean"], plain.seen["net.4.running_mean"])
    assert not torch.equal(stops.seen["net.1.running_mean"], plain.seen["net.1.running_mean"])
    note, warning = callback.findings
    assert note.evidence == "1 layer keeps its running statistics: spare (it was not called)"
    assert (warning.severity.value, warning.layer) == ("warning", "net.4")
    assert warning.evidence.startswith("a batch with NaN or infinity reached net.4 in the re-estimation")


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: EMAWeightAveraging(decay=0.7), id="EMA"),
        pytest.param(lambda: EMAWeightAveraging(decay=0.7, use_buffers=False), id="EMA, buffers copied"),
        pytest.param(WeightAveraging, id="mean"),
    ],
)
def test_averaged_weights_get_their_own_statistics(make_trainer, tmp_path, build):
    """Behind the averaging callback: validation, checkpoint and final model have averaged weights that fit."""
    looks, saves = Looks(), ModelCheckpoint(tmp_path / "saved", save_top_k=-1, monitor="val_loss")
    callback = PreciseBatchNorm()
    trainer = make_trainer(build(), callback, looks, saves, max_epochs=2, enable_checkpointing=True)
    model = fit(trainer, Fast)
    assert looks.seen["validation"] == [True, True]
    assert looks.seen["end"] == [True]
    assert_precise(model)
    for file in (tmp_path / "saved").glob("*.ckpt"):
        saved = torch.load(file)
        averaged = Healthy()
        averaged.load_state_dict(saved["state_dict"])
        assert_precise(averaged)
        assert not torch.equal(saved["state_dict"]["net.0.weight"], saved["current_model_state"]["net.0.weight"])
    assert callback.findings == []


@pytest.mark.slow
def test_the_order_that_misses_averaged_weights_is_told(make_trainer):
    """In front of the averaging callback it estimates for other weights, and says so."""
    callback, looks = PreciseBatchNorm(), Looks()
    fit(make_trainer(callback, EMAWeightAveraging(decay=0.7), looks, max_epochs=2), Fast)
    (finding,) = callback.findings
    assert finding.advice == "list PreciseBatchNorm after EMAWeightAveraging"
    assert looks.seen["end"] == [False]


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("endless", [False, True], ids=["two epochs", "endless"])
def test_stochastic_weight_averaging_goes_on_working(make_trainer, first, endless):
    """Its weights are those of a run without this callback, momentum is back, and the statistics fit."""

    def train(*ours):
        averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
        callbacks = [*ours, averaging] if first else [averaging, *ours]
        options = {"max_epochs": -1, "max_steps": 12} if endless else {"max_epochs": 3}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SWA's own, about schedulers
            return fit(make_trainer(*callbacks, **options), Fast)

    callback = PreciseBatchNorm()
    plain, model = train(), train(callback)
    for name, x in plain.named_parameters():
        assert torch.equal(x, model.get_parameter(name)), name
    assert model.net[1].momentum == 0.1
    told = [finding.advice for finding in callback.findings]
    assert told == (["list PreciseBatchNorm after StochasticWeightAveraging"] if endless and first else [])
    assert is_precise(model) is not bool(told)


def test_other_monitors_beside_it_see_no_fault(make_trainer):
    """A healthy run stays without warnings and errors, and no monitor fails."""
    others = [NaNGuard(), BatchNormMonitor()]
    fit(make_trainer(*others, PreciseBatchNorm(), max_epochs=3), Healthy)
    assert {finding.severity.value for entry in others for finding in entry.findings} <= {"info"}
    assert not any(entry.off for entry in others)


class Breaks(Healthy):
    def on_validation_epoch_end(self):
        raise RuntimeError("the user's own")


def test_nothing_is_held_after_the_fit(make_trainer):
    """Batches, modules and hooks are let go, at the end and after an exception; copies never have them."""
    callback, copies = PreciseBatchNorm(), []

    class Copies(Callback):
        def on_validation_end(self, trainer, pl_module):
            copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])  # noqa: S301  (our own)

    model = fit(make_trainer(callback, Copies(), num_sanity_val_steps=0), Healthy)
    broken = PreciseBatchNorm()
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(make_trainer(broken, num_sanity_val_steps=0), Breaks)
    for entry in (callback, broken, *copies):
        assert entry._batches is None
        assert entry._modes == {}
        assert not entry._works
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_validate_and_a_second_fit_work_on_the_same_trainer(make_trainer):
    """Outside of a fit nothing is estimated; the next fit begins anew."""
    callback = PreciseBatchNorm()
    trainer = make_trainer(callback)
    model = fit(trainer, Healthy)
    with torch.no_grad():
        model.net[1].running_mean.fill_(9.0)
    trainer.validate(model, loader(seed=1), verbose=False)
    assert torch.equal(model.net[1].running_mean, torch.full((16,), 9.0))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(), loader(seed=1))
    assert_precise(model)
    assert callback.findings == []


class Lazily(Healthy):
    def __init__(self):
        super().__init__(
            nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(CLASSES)),
        )


@pytest.mark.filterwarnings("ignore:.*[Ll]azy.*")  # torch says that the feature is new
def test_lazy_layers_are_estimated_once_they_have_seen_data(make_trainer):
    """What is lazy before the first batch is no reason to do nothing."""
    callback = PreciseBatchNorm()
    model = fit(make_trainer(callback, num_sanity_val_steps=0), Lazily)
    assert_precise(model)
    assert callback.findings == []


class ByName(LightningModule):
    """Batches are dictionaries, the step takes nothing else, and one layer stands in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.norm(self.first(x)).relu()))

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_any_structure_of_batch_and_any_reuse_of_layers_is_estimated(make_trainer):
    """The step is the user's own, so that nothing has to be known about its batch."""
    callback = PreciseBatchNorm()
    batches = DataLoader([{"x": x, "y": y} for x, y in loader().dataset], 8)
    model = fit(make_trainer(callback), ByName, batches)
    assert_precise(model)
    assert callback.findings == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0", id="samples"),
        pytest.param({"when": "epoch"}, "when must be one of validation, end, got 'epoch'", id="when"),
        pytest.param({"dropout": 1}, "dropout must be True or False, got 1", id="dropout"),
        pytest.param({"max_gigabytes": 0}, "max_gigabytes must be a number above 0, got 0", id="memory"),
        pytest.param({"max_gigabytes": "1"}, "max_gigabytes must be a number above 0, got '1'", id="text"),
        pytest.param({"max_gigabytes": float("nan")}, "max_gigabytes must be a number above 0, got nan", id="nan"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=words):
        PreciseBatchNorm(**arguments)
