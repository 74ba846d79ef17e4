# SPDX-License-Identifier: Apache-2.0
"""Population statistics are those of an independent float64 computation, and estimating them leaves no trace."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from harm import assert_identical
from identical import everything
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import precise_statistics
from lightning_bn.precise import FROZEN, NOT_CALLED, NOT_FINITE, NOT_REAL, SWITCHED_OFF
from lightning_bn.stats.population import Population, distance, pool, population_of

X = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)).add_(0.7)
SPLITS = [X[:5], X[5:6], X[6:17], X[17:]]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 2e-5, "atol": 2e-6}


def convnet():
    """Two convolutions with BatchNorm, dropout in front of the second, a head with BatchNorm1d."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)),
    )


def by_loop(model, batches, run=None):
    """Mean and unbiased variance of what each BatchNorm layer gets, in float64, by the formula of the paper."""
    twin = copy.deepcopy(model).double().eval()
    layers = {name: part for name, part in twin.named_modules() if isinstance(part, _BatchNorm)}
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.train()
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach().transpose(0, 1)))
    with torch.no_grad():
        for x in batches:
            (run or (lambda model, x: model(x)))(twin, x.double())
    found = {}
    for name, inputs in seen.items():
        rows = [(x[0].numel(), x.flatten(1).mean(1), x.flatten(1).var(1, correction=0)) for x in inputs]
        total = sum(n for n, *_ in rows)
        mean = sum(n * mean for n, mean, _ in rows) / total
        square = sum(n * (mean.square() + var) for n, mean, var in rows) / total
        found[name] = (mean, (square - mean.square()) * total / (total - 1))
    return found


def assert_agree(found, expected, **tolerances):
    """An estimate has the numbers of the loop."""
    assert list(found.layers) == list(expected)
    for name, (mean, var) in expected.items():
        torch.testing.assert_close(found.layers[name].mean, mean, **tolerances)
        torch.testing.assert_close(found.layers[name].unbiased_var, var, **tolerances)


