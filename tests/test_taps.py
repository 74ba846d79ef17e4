# SPDX-License-Identifier: Apache-2.0
"""Modules are chosen by name and heard while a block lasts, without a trace in what they compute."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from threading import Thread
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, MetricCollection

from lightning_bn.taps import choose, deaf, listen, plain_name, tensors_in

# The compiler's own modules, and scripting itself, announce the end of scripting.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def nested():
    """Two blocks of two layers, and a head."""
    blocks = [nn.Sequential(OrderedDict(conv=nn.Linear(2, 2), act=nn.ReLU())) for _ in range(2)]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*blocks), head=nn.Linear(2, 1)))


LEAVES = ["body.0.conv", "body.0.act", "body.1.conv", "body.1.act", "head"]


def test_leaves_are_chosen_in_order():
    """Without globs every module without submodules is chosen, in the order of ``named_modules``."""
    choice = choose(nested())
    assert (list(choice.layers), choice.unmatched, choice.unseen) == (LEAVES, {}, {})


def test_containers_are_chosen_where_they_are_asked_for():
    """With ``leaves_only`` off every module is chosen, the model itself first."""
    assert list(choose(nested(), leaves_only=False).layers)[:3] == ["", "body", "body.0"]


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        pytest.param(["head"], ["head"], id="full name"),
        pytest.param(["*conv"], ["body.0.conv", "body.1.conv"], id="star crosses dots"),
        pytest.param(["body.?"], ["body.0", "body.1"], id="containers too"),
        pytest.param(["body.[1-9].*"], ["body.1.conv", "body.1.act"], id="range"),
        pytest.param(
            ["head", "body.0.act", "*.act"], ["body.0.act", "body.1.act", "head"], id="several, in model order"
        ),
        pytest.param([""], [""], id="the model"),
    ],
)
def test_globs_choose_by_name(globs, names):
    """A module that matches any pattern is chosen, leaf or not, once."""
    choice = choose(nested(), globs)
    assert (list(choice.layers), choice.unmatched) == (names, {})


@pytest.mark.parametrize(
    ("glob", "nearest"),
    [pytest.param("hed", "head", id="misspelt"), pytest.param("body.0.cnv*", "body.0.conv", id="star")],
)
def test_a_glob_without_a_match_comes_with_the_nearest_names(glob, nearest):
    """What was asked for in vain is listed with at most three names, the nearest first; the rest is chosen."""
    choice = choose(nested(), [glob, "head"])
    assert list(choice.unmatched) == [glob]
    assert choice.unmatched[glob][0] == nearest
    assert len(choice.unmatched[glob]) == 3
    assert list(choice.layers) == ["head"]


def test_case_matters():
    """``Head`` is another name than ``head``."""
    assert list(choose(nested(), ["Head"]).unmatched) == ["Head"]


@pytest.mark.parametrize("globs", [None, ["*"]], ids=["leaves", "globs"])
def test_metrics_are_no_layers(globs):
    """Metrics of torchmetrics, alone or in a collection, are never chosen."""
    net = nn.ModuleDict({"head": nn.Linear(1, 1), "loss": MeanMetric(), "all": MetricCollection([MeanMetric()])})
    assert [name for name in choose(net, globs).layers if name] == ["head"]


@pytest.fixture(params=["scripted", "compiled", "compiled in place"])
def hidden(request):
    """``body`` cannot be heard, ``body2`` and ``head`` can."""
    net = nested()
    net.body2 = nn.Sequential(nn.ReLU())
    if request.param == "scripted":
        net.body = torch.jit.script(net.body)
    elif request.param == "compiled":
        net.body = torch.compile(net.body)
    else:
        net.body.compile()
    return net


def test_only_the_top_of_what_cannot_be_heard_is_listed(hidden):
    """Of a scripted or compiled module nothing is chosen, and only the module itself is listed as unseen."""
    choice = choose(hidden)
    assert list(choice.layers) == ["head", "body2.0"]
    assert list(choice.unseen) == ["body"]
    assert choice.unseen["body"].startswith("it is ")


def test_a_name_that_cannot_be_heard_is_no_misspelt_name(hidden):
    """A pattern that matches only what cannot be heard is listed as unseen and not as unmatched."""
    choice = choose(hidden, ["body.0.conv", "head"])
    assert (list(choice.layers), choice.unmatched, list(choice.unseen)) == (["head"], {}, ["body.0.conv"])


def test_what_was_not_asked_for_is_not_listed(hidden):
    """A pattern that passes the unseen module by does not mention it."""
    assert choose(hidden, ["head"]).unseen == {}


@pytest.fixture
def compiled():
    """A model that is compiled as a whole; the first one in a process imports the compiler."""
    return torch.compile(nested())


def test_a_compiled_model_is_unseen_as_a_whole(compiled):
    """Of a model that is compiled itself only the empty name is listed."""
    choice = choose(compiled)
    assert (choice.layers, list(choice.unseen)) == ({}, [""])


@pytest.mark.parametrize(
    ("name", "plain"),
    [("_orig_mod.a.b", "a.b"), ("a._orig_mod.b", "a.b"), ("a.b", "a.b"), ("_orig_mod", ""), ("", "")],
)
def test_a_plain_name_is_the_name_as_written(name, plain):
    """What ``torch.compile`` puts into a module path is taken out."""
    assert plain_name(name) == plain


def heard_by(notes):
    def hear(name, module, inputs, output):
        notes.append((name, module, inputs, output))
        return torch.zeros(1)

    return hear


def test_what_passes_through_is_heard():
    """Name, module, positional and keyword arguments and output of each call arrive."""

    class Scale(nn.Module):
        def forward(self, x, *, by):
            return x * by

    module, x, notes = Scale(), torch.ones(2), []
    with listen({"scale": module}, heard_by(notes)):
        output = module(x, by=3)
    assert notes == [("scale", module, ((x,), {"by": 3}), output)]


def test_the_output_is_left_alone():
    """What the listener returns does not replace what the module returned."""
    module = nn.Identity()
    with listen({"": module}, heard_by([])):
        assert torch.equal(module(torch.ones(2)), torch.ones(2))


def test_the_listener_runs_without_gradients_and_changes_none():
    """Listening builds no graph, and the module's own graph is as it was."""
    module, modes = nn.Linear(1, 1), []
    with listen({"": module}, lambda *_: modes.append(torch.is_grad_enabled())):
        output = module(torch.ones(1, 1))
    assert modes == [False]
    assert output.requires_grad


