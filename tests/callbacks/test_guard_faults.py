# SPDX-License-Identifier: Apache-2.0
"""NaNGuard names operation, line and rule of every planted fault, and is silent on the healthy twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from sick import HERE, OPERATIONS, TWINS, BadTarget, exploding, line_of
from specimens import CLASSES, Healthy, LogOfNegative, loader, network, with_module
from torch import nn

from lightning_bn import NaNGuard, NonFiniteError, read_findings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("build", "rule", "layer", "owner"), OPERATIONS.values(), ids=OPERATIONS)
def test_a_planted_operation_is_named_with_its_line(make_trainer, build, rule, layer, owner, seed):
    """Rule, module and source line are those that were planted, and nothing else is reported."""
    seed_everything(seed)
    guard = NaNGuard()
    trainer = make_trainer(guard)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(build(), loader(seed=seed))
    (found,) = guard.findings
    assert (found.rule, found.layer) == (rule, layer)
    if owner is not None:
        assert (Path(found.data["file"]).name, found.data["line"]) == (Path(HERE).name, line_of(owner))
        assert found.data["code"] in str(caught.value)
    assert [entry.evidence for entry in read_findings(trainer.log_dir)] == [found.evidence]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("build", TWINS.values(), ids=TWINS)
def test_a_healthy_twin_is_no_finding_in_any_step(make_trainer, build, seed):
    """Three epochs with validation, and not one finding."""
    seed_everything(seed)
    guard = NaNGuard()
    trainer = make_trainer(guard, max_epochs=3, num_sanity_val_steps=2)
    trainer.fit(build(), loader(seed=seed), loader(seed=seed + 1))
    assert guard.findings == []
    assert not guard.off


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_a_bad_sample_is_named_in_any_step(make_trainer, value, step):
    """Batch path, sample and step are named; with zeros in its place the step is finite."""

    def plant(inputs):
        inputs[8 * step + 5, 3] = value

    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match=r"batch\[0\], sample 5.*with zeros in their place"):
        make_trainer(guard).fit(Healthy(), loader(plant=plant))
    (found,) = guard.findings
    assert (found.rule, found.step, found.data["index"]) == ("non-finite-input", step, [5, 3])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_bad_target_is_told_from_a_bad_input(make_trainer, precision):
    """NaN that meets only the network's outputs is a target's; weights that are cast first are weights."""

    def plant(inputs):
        inputs[2, 1] = float("nan")

    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard, precision=precision).fit(BadTarget(), loader(plant=plant))
    assert [(found.rule, found.data["index"][0]) for found in guard.findings] == [("non-finite-target", 2)]
    with pytest.raises(NonFiniteError):
        make_trainer(other := NaNGuard(), precision=precision).fit(Healthy(), loader(plant=plant))
    assert [(found.rule, found.data["index"][0]) for found in other.findings] == [("non-finite-input", 2)]


def test_a_bad_sample_that_is_masked_is_not_blamed_for_another_fault(make_trainer):
    """The operation is blamed, as the step is bad without the sample too; the sample is a note."""

    class Both(Healthy):
        def training_step(self, batch, batch_idx):
            out = torch.log(-self(torch.nan_to_num(batch[0])).abs())
            error = (out - batch[0][:, :CLASSES]) ** 2
            return torch.where(torch.isnan(batch[0][:, :CLASSES]), torch.zeros_like(error), error).mean()

    def plant(inputs):
        inputs[2, 1] = float("nan")

    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).fit(Both(), loader(plant=plant))
    rules = {found.rule: found.severity.value for found in guard.findings}
    assert rules == {"invalid-operation": "error", "non-finite-input": "info"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_divergence_is_blamed_on_the_learning_rate(make_trainer, seed):
    """SGD with a rate of 10 and without norm: the first bad step is later than 0, and the rate is named."""
    seed_everything(seed)
    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match="learning rate 10"):
        make_trainer(guard, max_epochs=50).fit(Healthy(network(norm=False, depth=3, width=64), lr=10.0), loader())
    (found,) = guard.findings
    assert found.rule == "diverged-by-learning-rate"
    assert found.data["first_step"] > 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_statistics_that_overflow_later_are_found_at_the_interval(make_trainer, seed):
    """A BatchNorm layer whose variance becomes infinite in step 2 is found, although loss and gradients are finite."""

    def plant(inputs):
        inputs[16:] *= 1e30

    seed_everything(seed)
    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match="overflowed-running-statistics"):
        make_trainer(guard).fit(Healthy(), loader(plant=plant))
    assert {found.rule for found in guard.findings} == {"overflowed-running-statistics"}
    assert guard.findings[0].layer == "net.1"


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_statistics_that_one_batch_poisoned_are_found_where_the_step_was_skipped_by_the_user(make_trainer):
    """A project that skips a NaN loss by returning None keeps its weights, but its running statistics are NaN."""

    class Skips(Healthy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if torch.isnan(loss) else loss

    def plant(inputs):
        inputs[17, 0] = float("nan")

    guard = NaNGuard("warn")
    trainer = make_trainer(guard)
    trainer.fit(Skips(), loader(plant=plant))
    assert [(found.rule, found.layer) for found in guard.findings] == [
        ("poisoned-running-statistics", "net.1"),
        ("poisoned-running-statistics", "net.4"),
    ]


def test_a_weight_that_an_update_made_infinite_is_named_in_the_next_step(make_trainer):
    """The optimizer itself makes infinity of finite gradients: the weight is named, with the step."""

    class Spoils(torch.optim.SGD):
        def step(self, closure=None):
            result = super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = float("inf")
            return result

    class Model(Healthy):
        def configure_optimizers(self):
            return Spoils(self.parameters(), 1e-3)

    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match=r"net\.0\.weight"):
        make_trainer(guard).fit(Model(network(norm=False)), loader())
    (found,) = guard.findings
    assert (found.rule, found.step) == ("non-finite-parameter", 1)


def test_large_gradients_whose_norm_overflows_are_no_fault(make_trainer):
    """Finite gradients of 1e25, whose squares are infinite, raise nothing."""

    class Large(Healthy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e25

    guard = NaNGuard()
    make_trainer(guard).fit(Large(lr=1e-30), loader())
    assert guard.findings == []


def test_statistics_that_nobody_uses_may_be_infinite(make_trainer):
    """A BatchNorm layer that never runs is not judged."""

    class Unused(Healthy):
        def __init__(self):
            super().__init__()
            self.spare = nn.BatchNorm1d(3)
            self.spare.running_var.fill_(float("inf"))

    guard = NaNGuard()
    make_trainer(guard, max_epochs=2).fit(Unused(), loader(), loader())
    assert guard.findings == []


def test_a_start_that_overflows_names_the_layer_and_the_growth(make_trainer):
    """N(0, 1000²) at depth 20 ends float32 in layer 10, by a factor of thousands a layer."""
    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).fit(Healthy(exploding()), loader())
    (found,) = guard.findings
    assert found.data["place"] == 10
    assert 1e3 < found.data["growth"] < 1e5


def test_shared_modules_and_the_innermost_name_are_told(make_trainer):
    """A module that two parents share is named below the one that runs it."""
    shared = LogOfNegative()
    model = Healthy(with_module(nn.Sequential(nn.Identity(), shared)))
    model.alias = shared
    guard = NaNGuard()
    with pytest.raises(NonFiniteError):
        make_trainer(guard).fit(model, loader())
    assert guard.findings[0].layer in {"net.2.1", "alias"}
