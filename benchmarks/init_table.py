# SPDX-License-Identifier: Apache-2.0
"""What a start is worth: six initialisations with and without BatchNorm, at three depths, in three precisions.

Run:     python benchmarks/init_table.py [--seeds 3] [--epochs 5] [--csv FILE] [--write docs/initialisation.md]
Data:    scikit-learn's digits, 1100 to train on, 600 to validate; MLP of 128 ReLU units a layer, batch 64.
Output:  a markdown table. Each cell has the accuracy on the validation data after the last epoch, mean over the seeds,
         with Adam (1e-3) and with SGD (0.01, momentum 0.9) in float32; where the first forward pass is not finite, the
         precision and the layer at which it stops being so, as seen and as predicted from the weights alone.
         With --write it replaces what stands between the markers of that page.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_bn import initialize
from lightning_bn.demo import DigitsData, DigitsMLP
from lightning_bn.first_signal import stages
from lightning_bn.gains import followers
from lightning_bn.initialization import Report
from lightning_bn.outlook import predicted_overflow

SCHEMES: dict[str, Callable[[nn.Module, int], Report]] = {
    "He": lambda model, seed: initialize(model, "he", seed=seed),
    "Xavier, gain 1": lambda model, seed: initialize(model, "xavier", nonlinearity="linear", seed=seed),
    "N(0, 0.01²)": lambda model, seed: initialize(model, "naive", seed=seed),
    "U(−0.05, 0.05)": lambda model, seed: initialize(model, "uniform", seed=seed),
    "N(0, 1)": lambda model, seed: initialize(model, 1.0, seed=seed),
    "N(0, 1000²)": lambda model, seed: initialize(model, 1000.0, seed=seed),
}
NORMS = {"without BatchNorm": "none", "with BatchNorm": "batch"}
DEPTHS = (5, 20, 50)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}
BATCH = 64
FADED = 1e-3  # a signal smaller than this is worth a word
MARKERS = ("<!-- table: begin -->", "<!-- table: end -->")


@dataclass
class Cell:
    """What was measured for one initialisation, norm and depth; one entry for each seed."""

    last_std: list[float] = field(default_factory=list)
    initial_loss: list[float] = field(default_factory=list)
    seen: dict[str, list[int | None]] = field(default_factory=dict)
    predicted: dict[str, list[int | None]] = field(default_factory=dict)
    accuracy: dict[str, list[float]] = field(default_factory=dict)


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, to train on and to validate."""
    data = DigitsData()
    data.setup("fit")
    if data.train_set is None or data.val_set is None:
        raise RuntimeError("the digits need to be there after setup, and are not")
    return (*data.train_set.tensors, *data.val_set.tensors)  # type: ignore[return-value]


