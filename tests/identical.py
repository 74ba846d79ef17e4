# SPDX-License-Identifier: Apache-2.0
"""Kinds of state that a step may change, and a picture of a model in which any trace of it shows."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

FOR_GOOD = {"_parameters", "_modules", "_trainer", "_fabric"}


class Meter:
    """A class of the user's own that counts."""

    def __init__(self):
        self.total, self.steps, self.latest, self.seen = 0.0, 0, torch.zeros(2), [1.0]

    def update(self, value):
        self.total, self.steps = self.total + float(value), self.steps + 1
        self.latest += value
        self.seen.append(value)
        self.largest = max(self.seen)


STATES = {
    torch.Generator: lambda g: g.get_state(),
    np.random.Generator: lambda g: repr(g.bit_generator.state),
    np.random.RandomState: lambda g: repr(g.get_state(legacy=False)),
    random.Random: lambda g: g.getstate(),
}


def is_left(name):
    return name in FOR_GOOD or "_hooks" in name or name == "_is_full_backward_hook"


def picture(value):
    """What a value is and holds, by a route of its own: identities and contents, followed as deep as it goes."""
    if isinstance(value, torch.Tensor):
        return [id(value), value.requires_grad, value.is_leaf, value.detach().clone()]
    if isinstance(value, nn.Module):
        attributes = {name: entry for name, entry in vars(value).items() if not is_left(name)}
        parameters = [
            [picture(p), id(p.grad), p.grad if p.grad is None else p.grad.clone()] for p in value.parameters()
        ]
        buffers = [picture(buffer) for buffer in value.buffers()]
        return [picture(attributes), parameters, buffers, value.training, [picture(part) for part in value.children()]]
    if isinstance(value, dict):
        return [[key, id(entry), picture(entry)] for key, entry in value.items()]
    if isinstance(value, list | tuple | deque | set):
        return [[id(entry), picture(entry)] for entry in value]
    if isinstance(value, Meter):
        return picture(vars(value))
    read = STATES.get(type(value))
    return read(value) if read else repr(value)


def everything(model):
    """The picture of a model, and the global random streams."""
    streams = [torch.get_rng_state(), repr(np.random.get_state(legacy=False)), random.getstate()]  # noqa: NPY002
    return [picture(model), streams]


def holding(**attributes):
    """A module with these plain attributes."""
    model = nn.Identity()
    vars(model).update(attributes)
    return model


def with_gradients():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    return model


def updated(metric):
    metric.update(torch.tensor([0.0, 1.0]))
    return metric


X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 1])


def collection():
    metrics = MetricCollection([MulticlassAccuracy(3), MulticlassRecall(3)])
    metrics.update(CLASSES.flip(0), CLASSES)
    return metrics


