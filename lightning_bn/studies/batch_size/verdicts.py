# SPDX-License-Identifier: Apache-2.0
"""What the study of batch sizes says of each claim; each function names its criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lightning_bn.studies.batch_size.rows import (
    ACCUMULATED,
    BATCHES,
    FEWER,
    LIMIT,
    NAMES,
    NETWORKS,
    USUAL,
    Gap,
    Run,
    against,
    are_several,
    gap,
    in_figures,
    mismatch,
    samples,
    values,
)
from lightning_bn.studies.seeds import mean
from lightning_bn.studies.study import Row, Verdict

WU_HE = "Wu & He 2018, arXiv 1803.08494, ResNet-50 on ImageNet"
IMAGENET = {32: (23.6, 24.1), 16: (23.7, 24.2), 8: (24.8, 24.0), 4: (27.3, 24.2), 2: (34.7, 24.1)}
"""Top-1 error in per cent of BatchNorm and GroupNorm by images a GPU, from their paper; LayerNorm at 32 has 25.3."""
LAYER = 25.3
SAME_SAMPLES, POINTS, HALF, MORE = 0.25, 0.02, 0.5, 1.5
"""How far m_eff may be off to count as the same; accuracy lost where training is destabilised; share of the loss that
decides; and factor by which γ and β have to move further."""
Word = Literal["holds", "holds if", "does not hold", "not shown"]


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What became of each claim; of one seed, differences are not known from chance."""
    found = [avoid(rows), unstable(rows), others(rows), mismatched(rows), accumulated(rows)]
    if not are_several(rows):
        found = [replace(verdict, verdict="not shown") for verdict in found]
    return [noisier(rows), *found, chasing(rows)]


def noisier(rows: list[Row]) -> Verdict:
    """m_eff rises with the batch size at every step, in both networks."""
    found = {
        name: [
            [mean(values(rows, Run(name, "batch", batch), key)) for batch in BATCHES] for key in ("m_eff", "m_eff_min")
        ]
        for name in NETWORKS
    }
    rises = [all(a < b for a, b in zip(row[0], row[0][1:], strict=False)) for row in found.values()]
    said = [
        f"{NETWORKS[name]} {_range(middle)} (noisiest layer {_range(least)})" for name, (middle, least) in found.items()
    ]
    return Verdict(
        "The smaller the batch, the noisier its statistics.",
        "holds" if all(rises) else "holds if" if any(rises) else "does not hold",
        f"Effective samples per channel in the median layer, batch {BATCHES[0]} to {BATCHES[-1]}: {'; '.join(said)}.",
    )


def avoid(rows: list[Row]) -> Verdict:
    """Worse than GroupNorm at all sizes below 16 and at none from there on; at some of them: holds if."""
    gaps = {(name, batch): against(rows, name, batch) for name in NETWORKS for batch in BATCHES}
    worse = [key for key, found in gaps.items() if found.sign > 0]
    small = [key for key in gaps if key[1] < LIMIT]
    word: Word = "holds if" if worse else "does not hold" if any(found.sign for found in gaps.values()) else "not shown"
    said = [f"{text} {_series({b: gaps[name, b] for b in BATCHES})}" for name, text in NETWORKS.items()]
    differences = ", ".join(f"{ours - theirs:+.1f}" for ours, theirs in IMAGENET.values())
    return Verdict(
        f"Avoid BatchNorm below a batch of {LIMIT}.",
        "holds" if worse == small else word,
        f"Validation loss less GroupNorm's, ± standard error: {'; '.join(said)}. {boundary(rows, worse)}",
        f"{WU_HE}: top-1 error less GroupNorm's at {'/'.join(map(str, IMAGENET))} images a GPU: {differences} points.",
    )


def boundary(rows: list[Row], worse: Sequence[tuple[str, int]]) -> str:
    """Between which m_eff of the noisiest layer BatchNorm becomes worse than GroupNorm, in words."""
    if not are_several(rows):
        return "One seed does not tell a difference from chance."
    inside = [samples(rows, *key) for key in worse]
    outside = [samples(rows, name, batch) for name in NETWORKS for batch in BATCHES if (name, batch) not in worse]
    if not inside or not outside:
        return f"BatchNorm is worse for sure {'at every' if inside else 'at no'} size."
    up_to, on = max(inside), min(outside)
    where = "BatchNorm is worse for sure where the noisiest layer has m_eff"
    if up_to < on:
        return f"{where} up to {up_to:.2g}, and nowhere from {on:.2g} on."
    return f"{where} {min(inside):.2g} to {up_to:.2g}, and not always there."


def unstable(rows: list[Row]) -> Verdict:
    """Accuracy more than two points below GroupNorm's, for sure, at the smallest batch: in both networks, or in one."""
    batch = BATCHES[0]
    runs = {name: (Run(name, "batch", batch), Run(name, "group", batch)) for name in NETWORKS}
    gaps = {name: gap(rows, *pair, "val_acc") for name, pair in runs.items()}
    lost = [found.mean < -max(2 * found.error, POINTS) for found in gaps.values()]
    said = [
        f"{NETWORKS[name]} {_versus(rows, pair, 'train_loss', '.2g')}, accuracy {_versus(rows, pair, 'val_acc', '.3f')}"
        for name, pair in runs.items()
    ]
    return Verdict(
        "Small batches destabilise training.",
        "holds" if all(lost) else "holds if" if any(lost) else "does not hold",
        f"Training loss of the last epoch at batch {batch}, BatchNorm against GroupNorm: {'; '.join(said)}.",
    )


