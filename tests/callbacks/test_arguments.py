# SPDX-License-Identifier: Apache-2.0
"""A wrong constructor argument is an error that says its name, what it needs and what it got."""

from __future__ import annotations

import re

import pytest

from lightning_bn.callbacks.arguments import check_choice, check_interval, check_rules, check_strings
from lightning_bn.rules import SLUGS


@pytest.mark.parametrize("value", ["raise", "stop"])
def test_a_choice_is_given_back(value):
    """One of the words offered is taken as it is."""
    assert check_choice("action", value, ("raise", "stop")) == value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("Raise", id="wrong case"),
        pytest.param("", id="empty"),
        pytest.param(None, id="None"),
        pytest.param(True, id="bool"),
        pytest.param(["raise"], id="list"),
    ],
)
def test_any_other_choice_is_an_error(value):
    """The error names the argument, lists the words and shows what was given."""
    with pytest.raises(ValueError, match=re.escape(f"action must be one of raise, stop, got {value!r}")):
        check_choice("action", value, ("raise", "stop"))


@pytest.mark.parametrize("value", [1, 50, None])
def test_an_interval_is_given_back(value):
    """Whole numbers from 1 and None are taken as they are."""
    assert check_interval("every_n_steps", value, default="log_every_n_steps") == value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(0, id="just below the limit"),
        pytest.param(-3, id="negative"),
        pytest.param(2.0, id="float"),
        pytest.param("5", id="string"),
        pytest.param(True, id="bool"),
    ],
)
def test_any_other_interval_is_an_error(value):
    """The error names the argument, the limit, the meaning of None and what was given."""
    text = f"every_n_steps must be a whole number of at least 1, or None (as the trainer), got {value!r}"
    with pytest.raises(ValueError, match=re.escape(text)):
        check_interval("every_n_steps", value, default="as the trainer")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("net.*", ("net.*",), id="one string"),
        pytest.param(["a", "b"], ("a", "b"), id="list"),
        pytest.param(("a",), ("a",), id="tuple"),
        pytest.param(None, None, id="None"),
    ],
)
def test_strings_become_a_tuple(value, expected):
    """One string or several become a tuple, so that the caller's list is not kept."""
    assert check_strings("layers", value) == expected


@pytest.mark.parametrize(
    "value",
    [
        pytest.param([], id="empty list"),
        pytest.param((), id="empty tuple"),
        pytest.param([1], id="number inside"),
        pytest.param(["a", None], id="None inside"),
        pytest.param(3, id="number"),
        pytest.param({"a": 1}, id="dictionary"),
    ],
)
def test_anything_but_strings_is_an_error(value):
    """The error names the argument, what it takes and what was given."""
    text = f"layers must be a string or a list of at least one string, or None, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(text)):
        check_strings("layers", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(None, (), id="None"),
        pytest.param([], (), id="empty list"),
        pytest.param("not-watched", ("not-watched",), id="one slug"),
        pytest.param(["not-watched", "affine-drift"], ("not-watched", "affine-drift"), id="two slugs"),
        pytest.param(list(SLUGS), SLUGS, id="every slug"),
    ],
)
def test_slugs_of_rules_become_a_tuple(value, expected):
    """None, one slug or several become a tuple."""
    assert check_rules("ignore", value) == expected


@pytest.mark.parametrize(
    ("value", "wrong", "near"),
    [
        pytest.param("non-finite-outputs", "non-finite-outputs", "non-finite-output", id="plural"),
        pytest.param(["not-watched", "afine-drift"], "afine-drift", "affine-drift", id="the second of two"),
        pytest.param(["not_watched"], "not_watched", "not-watched", id="underscore"),
    ],
)
def test_an_unknown_slug_is_an_error_with_the_nearest_slugs(value, wrong, near):
    """The error names the argument, shows the wrong slug and begins its proposals with the nearest one."""
    text = rf"ignore must name rules of lightning_bn \(nearest: {near}, [a-z-]+, [a-z-]+\), got '{wrong}'$"
    with pytest.raises(ValueError, match=text):
        check_rules("ignore", value)


@pytest.mark.parametrize("value", [pytest.param(3, id="number"), pytest.param([None], id="None inside")])
def test_rules_that_are_no_strings_are_an_error(value):
    """The error names the argument and shows what was given."""
    with pytest.raises(
        ValueError, match=re.escape(f"ignore must be a string or a list of at least one string, or None, got {value!r}")
    ):
        check_rules("ignore", value)
