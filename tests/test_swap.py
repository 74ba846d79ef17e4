# SPDX-License-Identifier: Apache-2.0
"""Layers are replaced wherever they stand, compute what they are called after, and keep γ and β."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_bn import find_batchnorm, swap_batchnorm
from lightning_bn.swap import FrozenBatchNorm, InstanceNorm, group_count

TARGETS = ["group", "layer", "instance", "frozen"]


class Fused(nn.BatchNorm2d):
    """Goes on with an activation, as layers of some libraries do."""

    def forward(self, x):
        return super().forward(x).relu()


class WithPart(nn.BatchNorm2d):
    """Holds an activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()


class Subclass(nn.BatchNorm2d):
    """A class of the user's that computes what torch's does."""


class Net(nn.Module):
    """BatchNorm in a Sequential, a ModuleList, a ModuleDict, as an attribute, and one layer in two places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([nn.BatchNorm2d(8), nn.ModuleList([Subclass(8)])])
        self.named = nn.ModuleDict({"norm": nn.BatchNorm2d(8)})
        self.shared = nn.BatchNorm2d(8)
        self.again = nn.Sequential(self.shared)

    def forward(self, x):
        x = self.stem(x)
        for layer in (self.blocks[0], self.blocks[1][0], self.named["norm"], self.shared, self.again):
            x = layer(x)
        return x.mean((2, 3))


PATHS = ["stem.1", "blocks.0", "blocks.1.0", "named.norm", "shared"]


def trained(layer, x):
    """A layer with running statistics of its own, γ and β away from 1 and 0."""
    for _ in range(3):
        layer(x)
    if layer.affine:
        with torch.no_grad():
            layer.weight.normal_(1, 0.3)
            layer.bias.normal_()
    return layer


@pytest.mark.parametrize("to", TARGETS)
def test_every_layer_is_replaced_wherever_it_stands(to):
    """Sequential, lists, dictionaries, attributes and subclasses: none is left, and all replacements are told."""
    model = Net()
    replaced = swap_batchnorm(model, to)
    assert list(replaced) == PATHS
    assert find_batchnorm(model) == {}
    assert all(model.get_submodule(path) is layer for path, layer in replaced.items())
    assert [name for name, _ in model.stem.named_children()] == ["0", "1", "2"]
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 8)


def test_a_layer_in_two_places_has_one_replacement():
    """Both places hold the same new layer."""
    model = Net()
    swap_batchnorm(model)
    assert model.shared is model.again[0]
    assert len(list(model.parameters())) == len(list(Net().parameters()))


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("affine", [True, False])
def test_gamma_and_beta_are_the_same_parameters(to, affine):
    """The very objects, with their dtype and ``requires_grad``; mode and ε are carried over."""
    model = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, affine=affine)).double().eval()
    gamma, beta = model[0].weight, model[0].bias
    if affine:
        beta.requires_grad_(requires_grad=False)
    swap_batchnorm(model, to)
    assert model[0].weight is gamma
    assert model[0].bias is beta
    assert (model[0].eps, model[0].training) == (1e-3, False)
    assert len(list(model.parameters())) == (2 if affine else 0)
    assert model(torch.randn(2, 4, 3, 3).double()).dtype == torch.float64
    assert "weight" not in model[0].state_dict() or affine


def test_a_layer_without_bias_stays_without():
    """γ alone is carried over."""
    layer = nn.BatchNorm2d(4)
    layer.bias = None
    model = nn.Sequential(layer)
    swap_batchnorm(model, "group", fewest=1)
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    assert model(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


@pytest.mark.parametrize("to", ["group", "layer", "instance", "frozen"])
def test_an_optimizer_that_was_made_before_goes_on_with_gamma_and_beta(to):
    """After a swap between two steps, the same optimizer moves γ and β, with the momentum that it has of them."""
    model, x = Net(), torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for place in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        before = model.shared.bias.detach().clone()
        optimizer.step()
        assert not torch.equal(model.shared.bias, before)
        assert "momentum_buffer" in optimizer.state[model.shared.bias]
        if place == 0:
            swap_batchnorm(model, to)


SHAPES = [(5, 8), (5, 8, 6), (5, 8, 4, 3), (5, 8, 2, 3, 2)]


def layer_for(shape, channels=8):
    return {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](channels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_is_layer_norm_over_all_axes_with_gamma_and_beta_of_each_channel(shape):
    """Equal to F.layer_norm over (C, *), then γ and β; for vectors that is nn.LayerNorm."""
    x = torch.randn(shape) * 2 + 1
    model = nn.Sequential(trained(layer_for(shape), x))
    swap_batchnorm(model, "layer")
    spread = (1, -1, *[1] * (len(shape) - 2))
    gamma, beta = model[0].weight.view(spread), model[0].bias.view(spread)
    torch.testing.assert_close(model(x), nn.functional.layer_norm(x, shape[1:]) * gamma + beta, rtol=1e-4, atol=1e-5)
    if len(shape) == 2:
        torch.testing.assert_close(model(x), nn.functional.layer_norm(x, (8,), model[0].weight, model[0].bias))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_instance_normalises_each_channel_of_each_sample(shape):
    """Equal to a computation by hand."""
    x = torch.randn(shape) * 2 + 1
    model = nn.Sequential(trained(layer_for(shape), x))
    swap_batchnorm(model, "instance")
    rows = x.flatten(2)
    rows = (rows - rows.mean(2, keepdim=True)) / (rows.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (rows * model[0].weight[None, :, None] + model[0].bias[None, :, None]).view(shape)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 1)], ids=str)
def test_instance_of_a_single_value_is_an_error_that_names_the_layer(shape):
    """Nothing would be left of a vector; torch alone takes it for one sample without a batch."""
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(8))
    swap_batchnorm(model, "instance")
    with pytest.raises(ValueError, match=r"1: instance norm needs inputs \(N, C, \*\).*swap this layer to 'group'"):
        model(torch.randn(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frozen_is_batchnorm_in_eval_mode_whatever_the_mode(shape):
    """Bit-equal to F.batch_norm with the running statistics; ``model.train()`` and training change nothing."""
    x = torch.randn(shape) * 2 + 1
    model = nn.Sequential(trained(layer_for(shape), x))
    expected = copy.deepcopy(model).eval()(x)
    swap_batchnorm(model, "frozen")
    state = copy.deepcopy(model.state_dict())
    for mode in (True, False, True):
        assert torch.equal(model.train(mode)(x), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_gamma_and_beta_of_frozen_can_be_frozen_too():
    """``train_affine=False`` takes them out of training; the default leaves them as they were."""
    free, fixed = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    swap_batchnorm(free, "frozen")
    swap_batchnorm(fixed, "frozen", train_affine=False)
    assert [p.requires_grad for p in free.parameters()] == [True, True]
    assert [p.requires_grad for p in fixed.parameters()] == [False, False]


def test_checkpoints_of_frozen_and_of_batchnorm_fit_each_other():
    """The state has the same names and values in both directions, strictly."""
    plain = nn.Sequential(trained(nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)))
    frozen = copy.deepcopy(plain)
    swap_batchnorm(frozen, "frozen")
    nn.Sequential(nn.BatchNorm2d(3)).load_state_dict(frozen.state_dict())
    other = nn.Sequential(nn.BatchNorm2d(3))
    swap_batchnorm(other, "frozen")
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other[0].running_mean, plain[0].running_mean)


def test_frozen_is_not_taken_for_batchnorm():
    """A conversion to SyncBatchNorm, and whoever looks for BatchNorm layers, leave it alone."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    swap_batchnorm(model, "frozen")
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0], FrozenBatchNorm)


