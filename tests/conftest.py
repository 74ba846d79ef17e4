# SPDX-License-Identifier: Apache-2.0
"""What several tests share: a quiet trainer, and projects of somebody else's."""

from __future__ import annotations

import logging

import pytest
import torch
from hosting import Hosting
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

collect_ignore = ["hosts"]  # projects of somebody else's, with no tests of ours in them

torch.set_num_threads(1)  # a worker for each core: more threads than cores wait for each other
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def make_trainer(tmp_path):
    """A factory of small CPU trainers that log to TensorBoard below ``tmp_path``."""

    def make(*callbacks, **options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": str(tmp_path),
            "logger": TensorBoardLogger(str(tmp_path), name="run", version=0),
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Runs projects that know nothing of this package, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Hosting(monkeypatch)
