# SPDX-License-Identifier: Apache-2.0
"""How many values of a tensor are NaN or infinite, and where the first one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Census:
    """Host-side counts of one tensor.

    Args:
        count: number of elements.
        nan: how many are NaN.
        posinf: how many are +inf.
        neginf: how many are -inf.
        largest: largest absolute value among the finite ones; 0 if there is none.

    Example:
        >>> read([census(torch.tensor([1.0, float("nan")]))])[0].describe()
        '1 of 2 values are NaN'
    """

    count: int
    nan: int
    posinf: int
    neginf: int
    largest: float

    @property
    def level(self) -> int:
        """2 with NaN or +inf, 1 with -inf alone (what attention masks are filled with), else 0."""
        return 2 if self.nan or self.posinf else 1 if self.neginf else 0

    @property
    def is_finite(self) -> bool:
        """Whether every element is finite."""
        return self.level == 0

    def describe(self) -> str:
        """The non-finite counts in words."""
        named = ((self.nan, "NaN"), (self.posinf, "+inf"), (self.neginf, "-inf"))
        parts = [f"{number} of {self.count} values are {name}" for number, name in named if number]
        return ", ".join(parts) or f"all {self.count} values are finite"

    def __add__(self, other: Census) -> Census:
        """The census of both tensors together."""
        return Census(
            self.count + other.count,
            self.nan + other.nan,
            self.posinf + other.posinf,
            self.neginf + other.neginf,
            max(self.largest, other.largest),
        )


NOTHING = Census(0, 0, 0, 0, 0.0)


def census(x: Tensor) -> Tensor:
    """Count non-finite values without reading anything on the host.

    Args:
        x: floating-point or complex tensor of any shape; of a complex one both parts are counted.

    Returns:
        ``(5,)`` on the device of ``x``: count, NaN, +inf, -inf, largest finite absolute value; float64,
        or float32 where the device has no float64.
    """
    x = x.detach()
    x = x.to_local() if hasattr(x, "to_local") else x  # a DTensor: this rank's shard
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    nan, posinf, neginf = torch.isnan(x), x == torch.inf, x == -torch.inf
    finite = torch.where(nan | posinf | neginf, 0.0, x).abs()
    largest = finite.amax() if x.numel() else x.new_zeros(())
    count = torch.full_like(largest, x.numel(), dtype=wide)
    return torch.stack([count, *(flag.sum(dtype=wide) for flag in (nan, posinf, neginf)), largest.to(wide)])


def is_measurable(x: Tensor) -> bool:
    """Whether :func:`census` can look at a tensor: floating-point or complex, dense, and with memory of its own."""
    dense = x.layout == torch.strided and not x.is_nested and not x.is_meta
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)  # noqa: SLF001  (inside vmap or grad; no public name)
    return dense and not wrapped and (x.is_floating_point() or x.is_complex())


def read(rows: Sequence[Tensor]) -> list[Census]:
    """Bring the results of :func:`census` to the host, one transfer for each device.

    Args:
        rows: tensors ``(5,)``, in any order of devices.

    Returns:
        One :class:`Census` for each row, in the order given.
    """
    found: dict[int, Census] = {}
    for device in {row.device for row in rows}:
        places = [place for place, row in enumerate(rows) if row.device == device]
        for place, row in zip(places, torch.stack([rows[i] for i in places]).tolist(), strict=True):
            found[place] = Census(int(row[0]), int(row[1]), int(row[2]), int(row[3]), row[4])
    return [found[place] for place in range(len(rows))]


def first_bad_index(x: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or +inf in row-major order, else of the first -inf, else None; reads the host.

    Example:
        >>> first_bad_index(torch.tensor([[0.0, -float("inf")], [float("nan"), 0.0]]))
        (1, 0)
    """
    x = x.detach()
    places = (~torch.isfinite(x)).nonzero()
    worse = places if x.is_complex() else (torch.isnan(x) | (x == torch.inf)).nonzero()
    first = next((rows[0] for rows in (worse, places) if len(rows)), None)
    return None if first is None else tuple(first.tolist())