class Twice(nn.Module):
    """One BatchNorm layer in two places, one that is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.alias, self.spare = self.norm, nn.BatchNorm1d(4)

    def forward(self, x):
        return self.alias(self.second(self.norm(self.first(x)).relu()))


class KeepsFrozen(nn.Sequential):
    """Keeps its first layer in eval mode, as backbones of detectors do."""

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


class Complex(_BatchNorm):
    """BatchNorm of magnitudes, with complex input."""

    def _check_input_dim(self, _):
        pass

    def forward(self, x):
        return super().forward(x.abs())


@pytest.mark.parametrize("sizes", [(24,), (12, 12), (5, 1, 11, 7)], ids=str)
def test_any_split_has_the_statistics_of_one_full_batch(sizes):
    """In float64, batches of whatever sizes give what F.batch_norm writes for all of them at once."""
    layer, x = nn.BatchNorm2d(3, momentum=1.0).double(), X.double()
    found = precise_statistics(layer, x.split(sizes))
    layer(x)
    torch.testing.assert_close(found.layers[""].mean, layer.running_mean, **TIGHT)
    torch.testing.assert_close(found.layers[""].unbiased_var, layer.running_var, **TIGHT)
    torch.testing.assert_close(found.layers[""].var, x.var((0, 2, 3), correction=0), **TIGHT)
    assert found.layers[""].count == 24 * 36
    assert found.samples == 24


@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    [pytest.param(torch.float64, TIGHT, id="float64"), pytest.param(torch.float32, SINGLE, id="float32")],
)
def test_unequal_batches_through_a_deep_network_agree_with_a_float64_loop(dtype, tolerances):
    """Each layer normalises by its batch, and batches count by their number of values."""
    model, batches = convnet(), [X[:5], X[5:13], X[13:]]
    found = precise_statistics(model.to(dtype), [x.to(dtype) for x in batches])
    assert_agree(found, by_loop(model, batches), **tolerances)


def test_equal_weights_for_unequal_batches_would_not_agree():
    """The test above is not blind: without the weights the numbers are others."""
    model = nn.BatchNorm2d(3).double()
    means = torch.stack([x.double().mean((0, 2, 3)) for x in SPLITS]).mean(0)
    assert not torch.allclose(precise_statistics(model, SPLITS_64).layers[""].mean, means, rtol=1e-3)


SPLITS_64 = [x.double() for x in SPLITS]


def test_a_large_offset_does_not_cancel_the_variance():
    """Deviations are pooled, not squares: at a mean of 10⁸ the textbook formula has lost the variance."""
    x = torch.randn(4, 64, 1, dtype=torch.float64) + 1e8
    found = precise_statistics(nn.BatchNorm1d(1).double(), list(x)).layers[""]
    torch.testing.assert_close(found.var, x.flatten().var(correction=0).reshape(1), rtol=1e-6, atol=0.0)
    naive = x.square().mean() - x.mean().square()
    assert abs(float(naive / found.var) - 1) > 0.1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param(nn.BatchNorm1d(4), (8, 4), id="vectors"),
        pytest.param(nn.BatchNorm1d(4), (8, 4, 5), id="sequences"),
        pytest.param(nn.BatchNorm2d(4), (8, 4, 5, 3), id="images"),
        pytest.param(nn.BatchNorm3d(4), (8, 4, 2, 3, 2), id="volumes"),
        pytest.param(nn.SyncBatchNorm(4), (8, 4, 5), id="synchronised, in one process"),
        pytest.param(nn.BatchNorm1d(4, momentum=None), (8, 4), id="cumulative average"),
        pytest.param(nn.BatchNorm1d(4, momentum=0.0), (8, 4), id="momentum 0"),
        pytest.param(nn.BatchNorm1d(4, affine=False), (8, 4), id="without parameters"),
        pytest.param(nn.BatchNorm1d(4, track_running_stats=False), (8, 4), id="without running statistics"),
    ],
)
def test_every_kind_of_layer_and_of_input_is_measured(layer, shape):
    """All axes but the channels' are reduced; what has running statistics gets them."""
    batches = [torch.randn(shape) * 3 + 1, torch.randn(shape)]
    found = precise_statistics(layer, batches)
    expected = by_loop(layer, batches)
    assert_agree(found, expected, **SINGLE)
    assert found.apply(layer) == (() if layer.running_mean is None else ("",))
    if layer.running_mean is not None:
        torch.testing.assert_close(layer.running_var.double(), expected[""][1], **SINGLE)


def test_channels_last_and_half_precision_inputs_are_measured():
    """The memory format does not matter, and bfloat16 values are summed in float32."""
    layer = nn.BatchNorm2d(3)
    found = precise_statistics(layer, [X.to(memory_format=torch.channels_last)])
    assert_agree(found, by_loop(layer, [X]), **SINGLE)
    rounded = X.bfloat16()
    assert_agree(precise_statistics(layer.bfloat16(), [rounded]), by_loop(layer, [rounded]), **SINGLE)


def test_a_layer_in_two_places_has_one_estimate_of_all_its_calls():
    """Both calls of each batch are pooled, under the first name; the layer that no batch reaches is named."""
    model, batches = Twice(), [torch.randn(5, 3), torch.randn(9, 3)]
    found = precise_statistics(model, batches)
    calls = []
    model.norm.register_forward_pre_hook(lambda _, args: calls.append(args[0].detach().double()))
    for x in batches:
        model(x)
    assert list(found.layers) == ["norm"]
    assert found.layers["norm"].count == 28
    torch.testing.assert_close(found.layers["norm"].mean, torch.cat(calls).mean(0), **SINGLE)
    torch.testing.assert_close(found.layers["norm"].unbiased_var, torch.cat(calls).var(0), **SINGLE)
    assert found.skipped == {"spare": NOT_CALLED}


