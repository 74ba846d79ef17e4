# SPDX-License-Identifier: Apache-2.0
"""How often a monitor brings a value to the host in a step; a part of overhead.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from networks import Subject, fit
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "equal", "nonzero")
MOVES = ("_to_copy", "copy_")
COUNTED = 12


class Reads(TorchDispatchMode):
    """Counts the values that a device gives to the host, step by step, apart for the forward pass and the rest."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.forward = device, False
        self.steps: list[list[int]] = [[0, 0]]

    def turn(self, *_: object, forward: bool) -> None:
        """The forward pass begins or ends; within it nothing may wait for a GPU."""
        self.forward = forward
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if forward else "default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation that makes the host wait; called by torch."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        reads = name in READS and args[0].device.type == self.device
        comes = name in MOVES and out.device.type == "cpu" and args[name == "copy_"].device.type != "cpu"
        self.steps[-1][not self.forward] += reads or comes
        return out


def host_reads(subject: Subject, callbacks: list[Callback], device: str) -> list[list[int]]:
    """Values brought to the host in each step: in the forward pass, and in the rest of it."""
    reads = Reads(device)
    # The last callback sees the forward pass begin when the others have made ready, the first one sees it end.
    begins, ends = (partial(reads.turn, forward=forward) for forward in (True, False))
    last = LambdaCallback(on_train_batch_start=begins, on_train_batch_end=lambda *_: reads.steps.append([0, 0]))
    with reads:
        around = [LambdaCallback(on_before_backward=ends), *callbacks, last]
        fit(subject, around, device, max_steps=COUNTED, max_epochs=-1, log_every_n_steps=COUNTED)
    if any(getattr(callback, "off", False) for callback in callbacks):
        raise RuntimeError("a monitor that was watched has failed, so its reads were not all counted")
    return reads.steps[:COUNTED]


def print_reads(make: Callable[[], Callback], subjects: dict[str, Subject], device: str) -> None:
    """Count what a monitor brings to the host in a step, beyond what plain training does, and print a table."""
    print("\n| host reads of a step | forward pass | rest | forward pass, due | rest, due |\n|---|---:|---:|---:|---:|")
    for network, subject in subjects.items():
        plain, watched = (host_reads(subject, made, device) for made in ([], [make()]))
        cells = [watched[step][part] - plain[step][part] for step in (COUNTED // 2, -1) for part in (0, 1)]
        print(f"| {network} | {' | '.join(map(str, cells))} |", flush=True)
