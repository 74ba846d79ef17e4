# SPDX-License-Identifier: Apache-2.0
"""Initialisation did not happen, or did not last, or not for all parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_bn.findings import Finding, Severity

RULE = "not-initialised"


def replaced_by_checkpoint(path: str) -> Finding:
    """Say that a restored checkpoint took the place of the initial weights."""
    evidence = f"the weights come from the checkpoint {path}, not from this initialisation"
    return Finding(RULE, Severity.INFO, evidence, "", data={"checkpoint": path})


def left_alone(scheme: str, *, same_fit: bool = False) -> Finding:
    """Say that a model which was initialised before keeps its weights.

    Args:
        scheme: by what it was initialised.
        same_fit: whether another callback of the same trainer did it, as where a recipe was added to a config.
    """
    who = "by another WeightInit of this trainer" if same_fit else "before"
    advice = (
        "take the other one out of your config to start by this one" if same_fit else "build a new model to start over"
    )
    evidence = f"this model was initialised {who} ({scheme}) and keeps its weights"
    return Finding(RULE, Severity.INFO, evidence, advice, data={"scheme": scheme})


def could_not_fill(skipped: Mapping[str, str]) -> Finding | None:
    """Say which parameters kept their values, and why; None if there are none."""
    if not skipped:
        return None
    names = [f"{name} ({why})" for name, why in skipped.items()]
    shown = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")  # noqa: PLR2004
    what = "1 parameter kept its value" if len(names) == 1 else f"{len(names)} parameters kept their values"
    evidence = f"{what}: {shown}"
    return Finding(RULE, Severity.INFO, evidence, "", data={"skipped": dict(skipped)})


def remark(text: str) -> Finding:
    """Say something particular about an initialisation that did happen, such as a γ that stays 0."""
    return Finding(RULE, Severity.INFO, text, "")


def not_scaled(why: str, layers: Sequence[str] = ()) -> Finding:
    """Say that LSUV left weights orthogonal instead of scaling them to unit variance.

    Args:
        why: the reason.
        layers: the layers it concerns; empty for all.
    """
    which = f"the weights of {', '.join(layers)}" if layers else "all weights"
    evidence = f"lsuv left {which} orthogonal, not scaled to unit variance: {why}"
    return Finding(RULE, Severity.INFO, evidence, "", data={"layers": list(layers)})
