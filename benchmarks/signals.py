# SPDX-License-Identifier: Apache-2.0
"""What the rules of the signal say of healthy and sick networks: what their thresholds stand on.

Run:     python benchmarks/signals.py [--seeds 5] [--quick]
Data:    scikit-learn's digits and a synthetic teacher; networks of zoo.py and zoo_more.py, 151 steps each. The rules
         are asked at steps 0, 50, 100 and 150 about one forward pass of 512 samples.
Output:  markdown tables. For each rule: sick networks that it missed, healthy ones that it spoke of with a warning or
         an error, the largest height of a healthy network and the smallest of a sick one (1 is the threshold). Then the
         numbers behind them, and healthy networks that did not learn. Thresholds were chosen on the networks of zoo.py
         with seeds 0 and 1 alone ("tuning"); other seeds and the networks of zoo_more.py were held out.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from signal_probe import Probe, Reading, Saturation
from zoo import HEALTHY, SICK
from zoo_cases import Specimen, train, validate
from zoo_more import CONTROLS, MORE_HEALTHY, MORE_SICK

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules import dead_units as dead
from lightning_bn.rules import exploding_signal as exploding
from lightning_bn.rules import saturated_units as saturated
from lightning_bn.rules import vanishing_signal as vanishing
from lightning_bn.rules import variance_below_epsilon as epsilon

STEPS, EVERY, SAMPLES, TUNED = 151, 50, 512, 2
RULES = (vanishing.RULE, exploding.RULE, dead.RULE, saturated.RULE, epsilon.RULE)


@dataclass
class Outcome:
    """One run of one network.

    Args:
        name: of the network.
        fault: what has to be found; empty for a healthy one.
        tuning: whether thresholds were chosen with it.
        findings: all findings.
        values: largest value of each measured quantity.
        learned: whether it learned.
        score: its score.
    """

    name: str
    fault: str
    tuning: bool
    findings: list[Finding] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    learned: bool = False
    score: float = math.nan

    def spoke(self, rule: str) -> bool:
        """Whether a rule gave a warning or an error."""
        return any(finding.rule == rule and finding.severity is not Severity.INFO for finding in self.findings)

    def note(self, quantity: str, value: float) -> None:
        """Keep the largest."""
        if math.isfinite(value):
            self.values[quantity] = max(self.values[quantity], value)


def run(name: str, specimen: Specimen, seed: int, *, tuning: bool) -> Outcome:
    """Train a network, and ask the rules on the way."""
    case, outcome = specimen.build(seed), Outcome(name, specimen.fault, tuning)
    readings: dict[int, Reading] = {}

    def watch(step: int) -> None:
        if step % EVERY == 0:
            readings[step] = Probe(case.model).read(case.train[0][:SAMPLES])
            outcome.findings += judge(readings[step], readings[0], step, outcome)

    train(case, STEPS, seed=seed, watch=watch)
    outcome.score = validate(case)
    outcome.learned = outcome.score > case.enough
    return outcome


def judge(now: Reading, start: Reading, step: int, outcome: Outcome) -> Iterator[Finding]:
    """What all rules say of one reading."""
    found = [
        vanishing.vanishing_signal(now.stds, now.varied),
        exploding.exploding_signal(now.stds, start.stds if step else None),
    ]
    for layer, (silent, units, samples) in now.dead.items():
        first = start.dead[layer][0] / start.dead[layer][1] if step and layer in start.dead else None
        found.append(dead.dead_units(layer, silent, units, samples, first))
        if samples >= dead.SAMPLES and units > dead.NARROW:
            _note_dead(outcome, silent / units, first)
    for layer, seen in now.saturation.items():
        first = start.saturation[layer].share if step else None
        numbers = (layer, seen.kind, seen.share, seen.saturated, seen.units, SAMPLES, first)
        found.append(saturated.saturated_units(*numbers, last=seen.last, direct=not seen.gate))
        if not (seen.last or seen.gate):
            _note_saturated(outcome, seen, first)
    for layer, (variance, eps) in now.variances.items():
        found.append(epsilon.variance_below_epsilon(layer, variance, eps, step=step))
        if step >= epsilon.SETTLED:
            outcome.note("ε over variance, after 50 steps", eps / max(variance, 1e-30))
            outcome.note(epsilon.RULE, epsilon.WARN * eps / max(variance, 1e-30))
    _note_course(outcome, now, start)
    return (finding for finding in found if finding)


def _note_course(outcome: Outcome, now: Reading, start: Reading) -> None:
    whole, over = (vanishing.follow(stds, math.inf, max, -1) for stds in (now.stds, now.varied))
    rise = vanishing.follow(now.stds, math.inf, min, 1)
    if not (whole and over and rise):
        return
    outcome.note("decades of fall, whole tensors", whole.decades)
    outcome.note("decades of fall, over samples", over.decades)
    outcome.note("decades of rise, at first" if now is start else "decades of rise, later", rise.decades)
    outcome.note(vanishing.RULE, max(whole.decades / vanishing.DECADES, over.decades / vanishing.DECADES_OVER_SAMPLES))
    quick = min(rise.decades / exploding.DECADES, math.log(max(rise.factor, 1)) / math.log(exploding.FACTOR))
    if now is start:  # what grows later is not judged by itself
        outcome.note(exploding.RULE, max(quick, rise.decades / exploding.DECADES_IN_ALL))


def _note_dead(outcome: Outcome, share: float, first: float | None) -> None:
    outcome.note("share of dead units", share)
    rise = share - first if first is not None else 0.0
    outcome.note("rise of the share of dead units", rise)
    outcome.note(dead.RULE, max(share / dead.ALWAYS, min(share / dead.SHARE, rise / dead.MORE)))


def _note_saturated(outcome: Outcome, seen: Saturation, first: float | None) -> None:
    limit = saturated.SHARE[seen.kind]
    early = first is None or first >= limit
    full = seen.saturated / seen.units
    outcome.note("share of saturated values, at first" if early else "share of saturated values, later", seen.share)
    outcome.note("share of saturated units, at first" if early else "share of saturated units, later", full)
    outcome.note(saturated.RULE, seen.share / limit if early else full / saturated.UNITS)


def rule_rows(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One row of the main table for each rule and group."""
    for rule in RULES:
        for title, tuning in (("tuning", True), ("held out", False)):
            group = [outcome for outcome in outcomes if outcome.tuning is tuning]
            sick = [outcome for outcome in group if outcome.fault == rule]
            healthy = [outcome for outcome in group if not outcome.fault]
            missed = [outcome.name for outcome in sick if not outcome.spoke(rule)]
            wrong = [outcome.name for outcome in healthy if outcome.spoke(rule)]
            top, low = _extreme(healthy, rule, largest=True), _extreme(sick, rule, largest=False)
            cells = (f"{len(missed)} of {len(sick)}", f"{len(wrong)} of {len(healthy)}", top, low)
            yield f"| {rule} | {title} | {' | '.join(cells)} |"
            for what, names in (("missed", missed), ("false alarm", wrong)):
                if names:
                    yield f"| | *{what}* | {', '.join(sorted(set(names)))} | | | |"