@pytest.mark.parametrize(
    ("channels", "groups", "fewest", "expected"),
    [
        (64, 32, 2, 32),
        (32, 32, 2, 16),
        (48, 32, 2, 24),
        (96, 32, 2, 32),
        (7, 32, 2, 1),
        (10, 32, 2, 5),
        (64, 32, 16, 4),
        (8, 32, 16, 1),
        (1, 32, 2, 1),
        (4, 32, 1, 4),
        (64, 1, 2, 1),
    ],
)
def test_the_number_of_groups_is_the_largest_divisor_that_leaves_enough_channels(channels, groups, fewest, expected):
    """It divides the channels, is within the limit, and no larger number would do."""
    assert group_count(channels, groups, fewest) == expected
    fits = [g for g in range(1, channels + 1) if channels % g == 0 and g <= groups and channels // g >= fewest]
    assert expected == max(fits, default=1)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        pytest.param(nn.BatchNorm1d(64), 4, id="vectors"),
        pytest.param(nn.BatchNorm2d(64), 32, id="images"),
        pytest.param(nn.BatchNorm3d(64), 32, id="volumes"),
        pytest.param(nn.SyncBatchNorm(64), 4, id="anything"),
    ],
)
def test_groups_of_vectors_have_more_channels_than_those_of_maps(layer, expected):
    """A group of two values would be ±1, whatever they are: where inputs may be vectors a group has 16."""
    model = nn.Sequential(layer)
    swap_batchnorm(model)
    assert model[0].num_groups == expected
    pairs = nn.functional.group_norm(torch.randn(4, 8), 4)
    torch.testing.assert_close(pairs.abs(), torch.ones(4, 8), rtol=0.2, atol=0.0)


