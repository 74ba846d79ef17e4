# SPDX-License-Identifier: Apache-2.0
"""The verdict in every kind of project: that of the planted illness, or an honest note on why there is none."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from harm import Manual
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from overfits import ELSEWHERE, FEATURES, NONE, UNKNOWN, Overfits, loaders, net, run, sets, verdict
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection

from lightning_bn import BatchNormMonitor

EPOCHS = 11


def fit(make_trainer, build, data=None, *callbacks, watch="val_loss", **options):
    """Train without a logger; the monitor, and the model."""
    monitor = BatchNormMonitor(watch)
    options = {"max_epochs": EPOCHS, "logger": False, "num_sanity_val_steps": 1, **options}
    model = run(make_trainer(monitor, *callbacks, **options), build, data)
    assert not monitor.off
    return monitor, model


def assert_overfits(monitor):
    """The planted illness was found, by all settings."""
    assert verdict(monitor) == [ELSEWHERE], monitor.findings[-1].evidence
    assert monitor.losses.last is not None


class ByOtherName(Overfits):
    def report(self, loss):
        self.log("valid/ce", loss, prog_bar=True)


class ByDict(Overfits):
    def report(self, loss):
        self.log_dict({"val_loss": loss, "val_acc": 1 - loss})


class ByNamedDict(Overfits):
    def report(self, loss):
        self.log_dict(dictionary={"val_acc": 1 - loss, "val_loss": loss}, on_epoch=True)


class ByKeyword(Overfits):
    def report(self, loss):
        self.log(name="val_loss", value=loss, on_step=False, on_epoch=True)


class OnBoth(Overfits):
    def report(self, loss):
        self.log("val_loss", loss, on_step=True, on_epoch=True)


class AsNumber(Overfits):
    def report(self, loss):
        self.log("val_loss", float(loss))


class AtTheEnd(Overfits):
    """Returns the loss, and logs the mean of the epoch."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def report(self, loss):
        self.outputs.append(loss)
        return loss

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.outputs).mean())
        self.outputs.clear()


class AtTheEndAsDict(AtTheEnd):
    def report(self, loss):
        return {"loss": super().report(loss), "other": 1}


class AtTheEndByName(AtTheEnd):
    def report(self, loss):
        return {"val_loss": super().report(loss), "loss": 0 * loss}


class ByForward(Overfits):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def report(self, loss):
        self.mean(loss)
        self.log("val_loss", self.mean)


class ByUpdate(ByForward):
    def report(self, loss):
        self.mean.update(loss)
        self.log("val_loss", self.mean, on_epoch=True)


class ByCollection(Overfits):
    """Watches one metric of several; regression of one-hot labels."""

    def __init__(self):
        super().__init__()
        self.metrics = MetricCollection({"mse": MeanSquaredError(), "rmse": MeanSquaredError(squared=False)})

    def validation_step(self, batch, batch_idx):
        self.metrics.update(self(batch[0]).softmax(1).contiguous(), nn.functional.one_hot(batch[1], 4).float())
        self.log_dict(self.metrics)


class ByStage(Overfits):
    """One step for all: the trainer tells which, and in training labels are smoothed."""

    def step(self, batch):
        loss = self.loss(self(batch[0]), batch[1])
        name = "train" if self.trainer.training else "val"
        self.log(f"{name}_loss", loss)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.step(batch)


LOGGING = {
    "another name": (ByOtherName, "valid/ce"),
    "log_dict": (ByDict, "val_loss"),
    "log_dict by keyword": (ByNamedDict, "val_loss"),
    "log by keyword": (ByKeyword, "val_loss"),
    "on step and epoch": (OnBoth, "val_loss"),
    "on step and epoch, by its second name": (OnBoth, "val_loss_epoch"),
    "a plain number": (AsNumber, "val_loss"),
    "at the end of the epoch, of what was returned": (AtTheEnd, "val_loss"),
    "the same, returned in a dictionary": (AtTheEndAsDict, "val_loss"),
    "the same, returned by its name": (AtTheEndByName, "val_loss"),
    "a metric, by forward": (ByForward, "val_loss"),
    "a metric, by update": (ByUpdate, "val_loss"),
    "a collection of metrics": (ByCollection, "mse"),
    "a step that asks the trainer for its stage": (ByStage, "val_loss"),
}


