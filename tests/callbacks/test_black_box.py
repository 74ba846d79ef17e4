# SPDX-License-Identifier: Apache-2.0
"""The batch that did it is saved with the state before the step, and loads as plain tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from harm import Busy
from lightning.pytorch import Callback, seed_everything
from sick import LogOfZero
from specimens import Healthy, loader

from lightning_bn import NaNGuard, NonFiniteError
from lightning_bn.callbacks.black_box import read_case
from lightning_bn.callbacks.retrace import retrace


def saved(trainer):
    (path,) = Path(trainer.log_dir, "lightning_bn").glob("batch_*.pt")
    return path


class Keeper(Callback):
    """Keeps the state at the start of a step, and its loss."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.step:
            self.state = copy.deepcopy(pl_module.state_dict())
            self.batch = copy.deepcopy(batch)

    def on_before_backward(self, trainer, pl_module, loss):
        self.loss = float(loss.detach())


class Late(Busy):
    """Draws noise from three libraries, uses dropout and BatchNorm, and overflows in the third step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss / (loss * 0) if batch_idx == 2 else loss


@pytest.mark.parametrize("action", ["raise", "stop", "skip", "warn"])
def test_the_file_holds_batch_and_state_before_the_step(make_trainer, action):
    """``weights_only`` loads it; weights and running statistics are those before the step, whatever the action."""
    keeper = Keeper(2)
    trainer = make_trainer(keeper, NaNGuard(action, save_batch=True))
    try:
        trainer.fit(Late(), loader())
    except NonFiniteError:
        assert action == "raise"
    packed = torch.load(saved(trainer), weights_only=True)
    assert (packed["stage"], packed["step"], packed["batch_idx"], packed["rank"]) == ("training_step", 2, 2, 0)
    assert all(torch.equal(x, keeper.state[name]) for name, x in packed["state_dict"].items())
    assert all(torch.equal(a, b) for a, b in zip(packed["batch"], keeper.batch, strict=True))


def test_a_saved_step_runs_again_with_the_same_draws(make_trainer):
    """In a new model the replay meets the same fault, on the same values to the last bit."""
    seed_everything(5)
    guard = NaNGuard(save_batch=True)
    trainer = make_trainer(guard)
    with pytest.raises(NonFiniteError):
        trainer.fit(Late(), loader())
    seed_everything(77)
    model = Late()
    fresh = make_trainer(logger=False)
    fresh.strategy.connect(model)
    model.trainer = fresh
    case, _ = read_case(saved(trainer), model)
    seen = retrace(fresh, model, case, backward=False)
    assert seen.phase == "loss"
    assert seen.origin.inputs[0].high == guard.findings[0].data["inputs"][0]["high"]


def test_without_the_wish_nothing_is_saved(make_trainer):
    """The default leaves no batch on disk."""
    trainer = make_trainer(NaNGuard())
    with pytest.raises(NonFiniteError):
        trainer.fit(LogOfZero(), loader())
    assert not list(Path(trainer.log_dir).rglob("*.pt"))


def test_a_batch_that_cannot_be_loaded_safely_is_not_saved_and_that_is_said(make_trainer):
    """A class of the user's own is refused with a note; the report comes all the same."""

    class Batch:
        def __init__(self, x, y):
            self.x, self.y = x, y

    class Model(Healthy):
        def training_step(self, batch, batch_idx):
            return torch.log(self.loss(self(batch.x), batch.y) * 0 - 1)

    rows = loader().dataset
    data = torch.utils.data.DataLoader(
        rows, 8, collate_fn=lambda pairs: Batch(*map(torch.stack, zip(*pairs, strict=True)))
    )
    guard = NaNGuard(save_batch=True)
    with pytest.raises(NonFiniteError, match="invalid-operation"):
        make_trainer(guard).fit(Model(), data)
    assert any("was not saved" in found.evidence and "got Batch" in found.evidence for found in guard.findings)


@pytest.mark.parametrize("content", [None, b"no step", {"format": 9}])
def test_a_wrong_file_is_refused_with_name_need_and_got(tmp_path, content):
    """A missing file, one that torch refuses and one of another format."""
    path = tmp_path / "batch.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match="path must be a saved step"):
        read_case(path)
