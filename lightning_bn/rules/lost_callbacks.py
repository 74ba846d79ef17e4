# SPDX-License-Identifier: Apache-2.0
"""Callbacks that a config names did not reach the trainer."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity

RULE = "lost-callbacks"


def lost_callbacks(source: str, lost: Sequence[str]) -> Finding:
    """Say that a list of callbacks that was read later took the place of ours.

    Args:
        source: the config or the option that names them.
        lost: their classes.

    Returns:
        A ``warning``.
    """
    evidence = f"{source} names {', '.join(lost)}, and the trainer has none: a later list of callbacks replaced them"
    advice = f"give it behind your own config: --config your.yaml --config {source}"
    return Finding(RULE, Severity.WARNING, evidence, advice, data={"source": source, "lost": list(lost)})


def replaced_callbacks(source: str, why: str) -> Finding:
    """Say that callbacks of the project are lost beside ours.

    Args:
        source: the config or the option that names ours.
        why: how that came.

    Returns:
        A ``warning``.
    """
    advice = f"give it behind the subcommand and your own config: fit --config your.yaml --config {source}"
    return Finding(RULE, Severity.WARNING, f"callbacks of your own are lost: {why}", advice, data={"source": source})
