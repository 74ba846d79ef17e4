# SPDX-License-Identifier: Apache-2.0
"""Tables and summary of the study of batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.studies.batch_size.rows import (
    ACCUMULATED,
    BATCHES,
    FEWER,
    NAMES,
    NETWORKS,
    SAME,
    USUAL,
    Run,
    against,
    in_figures,
    mismatch,
    samples,
    values,
)
from lightning_bn.studies.batch_size.verdicts import boundary
from lightning_bn.studies.seeds import markdown, mean, spread
from lightning_bn.studies.study import Row


def tables(rows: list[Row]) -> str:
    """A table for each network, the learning rate, and γ and β."""
    batch, times = ACCUMULATED
    parts = [
        f"**{text}**: m_eff in the median layer and in the noisiest one; validation loss, and accuracy in the last two "
        f"columns; mean ± standard deviation over the seeds. {times} × {batch} is accumulated.\n\n{_losses(rows, name)}"
        for name, text in NETWORKS.items()
    ]
    parts.append(f"**Is it the learning rate?** Validation loss of the MLP by the rule for it\n\n{_rates(rows)}")
    parts.append(
        "**γ and β** at the end: mean of γ over all channels, and way of γ and β from the start, ‖γ − 1‖/√C and ‖β‖/√C "
        f"in the median layer\n\n{_affine(rows)}"
    )
    return "\n\n".join(parts)


def _losses(rows: list[Row], network: str) -> str:
    heads = ["batch", "m_eff", "noisiest", "BatchNorm (BN)", "BN, statistics re-estimated from such batches"]
    heads += ["BN, from all images at once", "BN, from the validation batch itself", "GroupNorm", "LayerNorm"]
    heads += ["accuracy, BN", "accuracy, GroupNorm"]
    batch, times = ACCUMULATED
    runs = [(str(size), size, 1) for size in BATCHES]
    runs.insert(BATCHES.index(batch) + 1, (f"{times} × {batch}", batch, times))
    lines = []
    for text, size, accumulate in runs:
        ours, group, layer = (Run(network, norm, size, accumulate) for norm in NAMES)
        m_eff = [in_figures(mean(values(rows, ours, name))) for name in ("m_eff", "m_eff_min")]
        losses = [_cell(rows, ours, name) for name in ("val_loss", "precise_loss", "whole_loss", "batch_loss")]
        compared = [_cell(rows, group), _cell(rows, layer), _cell(rows, ours, "val_acc"), _cell(rows, group, "val_acc")]
        lines.append([text, *m_eff, *losses, *compared])
    return markdown(heads, lines)


def _cell(rows: Sequence[Row], run: Run, name: str = "val_loss") -> str:
    found = values(rows, run, name)
    return f"{mean(found):.3f} ± {spread(found):.3f}" if found else ""


def _rates(rows: list[Row]) -> str:
    heads = [
        "batch",
        *(f"{NAMES[norm]}, {text}" for norm in ("batch", "group") for text in ("√(batch/32)", "the same")),
    ]
    lines = [
        [
            str(size),
            *(
                _cell(rows, Run("mlp", norm, size, rule=rule))
                for norm in ("batch", "group")
                for rule in ("root", "same")
            ),
        ]
        for size in SAME
    ]
    return markdown(heads, lines)


def _affine(rows: list[Row]) -> str:
    columns = {"mean of γ": "gamma_mean", "way of γ": "gamma_drift", "way of β": "beta_drift"}
    heads = ["network, batch", *(f"{text}, {NAMES[norm]}" for text in columns for norm in ("batch", "group"))]
    lines = [
        [
            f"{text}, {size}",
            *(_cell(rows, Run(name, norm, size), key) for key in columns.values() for norm in ("batch", "group")),
        ]
        for name, text in NETWORKS.items()
        for size in (FEWER[0], USUAL)
    ]
    return markdown(heads, lines)


def summary(rows: list[Row]) -> str:
    """What was seen, from the rows."""
    smallest, largest = BATCHES[0], BATCHES[-1]
    worse = [(name, batch) for name in NETWORKS for batch in BATCHES if against(rows, name, batch).sign > 0]
    parts = []
    for name, text in NETWORKS.items():
        sizes = [str(batch) for key, batch in worse if key == name]
        better = [str(batch) for batch in BATCHES if against(rows, name, batch).sign < 0]
        words = [
            f"worse than GroupNorm at batch {', '.join(sizes)}" if sizes else "worse than GroupNorm at no batch size"
        ]
        words += [f"better at {', '.join(better)}"] if better else []
        parts.append(f"In the {text} BatchNorm is {' and '.join(words)}.")
    parts.append(boundary(rows, worse))
    parts.append(
        f"At batch {smallest} that layer has {in_figures(samples(rows, 'mlp', smallest))} in the MLP and "
        f"{in_figures(samples(rows, 'conv', smallest))} in the conv net, at batch {largest} "
        f"{in_figures(samples(rows, 'mlp', largest))} and {in_figures(samples(rows, 'conv', largest))}."
    )
    if worse:
        shares = [mismatch(rows, *key) for key in worse]
        parts.append(
            f"Statistics estimated anew take away {min(shares):.0%} to {max(shares):.0%} of what BatchNorm loses there."
        )
    return " ".join(parts)
