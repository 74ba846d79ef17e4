# SPDX-License-Identifier: Apache-2.0
"""Whether layers get one row for each sample, which a training step may change before it calls the forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_bn.callbacks.base import is_compiled
from lightning_bn.findings import Finding
from lightning_bn.rules import few_values_per_channel, one_value_per_channel, unsynchronised_batchnorm
from lightning_bn.taps import listen, reachable, tensors_in

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

OF_ROWS = frozenset({few_values_per_channel.RULE, one_value_per_channel.RULE, unsynchronised_batchnorm.RULE})
"""Rules that count a sample as one row of a layer's input."""


class RowsHeard:
    """Keeps findings back that count a sample as one row, until a forward pass has shown whether it is one.

    A step that joins two views of its samples, as contrastive learning does, gives a layer twice as many rows.

    Args:
        findings: all findings, in their order; of those that count rows ``data["layers"]`` names the layers.
        samples: samples in the batch of that pass.
    """

    def __init__(self, findings: Sequence[Finding], samples: int) -> None:
        self._findings, self._samples = findings, samples
        self._rows: dict[str, int] = {}

    @property
    def waits(self) -> bool:
        """Whether any of them counts rows."""
        return any(finding.rule in OF_ROWS for finding in self._findings)

    def listening(self, pl_module: LightningModule) -> AbstractContextManager[None]:
        """Note how many rows each of the layers gets in its first call, while the block lasts.

        Compiled ones are left alone: hooks would be compiled with them.
        """
        wanted = {name for finding in self._findings if finding.rule in OF_ROWS for name in finding.data["layers"]}
        layers = {} if is_compiled(pl_module) else reachable(pl_module)[0]
        return listen({name: layers[name] for name in layers if name in wanted}, _nothing, self._expect)

    def settle(self) -> Iterator[Finding]:
        """The findings but those that count rows, and of which all layers that ran got more rows than samples."""
        for finding in self._findings:
            layers = finding.data["layers"] if finding.rule in OF_ROWS else ()
            rows = [self._rows[name] for name in layers if name in self._rows]
            # The first tensor of a batch need not be its samples.
            if not rows or min(rows) <= max(self._samples, finding.data.get("batch_size") or 0):
                yield finding

    def _expect(self, name: str, module: nn.Module, inputs: Any) -> None:
        x = next((x for _, x in tensors_in(inputs) if x.dim()), None)
        if x is not None:
            self._rows.setdefault(name, len(x))


def _nothing(*_: Any) -> None:
    """What is heard behind a layer does not matter."""
