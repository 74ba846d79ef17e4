# SPDX-License-Identifier: Apache-2.0
"""Undo what a watched pass writes in place to tensors that were there before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Writes:
    """Keeps a copy of each storage before the first write to it, and puts it back.

    A step may change parameters itself: a moving average of a teacher's weights, weights that are clipped, an
    optimizer of its own. Autograd's version counters are put back too, as the graph of the real step may hold them.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, Any, Any]] = {}

    def keep(self, x: Tensor) -> None:
        """Copy the memory of a tensor that is about to be written to, if it was not copied before."""
        storage: Any = x.untyped_storage()  # torch leaves its methods untyped
        identity = storage._cdata  # noqa: SLF001  (no public name)
        if identity not in self._kept:
            preserve: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]  # noqa: SLF001
            version = None if x.is_inference() else preserve(x)
            self._kept[identity] = (storage, storage.clone(), version)

    def put_back(self) -> None:
        """Give every storage that was kept its contents of before."""
        for storage, contents, version in self._kept.values():
            if storage.nbytes() == contents.nbytes():
                storage.copy_(contents)
            if version is not None:
                version.__exit__()
        self._kept.clear()
