# SPDX-License-Identifier: Apache-2.0
"""How several layers are told in one finding."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, of many the first three.

    Example:
        >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c", "d", "e"])
        ('a', 'a and b', 'a, b, c and 2 more')
    """
    more = len(names) - SHOWN
    parts = [*names[:SHOWN], *([f"{more} more"] if more > 0 else [])]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def counted(number: int, what: str) -> str:
    """A number of things, in the plural where there are several.

    Example:
        >>> counted(1, "layer"), counted(1536, "value")
        ('1 layer', '1,536 values')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def the_one(names: Sequence[str]) -> str | None:
    """The layer that a finding is about; None where there are several."""
    return names[0] if len(names) == 1 else None
