# SPDX-License-Identifier: Apache-2.0
"""What BatchNormMonitor says of runs whose illness is known, and what freezing γ and β really does to them.

Run:     OMP_NUM_THREADS=1 python benchmarks/overfitting.py run [--seeds 0 15] [--rows rows.jsonl]
         python benchmarks/overfitting.py table [--rows rows.jsonl] [--out docs/overfitting.md]
Data:    the runs of overfitting_cases.py: scikit-learn's digits and a synthetic teacher. Seeds 0 to 4 were there when
         thresholds were chosen ("tuning"); all others were held out.
Output:  ``run`` appends a line for each run, and passes over those that are there. ``table`` prints markdown: for each
         kind of run how often what was said, the median rise and share, and the freeze intervention: from the best
         epoch on the run goes on for 30 epochs, once as it was and once with γ and β frozen; P is the part of the rise
         that freezing prevents. Losses of the intervention are taken with statistics of the whole training set.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from overfitting_cases import CASES, DRIVEN, ELSEWHERE, HEALTHY, STATISTICS, Case, Classifier, affine
from pages import write_between
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormMonitor, precise_statistics

TUNED, AGAIN = 5, 30
VERDICTS = {
    "affine-driven-overfitting": "driven",
    "shared-overfitting": "shared",
    "overfitting-elsewhere": "elsewhere",
    "no-overfitting": "none",
    "not-assessed": "not assessed",
}
WRONG = "wrong-running-statistics"


class KeepBest(Callback):
    """Keeps model and optimizer as they are at the best validation."""

    def __init__(self) -> None:
        self.best, self.state, self.optimizer = math.inf, {}, {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare."""
        value = float(trainer.callback_metrics["val_loss"])
        if not trainer.sanity_checking and value < self.best:
            self.best, self.state = value, copy.deepcopy(pl_module.state_dict())
            self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())


def precise_loss(model: nn.Module, train: TensorDataset, valid: TensorDataset) -> float:
    """Validation loss with statistics of the whole training set."""
    found = precise_statistics(model, [train.tensors])
    model.eval()
    with found.applied(model), torch.no_grad():
        return float(F.cross_entropy(model(valid.tensors[0]), valid.tensors[1]))


