# SPDX-License-Identifier: Apache-2.0
"""BatchNormMonitor draws losses, drift, attribution and noise when a fit ends."""

from __future__ import annotations

import math

from specimens import Healthy, loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_bn import BatchNormMonitor
from lightning_bn.callbacks.chronicle import Chronicle
from lightning_bn.rules.affine_drift import Watched
from lightning_bn.stats.attribution import Losses


class Drawn:
    """Takes figures as TensorBoard's logger does."""

    have_tensorboard = True

    def __init__(self):
        self.figures = {}

    def figure(self, tag, figure, step):
        self.figures[tag] = (figure, step)


def losses(now):
    settings = {"stored": now, "as_trained": now, "now": now, "best": 1.0, "first": 1.3, "last": 1.1}
    return Losses(sizes=[8, 8], **{name: [value, value] for name, value in settings.items()})


def chronicle():
    story = Chronicle()
    for epoch, (train, valid) in enumerate([(2.0, 1.2), (1.5, 1.0), (1.0, 1.6)]):
        story.add(10 * epoch, epoch, (train, valid), {"net.1": (0.1 * (epoch + 1), 0.2)})
    story.verdict, story.effective = "as it was said", {"net.1": 8.0}
    return story


def test_every_part_has_its_picture():
    """Losses, drift of γ and of β, who carries the rise, and noise; each at the step that it was drawn in."""
    loggers = Drawn()
    chronicle().draw(loggers, 29, Watched("val_loss", 1.0, 1, 1.6), losses(1.6))
    assert sorted(loggers.figures) == [
        "bn_heatmap/beta_drift",
        "bn_heatmap/gamma_drift",
        "bn_verdict/attribution",
        "bn_verdict/losses",
        "bn_verdict/noise",
    ]
    assert {step for _, step in loggers.figures.values()} == {29}
    assert "as it was said" in loggers.figures["bn_verdict/losses"][0].axes[0].get_title()


def test_a_loss_that_ended_as_infinity_has_no_attribution():
    """There is no share of an infinite rise; the other pictures are drawn."""
    loggers = Drawn()
    chronicle().draw(loggers, 29, Watched("val_loss", 1.0, 1, math.inf), losses(math.inf))
    assert "bn_verdict/attribution" not in loggers.figures
    assert "bn_verdict/losses" in loggers.figures


def test_the_story_goes_on_behind_a_checkpoint():
    """A chronicle from a state draws what came before it too."""
    first, second = chronicle(), Chronicle()
    second.load_state_dict(first.state_dict())
    second.add(30, 3, (0.9, 1.7), {"net.1": (0.5, 0.2)})
    assert [entry[0] for entry in second._curve] == [0, 1, 2, 3]
    assert second._drift.grid("gamma").steps == (0, 10, 20, 30)


def test_a_fit_ends_with_pictures(make_trainer):
    """TensorBoard's Images have the losses and both drifts of a short healthy run, and no attribution."""
    trainer = make_trainer(BatchNormMonitor(), max_epochs=3)
    trainer.fit(Healthy(lr=1e-3), loader(size=320), loader(size=320, seed=1))
    tags = EventAccumulator(trainer.log_dir).Reload().Tags()["images"]
    assert set(tags) >= {"bn_verdict/losses", "bn_heatmap/gamma_drift", "bn_heatmap/beta_drift", "bn_verdict/noise"}
    assert "bn_verdict/attribution" not in tags
