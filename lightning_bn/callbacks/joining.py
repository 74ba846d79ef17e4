# SPDX-License-Identifier: Apache-2.0
"""Make large batches of small ones and small ones of large ones, whatever containers they come in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_bn.callbacks.kept import Kept


def joined(batches: Sequence[Kept], samples: int, max_bytes: float = math.inf) -> list[Kept] | None:
    """Join batches along the axis of samples until each has at least so many.

    Args:
        batches: what is kept, in the order in which it is to be joined.
        samples: wanted samples; the last batch, which may have fewer, is joined to the one before.
        max_bytes: no batch that is joined takes more than this, be it smaller than wanted.

    Returns:
        The large batches; the same ones where they are large enough; None where they cannot be joined, because some
        part of them differs from batch to batch and has no axis of samples.
    """
    groups: list[list[Kept]] = [[]]
    for entry in batches:
        if groups[-1] and (_samples(groups[-1]) >= samples or _bytes([*groups[-1], entry]) > max_bytes):
            groups.append([])
        groups[-1].append(entry)
    rest = [*groups[-2], *groups[-1]] if len(groups) > 1 and _samples(groups[-1]) < samples else []
    if rest and _bytes(rest) <= max_bytes:
        groups[-2:] = [rest]
    try:
        return [_join(group) for group in groups if group]
    except Exception:  # noqa: BLE001  (containers of the user's own, which may not be made from their parts)
        return None


def _samples(group: Sequence[Kept]) -> int:
    return sum(member.samples for member in group)


def _bytes(group: Sequence[Kept]) -> int:
    return sum(member.nbytes for member in group)


def parted(entry: Kept, parts: int) -> list[Kept]:
    """Cut a batch along the axis of samples.

    Args:
        entry: what is kept.
        parts: number of parts, at most as many as there are samples; the first ones may be longer by one sample.

    Returns:
        The parts. What has not as many entries as the batch has samples is the same in all of them.
    """
    edges = [entry.samples * place // parts for place in range(parts + 1)]
    return [
        replace(entry, batch=_cut(entry.batch, entry.samples, slice(low, high)), samples=high - low)
        for low, high in pairwise(edges)
    ]


class _CannotJoinError(Exception):
    """Two batches have a part that cannot be put together."""


def _join(group: Sequence[Kept]) -> Kept:
    if len(group) == 1:
        return group[0]
    batch = _together([entry.batch for entry in group], [entry.samples for entry in group])
    return replace(group[0], batch=batch, samples=_samples(group), nbytes=_bytes(group))


def _together(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise _CannotJoinError
    if isinstance(first, Tensor):
        return _tensors(parts, sizes)
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise _CannotJoinError
        entries = {key: _together([part[key] for part in parts], sizes) for key in first}
        return entries if type(first) is dict else _made_by(type(first), entries)
    if isinstance(first, tuple | list):
        return _sequences(parts, sizes)
    if is_dataclass(first) and not isinstance(first, type):
        names = [entry.name for entry in fields(first)]
        return replace(first, **{name: _together([getattr(part, name) for part in parts], sizes) for name in names})
    return _same(parts)


def _tensors(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    by_sample = all(x.dim() and len(x) == size for x, size in zip(parts, sizes, strict=True))
    if by_sample and all(x.shape[1:] == parts[0].shape[1:] for x in parts):
        return torch.cat(list(parts))
    if all(x.shape == parts[0].shape and torch.equal(x, parts[0]) for x in parts[1:]):
        return parts[0]
    raise _CannotJoinError


def _sequences(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = parts[0]
    if all(len(part) == len(first) for part in parts) and any(_holds_tensors(entry) for entry in first):
        entries = [_together(list(entry), sizes) for entry in zip(*parts, strict=True)]
        return type(first)(*entries) if hasattr(first, "_fields") else _made_by(type(first), entries)
    if all(len(part) == size for part, size in zip(parts, sizes, strict=True)):  # names, captions
        return _made_by(type(first), [entry for part in parts for entry in part])
    return _same(parts)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor) or is_dataclass(value)


def _made_by(kind: type, entries: Any) -> Any:
    try:
        return kind(entries)
    except Exception as error:
        raise _CannotJoinError from error


def _cut(value: Any, samples: int, where: slice) -> Any:
    if isinstance(value, Tensor):
        return value[where] if value.dim() and len(value) == samples else value
    if isinstance(value, Mapping):
        entries = {key: _cut(entry, samples, where) for key, entry in value.items()}
        return entries if type(value) is dict else _made_by(type(value), entries)
    if isinstance(value, tuple | list):
        if len(value) == samples and not _holds_tensors(value):
            return value[where]
        parts = [_cut(entry, samples, where) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else _made_by(type(value), parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{e.name: _cut(getattr(value, e.name), samples, where) for e in fields(value)})
    return value


def _same(parts: Sequence[Any]) -> Any:
    try:
        if all(part == parts[0] for part in parts[1:]):
            return parts[0]
    except Exception as error:
        raise _CannotJoinError from error
    raise _CannotJoinError
