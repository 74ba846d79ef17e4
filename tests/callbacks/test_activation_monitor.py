# SPDX-License-Identifier: Apache-2.0
"""ActivationMonitor measures what the layers really put out, when it is due, and nothing else."""

from __future__ import annotations

import math
from functools import partial, partialmethod
from types import SimpleNamespace

import pytest
import torch
from specimens import FEATURES, Healthy, NoHostRead, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy

from lightning_bn import ActivationMonitor, Severity
from lightning_bn.callbacks import budget
from lightning_bn.callbacks.hearing import Ear
from lightning_bn.callbacks.slopes import Slopes


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
        pytest.param(1, 1, 1, [0, 1, 2, 3, 4, 5, 6, 7], id="every step"),
        pytest.param(3, 1, 1, [2, 5], id="own interval"),
        pytest.param(1, 4, 1, [3, 7], id="measured more often than logged"),
        pytest.param(3, 4, 1, [5], id="the first measured one after each logged one"),
        pytest.param(3, 50, 1, [5], id="the last one where none was logged"),
        pytest.param(None, 4, 1, [3, 7], id="follows the trainer"),
        pytest.param(None, 2, 2, [1, 3], id="accumulation"),
        pytest.param(None, 0, 1, [], id="never"),
    ],
)
def test_due_steps_are_those_of_self_log(make_trainer, every_n_steps, log_every_n_steps, accumulate, steps):
    """The overview is logged at the pace of self.log, on its axis, and at the end if there was something to log."""
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
    """Hooks exist on due steps and in the first one only, and never in validation."""

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
    assert model.hooked == [8, 8, 0, 8]


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


class Spoils(nn.Module):
    """Makes NaN and infinities of some values, from a given call on."""

    def __init__(self, first=0):
        super().__init__()
        self.calls, self.first = 0, first

    def forward(self, x):
        self.calls += 1
        x = x.detach().clone()
        if self.calls > self.first:
            x[0, :3], x[1, 4] = float("nan"), float("inf")
        return x


class Beside(nn.Module):
    """Spoils a copy of its input, of which the loss knows nothing; BatchNorm takes it."""

    def __init__(self, first=0):
        super().__init__()
        self.spoils, self.norm, self.head = Spoils(first), nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 4)

    def forward(self, x):
        self.norm(self.spoils(x))
        return self.head(x)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_values_that_are_not_finite_are_counted_exactly(make_trainer, steps):
    """In the first step and in all later ones; a layer that is only asked, as BatchNorm, does not know how many."""
    monitor = run(make_trainer, Beside(), data=loader(), max_steps=steps)
    assert monitor.statistics["net.spoils"].nonfinite == 4
    assert monitor.statistics["net.head"].nonfinite == 0
    assert math.isnan(monitor.statistics["net.norm"].nonfinite)
    assert not monitor.statistics["net.norm"].is_finite


@pytest.mark.parametrize(("steps", "count"), [(2, 0), (3, math.nan), (4, 4)])
def test_a_layer_that_was_finite_is_counted_from_the_next_measured_step_on(make_trainer, steps, count):
    """In the step that shows the first NaN cheap sums tell that there is one, and not how many; then it is exact."""
    monitor = run(make_trainer, Beside(first=2), data=loader(), max_steps=steps)
    row = monitor.statistics["net.spoils"]
    assert row.nonfinite == pytest.approx(count, nan_ok=True)
    assert row.is_finite == (count == 0)
    assert monitor.statistics["net.norm"].nonfinite == pytest.approx(0 if steps == 2 else math.nan, nan_ok=True)


def test_counts_of_micro_batches_add_and_the_table_shows_them(make_trainer):
    """Four values of each of two micro-batches are eight of the step, in the last column of the table."""
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None)
    trainer = make_trainer(monitor, num_sanity_val_steps=0, accumulate_grad_batches=2)
    trainer.fit(Healthy(Beside()), loader())
    assert monitor.statistics["net.spoils"].nonfinite == 8
    table = EventAccumulator(trainer.log_dir).Reload().Tensors("bn_activations/text_summary")[0]
    lines = table.tensor_proto.string_val[0].decode().split("\n")
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines}
    assert cells["layer"] == "non-finite"
    assert (cells["`net.spoils`"], cells["`net.head`"], cells["`net.norm`"]) == ("8", "0", "not counted")


