# SPDX-License-Identifier: Apache-2.0
"""Signs of BatchNorm that may or may not tell sick runs from healthy ones, over several seeds.

Run:     OMP_NUM_THREADS=1 python benchmarks/batchnorm_signs.py speed|ranks [--seeds 10]
Output:  ``speed``: step-to-step speed and gradient share of γ and β where they drive overfitting (their learning rate
         is 1000 times that of the weights, as in overfitting_cases.py) and where they do not; medians over the seeds,
         with the smallest and the largest.
         ``ranks``: how far two processes are apart whose data are alike or not, with the running statistics of the
         first broadcast and with those of each kept, and what those of the first do to the validation loss against
         statistics of all training data. Both processes run here, step by step, with gradients averaged.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import replace
from statistics import mean, median
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from overfitting_cases import CASES, Classifier, adam, digits, mlp
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from torch.utils.data import DataLoader

from lightning_bn import BatchNormMonitor, precise_statistics
from lightning_bn.callbacks.between_ranks import compare
from lightning_bn.callbacks.statistics_watch import StatisticsWatch, of_ranks

RUNS = {
    name: CASES[name] for name in ("lr of γ, β x 1000", "ordinary", "ordinary, lr 0.01", "ordinary, SGD", "healthy")
}
RUNS["lr of everything as of γ, β there"] = replace(CASES["ordinary"], optimizer=adam(0.05))
STEPS, SAMPLES = 300, 1000
SHARDS = ("drawn anew", "fixed halves", "other classes", "contrast 1 and 0.8", "contrast 1 and 0.5")
Samples = tuple[Tensor, Tensor]


class Kept(Logger):
    """Keeps what is logged."""

    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the numbers of a due step."""
        if step is not None and "bn_overview/gamma_speed_log10_median" in metrics:
            self.rows.append(metrics)

    def log_hyperparams(self, *_: Any) -> None:
        """Nothing."""


def signs(name: str, seed: int) -> tuple[float, float, float]:
    """Median speed of γ and of β over layers and steps, and mean gradient share, of one run."""
    seed_everything(seed, verbose=False)
    case, kept = RUNS[name], Kept()
    train, _ = case.sets(seed)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=kept,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[BatchNormMonitor(every_n_steps=5, assess=False)],
    )
    with redirect_stderr(io.StringIO()):  # the findings
        trainer.fit(Classifier(case.net(), case.optimizer), DataLoader(train, case.batch, shuffle=True, drop_last=True))
    gamma, beta = (
        10 ** median(row[f"bn_overview/{x}_speed_log10_median"] for row in kept.rows) for x in ("gamma", "beta")
    )
    return gamma, beta, mean(row["bn_overview/affine_gradient_share"] for row in kept.rows)


def shards(kind: str, seed: int) -> tuple[list[Samples], Samples]:
    """Training data of both processes, and validation data of the kinds that both have."""
    train, valid = digits(seed, SAMPLES, 0.0)
    (x, y), (vx, vy) = train.tensors, valid.tensors
    order = torch.arange(len(x)) % 2
    if kind == "other classes":
        order = (y >= 5).long()  # noqa: PLR2004  (of ten)
    if kind.startswith("contrast"):
        contrast = float(kind.rsplit(maxsplit=1)[-1])
        x = torch.where(order[:, None] == 1, contrast * x, x)
        vx = torch.where(torch.arange(len(vx))[:, None] % 2 == 1, contrast * vx, vx)
    parts = [(x[order == rank], y[order == rank]) for rank in (0, 1)]
    return ([(x, y)] * 2 if kind == "drawn anew" else parts), (vx, vy)


def drawn(samples: Samples, batch: int, generator: torch.Generator) -> Iterator[Samples]:
    """Batches without end, an epoch after the other."""
    while True:
        order = torch.randperm(len(samples[0]), generator=generator)
        for place in range(0, len(order) - batch + 1, batch):
            chosen = order[place : place + batch]
            yield samples[0][chosen], samples[1][chosen]


