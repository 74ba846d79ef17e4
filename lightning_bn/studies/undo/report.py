# SPDX-License-Identifier: Apache-2.0
"""What the study of undoing BatchNorm says of its rows."""

from __future__ import annotations

from lightning_bn.studies.batch_size.rows import in_figures
from lightning_bn.studies.seeds import markdown, mean, spread
from lightning_bn.studies.study import Row, Verdict
from lightning_bn.studies.undo.rows import (
    BATCHES,
    DTYPES,
    INPUTS,
    NETWORKS,
    RATIOS,
    chosen,
    constant_error,
    least_error,
    power,
    shrinkage,
)

ROUNDING = 1e-6
"""Error up to which a float32 layer counts as undone."""
VISIBLE = 0.01
"""Error from which a layer counts as not undone."""
NEAR = 0.02
"""How far γ/σ may be from 1 to count as arrived."""
FAR, UNDONE = 0.5, 0.1
"""Error from which a trained layer is far from undone, and up to which it is undone."""


def tables(rows: list[Row]) -> str:
    """Evaluation, training and trained networks, a table each."""
    return "\n\n".join(
        [
            "**In evaluation mode**: root mean square of (y − x)/σ, β = μ",
            _evaluation_table(rows),
            "**In training mode**, where each batch has a mean and a deviation of its own: γ = √(σ² + ε), β = μ",
            _training_table(rows),
            "**A layer trained to put out what it gets** (normal values, from γ = 1, β = 0)",
            _layer_table(rows),
            "**Networks trained on the digits**: medians over the layers and mean over the seeds",
            _network_table(rows),
        ]
    )


def _evaluation_table(rows: list[Row]) -> str:
    def at(ratio: float, gamma: str, name: str, dtype: str) -> str:
        values = chosen(rows, name, part="evaluation", ratio=ratio, gamma=gamma, dtype=dtype)
        return f"{mean(values):.2g}"

    kinds = (("with ε", "error"), ("without ε", "error"))
    heads = [
        "σ²/ε",
        *(f"γ = {'√(σ² + ε)' if gamma == 'with ε' else 'σ'}, {dtype}" for gamma, _ in kinds for dtype in DTYPES),
    ]
    lines = [
        [
            f"{ratio:g}",
            *(at(ratio, gamma, name, dtype) for gamma, name in kinds for dtype in DTYPES),
            at(ratio, "without ε", "predicted", "float64"),
        ]
        for ratio in RATIOS
    ]
    return markdown([*heads, "γ = σ, closed form"], lines)


def _training_table(rows: list[Row]) -> str:
    heads = ["batch", "normal values", "closed form √(2(1 − E[s]))"]
    heads += [f"{text}: {what}" for name, text in INPUTS.items() if name != "normal" for what in ("m_eff", "error")]
    lines = []
    for batch in BATCHES:
        cells = [str(batch), f"{training_error(rows, 'normal', batch):.3f}", f"{constant_error(batch):.3f}"]
        for name in ("mlp", "conv"):
            samples = mean(chosen(rows, "m_eff", part="training", input=name, batch=batch))
            cells += [in_figures(samples), f"{training_error(rows, name, batch):.3f}"]
        lines.append(cells)
    return markdown(heads, lines)


def _layer_table(rows: list[Row]) -> str:
    heads = ["batch", "γ/σ", "closed form E[s]", "error in training", "closed form √(1 − E[s]²)", "error in evaluation"]
    lines = []
    for batch in BATCHES:
        found = [chosen(rows, name, part="layer", batch=batch) for name in ("gamma_ratio", "error", "eval_error")]
        ratio, error, evaluation = (f"{mean(values):.3f} ± {spread(values):.3f}" for values in found)
        lines.append([str(batch), ratio, f"{shrinkage(batch):.3f}", error, f"{least_error(batch):.3f}", evaluation])
    return markdown(heads, lines)


def _network_table(rows: list[Row]) -> str:
    columns = {
        "error before": "start_error",
        "error after": "eval_error",
        "‖γ − σ‖/‖σ‖ before": "start_distance",
        "after": "gamma_distance",
        "after, with γ back at 1": "still_distance",
        "correlation of γ and σ": "correlation",
    }
    lines = [
        [
            text,
            *(
                f"{mean(values):.2f} ± {spread(values):.2f}"
                for values in (_network(rows, name, key) for key in columns.values())
            ),
        ]
        for name, text in NETWORKS.items()
    ]
    return markdown(["network", *columns], lines)


def training_error(rows: list[Row], name: str, batch: int) -> float:
    """Mean error of the constants in training mode."""
    return mean(chosen(rows, "error", part="training", input=name, batch=batch))


def _network(rows: list[Row], name: str, key: str) -> list[float]:
    return chosen(rows, key, part="network", input=name)