@pytest.mark.parametrize(("build", "watch"), LOGGING.values(), ids=LOGGING)
def test_the_loss_is_found_however_it_is_logged(make_trainer, build, watch):
    """By whatever call and name the loss gets to Lightning, the run is assessed."""
    assert_overfits(fit(make_trainer, build, watch=watch)[0])


class TwoLoaders(Overfits):
    """The second loader has other samples. Lightning itself refuses one name for both."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))


class OneOfTwo(TwoLoaders):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        loss = self.loss(self(batch[0]), batch[1])
        if dataloader_idx == 1:
            self.log("second", loss, add_dataloader_idx=False)
        return loss


class ReturnsOfTwo(AtTheEnd):
    """Returns both losses, and logs that of the second loader at the end."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        loss = self.loss(self(batch[0]), batch[1])
        if dataloader_idx == 1:
            self.outputs.append(loss)
        return {"second" if dataloader_idx else "first": loss}

    def on_validation_epoch_end(self):
        self.log("second", torch.stack(self.outputs).mean())
        self.outputs.clear()


class ReturnsUnnamed(ReturnsOfTwo):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        return next(iter(super().validation_step(batch, batch_idx, dataloader_idx).values()))


@pytest.mark.parametrize(
    ("build", "watch", "samples"),
    [
        pytest.param(TwoLoaders, "val_loss/dataloader_idx_0", 240, id="the first"),
        pytest.param(TwoLoaders, "val_loss/dataloader_idx_1", 160, id="the second"),
        pytest.param(OneOfTwo, "second", 160, id="under a name of its own"),
        pytest.param(ReturnsOfTwo, "second", 160, id="returned by name"),
    ],
)
def test_one_of_several_validation_loaders_is_assessed(make_trainer, build, watch, samples):
    """The batches of the loader that is named count, and no others."""
    training, valid = loaders()
    both = [valid, DataLoader(sets(validation=160)[1], 40)]
    monitor, _ = fit(make_trainer, build, (training, both), watch=watch)
    assert_overfits(monitor)
    assert sum(monitor.losses.sizes) == samples


def test_a_loss_that_is_returned_for_any_of_several_loaders_is_not_guessed_at(make_trainer):
    """Which of them was logged cannot be known."""
    training, valid = loaders()
    monitor, _ = fit(make_trainer, ReturnsUnnamed, (training, [valid, valid]), watch="second")
    assert_not_assessed(monitor, "validation_step neither logs 'second' nor returns a loss")


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    names: list[str]


@dataclass
class Frozen:
    """Cannot be made of its parts."""

    x: torch.Tensor
    y: torch.Tensor
    both: tuple = None

    def __post_init__(self):
        if self.both is not None:
            raise RuntimeError("not to be copied by its constructor")
        self.both = (self.x, self.y)


class Graph:
    """An object that shows nobody what is in it, as those of graph libraries."""

    def __init__(self, x, y):
        self.x, self.y = x, y


def collated(make):
    """Loaders whose batches are what a function makes of inputs and labels."""

    def collate(rows):
        return make(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))

    training, valid = sets()
    return DataLoader(training, 8, shuffle=True, collate_fn=collate), DataLoader(valid, 16, collate_fn=collate)


class Unpacks(Overfits):
    """Takes any of these batches."""

    def both(self, batch):
        x = batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list) else batch.x
        y = batch["label"] if isinstance(batch, dict) else batch[1] if isinstance(batch, list) else batch.y
        return x, y

    def training_step(self, batch, batch_idx):
        x, y = self.both(batch)
        return self.loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = self.both(batch)
        self.log("val_loss", self.loss(self(x), y), batch_size=len(x))


