# SPDX-License-Identifier: Apache-2.0
"""The checks of every step, and the snapshot of the state before it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from specimens import network
from torch import nn

from lightning_bn.callbacks.snapshot import SMALL, Snapshot, Streams
from lightning_bn.callbacks.watch import LossReader, are_bad, gradients_of

BIG = torch.full((3,), 1e30)
CASES = {
    "finite": ([torch.ones(3), torch.zeros(2, 2)], False),
    "NaN": ([torch.ones(3), torch.tensor([float("nan")])], True),
    "inf": ([torch.tensor([float("inf"), 1.0])], True),
    "-inf": ([torch.tensor([float("-inf"), 1.0])], True),
    "norm overflows": ([BIG, -BIG], False),
    "norm overflows in float16": ([torch.full((9,), 6e4, dtype=torch.float16)], False),
    "bfloat16 and float32": ([torch.ones(2, dtype=torch.bfloat16), torch.tensor([float("nan")])], True),
    "empty": ([torch.empty(0), torch.ones(1)], False),
    "none": ([], False),
    "integers": ([torch.ones(2, dtype=torch.long)], False),
    "complex": ([torch.tensor([complex(1, float("nan"))])], True),
    "sparse": ([torch.sparse_coo_tensor([[0]], [float("nan")], (3,), check_invariants=True)], True),
    "sparse, finite": ([torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True)], False),
}


@pytest.mark.parametrize(("tensors", "expected"), CASES.values(), ids=CASES)
def test_bad_values_are_found_and_large_ones_are_not_bad(tensors, expected):
    """One fused norm, confirmed value by value; every kind of gradient there is."""
    assert are_bad(tensors) is expected


def test_the_loss_is_read_once():
    """A number that was sent off is read, and only then; of several elements it is the sum."""
    reader = LossReader()
    with pytest.raises(RuntimeError, match="sent off"):
        reader.read()
    reader.send(torch.tensor([1.0, 2.0], requires_grad=True))
    assert reader.is_under_way
    assert reader.read() == 3.0
    assert not reader.is_under_way


def test_gradients_are_those_of_the_optimizer():
    """Parameters without a gradient are passed over."""
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    a.grad, c.grad = torch.ones(1), torch.ones(1)
    assert gradients_of(torch.optim.SGD([a, b], 0.1)) == [a.grad]


def test_a_snapshot_puts_running_statistics_back():
    """What one forward pass changed is as before, bit for bit, counters included."""
    net = network()
    snapshot = Snapshot(net)
    for seed in range(3):
        snapshot.take()
        before = {name: x.clone() for name, x in net.named_buffers()}
        net(torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)))
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])
        snapshot.put_back()
        assert all(torch.equal(x, before[name]) for name, x in net.named_buffers())


def test_a_large_buffer_is_copied_only_where_it_was_written_to():
    """A table that never changes costs one copy in all."""
    net = nn.Module()
    net.register_buffer("table", torch.zeros(SMALL + 1))
    snapshot = Snapshot(net)
    snapshot.take()
    kept = snapshot._kept[0]
    net.table.add_(1)
    snapshot.take()
    assert kept is snapshot._kept[0]
    assert torch.equal(kept, net.table)
    kept.fill_(7)  # would be overwritten by a second copy
    snapshot.take()
    assert kept[0] == 7


def test_a_buffer_that_is_replaced_is_followed():
    """A module may give itself a new buffer of another shape."""
    net = nn.Module()
    net.register_buffer("queue", torch.zeros(2))
    snapshot = Snapshot(net)
    snapshot.take()
    net.queue = torch.ones(3)
    snapshot.take()
    net.queue.zero_()
    snapshot.put_back()
    assert torch.equal(net.queue, torch.ones(3))


def draw():
    return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002


def test_streams_are_rewound_and_survive_the_file():
    """The same draws from torch, ``random`` and ``numpy``, also from the plain form that is saved."""
    snapshot = Snapshot(nn.Identity())
    snapshot.take()
    first = draw()
    snapshot.rewind()
    assert draw() == first
    Streams.from_plain(snapshot.streams.to_plain()).rewind(None)
    assert draw() == first


def test_streams_that_no_step_draws_from_are_not_kept():
    """Reading numpy's stream takes long: it is kept while it is used, which is found out anew at the interval."""
    snapshot = Snapshot(nn.Identity())
    snapshot.take()
    torch.rand(1)
    snapshot.notice()
    snapshot.take()
    assert snapshot.streams.numpy is None
    assert snapshot.streams.python is None
    snapshot.look_closer()
    snapshot.take()
    np.random.rand()  # noqa: NPY002
    snapshot.notice()
    snapshot.take()
    assert snapshot.streams.numpy is not None
    assert snapshot.streams.python is None


@pytest.mark.filterwarnings("ignore:.*Lazy modules")
def test_lazy_buffers_are_kept_from_when_they_have_a_shape():
    """Running statistics of a lazy BatchNorm layer are put back from the second step on."""
    net = nn.Sequential(nn.LazyBatchNorm1d())
    snapshot = Snapshot(net)
    snapshot.take()
    net(torch.randn(8, 3))
    snapshot.take()
    before = {name: x.clone() for name, x in net.named_buffers()}
    net(torch.randn(8, 3))
    snapshot.put_back()
    assert all(torch.equal(x, before[name]) for name, x in net.named_buffers())
