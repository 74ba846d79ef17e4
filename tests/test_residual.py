# SPDX-License-Identifier: Apache-2.0
"""The BatchNorm that closes a residual branch is found in every usual block, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional

from lightning_bn.demo import DigitsMLP, DigitsResNet
from lightning_bn.norms import residual_closing

WIDTH = 4


def conv(inner=WIDTH, outer=WIDTH, size=3, groups=1):
    return nn.Conv2d(inner, outer, size, padding=size // 2, groups=groups, bias=False)


def normed(size=3, *, inner=WIDTH, outer=WIDTH, last=()):
    return nn.Sequential(conv(inner, outer, size), nn.BatchNorm2d(outer), *last)


class Basic(nn.Module):
    """Two convolutions, one ReLU for both, and a projection on request (He et al. 2016)."""

    def __init__(self, *, projected=False):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(WIDTH), conv(), nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = normed(1) if projected else None

    def branch(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        identity = x
        out = self.branch(x)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """Three convolutions, the outer ones 1x1, with a projection."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(size=1), nn.BatchNorm2d(WIDTH)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(WIDTH)
        self.conv3, self.bn3 = conv(size=1), nn.BatchNorm2d(WIDTH)
        self.relu, self.downsample = nn.ReLU(inplace=True), normed(1)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(torch.add(self.bn3(self.conv3(out)), self.downsample(x)))


