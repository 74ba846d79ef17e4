# SPDX-License-Identifier: Apache-2.0
"""ActivationMonitor draws maps of a whole run, and histograms of the layers that it found sick."""

from __future__ import annotations

import pytest
import torch
from specimens import Healthy, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_bn import ActivationMonitor, Finding, Severity

NO_LIMIT = {"images": 0, "histograms": 0, "scalars": 0, "tensors": 0}


def events_of(trainer):
    return EventAccumulator(trainer.log_dir, size_guidance=NO_LIMIT).Reload()


def dead_network():
    net = network(norm=False)
    nn.init.constant_(net[2].bias, -100.0)
    return net


def fit(make_trainer, net, *, size=1024, **options):
    arguments = {"every_n_steps": 1, "max_overhead": None, **options.pop("arguments", {})}
    monitor = ActivationMonitor(**arguments)
    trainer = make_trainer(monitor, num_sanity_val_steps=0, **options)
    trainer.fit(Healthy(net, lr=1e-3), loader(size=size))
    return monitor, trainer


def test_maps_of_the_run_are_drawn_when_it_ends(make_trainer):
    """TensorBoard's Images have the spread and dead units by step, and the signal over depth in the last step."""
    _, trainer = fit(make_trainer, network(norm=False))
    events = events_of(trainer)
    assert sorted(events.Tags()["images"]) == [
        "bn_activations/signal_propagation",
        "bn_heatmap/dead_share",
        "bn_heatmap/std",
    ]
    assert [event.step for event in events.Images("bn_heatmap/std")] == [127]


def test_maps_are_drawn_when_a_run_breaks_off(make_trainer):
    """An error in the user's code leaves the pictures of what came before, and passes on unchanged."""

    class Breaks(Healthy):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(ActivationMonitor(every_n_steps=1, max_overhead=None), num_sanity_val_steps=0)
    with pytest.raises(KeyError, match="mine"):
        trainer.fit(Breaks(network(norm=False)), loader(size=64))
    assert [event.step for event in events_of(trainer).Images("bn_heatmap/std")] == [4]


def test_without_pictures_none_is_drawn(make_trainer):
    """``pictures=False`` leaves the Images and the Histograms empty, whatever was found."""
    monitor, trainer = fit(make_trainer, dead_network(), arguments={"pictures": False})
    tags = events_of(trainer).Tags()
    assert monitor.findings
    assert tags["images"] == tags["histograms"] == []


def test_a_healthy_network_has_no_histogram(make_trainer):
    """Where nothing is found no layer is binned."""
    monitor, trainer = fit(make_trainer, network(norm=False))
    assert monitor.findings == events_of(trainer).Tags()["histograms"] == []


def test_a_layer_that_was_found_dead_gets_histograms(make_trainer):
    """From the next logged step on the layer that the finding names is binned."""
    monitor, trainer = fit(make_trainer, dead_network())
    events = events_of(trainer)
    (named,) = {finding.layer for finding in monitor.findings}
    assert events.Tags()["histograms"] == [f"bn_flagged/{named}"]
    found = events.Histograms(f"bn_flagged/{named}")
    assert [event.step for event in found] == list(range(64, 128))
    value = found[-1].histogram_value
    assert (value.num, value.min, value.max, value.sum) == (8 * 16, 0.0, 0.0, 0.0)
    assert {event.value for event in events.Scalars(f"bn_flagged/{named}/nonfinite")} == {0.0}


class Flagging(ActivationMonitor):
    """Takes one layer for sick from the start."""

    def __init__(self, layer):
        super().__init__(every_n_steps=1, max_overhead=None)
        self.layer = layer

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._album.flag([Finding("dead-units", Severity.ERROR, "", "", layer=self.layer)], [self.layer])


class Half(nn.Module):
    """Makes NaN of the first four units of sixteen."""

    def forward(self, x):
        return torch.where(torch.arange(x.shape[1]) < 4, torch.full_like(x, float("nan")), x)


def test_values_that_are_not_finite_are_counted_beside_the_histogram(make_trainer):
    """Of a layer whose output is in part NaN the rest is drawn, and the number of the others is logged."""

    class Unharmed(nn.Module):
        def forward(self, x):
            return x.nan_to_num()

    net = network(norm=False)
    net.insert(4, Half())
    net.insert(5, Unharmed())
    trainer = make_trainer(Flagging("net.4"), num_sanity_val_steps=0)
    trainer.fit(Healthy(net, lr=1e-3), loader(size=64))
    events = events_of(trainer)
    assert {event.value for event in events.Scalars("bn_flagged/net.4/nonfinite")} == {8 * 4.0}
    assert events.Histograms("bn_flagged/net.4")[-1].histogram_value.num == 8 * 12


def test_a_batchnorm_layer_that_is_flagged_is_binned_too(make_trainer):
    """A layer that is otherwise asked and not measured has a histogram of its output."""
    trainer = make_trainer(Flagging("net.1"), num_sanity_val_steps=0)
    trainer.fit(Healthy(network(), lr=1e-3), loader(size=64))
    assert events_of(trainer).Histograms("bn_flagged/net.1")[-1].histogram_value.num == 8 * 16


def test_a_resumed_run_draws_the_whole_of_it(make_trainer, tmp_path):
    """The maps of a run that was continued from a checkpoint begin with its first step."""
    first, trainer = fit(make_trainer, network(norm=False), size=256)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = ActivationMonitor(every_n_steps=1, max_overhead=None)
    make_trainer(second, num_sanity_val_steps=0, max_epochs=2).fit(
        Healthy(network(norm=False), lr=1e-3), loader(size=256), ckpt_path=tmp_path / "half.ckpt"
    )
    grid = second._album._history.grid("log_std")
    assert grid.steps == tuple(range(64))
    begun = first._album._history.grid("log_std")
    assert (grid.values[:, :32] == begun.values).all()
