# SPDX-License-Identifier: Apache-2.0
"""The recipes of this package: names, questions and texts, in the wheel and in a checkout alike."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

SUFFIX = ".yaml"


def folder() -> Traversable:
    """Where the recipes are: inside the installed package, or beside the package in a checkout."""
    package = files("lightning_bn")
    inside = package / "recipes"
    return inside if inside.is_dir() else Path(str(package)).parent / "recipes"


def names() -> list[str]:
    """Names of all recipes, in alphabetical order."""
    return sorted(entry.name.removesuffix(SUFFIX) for entry in folder().iterdir() if entry.name.endswith(SUFFIX))


def text(name: str) -> str:
    """The YAML of a recipe.

    Args:
        name: its name, as in ``lbn://NAME``; ``NAME.yaml`` is the same.

    Raises:
        FileNotFoundError: where there is none of that name.
    """
    plain = name.removesuffix(SUFFIX)
    if plain not in names():
        near = get_close_matches(plain, names(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"NAME must be one of the recipes {', '.join(names())}, got {name!r}{hint}")
    return (folder() / f"{plain}{SUFFIX}").read_text(encoding="utf-8")


def question(name: str) -> str:
    """The question that a recipe answers: the first line of its header."""
    return text(name).splitlines()[0].removeprefix("#").strip()


def copy(name: str, target: str | None = None, *, force: bool = False) -> Path:
    """Copy a recipe, so that it can be changed.

    Args:
        name: which recipe.
        target: file or folder; None is ``NAME.yaml`` in the working directory.
        force: whether a file that is there may be overwritten.

    Returns:
        The path of the copy.

    Raises:
        FileNotFoundError: where there is no recipe of that name.
        FileExistsError: where the file is there, and ``force`` is not given.
    """
    content = text(name)
    path = Path(target or ".")
    if path.is_dir():
        path /= f"{name.removesuffix(SUFFIX)}{SUFFIX}"
    if path.exists() and not force:
        raise FileExistsError(f"FILE must be a file that is not there yet, got {path}; --force overwrites it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path
