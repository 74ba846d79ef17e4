# SPDX-License-Identifier: Apache-2.0
"""SwapBatchNorm trains what a model swapped by hand trains, wherever layers are built and whatever life it leads."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning
import torch
from harm import Busy, assert_identical, everything_after
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from processes import in_two_processes
from specimens import BuiltInConfigureModel, BuiltInSetup, Healthy, loader, network
from swap_script import Convolutional
from torch import nn

from lightning_bn import (
    ActivationMonitor,
    BatchNormMonitor,
    NaNGuard,
    PreciseBatchNorm,
    PreflightAudit,
    Severity,
    SwapBatchNorm,
    WeightInit,
    find_batchnorm,
    read_findings,
    swap_batchnorm,
)
from lightning_bn.swap import FrozenBatchNorm, InstanceNorm

SCRIPT = Path(__file__).parent.parent / "swap_script.py"
BUILT = {"__init__": Healthy, "setup": BuiltInSetup, "configure_model": BuiltInConfigureModel}
SMALL = {"groups": 4, "fewest": 2}
OVERRIDES = pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning")  # WeightAveraging's word
AVERAGED = {
    "plain": list,
    "average": lambda: [WeightAveraging()],
    "moving average": lambda: [EMAWeightAveraging(decay=0.5)],
    "late average": lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)],
}


def by_hand(build, to="group", **arguments):
    """The same model, of which the layers are swapped before the Trainer sees it."""

    def built():
        model = build()
        if model.net is None:
            model.net = network()
        swap_batchnorm(model, to, **arguments)
        return model

    return built


def run(make_trainer, build, callbacks, **options):
    seed_everything(3, verbose=False)
    model = build()
    trainer = make_trainer(*callbacks, **{"max_epochs": 3, **options})
    trainer.fit(model, loader(), loader(seed=1))
    return everything_after(trainer, model)


def rules(callback):
    return [(finding.rule, finding.severity.value) for finding in callback.findings]


@pytest.mark.parametrize(
    ("build", "to", "arguments", "options"),
    [
        pytest.param(Convolutional, "group", {}, {}, id="group"),
        pytest.param(Convolutional, "group", {"groups": 2, "fewest": 3}, {}, id="group, numbers"),
        pytest.param(Convolutional, "layer", {}, {}, id="layer"),
        pytest.param(Convolutional, "instance", {}, {}, id="instance"),
        pytest.param(Convolutional, "frozen", {"train_affine": False}, {}, id="frozen"),
        pytest.param(Busy, "group", SMALL, {"accumulate_grad_batches": 3, "precision": "bf16-mixed"}, id="bf16"),
        pytest.param(Busy, "layer", {}, {"precision": "64-true", "num_sanity_val_steps": 2}, id="64-true"),
    ],
)
def test_training_is_bit_identical_to_that_of_a_model_swapped_by_hand(make_trainer, build, to, arguments, options):
    """Weights, buffers, optimizer, random streams and metrics are equal, and are not those of BatchNorm."""
    callback = SwapBatchNorm(to, **arguments)
    swapped = run(make_trainer, build, [callback], **options)
    assert_identical(run(make_trainer, by_hand(build, to, **arguments), [], **options), swapped)
    plain = run(make_trainer, build, [], **options)
    first = next(iter(swapped["model"]))
    assert not torch.equal(plain["model"][first], swapped["model"][first])
    assert not callback.off


def test_a_model_without_batchnorm_trains_as_without_the_callback(make_trainer):
    """Bit for bit, and a note says that there was nothing to do."""

    def build():
        return Healthy(network(norm=False))

    callback = SwapBatchNorm()
    assert_identical(run(make_trainer, build, []), run(make_trainer, build, [callback]))
    (finding,) = callback.findings
    assert (finding.rule, finding.severity) == ("swapped-batchnorm", Severity.INFO)
    assert finding.evidence == "no BatchNorm layer was replaced: the model has none"
    assert callback.swapped == {}


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_layers_are_swapped_wherever_they_are_built_before_the_optimizer_is_made(make_trainer, tmp_path, built):
    """None is left, the optimizer has γ and β of the new ones, and one finding lists them."""
    model, callback = built(), SwapBatchNorm(**SMALL)
    trainer = make_trainer(callback)
    trainer.fit(model, loader())
    assert find_batchnorm(model) == {}
    assert [model.net[place].num_groups for place in (1, 4)] == [4, 4]
    trained = {id(x) for group in trainer.optimizers[0].param_groups for x in group["params"]}
    assert trained == {id(x) for x in model.parameters()}
    (finding,) = read_findings(tmp_path / "run" / "version_0")
    assert (finding.rule, finding.severity, finding.advice) == ("swapped-batchnorm", Severity.INFO, "")
    assert finding.evidence == "2 BatchNorm layers replaced: 2 by GroupNorm with 4 groups (net.1 and net.4)"
    assert finding.data["layers"] == callback.swapped == dict.fromkeys(["net.1", "net.4"], "GroupNorm with 4 groups")


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        pytest.param("layer", "GroupNorm with 1 group", id="layer"),
        pytest.param("instance", "instance norm", id="instance"),
        pytest.param("frozen", "BatchNorm by its running statistics", id="frozen"),
    ],
)
def test_the_finding_says_what_the_layers_are_now(make_trainer, to, kind):
    """Each kind has its name."""
    callback = SwapBatchNorm(to)
    make_trainer(callback).fit(Convolutional(), loader())
    assert callback.findings[0].evidence == f"1 BatchNorm layer replaced: 1 by {kind} (net.1)"


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_hooks_of_the_model_are_its_own_again(make_trainer, built):
    """Nothing of the callback stays on the model but what it swapped, after a fit and after an error."""

    class Fails(built):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("the user's")

    for model in (built(), Fails()):
        try:
            make_trainer(SwapBatchNorm()).fit(model, loader())
        except RuntimeError as error:
            assert str(error) == "the user's"  # noqa: PT017  (one of both models raises)
        assert not {"setup", "configure_model", "on_load_checkpoint"} & set(vars(model))


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_a_model_is_swapped_once(make_trainer, built):
    """Later fits, by the same callback, trainer or another one, train the same new layers and say so."""
    model, callback = built(), SwapBatchNorm(**SMALL)
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(model, loader())
    layers = [model.net[1], model.net[4]]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    other = SwapBatchNorm("layer")
    make_trainer(other).fit(model, loader())
    assert [model.net[1], model.net[4]] == layers
    assert [layer.num_groups for layer in layers] == [4, 4]
    for again in (callback, other):
        assert again.findings[-1].evidence == (
            "no BatchNorm layer was replaced: 2 layers of this model had been replaced before"
        )
        assert again.swapped == dict.fromkeys(["net.1", "net.4"], "GroupNorm with 4 groups")


def test_one_callback_swaps_every_new_model(make_trainer):
    """Cross-validation with one callback swaps the layers of each fold."""
    callback = SwapBatchNorm()
    for _ in range(2):
        model = Healthy()
        make_trainer(callback).fit(model, loader())
        assert find_batchnorm(model) == {}
    assert rules(callback) == [("swapped-batchnorm", "info")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["swap listed first", "averaging listed first"])
@pytest.mark.parametrize(
    ("built", "average"),
    [
        *((BUILT["__init__"], average) for average in AVERAGED if average != "plain"),
        # StochasticWeightAveraging copies the model before configure_model has built the layers.
        *((BUILT["configure_model"], average) for average in ("average", "moving average")),
    ],
)
@OVERRIDES
def test_averaged_weights_are_those_of_a_model_swapped_by_hand(make_trainer, tmp_path, built, average, first):
    """The average and its checkpoint know the new layers alone, in whichever order the callbacks stand."""
    callback, averages, files = SwapBatchNorm(**SMALL), AVERAGED[average], []

    class Saves(built):
        def on_train_epoch_end(self):
            files.append(tmp_path / f"{len(files)}.ckpt")
            self.trainer.save_checkpoint(files[-1])

    ordered = [callback, *averages()] if first else [*averages(), callback]
    assert_identical(
        run(make_trainer, by_hand(Saves, **SMALL), averages()),
        run(make_trainer, Saves, ordered),
    )
    saved = [torch.load(file, weights_only=False)["state_dict"] for file in files]
    assert_identical(saved[:3], saved[3:])
    assert not any("running_mean" in name for name in saved[-1])
    assert rules(callback) == [("swapped-batchnorm", "info")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "average"),
    [
        *((place, "plain") for place in BUILT),
        *((place, "average") for place in BUILT if place != "setup"),  # which WeightAveraging copies too early
    ],
)
@OVERRIDES
def test_a_resumed_run_goes_on_from_a_checkpoint_of_the_swapped_network(make_trainer, tmp_path, place, average):
    """Two epochs in one go and in two runs end with the same weights, and nothing is said twice."""

    class Keeps(BUILT[place]):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.trainer.save_checkpoint(tmp_path / "first.ckpt")

    def fit(epochs, path=None):
        seed_everything(3, verbose=False)
        model, callback = Keeps(), SwapBatchNorm(**SMALL)
        trainer = make_trainer(callback, *AVERAGED[average](), max_epochs=epochs)
        trainer.fit(model, loader(), ckpt_path=path)
        return trainer, model, callback

    whole, model, _ = fit(2)
    resumed, again, callback = fit(2, tmp_path / "first.ckpt")
    assert_identical(dict(model.state_dict()), dict(again.state_dict()))
    assert resumed.global_step == whole.global_step == 8
    assert find_batchnorm(again) == {}
    assert rules(callback) == []


class Evaluated(Healthy):
    """Tests and predicts."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def checkpoint(make_trainer, path, *callbacks, build=Healthy):
    """Train a model for an epoch and save it."""
    model = build()
    trainer = make_trainer(*callbacks)
    trainer.fit(model, loader())
    trainer.save_checkpoint(path)
    return model


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_a_checkpoint_that_was_trained_with_batchnorm_is_refused_with_the_reason(make_trainer, tmp_path, built):
    """The error names layers and ways out; without the callback the same checkpoint resumes."""
    path = tmp_path / "batchnorm.ckpt"
    checkpoint(make_trainer, path, build=built)
    with pytest.raises(ValueError, match=r"has running statistics of net.1 and net.4, .*net.1 is GroupNorm") as caught:
        make_trainer(SwapBatchNorm(**SMALL), max_epochs=2).fit(built(), loader(), ckpt_path=path)
    assert str(caught.value).startswith("SwapBatchNorm needs a checkpoint of a run in which the same layers were")
    assert "Use it without SwapBatchNorm, or with to: frozen, or train from the start" in str(caught.value)
    make_trainer(max_epochs=2).fit(built(), loader(), ckpt_path=path)


