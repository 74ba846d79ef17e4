# SPDX-License-Identifier: Apache-2.0
"""A model that torch can trace, ways to compile it, and a backend that counts."""

from __future__ import annotations

import torch
from specimens import Healthy, network
from torch import nn


class Chain(nn.Sequential):
    """A class of the user's own: torch does not compile the call of one of its own in place."""

    def forward(self, x):
        for part in self:
            x = part(x)
        return x


class Mute(Healthy):
    """Logs nothing where it is traced, as torch cannot trace Lightning's ``log``; dropout in front of the head."""

    def __init__(self, net=None, lr=1e-2):
        super().__init__(net or Chain(network()[:3], nn.Dropout(0.3), nn.Linear(16, 4)), lr)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        loss = self.loss(self(batch[0]), batch[1])
        if not torch.compiler.is_compiling():
            self.log("val_loss", loss)


class Counting:
    """A backend that runs what it gets as it is, and counts how often it compiled and how often that ran."""

    def __init__(self):
        self.compiled, self.ran = 0, 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run_it(*args):
            self.ran += 1
            return graph.forward(*args)

        return run_it


def as_a_part(model, **how):
    """The network inside is compiled."""
    model.net = torch.compile(model.net, **how)
    return model


def in_place(model, **how):
    """The network compiles itself."""
    model.net.compile(**how)
    return model


def in_parts(model, **how):
    """A layer is compiled and others are not."""
    model.net[0][0] = torch.compile(model.net[0][0], **how)
    return model
