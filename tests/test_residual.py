# SPDX-License-Identifier: Apache-2.0
"""The BatchNorm that closes a residual branch is found in every usual block, and tracing leaves no trace."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_bn.demo import DigitsMLP, DigitsResNet
from lightning_bn.norms import residual_closing


def conv(inner=4, outer=4, size=3, groups=1):
    return nn.Conv2d(inner, outer, size, padding=size // 2, groups=groups, bias=False)


class Basic(nn.Module):
    """Two convolutions, one ReLU for both, and a projection on request."""

    def __init__(self, projected=False):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(size=1), nn.BatchNorm2d(4)) if projected else None

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class DropPath(nn.Module):
    """Drops whole branches in training."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.9)


class Dropped(Basic):
    """The branch goes through drop path and a scale before the sum."""

    def __init__(self):
        super().__init__()
        self.drop, self.scale = DropPath(), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.add(x, self.drop(self.scale * self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))))


class Gated(Basic):
    """Squeeze and excitation behind the last BatchNorm."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out * self.gate(out) + x)


class Inverted(nn.Module):
    """An inverted residual block whose branch is one sequence."""

    def __init__(self):
        super().__init__()
        self.use_skip = True
        self.branch = nn.Sequential(
            *(conv(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()),
            *(conv(8, 8, 3, 8), nn.BatchNorm2d(8), nn.ReLU6()),
            *(conv(8, 4, 1), nn.BatchNorm2d(4)),
        )

    def forward(self, x):
        return x + self.branch(x) if self.use_skip else self.branch(x)


class PreActivation(nn.Module):
    """Version 2: a convolution closes the branch."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4), conv()

    def forward(self, x):
        return x + self.conv2(functional.relu(self.bn2(self.conv1(functional.relu(self.bn1(x))))))


class ActivatedBranch(Basic):
    """ReLU stands between BatchNorm and the sum: at γ = 0 it would pass no gradient."""

    def forward(self, x):
        return x + self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Parallel(nn.Module):
    """Two branches of one layer each, as in RepVGG, and no skip."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(conv(), nn.BatchNorm2d(4))
        self.narrow = nn.Sequential(conv(size=1), nn.BatchNorm2d(4))

    def forward(self, x):
        return torch.relu(self.wide(x) + self.narrow(x))


class Dense(nn.Module):
    """Its branch is joined to its input, not added."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.cat([x, self.bn(self.conv(x))], 1)


class Plain(Basic):
    """No sum at all."""

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


BLOCKS = [
    pytest.param(Basic, ["bn2"], id="basic"),
    pytest.param(lambda: Basic(projected=True), ["bn2"], id="projected skip"),
    pytest.param(Dropped, ["bn2"], id="drop path and scale"),
    pytest.param(Gated, ["bn2"], id="squeeze and excitation"),
    pytest.param(Inverted, ["branch.7"], id="inverted residual"),
    pytest.param(PreActivation, [], id="pre-activation"),
    pytest.param(ActivatedBranch, [], id="activation before the sum"),
    pytest.param(Parallel, [], id="parallel branches"),
    pytest.param(Dense, [], id="dense"),
    pytest.param(Plain, [], id="plain"),
]


@pytest.mark.parametrize(("make", "closing"), BLOCKS)
def test_the_closing_batchnorm_of_a_block_is_found(make, closing):
    """In a network of a stem, two such blocks and a head; nothing else is found."""
    net = nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4)), make(), nn.Sequential(make()))
    found = residual_closing(net)
    assert list(found.closing) == [f"{place}.{name}" for place in ("1", "2.0") for name in closing]
    assert found.unseen == {}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_demos_blocks_close_with_their_second_norm(device):
    """The sum stands in a block's own forward; the MLP has none."""
    net = DigitsResNet().to(device)
    assert list(residual_closing(net).closing) == [f"net.{place}.norm2.0" for place in range(1, 5)]
    assert residual_closing(DigitsMLP()).closing == ()


@pytest.mark.parametrize("make", [Basic, Dropped, Gated, Inverted, lambda: Basic(projected=True)])
def test_with_gamma_zero_a_block_is_its_skip_connection(make):
    """What is found does what it is for: with γ = 0 there a forward pass gives the skip path alone."""
    block = make()
    for name in residual_closing(block).closing:
        nn.init.zeros_(block.get_submodule(name).weight)
    x = torch.randn(6, 4, 5, 5)
    skip = block.downsample(x) if getattr(block, "downsample", None) is not None else x
    out = block(x)
    assert torch.equal(out, skip) or torch.equal(out, torch.relu(skip))


class Unclear(Basic):
    """Its way depends on the values."""

    def forward(self, x):
        if x.sum() > 0:
            return x
        return super().forward(x)


def test_a_block_that_cannot_be_traced_is_listed_with_the_reason():
    """The other blocks are found all the same."""
    found = residual_closing(nn.Sequential(Basic(), Unclear()))
    assert list(found.closing) == ["0.bn2"]
    assert list(found.unseen) == ["1"]
    assert "depends on the value" in found.unseen["1"]


class Restless(Basic):
    """Draws numbers, counts, keeps and prints in its forward."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.last = x
        print("forward")
        noise = random.random() * torch.rand(())
        return super().forward(x + noise)


def test_tracing_leaves_no_trace(capsys):
    """Random streams, attributes, lists, modes, parameters and buffers are what they were, and nothing is printed."""
    net = nn.Sequential(Restless(), Restless().eval())
    before = (torch.get_rng_state().tolist(), random.getstate())
    state = {name: (value, value.clone()) for name, value in (*net.named_parameters(), *net.named_buffers())}
    assert len(residual_closing(net).closing) == 2
    assert (torch.get_rng_state().tolist(), random.getstate()) == before
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        assert value is state[name][0]
        assert torch.equal(value, state[name][1])
    assert [(block.calls, block.seen, hasattr(block, "last"), block.training) for block in net] == [
        (0, [], False, True),
        (0, [], False, False),
    ]
    assert capsys.readouterr().out == ""
    assert net(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_are_traced_and_stay_lazy():
    """No shape is needed to see which way the signal takes."""
    block = Basic()
    block.conv1, block.bn2 = nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d()
    assert list(residual_closing(block).closing) == ["bn2"]
    assert isinstance(block.bn2.weight, nn.parameter.UninitializedParameter)


def test_a_model_without_batchnorm_is_not_even_traced():
    """There is nothing to look for."""

    class Explodes(nn.Linear):
        def forward(self, x):
            raise AssertionError

    assert residual_closing(nn.Sequential(Explodes(1, 1))).closing == ()