def test_a_model_that_drops_the_statistics_itself_is_not_refused(make_trainer, tmp_path):
    """What counts is what its own ``on_load_checkpoint`` leaves; two callbacks ask it once."""
    calls = []

    class Drops(Evaluated):
        def on_load_checkpoint(self, checkpoint):
            calls.append(1)
            state = checkpoint["state_dict"]
            for name in [name for name in state if "running" in name or "tracked" in name]:
                del state[name]

    path = tmp_path / "batchnorm.ckpt"
    checkpoint(make_trainer, path)
    model = Drops()
    callbacks = [SwapBatchNorm(include="net.1"), SwapBatchNorm(include="net.4")]
    make_trainer(*callbacks).validate(model, loader(), ckpt_path=path, verbose=False)
    assert find_batchnorm(model) == {}
    assert calls == [1]
    assert "on_load_checkpoint" not in vars(model)


def test_frozen_goes_on_from_a_checkpoint_that_was_trained_with_batchnorm(make_trainer, tmp_path):
    """It normalises by the statistics that the checkpoint has, and they stay; nothing is warned about."""
    path = tmp_path / "batchnorm.ckpt"
    trained = checkpoint(make_trainer, path)
    model, callback = Healthy(), SwapBatchNorm("frozen")
    make_trainer(callback, max_epochs=2).fit(model, loader(), ckpt_path=path)
    assert isinstance(model.net[1], FrozenBatchNorm)
    assert torch.equal(model.net[1].running_var, trained.net[1].running_var)
    assert not torch.equal(model.net[1].weight, trained.net[1].weight)
    assert rules(callback) == [("swapped-batchnorm", "info")]


