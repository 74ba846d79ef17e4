# SPDX-License-Identifier: Apache-2.0
"""Numbers in, ``Finding`` or ``None`` out: one fault per file, named after the fault."""

from __future__ import annotations

from lightning_bn.rules import (
    affine_drift,
    diverged_by_learning_rate,
    invalid_gradient,
    invalid_operation,
    large_initial_loss,
    little_headroom,
    monitor_failed,
    non_finite_input,
    non_finite_loss,
    non_finite_output,
    non_finite_parameter,
    non_finite_target,
    not_initialised,
    not_watched,
    overflow_by_initialisation,
    overflow_by_range,
    overflowed_running_statistics,
    overwritten_weights,
    poisoned_running_statistics,
    unmatched_layers,
)

SLUGS: tuple[str, ...] = (
    affine_drift.RULE,
    diverged_by_learning_rate.RULE,
    invalid_gradient.RULE,
    invalid_operation.RULE,
    large_initial_loss.RULE,
    little_headroom.RULE,
    monitor_failed.RULE,
    non_finite_input.RULE,
    non_finite_loss.RULE,
    non_finite_output.RULE,
    non_finite_parameter.RULE,
    non_finite_target.RULE,
    not_initialised.RULE,
    not_watched.RULE,
    overflow_by_initialisation.RULE,
    overflow_by_range.RULE,
    overflowed_running_statistics.RULE,
    overwritten_weights.RULE,
    poisoned_running_statistics.RULE,
    unmatched_layers.RULE,
)
"""Every rule there is, by its slug: what ``ignore`` may name."""
