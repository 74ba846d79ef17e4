# SPDX-License-Identifier: Apache-2.0
"""Where a model's layers are built, and what lives it leads: shared by the tests in one and in two processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from specimens import BuiltInConfigureModel, BuiltInSetup, Healthy, loader, network
from torch import nn

from lightning_bn import WeightInit, initialize

SEED = 7


class Still:
    """Mixin: the optimizer does not move the weights, so that they can be compared after a fit; it has its data."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()


class StillBuiltInInit(Still, Healthy):
    """Builds its layers in ``__init__``."""


class StillBuiltInSetup(Still, BuiltInSetup):
    """Builds its layers in ``setup``."""


class StillBuiltInConfigureModel(Still, BuiltInConfigureModel):
    """Builds its layers in ``configure_model``."""


class Lazy(StillBuiltInInit):
    """Its first layer gets its parameters in its first forward pass, and so does a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.net[0], self.net[1] = nn.LazyLinear(self.net[0].out_features), nn.LazyBatchNorm1d()


class Sharded(StillBuiltInConfigureModel):
    """Shards its layers with FSDP2 in ``configure_model``."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

        if self.net is None:
            self.net = network()
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


BUILT = {
    "__init__": StillBuiltInInit,
    "setup": StillBuiltInSetup,
    "configure_model": StillBuiltInConfigureModel,
    "lazy": Lazy,
}


@dataclass
class Life:
    """What is left of a model at the end.

    Args:
        model: the model.
        expected: seed of the initialisation that its weights must have; or the weights themselves.
        notes: rules of the findings.
        off: whether a monitor switched itself off.
    """

    model: nn.Module
    expected: Any
    notes: list[str]
    off: bool


def digest(model: nn.Module) -> list[list[Any]]:
    """Name, sum and sum of squares of every parameter; of a sharded one of the whole."""
    rows = []
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        values = whole.detach().double()
        rows.append([name, float(values.sum()), float(values.square().sum())])
    return rows


def expected_digest(seed: int) -> list[list[Any]]:
    """The same of the specimen's network as the scheme fills it under its name in the module."""
    model = Healthy(network())
    initialize(model, "he", seed=seed)
    return digest(model)


def summary(seen: Life) -> dict[str, Any]:
    """What a test compares, as plain JSON."""
    expected = seen.expected if isinstance(seen.expected, list) else expected_digest(seen.expected)
    return {"weights": digest(seen.model), "expected": expected, "notes": seen.notes, "off": seen.off}


def without_us(make: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of trainers that leaves WeightInit out."""
    return lambda *given, **options: make(*(each for each in given if not isinstance(each, WeightInit)), **options)


def _init(seed: int = SEED) -> WeightInit:
    return WeightInit("he", seed=seed)


def _life(model: nn.Module, expected: Any, *inits: WeightInit) -> Life:
    notes = [finding.rule for init in inits for finding in init.findings]
    return Life(model, expected, notes, any(init.off for init in inits))


def fresh(build: Callable[[], nn.Module], make: Callable[..., Any], _: Path) -> Life:
    """One fit."""
    model, init = build(), _init()
    make(init).fit(model)
    return _life(model, SEED, init)


def resumed(build: Callable[[], nn.Module], make: Callable[..., Any], root: Path) -> Life:
    """A fit from the checkpoint of another one, which had other weights."""
    first = build()
    trainer = make(_init(seed=1))
    trainer.fit(first)
    path = str(root / "first.ckpt")
    trainer.save_checkpoint(path)
    again, init = build(), _init(seed=2)
    make(init, max_epochs=2).fit(again, ckpt_path=path)
    return _life(again, 1, init)


def fitted_twice(build: Callable[[], nn.Module], make: Callable[..., Any], _: Path) -> Life:
    """Two fits, the second by a callback with another seed."""
    model, one, other = build(), _init(), _init(seed=2)
    make(one).fit(model)
    make(other).fit(model)
    return _life(model, SEED, one, other)


def averaged_after(build: Callable[[], nn.Module], make: Callable[..., Any], _: Path) -> Life:
    """WeightAveraging listed behind the initialisation; its average is what is left."""
    model, init = build(), _init()
    make(init, WeightAveraging()).fit(model)
    return _life(model, SEED, init)


def averaged_before(build: Callable[[], nn.Module], make: Callable[..., Any], _: Path) -> Life:
    """The same, listed in front of it."""
    model, init = build(), _init()
    make(WeightAveraging(), init).fit(model)
    return _life(model, SEED, init)


def scaled(build: Callable[[], nn.Module], make: Callable[..., Any], _: Path) -> Life:
    """One fit that starts from LSUV, which scales the weights on the first batch."""
    model, init, twin = build(), WeightInit("lsuv", seed=SEED), Healthy(network())
    make(init).fit(model)
    initialize(twin, "lsuv", seed=SEED, batch=next(iter(loader()))[0])
    return _life(model, digest(twin), init)


def validated(build: Callable[[], nn.Module], make: Callable[..., Any], _: Path) -> Life:
    """No fit at all: the weights are those that the model was built with."""
    torch.manual_seed(3)
    twin = build()
    torch.manual_seed(3)
    model, init = build(), _init()
    for each, callbacks in ((twin, ()), (model, (init,))):
        torch.manual_seed(4)
        make(*callbacks).validate(each, verbose=False)
    return _life(model, digest(twin), init)


IMPOSSIBLE = {
    ("setup", "averaged after"): "WeightAveraging copies the model before its setup has built the layers",
    ("setup", "averaged before"): "the same",
    ("lazy", "averaged after"): "WeightAveraging copies the model before its lazy layers have parameters",
    ("lazy", "averaged before"): "the same",
}
"""What Lightning cannot do, with us or without."""

LIVES = {
    "fresh": fresh,
    "resumed": resumed,
    "fitted twice": fitted_twice,
    "averaged after": averaged_after,
    "averaged before": averaged_before,
    "scaled": scaled,
    "validated": validated,
}