def test_without_strict_loading_the_statistics_are_left_out(make_trainer, tmp_path):
    """Who asks for it gets the other weights of the checkpoint."""
    path = tmp_path / "batchnorm.ckpt"
    trained, model = checkpoint(make_trainer, path), Evaluated()
    model.strict_loading = False
    make_trainer(SwapBatchNorm()).validate(model, loader(), ckpt_path=path, verbose=False)
    assert find_batchnorm(model) == {}
    assert_identical(dict(trained.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize(("groups", "warned"), [(2, True), (4, False)])
def test_another_number_of_groups_than_the_checkpoint_had_is_warned_about(make_trainer, tmp_path, groups, warned):
    """No key of a checkpoint tells it; the callback's state does."""
    path = tmp_path / "four.ckpt"
    checkpoint(make_trainer, path, SwapBatchNorm(groups=4, fewest=2))
    callback = SwapBatchNorm(groups=groups, fewest=2)
    make_trainer(callback, max_epochs=2).fit(Healthy(), loader(), ckpt_path=path)
    told = [finding.evidence for finding in callback.findings if finding.severity is Severity.WARNING]
    expected = (
        "net.1 is GroupNorm with 2 groups; in the checkpoint's run it was GroupNorm with 4 groups, "
        "and 1 other layer likewise"
    )
    assert told == ([expected] if warned else [])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_of_the_swapped_network_is_evaluated_with_the_callback(make_trainer, tmp_path, stage):
    """A new model is swapped before the checkpoint is restored, and computes what the trained one does."""
    path = tmp_path / "swapped.ckpt"
    trained = checkpoint(make_trainer, path, SwapBatchNorm(**SMALL), build=Evaluated)
    model, callback = Evaluated(), SwapBatchNorm(**SMALL)
    getattr(make_trainer(callback), stage)(model, loader(), ckpt_path=path)
    batch = next(iter(loader()))[0]
    assert torch.equal(model.eval()(batch), trained.eval()(batch))
    assert rules(callback) == [("swapped-batchnorm", "info")]
    getattr(make_trainer(callback), stage)(model, loader())
    assert len(callback.findings) == 1


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
@pytest.mark.parametrize("first", [True, False], ids=["swap listed first", "init listed first"])
def test_weights_start_from_the_scheme_beside_weight_init(make_trainer, built, first):
    """Either order gives the start of a model that was swapped by hand."""

    def start(build, *callbacks):
        model = type("Still", (build,), {"configure_optimizers": still})()
        make_trainer(*callbacks).fit(model, loader())
        return model

    def still(model):
        return torch.optim.SGD(model.parameters(), lr=0.0)

    swap, init = SwapBatchNorm(**SMALL), WeightInit("xavier", seed=5)
    model = start(built, *([swap, init] if first else [init, swap]))
    twin = Healthy()
    swap_batchnorm(twin, **SMALL)
    twin.configure_optimizers = still.__get__(twin)
    make_trainer(WeightInit("xavier", seed=5)).fit(twin, loader())
    assert_identical(dict(twin.state_dict()), dict(model.state_dict()))
    assert rules(swap) == [("swapped-batchnorm", "info")]
    assert rules(init) == []


@pytest.mark.parametrize("first", [True, False], ids=["swap listed first", "swap listed last"])
def test_monitors_of_batchnorm_say_that_there_is_none(make_trainer, first):
    """None of the other callbacks fails or speaks of BatchNorm layers that are gone."""
    swap = SwapBatchNorm(**SMALL)
    others = [
        PreflightAudit(),
        NaNGuard(),
        ActivationMonitor(max_overhead=None),
        BatchNormMonitor(),
        PreciseBatchNorm(),
    ]
    run(make_trainer, Healthy, [swap, *others] if first else [*others, swap])
    assert not any(callback.off for callback in (swap, *others))
    said = {type(callback).__name__: [finding.evidence for finding in callback.findings] for callback in others}
    assert said == {
        "PreflightAudit": [],
        "NaNGuard": [],
        "ActivationMonitor": [],
        "BatchNormMonitor": ["BatchNorm is not watched: the model has no BatchNorm layer"],
        "PreciseBatchNorm": ["running statistics were not re-estimated: the model has no BatchNorm layer"],
    }


class Branches(Healthy):
    """Three BatchNorm layers in two branches, one layer in two places, one without γ and β."""

    def __init__(self):
        super().__init__()
        shared = nn.BatchNorm1d(16)
        self.net = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), shared),
                "head": nn.ModuleList([shared, nn.BatchNorm1d(16, affine=False), nn.Linear(16, 4)]),
            }
        )

    def forward(self, x):
        x = self.net["stem"](x)
        for layer in self.net["head"]:
            x = layer(x)
        return x