def test_calls_in_eval_mode_are_no_training():
    """A forward that also asks the layer in eval mode, as for pseudo-labels, is measured in training mode alone."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    batches = [torch.randn(8, 3) + 2, torch.randn(8, 3)]

    def forward(x):
        model[0].eval()
        model(100 * x)
        model[0].train()
        model(x)

    assert_agree(precise_statistics(model, batches, forward=forward), by_loop(model, batches), **SINGLE)


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_off_unless_it_is_asked_for(dropout):
    """Behind dropout of one half, a linear layer's variance about doubles; without, it is that of eval mode."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1, bias=False), nn.BatchNorm1d(1))
    nn.init.ones_(model[1].weight)
    x = torch.randn(4000, 50)
    var = float(precise_statistics(model, [x], dropout=dropout).layers["2"].var)
    assert var == pytest.approx(100.0 if dropout else 50.0, rel=0.15)
    assert precise_statistics(model.eval(), [x], dropout=dropout).layers["2"].var.item() == pytest.approx(var, rel=0.1)


@pytest.mark.parametrize(
    ("freeze", "reason"),
    [
        pytest.param(lambda layer: layer.eval(), FROZEN, id="eval mode"),
        pytest.param(lambda layer: setattr(layer, "track_running_stats", False), SWITCHED_OFF, id="switched off"),
    ],
)
def test_a_frozen_layer_is_left_alone_unless_it_is_asked_for(freeze, reason):
    """A layer in eval mode in a model that trains keeps its statistics, and one that does not track them."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    freeze(model[0])
    found = precise_statistics(model, SPLITS)
    assert list(found.layers) == ["1"]
    assert found.skipped == {"0": reason}
    asked = precise_statistics(model, SPLITS, frozen=True)
    assert list(asked.layers) == ["0", "1"]
    torch.testing.assert_close(asked.layers["0"].mean.float(), X.mean((0, 2, 3)), **SINGLE)


def test_a_model_in_eval_mode_is_asked_which_layers_it_keeps_frozen():
    """All of a model in eval mode are measured, but those that its own ``train`` leaves there."""
    assert list(precise_statistics(nn.Sequential(nn.BatchNorm2d(3)).eval(), SPLITS).layers) == ["0"]
    found = precise_statistics(KeepsFrozen(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval(), SPLITS)
    assert (list(found.layers), found.skipped) == (["1"], {"0": FROZEN})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_that_got_a_bad_batch_keeps_its_statistics_and_is_named(value):
    """NaN in the second of three batches spoils what is behind it and nothing else."""
    model = nn.ModuleDict({"sick": nn.BatchNorm1d(3), "healthy": nn.BatchNorm1d(3)})
    bad = torch.randn(8, 3)
    bad[2, 1] = value
    batches = [torch.randn(8, 3), bad, torch.randn(8, 3)]

    def forward(x):
        model["healthy"](x.nan_to_num(posinf=0.0))
        model["sick"](x)

    found = precise_statistics(model, batches, forward=forward)
    assert (list(found.layers), found.skipped) == (["healthy"], {"sick": NOT_FINITE})
    before = model["sick"].running_var.clone()
    assert found.apply(model) == ("healthy",)
    assert torch.equal(model["sick"].running_var, before)


def test_complex_input_is_named_and_not_measured():
    """There is no mean and variance of real numbers; the layer is left alone."""
    model = nn.Sequential(Complex(3))
    found = precise_statistics(model, [torch.randn(8, 3, dtype=torch.complex64)])
    assert (found.layers, found.skipped) == ({}, {"0": NOT_REAL})


def broken(_):
    raise RuntimeError("in the forward")


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("forward", [None, broken], ids=["to the end", "broken off"])
def test_estimating_leaves_no_trace(mode, forward):
    """Modes, buffers, counters, momentum and random streams are as before, also after an exception."""
    model = convnet().train(mode)
    model[1].momentum = None
    model[5].eval()
    loader = DataLoader(TensorDataset(X), 8, shuffle=True)
    before = everything(model), [part.momentum for part in model if isinstance(part, _BatchNorm)]
    if forward is None:
        precise_statistics(model, loader, dropout=True)
    else:
        with pytest.raises(RuntimeError, match="in the forward"):
            precise_statistics(model, loader, forward=forward)
    assert_identical(before, (everything(model), [part.momentum for part in model if isinstance(part, _BatchNorm)]))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_no_more_batches_are_drawn_than_are_run():
    """It stops at the batch that makes the samples complete, and the iterator goes on behind it."""
    batches = iter([X[:8], X[8:16], X[16:20], X[20:]])
    assert precise_statistics(nn.BatchNorm2d(3), batches, num_samples=10).samples == 16
    assert [len(x) for x in batches] == [4, 4]
    assert precise_statistics(nn.BatchNorm2d(3), SPLITS, num_samples=None).samples == 24


def test_batches_of_other_kinds_go_through_a_forward_of_the_users():
    """The first entry of a tuple is the input; a mapping needs a forward."""
    layer = nn.BatchNorm2d(3)
    assert_agree(precise_statistics(layer, [(X, 1)]), by_loop(layer, [X]), **SINGLE)
    found = precise_statistics(layer, [{"image": X}], forward=lambda batch: layer(batch["image"]))
    assert_agree(found, by_loop(layer, [X]), **SINGLE)
    with pytest.raises(ValueError, match=r"forward must be given .* got dict"):
        precise_statistics(layer, [{"image": X}])


def test_applied_statistics_are_what_evaluation_normalises_by():
    """The buffers keep their identity and their counter, and eval mode gives (x − μ)/√(σ² + ε) with the unbiased σ²."""
    layer = nn.BatchNorm2d(3).double()
    layer(X.double())
    mean, counter = layer.running_mean, int(layer.num_batches_tracked)
    found = precise_statistics(layer, SPLITS_64)
    assert found.apply(layer) == ("",)
    assert layer.running_mean is mean
    assert int(layer.num_batches_tracked) == counter
    x = X.double()
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + layer.eps).sqrt()
    torch.testing.assert_close(layer.eval()(x), expected)


def test_statistics_that_were_applied_for_a_while_are_gone_afterwards():
    """After the block, on an exception too, the same buffers are back; training inside does not change the estimate."""
    layer = nn.BatchNorm2d(3).double()
    buffers = layer.running_mean, layer.running_var
    found = precise_statistics(layer, SPLITS_64)
    mean = found.layers[""].mean.clone()

    def use():
        assert torch.equal(layer.running_mean, mean)
        layer(X.double() + 5)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), found.applied(layer):
        use()
    assert layer.running_mean is buffers[0]
    assert layer.running_var is buffers[1]
    assert torch.equal(buffers[0], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(found.layers[""].mean, mean)


def test_a_dtype_that_cannot_hold_the_numbers_keeps_its_own():
    """A variance beyond float16's range is not written."""
    layer = nn.BatchNorm1d(1)
    found = precise_statistics(layer, [torch.tensor([[0.0], [1e4]])])
    assert found.apply(layer.half()) == ()
    assert float(layer.running_var) == 1.0


