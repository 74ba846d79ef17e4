# SPDX-License-Identifier: Apache-2.0
"""Tracing sees through Python code that is fixed, says what it cannot see, and leaves no trace of itself."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn.norms import residual_closing
from lightning_bn.tracing import trace


class Noted(nn.Linear):
    """A layer that takes something beside a tensor."""

    def forward(self, x, _):
        return super().forward(x)


class Block(nn.Module):
    """A residual block on features, in any of several ways."""

    def __init__(self, rule=lambda block, x: x + block.branch(x)):
        super().__init__()
        self.rule, self.branch = rule, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def forward(self, x):
        return self.rule(self, x)


class NotedBlock(Block):
    """Its branch begins with a layer that takes more than tensors."""

    def __init__(self):
        super().__init__(lambda block, x: x + block.branch[1](block.branch[0](x, object())))
        self.branch[0] = Noted(2, 2)


class Options(Block):
    """Arguments with defaults, by keyword, and several outputs."""

    def forward(self, x, *, mask=None, closed=False, **rest):
        out = self.branch(x) if mask is None else self.branch(x) * mask
        return {"out": out + x, "rest": rest} if closed else (out, x)


class Caller(nn.Module):
    """Calls a block by keyword."""

    def __init__(self):
        super().__init__()
        self.inner = Options()

    def forward(self, *inputs):
        return self.inner(x=inputs[0], closed=True, extra=None)["out"]


# Compiled here, as pytest writes the assertions of test modules anew.
ASSERTS = {}
exec("def features(x): assert x.dim() == 2 and x.is_floating_point(), 'features'", ASSERTS)  # noqa: S102  (our own text)


def checked(block, x):
    ASSERTS["features"](x)
    if x.shape[1] != 2:
        raise ValueError(f"got {x.shape}")
    rows, columns = x.shape
    return block.branch(x).view(rows, columns) + x


def padded(block, x):
    return torch.cat([x[:, :1], torch.zeros(x.size(0), 1)], 1) + block.branch(x)


SEEN = [
    pytest.param(Caller, "inner.branch.1", id="keywords and defaults"),
    pytest.param(lambda: Block(checked), "branch.1", id="checks of the input"),
    pytest.param(lambda: Block(padded), "branch.1", id="a tensor of the input's size"),
    pytest.param(
        lambda: Block(lambda block, x: checkpoint(block.branch, x, use_reentrant=False) + x),
        "branch.1",
        id="checkpoint",
    ),
    pytest.param(
        lambda: Block(lambda block, x: x if block.training else x + block.branch(x)),
        "branch.1",
        id="the way of eval mode",
    ),
    pytest.param(NotedBlock, "branch.1", id="an object for a layer"),
    pytest.param(lambda: nn.DataParallel(Block()), "module.branch.1", id="data parallel"),
    pytest.param(lambda: fx.symbolic_trace(Block()), "branch.1", id="a module that was traced before"),
]


@pytest.mark.parametrize(("make", "closing"), SEEN)
def test_code_that_takes_one_way_is_seen_through(make, closing):
    """The sum is found and nothing is called unseen."""
    found = residual_closing(make())
    assert found.closing == (closing,)
    assert found.unseen == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # the compiler's own modules use it
@pytest.mark.slow  # the first one in a process imports the compiler
def test_a_compiled_module_is_looked_into():
    """Its forward is traced as it was written, and names are those of the model as it was written."""
    compiled_in_place = Block()
    compiled_in_place.compile()
    net = nn.Sequential(torch.compile(Block()), compiled_in_place, Block())
    net[2].branch = torch.compile(net[2].branch)
    found = residual_closing(torch.compile(net))
    assert found.closing == ("0.branch.1", "1.branch.1", "2.branch.1")
    assert found.unseen == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # scripting is what is tested
def test_a_scripted_module_is_unseen():
    """Its code is out of Python's reach."""
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    found = residual_closing(nn.Sequential(Block(), scripted))
    assert found.closing == ("0.branch.1",)
    assert found.unseen == {"1": "it is a ScriptModule"}


