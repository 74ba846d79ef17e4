# SPDX-License-Identifier: Apache-2.0
"""What WeightInit says: parameter by parameter, and what the first training batch showed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from specimens import Healthy, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_bn import NaNGuard, Severity, WeightInit, initialize, read_findings


def written(tmp_path):
    """TensorBoard's text and picture tags with their contents."""
    events = EventAccumulator(str(tmp_path / "run" / "version_0"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    texts = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"] if "text" in tag
    }
    return texts, tags["images"]


def kept(tmp_path):
    return json.loads((tmp_path / "run" / "version_0" / "lightning_bn" / "init.json").read_text())


def test_tensorboard_gets_the_table_the_signal_and_its_picture(make_trainer, tmp_path):
    """One row for each parameter, one for each layer that ran, and a figure."""
    make_trainer(WeightInit("he", seed=1)).fit(Healthy(), loader())
    texts, images = written(tmp_path)
    table = texts["bn_init/text_summary"]
    assert all(f"| net.{name} |" in table for name in ("0.weight", "0.bias", "1.weight", "6.bias"))
    assert "relu (gain 1.41)" in table
    signal = texts["bn_init_signal/text_summary"]
    assert [f"| {place} | `net.{place - 1}` |" in signal for place in range(1, 8)] == [True] * 7
    assert "times that of equal probabilities (1.386)" in signal
    assert images == ["bn_init/signal_propagation"]


def test_a_json_file_beside_the_findings_holds_both(make_trainer, tmp_path):
    """What is in the tables can be read by a program."""
    init = WeightInit("xavier", seed=1)
    make_trainer(init).fit(Healthy(), loader())
    content = kept(tmp_path)
    assert (content["scheme"], content["seed"]) == ("xavier", 1)
    assert [row["name"] for row in content["parameters"]] == [row.name for row in init.report.rows]
    assert [row["layer"] for row in content["first_batch"]["signal"]] == [*(f"net.{i}" for i in range(7)), "loss"][:7]
    assert content["first_batch"]["loss_of_equal_probabilities"] == pytest.approx(math.log(4))


def test_a_trial_run_leaves_no_file(make_trainer, tmp_path):
    """With ``fast_dev_run`` Lightning writes nothing, and neither does a healthy start."""
    init = WeightInit()
    make_trainer(init, fast_dev_run=True).fit(Healthy(), loader())
    assert init.report is not None
    assert not init.off
    assert list(tmp_path.rglob("init.json")) == []


def test_the_signal_is_what_an_ordinary_forward_pass_shows(make_trainer, tmp_path):
    """Standard deviations are those of the layers' outputs on the first batch, computed apart in float64."""
    model = Healthy()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    make_trainer(WeightInit(seed=1)).fit(model, loader())
    x, _ = next(iter(loader()))
    x, net = x.double(), model.net.double().train()
    rows = {row["layer"]: row for row in kept(tmp_path)["first_batch"]["signal"]}
    for place, layer in enumerate(net):
        x = layer(x)
        assert rows[f"net.{place}"]["std"] == pytest.approx(x.std(correction=0).item(), rel=1e-4)
        assert rows[f"net.{place}"]["absmax"] == pytest.approx(x.abs().max().item(), rel=1e-4)


def test_the_table_is_printed_on_request(make_trainer, capsys):
    """With ``show`` the console has every parameter; without it none."""
    for show in (False, True):
        make_trainer(WeightInit(show=show)).fit(Healthy(), loader())
        assert ("net.0.weight" in capsys.readouterr().err) is show


def test_a_healthy_start_has_nothing_to_say(make_trainer):
    """He on a network with BatchNorm: no finding at all."""
    init = WeightInit()
    make_trainer(init).fit(Healthy(), loader())
    assert init.findings == []


def test_what_could_not_be_filled_is_said(make_trainer):
    """Frozen parameters keep their values and are named in a note."""
    model, init = Healthy(), WeightInit()
    model.net[0].requires_grad_(False)
    make_trainer(init).fit(model, loader())
    assert "net.0.weight (frozen (requires_grad=False))" in init.findings[0].evidence
    assert init.findings[0].severity is Severity.INFO


@pytest.mark.parametrize(
    ("options", "argument", "nearest"),
    [
        pytest.param({"exclude": "nett.*"}, "exclude", "net", id="a misspelt exclusion"),
        pytest.param({"include": ["net", "Batchnorm1d"]}, "include", "BatchNorm1d", id="a misspelt type"),
    ],
)
def test_a_pattern_that_matches_nothing_warns_with_the_nearest_names(make_trainer, options, argument, nearest):
    """The finding names the argument; the rest is initialised."""
    init = WeightInit(**options)
    make_trainer(init).fit(Healthy(), loader())
    (finding,) = (finding for finding in init.findings if finding.rule == "unmatched-layers")
    assert finding.evidence.startswith(f"{argument} needs patterns that match a module, a parameter or a module class")
    assert nearest in finding.advice


def trained():
    """A network as it is after some training, by hand."""
    model = Healthy(network(width=32))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for x, y in list(loader(size=256, batch_size=32)) * 10:
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()
    return model


def test_weights_that_look_loaded_are_warned_about_before_they_are_overwritten(make_trainer):
    """A trained model warns, with what gave it away and how to keep it; a fresh one is silent."""
    for model, rules in ((trained(), ["overwritten-weights"]), (Healthy(network(width=32)), [])):
        init = WeightInit()
        make_trainer(init).fit(model, loader())
        assert [finding.rule for finding in init.findings] == rules
    init = WeightInit()
    make_trainer(init).fit(trained(), loader())
    assert "exclude" in init.findings[0].advice
    assert init.findings[0].severity is Severity.WARNING


def test_excluded_weights_keep_their_values_without_a_warning(make_trainer):
    """What is excluded is neither touched nor spoken of."""
    model, init = trained(), WeightInit(exclude="net")
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    make_trainer(init).fit(model, loader())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert "overwritten-weights" not in {finding.rule for finding in init.findings}


def plain(depth):
    """A deep network without normalisation."""
    return Healthy(network(norm=False, depth=depth, width=128))


def test_an_overflow_to_come_is_foretold(make_trainer, tmp_path):
    """N(0, 1000²) at depth 20: the finding names the layer at which the first forward pass then is not finite."""
    model, init, guard = plain(20), WeightInit(1000), NaNGuard("warn")
    make_trainer(init, guard).fit(model, loader())
    (finding,) = (finding for finding in init.findings if finding.rule == "overflow-by-initialisation")
    assert finding.severity is Severity.WARNING
    assert finding.layer == guard.findings[0].layer
    signal = kept(tmp_path)["first_batch"]["signal"]
    assert next(row["layer"] for row in signal if row["std"] is None) == finding.layer


@pytest.mark.parametrize("scheme", ["he", "xavier", "naive", "uniform", "orthogonal", "pytorch"])
def test_no_usual_start_is_said_to_overflow(make_trainer, scheme):
    """The same network from every usual scheme, with and without BatchNorm, has no such finding."""
    for norm in (False, True):
        init = WeightInit(scheme)
        make_trainer(init).fit(Healthy(network(norm=norm, depth=20, width=128)), loader())
        assert [finding.rule for finding in init.findings if finding.severity is not Severity.INFO] == []


def test_a_large_initial_loss_is_said(make_trainer, tmp_path):
    """N(0, 1000²) behind BatchNorm is finite, and its loss is thousands of times that of equal probabilities."""
    init = WeightInit(1000)
    make_trainer(init).fit(Healthy(network(width=128)), loader())
    (finding,) = (finding for finding in init.findings if finding.rule == "large-initial-loss")
    assert finding.severity is Severity.WARNING
    assert finding in read_findings(tmp_path / "run" / "version_0")


class Manual(Healthy):
    """Manual optimisation."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(self(batch[0]), batch[1]))


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(Healthy, {}, id="plain"),
        pytest.param(Healthy, {"accumulate_grad_batches": 2}, id="accumulation"),
        pytest.param(Healthy, {"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param(Manual, {}, id="manual optimisation"),
    ],
)
def test_the_initial_loss_is_that_of_the_first_batch(make_trainer, tmp_path, build, options):
    """However Lightning scales it, it is the mean cross-entropy of an ordinary forward pass in float64."""
    model, twin = build(), build()
    make_trainer(WeightInit(seed=1), **options).fit(model, loader())
    initialize(twin, seed=1)
    x, y = next(iter(loader()))
    exact = nn.functional.cross_entropy(twin.net.double().train()(x.double()), y).item()
    assert kept(tmp_path)["first_batch"]["initial_loss"] == pytest.approx(
        exact, rel=0.02 if options.get("precision") else 1e-5
    )


def test_pytorch_leaves_the_model_as_it_is_and_reports(make_trainer, tmp_path):
    """Nothing is touched, and the tables are there all the same."""
    model, init = Healthy(), WeightInit("pytorch")
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    make_trainer(init).fit(model, loader())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert {row["scheme"] for row in kept(tmp_path)["parameters"]} == {"kept"}
    assert len(kept(tmp_path)["first_batch"]["signal"]) == 7


class Residual(nn.Module):
    """A block that its BatchNorm closes."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))

    def forward(self, x):
        return torch.relu(x + self.branch(x))


def residual():
    return Healthy(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), Residual(), nn.Linear(16, 4)))