def test_nothing_is_heard_outside_of_the_block():
    """Hooks are gone when the block is left."""
    net, notes = nested(), []
    with listen(choose(net).layers, heard_by(notes)):
        net(torch.ones(1, 2))
    net(torch.ones(1, 2))
    assert [name for name, *_ in notes] == LEAVES
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in net.modules())


def test_hooks_are_gone_when_the_block_raises():
    """An exception inside the block goes through, and leaves no hook behind."""
    net = nested()
    with pytest.raises(RuntimeError, match="shapes"), listen(choose(net).layers, heard_by([])):
        net(torch.ones(1, 3))
    assert not any(module._forward_hooks for module in net.modules())


def test_a_shared_module_is_heard_once_for_each_call():
    """A layer that is used twice is heard twice, under its one name."""
    shared, notes = nn.Linear(2, 2), []
    net = nn.Sequential(shared, nn.ReLU(), shared)
    with listen(choose(net).layers, heard_by(notes)):
        net(torch.ones(1, 2))
    assert [name for name, *_ in notes] == ["0", "1", "0"]


def test_two_listeners_do_not_disturb_each_other():
    """A block inside another ends without ending the outer one."""
    module, outer, inner = nn.Identity(), [], []
    with listen({"": module}, heard_by(outer)):
        with listen({"": module}, heard_by(inner)):
            module(torch.ones(1))
        module(torch.ones(1))
    assert (len(outer), len(inner)) == (2, 1)