@torch.no_grad()
def first_forward(
    model: DigitsMLP, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[int | None, float, float]:
    """First linear layer, counted from 1, that is not finite; std of the last hidden layer; initial loss."""
    x, place, bad, last = images.to(dtype), 0, None, math.nan
    net = model.net.to(dtype).train()
    for layer in net:
        if isinstance(layer, nn.Linear):
            last = x.double().std().item()
            place += 1
        x = layer(x)
        if bad is None and isinstance(layer, nn.Linear) and not bool(x.isfinite().all()):
            bad = place
    loss = nn.functional.cross_entropy(x.float(), labels).item()
    net.float()
    return bad, last, loss


def train(
    model: DigitsMLP, optimizer: torch.optim.Optimizer, data: tuple[Tensor, ...], epochs: int, seed: int
) -> float:
    """Accuracy on the validation data after a few epochs."""
    images, labels, val_images, val_labels = data
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.net(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return (model.net(val_images).argmax(1) == val_labels).float().mean().item()


def measure(job: tuple[str, str, int], seed: int, epochs: int, data: tuple[Tensor, ...], cell: Cell) -> None:
    """Fill in one seed of a cell: scheme, norm and depth."""
    scheme, norm, depth = job

    def start() -> tuple[DigitsMLP, Report]:
        model = DigitsMLP(norm, depth=depth)  # type: ignore[arg-type]
        return model, SCHEMES[scheme](model, seed)

    for name, dtype in DTYPES.items():
        model, report = start()
        ahead = predicted_overflow(stages(model, report, followers(model)), dtype)
        bad, std, loss = first_forward(model, data[0][:BATCH], data[1][:BATCH], dtype)
        cell.seen.setdefault(name, []).append(bad)
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        place = linear.index(ahead.layer) + 1 if ahead and ahead.layer in linear else None
        cell.predicted.setdefault(name, []).append(place)
        if dtype is torch.float32:
            cell.last_std.append(std)
            cell.initial_loss.append(loss)
    for name, make in OPTIMIZERS.items():
        model, _ = start()
        cell.accuracy.setdefault(name, []).append(train(model, make(model.parameters()), data, epochs, seed))


def cell_text(cell: Cell) -> str:
    """One cell in words."""
    parts = [" / ".join(f"{mean(values):.2f}" for values in cell.accuracy.values())]
    for name in DTYPES:
        hit = [place for place in cell.seen[name] if place is not None]
        said = sorted({place for place in cell.predicted[name] if place is not None})
        if hit:
            often = "" if len(hit) == len(cell.seen[name]) else f" in {len(hit)} of {len(cell.seen[name])}"
            where = "–".join(map(str, sorted({min(hit), max(hit)})))
            parts.append(f"{name} ends at {where}{often} ({'predicted ' + str(said[0]) if said else 'not predicted'})")
        elif said:
            parts.append(f"{name} finite (predicted to end at {said[0]})")
    if not math.isfinite(cell.last_std[0]) or mean(cell.last_std) < FADED:
        parts.append(f"std {mean(cell.last_std):.0e}")
    return "; ".join(parts)


def tables(cells: dict[tuple[str, str, int], Cell]) -> str:
    """Both tables, in markdown."""
    lines = []
    for title, norm in NORMS.items():
        heads = [f"depth {depth}" for depth in DEPTHS]
        lines += [f"**{title}**", "", f"| start | {' | '.join(heads)} |", f"|---|{'---|' * len(DEPTHS)}"]
        lines += [
            f"| {scheme} | {' | '.join(cell_text(cells[scheme, norm, depth]) for depth in DEPTHS)} |"
            for scheme in SCHEMES
        ]
        lines.append("")
    losses = ["**Initial loss divided by ln 10**", "", "| start | " + " | ".join(_columns()) + " |"]
    losses.append("|---|" + "---:|" * len(_columns()))
    for scheme in SCHEMES:
        ratios = (
            mean(cells[scheme, norm, depth].initial_loss) / math.log(10) for norm in NORMS.values() for depth in DEPTHS
        )
        losses.append(f"| {scheme} | " + " | ".join(f"{ratio:.2g}" for ratio in ratios) + " |")
    return "\n".join([*lines, *losses])


def _columns() -> list[str]:
    return [f"{title}, depth {depth}" for title in ("none", "BN") for depth in DEPTHS]


def save_csv(path: str, cells: dict[tuple[str, str, int], Cell]) -> None:
    """One row for each initialisation, norm, depth and seed."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{what} {name}" for name in DTYPES for what in ("seen", "predicted")]
        writer.writerow(["scheme", "norm", "depth", "seed", "last_std", "initial_loss", *names, *OPTIMIZERS])
        for (scheme, norm, depth), cell in cells.items():
            for seed in range(len(cell.last_std)):
                layers = [table[name][seed] for name in DTYPES for table in (cell.seen, cell.predicted)]
                accuracies = [cell.accuracy[name][seed] for name in OPTIMIZERS]
                writer.writerow(
                    [scheme, norm, depth, seed, cell.last_std[seed], cell.initial_loss[seed], *layers, *accuracies]
                )


def main() -> None:
    """Measure every cell, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each run (default: %(default)s)")
    parser.add_argument("--csv", help="file for the numbers of every single run")
    parser.add_argument("--write", help="page whose table is replaced")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    data = tensors()
    jobs = [(s, n, d) for s in SCHEMES for n in NORMS.values() for d in DEPTHS]
    cells = {job: Cell() for job in jobs}
    for job in track(jobs, "starts", console=None, disable=not sys.stderr.isatty()):
        for seed in range(options.seeds):
            measure(job, seed, options.epochs, data, cells[job])
    setting = f"torch {torch.__version__}, CPU; {options.seeds} seeds, {options.epochs} epochs"
    text = f"Measured by `python benchmarks/init_table.py`: {setting}.\n\n{tables(cells)}\n"
    if options.csv:
        save_csv(options.csv, cells)
    if options.write:
        page = Path(options.write)
        before, rest = page.read_text().split(MARKERS[0])
        page.write_text(f"{before}{MARKERS[0]}\n{text}{MARKERS[1]}{rest.split(MARKERS[1])[1]}")
    print(text)


if __name__ == "__main__":
    main()
