# SPDX-License-Identifier: Apache-2.0
"""NaNGuard names the culprit of a bad first step and stays silent on healthy ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from specimens import (
    CLASSES,
    FEATURES,
    BetweenModules,
    Healthy,
    LogOfNegative,
    LogOfZeroInLoss,
    MaskedAttention,
    MaskedLabels,
    loader,
    network,
    variance_overflow,
    with_module,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_bn import NaNGuard, NonFiniteError, Severity, read_findings


def plant(value, sample=5, feature=3):
    def change(inputs):
        inputs[sample, feature] = value

    return change


def nan_weight():
    net = network()
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")
    return net


def fp16_overflow():
    net = network(norm=False, depth=4, width=64)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 1000, generator=torch.Generator().manual_seed(0))
    return net.half()


class Half(Healthy):
    def forward(self, x):
        return self.net(x.half())


FAULTS = {
    "NaN in the batch": (lambda: Healthy(), plant(float("nan")), "non-finite-input", None, "batch[0], sample 5"),
    "+inf in the batch": (lambda: Healthy(), plant(float("inf")), "non-finite-input", None, "batch[0], sample 5"),
    "NaN weight": (lambda: Healthy(nan_weight()), None, "non-finite-parameter", "net.3", "net.3.weight"),
    "module": (
        lambda: Healthy(with_module(LogOfNegative())),
        None,
        "invalid-operation",
        "net.2",
        "torch.log(-x.abs() - 1)",
    ),
    "between two modules": (
        lambda: Healthy(with_module(BetweenModules())),
        None,
        "invalid-operation",
        "net.2",
        "log in net.2 (BetweenModules)",
    ),
    "log(0) in the loss": (lambda: LogOfZeroInLoss(), None, "invalid-operation", None, "specimens.py"),
    "fp16 overflow": (lambda: Half(fp16_overflow()), None, "overflow-by-range", "net.2", "float16"),
    "silent variance overflow": (
        lambda: Healthy(variance_overflow()),
        None,
        "overflowed-running-statistics",
        "net.1",
        "+inf",
    ),
}

HEALTHY = {
    "BatchNorm": lambda: Healthy(),
    "no norm": lambda: Healthy(network(norm=False)),
    "masked attention": lambda: Healthy(with_module(MaskedAttention())),
    "depth 20": lambda: Healthy(network(norm=False, depth=20)),
    "huge weights behind BatchNorm": lambda: Healthy(scaled(network(), 1000.0)),
}


def scaled(net, factor):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(factor)
    return net


@pytest.mark.parametrize(("build", "change", "rule", "layer", "words"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_raised_with_its_culprit(make_trainer, build, change, rule, layer, words):
    """The first step raises a report that names rule, place and numbers; the same is on disk."""
    guard = NaNGuard()
    trainer = make_trainer(guard)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(build(), loader(plant=change))
    assert [(finding.rule, finding.layer) for finding in guard.findings] == [(rule, layer)]
    assert words in str(caught.value)
    assert [finding.evidence for finding in read_findings(trainer.log_dir)] == [guard.findings[0].evidence]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("build", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_twin_raises_no_finding(make_trainer, build, seed):
    """No finding at all on networks that train, masked scores of -inf included."""
    torch.manual_seed(seed)
    guard = NaNGuard()
    make_trainer(guard).fit(build(), loader(seed=seed), loader(seed=seed + 1))
    assert guard.findings == []


def test_nan_that_the_model_masks_is_a_note_and_no_fault(make_trainer):
    """Missing values that nan_to_num takes out are mentioned as info; training goes on."""
    guard = NaNGuard()
    trainer = make_trainer(guard)
    trainer.fit(MaskedLabels(), loader(plant=plant(float("nan"))))
    assert [(finding.rule, finding.severity) for finding in guard.findings] == [("non-finite-input", Severity.INFO)]
    assert trainer.global_step == 4


def test_the_weights_are_those_before_the_update_when_it_raises(make_trainer):
    """The verdict falls before backward: the raise leaves the weights as they were."""
    model = Healthy(with_module(LogOfNegative()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError):
        make_trainer(NaNGuard()).fit(model, loader())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stop_ends_the_run_cleanly_without_the_poisoned_update(make_trainer, tmp_path):
    """``stop``: fit returns, the weights are finite, and the last checkpoint holds them."""
    model = Healthy(with_module(LogOfNegative()))
    before = copy.deepcopy(model.state_dict())
    guard = NaNGuard("stop")
    keeper = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer = make_trainer(guard, keeper, max_epochs=3, enable_checkpointing=True)
    trainer.fit(model, loader())
    assert trainer.global_step == 1
    saved = torch.load(keeper.last_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, before[name]) for name, value in saved.items())
    assert [finding.rule for finding in guard.findings] == ["invalid-operation"]


def test_warn_lets_training_go_on_and_says_it_once(make_trainer):
    """``warn``: every step runs, the finding is reported once."""
    guard = NaNGuard("warn")
    trainer = make_trainer(guard, max_epochs=2)
    trainer.fit(Healthy(with_module(LogOfNegative())), loader())
    assert trainer.global_step == 8
    assert [finding.rule for finding in guard.findings] == ["invalid-operation"]


def test_an_ignored_rule_is_neither_reported_nor_acted_upon(make_trainer):
    """A rule that is silenced by name does not stop the run."""
    guard = NaNGuard(ignore=["invalid-operation"])
    trainer = make_trainer(guard)
    trainer.fit(Healthy(with_module(LogOfNegative())), loader())
    assert guard.findings == []
    assert trainer.global_step == 4


def test_a_users_own_exception_is_explained_and_passed_on_unchanged(make_trainer):
    """Where the project raises on NaN itself, the culprit is on disk and the project's exception leaves the fit."""

    class Raises(Healthy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if torch.isnan(loss):
                raise FloatingPointError("loss is NaN")
            return loss

    guard = NaNGuard()
    trainer = make_trainer(guard)
    with pytest.raises(FloatingPointError, match="loss is NaN"):
        trainer.fit(Raises(with_module(LogOfNegative())), loader())
    assert [(finding.rule, finding.layer) for finding in read_findings(trainer.log_dir)] == [
        ("invalid-operation", "net.2")
    ]


def test_a_users_unrelated_exception_raises_no_finding(make_trainer):
    """An exception with finite values everywhere is none of the guard's business."""

    class Fails(Healthy):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    guard = NaNGuard()
    with pytest.raises(ZeroDivisionError):
        make_trainer(guard).fit(Fails(with_module(MaskedAttention())), loader())
    assert guard.findings == []


def test_manual_optimisation_is_guarded_too(make_trainer):
    """With automatic optimisation off the verdict falls before the first manual backward."""

    class Manual(Healthy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(self(batch[0]), batch[1]))
            self.optimizers().step()

    with pytest.raises(NonFiniteError, match="LogOfNegative"):
        make_trainer(NaNGuard()).fit(Manual(with_module(LogOfNegative())), loader())


def test_every_loss_of_the_first_batch_counts_with_manual_optimisation(make_trainer):
    """Of two manual backward passes the second one's NaN is found too."""

    class Two(Healthy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for sick in (False, True):
                out = self(batch[0])
                self.manual_backward(self.loss(torch.log(-out.abs()) if sick else out, batch[1]))
                self.optimizers().step()

    guard = NaNGuard()
    with pytest.raises(NonFiniteError, match=r"invalid-operation"):
        make_trainer(guard).fit(Two(), loader())


def test_a_loss_that_was_never_seen_is_not_called_finite(make_trainer):
    """With ``loss.backward()`` in the user's own hands the report says that no loss was seen."""

    class Raw(Healthy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.loss(self(batch[0]), batch[1]).backward()
            self.optimizers().step()

    trainer = make_trainer(NaNGuard())
    trainer.fit(Raw(), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    assert "no loss was seen" in events.Tensors("bn_first_pass/text_summary")[0].tensor_proto.string_val[0].decode()


def test_two_bad_tensors_of_a_batch_are_two_findings_on_disk(make_trainer):
    """What the exception lists is all in the file."""

    class Both(Healthy):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum() * batch[1].sum()

    x = torch.full((8, FEATURES), float("nan"))
    guard = NaNGuard()
    trainer = make_trainer(guard)
    with pytest.raises(NonFiniteError):
        trainer.fit(Both(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), 8))
    assert [finding.data["path"] for finding in read_findings(trainer.log_dir)] == ["batch[0]", "batch[1]"]


def test_the_second_fit_is_guarded_as_the_first(make_trainer):
    """Each fit checks its own first step."""
    model, guard = Healthy(), NaNGuard()
    make_trainer(guard).fit(model, loader())
    with pytest.raises(NonFiniteError, match="sample 5"):
        make_trainer(guard).fit(model, loader(plant=plant(float("nan"))))


def test_the_report_is_in_tensorboards_text_tab(make_trainer):
    """A tag of its own holds the verdict on the first pass, ``bn_report`` all findings."""
    trainer = make_trainer(NaNGuard("warn"))
    trainer.fit(Healthy(with_module(LogOfNegative())), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    for tag in ("bn_first_pass/text_summary", "bn_report/text_summary"):
        text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        assert "LogOfNegative" in text


def test_a_healthy_first_pass_says_what_was_checked(make_trainer):
    """Without a fault the text says how much was looked at, so that silence is no guess."""
    trainer = make_trainer(NaNGuard())
    trainer.fit(Healthy(), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    text = events.Tensors("bn_first_pass/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "All finite: 10 module calls" in text


@pytest.mark.parametrize("action", [3, "explode", None])
def test_a_wrong_action_is_refused_with_name_need_and_got(action):
    """The error names the argument, the words it may be and what it got."""
    with pytest.raises(ValueError, match=rf"action must be one of raise, stop, warn, skip, got {action!r}"):
        NaNGuard(action)


def test_the_error_survives_pickling_with_its_findings(make_trainer):
    """A spawned process hands the whole report to its parent."""
    with pytest.raises(NonFiniteError) as caught:
        make_trainer(NaNGuard()).fit(Healthy(with_module(LogOfNegative())), loader())
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert str(again) == str(caught.value)
    assert again.findings == caught.value.findings


def test_a_dict_batch_is_named_by_its_key(make_trainer):
    """Nested batches are named by their path."""

    class FromDict(Healthy):
        def training_step(self, batch, batch_idx):
            return self.loss(self(batch["image"]["pixels"]), batch["label"])

    image = torch.randn(8, FEATURES)
    image[2, 0] = float("nan")
    rows = [{"image": {"pixels": x}, "label": torch.tensor(i % CLASSES)} for i, x in enumerate(image)]
    with pytest.raises(NonFiniteError, match=r"batch\['image'\]\['pixels'\], sample 2"):
        make_trainer(NaNGuard()).fit(FromDict(), torch.utils.data.DataLoader(rows, 8))
