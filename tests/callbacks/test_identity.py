# SPDX-License-Identifier: Apache-2.0
"""Each instance has a checkpoint key of its own, and a resumed run finds its state again."""

from __future__ import annotations

import pytest

from lightning_bn.callbacks.identity import Identity, adopted_state


class Monitor(Identity):
    """Watches layers, at an interval that is no part of its identity."""

    watches = ("layers",)

    def __init__(self, layers=None, interval=1):
        self.layers = layers
        self.interval = interval


class Other(Monitor):
    """Another kind that watches the same."""


class MonitorExtended(Monitor):
    """Another kind, whose name begins like the first one's."""


def placed(*callbacks):
    """The callbacks after all of them took their place in one trainer."""
    for entry in callbacks:
        entry.take_place(callbacks)
    return list(callbacks)


def keys(callbacks):
    return [entry.state_key for entry in callbacks]


def test_a_key_is_made_of_class_and_what_is_watched():
    """The key holds the class's name and the arguments that say what is watched, by name, and no other."""
    assert keys(placed(Monitor(("a", "b"), interval=7))) == ["Monitor{'layers': ('a', 'b')}"]


def test_a_kind_that_watches_everything_is_keyed_by_its_class():
    """Without arguments that say what is watched the class alone makes the key."""
    assert keys(placed(Identity())) == ["Identity{}"]


def test_a_key_is_the_same_in_the_next_process():
    """A second instance in a trainer of its own, at another interval, has the key that the first one had."""
    assert keys(placed(Monitor("a", interval=1))) == keys(placed(Monitor("a", interval=2)))


def test_twins_are_numbered_by_their_place():
    """Instances that watch the same have distinct keys, in the order in which the trainer has them."""
    assert keys(placed(Monitor(), Monitor(), Monitor())) == [
        "Monitor{'layers': None}",
        "Monitor{'layers': None}#2",
        "Monitor{'layers': None}#3",
    ]


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([Monitor("b")], id="watches something else"),
        pytest.param([Other("a")], id="another class"),
        pytest.param([object(), "EarlyStopping"], id="foreign callbacks"),
    ],
)
def test_only_twins_need_a_number(others):
    """What watches something else, or is of another kind, does not count."""
    mine = Monitor("a")
    mine.take_place([*others, mine])
    assert mine.state_key == "Monitor{'layers': 'a'}"


def test_twins_without_a_place_are_told_apart():
    """Lightning asks for keys before any place is known, and refuses two that are the same."""
    first, second = Monitor(), Monitor()
    assert first.state_key != second.state_key


def test_a_place_is_taken_anew_in_each_trainer():
    """The second of two twins is the first in a trainer that has it alone."""
    _, second = placed(Monitor(), Monitor())
    second.take_place([second])
    assert second.state_key == "Monitor{'layers': None}"


def test_a_state_under_its_own_key_is_not_adopted():
    """Lightning itself restores a state whose key is there."""
    callbacks = placed(Monitor("a"))
    assert adopted_state(callbacks[0], callbacks, {callbacks[0].state_key: "mine"}) is None


def test_a_state_is_adopted_where_what_is_watched_changed():
    """The one state left over of a class goes to the one callback left over of it."""
    callbacks = placed(Monitor("new"))
    assert adopted_state(callbacks[0], callbacks, {"Monitor{'layers': 'old'}": "state"}) == "state"


def test_states_are_adopted_in_order():
    """What is left over in the checkpoint goes to what is left over in the trainer, in order."""
    states = dict(zip(keys(placed(Monitor("a"), Monitor("b"))), ["first", "second"], strict=True))
    callbacks = placed(Monitor("x"), Monitor("y"))
    assert [adopted_state(entry, callbacks, states) for entry in callbacks] == ["first", "second"]


def test_only_what_is_left_over_is_adopted():
    """A state whose callback is there, and a callback whose state is there, take no part."""
    states = dict(zip(keys(placed(Monitor("old"), Monitor("kept"))), ["old", "kept"], strict=True))
    callbacks = placed(Monitor("kept"), Monitor("new"))
    assert [adopted_state(entry, callbacks, states) for entry in callbacks] == [None, "old"]


@pytest.mark.parametrize(
    ("before", "adopted"),
    [
        pytest.param([Monitor("x")], ["x", None], id="one state for two"),
        pytest.param([], [None, None], id="no state"),
        pytest.param([Monitor("x"), Monitor("y"), Monitor("z")], ["x", "y"], id="a state too many"),
    ],
)
def test_what_has_no_counterpart_starts_afresh(before, adopted):
    """Callbacks beyond the states that are left over adopt nothing, and no state is given twice."""
    states = {entry.state_key: entry.layers for entry in placed(*before)}
    callbacks = placed(Monitor("a"), Monitor("b"))
    assert [adopted_state(entry, callbacks, states) for entry in callbacks] == adopted


def test_a_twin_too_many_is_adopted_by_no_one_who_has_a_state():
    """Of two twins one was dropped: the one that stayed has its state, under the first key."""
    states = dict(zip(keys(placed(Monitor(), Monitor())), ["first", "second"], strict=True))
    (mine,) = placed(Monitor())
    assert adopted_state(mine, [mine], states) is None


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("Other{'layers': 'a'}", id="another class"),
        pytest.param("MonitorExtended{'layers': 'a'}", id="a name that begins alike"),
        pytest.param("Monitor", id="no arguments"),
        pytest.param(7, id="no string"),
    ],
)
def test_states_of_other_callbacks_are_left_alone(key):
    """A state under a key of another class is never adopted."""
    (mine,) = placed(Monitor())
    assert adopted_state(mine, [mine, object()], {key: "foreign"}) is None


def test_a_subclass_takes_nothing_from_its_parent():
    """Kinds are told apart exactly: a state of the parent class is not a state of the child."""
    callbacks = placed(MonitorExtended("new"), Monitor("new"))
    states = {"Monitor{'layers': 'old'}": "parent's"}
    assert [adopted_state(entry, callbacks, states) for entry in callbacks] == [None, "parent's"]


def test_a_callback_that_the_trainer_does_not_have_adopts_nothing():
    """States are shared out among the trainer's callbacks alone."""
    assert adopted_state(Monitor("new"), [], {"Monitor{'layers': 'old'}": "state"}) is None
