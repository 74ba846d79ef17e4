# SPDX-License-Identifier: Apache-2.0
"""ActivationMonitor measures what the layers really put out, when it is due, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from specimens import FEATURES, Healthy, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy

from lightning_bn import ActivationMonitor, Severity


class Keeping(Healthy):
    """Keeps the outputs of one layer, by a hook of its own."""

    def __init__(self, layer="2"):
        super().__init__(network(norm=False))
        self.kept = []
        self.net.get_submodule(layer).register_forward_hook(
            lambda module, args, out: self.kept.append(out.detach().clone())
        )


def scalars(trainer, tag):
    events = EventAccumulator(trainer.log_dir).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def float64_statistics(tensors):
    """Mean, biased std, largest absolute value and zero share in a plain float64 loop."""
    values = [float(value) for x in tensors for value in x.flatten().tolist()]
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return mean, std, max(map(abs, values)), sum(value == 0 for value in values) / len(values)


def test_statistics_equal_a_float64_loop_over_the_outputs(make_trainer):
    """Mean, std, largest absolute value and zero share of the last due step agree with an independent count."""
    model, monitor = Keeping(), ActivationMonitor()
    make_trainer(monitor, num_sanity_val_steps=0).fit(model, loader())
    mean, std, largest, zeros = float64_statistics(model.kept[-1:])
    row = monitor.statistics["net.2"]
    assert row.count == 8 * 16
    assert (row.mean, row.std, row.absmax) == pytest.approx((mean, std, largest), rel=1e-6, abs=1e-7)
    assert row.zero_share == zeros


def test_micro_batches_of_unequal_size_pool_exactly(make_trainer):
    """With accumulation the numbers are those of all micro-batches of the step together."""
    model, monitor = Keeping(), ActivationMonitor()
    trainer = make_trainer(monitor, accumulate_grad_batches=3)
    trainer.fit(model, loader(size=19))  # batches of 8, 8 and 3
    mean, std, largest, zeros = float64_statistics(model.kept)
    row = monitor.statistics["net.2"]
    assert row.count == 19 * 16
    assert (row.mean, row.std, row.absmax) == pytest.approx((mean, std, largest), rel=1e-6, abs=1e-7)
    assert row.zero_share == pytest.approx(zeros)


@pytest.mark.parametrize(
    ("every_n_steps", "log_every_n_steps", "accumulate", "steps"),
    [
        pytest.param(1, 50, 1, [0, 1, 2, 3, 4, 5, 6, 7], id="every step"),
        pytest.param(3, 50, 1, [2, 5], id="own interval"),
        pytest.param(None, 4, 1, [3, 7], id="follows the trainer"),
        pytest.param(None, 2, 2, [1, 3], id="accumulation"),
        pytest.param(None, 0, 1, [], id="never"),
    ],
)
def test_due_steps_are_those_of_self_log(make_trainer, every_n_steps, log_every_n_steps, accumulate, steps):
    """The overview stands at the same steps of the same axis as what the model logs by self.log."""
    monitor = ActivationMonitor(every_n_steps=every_n_steps)
    trainer = make_trainer(
        monitor, max_epochs=2, log_every_n_steps=log_every_n_steps, accumulate_grad_batches=accumulate
    )
    trainer.fit(Healthy(), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("bn_overview/std")]
    assert len(tags) == (3 if steps else 0)
    assert all([event.step for event in events.Scalars(tag)] == steps for tag in tags)
    if every_n_steps is None and steps:
        assert [step for step, _ in scalars(trainer, "train_loss")] == steps


def test_a_trainer_that_never_logs_is_said(make_trainer):
    """``log_every_n_steps=0`` leaves no due step: an info says so instead of silence."""
    monitor = ActivationMonitor()
    make_trainer(monitor, log_every_n_steps=0).fit(Healthy(), loader())
    assert [(finding.rule, finding.severity) for finding in monitor.findings] == [("not-watched", Severity.INFO)]


def test_no_hook_is_on_the_model_on_steps_that_are_not_due(make_trainer):
    """Hooks exist on due steps only, and never in validation."""

    class Watching(Healthy):
        def __init__(self):
            super().__init__()
            self.hooked = []

        def training_step(self, batch, batch_idx):
            self.hooked.append(sum(len(module._forward_hooks) for module in self.modules()))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert not any(module._forward_hooks for module in self.modules())

    model = Watching()
    make_trainer(ActivationMonitor(every_n_steps=2)).fit(model, loader(), loader())
    assert model.hooked == [0, 8, 0, 8]


def test_nothing_is_read_on_the_host_inside_the_training_step(make_trainer):
    """No operation inside a due training step brings a value to the host."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func), func
            assert func is not torch.ops.aten.is_nonzero.default
            return func(*args, **(kwargs or {}))

    class Strict(Healthy):
        def training_step(self, batch, batch_idx):
            with NoReads():
                return self.loss(self(batch[0]), batch[1])

    monitor = ActivationMonitor()
    make_trainer(monitor).fit(Strict(network(norm=False)), loader())
    assert monitor.statistics