def _worst(rows: list[Row], gamma: str, dtype: str) -> float:
    return max(chosen(rows, "error", part="evaluation", gamma=gamma, dtype=dtype))


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What became of the claim that γ = σ, β = μ undo BatchNorm."""
    return [_in_evaluation(rows), _in_training(rows), _of_training(rows), _of_networks(rows)]


def _in_evaluation(rows: list[Row]) -> Verdict:
    """Undone with ε, and visibly not without it."""
    right, wrong = {dtype: _worst(rows, "with ε", dtype) for dtype in DTYPES}, _worst(rows, "without ε", "float64")
    undone = right["float32"] <= ROUNDING
    equal = mean(chosen(rows, "error", part="evaluation", gamma="without ε", dtype="float64", ratio=1.0))
    hundred = mean(chosen(rows, "error", part="evaluation", gamma="without ε", dtype="float64", ratio=100.0))
    return Verdict(
        "γ = σ, β = μ undo BatchNorm in evaluation mode.",
        "does not hold" if not undone else "holds if" if wrong >= VISIBLE else "holds",
        f"With γ = √(σ² + ε) the error is at most {right['float32']:.1g} of σ in float32 and {right['float64']:.1g} in "
        f"float64. With γ = σ it is {equal:.2f} where σ² = ε, {hundred:.3f} where σ² = 100 ε.",
    )


def _in_training(rows: list[Row]) -> Verdict:
    """No batch and no input with an error below what is visible."""
    errors = {name: [training_error(rows, name, batch) for batch in BATCHES] for name in INPUTS}
    vectors, maps = errors["normal"], errors["conv"]
    return Verdict(
        "They undo it in training mode as well.",
        "does not hold" if min(map(min, errors.values())) >= VISIBLE else "holds if",
        f"Error {vectors[0]:.2f} at batch {BATCHES[0]} to {vectors[-1]:.2f} at {BATCHES[-1]} on normal values, as "
        f"batch^({power(BATCHES, vectors):.2f}); {maps[0]:.3f} to {maps[-1]:.3f} on feature maps of 8×8, where m_eff "
        f"is larger. Theory: about √(3/(2m)).",
    )


def _of_training(rows: list[Row]) -> Verdict:
    """γ/σ within 2 % of 1 at all batch sizes, at some, at none."""
    ratios = {batch: mean(chosen(rows, "gamma_ratio", part="layer", batch=batch)) for batch in BATCHES}
    arrived = [batch for batch, ratio in ratios.items() if abs(ratio - 1) <= NEAR]
    apart = max(abs(ratio - shrinkage(batch)) for batch, ratio in ratios.items())
    words = f"; within {NEAR:.0%} of 1 at batch {', '.join(map(str, arrived))}" if arrived else ""
    return Verdict(
        "A layer that is trained to undo itself arrives at γ = σ.",
        "holds" if len(arrived) == len(BATCHES) else "holds if" if arrived else "does not hold",
        f"γ/σ = {', '.join(f'{ratio:.2f} (batch {batch})' for batch, ratio in ratios.items())}{words}. It is the mean "
        f"deviation of a batch, E[s]/σ, to within {apart:.3f}.",
    )


def _of_networks(rows: list[Row]) -> Verdict:
    """Layers far from undone, and γ no nearer to σ than 1 is."""
    errors = {name: mean(_network(rows, name, "eval_error")) for name in NETWORKS}
    nearer = any(
        mean(_network(rows, name, "gamma_distance")) < mean(_network(rows, name, "still_distance")) for name in NETWORKS
    )
    correlations = [mean(_network(rows, name, "correlation")) for name in NETWORKS]
    far = min(errors.values()) >= FAR and not nearer
    return Verdict(
        "Networks that were trained have undone their BatchNorm layers.",
        "does not hold" if far else "holds" if max(errors.values()) <= UNDONE else "not shown",
        f"Error {', '.join(f'{error:.2f} ({NETWORKS[name]})' for name, error in errors.items())} after training; γ is "
        f"{'nearer' if nearer else 'no nearer'} to σ than 1 is; correlation of γ and σ over channels "
        f"{min(correlations):.2f} to {max(correlations):.2f}.",
    )


def summary(rows: list[Row]) -> str:
    """What was seen, from the rows."""
    worst, forgotten = _worst(rows, "with ε", "float32"), _worst(rows, "without ε", "float64")
    first, last = (training_error(rows, "normal", batch) for batch in (BATCHES[0], BATCHES[-1]))
    ratio = mean(chosen(rows, "gamma_ratio", part="layer", batch=BATCHES[0]))
    shrunk = all(
        mean(_network(rows, name, "start_error")) > mean(_network(rows, name, "eval_error")) for name in NETWORKS
    )
    still = all(
        mean(_network(rows, name, "still_distance")) <= mean(_network(rows, name, "gamma_distance"))
        for name in NETWORKS
    )
    why = " because σ grew towards γ, while γ moved away from it" if shrunk and still else ""
    way = "became smaller" if shrunk else "did not become smaller in both"
    return " ".join(
        [
            f"In evaluation mode γ = √(σ² + ε), β = μ give back the input to within {worst:.1g} of its standard",
            f"deviation (float32); without ε the error reaches {forgotten:.2f}, where σ² is far below ε. In training",
            "mode no constants do, as each batch has another mean and deviation:",
            f"{first:.2f} of σ is left at batch {BATCHES[0]}, {last:.2f} at {BATCHES[-1]}. A layer that is trained to",
            f"undo itself at batch {BATCHES[0]} therefore stops at γ = {ratio:.2f} σ, too small for evaluation.",
            f"Training on the digits does not lead there: the distance from undone {way} in training{why}.",
        ]
    )
