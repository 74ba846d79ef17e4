# SPDX-License-Identifier: Apache-2.0
"""What the rows of the study ``init`` say: tables and a summary."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from lightning_bn.studies.init.rows import (
    DEPTHS,
    GAMMAS,
    MADE,
    NORMS,
    SIMPLE,
    STARTS,
    Cell,
    compare,
    ends,
    predictions,
    span,
)
from lightning_bn.studies.seeds import column, markdown, mean, of_seeds, size
from lightning_bn.studies.starts import DTYPES, OPTIMIZERS
from lightning_bn.studies.study import Row, Setting

OVERFLOWS = (
    "First forward pass: the linear layer, counted from 1, whose output is the first that is not finite, and in "
    "brackets the one predicted from the weights alone; a dash is none. Cells that are not listed are finite and were "
    "predicted to be."
)


def tables(rows: list[Row]) -> str:
    """Accuracies, first forward passes, first losses, first epochs, and other γ."""
    heads = ["start", *(f"depth {depth}" for depth in DEPTHS)]
    parts = ["Accuracy after five epochs, Adam / SGD. 0.10 is chance; ± is the standard deviation over seeds."]
    for norm, title in NORMS.items():
        lines = [[label, *(accuracies(rows, Cell(start, norm, d)) for d in DEPTHS)] for start, label in STARTS.items()]
        parts += [f"**{title}**", markdown(heads, lines)]
    parts += [
        OVERFLOWS,
        markdown(["start", "depth", *DTYPES], overflows(rows)),
        "Loss of the first batch over ln 10; in brackets the standard deviation of what the last layer gets.",
        markdown(["start", *(f"{norm}, {depth}" for norm, depth in product(("none", "BN"), DEPTHS))], firsts(rows)),
        "Training loss over ln 10 with BatchNorm, Adam / SGD: mean over the first epoch, then over the fifth.",
        markdown(heads, losses(rows)),
        "He with other starting values of γ, after five epochs.",
        markdown(["network", "γ", "first loss over ln 10", "Adam", "SGD"], gammas(rows)),
    ]
    return "\n\n".join(parts)


def accuracies(rows: list[Row], cell: Cell) -> str:
    """The accuracies of a cell with Adam and with SGD."""
    return " / ".join(of_seeds(cell.values(rows, name)) for name in OPTIMIZERS)


def overflows(rows: list[Row]) -> Iterator[list[str]]:
    """The cells in which a first forward pass is not finite, or was predicted not to be."""
    for start, norm, depth in product(STARTS, NORMS, DEPTHS):
        found = [ends(rows, Cell(start, norm, depth), name) for name in DTYPES]
        if not all(math.isnan(place) for end in found for places in end for place in places):
            yield [f"{STARTS[start]}, {NORMS[norm]}", str(depth), *map(str, found)]


def firsts(rows: list[Row]) -> Iterator[list[str]]:
    """First loss and last standard deviation of every cell, by start."""
    for start, label in STARTS.items():
        cells = [Cell(start, norm, depth) for norm, depth in product(NORMS, DEPTHS)]
        pairs = [(mean(cell.values(rows, "loss_ratio")), mean(cell.values(rows, "std"))) for cell in cells]
        yield [label, *(f"{size(loss)} ({size(std)})" for loss, std in pairs)]


def losses(rows: list[Row]) -> Iterator[list[str]]:
    """Training loss of the first and the last epoch with BatchNorm, by start."""
    for start, label in STARTS.items():
        cells = [Cell(start, "batch", depth) for depth in DEPTHS]
        yield [label, *("; ".join(loss_text(rows, cell, when) for when in ("first", "last")) for cell in cells)]


def loss_text(rows: list[Row], cell: Cell, when: str) -> str:
    """The training losses of a cell over an epoch, with Adam and with SGD."""
    return " / ".join(size(mean(cell.values(rows, f"{name}_loss_{when}"))) for name in OPTIMIZERS)


def gammas(rows: list[Row]) -> Iterator[list[str]]:
    """What other starting values of γ lead to."""
    for gamma in GAMMAS:
        yield ["perceptron, depth 5", f"{gamma:g}", *of_gamma(rows, "mlp", gamma)]
    for gamma in (1.0, 0.0):
        where = "everywhere" if gamma else "on the norms that close a residual branch, 1 elsewhere"
        yield ["residual network, 2 blocks a stage", f"{gamma:g} {where}", *of_gamma(rows, "resnet", gamma)]


def of_gamma(rows: list[Row], network: str, gamma: float) -> list[str]:
    """First loss and accuracies of a network with a starting value of γ."""
    depth = DEPTHS[0] if network == "mlp" else 2
    where: Setting = {"network": network, "start": "he", "norm": "batch", "depth": depth, "gamma": gamma}
    found = {name: column(rows, name, where) for name in ("loss_ratio", *OPTIMIZERS)}
    return [size(mean(found["loss_ratio"])), *(of_seeds(found[name]) for name in OPTIMIZERS)]


def summary(rows: list[Row]) -> str:
    """What was seen, in a few sentences."""
    usual, first, last = (*MADE, *SIMPLE), DEPTHS[0], DEPTHS[-1]
    near = {norm: "{:.2f} to {:.2f}".format(*span(rows, usual, norm, first)) for norm in NORMS}
    deep = {norm: span(rows, tuple(STARTS), norm, last)[1] for norm in NORMS}
    middle = {norm: span(rows, usual, norm, DEPTHS[1]) for norm in NORMS}
    speed, final = compare(rows, "batch", loss=True), compare(rows, "batch")
    guess = predictions(rows)
    ended = guess["exact"] + guess["beside"] + guess["further"] + guess["missed"]
    return (
        f"At depth {first} He, Xavier, N(0, 0.01²) and U(−0.05, 0.05) reach {near['batch']} with BatchNorm and "
        f"{near['none']} without; at depth {DEPTHS[1]} {middle['batch'][0]:.2f} to {middle['batch'][1]:.2f} and "
        f"{middle['none'][0]:.2f} to {middle['none'][1]:.2f}. At depth {last} the best cell of all has "
        f"{deep['batch']:.2f} with BatchNorm and {deep['none']:.2f} without. With BatchNorm He and Xavier against the "
        f"two simple starts: in the training loss of the fifth epoch {speed}, in the accuracy after it {final}. "
        f"Of {ended} first forward passes that are not finite, the weights alone told the layer exactly in "
        f"{guess['exact']}, to one layer in {guess['beside']} more, less well in {guess['further']}, and not at all in "
        f"{guess['missed']}; {guess['alarms']} finite ones were predicted to end."
    )
