# SPDX-License-Identifier: Apache-2.0
"""WeightInit sets the weights once, wherever the layers are built, and never over a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from specimens import FEATURES, BuiltInConfigureModel, BuiltInSetup, Healthy, loader, network
from torch import nn

from lightning_bn import WeightInit, initialize


class Frozen:
    """Mixin: the optimizer does not move the weights, so that they can be compared after a fit."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


BUILT = {"__init__": Healthy, "setup": BuiltInSetup, "configure_model": BuiltInConfigureModel}


def still(base):
    return type(f"Still{base.__name__}", (Frozen, base), {})


def expected(seed, scheme="he"):
    """The weights that the scheme gives to the specimen's network under its name in the module."""
    model = Healthy(network())
    initialize(model, scheme, seed=seed)
    return {name: value.clone() for name, value in model.named_parameters()}


def assert_weights(model, wanted):
    assert {name for name, _ in model.named_parameters()} == set(wanted)
    for name, value in model.named_parameters():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
@pytest.mark.parametrize("scheme", ["he", "xavier_uniform", "naive", 0.5])
def test_weights_are_set_wherever_the_layers_are_built(make_trainer, built, scheme):
    """Layers from __init__, setup and configure_model all start from the scheme."""
    model = still(built)()
    make_trainer(WeightInit(scheme, seed=7)).fit(model, loader())
    assert_weights(model, expected(7, scheme))


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_a_resumed_run_keeps_the_checkpoint(make_trainer, tmp_path, built):
    """``fit(ckpt_path=...)`` ends with the checkpoint's weights, and a note says so."""
    first, path = built(), tmp_path / "first.ckpt"
    trainer = make_trainer(WeightInit(seed=1))
    trainer.fit(first, loader())
    trainer.save_checkpoint(path)
    trained = {name: value.clone() for name, value in first.named_parameters()}
    again, init = still(built)(), WeightInit(seed=2)
    make_trainer(init).fit(again, loader(), ckpt_path=path, weights_only=True)  # its one epoch is done: no further step
    assert_weights(again, trained)
    assert [finding.rule for finding in init.findings] == ["not-initialised"]
    assert "first.ckpt" in init.findings[0].evidence


def test_a_second_fit_leaves_a_trained_model_alone(make_trainer):
    """Neither the same callback nor a new one initialises a model twice; a note says so."""
    model, init = Healthy(), WeightInit(seed=1)
    trainer = make_trainer(init, max_epochs=1)
    trainer.fit(model, loader())
    for callback in (init, WeightInit("naive")):
        model.configure_optimizers = still(Healthy).configure_optimizers.__get__(model)
        trained = {name: value.clone() for name, value in model.named_parameters()}
        make_trainer(callback).fit(model, loader())
        assert_weights(model, trained)
        assert callback.findings[-1].rule == "not-initialised"


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_of_two_instances_the_first_wins_and_the_second_says_so(make_trainer, built):
    """Two schemes on one model do not overwrite each other, wherever the layers are built."""
    model, one, other = still(built)(), WeightInit("he", seed=7), WeightInit("naive", seed=7)
    make_trainer(one, other).fit(model, loader())
    assert_weights(model, expected(7, "he"))
    assert [finding.rule for finding in other.findings] == ["not-initialised"]


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_two_instances_share_a_model_by_their_scopes(make_trainer, built):
    """One for a part and one for the rest: each fills its own, and nobody is left out or overwritten."""
    model = still(built)()
    one, other = WeightInit("naive", seed=7, include="net.0"), WeightInit("he", seed=7)
    make_trainer(one, other).fit(model, loader())
    part = {name for name in expected(7) if name.startswith("net.0.")}
    wanted = {name: expected(7, "naive" if name in part else "he")[name] for name in expected(7)}
    assert_weights(model, wanted)
    assert one.findings == other.findings == []
    again = WeightInit("xavier")
    make_trainer(again).fit(model, loader())
    assert_weights(model, wanted)
    assert [finding.rule for finding in again.findings] == ["not-initialised"]


