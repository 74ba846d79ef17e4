# SPDX-License-Identifier: Apache-2.0
"""Parameters that the optimizer holds get no gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.vanishing_gradient import FADED, Steps, Weight, front_share, layer_of

RULE = "no-gradient"
STEPS = 3
"""How many due steps in a row a parameter must have been without a gradient."""
MANY = 0.5
"""Share of the weights whose gradient is exactly zero from which on it is a fault wherever they are."""
NAMED = 3


class Why(Enum):
    """Why parameters have no gradient, in words, the worst first; with what to do about it."""

    CUT = (
        "their layers ran, and the loss does not depend on them",
        "remove what cuts {} off the loss: detach, .data, .item or numpy",
    )
    ZERO = (
        "exactly 0: nothing comes back to them",
        "look behind {} for γ = 0, units that are never active, or a factor of 0",
    )
    UNKNOWN = ("whether their layers ran is not known", "")
    COPY = ("they belong to a copy of a part that learns", "")
    SWITCHED_OFF = ("their layers ran under no_grad alone", "")
    IDLE = ("their layers did not run", "")
    RESTING = ("exactly 0, while layers in front of them learn: a branch, a head or an expert that rests", "")


def no_gradient(
    steps: Steps, called: Collection[str] | None = None, heard: Collection[str] | None = None
) -> Finding | None:
    """Judge parameters whose gradient was None, or exactly zero, in each of the last due steps.

    Args:
        steps: the last due steps; only parameters that the optimizer holds and that ask for a gradient.
        called: paths of the modules that ran in these steps while gradients were recorded; None where not known.
        heard: paths of the modules that ran in them at all, such as under ``no_grad`` alone; None where not known.

    Returns:
        One finding for the model, of the worst kind there is; None where every weight had a gradient once, or none
        had. A ``warning`` where layers that ran are cut off the loss, or where the zeros begin with the first weight
        or make up half of them; an ``info`` where their layers did not run, ran under ``no_grad`` alone, are a copy of
        a part that has a gradient (a target network), or rest behind layers that have one. Biases, γ and β are counted
        beside weights and are no reason by themselves. Steps that changed nothing are passed over.
    """
    taken = [step for step in steps if _was_taken(step)]
    if len(taken) < STEPS:
        return None
    missing, zero = _always(taken, None), _always(taken, 0.0)
    weights = [name for name, row in taken[-1].items() if row.is_matrix]
    kinds = {name: _why_none(name, missing, taken[-1], called, heard) for name in missing}
    kinds |= dict.fromkeys(zero, _why_zero(zero, [name for name in weights if name not in missing]))
    faded = front_share(taken[-1]) <= FADED  # what is 0 there faded on its way
    told = {kinds[name] for name in weights if name in kinds} - ({Why.ZERO, Why.RESTING} if faded else set())
    kinds = {name: why for name, why in kinds.items() if why in told}
    if not kinds or len(missing) == len(taken[-1]):
        return None
    return _finding(kinds, len(taken[-1]), len(taken))


def _finding(kinds: Mapping[str, Why], parameters: int, steps: int) -> Finding:
    found = [why for why in Why if why in kinds.values()]
    groups = {why: [name for name, kind in kinds.items() if kind is why] for why in found}
    parts = [f"{len(names)} ({_listed(names)}): {why.value[0]}" for why, names in groups.items()]
    evidence = (
        f"{len(kinds)} of {parameters} parameters that the optimizer holds had no gradient in {steps} due steps in a "
        f"row: {'; '.join(parts)}"
    )
    worst = found[0]
    severity = Severity.WARNING if worst in (Why.CUT, Why.ZERO) else Severity.INFO
    advice = worst.value[1].format(groups[worst][0])
    data = {"parameters": parameters, "steps": steps, **{why.name.lower(): names for why, names in groups.items()}}
    return Finding(RULE, severity, evidence, advice, layer=layer_of(groups[worst][0]), data=data)


def _was_taken(step: Mapping[str, Weight]) -> bool:
    """Whether the step changed something, as far as that is known."""
    return any(row.update != 0 and row.slope != 0 for row in step.values())


def _always(steps: Steps, gradient: float | None) -> list[str]:
    """Parameters that had just this gradient in all steps."""
    return [name for name in steps[-1] if all(name in step and step[name].gradient == gradient for step in steps)]


def _why_zero(zero: Collection[str], weights: Sequence[str]) -> Why:
    silent = [name for name in weights if name in zero]
    return Why.ZERO if silent[:1] == weights[:1] or len(silent) >= MANY * len(weights) else Why.RESTING


def _why_none(
    name: str,
    missing: Collection[str],
    step: Mapping[str, Weight],
    called: Collection[str] | None,
    heard: Collection[str] | None,
) -> Why:
    path = name.split(".")[:-1]
    if any(_is_copy(path[:depth], missing, step) for depth in range(1, len(path) + 1)):
        return Why.COPY
    if called is None:
        return Why.UNKNOWN
    layer = layer_of(name) or ""
    if layer in called:
        return Why.CUT
    return Why.SWITCHED_OFF if heard is not None and layer in heard else Why.IDLE


def _is_copy(path: Sequence[str], missing: Collection[str], step: Mapping[str, Weight]) -> bool:
    """Whether a module, all of it without gradient, has the shapes of one beside it, all of it with gradients.

    Not where their names differ in a number alone: layers one behind the other have equal shapes too.
    """
    own = _shapes(path, step)
    if not all(".".join([*path, name]) in missing for name in own):
        return False
    level = len(path) - 1
    beside = {name.split(".")[level] for name in step if name.split(".")[:level] == path[:level]}
    others = [part for part in beside if part.rstrip("0123456789") != path[-1].rstrip("0123456789")]
    return any(
        _shapes([*path[:-1], part], step) == own and not any(".".join([*path[:-1], part, x]) in missing for x in own)
        for part in others
    )


def _shapes(path: Sequence[str], step: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    prefix = ".".join(path) + "."
    return {name.removeprefix(prefix): row.shape for name, row in step.items() if name.startswith(prefix)}


def _listed(names: Iterable[str]) -> str:
    first = list(names)
    rest = f", and {len(first) - NAMED} more" if len(first) > NAMED else ""
    return ", ".join(first[:NAMED]) + rest