def go_on(case: Case, kept: KeepBest, sets: tuple[TensorDataset, TensorDataset], seed: int, *, freeze: bool) -> float:
    """The rise of the validation loss when the run goes on from its best epoch."""
    torch.manual_seed(seed)
    model = Classifier(case.net(), case.optimizer)
    optimizer = model.configure_optimizers()
    model.load_state_dict(kept.state)
    optimizer.load_state_dict(copy.deepcopy(kept.optimizer))
    frozen = set(affine(model)) if freeze else set()
    start = precise_loss(model.net, *sets)
    for _ in range(AGAIN):
        model.train()
        for batch in DataLoader(sets[0], case.batch, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            model.training_step(batch, 0).backward()
            for x in frozen:
                x.grad = None
            optimizer.step()
    return precise_loss(model.net, *sets) - start


def prevented(case: Case, kept: KeepBest, sets: tuple[TensorDataset, TensorDataset], seed: int) -> float | None:
    """The part of the rise that freezing γ and β prevents; None where there is none."""
    plain, frozen = (go_on(case, kept, sets, seed, freeze=freeze) for freeze in (False, True))
    return 1 - frozen / plain if plain > 0 else None


def run(name: str, seed: int) -> dict[str, Any]:
    """Train one run with the monitor, and intervene where it overfits."""
    case = CASES[name]
    seed_everything(seed, verbose=False)
    sets, monitor, kept = case.sets(seed), BatchNormMonitor(), KeepBest()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=case.epochs,
            callbacks=[monitor, kept],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = DataLoader(sets[0], case.batch, shuffle=True, drop_last=True), DataLoader(sets[1], 64)
        began = time.perf_counter()
        trainer.fit(Classifier(case.net(), case.optimizer), *loaders)
        seconds = time.perf_counter() - began
    row: dict[str, Any] = {"case": name, "truth": case.truth, "seed": seed, "seconds": seconds, "off": monitor.off}
    row["said"] = [finding.rule for finding in monitor.findings]
    row["severity"] = {finding.rule: finding.severity.value for finding in monitor.findings}
    row["noise"] = [f.data["effective"] for f in monitor.findings if f.rule == "noisy-batch-statistics"]
    losses = monitor.losses
    if losses is not None:
        row |= {"rise": vars(losses.rise), "statistics": vars(losses.statistics)}
        row |= {"shares": losses.shares, "losses": vars(losses)}
    row["cost"] = next((finding.data["cost"] for finding in monitor.findings if "cost" in finding.data), None)
    if verdict(row) in {"driven", "shared", "elsewhere"}:
        row["prevented"] = prevented(case, kept, sets, seed)
    return row


def verdict(row: dict[str, Any]) -> str:
    """What was said about overfitting."""
    return next((word for rule, word in VERDICTS.items() if rule in row["said"]), "nothing")


def right(row: dict[str, Any]) -> str:
    """``miss``, ``false`` or nothing, by the truth of the run."""
    said, truth = verdict(row), row["truth"]
    if truth == DRIVEN:
        return "" if said in {"driven", "none"} else "miss"
    if truth == ELSEWHERE:
        return "false" if said == "driven" else ""
    if truth == STATISTICS:
        return "" if WRONG in row["said"] and said in {"none", "not assessed"} else "miss"
    if truth == HEALTHY:
        alarm = set(row["severity"].items()) & {(WRONG, "warning"), ("collapsed-gamma", "warning")}
        return "false" if said not in {"none", "not assessed"} or alarm else ""
    return ""


def table_rows(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line for each kind of run."""
    for name, case in CASES.items():
        mine = [row for row in rows if row["case"] == name]
        if not mine:
            continue
        said = Counter(verdict(row) for row in mine)
        wrong = sum(WRONG in row["said"] for row in mine)
        rises = [row["rise"]["after"] / row["rise"]["before"] - 1 for row in mine if "rise" in row]
        shares = [sum(row["shares"]) / 2 for row in mine if row.get("shares")]
        parts = [row["prevented"] for row in mine if row.get("prevented") is not None]
        yield (
            f"| {name} | {case.truth} | {len(mine)} | {', '.join(f'{n} {word}' for word, n in said.most_common())} | "
            f"{wrong or ''} | {_middle(rises, '+.0%')} | {_middle(shares, '.2f')} | {_middle(parts, '.2f')} |"
        )


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Misses and false alarms, apart for tuning and held-out seeds."""
    for part, mine in {
        "tuning": [row for row in rows if row["seed"] < TUNED],
        "held out": [row for row in rows if row["seed"] >= TUNED],
    }.items():
        for truth in (DRIVEN, ELSEWHERE, STATISTICS, HEALTHY):
            those = [row for row in mine if row["truth"] == truth]
            wrong = Counter(map(right, those))
            yield f"| {part} | {truth} | {len(those)} | {wrong['miss']} | {wrong['false']} |"


def interventions(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How the verdicts agree with runs in which γ and β were frozen."""
    for word in ("driven", "shared", "elsewhere"):
        parts = [row["prevented"] for row in rows if verdict(row) == word and row.get("prevented") is not None]
        if parts:
            half = sum(part >= 0.5 for part in parts)  # noqa: PLR2004  (what the verdict claims)
            yield f"| {word} | {len(parts)} | {half} | {median(parts):.2f} |"


def costs(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How many passes the assessments took, by what was said."""
    for word in ("driven", "shared", "elsewhere", "none"):
        for wrong in (False, True):
            mine = [row for row in rows if verdict(row) == word and (WRONG in row["said"]) is wrong and row.get("cost")]
            if mine:
                cells = (
                    f"{median(values):.0f}, {max(values)}"
                    for part in ("validations", "estimations")
                    for values in [[row["cost"][part] for row in mine]]
                )
                said = f"{word}, wrong statistics" if wrong else word
                yield f"| {said} | {len(mine)} | {' | '.join(cells)} |"


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """All tables, line by line."""
    yield from (
        f"torch {torch.__version__}, CPU, {len(rows)} runs of seeds 0 to {max(row['seed'] for row in rows)}.",
        "",
    )
    yield from ("| seeds | truth | runs | missed | false alarms |", "|---|---|---:|---:|---:|", *summary(rows))
    yield from ("", "| what was said | runs | freezing γ and β prevents half of the rise or more in | median part |")
    yield from ("|---|---:|---:|---:|", *interventions(rows))
    yield from ("", "| what was said | runs | validation passes, median and most | re-estimations, median and most |")
    yield from ("|---|---:|---:|---:|", *costs(rows))
    yield from ("", "| run | truth | runs | said | wrong statistics | rise | share of γ, β | P |")
    yield from ("|---|---|---:|---|---:|---:|---:|---:|", *table_rows(rows))


def _middle(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}}" if values else ""


def main() -> None:
    """Run, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 15), help="first seed, and the one behind the last")
    parser.add_argument("--rows", type=Path, default=Path("overfitting_rows.jsonl"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, help="page with the markers of overfitting")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="kinds of runs")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    if options.what == "run":
        known = {(row["case"], row["seed"]) for row in rows}
        for seed in range(*options.seeds):
            for name in options.only:
                if (name, seed) not in known:
                    row = run(name, seed)
                    with options.rows.open("a") as file:
                        file.write(f"{json.dumps(row)}\n")
        return
    lines = list(tables(rows))
    print(*lines, sep="\n")
    if options.out:
        write_between(options.out, "overfitting", lines)


if __name__ == "__main__":
    main()