def test_one_callback_initialises_every_new_model(make_trainer):
    """Cross-validation with one callback starts each fold afresh."""
    init = WeightInit(seed=4)
    for _ in range(2):
        model = still(Healthy)()
        make_trainer(init).fit(model, loader())
        assert_weights(model, expected(4))


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_stages_without_training_leave_the_weights_alone(make_trainer, method):
    """Only a fit initialises."""

    class Evaluated(Healthy):
        def test_step(self, batch, batch_idx):
            pass

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    model = Evaluated()
    before = {name: value.clone() for name, value in model.named_parameters()}
    getattr(make_trainer(WeightInit()), method)(model, loader(), **({} if method == "predict" else {"verbose": False}))
    assert_weights(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("init_first", [True, False], ids=["init listed first", "averaging listed first"])
@pytest.mark.parametrize("built", [Healthy, BuiltInConfigureModel], ids=["__init__", "configure_model"])
@pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning")  # WeightAveraging's own word on it
def test_weight_averaging_sees_the_new_weights(make_trainer, built, init_first):
    """With WeightAveraging the trained and averaged model starts from the scheme (it has no layers from setup)."""
    model, init, averaging = still(built)(), WeightInit(seed=7), WeightAveraging()
    make_trainer(*([init, averaging] if init_first else [averaging, init])).fit(model, loader())
    assert_weights(model, expected(7))


def test_the_seed_of_seed_everything_is_the_default(make_trainer):
    """Without a seed of its own it follows seed_everything, and nothing else of the random state."""
    seed_everything(11)
    torch.rand(3)
    model = still(Healthy)()
    make_trainer(WeightInit()).fit(model, loader())
    assert_weights(model, expected(11))


def test_an_added_layer_does_not_change_the_others():
    """Every parameter has a stream of its own, named after it."""
    small, large = Healthy(network()), Healthy(network())
    large.extra = nn.Linear(4, 4)
    initialize(small, seed=3)
    initialize(large, seed=3)
    grown = dict(large.named_parameters())
    assert all(torch.equal(value, grown[name]) for name, value in small.named_parameters())


def test_a_model_with_its_own_configure_model_is_a_model_as_before(make_trainer):
    """After the fit the model can be copied, and its configure_model is the class's own."""
    model = BuiltInConfigureModel()
    make_trainer(WeightInit()).fit(model, loader())
    assert copy.deepcopy(model).configure_model.__func__ is BuiltInConfigureModel.configure_model


def test_a_configure_model_of_the_instance_is_called_and_given_back(make_trainer):
    """A function that the user hung on the model builds its layers, and is there again after the fit."""
    model = still(BuiltInSetup)()
    model.setup = lambda stage: None
    mine = model.configure_model = lambda: setattr(model, "net", model.net or network())
    make_trainer(WeightInit(seed=7), WeightInit(seed=8)).fit(model, loader())
    assert_weights(model, expected(7))
    assert model.configure_model is mine


def test_an_exception_before_the_fit_starts_leaves_no_wrapper(make_trainer):
    """Where configure_model of the project fails, the model is left as it was."""

    class Fails(Healthy):
        def configure_model(self):
            raise ZeroDivisionError

    model = Fails()
    with pytest.raises(ZeroDivisionError):
        make_trainer(WeightInit()).fit(model, loader())
    assert "configure_model" not in vars(model)


@pytest.mark.parametrize("scheme", ["hee", 0, None])
def test_a_wrong_scheme_is_refused_with_name_need_and_got(scheme):
    """The error names the argument, the words it may be and what it got."""
    with pytest.raises(
        ValueError, match=rf"scheme must be one of he, .*, or a standard deviation above 0, got {scheme!r}"
    ):
        WeightInit(scheme)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "1"])
def test_a_wrong_seed_is_refused_with_name_need_and_got(seed):
    """The same for the seed."""
    with pytest.raises(ValueError, match=rf"seed must be a whole number of at least 0, or None, got {seed!r}"):
        WeightInit(seed=seed)


def test_the_specimen_is_a_lightning_module():
    """The comparison above is made on what users have: a LightningModule with its own names."""
    assert isinstance(still(Healthy)(), LightningModule)
    assert network()[0].in_features == FEATURES