class DropPath(nn.Module):
    """Drops whole branches in training."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.9)


class NormWithActivation(nn.BatchNorm2d):
    """A kind of BatchNorm that goes on with an activation, as timm has it."""

    def __init__(self, act=None):
        super().__init__(WIDTH)
        self.drop, self.act = nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class TimmLike(nn.Module):
    """Squeeze and excitation, drop path and a scale between BatchNorm and the sum."""

    def __init__(self, last=None):
        super().__init__()
        self.conv1, self.bn1 = conv(), NormWithActivation(nn.ReLU())
        self.conv2, self.bn2 = conv(), NormWithActivation(last)
        self.squeeze, self.drop_path = Squeeze(), DropPath()
        self.scale = nn.Parameter(torch.ones(WIDTH, 1, 1))

    def forward(self, x):
        out = self.squeeze(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        return functional.relu(x + self.drop_path(0.5 * (self.scale * out)))


class Squeeze(nn.Module):
    """Multiplication by a gate that is computed from the same value (Hu et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(WIDTH, 2, 1), nn.Conv2d(2, WIDTH, 1)

    def forward(self, x):
        return x * self.expand(functional.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Inverted(nn.Module):
    """An inverted residual block whose branch is one sequence, nested (Sandler et al. 2018)."""

    def __init__(self, *, residual=True):
        super().__init__()
        self.use_res_connect = residual
        self.conv = nn.Sequential(
            normed(1, outer=8, last=[nn.ReLU6()]),
            nn.Sequential(conv(8, 8, 3, 8), nn.BatchNorm2d(8), nn.ReLU6()),
            nn.Sequential(conv(8, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.Dropout2d(0.1)),
        )

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class Written(Basic):
    """The basic block's branch, with a sum that is written in one of many ways."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.sums = rule, torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        return self.rule(self, x)


def in_place(block, x):
    out = block.branch(x)
    out.add_(x)
    return block.relu(out)


class Branches(nn.Module):
    """Joins branches by a function of the block and its input."""

    def __init__(self, rule, *branches):
        super().__init__()
        self.rule, self.parts = rule, nn.ModuleList(branches)

    def forward(self, x):
        return self.rule(x, *self.parts)


class PreActivation(nn.Module):
    """Version 2: a convolution closes the branch (He et al. 2016b)."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(WIDTH), conv(), nn.BatchNorm2d(WIDTH), conv()

    def forward(self, x):
        return x + self.conv2(functional.relu(self.bn2(self.conv1(functional.relu(self.bn1(x))))))


def unet(x, down, up):
    low = down(functional.max_pool2d(x, 2, ceil_mode=True))
    return up(torch.cat([x, functional.interpolate(low, size=x.shape[2:])], 1))


def pyramid(x, bottom, lateral, top):
    low = top(bottom(x))
    return {"fine": lateral(x) + low, "coarse": low}  # the deeper value is an output of its own as well


def twice(x, part):
    out = part(x)
    return out + out.sigmoid()


def halves(x, part):
    left, right = x.chunk(2, 1)
    return left + part(right)


def convnext():
    return Branches(lambda x, branch: x + branch(x), nn.Sequential(conv(), nn.GroupNorm(1, WIDTH), nn.GELU(), conv()))


def branch(*, last=(), sizes=(3, 3)):
    return nn.Sequential(normed(sizes[0], last=[nn.ReLU()]), *(normed(size, last=last) for size in sizes[1:]))


CLOSING = [
    pytest.param(Basic, ["bn2"], id="basic"),
    pytest.param(lambda: Basic(projected=True), ["bn2"], id="projected skip"),
    pytest.param(Bottleneck, ["bn3"], id="bottleneck"),
    pytest.param(TimmLike, ["bn2"], id="gate, drop path and scale"),
    pytest.param(Inverted, ["conv.2.1"], id="inverted residual"),
    pytest.param(lambda: Written(lambda block, x: torch.relu(torch.add(block.branch(x), x))), ["bn2"], id="torch.add"),
    pytest.param(lambda: Written(in_place), ["bn2"], id="in place, without a new name"),
    pytest.param(lambda: Written(lambda block, x: sum([block.branch(x), x])), ["bn2"], id="builtin sum"),
    pytest.param(lambda: Written(lambda block, x: x - block.branch(x)), ["bn2"], id="difference"),
    pytest.param(lambda: Written(lambda block, x: block.sums.add(x, block.branch(x))), ["bn2"], id="FloatFunctional"),
    pytest.param(lambda: Branches(lambda x, b: x + b(x), branch()), ["parts.0.1.1"], id="x + branch(x)"),
    pytest.param(lambda: Branches(lambda x, b: b(x) + x.roll(1), branch()), ["parts.0.1.1"], id="skip without weights"),
    pytest.param(
        lambda: Branches(lambda x, one, two: one(x) + two(x) + x, branch(), branch()),
        ["parts.0.1.1", "parts.1.1.1"],
        id="two branches and a skip",
    ),
]
OPEN = [
    pytest.param(PreActivation, id="pre-activation"),
    pytest.param(lambda: TimmLike(last=nn.ReLU()), id="BatchNorm with an activation of its own"),
    pytest.param(lambda: Inverted(residual=False), id="inverted without skip"),
    pytest.param(lambda: Branches(lambda x, b: x + b(x), branch(last=[nn.ReLU()])), id="activation before the sum"),
    pytest.param(lambda: Branches(lambda x, b: b(x), branch()), id="plain"),
    pytest.param(lambda: Branches(lambda x, b: torch.cat([x, b(x)], 1), branch()), id="dense"),
    pytest.param(lambda: Branches(unet, normed(), normed(inner=2 * WIDTH)), id="U-Net"),
    pytest.param(lambda: Branches(lambda x, a, b: a(x) + b(x), branch(), branch(sizes=(1, 3))), id="inception sum"),
    pytest.param(
        lambda: Branches(lambda x, a, b, c: a(x) + b(x) + c(x), normed(), normed(1), nn.BatchNorm2d(WIDTH)), id="RepVGG"
    ),
    pytest.param(lambda: Branches(pyramid, branch(), normed(1), normed(1)), id="feature pyramid"),
    pytest.param(lambda: Branches(lambda x, a, b: a(x) + b(x), branch(), branch(sizes=(3, 3, 3))), id="long branches"),
    pytest.param(lambda: Branches(twice, normed()), id="added to itself"),
    pytest.param(lambda: Branches(halves, normed(inner=2, outer=2)), id="two halves"),
    pytest.param(lambda: Branches(lambda x, b: x * b(x), branch()), id="product"),
    pytest.param(lambda: Branches(lambda x, a, b: x + a(x) * b(x), branch(), branch()), id="product of two branches"),
    pytest.param(convnext, id="no BatchNorm"),
]


@pytest.mark.parametrize(("make", "closing"), CLOSING)
def test_the_closing_batchnorm_of_a_block_is_found(make, closing):
    """The last BatchNorm of each branch is found, not those inside and not the one in a projection."""
    found = residual_closing(make())
    assert list(found.closing) == closing
    assert found.unseen == {}


@pytest.mark.parametrize("make", OPEN)
def test_where_no_batchnorm_closes_a_branch_none_is_found(make):
    """Neither what is joined otherwise than by a sum with a skip, nor what does not come to it as it is."""
    found = residual_closing(nn.Sequential(normed(), make()))
    assert found.closing == ()
    assert found.unseen == {}


@pytest.mark.parametrize("make", [Basic, Bottleneck, TimmLike, Inverted])
def test_blocks_in_a_row_are_told_apart(make):
    """A block that begins with the output of a BatchNorm, or of another block, closes as it does alone."""
    alone = residual_closing(make()).closing
    net = nn.Sequential(normed(), make(), nn.Sequential(make()), nn.Flatten(), nn.LazyLinear(2))
    assert list(residual_closing(net).closing) == [f"{place}.{name}" for place in ("1", "2.0") for name in alone]


@pytest.mark.parametrize(("make", "closing"), CLOSING)
def test_with_gamma_zero_a_block_is_its_skip_connection_and_learns(make, closing):
    """What is found does what it is for: a forward pass gives the skip path alone, and γ has a gradient."""
    block = make()
    gammas = [block.get_submodule(name).weight for name in residual_closing(block).closing]
    for gamma in gammas:
        nn.init.zeros_(gamma)
    x = torch.randn(6, WIDTH, 5, 5)
    shortcut = getattr(block, "downsample", None) or nn.Identity()
    rolled = x.roll(1) if "parts.0.1.1" in closing else x
    out = block(x)
    assert any(torch.equal(out, skip) for skip in (shortcut(x), shortcut(x).relu(), rolled))
    (out * torch.randn_like(out)).sum().backward()
    assert len(gammas) == len(closing)
    assert all(gamma.grad.abs().min() > 0 for gamma in gammas)


def test_behind_relu_gamma_zero_would_not_learn():
    """The reason why a branch with an activation before the sum does not count."""
    block = Branches(lambda x, b: x + b(x), branch(last=[nn.ReLU()]))
    gamma = block.parts[0][1][1].weight
    nn.init.zeros_(gamma)
    block(torch.randn(6, WIDTH, 5, 5)).square().sum().backward()
    assert gamma.grad.abs().max() == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_demos_blocks_close_with_their_second_norm(device):
    """The sum stands in a block's own forward; the MLP has none."""
    net = DigitsResNet().to(device)
    assert list(residual_closing(net).closing) == [f"net.{place}.norm2.0" for place in range(1, 5)]
    assert residual_closing(DigitsMLP()).closing == ()


class RootSum(LightningModule):
    """The residual sum stands in the model's own forward, with ``log`` beside it."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = normed(), branch(), nn.Linear(WIDTH, 2)

    def forward(self, batch, *, scale=None):
        x = self.stem(batch["image"])
        x = x + self.body(x)
        self.log("mean", x.mean())
        return self.head(x.mean((2, 3)) if scale is None else scale * x)


def test_a_sum_in_the_models_own_forward_counts():
    """The BatchNorm that begins the branch feeds the skip as well, and does not close."""
    assert residual_closing(RootSum()).closing == ("body.1.1",)


def test_a_layer_in_two_places_closes_only_if_it_does_so_in_both():
    """A block that is called twice closes; a BatchNorm inside and at the end of one branch does not."""
    block, norm = Basic(), nn.BatchNorm2d(WIDTH)
    assert residual_closing(nn.Sequential(block, block)).closing == ("0.bn2",)
    block.bn1 = block.bn2 = norm
    assert residual_closing(block).closing == ()
