# SPDX-License-Identifier: Apache-2.0
"""What a model does in quarantine leaves no trace: same objects, same values, bit for bit."""

from __future__ import annotations

import random
import sys
from itertools import pairwise

import pytest
import torch
from callbacks.test_do_no_harm import assert_identical
from identical import KINDS, Meter, everything, holding
from specimens import FEATURES, Healthy, network
from torch import nn

from lightning_bn.quarantine import quarantine
from lightning_bn.taps import listen

# Scripting announces its own end.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


kinds = pytest.mark.parametrize(("build", "touch"), KINDS.values(), ids=KINDS)


@kinds
def test_every_kind_of_state_is_as_before(build, touch):
    """After the block the same objects hold the same values."""
    model = build()
    before = everything(model)
    with quarantine(model):
        touch(model)
    assert_identical(before, everything(model))


@kinds
def test_every_kind_of_state_changes_without_quarantine(build, touch):
    """The test above is not blind: the same step without quarantine leaves a trace."""
    model = build()
    before = everything(model)
    touch(model)
    with pytest.raises(AssertionError):
        assert_identical(before, everything(model))


@kinds
def test_an_exception_leaves_nothing_behind(build, touch):
    """What was done before an exception is undone, and the exception goes through."""
    model = build()
    before = everything(model)

    def fail():
        touch(model)
        raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"), quarantine(model):
        fail()
    assert_identical(before, everything(model))


@kinds
def test_a_quarantine_within_another_ends_alone(build, touch):
    """Of two nested blocks each puts back what it found."""
    model = build()
    before = everything(model)
    with quarantine(model):
        between = everything(model)
        with quarantine(model):
            touch(model)
        assert_identical(between, everything(model))
        touch(model)
    assert_identical(before, everything(model))


