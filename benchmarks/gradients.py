# SPDX-License-Identifier: Apache-2.0
"""What the rules about gradients and updates say of healthy and of sick networks: what their thresholds stand on.

Run:     python benchmarks/gradients.py [--seeds 5] [--quick]
Data:    the networks of zoo.py and gradient_zoo.py, each trained 101 steps.
Output:  markdown tables. Measured are steps 0 to 4, 50, and 96 to 100. A rule is asked where the due steps are those of
         one of the runs of five, and where they are every fiftieth. For each rule, apart for tuning and held-out seeds:
         how many sick runs no warning named, and how many healthy runs it warned of; the mildest score of the sick
         runs and the worst of the healthy ones. A score is how far beyond its threshold a number was, in such a way
         that the rule speaks above 1. Then each miss and each false alarm by its name, the notes that healthy runs got,
         and the healthy runs that did not learn.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from gradient_zoo import HEALTHY, SICK, Run
from torch import nn
from zoo_cases import Case, validate

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules import exploding_gradient as exploding
from lightning_bn.rules import huge_updates as huge
from lightning_bn.rules import no_gradient as none
from lightning_bn.rules import tiny_updates as tiny
from lightning_bn.rules import vanishing_gradient as vanishing
from lightning_bn.rules.vanishing_gradient import Steps, Weight

STEPS, BATCH, WINDOW = 101, 64, 5
REGIMES = {"every step": (range(5), range(96, 101)), "every 50": (range(0, STEPS, 50),)}
DUE = sorted({step for parts in REGIMES.values() for part in parts for step in part})
HELD_OUT = 100


@dataclass
class Seen:
    """What is known of one due step."""

    weights: dict[str, Weight] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    heard: set[str] = field(default_factory=set)


@dataclass
class Verdict:
    """What came of one run: the worst severity and the score of each rule, and whether it learned."""

    name: str
    fault: str
    held_out: bool
    found: dict[str, Severity]
    scores: dict[str, float]
    learned: bool = True


class Listener:
    """Which modules run in one forward pass, and which of them while gradients are recorded.

    Args:
        model: the network.
        seen: where to note them.
    """

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        self._handles = [
            module.register_forward_hook(lambda *_, name=name: self._hear(name, seen))
            for name, module in model.named_modules()
        ]

    def close(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()

    def _hear(self, name: str, seen: Seen) -> None:
        seen.heard.add(name)
        if torch.is_grad_enabled():
            seen.called.add(name)


def batches(case: Case, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the training data, one epoch after the other."""
    order = torch.Generator().manual_seed(seed)
    x, y = case.train
    while True:
        rows = torch.randperm(len(x), generator=order)
        yield from ((x[part], y[part]) for part in torch.split(rows, BATCH) if len(part) == min(BATCH, len(x)))


def train(run: Run, case: Case, seed: int) -> tuple[dict[int, Seen], list[float]]:
    """Train, and look at the due steps."""
    held = {name: weight for name, weight in case.model.named_parameters() if weight.requires_grad}
    optimizer = case.optimizer(list(held.values()))
    prepare = run.schedule(optimizer)
    looked, losses, largest = {}, [], 0.0
    for step, (x, y) in zip(range(STEPS), batches(case, seed), strict=False):
        prepare(step)
        case.each_step(case.model)
        largest = max(largest, *(optimizer.param_groups[0].get(key, 0.0) for key in ("lr", "initial_lr", "max_lr")))
        seen = Seen()
        listener = Listener(case.model, seen) if step in DUE else None

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = case.loss(case.model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return loss

        losses.append(closure().item())
        if listener:
            listener.close()
        before = {name: weight.detach().clone() for name, weight in held.items()} if step in DUE else {}
        slopes = {name: weight.grad for name, weight in held.items()}
        norms = {name: None if slope is None else slope.norm().item() for name, slope in slopes.items()}
        optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)
        rate = optimizer.param_groups[0]["lr"]
        for name, old in before.items():
            moved = (held[name].detach() - old).norm().item()
            seen.weights[name] = Weight(tuple(old.shape), old.norm().item(), norms[name], moved, rate, largest)
        if step in DUE:
            looked[step] = seen
    return looked, losses


def judge(window: Sequence[Seen]) -> list[Finding]:
    """What the rules say of the last due steps."""
    steps = [seen.weights for seen in window]
    called, heard = (set().union(*(getattr(seen, kind) for seen in window)) for kind in ("called", "heard"))
    found = (
        vanishing.vanishing_gradient(steps),
        exploding.exploding_gradient(steps),
        none.no_gradient(steps, called, heard),
        tiny.tiny_updates(steps),
        huge.huge_updates(steps),
    )
    return [finding for finding in found if finding]


def scores(steps: Steps) -> dict[str, float]:
    """How far beyond its threshold each rule's number is; NaN where there is none."""
    shares = [vanishing.front_share(step) for step in steps[-vanishing.STEPS :]]
    growths = [growth for growth, _ in exploding.growths(steps[-1])]
    moved = [tiny.changed(step) for step in steps[-tiny.STEPS :]]
    steady = len({row.lr for rows in moved for row in rows}) == 1
    small = [_least(rows, steady=steady) for rows in moved] if len(moved) == tiny.STEPS else [math.nan]
    last = huge.changed(steps[-1])
    rising = len(steps) > 1 and huge.rises(steps[-2], steps[-1])
    return {
        vanishing.RULE: vanishing.FADED / max(shares) if len(shares) == vanishing.STEPS and min(shares) else math.nan,
        exploding.RULE: max(growths, default=math.nan) / exploding.GREW,
        tiny.RULE: min(small),
        huge.RULE: math.nan if rising or not last else _most(last),
    }