def test_a_batchnorm_layer_whose_gamma_is_nan_is_not_finite(make_trainer):
    """Its mean is β and finite; its spread tells that the output is not."""
    net = network()
    nn.init.constant_(net[1].weight, float("nan"))
    row = run(make_trainer, net, data=loader(), max_steps=1).statistics["net.1"]
    assert math.isfinite(row.mean)
    assert not row.is_finite


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


@pytest.mark.parametrize("value", [0, -0.1, 1.5, True, "2"])
def test_a_wrong_overhead_is_refused_with_name_need_and_got(value):
    """The same for the share of the training time."""
    with pytest.raises(ValueError, match=rf"max_overhead must be a number above 0 and at most 1.*got {value!r}"):
        ActivationMonitor(max_overhead=value)


@pytest.mark.parametrize("value", [[], 3, [1]])
def test_wrong_layers_are_refused_with_name_need_and_got(value):
    """The same for the layer patterns."""
    with pytest.raises(ValueError, match="layers must be a string or a list of at least one string"):
        ActivationMonitor(value)


class Steep(nn.Module):
    """Convolution, linear layers, ReLU, tanh and BatchNorm: something of everything."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.ReLU()
        self.line, self.tanh, self.head = nn.Linear(60, 8), nn.Tanh(), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.tanh(self.line(self.act(self.norm(self.conv(x.unsqueeze(1)))).flatten(1))))


def run(make_trainer, net, *, monitor=None, data=None, **options):
    monitor = monitor or ActivationMonitor(every_n_steps=1, max_overhead=None)
    make_trainer(monitor, num_sanity_val_steps=0, **options).fit(Healthy(net, lr=1e-3), data or loader(size=1024))
    return monitor


def test_batchnorm_is_asked_and_agrees_with_its_values(make_trainer):
    """Mean and spread of a BatchNorm layer's output are those of its values; range and zeros are not claimed."""
    model, monitor = Healthy(Steep()), ActivationMonitor(every_n_steps=1, max_overhead=None)
    kept = []
    model.net.norm.register_forward_hook(lambda module, args, out: kept.append(out.detach().clone()))
    make_trainer(monitor, num_sanity_val_steps=0).fit(model, loader())
    mean, std, *_ = float64_statistics(kept[-1:])
    row = monitor.statistics["net.norm"]
    assert row.count == kept[-1].numel()
    assert (row.mean, row.std) == pytest.approx((mean, std), rel=1e-5, abs=1e-6)
    assert not row.ranged
    assert row.is_finite


def test_later_steps_are_measured_cheaply_and_agree(make_trainer):
    """Numbers of the last of many steps agree with a float64 loop, whichever way they were measured."""
    model = Healthy(Steep())
    kept = {name: [] for name in ("conv", "act", "line", "tanh", "head")}
    for name, outputs in kept.items():
        model.net.get_submodule(name).register_forward_hook(
            lambda module, args, out, outputs=outputs: outputs.append(out.detach().clone())
        )
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None)
    make_trainer(monitor, num_sanity_val_steps=0).fit(model, loader())
    for name, outputs in kept.items():
        mean, std, largest, zeros = float64_statistics(outputs[-1:])
        row = monitor.statistics[f"net.{name}"]
        assert (row.mean, row.std, row.absmax) == pytest.approx((mean, std, largest), rel=1e-5, abs=1e-6)
        assert row.zero_share == pytest.approx(zeros)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="outputs"),
        pytest.param({"gradients": True, "effective_rank": True, "parameters": True}, id="all that can be asked for"),
    ],
)
def test_one_transfer_brings_a_due_step_to_the_host(make_trainer, monkeypatch, options):
    """From the start of a due step to its end our code reads one tensor on the host, of all layers together."""
    reads = []

    def counted(name, plain, x, *args):
        reads.append((name, x.numel()))
        return plain(x, *args)

    for name in ("numpy", "tolist", "item"):
        monkeypatch.setattr(torch.Tensor, name, partialmethod(partial(counted, name, getattr(torch.Tensor, name))))

    class Counting(ActivationMonitor):
        def on_train_batch_start(self, *args):
            reads.clear()
            with NoHostRead():
                super().on_train_batch_start(*args)

        def on_train_batch_end(self, *args):
            with NoHostRead():
                super().on_train_batch_end(*args)
            each.append(list(reads))

    each, monitor = [], Counting(every_n_steps=1, max_overhead=None, **options)
    run(make_trainer, Steep(), monitor=monitor, data=loader(), logger=False)
    assert not monitor.off
    assert [[name for name, _ in step] for step in each] == [["numpy"]] * 4
    assert min(count for step in each for _, count in step) > 40