def both(kind: str, seed: int, *, batch: int, broadcast: bool) -> tuple[list[StatisticsWatch], float]:
    """Train on two processes; what each heard, and the rise of the loss by the running statistics of the first."""
    torch.manual_seed(seed)
    data, (vx, vy) = shards(kind, seed)
    nets = [mlp()]
    nets.append(copy.deepcopy(nets[0]))
    for mine, other in zip(nets[0].modules(), nets[1].modules(), strict=True):
        other._parameters = mine._parameters  # noqa: SLF001  (one set of weights, two sets of statistics)
    optimizer = torch.optim.Adam(nets[0].parameters(), lr=1e-3)
    watches = [StatisticsWatch(net, 2) for net in nets]
    sources = [drawn(part, batch, torch.Generator().manual_seed(2 * seed + rank)) for rank, part in enumerate(data)]
    for step in range(STEPS):
        optimizer.zero_grad()
        for mine, other in zip(nets[0].buffers(), nets[1].buffers(), strict=True) if broadcast else ():
            other.copy_(mine)
        for net, watch, source in zip(nets, watches, sources, strict=True):
            x, y = next(source)
            with ExitStack() as hooks:
                if watch.begin_batch():
                    hooks.enter_context(watch.listening(watch.hear))
                (F.cross_entropy(net(x), y) / 2).backward()
            watch.end_batch(step)
        optimizer.step()
    return watches, rise(nets[0], data, (vx, vy))


def rise(net: nn.Module, data: Sequence[Samples], valid: Samples) -> float:
    """Part by which the validation loss is higher than with statistics of all training data."""

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(net.eval()(valid[0]), valid[1]))

    x = torch.cat([part[0] for part in data])
    right = copy.deepcopy(net).train()
    precise_statistics(right, [x]).apply(right)
    return loss(copy.deepcopy(net)) / loss(right) - 1


def speed(seeds: int) -> None:
    """Print the table of speed and gradient share."""
    print("| run | speed of γ | speed of β | share of the squared gradient norm |\n|---|---|---|---|")
    for name in RUNS:
        columns = zip(*(signs(name, seed) for seed in range(seeds)), strict=True)
        print(f"| {name} | {' | '.join(cells(column, '.2%') for column in columns)} |", flush=True)


def ranks(seeds: int) -> None:
    """Print the table of two processes."""
    print(
        "| data | batch | apart by batches | as stored, broadcast | as stored, kept | said, broadcast | said, kept "
        "| rise |\n|---|---:|---|---|---|---|---|---|"
    )
    for kind, batch in ((kind, batch) for kind in SHARDS for batch in (8, 32)):
        rows = [[apart(kind, seed, batch=batch, broadcast=choice) for choice in (True, False)] for seed in range(seeds)]
        columns = [zip(*side, strict=True) for side in zip(*rows, strict=True)]
        (batches, stored, said, rises), (_, kept, also_said, _) = columns
        numbers = (cells(column, ".2f") for column in (batches, stored, kept))
        shown = [*numbers, tally(said), tally(also_said), cells(rises, "+.0%")]
        print(f"| {kind} | {batch} | {' | '.join(shown)} |", flush=True)


def apart(kind: str, seed: int, *, batch: int, broadcast: bool) -> tuple[float, float, str, float]:
    """Largest distance by batches and as stored over the layers, what is said of it, and the rise of the loss."""
    watches, more = both(kind, seed, batch=batch, broadcast=broadcast)
    shares = [watch.shares() for watch in watches]
    found, finding = compare(shares).values(), of_ranks([*shares])
    severity = finding.severity.value if finding else "nothing"
    return max(entry.batches for entry in found), max(entry.stored for entry in found), severity, more


def tally(words: Sequence[str]) -> str:
    """How often each word is there."""
    return ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))


def cells(values: Sequence[float], form: str) -> str:
    """Median, smallest and largest."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Print the setting and the table that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("speed", "ranks"))
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default: %(default)s)")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, CPU, {STEPS} steps, {options.seeds} seeds\n")
    {"speed": speed, "ranks": ranks}[options.table](options.seeds)


if __name__ == "__main__":
    main()
