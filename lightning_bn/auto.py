# SPDX-License-Identifier: Apache-2.0
"""``LIGHTNING_BN=NAME python train.py``: the callbacks of a recipe in every Trainer of a process.

Lightning calls :func:`factory` once for each Trainer that is made, of any project, wherever this package is installed.
It imports nothing unless there is something to attach, and it never raises.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bn.callbacks.base import Monitor

VARIABLE = "LIGHTNING_BN"
"""The environment variable: names of recipes, or paths of YAML files in their form, with commas between them."""

NOTHING = {"", "0"}

_witnessed: list[str] = []


def factory() -> list[Monitor]:
    """The callbacks that Lightning adds to a new Trainer.

    Returns:
        Those of the recipes that ``LIGHTNING_BN`` names; and, for the first Trainer of a process whose command line
        names callbacks of this package, a witness that they get there. Where something is wrong with either,
        a message on stderr takes its place.
    """
    words = os.environ.get(VARIABLE, "").strip()
    asked = _safely(f"{VARIABLE}={words} attaches nothing", lambda: [] if words in NOTHING else attach(words))
    return asked + _safely("whether callbacks of a config got lost is not watched", _witness)


def _safely(failing: str, make: Callable[[], list[Monitor]]) -> list[Monitor]:
    """What a function makes; where it fails nothing, and a message, as an error would stop every Trainer."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001  (whatever it is)
        print(f"lightning_bn: {failing}: {error}", file=sys.stderr)  # noqa: T201
        return []


def attach(words: str) -> list[Monitor]:
    """The callbacks of recipes, each class once.

    Args:
        words: names of recipes, or paths of YAML files in their form, with commas between them.

    Raises:
        FileNotFoundError: where there is no such recipe or file.
        ValueError: where one holds no ``trainer: callbacks+:``, a callback of others, or a bad argument.
    """
    made: dict[str, Monitor] = {}
    for word in filter(None, (part.strip() for part in words.split(","))):
        for path, init_args in _entries(word):
            if path not in made:
                made[path] = _instance(path, init_args)
                made[path].added_by = f"{VARIABLE}={words}"
    return list(made.values())


def _entries(word: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Class path and arguments of each callback in a recipe."""
    import yaml  # noqa: PLC0415  (only where the variable is set, as all that follows)

    from lightning_bn import catalogue  # noqa: PLC0415

    is_file = word.endswith((".yaml", ".yml")) and Path(word).is_file()
    content = yaml.safe_load(Path(word).read_text(encoding="utf-8") if is_file else catalogue.text(word))
    trainer = content.get("trainer") if isinstance(content, Mapping) else None
    entries = trainer.get("callbacks+") if isinstance(trainer, Mapping) else None
    if not isinstance(entries, list):
        raise ValueError(f"{word} needs a list under trainer: callbacks+:, and has none")  # noqa: TRY004  (of a file)
    for entry in entries:
        path = entry if isinstance(entry, str) else entry.get("class_path", "")
        if not path.startswith("lightning_bn."):
            raise ValueError(f"a recipe needs callbacks of lightning_bn, got {path} in {word}; add others in your code")
        yield path, {} if isinstance(entry, str) else entry.get("init_args") or {}


def _instance(path: str, init_args: Mapping[str, Any]) -> Monitor:
    """A callback; its constructor checks the arguments."""
    module, _, name = path.rpartition(".")
    try:
        made: Monitor = getattr(importlib.import_module(module), name)(**init_args)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return made


def _witness() -> list[Monitor]:
    """For the first Trainer of a process whose command line names callbacks of ours."""
    words = sys.argv[1:]
    looks = any(word == "-c" or word.startswith(("--config", "--trainer")) for word in words)
    if _witnessed or not (looks or "lightning_bn.recipe_files" in sys.modules or _asks_by_environment()):
        return []
    from lightning_bn.promises import promises  # noqa: PLC0415  (most processes have nothing to look for)

    found = promises(words, os.environ)
    if not found:
        return []
    from lightning_bn.callbacks.witness import Witness  # noqa: PLC0415  (imports Lightning)

    _witnessed.extend(promise.source for promise in found)
    return [Witness(found)]


def _asks_by_environment() -> bool:
    return any(name.startswith("PL_") and name.endswith(("CONFIG", "CALLBACKS")) for name in os.environ)