T = torch.ones
KINDS = {  # a model, and what a step may do to it
    "stream of torch": (nn.Identity, lambda m: torch.rand(1)),
    "stream of numpy": (nn.Identity, lambda m: np.random.rand()),  # noqa: NPY002
    "stream of python": (nn.Identity, lambda m: random.random()),
    "generator of torch": (lambda: holding(g=torch.Generator()), lambda m: torch.rand(1, generator=m.g)),
    "generator of numpy": (lambda: holding(g=np.random.default_rng(0)), lambda m: m.g.random()),
    "old generator of numpy": (lambda: holding(g=np.random.RandomState(0)), lambda m: m.g.rand()),
    "generator of python": (lambda: holding(g=random.Random(0)), lambda m: m.g.random()),
    "generator in a list": (lambda: holding(g=[random.Random(0)]), lambda m: m.g[0].random()),
    "running statistics": (lambda: nn.BatchNorm1d(2), lambda m: m(X)),
    "running statistics, scripted": (lambda: torch.jit.script(nn.BatchNorm1d(2)), lambda m: m(X)),
    "buffer written to": (lambda: nn.BatchNorm1d(2), lambda m: m.running_mean.add_(1)),
    "buffer bound again": (lambda: nn.BatchNorm1d(2), lambda m: setattr(m, "running_mean", T(2))),
    "buffer registered": (nn.Identity, lambda m: m.register_buffer("new", T(1), persistent=False)),
    "buffer deleted": (lambda: nn.BatchNorm1d(2), lambda m: delattr(m, "running_mean")),
    "mode": (lambda: nn.Sequential(nn.Dropout()), lambda m: m.eval()),
    "mode of one layer": (lambda: nn.Sequential(nn.Dropout()), lambda m: m[0].eval()),
    "mode, scripted": (lambda: torch.jit.script(nn.Dropout()), lambda m: m.eval()),
    "counter": (lambda: holding(n=7), lambda m: setattr(m, "n", m.n + 1)),
    "new attribute": (nn.Identity, lambda m: setattr(m, "n", 1)),
    "deleted attribute": (lambda: holding(n=1), lambda m: delattr(m, "n")),
    "list": (lambda: holding(xs=[1]), lambda m: m.xs.append(2)),
    "list emptied": (lambda: holding(xs=[1, 2]), lambda m: m.xs.clear()),
    "deque": (lambda: holding(xs=deque([1, 2], maxlen=2)), lambda m: m.xs.append(3)),
    "set": (lambda: holding(xs={1}), lambda m: m.xs.add(2)),
    "dict": (lambda: holding(xs={"a": 1, "b": 2}), lambda m: m.xs.update(a=0)),
    "ordered dict": (lambda: holding(xs=OrderedDict(a=1, b=2)), lambda m: m.xs.move_to_end("a")),
    "default dict": (lambda: holding(xs=defaultdict(int)), lambda m: m.xs["new"]),
    "counts": (lambda: holding(xs=Counter(a=1)), lambda m: m.xs.update(a=1)),
    "list in a dict": (lambda: holding(xs={"a": [1]}), lambda m: m.xs["a"].append(2)),
    "list in a tuple": (lambda: holding(xs=([1],)), lambda m: m.xs[0].append(2)),
    "tensor": (lambda: holding(x=T(2)), lambda m: m.x.mul_(2)),
    "tensor in a list": (lambda: holding(x=[T(2)]), lambda m: m.x[0].mul_(2)),
    "tensor in a dict": (lambda: holding(x={"a": T(2)}), lambda m: m.x["a"].mul_(2)),
    "tensor in a tuple": (lambda: holding(x=(T(2), 1)), lambda m: m.x[0].mul_(2)),
    "tensor with a graph": (lambda: holding(x=T(2, requires_grad=True) * 2), lambda m: m.x.mul_(2)),
    "gradient": (lambda: nn.Linear(2, 1), lambda m: m(X).sum().backward()),
    "gradient added to": (with_gradients, lambda m: m(X).sum().backward()),
    "gradient scaled": (with_gradients, lambda m: [p.grad.mul_(2) for p in m.parameters() if p.grad is not None]),
    "requires_grad": (lambda: nn.Linear(2, 1), lambda m: m.requires_grad_(False)),
    "metric": (lambda: updated(MeanMetric()), lambda m: m(T(1))),
    "metric with a list": (lambda: updated(CatMetric()), lambda m: m(T(1))),
    "metric computed": (lambda: updated(MeanMetric()), lambda m: m.compute()),
    "metric reset": (lambda: updated(CatMetric()), lambda m: m.reset()),
    "metric collection": (collection, lambda m: m(CLASSES, CLASSES)),
    "meter": (lambda: holding(meter=Meter()), lambda m: m.meter.update(2.0)),
    "meter in a dict": (lambda: holding(meters={"loss": Meter()}), lambda m: m.meters["loss"].update(2.0)),
    "tensor of a meter bound again": (lambda: holding(meter=Meter()), lambda m: setattr(m.meter, "latest", T(2))),
    "module in a list": (lambda: holding(teacher=[nn.BatchNorm1d(2)]), lambda m: m.teacher[0](X)),
}