def test_a_block_starts_from_the_present_state():
    """Buffers, tensors and containers hold inside what they held before; gradients are None."""
    model = network()
    model(torch.randn(8, FEATURES)).sum().backward()
    model.history = [torch.ones(2)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with quarantine(model):
        assert_identical(state, {name: value.clone() for name, value in model.state_dict().items()})
        assert torch.equal(model.history[0], torch.ones(2))
        assert all(p.grad is None for p in model.parameters())


def test_two_runs_from_the_same_state_are_the_same():
    """What a model puts out in quarantine is what it puts out afterwards, dropout included."""
    model = nn.Sequential(nn.Dropout(0.5), network())
    x = torch.randn(8, FEATURES)
    with quarantine(model):
        rehearsed = model(x)
    assert torch.equal(rehearsed, model(x))
    assert not torch.equal(rehearsed, model(x))


def test_parameters_are_not_copied():
    """A parameter is the same object inside, and an object of a class of its own too."""
    model, own = nn.Linear(2, 1), object()
    model.own = own
    weight = model.weight
    with quarantine(model):
        assert model.weight is weight
        assert model.own is own


def test_what_is_large_in_an_object_of_a_class_of_its_own_is_left_alone():
    """No copy is made of a bank of features or of a table of samples, nor of what such an object leads to."""
    meter = Meter()
    meter.bank, meter.table, meter.inner, meter.weight = (
        torch.ones(5000),
        [0] * 2000,
        Meter(),
        nn.Parameter(torch.ones(1)),
    )
    held = dict(vars(meter))
    with quarantine(holding(meter=meter)):
        for name in ("bank", "table", "inner", "weight"):
            assert vars(meter)[name] is held[name]
        assert meter.latest is not held["latest"]
        meter.inner.update(1.0)
    assert meter.inner.steps == 1
    assert vars(meter) == held


def test_what_is_shared_stays_shared():
    """One buffer, tensor or list under two names is one inside, and one afterwards."""
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    model[1].running_mean = model[0].running_mean
    model[0].x = model[1].x = [torch.ones(1)]
    model.y = model[0].x[0]

    def shared():
        names = [model[0].running_mean, model[1].running_mean], [model[0].x, model[1].x], [model.y, model[0].x[0]]
        return all(one is other for pair in names for one, other in pairwise(pair))

    with quarantine(model):
        assert shared()
    assert shared()


def test_a_real_step_goes_on_after_a_quarantine_between_forward_and_backward():
    """Buffers that a real step's graph holds may not even be written back: backward would refuse them."""
    model, x = network(), torch.randn(8, FEATURES)
    loss = model(x).sum()
    with quarantine(model):
        model(x).sum().backward()
    loss.backward()
    written = model(x).sum()
    for buffer in model.buffers():
        buffer.copy_(buffer.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        written.backward()


def test_the_graph_of_a_kept_tensor_is_not_used_up():
    """A backward pass inside stops at a tensor that has a graph from before, which can still run backward."""
    weight = nn.Parameter(torch.ones(1))
    model = holding(hidden=weight.exp())
    with quarantine(model):
        assert not model.hidden.is_leaf
        model.hidden.sum().backward()
    assert weight.grad is None
    model.hidden.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_on_inside_and_as_before_afterwards(mode):
    """Backward works inside, whatever the caller's mode, and the mode is back afterwards."""
    model = network()
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with quarantine(model):
            model(torch.randn(8, FEATURES)).sum().backward()
            assert all(p.grad is not None for p in model.parameters())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_is_left_as_it_is(enabled):
    """The caller's autocast holds inside."""
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), quarantine(model := nn.Linear(2, 2)):
        assert model(X).dtype == (torch.bfloat16 if enabled else torch.float32)


@pytest.mark.filterwarnings("error")
def test_logging_is_silent_inside_and_back_afterwards():
    """A LightningModule's ``log`` and ``log_dict`` do nothing, also in a submodule; they are Lightning's own again."""
    model = Healthy(Healthy())
    with quarantine(model):
        assert model.log("a", 1) is model.log_dict({"a": 1}) is model.net.log("a", 1) is None
    assert not {"log", "log_dict"} & {*vars(model), *vars(model.net)}
    with pytest.warns(UserWarning, match="self.log"):
        model.log("a", 1)


def test_a_users_own_log_is_silent_inside_and_back_afterwards():
    """An instance attribute ``log`` of the user's is not called inside, and is back."""
    model, said = Healthy(), []
    model.log = said.append
    with quarantine(model):
        model.log("inside")
    model.log("after")
    assert said == ["after"]


def test_a_module_whose_log_is_a_logarithm_keeps_it():
    """Only what has ``log_dict`` too is taken for a LightningModule."""

    class Log(nn.Module):
        def log(self, x):
            return x.log()

    model = Log()
    with quarantine(model):
        assert torch.equal(model.log(torch.ones(1)), torch.zeros(1))


def test_who_listened_before_does_not_hear_the_block_and_who_begins_inside_does():
    """Monitors hear real steps only; a listener of the block's own hears the block."""
    model, outer, inner = nn.Identity(), [], []
    with listen({"": model}, lambda *_: outer.append(1)):
        model(X)
        with quarantine(model), listen({"": model}, lambda *_: inner.append(1)):
            model(X)
        model(X)
    assert (len(outer), len(inner)) == (2, 1)


def test_what_the_model_belongs_to_and_what_is_added_for_good_are_left_alone():
    """``_trainer``, subclasses of containers, new hooks, parameters and submodules are not put back."""

    class Own(dict):
        pass

    model = holding(_trainer=[], own=Own())
    with quarantine(model):
        model._trainer.append(1)
        model.own["a"] = 1
        model.register_forward_hook(lambda *_: None)
        model.layer = nn.Linear(1, 1)
    assert (model._trainer, model.own, len(model._forward_hooks)) == ([1], {"a": 1}, 1)
    assert model.layer.weight.shape == (1, 1)


def test_odd_attributes_do_not_break_it():
    """A container that holds itself, and a generator without a state, are no obstacle."""
    ring = []
    ring.append(ring)
    with quarantine(holding(ring=ring, chance=random.SystemRandom(), parts=(None, "a"))):
        ring.append(1)
    assert len(ring) == 1


def test_lazy_modules_are_refused_until_they_have_seen_data():
    """What a lazy module becomes cannot be undone, so that the block does not begin."""
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"lazy modules .* got 0\.weight, 0\.bias, 1\.weight"), quarantine(model):
        pass
    model(X)
    with quarantine(model):
        model(X)


def test_every_cuda_device_is_put_back_where_cuda_is_in_use(monkeypatch):
    """The states of all devices are read at the start and given back at the end."""
    states, given = [torch.zeros(1), torch.ones(1)], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    with quarantine(nn.Identity()):
        assert given == []
    assert given == [states]


def test_numpy_is_not_needed(monkeypatch):
    """Where nobody imported numpy the other streams are put back all the same."""
    monkeypatch.delitem(sys.modules, "numpy.random")
    model, before = holding(g=random.Random(0)), torch.get_rng_state()
    with quarantine(model):
        torch.rand(1)
    assert torch.equal(before, torch.get_rng_state())
