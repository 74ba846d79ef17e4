# SPDX-License-Identifier: Apache-2.0
"""The picture of the study of batch sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bn.figures import BAD, LARGEST, STD
from lightning_bn.rules.noisy_batch_statistics import NOISY, SEVERE
from lightning_bn.studies.batch_size.rows import BATCHES, FEWER, NETWORKS, Run, values
from lightning_bn.studies.seeds import mean
from lightning_bn.studies.study import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKY = "#56B4E9"  # of Okabe & Ito's palette
GREEN = "#009E73"  # of the same
LINES = (
    ("batch", "val_loss", "BatchNorm", STD, "o", "-"),
    ("batch", "precise_loss", "BatchNorm, statistics anew", SKY, "^", "--"),
    ("group", "val_loss", "GroupNorm", LARGEST, "s", "-"),
    ("layer", "val_loss", "LayerNorm", GREEN, "v", ":"),
)
LABEL, TICK = 12, 11


def draw(rows: list[Row]) -> Figure:
    """Validation loss by batch size in each network, and the effective samples of its BatchNorm layers.

    Args:
        rows: of the study.

    Returns:
        A figure of its own, without pyplot. Bars and bands go from the smallest to the largest of the seeds.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (a heavy import)

    figure = Figure(figsize=(14.5, 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (name, text) in zip(panels[:2], NETWORKS.items(), strict=True):
        _losses(axes, rows, name)
        axes.set_title(f"{text}: validation loss", fontsize=13)
    losses = [value for run in _drawn() for value in values(rows, *run)]
    for axes in panels[:2]:
        axes.set_ylim(min(losses) / 1.1, max(losses) * 1.1)
    _samples(panels[2], rows)
    panels[2].set_title("Effective samples per channel, m_eff", fontsize=13)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        axes.set_xlabel("batch size", fontsize=LABEL)
        axes.tick_params(labelsize=TICK)
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend(fontsize=10.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    return figure


def _drawn() -> list[tuple[Run, str]]:
    return [(Run(network, norm, batch), name) for network in NETWORKS for norm, name, *_ in LINES for batch in BATCHES]


def _losses(axes: Any, rows: list[Row], network: str) -> None:
    # Of equal values the mean may be off by rounding, and a bar must not be negative.
    for norm, name, label, colour, marker, style in LINES:
        sizes = [batch for batch in BATCHES if norm != "layer" or batch in FEWER]
        found = [values(rows, Run(network, norm, batch), name) for batch in sizes]
        heights = [mean(seeds) for seeds in found]
        reach = [
            [max(height - min(seeds), 0.0) for height, seeds in zip(heights, found, strict=True)],
            [max(max(seeds) - height, 0.0) for height, seeds in zip(heights, found, strict=True)],
        ]
        axes.errorbar(
            sizes,
            heights,
            reach,
            color=colour,
            marker=marker,
            markersize=7,
            linestyle=style,
            linewidth=1.8,
            capsize=3,
            label=label,
        )
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.4], ["0.1", "0.2", "0.4"])
    axes.yaxis.minorticks_off()


def _samples(axes: Any, rows: list[Row]) -> None:
    for (name, text), colour, marker in zip(NETWORKS.items(), (STD, BAD), ("o", "D"), strict=True):
        for key, which, style in (("m_eff", "median layer", "-"), ("m_eff_min", "noisiest layer", "--")):
            heights = [mean(values(rows, Run(name, "batch", batch), key)) for batch in BATCHES]
            label = f"{text}, {which}"
            axes.plot(
                BATCHES, heights, color=colour, marker=marker, markersize=7, linestyle=style, linewidth=1.8, label=label
            )
    axes.plot(BATCHES, BATCHES, color="black", linewidth=1.2, linestyle=":", label="batch size")
    for level, text in ((NOISY, "noted below"), (SEVERE, "warned of below")):
        axes.axhline(level, color="grey", linewidth=1)
        axes.annotate(f"{text} {level:g}", (BATCHES[-1], level), fontsize=9.5, ha="right", va="bottom")
    axes.set_yscale("log")
