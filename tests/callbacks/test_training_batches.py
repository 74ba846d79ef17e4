# SPDX-License-Identifier: Apache-2.0
"""A bounded, fair sample of an epoch's batches is kept, whatever is in them, and given out unharmed."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_bn.callbacks.training_batches import TrainingBatches


class Opaque:
    """A batch of a library of its own: tensors behind attributes, and a loop."""

    def __init__(self):
        self.store = {"x": torch.randn(3, 2)}
        self.own = self


class OwnCopy(torch.Tensor):
    """A tensor that copies itself in its own way, as image tensors of vision libraries do."""

    def __deepcopy__(self, memo):
        memo[id(self)] = self.detach().clone().as_subclass(type(self))
        return memo[id(self)]


@dataclass
class Graph:
    nodes: torch.Tensor
    name: str


def kept_numbers(batches):
    return [entry.number for entry in batches.kept]


def fill(batches, numbers, size=4):
    batches.begin_epoch()
    for number in numbers:
        batches.offer(torch.full((size, 2), float(number)), number)


def test_all_batches_are_kept_where_there_is_room():
    """A short epoch is kept whole, in order, and the next one takes its place."""
    batches = TrainingBatches(100, 1e9)
    fill(batches, range(5))
    assert kept_numbers(batches) == list(range(5))
    fill(batches, range(10, 15))
    assert kept_numbers(batches) == list(range(10, 15))
    assert (batches.samples, batches.nbytes, batches.is_cut) == (20, 5 * 4 * 2 * 4, False)


def test_every_batch_of_an_epoch_is_equally_likely_to_be_kept():
    """Over 600 draws of 5 out of 20, each batch is kept in a quarter of them, the first as often as the last."""
    counts = Counter()
    for seed in range(600):
        batches = TrainingBatches(20, 1e9, seed)
        fill(batches, range(20))
        assert len(set(kept_numbers(batches))) == 5
        counts.update(kept_numbers(batches))
    assert set(counts) == set(range(20))
    assert all(0.25 - 0.08 < count / 600 < 0.25 + 0.08 for count in counts.values())  # 4.5 standard deviations


def test_old_batches_leave_as_the_first_ones_of_a_new_epoch_come():
    """After k batches of a new epoch, k of the kept ones are new and none is twice there."""
    batches = TrainingBatches(20, 1e9)
    fill(batches, range(50))
    fill(batches, range(100, 103))
    assert sum(number >= 100 for number in kept_numbers(batches)) == 3
    assert len(batches.kept) == 5
    fill(batches, range(200, 205))
    assert sorted(kept_numbers(batches)) == list(range(200, 205))


def test_epochs_between_two_turns_copy_nothing():
    """Of every third epoch the batches are kept, from the first on, and how many there are is known of all."""
    batches, kept = TrainingBatches(20, 1e9, every=3), []
    for epoch in range(7):
        fill(batches, range(10 * epoch, 10 * epoch + (4 if epoch else 3)))
        kept.append({number // 10 for number in kept_numbers(batches)})
    assert kept == [{0}, {0}, {0}, {3}, {3}, {3}, {6}]


def test_few_batches_are_copied():
    """Of n batches K·(1 + 1/(K + 1) + ... + 1/n) are copied for the K that stay: here 5 + 5·(H(1000) - H(5)) = 31."""
    copied = []
    for seed in range(100):
        batches = TrainingBatches(20, 1e9, seed)
        copied.append(sum(batches.offer(torch.zeros(4, 2), number) for number in range(1000)))
    assert 15 < copied[0] < 50
    expected = 5 + 5 * sum(1 / n for n in range(6, 1001))
    # The variance is at most the sum of 5/n: 26, so that the mean of 100 has a standard deviation of 0.5.
    assert abs(sum(copied) / 100 - expected) < 2.5


def test_memory_bounds_the_sample():
    """So many batches are kept as fit, at least one, and it is said that there would have been more."""
    batches = TrainingBatches(1000, 100.0)  # a batch takes 32 bytes
    fill(batches, range(50))
    assert (len(batches.kept), batches.nbytes, batches.is_cut) == (3, 96, True)
    one = TrainingBatches(1000, 1.0)
    fill(one, range(3))
    assert len(one.kept) == 1
    short = TrainingBatches(1000, 100.0)
    fill(short, range(3))
    assert not short.is_cut  # all there are


def test_memory_is_bounded_also_where_later_batches_are_larger():
    """Others are dropped for a larger one."""
    batches = TrainingBatches(40, 350.0)
    fill(batches, range(10), size=4)
    assert len(batches.kept) == 10
    for turn in range(5):
        fill(batches, range(20 * turn, 20 * turn + 20), size=16)  # 128 bytes
        assert batches.nbytes <= 350
        assert len(batches.kept) >= 1
    assert batches.is_cut


def test_the_global_random_streams_are_not_drawn_from():
    """Choosing is the class's own business."""
    before = torch.get_rng_state(), random.getstate()
    fill(TrainingBatches(8, 1e9), range(50))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_what_is_done_to_a_batch_later_does_not_reach_the_kept_one():
    """Neither the step's own changes in place nor those to what was given out again."""
    batch = {"x": torch.ones(2, 2)}
    batches = TrainingBatches(8, 1e9)
    batches.offer(batch, 0)
    batch["x"].zero_()
    batches.kept[0].again()["x"].mul_(7)
    assert torch.equal(batches.kept[0].again()["x"], torch.ones(2, 2))


