# SPDX-License-Identifier: Apache-2.0
"""Whether values look freshly drawn, or as if they had been loaded, trained or set on purpose.

No flag tells a pretrained weight from a fresh one; its values may. Every usual initialisation draws each value
independently from one symmetric distribution (orthogonal matrices are more even than that, never less), or writes a
few constants. Training leaves a mean, other tails, rows or columns of their own size, and directions that stand out.
What passes all four tests may still be trained: a short training of normally distributed weights often leaves nothing
that can be told from chance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

FEWEST = 100
"""Below this number of values no test has the power to tell, and a tensor counts as drawn."""
BUDGET = 1 << 16
"""Largest number of values that are looked at; only their range is taken of all. It bounds the cost to 15 to 30 ms."""
FEW_LEVELS = 64  # up to so many different values a tensor is a pattern: an identity, a bilinear kernel
CONSTANT_SHARE = 0.1  # a value this frequent was written: a normal with more than 64 levels has none above 6 %
ZERO_FACTOR = 4  # 0 was written if it is this much more frequent than any other value: a mask, a padding row
DRY_RUNS = 10  # batches that a model may see before training, to size a layer or to print a summary
LIMITS = {"mean": 5.5, "shape": 15.0, "spread": 8.0, "spectrum": 8.0}
"""What independent draws exceed with a probability below 1e-6, for each entry of :func:`departures`."""
WORDS = {
    "mean": "mean {:.1f} standard errors from 0",
    "shape": "neither uniform nor normal, cut off or not (Anderson-Darling {:.0f})",
    "spread": "rows, columns or kernel positions of different size (p = 1e-{:.0f})",
    "spectrum": "a direction stands out (largest eigenvalue {:.0f} Tracy-Widom units above independent draws)",
}


def looks_drawn(weight: Tensor) -> bool:
    """Whether the values of a weight or bias are consistent with a fresh initialisation of any usual kind.

    That is: independent draws from a uniform, normal or truncated normal distribution around 0 of any width and any
    cut, or from U(0, b); orthogonal matrices of any gain, also stacked ones; constants, identities and other
    patterns of few values, beside draws or alone; sparse draws; repeated rows (ICNR); all of these rounded to 16
    bits. Several blocks of different width in one tensor are not among them. Deterministic: no random numbers.

    Args:
        weight: floating-point values of any dtype and device, ``(out, in, *)`` or ``(C,)``; of a DTensor this rank's
            shard is judged. Fewer than 100 values, and values without memory (meta, lazy), count as drawn.

    Returns:
        False where one of :func:`departures` exceeds its limit, or where a value is NaN or infinite.

    Raises:
        TypeError: if the values are not real floating-point numbers.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> looks_drawn(layer.weight), looks_drawn(layer.weight + 0.1)
        (True, False)
    """
    return not why_not_drawn(weight)


def why_not_drawn(weight: Tensor, *, budget: int = BUDGET) -> str:
    """The clearest sign that a tensor was not freshly drawn, in words; empty where :func:`looks_drawn` is true.

    Args:
        weight: as in :func:`looks_drawn`.
        budget: largest number of values that is looked at. With fewer it is faster and sees less.

    Raises:
        TypeError: as there.

    Example:
        >>> why_not_drawn(torch.linspace(-0.5, 1.0, 200))
        'mean 8.1 standard errors from 0'
    """
    found = departures(weight, budget=budget)
    if any(math.isnan(value) for value in found.values()):
        return "NaN or infinite values"
    name = max(found, key=lambda name: found[name] / LIMITS[name], default="mean")
    return WORDS[name].format(found[name]) if found.get(name, 0.0) > LIMITS[name] else ""


def departures(weight: Tensor, *, budget: int = BUDGET) -> dict[str, float]:
    """How far a tensor is from independent draws; all four are free of the scale of the values.

    - ``mean``: distance of the mean from 0 in standard errors. For 100 normal values Student's t exceeds 5.5 with
      p = 3e-7; it is left out where all values have one sign and may come from U(0, b).
    - ``shape``: Anderson & Darling's A² (1952; fully specified case) of the absolute values against the
      normal distribution truncated at the largest of them, the width being fitted; this family includes the uniform
      distribution. Given the largest value the others are independent draws below it, so that A² exceeds z with
      p ≈ √(3/(πz))·exp(−z): 8e-8 at 15, less with a fitted width. Left out where all rows have one norm: then they
      are orthonormal, and short ones are far from normal.
    - ``spread``: −log10 of the p-value of Pearson's χ² for equal mean |w| in all slices along one axis; the axis
      with the smallest p. The limit is p = 1e-8.
    - ``spectrum``: largest eigenvalue of W·Wᵀ above that of white noise, centred and scaled as by Johnstone (2001,
      theorem 1.1; with n − 1/2 and p − 1/2, Ma 2012), for each unfolding (out, in, kernel position against the
      rest); the largest. The Tracy-Widom law exceeds 8 with p < 1e-8, small matrices less often still.

    Args:
        weight: as in :func:`looks_drawn`.
        budget: largest number of values that is used, of rows and columns at equal distances.

    Returns:
        The four by name, NaN where a value is not finite; ``spread`` and ``spectrum`` only of a tensor of two or more
        dimensions in which no single values had to be set aside as constants; empty where nothing can be told.

    Raises:
        TypeError: as in :func:`looks_drawn`.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be of a real floating-point dtype, got {weight.dtype}")
    if is_lazy(weight) or weight.is_meta:
        return {}
    weight = weight.detach()
    weight = weight.to_local() if hasattr(weight, "to_local") else weight
    weight = weight.float() if weight.itemsize == 1 else weight  # float8 has no range
    if weight.numel() == 0:
        return {}
    if not all(math.isfinite(end) for end in torch.stack(torch.aminmax(weight)).tolist()):
        return {"mean": math.nan}
    x = _drawn_part(_sample(weight, budget)) if weight.numel() >= FEWEST else None
    if x is None or x.numel() < FEWEST:
        return {}
    values = x.flatten()
    positive = bool((values > 0).all() or (values < 0).all())
    found = {} if positive else {"mean": _mean(values)}
    if not _has_equal_rows(x):
        found["shape"] = _shape(values, uniform=positive)
    if x.dim() > 1:
        found |= {"spread": _spread(x), "spectrum": _spectrum(x - x.mean())}
    return found


