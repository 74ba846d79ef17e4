# SPDX-License-Identifier: Apache-2.0
"""Batches are joined and cut along the axis of samples, whatever containers they come in."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_bn.callbacks.joining import joined, parted
from lightning_bn.callbacks.kept import Kept

Pair = namedtuple("Pair", "x y")  # noqa: PYI024  (the plain kind is what is tested)


@dataclass
class Sample:
    x: torch.Tensor
    name: str


def kept(batch, samples):
    return Kept(batch, 0, samples, 8, [])


def numbers(start, count):
    return torch.arange(start, start + count).float()[:, None]


SHAPES = {
    "tensor": lambda start, count: numbers(start, count),
    "tuple": lambda start, count: (numbers(start, count), numbers(start, count)[:, 0]),
    "named tuple": lambda start, count: Pair(numbers(start, count), numbers(start, count)),
    "dictionary": lambda start, count: {
        "x": numbers(start, count),
        "names": [str(k) for k in range(start, start + count)],
    },
    "ordered dictionary": lambda start, count: OrderedDict(x=numbers(start, count)),
    "nested": lambda start, count: [{"x": numbers(start, count)}, (numbers(start, count), "same")],
    "dataclass": lambda start, count: Sample(numbers(start, count), "same"),
    "constant beside": lambda start, count: (numbers(start, count), torch.ones(7)),
}


def values(batch):
    """All that is in a batch, as plain values."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, Sample):
        return [values(batch.x), batch.name]
    if isinstance(batch, dict):
        return {key: values(entry) for key, entry in batch.items()}
    return [values(entry) for entry in batch] if isinstance(batch, list | tuple) else batch


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_joined_batches_are_the_batch_of_all_samples(make):
    """Three batches of unequal length make the batch that the loader would have made of their samples."""
    (found,) = joined([kept(make(0, 4), 4), kept(make(4, 4), 4), kept(make(8, 3), 3)], 11)
    assert type(found.batch) is type(make(0, 11))
    assert values(found.batch) == values(make(0, 11))
    assert (found.samples, found.nbytes) == (11, 24)


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_parts_are_the_batches_of_their_samples(make):
    """A batch of eleven is cut into three, four and four."""
    found = parted(kept(make(0, 11), 11), 3)
    assert [entry.samples for entry in found] == [3, 4, 4]
    assert [values(entry.batch) for entry in found] == [values(make(0, 3)), values(make(3, 4)), values(make(7, 4))]


def test_batches_are_joined_until_they_are_large_enough():
    """Each has at least as many samples as were asked for, and a rest goes to the last one."""
    batches = [kept(numbers(4 * k, 4), 4) for k in range(7)]
    assert [entry.samples for entry in joined(batches, 8)] == [8, 8, 12]
    assert [entry.samples for entry in joined(batches, 4)] == [4] * 7
    assert [entry.samples for entry in joined(batches, 1000)] == [28]


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param([torch.ones(4, 2), torch.ones(4, 3)], id="other shape"),
        pytest.param([(torch.ones(4, 2), torch.zeros(7)), (torch.ones(4, 2), torch.ones(7))], id="no axis of samples"),
        pytest.param([{"x": torch.ones(4)}, {"y": torch.ones(4)}], id="other keys"),
        pytest.param([(torch.ones(4), "a"), (torch.ones(4), "b")], id="other name"),
        pytest.param([torch.ones(4), [torch.ones(4)]], id="other kind"),
    ],
)
def test_what_cannot_be_joined_is_told(batches):
    """Where a part differs from batch to batch and has no axis of samples the answer is None."""
    assert joined([kept(batch, 4) for batch in batches], 8) is None


def test_the_kept_batches_stay_as_they_are():
    """Joining and cutting write into nothing."""
    first = kept((numbers(0, 4), ["a", "b", "c", "d"]), 4)
    joined([first, first], 8)
    parted(first, 2)
    assert values(first.batch) == [numbers(0, 4).tolist(), ["a", "b", "c", "d"]]
