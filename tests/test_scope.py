# SPDX-License-Identifier: Apache-2.0
"""Patterns and module types say which parameters are meant."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from lightning_bn.scope import Scope


class _Own(nn.Conv2d):
    """A project's own convolution."""


def model():
    body = nn.Sequential(OrderedDict(conv=_Own(1, 1, 1), norm=nn.BatchNorm2d(1)))
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(1, 1)))


EVERY = {"body.conv.weight", "body.conv.bias", "body.norm.weight", "body.norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        pytest.param("*", EVERY, id="everything"),
        pytest.param("head", {"head.weight", "head.bias"}, id="a module by its path"),
        pytest.param("body", {name for name in EVERY if name.startswith("body")}, id="a module means all below it"),
        pytest.param("body.*", {name for name in EVERY if name.startswith("body")}, id="a pattern"),
        pytest.param("*.bias", {name for name in EVERY if name.endswith("bias")}, id="a pattern on parameters"),
        pytest.param("head.weight", {"head.weight"}, id="one parameter"),
        pytest.param("Linear", {"head.weight", "head.bias"}, id="a module type"),
        pytest.param("nn.Linear", {"head.weight", "head.bias"}, id="a type with its package"),
        pytest.param("torch.nn.Conv2d", {"body.conv.weight", "body.conv.bias"}, id="the type of a base"),
        pytest.param("_Own", {"body.conv.weight", "body.conv.bias"}, id="the project's own type"),
        pytest.param("Sequential", EVERY, id="the type of a container means all in it"),
        pytest.param("bod", set(), id="a part of a name"),
    ],
)
def test_an_entry_means_what_its_docstring_says(entry, meant):
    """Included alone, the rest is outside; excluded alone, it is outside itself."""
    assert set(Scope([entry]).outside(model())) == EVERY - meant
    assert set(Scope(exclude=[entry]).outside(model())) == meant


def test_exclusion_wins_over_inclusion():
    """What both name is left alone, with the entry that said so."""
    outside = Scope(["body"], ["BatchNorm2d"]).outside(model())
    assert outside["body.norm.weight"] == "excluded (BatchNorm2d)"
    assert outside["head.weight"] == "not included"
    assert "body.conv.weight" not in outside


def test_entries_that_mean_nothing_come_with_the_nearest_names():
    """Misspelt patterns and types are listed under the argument that they were given to."""
    found = Scope(["hed.*", "head"], ["Liner"]).unmatched(model())
    assert [(argument, entry) for argument, entry, _ in found] == [("include", "hed.*"), ("exclude", "Liner")]
    assert found[0][2][0].startswith("head")
    assert found[1][2][0] == "Linear"