def test_zeros_of_a_large_relu_are_counted_exactly(make_trainer):
    """An output of several hundred thousand values, which is summed in pieces, has the zero share that it has."""

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.grow, self.act, self.head = nn.Linear(FEATURES, 30_000), nn.ReLU(), nn.Linear(30_000, 4)

        def forward(self, x):
            return self.head(self.act(self.grow(x)))

    model, kept = Healthy(Large(), lr=1e-4), []
    model.net.act.register_forward_hook(lambda module, args, out: kept.append((out == 0).double().mean().item()))
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None)
    make_trainer(monitor, num_sanity_val_steps=0).fit(model, loader())
    assert monitor.statistics["net.act"].zero_share == kept[-1] > 0.4


def test_dead_units_are_found_and_the_healthy_twin_is_silent(make_trainer):
    """A ReLU behind a bias of -10 is said to be dead by name; with a bias of 0 nothing is said."""
    sick, healthy = network(norm=False), network(norm=False)
    nn.init.constant_(sick[2].bias, -100.0)
    found = run(make_trainer, sick).findings
    assert [(finding.rule, finding.layer, finding.severity) for finding in found] == [
        ("dead-units", "net.3", Severity.ERROR)
    ]
    assert found[0].data["samples"] >= 512
    assert run(make_trainer, healthy).findings == []


def test_a_window_of_few_samples_says_nothing_about_units(make_trainer):
    """Below 512 samples units that were never active are not called dead."""
    sick = network(norm=False)
    nn.init.constant_(sick[2].bias, -100.0)
    assert run(make_trainer, sick, data=loader(size=256)).findings == []


def test_a_resumed_run_continues_the_window(make_trainer, tmp_path):
    """256 samples before a checkpoint and 256 behind it are one window."""
    sick, path = network(norm=False), tmp_path / "half.ckpt"
    nn.init.constant_(sick[2].bias, -100.0)
    first, second = (ActivationMonitor(every_n_steps=1, max_overhead=None) for _ in range(2))
    trainer = make_trainer(first, num_sanity_val_steps=0)
    trainer.fit(Healthy(sick, lr=1e-3), loader(size=256))
    trainer.save_checkpoint(path)
    assert first.findings == []
    make_trainer(second, num_sanity_val_steps=0, max_epochs=2).fit(
        Healthy(network(norm=False), lr=1e-3), loader(size=256), ckpt_path=path
    )
    assert [(finding.rule, finding.data["samples"]) for finding in second.findings] == [("dead-units", 512)]


@pytest.mark.parametrize("left_out", [[], ["pictures"], ["windows", "pictures"]], ids=["all", "older", "oldest"])
def test_a_checkpoint_has_plain_values_and_an_older_one_is_no_error(make_trainer, tmp_path, left_out):
    """With all that can be asked for it loads with ``weights_only``; what a checkpoint does not hold begins anew."""
    options = {"every_n_steps": 1, "max_overhead": None, "gradients": True, "effective_rank": True}
    first, second, path = ActivationMonitor(**options), ActivationMonitor(**options), tmp_path / "half.ckpt"
    trainer = make_trainer(first, num_sanity_val_steps=0)
    trainer.fit(Healthy(), loader())
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    for name in left_out:
        del saved["callbacks"][first.state_key][name]
    torch.save(saved, path)
    make_trainer(second, num_sanity_val_steps=0, max_epochs=2).fit(Healthy(), loader(), ckpt_path=path)
    assert not second.off
    assert second.gradients.keys() == first.gradients.keys()


