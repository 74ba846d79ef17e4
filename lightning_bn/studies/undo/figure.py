# SPDX-License-Identifier: Apache-2.0
"""The picture of the study of undoing BatchNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bn.figures import BAD, LARGEST, STD
from lightning_bn.studies.seeds import mean
from lightning_bn.studies.study import Row
from lightning_bn.studies.undo.rows import BATCHES, INPUTS, RATIOS, chosen, constant_error, forgotten_error, shrinkage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREEN = "#009E73"  # of Okabe & Ito's palette
LOOKS = {"normal": (STD, "o"), "mlp": (LARGEST, "s"), "conv": (BAD, "D")}
LABEL, TICK = 12, 11


def draw(rows: list[Row]) -> Figure:
    """Error in evaluation by σ²/ε, error in training by m_eff, and γ/σ of layers trained to undo themselves.

    Args:
        rows: of the study.

    Returns:
        A figure of its own, without pyplot.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (a heavy import)

    figure = Figure(figsize=(14.5, 5.2), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _evaluation(left, rows)
    _training(middle, rows)
    _layers(right, rows)
    for axes in (left, middle, right):
        axes.tick_params(labelsize=TICK)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=10.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    return figure


def _evaluation(axes: Any, rows: list[Row]) -> None:
    looks = {
        ("without ε", "float32"): (BAD, "D", "γ = σ, float32"),
        ("with ε", "float32"): (STD, "o", "γ = √(σ² + ε), float32"),
        ("with ε", "float64"): (GREEN, "^", "γ = √(σ² + ε), float64"),
    }
    for (gamma, dtype), (colour, marker, label) in looks.items():
        errors = [
            mean(chosen(rows, "error", part="evaluation", gamma=gamma, dtype=dtype, ratio=ratio)) for ratio in RATIOS
        ]
        axes.plot(RATIOS, errors, linestyle="", color=colour, marker=marker, markersize=8, label=label)
    line = [10 ** (power / 8) for power in range(-24, 49)]
    axes.plot(line, [forgotten_error(ratio) for ratio in line], color="black", linewidth=1.3, label="1 − 1/√(1 + ε/σ²)")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("σ²/ε", fontsize=LABEL)
    axes.set_ylabel("root mean square of (y − x)/σ", fontsize=LABEL)
    axes.set_title("Evaluation mode: undone, if ε is not forgotten", fontsize=13)


def _training(axes: Any, rows: list[Row]) -> None:
    every = []
    for name, (colour, marker) in LOOKS.items():
        columns = {
            key: [mean(chosen(rows, key, part="training", input=name, batch=batch)) for batch in BATCHES]
            for key in ("m_eff", "error")
        }
        every += columns["m_eff"]
        axes.plot(
            columns["m_eff"],
            columns["error"],
            linestyle="",
            color=colour,
            marker=marker,
            markersize=8,
            label=INPUTS[name],
        )
    low, high = min(every), max(every)
    line = [low * (high / low) ** (place / 60) for place in range(61)]
    axes.plot(line, [constant_error(m) for m in line], color="black", linewidth=1.3, label="√(2(1 − E[s])) ≈ √(3/(2m))")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(f"effective samples m_eff, batch {BATCHES[0]} to {BATCHES[-1]}", fontsize=LABEL)
    axes.set_title("Training mode: batch noise is left", fontsize=13)


def _layers(axes: Any, rows: list[Row]) -> None:
    ratios = [mean(chosen(rows, "gamma_ratio", part="layer", batch=batch)) for batch in BATCHES]
    errors = [mean(chosen(rows, "eval_error", part="layer", batch=batch)) for batch in BATCHES]
    axes.plot(BATCHES, ratios, linestyle="", color=STD, marker="o", markersize=8, label="γ/σ that it arrives at")
    axes.plot(BATCHES, errors, linestyle="", color=BAD, marker="D", markersize=8, label="its error in evaluation mode")
    axes.plot(BATCHES, [shrinkage(m) for m in BATCHES], color="black", linewidth=1.3, label="E[s] and 1 − E[s]")
    axes.plot(BATCHES, [1 - shrinkage(m) for m in BATCHES], color="black", linewidth=1.3)
    axes.axhline(1, color="grey", linestyle="--", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.set_xlabel("batch size", fontsize=LABEL)
    axes.set_title("A layer trained to undo itself", fontsize=13)