ALL = ["net.stem.1", "net.stem.2", "net.head.1"]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        pytest.param({}, ALL, id="all"),
        pytest.param({"include": "net.stem.1"}, ["net.stem.1"], id="a layer"),
        pytest.param({"include": ["net.stem"]}, ALL[:2], id="a module around"),
        pytest.param({"include": "net.head.*"}, ALL[1:], id="star, and the second place of a layer"),
        pytest.param({"include": "nn.ModuleList"}, ALL[1:], id="class of a module around"),
        pytest.param({"include": "Batch*1d"}, ALL, id="class of the layer"),
        pytest.param({"exclude": "net.head"}, ALL[:1], id="exclude"),
        pytest.param({"include": "net.stem", "exclude": ["*.2"]}, ALL[:1], id="exclude wins"),
    ],
)
def test_include_and_exclude_choose_layers(make_trainer, scope, expected):
    """By path or class, of the layer or of a module around it; others stay BatchNorm."""
    model, callback = Branches(), SwapBatchNorm(**scope)
    make_trainer(callback).fit(model, loader())
    assert list(callback.swapped) == expected
    assert list(find_batchnorm(model)) == [name for name in ALL if name not in expected]
    assert model.net["stem"][2] is model.net["head"][0]
    assert rules(callback) == [("swapped-batchnorm", "info")]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_warned_about(make_trainer, argument):
    """The finding names argument, need, got and the nearest names."""
    model, callback = Branches(), SwapBatchNorm(**{argument: "net.sten"})
    make_trainer(callback).fit(model, loader())
    finding = callback.findings[-1]
    assert (finding.rule, finding.severity) == ("unmatched-layers", Severity.WARNING)
    assert finding.evidence.startswith(f"{argument} needs patterns that match a BatchNorm layer, a module around one")
    assert "net.stem" in finding.advice
    if argument == "include":
        assert callback.findings[0].evidence == (
            "no BatchNorm layer was replaced: include and exclude leave none of the 3 BatchNorm layers"
        )