def test_an_estimate_of_another_model_is_refused_before_anything_is_written():
    """The error names the layer, what it needs and what it got."""
    found = precise_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)), SPLITS)
    other = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="'1' of 3 channels, got 4 channels"):
        found.apply(other)
    assert torch.equal(other[0].running_mean, torch.zeros(3))
    with pytest.raises(ValueError, match="'0' of 3 channels, got none"):
        found.apply(nn.Sequential(nn.ReLU()))


def test_the_distance_is_in_standard_deviations_and_logarithms():
    """Root mean squares over the channels, against a closed form; precise statistics are at distance 0."""
    truth = Population(3, torch.tensor([1.0, 2.0]).double(), torch.tensor([8.0, 2.0]).double())  # σ² = 4, 1
    found = distance(torch.tensor([2.0, 2.0]), torch.tensor([4.0, math.e]), truth, eps=0.0)
    assert found.mean == pytest.approx(0.5 / math.sqrt(2))
    assert found.log_var == pytest.approx(1 / math.sqrt(2))
    layer = nn.BatchNorm2d(3)
    estimate = precise_statistics(layer, SPLITS)
    assert estimate.distances(layer)[""].mean > 0.1
    estimate.apply(layer)
    assert vars(estimate.distances(layer)[""]) == pytest.approx({"mean": 0.0, "log_var": 0.0}, abs=1e-6)