@pytest.mark.parametrize(("zero", "gamma"), [(True, 0.0), (False, 1.0), (None, 1.0)])
def test_gamma_starts_at_zero_on_residual_closers_on_request(make_trainer, zero, gamma):
    """Only the BatchNorm that closes the branch has it."""
    model = residual()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    make_trainer(WeightInit(zero_init_residual=zero)).fit(model, loader())
    assert set(model.net[3].branch[1].weight.tolist()) == {gamma}
    assert set(model.net[1].weight.tolist()) == {1.0}


def test_a_gamma_that_the_model_set_to_zero_stays_and_is_said(make_trainer):
    """On the closer it is kept with a note; anywhere else it becomes 1."""
    model, init = residual(), WeightInit()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    for norm in (model.net[1], model.net[3].branch[1]):
        nn.init.zeros_(norm.weight)
    make_trainer(init).fit(model, loader())
    assert not model.net[3].branch[1].weight.any()
    assert set(model.net[1].weight.tolist()) == {1.0}
    assert "γ = 0 stays in 1 BatchNorm layers" in init.findings[0].evidence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": []}, "include must be a string or a list of at least one string, or None, got"),
        ({"exclude": 3}, "exclude must be a string or a list of at least one string, or None, got 3"),
        ({"nonlinearity": "swoosh"}, "nonlinearity must be one of linear, .*, got 'swoosh'"),
        ({"zero_init_residual": "yes"}, "zero_init_residual must be true, false or None, got 'yes'"),
        ({"forget_bias": "1"}, "forget_bias must be a finite number, or None, got '1'"),
        ({"show": 1}, "show must be true or false, got 1"),
    ],
)
def test_bad_arguments_are_refused_with_name_need_and_got(options, words):
    """In the constructor, before anything runs."""
    with pytest.raises(ValueError, match=words):
        WeightInit(**options)
