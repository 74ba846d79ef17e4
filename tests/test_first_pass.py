# SPDX-License-Identifier: Apache-2.0
"""A recorded pass says what the batch, the weights, each module call and the loss held."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from specimens import NoHostRead
from torch import nn

from lightning_bn.first_pass import Recorder
from lightning_bn.rules.non_finite_output import culprit_of
from lightning_bn.stats.finite import NOTHING, Census

NAN, INF = math.nan, math.inf


class Doubling(nn.Module):
    """Gives back ``2 x`` and counts, under names, beside something that is no tensor."""

    def forward(self, x, *, label=None):
        return {"twice": 2 * x, "label": label, "number": torch.arange(3)}


def filled_linear(value, width=2):
    """A layer that multiplies by ``value`` and adds nothing, channel by channel."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width) * value)
        layer.bias.zero_()
    return layer


def record(model, *args, loss=None, **kwargs):
    recorder = Recorder(model, args)
    with recorder.listen():
        model(*args, **kwargs)
    return recorder.finish(loss)


def test_calls_come_in_the_order_in_which_they_return():
    """Inner modules come before the module that calls them, the model itself last."""
    net = nn.Sequential(nn.Sequential(nn.Identity()), nn.ReLU())
    seen = record(net, torch.ones(1))
    assert [(call.layer, call.kind) for call in seen.calls] == [
        ("0.0", "Identity"),
        ("0", "Sequential"),
        ("1", "ReLU"),
        ("", "Sequential"),
    ]


def test_a_call_holds_what_went_in_and_came_out():
    """Census of inputs and outputs, dtype, shapes and the largest weight are those of the call."""
    seen = record(nn.Sequential(nn.Identity(), filled_linear(-4.0)), torch.tensor([[1.0, INF], [-3.0, 2.0]]))
    identity, call, _ = seen.calls
    assert call.inputs == Census(4, 0, 1, 0, 3.0)
    assert (call.outputs.count, call.outputs.largest) == (4, 12.0)
    assert (call.dtype, call.shapes, call.largest_weight) == (torch.float32, ((2, 2),), 4.0)
    assert identity.largest_weight is None


def test_a_module_that_is_called_twice_is_two_calls():
    """Each call of a shared module is recorded on its own."""
    shared = filled_linear(3.0)
    seen = record(nn.Sequential(shared, shared), torch.ones(1, 2))
    assert [(call.layer, call.outputs.largest) for call in seen.calls[:2]] == [("0", 3.0), ("0", 9.0)]


def test_keyword_arguments_and_containers_are_inputs_and_outputs():
    """Floating-point tensors are found in keyword arguments and dictionaries; all else is passed over."""
    x = torch.tensor([1.0, NAN])
    (call,) = record(Doubling(), x, label=torch.full((3,), 7.0)).calls
    assert call.inputs == Census(5, 1, 0, 0, 7.0)
    assert call.outputs == Census(5, 1, 0, 0, 7.0)
    assert call.shapes == ((2,), (3,))


def test_a_module_without_floating_point_output_is_no_call():
    """A module that gives out integers has nothing to be finite."""
    assert record(nn.Flatten(0), torch.ones(2, 2, dtype=torch.int64)).calls == ()


@pytest.mark.parametrize(
    ("inputs", "outputs", "culprit"),
    [
        pytest.param([1.0], [1.0], False, id="finite"),
        pytest.param([1.0], [NAN], True, id="made NaN"),
        pytest.param([1.0], [-INF], True, id="made -inf"),
        pytest.param([-INF], [NAN], True, id="-inf became NaN"),
        pytest.param([INF], [NAN], False, id="+inf became NaN"),
        pytest.param([NAN], [1.0], False, id="repaired"),
    ],
)
def test_a_culprit_gives_out_worse_than_it_got(inputs, outputs, culprit):
    """A call is to blame where its output is on a worse level than its input."""

    class Constant(nn.Module):
        def forward(self, _):
            return torch.tensor(outputs)

    assert (culprit_of(record(Constant(), torch.tensor(inputs)).calls) is not None) is culprit


