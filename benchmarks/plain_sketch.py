# SPDX-License-Identifier: Apache-2.0
"""The least that statistics of every layer can cost: no rules, no units, no zeros, and nothing kept."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class PlainSketch(Callback):
    """Sum, sum of squares and range of what every module without submodules puts out, on every step.

    BatchNorm is read off its node in the graph. One transfer brings all numbers to the host, where they are dropped.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._found: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:  # noqa: ARG002  (Lightning's signature)
        """Listen."""
        leaves = (module for module in pl_module.modules() if not list(module.children()))
        self._handles = [module.register_forward_hook(self._hear) for module in leaves]

    def on_train_batch_end(self, *_: object) -> None:
        """Bring the numbers to the host."""
        for handle in self._handles:
            handle.remove()
        if self._found:
            torch.cat(self._found).cpu().numpy()
        self._found = []

    def _hear(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002  (torch's signature)
        if not isinstance(output, Tensor):
            return
        with torch.no_grad():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and output.grad_fn is not None:  # noqa: SLF001
                node: Any = output.grad_fn
                self._found += [node._saved_result1, node._saved_result2]  # noqa: SLF001  (torch's own names)
                return
            flat = output.detach().reshape(-1)
            self._found.append(torch.stack([flat.sum(), torch.dot(flat, flat), *torch.aminmax(flat)]))