def value_rows(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One row for each quantity: the largest of healthy runs, with the three networks that had most."""
    healthy = [outcome for outcome in outcomes if not outcome.fault]
    for quantity in sorted({key for outcome in healthy for key in outcome.values} - set(RULES)):
        best: dict[str, float] = defaultdict(float)
        for outcome in healthy:
            best[outcome.name] = max(best[outcome.name], outcome.values[quantity])
        top = sorted(best.items(), key=lambda item: -item[1])[:3]
        yield f"| {quantity} | {'; '.join(f'{value:.3g} ({name})' for name, value in top)} |"


def sick_rows(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One row for each sick network: score, and smallest to largest of its rule's height."""
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.fault:
            groups[outcome.fault, outcome.name].append(outcome)
    for (fault, name), runs in groups.items():
        heights = [outcome.values[fault] for outcome in runs]
        scores = [outcome.score for outcome in runs]
        spans = (f"{min(heights):.3g} to {max(heights):.3g}", f"{min(scores):.2f} to {max(scores):.2f}")
        yield f"| {fault} | {name} | {' | '.join(spans)} |"


def _extreme(runs: Sequence[Outcome], rule: str, *, largest: bool) -> str:
    if not runs:
        return ""
    chosen = (max if largest else min)(runs, key=lambda outcome: outcome.values[rule])
    return f"{chosen.values[rule]:.2g} ({chosen.name})"


def every_run(seeds: int) -> Iterator[Outcome]:
    """All networks, with tuning seeds from 0 and held-out seeds from 100."""
    numbers = [*range(min(seeds, TUNED)), *range(100, 100 + max(seeds - TUNED, 0))]
    zoos: Sequence[tuple[Mapping[str, Specimen], bool]] = (
        (HEALTHY, True),
        (SICK, True),
        (CONTROLS, True),
        (MORE_HEALTHY, False),
        (MORE_SICK, False),
    )
    for seed in numbers:
        for zoo, known in zoos:
            for name, specimen in zoo.items():
                yield run(name, specimen, seed, tuning=known and seed < TUNED)


def main() -> None:
    """Run all networks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each network (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one run of each")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    seeds = 1 if options.quick else options.seeds
    outcomes = list(every_run(seeds))
    kinds = len(HEALTHY) + len(CONTROLS) + len(MORE_HEALTHY), len(SICK) + len(MORE_SICK)
    print(f"torch {torch.__version__}, CPU; {kinds[0]} healthy and {kinds[1]} sick networks, {seeds} seeds\n")
    print("| rule | runs | missed | false alarms | largest height of healthy | smallest of sick |")
    print("|---|---|---:|---:|---|---|", *rule_rows(outcomes), sep="\n")
    print("\n| healthy networks | largest |\n|---|---|", *value_rows(outcomes), sep="\n")
    print("\n| fault | sick network | height | score |\n|---|---|---|---|", *sick_rows(outcomes), sep="\n")
    lazy = sorted(
        {f"{outcome.name} {outcome.score:.2f}" for outcome in outcomes if not outcome.fault and not outcome.learned}
    )
    print(f"\nhealthy networks that did not learn: {', '.join(lazy) or 'none'}")


if __name__ == "__main__":
    main()