class Pair(NamedTuple):
    """A batch with names."""

    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "places"),
    [
        pytest.param(torch.tensor([1.0, NAN]), [("batch", (1,), 1)], id="tensor"),
        pytest.param(
            [torch.ones(1), torch.tensor([[1.0], [NAN]])], [("batch[0]", (), 0), ("batch[1]", (1, 0), 1)], id="list"
        ),
        pytest.param({"x": torch.tensor([NAN, NAN])}, [("batch['x']", (0,), 2)], id="dictionary"),
        pytest.param(
            Pair(torch.ones(1), torch.tensor([NAN])), [("batch[0]", (), 0), ("batch[1]", (0,), 1)], id="tuple"
        ),
        pytest.param([torch.ones(2, dtype=torch.int64), "name", None], [], id="nothing to measure"),
    ],
)
def test_each_tensor_of_the_batch_has_path_and_first_bad_index(batch, places):
    """The batch is recorded tensor by tensor, before the pass and whatever its container."""
    seen = Recorder(nn.Identity(), batch).finish(None)
    assert [(place.path, place.index, place.seen.nan) for place in seen.batch] == places


def test_batch_and_weights_are_those_of_before_the_pass():
    """What a forward pass overwrites was recorded before."""

    class Overwrite(nn.Linear):
        def forward(self, x):
            x.fill_(NAN)
            self.weight.data.fill_(NAN)
            return x

    seen = record(Overwrite(2, 2), torch.ones(3, 2))
    assert seen.batch[0].seen.is_finite
    assert seen.weights["weight"].is_finite


def test_parameters_buffers_and_running_statistics_are_told_apart():
    """Running statistics are judged apart, integer buffers not at all."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer("table", torch.tensor([5.0, NAN]))
    seen = record(net, torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert list(seen.weights) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert seen.buffers == {"table": Census(2, 1, 0, 0, 5.0)}
    assert list(seen.statistics) == ["1"]


def test_running_statistics_are_kept_from_before_and_after():
    """The same layer's statistics are there twice, mean and variance together."""
    norm = nn.BatchNorm1d(1, momentum=1.0)
    before, after = record(norm, torch.tensor([[4.0], [6.0]])).statistics[""]
    assert (before.count, before.largest) == (2, 1.0)  # mean 0, variance 1
    assert (after.count, after.largest) == (2, 5.0)  # mean 5, variance 2


def test_batchnorm_without_running_statistics_has_nothing_to_judge():
    """A layer that keeps no statistics is listed with none."""
    seen = record(nn.BatchNorm1d(1, track_running_stats=False), torch.ones(2, 1))
    assert seen.statistics == {"": (NOTHING, NOTHING)}


@pytest.mark.parametrize(
    ("loss", "seen"),
    [
        pytest.param(torch.tensor(2.0), Census(1, 0, 0, 0, 2.0), id="finite"),
        pytest.param(torch.tensor(NAN), Census(1, 1, 0, 0, 0.0), id="NaN"),
        pytest.param(torch.tensor(-INF), Census(1, 0, 0, 1, 0.0), id="-inf"),
        pytest.param(None, None, id="none"),
        pytest.param(torch.tensor(2), None, id="not floating-point"),
    ],
)
def test_the_loss_is_recorded_where_there_is_one(loss, seen):
    """The census of the loss, or None where there is nothing to measure."""
    assert Recorder(nn.Identity(), torch.ones(1)).finish(loss).loss == seen


@pytest.mark.parametrize("failed", [True, False])
def test_a_failed_step_is_marked(failed):
    """Whether the step ended in an exception is kept with the pass."""
    assert Recorder(nn.Identity(), []).finish(None, failed=failed).failed is failed


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.LazyLinear(2), id="lazy"),
        pytest.param(nn.LazyBatchNorm1d(), id="lazy BatchNorm"),
        pytest.param(nn.Linear(2, 2, device="meta"), id="meta"),
        pytest.param(nn.BatchNorm1d(2, device="meta"), id="meta BatchNorm"),
    ],
)
def test_parameters_without_memory_are_passed_over(layer):
    """What has no values yet is not looked at, and nothing fails."""
    seen = Recorder(nn.Sequential(layer, nn.Linear(1, 1)), torch.ones(1)).finish(None)
    assert list(seen.weights) == ["1.weight", "1.bias"]


def test_nothing_is_read_on_the_host_while_the_pass_runs():
    """A recorded pass queues work on the device and waits for nothing."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    recorder = Recorder(net, torch.ones(3, 2))
    with NoHostRead(), recorder.listen():
        net(torch.ones(3, 2))
    assert len(recorder.finish(None).calls) == 4


def test_recording_leaves_gradients_as_they_are():
    """Backward after a recorded pass gives the gradient of a pass that nobody listened to."""
    layer, x = filled_linear(2.0), torch.ones(1, 2)
    recorder = Recorder(layer, x)
    with recorder.listen():
        layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(2, 2))
    assert not layer._forward_hooks
