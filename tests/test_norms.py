# SPDX-License-Identifier: Apache-2.0
"""Every BatchNorm layer is found by its path, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.norms import find_batchnorm


class OwnKind(_BatchNorm):
    """BatchNorm for any number of axes, as some projects write it."""

    def _check_input_dim(self, _):
        pass


class Frozen(nn.BatchNorm2d):
    """A subclass of a torch layer."""


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.BatchNorm1d(2), id="1d"),
        pytest.param(nn.BatchNorm2d(2), id="2d"),
        pytest.param(nn.BatchNorm3d(2), id="3d"),
        pytest.param(nn.SyncBatchNorm(2), id="synchronised"),
        pytest.param(nn.LazyBatchNorm1d(), id="lazy"),
        pytest.param(nn.BatchNorm1d(2, affine=False), id="without parameters"),
        pytest.param(nn.BatchNorm1d(2, track_running_stats=False), id="without running statistics"),
        pytest.param(Frozen(2), id="subclass"),
        pytest.param(OwnKind(2), id="direct subclass of the base"),
    ],
)
def test_every_kind_of_batchnorm_is_found(layer):
    """All layers that normalise by the batch are found, whatever their class."""
    assert find_batchnorm(nn.Sequential(nn.ReLU(), layer)) == {"1": layer}


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.LayerNorm(2), id="LayerNorm"),
        pytest.param(nn.GroupNorm(1, 2), id="GroupNorm"),
        pytest.param(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), id="InstanceNorm"),
        pytest.param(nn.Linear(2, 2), id="Linear"),
    ],
)
def test_other_layers_are_no_batchnorm(layer):
    """What normalises by something else, or not at all, is not found."""
    assert find_batchnorm(nn.Sequential(layer)) == {}


def test_layers_come_in_the_order_of_the_model():
    """The paths are those of ``named_modules``, in its order."""
    net = nn.ModuleDict({"z": nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)), "a": nn.BatchNorm1d(1)})
    assert list(find_batchnorm(net)) == ["z.0", "z.1", "a"]


def test_a_layer_in_two_places_is_listed_once():
    """A shared layer has its first name."""
    shared = nn.BatchNorm1d(1)
    assert find_batchnorm(nn.Sequential(shared, nn.ReLU(), shared)) == {"0": shared}


def test_the_model_itself_may_be_the_layer():
    """A lone layer has the empty path."""
    layer = nn.BatchNorm1d(1)
    assert find_batchnorm(layer) == {"": layer}


@pytest.fixture
def compiled():
    """A container with a compiled submodule, never run; the first one in a process imports the compiler."""
    return nn.Sequential(torch.compile(nn.Sequential(nn.BatchNorm1d(1))))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # the compiler's own modules use it
def test_compiling_does_not_change_the_path(compiled):
    """The path of a layer inside a compiled module is that of the module as it was written."""
    assert list(find_batchnorm(compiled)) == ["0.0"]
