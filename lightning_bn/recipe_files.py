# SPDX-License-Identifier: Apache-2.0
"""``lbn://NAME``: the recipes as files, for everything that opens files through fsspec, as LightningCLI does."""

from __future__ import annotations

import io
import sys
from typing import Any

from fsspec import AbstractFileSystem

from lightning_bn import catalogue

SCHEME = "lbn"
OPENED: list[str] = []
"""Names of the recipes that were opened in this process, in order."""

_REFUSED: set[str] = set()


class RecipeFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A read-only file system of the recipes."""

    protocol = SCHEME
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.split("://", 1)[-1].strip("/")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002  (fsspec's signature)
        """Name, size and type of a recipe, or of the folder of all.

        Args:
            path: name of a recipe, with or without ``lbn://`` and ``.yaml``.
            kwargs: not used.

        Raises:
            FileNotFoundError: where there is no such recipe.
        """
        name = self._strip_protocol(path)
        if not name:
            return {"name": name, "size": 0, "type": "directory"}
        return {"name": name, "size": len(_content(name)), "type": "file"}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:  # noqa: ARG002, FBT001, FBT002  (the same)
        """All recipes.

        Args:
            path: nothing, for the folder of all; a name gives that recipe alone.
            detail: whether to give :meth:`info` of each instead of names.
            kwargs: not used.
        """
        name = self._strip_protocol(path)
        found = [name] if name else catalogue.names()
        return [self.info(entry) for entry in found] if detail else found

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:  # noqa: ARG002  (the same)
        if mode != "rb":
            raise ValueError(f"mode must be rb, as recipes are read-only, got {mode!r}")
        name = self._strip_protocol(path)
        content = _content(name)
        OPENED.append(name)
        return io.BytesIO(content)


def _content(name: str) -> bytes:
    try:
        return catalogue.text(name).encode()
    except FileNotFoundError as error:
        if name not in _REFUSED:  # said here, as who asks may make a bare "path does not exist" of it
            _REFUSED.add(name)
            print(f"lightning_bn: lbn://{name}: {error}", file=sys.stderr)  # noqa: T201
        raise