def _least(rows: Sequence[Weight], *, steady: bool) -> float:
    if not rows:
        return math.nan
    ratio = median(row.update / row.weight for row in rows)
    size = median(row.weight / math.sqrt(row.shape[0]) for row in rows)
    by_rate = min(tiny.TINIEST / ratio, tiny.LOW / max(rows[0].lr, 1e-30)) * steady
    return max(min(tiny.TINY / ratio, size / tiny.LARGE), by_rate)


def _most(rows: Sequence[Weight]) -> float:
    ratio = median(row.update / row.weight for row in rows)
    size = median(row.update / math.sqrt(row.shape[0]) for row in rows)
    return min(ratio / huge.HUGE, size / huge.LARGE)


def verdict(name: str, run: Run, seed: int) -> Verdict:
    """Train one network and ask the rules in both regimes."""
    case = run.specimen.build(seed)
    looked, losses = train(run, case, seed)
    found: dict[str, Severity] = {}
    best: dict[str, float] = {}
    for part in (part for parts in REGIMES.values() for part in parts):
        for end in range(1, len(part) + 1):
            window = [looked[step] for step in part[max(0, end - WINDOW) : end]]
            for finding in judge(window):
                worst = found.get(finding.rule, Severity.INFO)
                found[finding.rule] = finding.severity if finding.severity.outweighs(worst) else worst
            for rule, score in scores([seen.weights for seen in window]).items():
                best[rule] = max(score, best.get(rule, 0.0)) if not math.isnan(score) else best.get(rule, 0.0)
    learned = validate(case) >= case.enough or losses[-1] < 0.8 * losses[0]
    return Verdict(name, run.fault, seed >= HELD_OUT, found, best, learned or not run.trains)


def tables(verdicts: Sequence[Verdict]) -> None:
    """Print misses, false alarms and margins."""
    rules = sorted({entry.fault for entry in verdicts} - {""})
    print("| rule | seeds | missed | false alarms | mildest sick | worst healthy |\n|---|---|---:|---:|---:|---:|")
    for rule in rules:
        for held_out in (False, True):
            rows = [entry for entry in verdicts if entry.held_out is held_out]
            print(_row(rule, rows, "held-out" if held_out else "tuning"))
    for title, pick in (("missed", _missed), ("false alarm", _alarmed), ("note", _noted), ("did not learn", _idle)):
        counts = Counter(label for entry in verdicts for label in pick(entry))
        print(f"\n{title}: " + ("; ".join(f"{label} ({count})" for label, count in sorted(counts.items())) or "none"))


def _row(rule: str, rows: Sequence[Verdict], seeds: str) -> str:
    sick, well = [r for r in rows if r.fault == rule], [r for r in rows if not r.fault]
    if not sick or not well:
        return f"| {rule} | {seeds} | | | | |"
    missed = sum(bool(_missed(r)) for r in sick)
    alarms = sum(r.found.get(rule) is Severity.WARNING for r in well)
    mild, bad = min(sick, key=lambda r: r.scores.get(rule, 0)), max(well, key=lambda r: r.scores.get(rule, 0))
    margins = (
        f"{mild.scores[rule]:.2g} ({mild.name}) | {bad.scores[rule]:.2g} ({bad.name})" if rule in mild.scores else " | "
    )
    return f"| {rule} | {seeds} | {missed} of {len(sick)} | {alarms} of {len(well)} | {margins} |"


def _missed(entry: Verdict) -> list[str]:
    found = entry.found.get(entry.fault) is Severity.WARNING
    return [f"{entry.fault}: {entry.name}"] if entry.fault and not found else []


def _alarmed(entry: Verdict) -> list[str]:
    warned = [rule for rule, severity in entry.found.items() if severity is Severity.WARNING]
    return [] if entry.fault else [f"{rule}: {entry.name}" for rule in warned]


def _noted(entry: Verdict) -> list[str]:
    noted = [rule for rule, severity in entry.found.items() if severity is Severity.INFO]
    return [] if entry.fault else [f"{rule}: {entry.name}" for rule in noted]


def _idle(entry: Verdict) -> list[str]:
    return [] if entry.fault or entry.learned else [entry.name]


def main() -> None:
    """Train every network and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each, the last 2 held out (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--only", default="", help="names that contain this")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seeds = [0] if options.quick else [*range(options.seeds - options.seeds * 2 // 5)]
    seeds += [] if options.quick else [HELD_OUT + k for k in range(options.seeds * 2 // 5)]
    started = time.monotonic()
    zoo = {**{f"healthy: {name}": run for name, run in HEALTHY.items()}, **SICK}
    chosen = {name: run for name, run in zoo.items() if options.only in name}
    verdicts = [verdict(name.removeprefix("healthy: "), run, seed) for seed in seeds for name, run in chosen.items()]
    kinds: dict[bool, set[str]] = defaultdict(set)
    for entry in verdicts:
        kinds[bool(entry.fault)].add(entry.name)
    print(f"torch {torch.__version__}, CPU; {len(kinds[False])} kinds of healthy networks, {len(kinds[True])} of sick")
    print(f"ones; seeds {', '.join(map(str, seeds))}; {time.monotonic() - started:.0f} s\n")
    tables(verdicts)


if __name__ == "__main__":
    main()