def test_saturated_units_are_found_and_the_healthy_twin_is_silent(make_trainer):
    """Tanh layers behind N(0, 9) weights are said to be saturated, the last one not; with Xavier's nothing is said."""

    def tanh(std):
        layers = [nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)]
        for layer in layers[::2]:
            nn.init.normal_(layer.weight, std=std)
        return nn.Sequential(*layers)

    found = {(finding.rule, finding.layer) for finding in run(make_trainer, tanh(3.0)).findings}
    assert {("saturated-units", "net.1"), ("saturated-units", "net.3")} <= found
    assert run(make_trainer, tanh(0.2)).findings == []


def test_shares_of_units_are_logged_when_a_window_is_over(make_trainer):
    """Dead and saturated shares of the last window stand in the overview, and layer by layer in ``units``."""
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None)
    trainer = make_trainer(monitor, num_sanity_val_steps=0, log_every_n_steps=8)
    trainer.fit(Healthy(Steep()), loader(size=1024))
    assert set(monitor.units) == {"net.act", "net.tanh"}
    assert monitor.units["net.act"].samples == 512
    steps = [step for step, _ in scalars(trainer, "bn_overview/dead_share_max")]
    assert steps[0] == 63
    assert scalars(trainer, "bn_overview/saturated_share_max")[-1][1] == pytest.approx(
        1 - monitor.units["net.tanh"].passing
    )


def test_a_vanishing_signal_is_found_in_the_first_step(make_trainer):
    """Twenty layers of N(0, 0.01²) are said to lose the signal; He's weights are not."""

    def deep(prepare):
        net = network(norm=False, depth=20)
        for layer in net:
            if isinstance(layer, nn.Linear):
                prepare(layer.weight)
                nn.init.zeros_(layer.bias)
        return net

    short = loader(size=32)
    sick = run(make_trainer, deep(lambda weight: nn.init.normal_(weight, std=0.01)), data=short)
    assert "vanishing-signal" in {finding.rule for finding in sick.findings}
    assert sick.findings[0].step == 0
    assert run(make_trainer, deep(nn.init.kaiming_normal_), data=short).findings == []


def test_a_signal_that_explodes_is_found_and_one_that_learning_made_large_is_not(make_trainer):
    """Layers that multiply by eight from the start are said; the same layers grown in the first epochs are not."""

    class Grows(Healthy):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                for layer in self.net[::2]:
                    layer.weight.mul_(8.0 if self.global_step == 1 else 1.0)

    def deep(std):
        layers = [part for _ in range(8) for part in (nn.Linear(FEATURES, FEATURES), nn.ReLU())]
        for layer in layers[::2]:
            nn.init.normal_(layer.weight, std=std)
        return nn.Sequential(*layers, nn.Linear(FEATURES, 4))

    said = []
    for model in (Healthy(deep(8 * (2 / FEATURES) ** 0.5), lr=0.0), Grows(deep((2 / FEATURES) ** 0.5), lr=0.0)):
        monitor = ActivationMonitor(every_n_steps=1, max_overhead=None)
        make_trainer(monitor, num_sanity_val_steps=0).fit(model, loader(size=64))
        said.append("exploding-signal" in {finding.rule for finding in monitor.findings})
        assert monitor.statistics["net.14"].std > 1000
    assert said == [True, False]


@pytest.mark.parametrize(("rate", "rules"), [(0.5, ["dropout-before-batchnorm"]), (0.3, [])])
def test_dropout_in_front_of_batchnorm_is_found_by_its_rate(make_trainer, rate, rules):
    """Half of the values dropped two modules in front of a BatchNorm layer are said, three tenths are not."""
    net = nn.Sequential(
        nn.Linear(FEATURES, 8),
        nn.ReLU(),
        nn.Dropout(rate),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )
    found = run(make_trainer, net, data=loader()).findings
    assert [finding.rule for finding in found] == rules
    assert all(finding.layer == "net.4" and "net.2" in finding.evidence for finding in found)


def test_a_costly_interval_is_widened_and_said(make_trainer):
    """Measuring every step of a tiny network is more than a thousandth of its time: an info says what is done."""
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=0.001)
    run(make_trainer, Steep(), monitor=monitor, data=loader(size=256))
    (finding,) = [finding for finding in monitor.findings if finding.rule == "interval-widened"]
    assert finding.severity is Severity.INFO
    assert finding.data["before"] == 1
    assert finding.data["now"] > 10


