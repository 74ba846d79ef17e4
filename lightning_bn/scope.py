# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model are meant: shell patterns and module types, to include and to exclude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from lightning_bn.taps import plain_name


@dataclass(frozen=True)
class Scope:
    """What is included, less what is excluded.

    An entry is a shell pattern on module paths (``encoder.*``; a star also crosses dots), which means a module with
    everything below it; or a pattern on parameter paths (``*.bias``); or the name of a module class, of its own or
    of a base (``Conv2d``, ``nn.Linear``), which means the module with everything below it.

    Args:
        include: entries; None is everything.
        exclude: entries.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Conv2d(1, 1, 1)))
        >>> Scope(exclude=["Conv2d"]).outside(model)
        {'1.0.weight': 'excluded (Conv2d)', '1.0.bias': 'excluded (Conv2d)'}
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def outside(self, model: nn.Module) -> dict[str, str]:
        """The parameters that are not meant, by path, with the reason."""
        names = _names(model)
        found = {}
        for parameter, ways in names.items():
            excluded = next((entry for entry in self.exclude if _matches(entry, ways)), None)
            if excluded is not None:
                found[parameter] = f"excluded ({excluded})"
            elif self.include is not None and not any(_matches(entry, ways) for entry in self.include):
                found[parameter] = "not included"
        return found

    def unmatched(self, model: nn.Module) -> list[tuple[str, str, list[str]]]:
        """Entries that mean nothing in a model: argument, entry, and the nearest names that mean something."""
        ways = list(_names(model).values())
        known = sorted({name for way in ways for name in way if name})
        return [
            (argument, entry, get_close_matches(entry.replace("*", ""), known, n=3, cutoff=0.0))
            for argument, entries in (("include", self.include or ()), ("exclude", self.exclude))
            for entry in entries
            if not any(_matches(entry, way) for way in ways)
        ]


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter everything that an entry may call it by: its path, and paths and classes of its modules."""
    modules = {path: (plain_name(path), *_classes(module)) for path, module in model.named_modules()}
    found: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        parts = path.split(".") if path else []
        above = (".".join(parts[:length]) for length in range(len(parts) + 1))
        ways = tuple(dict.fromkeys(name for way in above for name in modules[way]))
        for own, _ in module.named_parameters(recurse=False):
            parameter = plain_name(f"{path}.{own}" if path else own)
            found[parameter] = (parameter, *ways)
    return found


def _classes(module: nn.Module) -> tuple[str, ...]:
    own, *bases = type(module).__mro__[: type(module).__mro__.index(nn.Module)] or (nn.Module,)
    return (own.__name__, *(kind.__name__ for kind in bases if not kind.__name__.startswith("_")))


def _matches(entry: str, ways: tuple[str, ...]) -> bool:
    plain = entry.removeprefix("torch.").removeprefix("nn.")
    return any(fnmatchcase(way, entry) or way == plain for way in ways)