class SameLength(Unpacks):
    """Each batch holds eight numbers that are none of samples, though training has as many of these."""

    def both(self, batch):
        assert len(batch["numbers"]) == 8
        return batch["image"], batch["label"]


def names(x):
    return [f"sample {k}" for k in range(len(x))]


BATCHES = {
    "dictionary": lambda x, y: {"image": x, "label": y},
    "dictionary with texts": lambda x, y: {"name": names(x), "image": x, "label": y, "source": "a set", "scale": 2.0},
    "list with texts": lambda x, y: [x, y, names(x)],
    "dataclass": lambda x, y: Sample(x, y, names(x)),
    "dataclass that refuses": Frozen,
    "opaque object": Graph,
    "nested": lambda x, y: {"image": x, "label": y, "more": [{"id": torch.arange(len(x))}, (x, names(x))]},
    "not to be joined": lambda x, y: {"image": x, "label": y, "number": torch.tensor(float(x.sum()))},
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_any_structure_of_batch_is_assessed(make_trainer, make):
    """Whatever a batch is, the step takes it; what cannot be cut or joined is run as it came."""
    monitor, _ = fit(make_trainer, Unpacks, collated(make))
    assert_overfits(monitor)
    assert sum(monitor.losses.sizes) == 240


def test_what_only_looks_like_an_axis_of_samples_is_no_obstacle(make_trainer):
    """A step that fails on joined batches is run on those that came."""
    batches = collated(lambda x, y: {"image": x, "label": y, "numbers": torch.ones(8)})
    assert_overfits(fit(make_trainer, SameLength, batches)[0])


class FixedSize(Overfits):
    """Takes nothing but full batches."""

    def training_step(self, batch, batch_idx):
        assert len(batch[0]) == 8
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        assert len(batch[0]) == 20
        super().validation_step(batch, batch_idx)


class NoRoom(Overfits):
    """Has no memory for more than it trains with."""

    def forward(self, x):
        if self.training and len(x) > 8:
            raise torch.OutOfMemoryError("no room")
        return super().forward(x)


class Contrastive(Overfits):
    """A loss that depends on who else is in the batch, and is no mean over samples."""

    def validation_step(self, batch, batch_idx):
        z = nn.functional.normalize(self.net[:-1](batch[0]), dim=1)
        pairs = batch[1][:, None] == batch[1][None]
        pull = (z @ z.T / 0.2).log_softmax(1).masked_fill(~pairs, 0.0).sum() / pairs.sum()
        self.log("val_loss", self.loss(self(batch[0]), batch[1]) - pull)


class Summed(Overfits):
    """A sum over the batch."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum"))


class DrawsInValidation(Overfits):
    """Adds noise to its inputs, as a diffusion model or a variational one does."""

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0] + 0.05 * torch.randn_like(batch[0]), batch[1]), batch_idx)


STEPS = {
    "full batches alone": (FixedSize, 20),
    "too little memory for large batches": (NoRoom, 64),
    "a contrastive loss": (Contrastive, 24),
    "a sum": (Summed, 20),
    "random draws": (DrawsInValidation, 64),
}


@pytest.mark.parametrize(("build", "size"), STEPS.values(), ids=STEPS)
def test_steps_with_a_will_of_their_own_are_assessed(make_trainer, build, size):
    """Where batches cannot be cut or joined, they are run as they came."""
    monitor, _ = fit(make_trainer, build, loaders(val_batch=size))
    assert_overfits(monitor)
    if build in {FixedSize, Summed, Contrastive}:
        assert set(monitor.losses.sizes) == {size}


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def data_of(training_batch=8, validation_batch=64, *, stream=False, shuffle=False):
    training, valid = sets()
    if stream:
        return DataLoader(Stream(training), training_batch), DataLoader(Stream(valid), validation_batch)
    shuffled = DataLoader(valid, validation_batch, shuffle=shuffle)
    return DataLoader(training, training_batch, shuffle=True, drop_last=True), shuffled


DATA = {
    "an unequal last batch": {"training_batch": 7, "validation_batch": 50},
    "one batch of all": {"validation_batch": 240},
    "batches of two": {"validation_batch": 2},
    "a shuffled validation": {"shuffle": True},
    "a stream": {"stream": True},
}


@pytest.mark.parametrize("options", DATA.values(), ids=DATA)
@pytest.mark.filterwarnings("ignore:.*shuffling enabled.*")  # Lightning's advice not to
def test_any_loader_is_assessed(make_trainer, options):
    """Sizes and order of batches do not matter, and no length is needed."""
    monitor, _ = fit(make_trainer, Overfits, data_of(**options))
    assert_overfits(monitor)
    assert sum(monitor.losses.sizes) == 240


OPTIONS = {
    "validation inside the epoch": {"val_check_interval": 0.5},
    "validation by steps": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "an end in mid-epoch": {"max_epochs": -1, "max_steps": 83},
    "an end between validations": {"max_epochs": 14, "check_val_every_n_epoch": 2, "max_steps": 82},
    "accumulation": {"accumulate_grad_batches": 2, "max_epochs": 16},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "clipping": {"gradient_clip_val": 1.0},
    "no sanity check": {"num_sanity_val_steps": 0},
    "the whole set as sanity check": {"num_sanity_val_steps": -1},
    "a part of the validation set": {"limit_val_batches": 2},
    "a progress bar": {"enable_progress_bar": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_the_trainer_is_assessed(make_trainer, options):
    """The verdict does not depend on how the trainer goes about it."""
    assert_overfits(fit(make_trainer, Overfits, **options)[0])


class Compiled(Overfits):
    def __init__(self):
        super().__init__(torch.compile(net(), backend="eager"))


class Tied(Overfits):
    """Two linear layers share a weight, two BatchNorm layers γ and β."""

    def __init__(self):
        super().__init__(net(depth=3))
        self.net[6].weight = self.net[3].weight
        self.net[7].weight, self.net[7].bias = self.net[4].weight, self.net[4].bias


class PartFrozen(Overfits):
    """The first layer is not trained."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(requires_grad=False)


class Codebook(Overfits):
    """A buffer that training moves, and that the validation loss depends on; an integer parameter; a metric."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.number = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)

    def training_step(self, batch, batch_idx):
        self.centre += 0.02 * (1 - self.centre)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0] + self.centre, batch[1]), batch_idx)


class Parametrised(Overfits):
    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.net[0])


class NoAffine(Overfits):
    """BatchNorm without γ and β: what overfits is elsewhere."""

    def __init__(self):
        super().__init__(net())
        self.net[1], self.net[4] = nn.BatchNorm1d(64, affine=False), nn.BatchNorm1d(64)


class BuiltLate(Overfits):
    """Its layers are built in configure_model."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        self.net = self.net or net()


class Lazy(Overfits):
    def __init__(self):
        layers = [nn.LazyLinear(64), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(64), nn.LazyBatchNorm1d()]
        super().__init__(nn.Sequential(*layers, nn.ReLU(), nn.LazyLinear(4)))


class Teacher(Overfits):
    """Its step moves a teacher, which is in the loss."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(requires_grad=False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for mine, own in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.mul_(0.9).add_(own, alpha=0.1)
        return super().training_step(batch, batch_idx) + 1e-3 * self.teacher(batch[0]).square().mean()


MODELS = {
    "compiled in part": Compiled,
    "tied weights": Tied,
    "frozen in part": PartFrozen,
    "a running codebook": Codebook,
    "weight normalisation": Parametrised,
    "a layer without γ and β": NoAffine,
    "built in configure_model": BuiltLate,
    "lazy layers": Lazy,
    "a teacher": Teacher,
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:.*[Ll]azy.*")  # torch says that the feature is new
def test_any_model_is_assessed(make_trainer, build):
    """Buffers go with the weights that they belong to; what is shared stays so."""
    assert_overfits(fit(make_trainer, build)[0])


def test_averaging_in_the_last_epochs_is_assessed(make_trainer):
    """What the fit ends with is judged: averages over epochs of a network that overfits."""
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=8, annealing_epochs=1)
    monitor, _ = fit(make_trainer, Overfits, None, averaging, max_epochs=16)
    assert_overfits(monitor)


class Averages(Callback):
    """A moving average of one's own: in place while the validation lasts, and not afterwards."""

    def __init__(self, where="end"):
        self.average, self.where = None, where

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = [x.detach().clone() for x in pl_module.parameters()]
        self.average = (
            now if self.average is None else [a * 0.99 + 0.01 * x for a, x in zip(self.average, now, strict=True)]
        )

    def swap(self, pl_module):
        if self.average is not None:
            with torch.no_grad():
                for x, average in zip(pl_module.parameters(), self.average, strict=True):
                    x.data, average.data = average.data, x.data

    def on_validation_start(self, trainer, pl_module):
        self.swap(pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        if self.where == "epoch end":
            self.swap(pl_module)

    def on_validation_end(self, trainer, pl_module):
        if self.where == "end":
            self.swap(pl_module)


class PutsBackTheBest(Callback):
    """Ends with the weights of the best validation."""

    def __init__(self):
        self.best, self.state = float("inf"), None

    def on_validation_end(self, trainer, pl_module):
        value = float(trainer.callback_metrics["val_loss"])
        if not trainer.sanity_checking and value < self.best:
            self.best, self.state = value, copy.deepcopy(pl_module.state_dict())

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.state)


PUT, OTHER = "are not those that were validated last", "when that is run again with the same weights"
AVERAGED = {  # what averages; and what is said where it is listed before the monitor, and after it
    "EMAWeightAveraging": (lambda: EMAWeightAveraging(decay=0.9), *["EMAWeightAveraging has other weights"] * 2),
    "WeightAveraging": (WeightAveraging, *["WeightAveraging has other weights validated than are trained"] * 2),
    "an average until the end of the validation": (Averages, OTHER, PUT),
    "an average until the end of its epoch": (lambda: Averages("epoch end"), OTHER, OTHER),
    "the best ones at the end": (PutsBackTheBest, PUT, None),
}


@pytest.mark.parametrize(("make", "before", "behind"), AVERAGED.values(), ids=AVERAGED)
def test_weights_that_others_put_in_place_are_noticed(make_trainer, make, before, behind):
    """Where validated weights and trained ones are two things, no verdict mixes them up."""
    for first, words in ((True, before), (False, behind)):
        monitor, other = BatchNormMonitor(), make()
        callbacks = [other, monitor] if first else [monitor, other]
        run(make_trainer(*callbacks, max_epochs=EPOCHS, logger=False, num_sanity_val_steps=0))
        if words is None:  # they are put there behind the assessment
            assert_overfits(monitor)
        else:
            assert_not_assessed(monitor, words)


def assert_not_assessed(monitor, words):
    """One note gives the reason, and nothing else is said of overfitting."""
    assert verdict(monitor) == [UNKNOWN]
    (finding,) = (entry for entry in monitor.findings if entry.rule == UNKNOWN)
    assert words in finding.evidence
    assert not monitor.off


class GAN(Overfits):
    """Steps its optimizer itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    training_step = Manual.training_step

    def optimizers(self):
        return [super().optimizers()]


class Silent(Overfits):
    """Collects outputs, and logs at the end."""

    def __init__(self):
        super().__init__()
        self.collected = []

    def report(self, loss):
        self.collected.append(loss)

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.collected).mean())
        self.collected.clear()


class NeverLogs(Overfits):
    def report(self, loss):
        return None


class ValidatesOnce(Overfits):
    """Its validation step leans on what a hook has made ready, and the next one takes away."""

    def on_validation_epoch_start(self):
        self.ready = []

    def report(self, loss):
        self.ready.append(loss)
        super().report(loss)

    def on_validation_epoch_end(self):
        del self.ready


class TrainsOnce(Overfits):
    def on_train_epoch_start(self):
        self.ready = True

    def training_step(self, batch, batch_idx):
        if not self.ready:
            raise RuntimeError("not ready")
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        self.ready = False

    def on_validation_end(self):
        self.ready = False


class Negative(Overfits):
    def report(self, loss):
        self.log("val_loss", loss - 100)


class Diverges(Overfits):
    """Its weights are NaN in the end."""

    def on_train_epoch_start(self):
        if self.current_epoch == 10:
            with torch.no_grad():
                self.net[0].weight.fill_(float("nan"))


class NeverFinite(Overfits):
    def report(self, loss):
        self.log("val_loss", loss * float("nan"))


class Annealed(Overfits):
    """A loss whose terms are weighted by the epoch."""

    def report(self, loss):
        self.log("val_loss", loss * (1 + self.current_epoch))


class SumOverBatches(Overfits):
    def report(self, loss):
        self.log("val_loss", loss, reduce_fx="sum")


class AllFrozen(Overfits):
    """BatchNorm stays in eval mode."""

    def on_train_epoch_start(self):
        self.net[1].eval()
        self.net[4].eval()


class Iterates(Overfits):
    def validation_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        self.report(self.loss(self(batch[0]), batch[1]))


NOT_ASSESSED = {
    "a loss that is logged at the end of what was collected": (Silent, {}, "neither logs 'val_loss' nor returns"),
    "nothing logged": (NeverLogs, {}, "the loss that watch names was never logged"),
    "manual optimisation": (GAN, {}, "manual optimisation"),
    "an iterator": (Iterates, {}, "takes batches from the loader"),
    "a validation step that runs once": (
        ValidatesOnce,
        {},
        "validation_step failed when it was run again: AttributeError",
    ),
    "a training step that runs once": (TrainsOnce, {}, "training_step failed when it was run again: RuntimeError"),
    "a negative loss": (Negative, {}, "a relative rise has no meaning where the loss is not above 0"),
    "divergence": (Diverges, {}, "could not be estimated: a batch was not finite"),
    "never finite": (NeverFinite, {}, "val_loss was never finite"),
    "a loss that depends on the epoch": (Annealed, {}, "when that is run again with the same weights"),
    "a sum over batches": (SumOverBatches, {}, "when that is run again with the same weights"),
    "frozen BatchNorm": (AllFrozen, {}, "could not be estimated: none is trained"),
    "no validation": (Overfits, {"limit_val_batches": 0}, "there is no validation loop"),
    "no validation so early": (Overfits, {"max_epochs": 2, "check_val_every_n_epoch": 4}, "was never logged"),
    "a dry run": (Overfits, {"fast_dev_run": 2}, "there was one validation, and nothing to compare it with"),
    "one validation": (Overfits, {"check_val_every_n_epoch": EPOCHS}, "there was one validation"),
}


@pytest.mark.parametrize(("build", "options", "words"), NOT_ASSESSED.values(), ids=NOT_ASSESSED)
@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*")  # Lightning's, that hooks see no batch there
def test_what_cannot_be_assessed_is_said_with_the_reason(make_trainer, build, options, words):
    """The fit ends well, and a note says why there is no verdict."""
    monitor, model = fit(make_trainer, build, **options)
    assert_not_assessed(monitor, words)
    assert model.trainer.state.finished


@pytest.mark.parametrize("where", [0, 1])
def test_a_batch_that_cannot_be_copied_is_told_once(make_trainer, where):
    """One note names the reason, whichever loader it comes from."""
    data = [*loaders()]
    locked = collated(lambda x, y: {"image": x, "label": y, "lock": threading.Lock()})
    data[where] = locked[where]

    class Takes(Unpacks):
        def both(self, batch):
            return super().both(batch if isinstance(batch, dict) else list(batch))

    monitor, _ = fit(make_trainer, Takes, data)
    assert_not_assessed(monitor, "batch must be what copy.deepcopy can copy, got dict")


def test_a_model_that_is_compiled_as_a_whole_is_assessed(make_trainer):
    """The steps are run again without the compiler."""

    class Returns(Overfits):
        def validation_step(self, batch, batch_idx):
            return self.loss(self(batch[0]), batch[1])

        def on_validation_batch_end(self, outputs, *_):
            self.log("val_loss", outputs)

    monitor = BatchNormMonitor()
    trainer = make_trainer(monitor, max_epochs=EPOCHS, logger=False)
    seed_everything(0)
    trainer.fit(torch.compile(Returns(), backend="eager"), *loaders())
    assert_overfits(monitor)


@pytest.mark.parametrize(
    ("validation", "size", "words"),
    [
        pytest.param(96, 16, "96 validation samples in 24 batches are too few; 100 in 5 are the least", id="samples"),
        pytest.param(3, 1, "3 validation samples in 3 batches are too few", id="batches"),
    ],
)
def test_too_few_validation_samples_are_not_enough(make_trainer, validation, size, words):
    """Below a hundred samples, or five batches that cannot be cut, nothing is said."""
    monitor, _ = fit(make_trainer, Overfits, loaders(validation=validation, val_batch=size))
    assert_not_assessed(monitor, words)


def test_few_batches_that_cannot_be_cut_are_not_enough(make_trainer):
    """Four batches say too little of a spread."""
    monitor, _ = fit(make_trainer, Summed, loaders(val_batch=60))
    assert_not_assessed(monitor, "when that is run again with the same weights")


def test_a_model_without_batchnorm_gets_no_second_note(make_trainer):
    """The note that there is nothing to watch says all."""
    monitor, _ = fit(make_trainer, lambda: Overfits(nn.Linear(FEATURES, 4)))
    (finding,) = monitor.findings
    assert finding.rule == "not-watched"


def test_without_a_validation_step_there_is_a_note(make_trainer):
    """A model that never validates is not called healthy."""

    class NoValidation(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.loss, self.lr = net(), nn.CrossEntropyLoss(), 0.01

        training_step, forward = Overfits.training_step, Overfits.forward
        configure_optimizers = Overfits.configure_optimizers

    monitor, _ = fit(make_trainer, NoValidation, loaders()[:1])
    assert_not_assessed(monitor, "there is no validation loop")


def test_ctrl_c_ends_with_the_drift_and_without_a_verdict(make_trainer):
    """Nobody waits for an assessment who has just stopped the run, be it in one."""

    class Interrupted(Overfits):
        def on_train_epoch_end(self):
            if self.current_epoch == 10:
                raise KeyboardInterrupt

    class InterruptedThere(Overfits):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == EPOCHS:  # run again at the end
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    for build in (Interrupted, InterruptedThere):
        monitor, kept = BatchNormMonitor(), []
        trainer = make_trainer(monitor, max_epochs=EPOCHS, logger=False)
        with pytest.raises(SystemExit):
            run(trainer, lambda build=build, kept=kept: kept.append(build()) or kept[0])
        assert verdict(monitor) == []
        assert monitor.findings[0].rule == "affine-drift"
        assert not any(module._forward_hooks for module in kept[0].modules())
        assert "log" not in vars(kept[0])


def test_a_monitor_that_is_not_to_assess_says_nothing_of_it(make_trainer):
    """assess=False is the user's own decision."""
    monitor = BatchNormMonitor(assess=False)
    run(make_trainer(monitor, max_epochs=2, logger=False))
    assert verdict(monitor) == []


def test_a_healthy_end_is_judged_by_the_named_loss_alone(make_trainer):
    """Returned values that are not the watched loss would be another matter, and are found out at the best end too."""

    class ReturnsAnother(AtTheEnd):
        def report(self, loss):
            self.outputs.append(loss)
            return 3 * loss

    data = loaders(size=512, noise=0, batch=16)
    monitor, _ = fit(make_trainer, lambda: Overfits(lr=0.001), data, max_epochs=6)
    assert verdict(monitor) == [NONE]

    def build():
        model = ReturnsAnother()
        model.lr = 0.001
        return model

    monitor, _ = fit(make_trainer, build, data, max_epochs=6)
    assert_not_assessed(monitor, "when that is run again with the same weights")
