# SPDX-License-Identifier: Apache-2.0
"""Keep the batch that made a step bad, with all that is needed to run it again."""

from __future__ import annotations

import io
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import fsspec
import torch
from torch import Tensor

from lightning_bn.callbacks.base import epoch_of, step_of
from lightning_bn.callbacks.retrace import Case
from lightning_bn.callbacks.snapshot import Snapshot, Streams
from lightning_bn.rules.diverged_by_learning_rate import History

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

FORMAT = 1


def pack(trainer: Trainer, pl_module: LightningModule, case: Case, history: History) -> dict[str, Any]:
    """A step as plain containers and tensors: what ``torch.load(weights_only=True)`` reads.

    Args:
        trainer: the trainer, before the weights change.
        pl_module: its model; its weights are the present ones, its buffers those before the step.
        case: the step.
        history: loss and weights before it.

    Raises:
        TypeError: where the batch holds anything else than tensors, numbers, strings and plain containers of them.
    """
    model = {name: x.detach().cpu().clone() for name, x in pl_module.state_dict().items()}
    streams = None
    if case.snapshot is not None:
        before = {name: x.cpu() for name, x in case.snapshot.buffers().items()}
        model |= {name: x for name, x in before.items() if name in model}
        streams = case.snapshot.streams.to_plain()
    packed = {
        "format": FORMAT,
        "stage": case.stage,
        "step": step_of(trainer),
        "epoch": epoch_of(trainer),
        "rank": trainer.global_rank,
        "batch": case.batch,
        "batch_idx": case.batch_idx,
        "dataloader_idx": case.dataloader_idx,
        "streams": streams,
        "history": {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(history).items()},
        "state_dict": model,
    }
    buffer = io.BytesIO()
    try:
        torch.save(packed, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True, map_location="cpu")
    except Exception as error:
        kind = type(case.batch).__name__
        raise TypeError(
            f"the batch must be tensors, numbers, strings and plain containers of them to be saved, got {kind}"
        ) from error
    return packed


def write_case(path: str, packed: dict[str, Any]) -> None:
    """Write a packed step.

    Args:
        path: where to, local or any URL that fsspec can write to.
        packed: what :func:`pack` made.
    """
    filesystem, place = fsspec.core.url_to_fs(path)
    filesystem.makedirs(filesystem._parent(place), exist_ok=True)  # noqa: SLF001  (fsspec's own path splitting)
    with filesystem.open(place, "wb") as file:
        torch.save(packed, file)


def read_case(path: str | os.PathLike[str], model: torch.nn.Module | None = None) -> tuple[Case, dict[str, Any]]:
    """Read a step that was saved beside the findings.

    Args:
        path: the file.
        model: takes over the saved weights and buffers, and tells to which device the batch goes; None for neither.

    Returns:
        The step, and everything that the file holds.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file is none of these.
    """
    filesystem, place = fsspec.core.url_to_fs(os.fspath(path))
    if not filesystem.exists(place):
        raise FileNotFoundError(
            f"path must be a saved step (batch_*.pt), got {os.fspath(path)!r}, which does not exist"
        )
    try:
        packed = torch.load(io.BytesIO(filesystem.cat_file(place)), weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(
            f"path must be a saved step (batch_*.pt), got {os.fspath(path)!r}, which torch.load refuses"
        ) from error
    if not isinstance(packed, dict) or packed.get("format") != FORMAT:
        raise ValueError(f"path must be a saved step of format {FORMAT}, got {os.fspath(path)!r}")
    snapshot, batch = None, packed["batch"]
    if model is not None:
        model.load_state_dict(packed["state_dict"])
        device = next((x.device for x in model.parameters()), torch.device("cpu"))
        batch = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), batch)  # noqa: SLF001  (no public name)
        if packed["streams"] is not None:
            snapshot = Snapshot(model)
            snapshot.take()
            snapshot.streams = Streams.from_plain(packed["streams"])
    return Case(packed["stage"], batch, packed["batch_idx"], packed["dataloader_idx"], snapshot), packed
