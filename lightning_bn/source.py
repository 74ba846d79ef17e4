# SPDX-License-Identifier: Apache-2.0
"""Which line of the user's code, and which module, an operation that runs now belongs to."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn

from lightning_bn.taps import is_below, plain_name

PACKAGE = Path(__file__).parent
LIBRARIES = frozenset({"torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "functorch"})
"""Packages whose lines say nothing to a user: the line that called them does."""
TORCH, STANDARD = Path(torch.__file__).parent, Path(linecache.__file__).parent
CALL: CodeType = nn.Module._call_impl.__code__  # noqa: SLF001  (the frame of every module that runs; no public name)


@dataclass(frozen=True)
class Line:
    """A line of source code.

    Args:
        file: path of the file, relative to the working directory where it lies below it.
        number: line number, counted from 1.
        function: name of the function.
        code: the text of the line without its indentation; empty where the source cannot be read.
    """

    file: str
    number: int
    function: str
    code: str

    def describe(self) -> str:
        """The line as a person would quote it."""
        quoted = f": `{self.code}`" if self.code else ""
        return f"{self.file}:{self.number} in {self.function}{quoted}"


@dataclass(frozen=True)
class Spot:
    """Where in a program something runs.

    Args:
        layer: path of the innermost module that runs; empty outside of all submodules.
        kind: class name of that module; empty where none runs.
        line: innermost line outside of torch, Lightning and this package; None where there is none.
        caller: where ``line`` lies in an installed package, the innermost line that does not; else None.
    """

    layer: str
    kind: str
    line: Line | None
    caller: Line | None = None


class Names:
    """All paths of every module of a model.

    Args:
        model: the network; its own path is the empty string.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(plain_name(path))

    def path(self, running: Iterable[nn.Module]) -> str | None:
        """The path of the innermost of some modules that run inside each other; of a shared one, below the others.

        Args:
            running: modules, outermost first; unknown ones are passed over.
        """
        top: str | None = None
        for module in running:
            paths = self._paths.get(id(module), [])
            if paths and top not in paths:  # a module has a frame for its call and one for its forward method
                top = next((path for path in paths if top is not None and is_below(path, top)), paths[0])
        return top


def spot(names: Names, outermost: CodeType | None = None) -> Spot:
    """Where the caller of this function was called from, as far as a user is concerned.

    Args:
        names: the modules of the model.
        outermost: the walk up the stack ends at a frame of this code; None walks to the end.
    """
    running: list[nn.Module] = []
    lines: list[tuple[str, int, str]] = []
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  (a public function, despite its name)
    while frame is not None and frame.f_code is not outermost:
        code = frame.f_code
        if code is CALL or code.co_name == "forward":
            module = frame.f_locals.get("self")
            running.extend([module] if isinstance(module, nn.Module) else [])
        if _is_of_interest(code.co_filename):
            lines.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    layer = names.path(reversed(running))
    kind = next((type(module).__name__ for module in running if names.path([module]) is not None), "")
    line = lines[0] if lines else None
    outside = next((entry for entry in lines if not _is_installed(entry[0])), None)
    return Spot(layer or "", kind, _line(line), _line(outside) if outside != line else None)


@cache
def _is_of_interest(file: str) -> bool:
    """Whether a line of this file can be what a user looks for."""
    if file.startswith("<") and not file.startswith("<ipython"):
        return False
    path = Path(file)
    if PACKAGE in path.parents:
        return PACKAGE / "demo" in path.parents
    if TORCH in path.parents or _library_of(path) in LIBRARIES:
        return False
    return path.parent != STANDARD  # a decorator or context manager of the standard library


@cache
def _is_installed(file: str) -> bool:
    return _library_of(Path(file)) is not None


def _library_of(path: Path) -> str | None:
    """The top-level package of a file below ``site-packages``."""
    for folder in ("site-packages", "dist-packages"):
        if folder in path.parts:
            return path.parts[path.parts.index(folder) + 1]
    return None


def _line(entry: tuple[str, int, str] | None) -> Line | None:
    if entry is None:
        return None
    file, number, function = entry
    path, here = Path(file), Path.cwd()
    shown = str(path.relative_to(here)) if path.is_relative_to(here) else file
    return Line(shown, number, function, linecache.getline(file, number).strip())