class Refusing(nn.Module):
    """Has a residual block below, and a forward that cannot be traced."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.inner = rule, nn.ModuleList([Block()])

    def forward(self, x):
        return self.rule(self.inner[0](x))


def by_value(x):
    return x if x.sum() > 0 else -x


def complain(_):
    raise KeyError("no\nsuch key")


UNSEEN = [
    pytest.param(by_value, "its way depends on the value or the shape of a tensor", id="by value"),
    pytest.param(lambda x: [row for row in x], "it loops over a tensor or a container", id="loop"),  # noqa: C416  (a loop is the point)
    pytest.param(complain, "its forward cannot be traced (KeyError: 'no", id="an error of its own"),
    pytest.param(lambda x: np.asarray(x.numpy(), int) + int(x), "its forward cannot be traced (", id="leaves torch"),
]


@pytest.mark.parametrize("place", ["", "0"])
@pytest.mark.parametrize(("rule", "why"), UNSEEN)
def test_what_cannot_be_traced_is_named_with_the_reason(rule, why, place):
    """The reason is one line; the blocks below and beside it are found all the same."""
    refusing = Refusing(rule)
    found = residual_closing(nn.Sequential(refusing, Block()) if place else refusing)
    assert list(found.unseen) == [place]
    assert found.unseen[place].startswith(why)
    assert "\n" not in found.unseen[place]
    inner = "inner.0.branch.1"
    assert found.closing == ((f"0.{inner}", "1.branch.1") if place else (inner,))


def test_a_module_that_cannot_be_traced_and_has_no_batchnorm_is_not_mentioned():
    """It hides no layer; the model around it is traced."""

    class Odd(nn.Module):
        def forward(self, x):
            return by_value(x)

    found = residual_closing(nn.Sequential(Odd(), Block()))
    assert found.closing == ("1.branch.1",)
    assert found.unseen == {}


def test_a_model_without_a_forward_is_seen_below():
    """A LightningModule may only have a training step."""

    class Steps(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(Block(), Block())

    found = residual_closing(Steps())
    assert found.closing == ("net.0.branch.1", "net.1.branch.1")
    assert found.unseen == {}


def test_a_model_without_batchnorm_is_not_even_traced():
    """There is nothing to look for."""

    class Explodes(nn.Linear):
        def forward(self, x):
            raise AssertionError

    assert residual_closing(nn.Sequential(Explodes(1, 1))).closing == ()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_are_traced_and_stay_lazy():
    """No shape is needed to see which way the signal takes."""
    block = Block()
    block.branch = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    assert residual_closing(block).closing == ("branch.1",)
    assert isinstance(block.branch[0].weight, nn.parameter.UninitializedParameter)
    assert isinstance(block.branch[1].running_mean, nn.parameter.UninitializedBuffer)


class Restless(Block):
    """Does in its forward what a forward can do to itself and around it; fails in the end on request."""

    def __init__(self, *, fails=False):
        super().__init__()
        self.calls, self.seen, self.nested, self.late, self.fails = 0, [], {"last": [0]}, None, fails
        self.generator, self.plain = torch.Generator(), torch.zeros(2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.nested["last"][0] = self.last = x
        self.count += 1
        self.count.add_(torch.rand((), generator=self.generator) + random.random() + np.random.rand())  # noqa: NPY002
        self.plain.mul_(2).add_(1)
        for parameter in self.parameters():
            parameter.data.clamp_(0, 0)
        self.branch[0].weight.data.zero_()
        self.train()
        self.late = self.late or nn.Linear(2, 2)
        self.register_parameter("added", nn.Parameter(torch.ones(1)))
        self.register_forward_hook(lambda *_: None)
        print("forward")  # noqa: T201  (output is what is tested)
        warnings.warn("from the forward", DeprecationWarning, stacklevel=1)
        if self.fails:
            raise RuntimeError("in the end")
        return x + torch.rand(()) + self.branch(x)


def snapshot(net):
    """Every attribute of every module, tensors as (identity, values), containers as contents."""

    def of(value):
        if isinstance(value, torch.Tensor):
            return id(value), value.tolist(), value.requires_grad, value.device.type
        if isinstance(value, torch.Generator):
            return value.get_state().tolist()
        if isinstance(value, dict):
            return id(value), [(key, of(entry)) for key, entry in value.items()]
        if isinstance(value, list):
            return id(value), [of(entry) for entry in value]
        return value if isinstance(value, int | str | set | tuple | None) else id(value)

    return [(path, {name: of(value) for name, value in vars(module).items()}) for path, module in net.named_modules()]


def streams():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_streams_are_left_as_they_were(fails, capsys):
    """No attribute, list, table, buffer, parameter, flag, hook or generator differs, and nothing is put out."""
    net = nn.Sequential(Restless(fails=fails), Restless(fails=fails).eval())
    model, random_state = snapshot(net), streams()
    factory, call = torch.zeros, nn.Module.__call__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = residual_closing(net)
    assert snapshot(net) == model
    assert streams() == random_state
    assert (torch.zeros, nn.Module.__call__) == (factory, call)
    assert capsys.readouterr() == ("", "")
    assert found.closing == (() if fails else ("0.branch.1", "1.branch.1"))
    assert list(found.unseen) == (["0", "1"] if fails else [])


def test_gradients_are_left_between_forward_and_backward():
    """Looking at a model in the middle of a step changes neither the graph nor the gradients that are there."""
    block, twin = Block(), Block()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(5, 2)
    for net in (block, twin):
        net(x).sum().backward()
        loss = net(x).square().sum()
        if net is block:
            residual_closing(net)
        loss.backward()
    for one, other in zip(block.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_hooks_do_not_run():
    """Neither those of the model nor those of its layers."""
    net, heard = nn.Sequential(Block()), []
    for module in net.modules():
        module.register_forward_pre_hook(lambda *_: heard.append("before"))
        module.register_forward_hook(lambda *_: heard.append("after"))
    assert residual_closing(net).closing == ("0.branch.1",)
    assert heard == []


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_the_state_around_does_not_matter(state):
    """Models are also looked at where gradients are off, and where they are built without storage."""
    with state():
        net = nn.Sequential(Block(), Block())
        assert residual_closing(net).closing == ("0.branch.1", "1.branch.1")


def test_the_graph_has_the_calls_of_layers_in_order():
    """Modules with a forward of their own are traced into, layers of torch are one call each."""
    net = nn.Sequential(Block(), nn.ReLU())
    seen = trace(net)
    assert [node.target for node in seen.graph.nodes if node.op == "call_module"] == ["0.branch.0", "0.branch.1", "1"]
    assert set(seen.entered) == {net, net[0], net[0].branch}
    assert seen.refused == {}


def test_a_refused_module_is_one_call_in_the_graph():
    """Nothing is left of the attempt, so that nothing is concluded from half a forward."""
    net = nn.Sequential(Refusing(by_value), nn.ReLU())
    seen = trace(net)
    assert [node.target for node in seen.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert seen.entered == (net,)
    assert list(seen.refused) == [net[0]]


def test_what_a_models_forward_shows_counts_before_what_a_container_shows_alone():
    """Layers that are called one by one from a container close as they do there, whatever else the container holds."""
    block = Block(lambda block, x: x + block.branch[1](block.branch[0](x)))
    block.branch.append(nn.BatchNorm1d(2))  # never called
    assert residual_closing(block).closing == ("branch.1",)