def batchnorm_looks_new(layer: nn.Module) -> bool:
    """Whether a normalisation layer is as it was built, or initialised since, and was not trained.

    Args:
        layer: BatchNorm, or any layer with ``weight`` and ``bias`` such as GroupNorm and LayerNorm.

    Returns:
        False for a layer with a mark that :func:`why_not_new` names.

    Example:
        >>> layer = nn.BatchNorm1d(4)
        >>> new, _ = batchnorm_looks_new(layer), [layer(torch.randn(8, 4)) for _ in range(11)]
        >>> new, batchnorm_looks_new(layer), why_not_new(layer)
        (True, False, 'its running statistics have seen 11 batches')
    """
    return not why_not_new(layer)


def why_not_new(layer: nn.Module) -> str:
    """The mark that training left on a normalisation layer, in words; empty for a new one.

    A layer is not new if it has seen more than 10 batches (fewer may be a dry run that sizes a layer), if its running
    statistics moved and it has seen none (they were loaded), or if its β differs between channels. Its γ may differ
    between channels only where running statistics tell that it was not trained: N(1, 0.02²) is a usual start.

    Args:
        layer: as in :func:`batchnorm_looks_new`; parameters and statistics may be None, lazy or on the meta device.
    """
    count = _values(layer, "num_batches_tracked")
    seen = int(count) if count is not None else 0
    mean, var = _values(layer, "running_mean"), _values(layer, "running_var")
    if seen > DRY_RUNS:
        return f"its running statistics have seen {seen} batches"
    if not seen and ((mean is not None and bool(mean.any())) or (var is not None and not bool((var == 1).all()))):
        return "its running statistics are not those of a new layer"
    beta, gamma = _values(layer, "bias"), _values(layer, "weight")
    if beta is not None and not _is_constant(beta):
        return "its β differs between channels"
    if gamma is not None and mean is None and not _is_constant(gamma):
        return "its γ differs between channels"
    return ""


def _values(layer: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(layer, name, None)
    return None if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta else tensor.detach()


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.flatten()[:1]).all())