def test_a_choice_of_layers_leaves_the_others():
    """Patterns match any path of a layer; one that matches none names the nearest."""
    model = Net()
    assert list(swap_batchnorm(model, layers=["blocks.*", "again.0"])) == ["blocks.0", "blocks.1.0", "shared"]
    assert list(find_batchnorm(model)) == ["stem.1", "named.norm"]
    with pytest.raises(ValueError, match=r"layers needs patterns .*\(nearest: stem.1, named.norm\), got 'stm.1'"):
        swap_batchnorm(model, layers=["stm.1"])


@pytest.mark.parametrize(
    ("layer", "to", "words"),
    [
        pytest.param(nn.LazyBatchNorm2d(), "group", "1 cannot be swapped: it is lazy", id="lazy"),
        pytest.param(nn.LazyBatchNorm2d(affine=False), "layer", "it is lazy", id="lazy without parameters"),
        pytest.param(Fused(4), "group", "its class Fused does more than normalise", id="own forward"),
        pytest.param(WithPart(4), "frozen", "its class WithPart does more", id="submodule"),
        pytest.param(
            nn.BatchNorm2d(4, track_running_stats=False), "frozen", "no running statistics", id="no statistics"
        ),
        pytest.param(nn.BatchNorm1d(1), "group", "it has one channel", id="one channel, group"),
        pytest.param(nn.BatchNorm1d(1), "layer", "it has one channel", id="one channel, layer"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_nothing_is_changed(layer, to, words):
    """The error names the layer and the reason, and also the layer before it is still there."""
    model = nn.Sequential(nn.BatchNorm2d(4), layer)
    with pytest.raises(ValueError, match=words):
        swap_batchnorm(model, to)
    assert type(model[0]) is nn.BatchNorm2d
    assert model[1] is layer


def test_a_lazy_layer_is_replaced_when_it_has_seen_data():
    """It is an ordinary layer by then."""
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 6, 3, 3))
    swap_batchnorm(model)
    assert model[0].num_groups == 3


def test_a_lone_layer_cannot_be_replaced():
    """Nothing holds it, so there is no place to put another one."""
    with pytest.raises(ValueError, match="the model cannot be swapped: it is a BatchNorm layer itself"):
        swap_batchnorm(nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"to": "batch"}, "to must be one of group, layer, instance, frozen, got 'batch'", id="to"),
        pytest.param({"groups": 0}, "groups must be a whole number of at least 1, got 0", id="groups"),
        pytest.param({"fewest": 1.5}, "fewest must be a whole number of at least 1, got 1.5", id="fewest"),
        pytest.param({"train_affine": False}, "train_affine must be True but for 'frozen'", id="affine"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=words):
        swap_batchnorm(Net(), **arguments)


def test_a_model_without_batchnorm_is_left_as_it_is():
    """There is nothing to replace."""
    assert swap_batchnorm(nn.Sequential(nn.Linear(2, 2))) == {}


@pytest.mark.parametrize("layer", [InstanceNorm("a", 4, 1e-5), FrozenBatchNorm(nn.BatchNorm2d(4))])
def test_new_layers_print_what_they_are(layer):
    """Channels, ε and whether they have γ and β, as torch's own do."""
    swapped = nn.Sequential(nn.BatchNorm2d(4))
    swap_batchnorm(swapped, "instance" if isinstance(layer, InstanceNorm) else "frozen")
    assert repr(swapped[0]) == f"{type(layer).__name__}(4, eps=1e-05, affine=True)"