def test_a_copied_model_does_not_copy_the_listener():
    """Deep-copying the model inside the block leaves the owner of the listener uncopied."""

    class Owner:
        def hear(self, *_):
            pass

        def __deepcopy__(self, memo):
            raise AssertionError("the listener's owner was copied")

    net = nested()
    with listen(choose(net).layers, Owner().hear):
        twin = copy.deepcopy(net)
    assert twin.head is not net.head


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputation_is_not_heard_again(reentrant):
    """A pass that activation checkpointing repeats inside backward is heard once."""
    notes, runs = [], []

    class Counted(nn.Linear):
        def forward(self, x):
            runs.append(x)
            return super().forward(x)

    layer, x = Counted(2, 2), torch.ones(1, 2, requires_grad=True)
    with listen({"": layer}, heard_by(notes)):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert (len(runs), len(notes)) == (2, 1)


def test_who_listens_already_hears_nothing_of_a_deaf_block():
    """Neither before nor after a pass is a listener called, at any depth; afterwards it hears again."""
    module, notes = nn.Identity(), []
    with listen({"": module}, heard_by(notes), lambda *_: notes.append("before")):
        with deaf():
            module(torch.ones(1))
            with deaf():
                module(torch.ones(1))
            module(torch.ones(1))
        assert notes == []
        module(torch.ones(1))
    assert len(notes) == 2


def test_who_begins_to_listen_inside_a_deaf_block_hears_it():
    """The block's own listener hears, but not what runs in a further block."""
    module, notes = nn.Identity(), []
    with deaf(), listen({"": module}, heard_by(notes)):
        module(torch.ones(1))
        with deaf():
            module(torch.ones(1))
    assert len(notes) == 1


def test_a_deaf_block_ends_with_an_exception():
    """An exception goes through, and listeners hear again."""
    module, notes = nn.Linear(2, 2), []
    with listen({"": module}, heard_by(notes)):
        with pytest.raises(RuntimeError, match="shapes"), deaf():
            module(torch.ones(1, 3))
        module(torch.ones(1, 2))
    assert len(notes) == 1


def test_another_thread_is_heard_during_a_deaf_block():
    """A block is deaf to its own thread alone: another model that trains elsewhere is heard."""
    module, notes = nn.Identity(), []
    with listen({"": module}, heard_by(notes)), deaf():
        thread = Thread(target=module, args=(torch.ones(1),))
        thread.start()
        thread.join()
    assert len(notes) == 1


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass
class Sample:
    image: Any
    meta: Any = None


T = torch.ones(1)


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        pytest.param(T, ["b"], id="tensor"),
        pytest.param(nn.Parameter(T), ["b"], id="parameter"),
        pytest.param((T, [T]), ["b[0]", "b[1][0]"], id="tuple and list"),
        pytest.param({"a": T, 3: T}, ["b['a']", "b[3]"], id="dictionary"),
        pytest.param(OrderedDict(z=T, a=T), ["b['z']", "b['a']"], id="order is kept"),
        pytest.param(Point(T, 2), ["b[0]"], id="named tuple"),
        pytest.param(Sample(T, {"k": (T,)}), ["b.image", "b.meta['k'][0]"], id="dataclass"),
        pytest.param([Sample({"p": Point(1, T)})], ["b[0].image['p'][1]"], id="nested"),
        pytest.param([None, "text", 1.0, Sample], [], id="no tensor"),
        pytest.param([], [], id="empty"),
    ],
)
def test_tensors_are_found_in_any_container(value, paths):
    """Every tensor of tuples, lists, mappings and dataclasses comes with its path."""
    found = list(tensors_in(value, "b"))
    assert [path for path, _ in found] == paths
    assert all(isinstance(x, torch.Tensor) for _, x in found)