def test_batches_of_every_kind_come_back_as_they_were():
    """Containers, dataclasses, foreign objects, subclasses, parameters, sparse, shared and sliced tensors."""
    x = torch.randn(10, 4)
    batch = {
        "slice": x[2:5],
        "shared": [x, x],
        "opaque": Opaque(),
        "graph": Graph(torch.randn(5, 2), "g"),
        "own": torch.randn(2, 2).as_subclass(OwnCopy),
        "parameter": nn.Parameter(torch.ones(2)),
        "with a graph": torch.randn(3, requires_grad=True) * 2,
        "sparse": torch.eye(3).to_sparse(),
        "plain": (1, "text", None),
    }
    batches = TrainingBatches(8, 1e9)
    batches.offer(batch, 3)
    entry, again = batches.kept[0], batches.kept[0].again()
    assert (entry.number, entry.samples) == (3, 3)
    assert torch.equal(again["slice"], batch["slice"])
    assert again["slice"].untyped_storage().nbytes() == 3 * 4 * 4
    assert again["shared"][0] is again["shared"][1]
    assert again["opaque"].own is again["opaque"]
    assert torch.equal(again["opaque"].store["x"], batch["opaque"].store["x"])
    assert torch.equal(again["graph"].nodes, batch["graph"].nodes)
    assert type(again["own"]) is OwnCopy
    assert isinstance(again["parameter"], nn.Parameter)
    assert again["with a graph"].requires_grad and again["with a graph"].is_leaf  # noqa: PT018
    assert torch.equal(again["sparse"].to_dense(), torch.eye(3))
    assert again["plain"] == (1, "text", None)
    assert len(entry.homes) == 8
    assert entry.nbytes == 4 * (12 + 40 + 6 + 10 + 4 + 2 + 3 + 9)


def test_plain_batches_are_copied_as_deepcopy_copies_them():
    """Tensors in tuples, lists and dicts: the same structure, one copy of what is there twice, leaves that learn."""
    x, twice = torch.randn(4, 2), [torch.ones(1)]
    batch = ({"x": x, "again": (x, 1)}, [x[1:], None, "text"], torch.zeros(3, requires_grad=True), twice, twice)
    for given in (batch, batch[:4]):  # with a list that is there twice, and without
        batches = TrainingBatches(8, 1e9)
        batches.offer(given, 0)
        entry, again = batches.kept[0], batches.kept[0].again()
        assert (type(again), list(again[0]), type(again[0]["again"]), again[1][1:]) == (
            tuple,
            ["x", "again"],
            tuple,
            [None, "text"],
        )
        assert again[0]["x"] is again[0]["again"][0]
        assert again[0]["x"] is not x
        assert torch.equal(again[0]["x"], x)
        assert torch.equal(again[1][0], x[1:])
        assert again[2].requires_grad
        assert len(entry.homes) == 4
        assert entry.nbytes == 4 * (8 + 6 + 3 + 1)
    assert batches.kept[0].again()[3] is not twice
    batches.offer(batch, 1)
    again = batches.kept[1].again()
    assert again[3] is again[4]


def test_a_list_that_holds_itself_is_copied():
    """Where containers make a loop the copy does so too."""
    batch = [torch.ones(2)]
    batch.append(batch)
    batches = TrainingBatches(8, 1e9)
    batches.offer(batch, 0)
    again = batches.kept[0].again()
    assert again[1] is again


def test_tensors_go_back_to_the_device_that_they_came_from():
    """The order of copying tells which; the fake device here cannot be copied from, so that a wrong one fails."""
    batches = TrainingBatches(8, 1e9)
    batches.offer([torch.ones(2), torch.ones(3), torch.ones(2)], 0)
    entry = batches.kept[0]
    entry.homes = [torch.device("cpu"), torch.device("meta"), torch.device("cpu")]
    assert [x.device.type for x in entry.again()] == ["cpu", "meta", "cpu"]


def test_a_batch_that_cannot_be_copied_is_an_error_that_says_so():
    """A lock has no copy."""
    with pytest.raises(TypeError, match=r"batch must be what copy.deepcopy can copy, got dict \(cannot pickle"):
        TrainingBatches(8, 1e9).offer({"lock": threading.Lock()}, 0)


def test_a_batch_without_tensors_counts_as_one_sample():
    """Its length is unknown."""
    batches = TrainingBatches(2, 1e9)
    for number in range(10):
        batches.offer({"text": "a"}, number)
    assert batches.samples == len(batches.kept) == 2
