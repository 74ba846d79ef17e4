# SPDX-License-Identifier: Apache-2.0
"""SwapBatchNorm in two processes, started by test_swap_batchnorm.py; each rank leaves a JSON file."""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from specimens import BuiltInConfigureModel, Healthy, loader, network
from torch import nn

from lightning_bn import SwapBatchNorm, find_batchnorm, swap_batchnorm

SMALL = {"groups": 4, "fewest": 2}
TIMEOUT = timedelta(seconds=60)


class Convolutional(Healthy):
    """Takes the features for maps of 3 channels; ``flat`` adds a BatchNorm of vectors."""

    def __init__(self, *, flat=False):
        head = [nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)] if flat else [nn.Linear(24, 4)]
        convolution = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 6, 3, padding=1))
        super().__init__(nn.Sequential(convolution, nn.BatchNorm2d(6), nn.Flatten(), *head))


class OwnData(Healthy):
    """Brings its data."""

    def train_dataloader(self):
        return loader()


class BuiltLate(OwnData, BuiltInConfigureModel):
    """The same, built in ``configure_model``."""


class SwappedLate(BuiltLate):
    """The same, swapped by hand where it is built."""

    def configure_model(self):
        super().configure_model()
        swap_batchnorm(self, **SMALL)


class Sharded(BuiltLate):
    """Shards its layers with FSDP2 in ``configure_model``."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  (a heavy import)

        self.net = network()
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


MODELS = {
    "__init__": OwnData,
    "__init__, by hand": lambda: swapped_by_hand(OwnData()),
    "configure_model": BuiltLate,
    "configure_model, by hand": SwappedLate,
    "sharded": Sharded,
    "spawned": OwnData,
}


def swapped_by_hand(model: nn.Module) -> nn.Module:
    swap_batchnorm(model, **SMALL)
    return model


def weights_of(model: LightningModule) -> dict[str, list[float]]:
    return {name: x.detach().flatten().tolist() for name, x in model.state_dict().items()}


def trainer_for(scenario: str, root: str, *callbacks: object, epochs: int) -> Trainer:
    sharded = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", timeout=TIMEOUT
    )
    start = "spawn" if scenario == "spawned" else "popen"
    data_parallel = DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT, start_method=start)
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sharded if scenario == "sharded" else data_parallel,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=root,
    )


def main(scenario: str, root: str) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    seed_everything(1 + rank, verbose=False)  # ranks that would start differently by themselves
    model, callbacks = MODELS[scenario](), [] if "by hand" in scenario else [SwapBatchNorm(**SMALL)]
    report = {"error": None}
    try:
        trainer = trainer_for(scenario, root, *callbacks, epochs=1)
        trainer.fit(model)
    except ValueError as error:
        report["error"] = str(error)
    else:
        report |= {
            "weights": weights_of(model),
            "batchnorm": list(find_batchnorm(model)),
            "findings": [finding.rule for callback in callbacks for finding in callback.findings],
        }
        if scenario in {"__init__", "configure_model"}:
            path = Path(root, "first.ckpt")
            trainer.save_checkpoint(path)
            again = MODELS[scenario]()
            trainer_for(scenario, root, SwapBatchNorm(**SMALL), epochs=1).fit(again, ckpt_path=path)
            report["resumed"] = weights_of(again)
    Path(root).mkdir(exist_ok=True)
    Path(root, f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
