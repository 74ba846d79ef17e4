# SPDX-License-Identifier: Apache-2.0
"""Check constructor arguments: every error says name, need and got."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from lightning_bn.rules import SLUGS


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of a few words.

    Raises:
        ValueError: where it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_interval(name: str, value: object, *, default: str) -> int | None:
    """A number of steps, at least 1, or None.

    Args:
        name: the argument.
        value: what was given.
        default: what None means, in words.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, or None ({default}), got {value!r}")
    return value


def check_share(name: str, value: object, *, default: str) -> float | None:
    """A number above 0 and at most 1, or None.

    Args:
        name: the argument.
        value: what was given.
        default: what None means, in words.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1, or None ({default}), got {value!r}")
    return float(value)


def check_count(name: str, value: object) -> int:
    """A whole number of at least 1.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def check_amount(name: str, value: object) -> float:
    """A number above 0.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def check_name(name: str, value: object, what: str) -> str:
    """A string that is not empty.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be the name {what}, got {value!r}")
    return value


def check_flag(name: str, value: object) -> bool:
    """True or False.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")  # noqa: TRY004  (as all arguments of ours)
    return value


def check_strings(name: str, value: object) -> tuple[str, ...] | None:
    """One string or several, or None.

    Raises:
        ValueError: for anything else, and for an empty list.
    """
    if value is None:
        return None
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{name} must be a string or a list of at least one string, or None, got {value!r}")
    return tuple(entries)


def check_rules(name: str, value: object) -> tuple[str, ...]:
    """Slugs of rules.

    Raises:
        ValueError: where one is no rule of this package.
    """
    slugs = () if value in (None, [], ()) else check_strings(name, value) or ()
    for slug in slugs:
        if slug not in SLUGS:
            nearest = ", ".join(get_close_matches(slug, SLUGS, n=3, cutoff=0.0))
            raise ValueError(f"{name} must name rules of lightning_bn (nearest: {nearest}), got {slug!r}")
    return slugs