def _sample(weight: Tensor, budget: int) -> Tensor:
    """Whole rows ``(out, in, kernel)`` or parts of them at equal distances, float64 on the CPU, largest value 1."""
    rows = weight if weight.dim() > 1 else weight.reshape(-1, 1)
    taps = math.prod(rows.shape[2:])
    side = math.isqrt(budget)  # rows that a sample has at least, as far as there are any
    if taps > side:  # a kernel this long is as good as inputs
        rows, taps = rows.flatten(1), 1
    rows = _thin(rows, 0, max(side, budget // math.prod(rows.shape[1:])))
    rows = _thin(rows, 1, max(1, budget // (len(rows) * taps)))
    x = rows.to("cpu", torch.float64).reshape(*rows.shape[:2], -1)
    x = x / x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
    return x if weight.dim() > 1 else x.flatten()


def _thin(x: Tensor, dim: int, most: int) -> Tensor:
    size = x.shape[dim]
    if size <= most:
        return x
    return x[(slice(None),) * dim + (slice(None, None, size // most),)].narrow(dim, 0, most)


def _drawn_part(x: Tensor) -> Tensor | None:
    """What is left without constants: whole rows if that suffices, else single values; None for a pattern."""
    levels, counts = torch.unique(x, return_counts=True)
    if len(levels) <= FEW_LEVELS:
        return None
    others = counts.where(levels != 0, 0).amax()
    written = levels[(counts >= CONSTANT_SHARE * x.numel()) | ((levels == 0) & (counts > ZERO_FACTOR * others))]
    drawn = ~torch.isin(x, written)
    if x.dim() == 1:
        return x[drawn]
    some = drawn.flatten(1).any(1)
    if not bool(drawn[some].all()):
        single: Tensor = x[drawn]
        return single
    rows: Tensor = torch.unique(x[some].flatten(1), dim=0)  # rows that are repeated count once
    return rows.reshape(-1, *x.shape[1:])


def _has_equal_rows(x: Tensor) -> bool:
    """Whether all rows have one norm; of independent draws the squares have a spread of √(0.8 / length) at least."""
    if x.dim() == 1 or x[0].numel() == 1:
        return False
    norms = x.square().flatten(1).sum(1)
    return len(x) > 1 and bool(norms.std() < 0.1 * math.sqrt(0.8 / x[0].numel()) * norms.mean())


def _mean(values: Tensor) -> float:
    return float(values.mean().abs() / values.std() * math.sqrt(len(values)))


def _shape(values: Tensor, *, uniform: bool) -> float:
    sizes = _untied(values.abs().sort().values)
    ratios = sizes[:-1] / sizes[-1]
    cut = SMALLEST_CUT if uniform else _cut(float(ratios.square().mean()))
    u = torch.erf(ratios * cut / math.sqrt(2)) / math.erf(cut / math.sqrt(2))
    u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
    odd = torch.arange(1, 2 * len(u), 2, dtype=u.dtype)
    return float(-len(u) - (odd * (u.log() + torch.log1p(-u.flip(0)))).mean())


def _untied(ordered: Tensor) -> Tensor:
    """Equal values, which rounding makes, spread evenly over the cell that rounds to them."""
    levels, run, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    half = levels.diff() / 2
    low = levels - torch.cat([torch.minimum(half[:1], levels[:1]), half])
    high = levels + torch.cat([half, half[-1:]])
    rank = torch.arange(len(ordered)) - (counts.cumsum(0) - counts)[run] + 0.5
    spread: Tensor = low[run] + (high - low)[run] * (rank / counts[run])
    return spread


SMALLEST_CUT, LARGEST_CUT = 0.05, 40.0  # at 0.05 σ a truncated normal is uniform to 2e-4, at 40 σ normal


def _cut(second_moment: float) -> float:
    """Where a normal of σ = 1 is truncated, if the second moment is this share of the squared cut; by bisection."""
    low, high = SMALLEST_CUT, LARGEST_CUT
    for _ in range(50):
        t = (low + high) / 2
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        share = (1 - 2 * t * density / math.erf(t / math.sqrt(2))) / t**2
        low, high = (t, high) if share > second_moment else (low, t)
    return low


def _spread(x: Tensor) -> float:
    sizes = x.abs() - x.abs().mean()
    variance = sizes.square().mean()
    largest = 0.0
    for axis, slices in enumerate(x.shape):
        length = x.numel() // slices
        if slices > 1 and length > 1 and bool(variance > 0):
            means = sizes.transpose(0, axis).flatten(1).mean(1)
            chi2 = length * means.square().sum() / variance
            p = torch.special.gammaincc(torch.tensor((slices - 1) / 2, dtype=x.dtype), chi2 / 2)
            largest = max(largest, -math.log10(max(float(p), 1e-300)))
    return largest


def _spectrum(x: Tensor) -> float:
    axes = range(3) if min(x.shape[1:]) > 1 else range(1)  # with one input or one kernel position all are the same
    return max(_edge_excess(x.transpose(0, axis).flatten(1)) for axis in axes)


def _edge_excess(matrix: Tensor) -> float:
    n, p = max(matrix.shape), min(matrix.shape)
    if p < 4:  # noqa: PLR2004  (no edge of a spectrum to speak of)
        return 0.0
    gram = matrix @ matrix.T if len(matrix) == p else matrix.T @ matrix
    largest = float(torch.linalg.eigvalsh(gram)[-1] / matrix.square().mean())
    a, b = math.sqrt(n - 0.5), math.sqrt(p - 0.5)
    return (largest - (a + b) ** 2) / ((a + b) * math.pow(1 / a + 1 / b, 1 / 3))