def test_names_with_characters_of_patterns_are_taken_as_they_are(make_trainer):
    """A module that is called ``a[0]`` is swapped, and its neighbour ``a0`` is not."""
    model, callback = Healthy(nn.Sequential(nn.Linear(12, 16))), SwapBatchNorm(exclude="net.a0")
    model.net.add_module("a[0]", nn.BatchNorm1d(16))
    model.net.add_module("a0", nn.BatchNorm1d(16))
    model.net.add_module("head", nn.Linear(16, 4))
    make_trainer(callback).fit(model, loader())
    assert list(callback.swapped) == ["net.a[0]"]
    assert list(find_batchnorm(model)) == ["net.a0"]


class Fused(nn.BatchNorm1d):
    """Goes on with an activation, as layers of some libraries do."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        pytest.param(
            lambda: Fused(16), "net.1 cannot be swapped: its class Fused .* leave it out by exclude", id="own"
        ),
        pytest.param(lambda: nn.LazyBatchNorm1d(), "net.1 cannot be swapped: it is lazy", id="lazy"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_layer_that_cannot_be_replaced_ends_the_fit_before_it_begins(make_trainer, layer, words):
    """The error names layer and reason, nothing was replaced; left out, the others are."""
    model = Healthy()
    model.net[1] = layer()
    with pytest.raises(ValueError, match=words):
        make_trainer(SwapBatchNorm()).fit(model, loader())
    assert list(find_batchnorm(model)) == ["net.1", "net.4"]
    callback = SwapBatchNorm(exclude="net.1")
    make_trainer(callback).fit(model, loader())
    assert list(callback.swapped) == ["net.4"]


@pytest.mark.parametrize(
    ("to", "batches", "severity"),
    [
        pytest.param("group", 11, Severity.WARNING, id="trained"),
        pytest.param("group", 0, Severity.INFO, id="new"),
        pytest.param("frozen", 11, Severity.INFO, id="trained and frozen"),
    ],
)
def test_layers_that_were_trained_as_batchnorm_are_warned_about(make_trainer, to, batches, severity):
    """A pretrained network computes something else; a new one does not care, and frozen goes on."""
    model = Healthy()
    for _ in range(batches):
        model.net(torch.randn(8, 12))
    callback = SwapBatchNorm(to)
    make_trainer(callback).fit(model, loader())
    finding = callback.findings[0]
    assert finding.severity is severity
    assert ("; 2 had been trained as BatchNorm" in finding.evidence) == (severity is Severity.WARNING)


@pytest.mark.parametrize("seen", [True, False])
def test_frozen_layers_that_do_not_normalise_are_warned_about(make_trainer, seen):
    """A new network has statistics of 0 and 1; one that has seen data has not."""
    model, callback = Healthy(), SwapBatchNorm("frozen")
    if seen:
        model.net(torch.randn(8, 12))
    make_trainer(callback).fit(model, loader())
    told = [finding for finding in callback.findings if finding.severity is Severity.WARNING]
    assert len(told) == (not seen)
    if not seen:
        assert told[0].evidence.startswith("2 of 2 frozen BatchNorm layers (net.1 and net.4) have the running stat")


def test_the_trainer_of_the_other_package_swaps_too(tmp_path):
    """A model of ``pytorch_lightning`` that builds its layers in ``configure_model``."""

    class Other(pytorch_lightning.LightningModule):
        def configure_model(self):
            self.net = network()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    model, callback = Other(), SwapBatchNorm(**SMALL)
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(tmp_path),
        callbacks=[callback],
    )
    trainer.fit(model, loader())
    assert find_batchnorm(model) == {}
    assert rules(callback) == [("swapped-batchnorm", "info")]


def test_two_callbacks_share_a_model_by_their_scopes(make_trainer):
    """Each swaps its own layers to its own kind."""
    model = Convolutional(flat=True)
    one, other = SwapBatchNorm("instance", include="BatchNorm2d"), SwapBatchNorm("layer", include="BatchNorm1d")
    make_trainer(one, other).fit(model, loader())
    assert isinstance(model.net[1], InstanceNorm)
    assert model.net[4].num_groups == 1
    assert find_batchnorm(model) == {}
    assert rules(one) == rules(other) == [("swapped-batchnorm", "info")]


def test_given_twice_it_swaps_once(make_trainer):
    """A recipe that was given twice does no harm: the layers are those of the first."""
    model, one, other = Healthy(), SwapBatchNorm(), SwapBatchNorm()
    make_trainer(one, other).fit(model, loader())
    assert find_batchnorm(model) == {}
    assert rules(one) == [("swapped-batchnorm", "info")]
    assert all(finding.severity is Severity.INFO for finding in other.findings)


def test_a_monitor_that_cannot_report_swaps_all_the_same(make_trainer, monkeypatch):
    """What is trained does not hang on what is said about it."""
    callback, model = SwapBatchNorm(), Healthy()
    monkeypatch.setattr(callback, "_begin", lambda trainer: setattr(callback, "off", True))
    make_trainer(callback).fit(model, loader())
    assert find_batchnorm(model) == {}
    assert callback.findings == []


def test_copies_and_pickles_are_as_good_as_new(make_trainer):
    """In the middle of a fit too, and a copy swaps another model."""
    copies = []

    class Copies(Healthy):
        def training_step(self, batch, batch_idx):
            if not copies:
                callback = self.trainer.callbacks[0]
                copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])  # noqa: S301  (our own)
            return super().training_step(batch, batch_idx)

    make_trainer(SwapBatchNorm(**SMALL)).fit(Copies(), loader())
    assert len(copies) == 2
    for callback in copies:
        model = Healthy()
        make_trainer(callback).fit(model, loader())
        assert find_batchnorm(model) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"to": "batch"}, "to must be one of group, layer, instance, frozen, got 'batch'", id="to"),
        pytest.param({"to": ["group"]}, "to must be one of group, .*, got ..group", id="to, a list"),
        pytest.param({"groups": 0}, "groups must be a whole number of at least 1, got 0", id="groups"),
        pytest.param({"fewest": 1.5}, "fewest must be a whole number of at least 1, got 1.5", id="fewest"),
        pytest.param({"train_affine": 1}, "train_affine must be True or False, got 1", id="no flag"),
        pytest.param({"train_affine": False}, "train_affine must be True but for 'frozen'", id="affine"),
        pytest.param({"include": []}, "include must be a string or a list", id="include"),
        pytest.param({"exclude": 3}, "exclude must be a string or a list", id="exclude"),
        pytest.param({"ignore": ["swapped"]}, "ignore must name rules of lightning_bn", id="ignore"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=words):
        SwapBatchNorm(**arguments)


def two_processes(scenario, root):
    """Start both processes; their reports by rank."""
    printed = in_two_processes(SCRIPT, scenario, root, root=root)
    reports = sorted(Path(root).glob("rank*.json"))
    assert len(reports) == 2, printed
    return [json.loads(report.read_text()) for report in reports]


@pytest.mark.slow
@pytest.mark.parametrize("built", ["__init__", "configure_model"])
def test_two_processes_train_what_they_train_with_a_model_swapped_by_hand(tmp_path, built):
    """Bit for bit on both ranks, DDP wraps the new layers, a resumed run goes on, and the first rank alone reports."""
    ranks = two_processes(built, tmp_path / "callback")
    hand = two_processes(f"{built}, by hand", tmp_path / "hand")
    assert [rank["weights"] for rank in ranks] == [rank["weights"] for rank in hand]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["batchnorm"] == ranks[1]["batchnorm"] == []
    assert ranks[0]["resumed"] == ranks[1]["resumed"] == ranks[0]["weights"]
    assert ranks[0]["findings"] == ["swapped-batchnorm"]
    assert ranks[1]["findings"] == []


@pytest.mark.slow
def test_sharded_layers_are_refused_on_both_ranks(tmp_path):
    """FSDP2 holds on to the layers that it has sharded: the error says where to swap instead."""
    ranks = two_processes("sharded", tmp_path)
    for rank in ranks:
        assert rank["error"] == (
            "SwapBatchNorm needs layers that are not sharded yet; call swap_batchnorm in configure_model, before "
            "fully_shard; got DTensor parameters in net.1 and net.4"
        )


@pytest.mark.slow
def test_what_spawned_processes_cannot_give_back_is_said(tmp_path):
    """A copy is swapped and trains; the model of the calling process gets its weights and keeps BatchNorm."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", str(SCRIPT), "spawned", str(tmp_path)]
    subprocess.run(words, env=environment, capture_output=True, timeout=240, check=True)
    report = json.loads((tmp_path / "rank0.json").read_text())
    assert report["batchnorm"] == ["net.1", "net.4"]
    (finding,) = read_findings(tmp_path)
    assert "the model that was given to fit keeps BatchNorm" in finding.evidence
    assert finding.advice == "use a checkpoint of the run, in a model with the same layers replaced"


def test_the_specimen_is_a_lightning_module_with_maps_and_vectors():
    """Both kinds of BatchNorm are in the flat specimen."""
    assert isinstance(Convolutional(), LightningModule)
    kinds = [type(layer) for layer in find_batchnorm(Convolutional(flat=True)).values()]
    assert kinds == [nn.BatchNorm2d, nn.BatchNorm1d]