@pytest.mark.parametrize(("place", "name"), [(Ear, "hear"), (Slopes, "feel")], ids=["forward", "backward"])
def test_what_is_measured_inside_of_the_models_own_passes_counts_as_overhead(make_trainer, monkeypatch, place, name):
    """By a clock that runs for a layer's measurement and the step alone: 1 s of each against 40 s is too much."""
    clock, measure = [0.0], getattr(place, name)

    class Slow(Healthy):
        def training_step(self, batch, batch_idx):
            clock[0] += 40
            return super().training_step(batch, batch_idx)

    def slowly(*args):
        clock[0] += 1
        measure(*args)

    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(place, name, slowly)
    monitor = ActivationMonitor("net.0", every_n_steps=1, gradients=True)
    make_trainer(monitor, num_sanity_val_steps=0).fit(Slow(), loader(size=128))
    (finding,) = monitor.findings
    assert (finding.rule, finding.data["now"]) == ("interval-widened", 2)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        pytest.param("norm", ["net.norm"], id="norm"),
        pytest.param("activation", ["net.act", "net.tanh"], id="activation"),
        pytest.param("Conv1d", ["net.conv"], id="type"),
        pytest.param(["_ConvNd", "Linear"], ["net.conv", "net.line", "net.head"], id="types and base classes"),
        pytest.param("all", ["", "net", "net.conv", "net.norm", "net.act"], id="all"),
        pytest.param("leaf", ["net.conv", "net.norm", "net.act", "net.line", "net.tanh", "net.head"], id="leaf"),
    ],
)
def test_words_choose_kinds_of_layers(make_trainer, layers, names):
    """``norm``, ``activation``, ``leaf``, ``all`` and names of classes stand for the modules of that kind."""
    monitor = run(make_trainer, Steep(), monitor=ActivationMonitor(layers), data=loader())
    if layers == "all":
        assert monitor.statistics.keys() >= set(names[1:])
    else:
        assert list(monitor.statistics) == names
    assert [finding for finding in monitor.findings if finding.rule == "unmatched-layers"] == []


class Kept(Healthy):
    """Keeps norms of weights, gradients and updates of each step, by itself."""

    def __init__(self, net, **options):
        super().__init__(net, **options)
        self.kept = []

    def on_before_optimizer_step(self, optimizer):
        self.before = {name: p.detach().double().clone() for name, p in self.named_parameters()}
        self.slopes = {name: p.grad.detach().double().norm().item() for name, p in self.named_parameters()}

    def on_train_batch_end(self, *_):
        self.kept.append(
            {
                name: (
                    self.before[name].norm().item(),
                    self.slopes[name],
                    (p.double() - self.before[name]).norm().item(),
                )
                for name, p in self.named_parameters()
            }
        )


def test_weights_gradients_and_updates_are_those_of_the_step(make_trainer):
    """With ``parameters`` the norms of the last due step equal those of a float64 computation in the model itself."""
    model = Kept(Steep())
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None, parameters=True)
    make_trainer(monitor, num_sanity_val_steps=0).fit(model, loader())
    assert monitor.weights.keys() == model.kept[-1].keys()
    for name, expected in model.kept[-1].items():
        row = monitor.weights[name]
        assert (row.weight, row.gradient, row.update) == pytest.approx(expected, rel=1e-4), name
        assert (row.lr, row.largest_lr) == (0.01, 0.01)


def test_a_part_that_is_cut_off_the_loss_is_found_and_the_healthy_twin_is_silent(make_trainer):
    """Layers behind a detach have no gradient in any due step: a finding names them."""

    class Cut(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x).detach()))

    layers = [nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, 4)]
    found = {}
    for kind in (Cut, nn.Sequential):
        monitor = ActivationMonitor(every_n_steps=1, max_overhead=None, parameters=True)
        make_trainer(monitor, num_sanity_val_steps=0).fit(Healthy(kind(*layers)), loader(size=64))
        found[kind] = monitor.findings
    assert "no-gradient" in {finding.rule for finding in found[Cut]}
    assert "net.0.weight" in next(finding.evidence for finding in found[Cut] if finding.rule == "no-gradient")
    assert found[nn.Sequential] == []
