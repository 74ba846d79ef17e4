# SPDX-License-Identifier: Apache-2.0
"""BatchNorm layers were replaced by another normalisation, or were to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import counted, listed

RULE = "swapped-batchnorm"


def swapped(layers: Mapping[str, str], trained: Sequence[str] = (), *, in_copy: bool = False) -> Finding:
    """Say what stands in place of BatchNorm.

    Args:
        layers: for each replaced layer, by module path, what it is now, such as ``GroupNorm with 8 groups``.
        trained: those of them that had been trained as BatchNorm, and now compute something else.
        in_copy: whether a copy of the model trains, in a process of its own.

    Returns:
        An ``info``; a ``warning`` where layers had been trained.
    """
    by_kind: dict[str, list[str]] = {}
    for name, kind in layers.items():
        by_kind.setdefault(kind, []).append(name)
    parts = [f"{len(names)} by {kind} ({listed(names)})" for kind, names in by_kind.items()]
    evidence = f"{counted(len(layers), 'BatchNorm layer')} replaced: {', '.join(parts)}"
    data = {"layers": dict(layers), "trained": list(trained)}
    keeps = "; the model that was given to fit keeps BatchNorm, as a copy trains in processes of its own"
    evidence += keeps if in_copy else ""
    if not trained:
        advice = "use a checkpoint of the run, in a model with the same layers replaced" if in_copy else ""
        return Finding(RULE, Severity.INFO, evidence, advice, data=data)
    evidence += f"; {len(trained)} had been trained as BatchNorm, and the network computes something else now"
    advice = "train it again, or swap to frozen, which computes what BatchNorm computes in evaluation"
    return Finding(RULE, Severity.WARNING, evidence, advice, data=data)


def nothing_swapped(present: int, earlier: int) -> Finding:
    """Say that no layer was replaced, and why.

    Args:
        present: BatchNorm layers of the model.
        earlier: layers that an earlier fit, or another callback, has replaced.

    Returns:
        An ``info``.
    """
    if earlier:
        why = f"{counted(earlier, 'layer')} of this model had been replaced before"
    elif present:
        why = f"include and exclude leave none of the {counted(present, 'BatchNorm layer')}"
    else:
        why = "the model has none"
    return Finding(RULE, Severity.INFO, f"no BatchNorm layer was replaced: {why}", "", data={"present": present})


def at_initial_statistics(layers: Sequence[str], frozen: int) -> Finding | None:
    """Judge the running statistics that frozen layers normalise by.

    Args:
        layers: those whose running mean is 0 and whose running variance is 1 in every channel.
        frozen: how many frozen layers there are.

    Returns:
        A ``warning``; None without such layers.
    """
    if not layers:
        return None
    evidence = (
        f"{len(layers)} of {counted(frozen, 'frozen BatchNorm layer')} ({listed(layers)}) have the running statistics "
        "that a new layer has, mean 0 and variance 1, and do not normalise"
    )
    advice = "load trained weights with their statistics, or swap to group"
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=layers[0], data={"layers": list(layers)})


def other_than_saved(saved: Mapping[str, str], now: Mapping[str, str]) -> Finding | None:
    """Compare what stands in place of BatchNorm with what stood there in the run that a checkpoint comes from.

    Args:
        saved: what each layer was, by module path; empty where that is not known.
        now: what it is.

    Returns:
        A ``warning`` about the layers that differ; None where all agree.
    """
    names = [name for name, kind in saved.items() if now.get(name, kind) != kind]
    if not names:
        return None
    first = names[0]
    more = f", and {counted(len(names) - 1, 'other layer')} likewise" if len(names) > 1 else ""
    evidence = f"{first} is {now[first]}; in the checkpoint's run it was {saved[first]}{more}"
    advice = "give to, groups and fewest the values of that run"
    data = {"saved": dict(saved), "now": dict(now)}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=first, data=data)