def test_globs_choose_modules_and_metrics_are_no_layers(make_trainer):
    """A pattern chooses leaf and container alike; torchmetrics' modules are never measured."""
    model = Healthy()
    model.accuracy = MulticlassAccuracy(4)
    by_default, by_glob = ActivationMonitor(), ActivationMonitor(["net", "net.*1"])
    make_trainer(by_default, by_glob).fit(model, loader())
    assert list(by_default.statistics) == [f"net.{place}" for place in range(7)]
    assert list(by_glob.statistics) == ["net", "net.1"]


def test_a_glob_that_matches_nothing_warns_with_the_nearest_names(make_trainer):
    """The warning names the argument, what it needs, what it got, and the names there are."""
    monitor = ActivationMonitor(["net.0", "nett.6"])
    make_trainer(monitor).fit(Healthy(), loader())
    (finding,) = monitor.findings
    assert (finding.rule, finding.severity) == ("unmatched-layers", Severity.WARNING)
    assert "layers needs patterns that match a module name, got 'nett.6'" in finding.evidence
    assert "net.6" in finding.advice
    assert list(monitor.statistics) == ["net.0"]


def test_nan_is_counted_and_undefined_not_dropped(make_trainer):
    """A layer with NaN counts as non-finite and its zero share is undefined, not 0 %."""

    class MakesNaN(nn.Module):
        def forward(self, x):
            return x * float("nan")

    monitor = ActivationMonitor()
    trainer = make_trainer(monitor)
    trainer.fit(Healthy(nn.Sequential(nn.Linear(FEATURES, 4), MakesNaN())), loader())
    assert scalars(trainer, "bn_overview/nonfinite_layers")[0][1] == 1
    assert math.isnan(monitor.statistics["net.1"].zero_share)
    table = EventAccumulator(trainer.log_dir).Reload().Tensors("bn_activations/text_summary")[0]
    assert "undefined" in table.tensor_proto.string_val[0].decode()


def test_a_shared_module_and_a_tuple_output_are_pooled(make_trainer):
    """All calls of a module in a step count, and all tensors of its output."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.lstm, self.head = nn.Tanh(), nn.LSTM(FEATURES, 4), nn.Linear(4, 4)

        def forward(self, x):
            out, _ = self.lstm(self.act(self.act(x)))
            return self.head(out)

    monitor = ActivationMonitor()
    make_trainer(monitor).fit(Healthy(Twice()), loader())
    assert monitor.statistics["net.act"].count == 2 * 8 * FEATURES
    assert monitor.statistics["net.lstm"].count == 8 * 4 + 2 * 4


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch.compile's own
def test_a_compiled_submodule_is_said_to_be_out_of_sight(make_trainer):
    """A module behind torch.compile gets an info; the layers around it are measured."""
    net = nn.Sequential(nn.Linear(FEATURES, 16), torch.compile(nn.Linear(16, 16), backend="eager"), nn.Linear(16, 4))
    monitor = ActivationMonitor()
    make_trainer(monitor).fit(Healthy(net), loader())
    assert [(finding.rule, finding.layer) for finding in monitor.findings] == [("not-watched", "net.1")]
    assert list(monitor.statistics) == ["net.0", "net.2"]


def test_forward_methods_called_past_the_modules_are_said(make_trainer):
    """Where no hook fires at all, an info says so."""

    class Bypass(nn.Linear):
        pass

    model = Healthy(Bypass(FEATURES, 4))
    model.forward = lambda x: model.net.forward(x)
    monitor = ActivationMonitor(["net"])
    make_trainer(monitor).fit(model, loader())
    assert [finding.rule for finding in monitor.findings] == ["not-watched"]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_wrong_interval_is_refused_with_name_need_and_got(value):
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=rf"every_n_steps must be a whole number of at least 1.*got {value!r}"):
        ActivationMonitor(every_n_steps=value)


@pytest.mark.parametrize("value", [[], 3, [1]])
def test_wrong_layers_are_refused_with_name_need_and_got(value):
    """The same for the layer patterns."""
    with pytest.raises(ValueError, match="layers must be a string or a list of at least one string"):
        ActivationMonitor(value)