def test_a_running_average_that_lags_is_far_and_one_that_follows_is_near():
    """After 30 batches a momentum of 0.001 has hardly left the start; one of 0.1 has arrived."""
    x = torch.randn(30, 64, 3) * 4 + 2
    far, near = nn.BatchNorm1d(3, momentum=0.001), nn.BatchNorm1d(3, momentum=0.1)
    found = {}
    for name, layer in (("far", far), ("near", near)):
        for batch in x:
            layer(batch)
        found[name] = precise_statistics(layer, list(x)).distances(layer)[""]
    assert found["far"].log_var > 1.5
    assert found["far"].mean > 0.3
    assert max(vars(found["near"]).values()) < 0.15


def test_pooling_is_exact_and_does_not_depend_on_the_order():
    """Two parts pool to the whole, also where one has a single value."""
    x = torch.randn(9, 2, dtype=torch.float64)
    one, other = population_of(x[:1]), population_of(x[1:])
    for found in (pool(one, other), pool(other, one)):
        assert found.count == 9
        torch.testing.assert_close(found.mean, x.mean(0), **TIGHT)
        torch.testing.assert_close(found.unbiased_var, x.var(0), **TIGHT)


def test_a_model_without_batchnorm_is_not_run():
    """There is nothing to estimate, and no batch is drawn."""
    batches = iter([X])
    assert precise_statistics(nn.Conv2d(3, 4, 3), batches).layers == {}
    assert next(batches) is X


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"num_samples": 0}, "num_samples must be a whole number of at least 1.* got 0", id="none"),
        pytest.param({"num_samples": True}, "num_samples must be .* got True", id="flag"),
        pytest.param({"batches": X}, "batches must be an iterable of batches.* got a tensor", id="tensor"),
        pytest.param({"model": nn.Sequential(nn.LazyBatchNorm2d())}, "must have no lazy modules", id="lazy"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    """The error names the argument, what it needs and what it got."""
    given = {"model": nn.BatchNorm2d(3), "batches": SPLITS, **arguments}
    with pytest.raises(ValueError, match=words):
        precise_statistics(given.pop("model"), given.pop("batches"), **given)


def test_the_python_on_the_page_runs(capsys):
    """Both examples, one after the other: distances, an estimate that is used, a layer that is replaced."""
    page = (Path(__file__).parent.parent / "docs" / "precise.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    exec(compile("".join(blocks), "docs/precise.md", "exec"), {})  # noqa: S102  (our own page)
    assert "Distance(mean=" in (shown := capsys.readouterr().out)
    assert "{'1': GroupNorm(1, 8" in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # the compiler's own modules use it
def test_a_compiled_part_is_measured_as_if_it_were_not():
    """Its layers are heard although it was compiled, and run, before."""
    model = convnet()
    expected = by_loop(model, [X])
    model = nn.Sequential(torch.compile(model[:3], backend="eager"), *model[3:])
    model(X)
    found = precise_statistics(model, [X])
    assert list(found.layers) == ["0.1", "3", "7"]
    torch.testing.assert_close(found.layers["0.1"].mean, expected["1"][0], **SINGLE)
    torch.testing.assert_close(found.layers["7"].unbiased_var, expected["9"][1], **SINGLE)