def chasing(rows: list[Row]) -> Verdict:
    """Moved no further at the smallest batch, measured by GroupNorm's γ and β: does not hold. Else it is not known."""
    batch, found = BATCHES[0], {}
    for name in NETWORKS:
        for letter, key in (("γ", "gamma_drift"), ("β", "beta_drift")):
            small, usual = (
                mean(values(rows, Run(name, "batch", size), key)) / mean(values(rows, Run(name, "group", size), key))
                for size in (batch, USUAL)
            )
            found[f"{letter} of the {NETWORKS[name]}"] = (small, usual)
    further = [small / usual >= MORE for small, usual in found.values()]
    said = ", ".join(f"{name} {small:.2f} ({usual:.2f})" for name, (small, usual) in found.items())
    return Verdict(
        "γ and β chase the noise of small batches.",
        "not shown" if any(further) else "does not hold",
        f"Way from the start at batch {batch} (at {USUAL}), in units of GroupNorm's: {said}. A way does "
        "not say what it follows.",
    )


def others(rows: list[Row]) -> Verdict:
    """Both others better than BatchNorm at all sizes below 16 that have both; at some: holds if."""
    sizes = [batch for batch in FEWER if batch < LIMIT]
    gaps = {
        (name, norm, batch): against(rows, name, batch, norm)
        for name in NETWORKS
        for norm in ("group", "layer")
        for batch in sizes
    }
    better = [found.sign > 0 for found in gaps.values()]
    said = [f"{text} {', '.join(_losses(rows, name, batch) for batch in sizes)}" for name, text in NETWORKS.items()]
    return Verdict(
        "Use LayerNorm or GroupNorm there.",
        "holds" if all(better) else "holds if" if any(better) else "does not hold",
        f"Validation loss of {'/'.join(NAMES.values())}: {'; '.join(said)}.",
        f"{WU_HE} at {USUAL} images a GPU: top-1 error {IMAGENET[USUAL][0]} / {IMAGENET[USUAL][1]} / {LAYER}.",
    )


def mismatched(rows: list[Row]) -> Verdict:
    """At least half of the excess over GroupNorm goes with re-estimated statistics, wherever there is an excess."""
    worse = [(name, batch) for name in NETWORKS for batch in BATCHES if against(rows, name, batch).sign > 0]
    shares = {key: mismatch(rows, *key) for key in worse}
    most = [share >= HALF for share in shares.values()]
    said = ", ".join(f"{share:.0%} ({NETWORKS[name]}, batch {batch})" for (name, batch), share in shares.items())
    word: Word = "holds" if all(most) else "holds if" if any(most) else "does not hold"
    return Verdict(
        "What small batches cost is the running statistics in evaluation, not the training.",
        word if worse else "not shown",
        f"Of the excess over GroupNorm, statistics estimated anew from batches of the training size take away: {said}."
        if worse
        else "BatchNorm has no excess over GroupNorm for sure.",
    )


def accumulated(rows: list[Row]) -> Verdict:
    """Does not hold where m_eff stays that of the small batch and the loss is not below the small batch's."""
    batch, times = ACCUMULATED
    m_eff, better, said = [], [], []
    for name, text in NETWORKS.items():
        small, ours, large = (
            Run(name, "batch", batch),
            Run(name, "batch", batch, times),
            Run(name, "batch", batch * times),
        )
        one, both, full = (mean(values(rows, run, "m_eff")) for run in (small, ours, large))
        m_eff.append(abs(both / one - 1) <= SAME_SAMPLES)
        better.append(gap(rows, ours, small).sign < 0)
        losses = " / ".join(f"{mean(values(rows, run)):.3f}" for run in (small, ours, large))
        said.append(f"{text}: m_eff {' / '.join(map(in_figures, (one, both, full)))}, validation loss {losses}")
    control = Run("mlp", "group", batch, times), Run("mlp", "group", batch * times)
    return Verdict(
        "Accumulating gradients does for BatchNorm what a larger batch does.",
        "does not hold" if all(m_eff) and not any(better) else "holds if",
        f"Batch {batch} / {times} × {batch} accumulated / {batch * times}: {'; '.join(said)}. GroupNorm in the "
        f"MLP, {times} × {batch} against {batch * times}: {_versus(rows, control, 'val_loss', '.4f')}.",
    )


def _range(ends: Sequence[float]) -> str:
    return f"{in_figures(ends[0])} to {in_figures(ends[-1])}"


def _versus(rows: list[Row], pair: Sequence[Run], name: str, form: str) -> str:
    return " against ".join(f"{mean(values(rows, run, name)):{form}}" for run in pair)


def _series(gaps: dict[int, Gap]) -> str:
    return ", ".join(f"{found} ({batch})" for batch, found in gaps.items())


def _losses(rows: list[Row], network: str, batch: int) -> str:
    losses = "/".join(f"{mean(values(rows, Run(network, norm, batch))):.3f}" for norm in NAMES)
    return f"{losses} (batch {batch})"
