# SPDX-License-Identifier: Apache-2.0
"""WeightInit in two processes, started by test_init_matrix.py: all lives of all models; each rank leaves a file."""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from init_lives import BUILT, LIVES, Sharded, summary, without_us
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

warnings.simplefilter("ignore")
RANK = int(os.environ.get("RANK", "0"))
STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)),
    "fsdp2": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", timeout=timedelta(seconds=60)
    ),
}


def maker(strategy: str, root: str):
    """A factory of trainers for two processes."""

    def make(*callbacks, **options):
        defaults = {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": STRATEGIES[strategy](),
            "max_epochs": 1,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "default_root_dir": root,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make


def lead(strategy: str, built: str, life: str, root: Path) -> dict:
    """One life of one model on this rank; where it fails, how it fails without WeightInit."""
    build = Sharded if strategy == "fsdp2" else BUILT[built]
    try:
        seed_everything(1 + RANK, verbose=False)  # ranks that would start differently by themselves
        return summary(LIVES[life](build, maker(strategy, str(root)), root))
    except Exception as error:  # noqa: BLE001  (the test compares it with the one below)
        with_us = type(error).__name__
    try:
        LIVES[life](build, without_us(maker(strategy, str(root))), root)
    except Exception as error:  # noqa: BLE001
        return {"error": with_us, "without us": type(error).__name__}
    return {"error": with_us, "without us": None}


def main(strategy: str, root: str) -> None:
    """All lives."""
    places = ["configure_model"] if strategy == "fsdp2" else list(BUILT)
    found = {}
    for built in places:
        for life in LIVES:
            shared = Path(root, f"{built}-{life}".replace(" ", "_"))
            shared.mkdir(exist_ok=True)
            found[f"{built}, {life}"] = lead(strategy, built, life, shared)
    Path(root, f"rank{RANK}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
