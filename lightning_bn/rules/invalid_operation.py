# SPDX-License-Identifier: Apache-2.0
"""An operation makes NaN or infinity out of finite values: a logarithm, a root, a quotient, a mean of nothing."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.operations import Fault
from lightning_bn.rules.account import before_it, inputs_of, outcome_of, place_of, plain

RULE = "invalid-operation"
LOGARITHMS = frozenset({"log", "log2", "log10", "xlogy"})
ROOTS = frozenset({"sqrt", "rsqrt"})
QUOTIENTS = frozenset({"div", "reciprocal", "true_divide", "remainder", "fmod", "addcdiv"})
MEANS = frozenset({"mean", "nanmean", "std", "var", "std_mean", "var_mean"})
LIKELIHOODS = frozenset({"nll_loss_forward", "nll_loss2d_forward", "nll_loss", "nll_loss2d", "cross_entropy_loss"})
SOFTMAXES = frozenset({"_softmax", "_log_softmax", "softmax", "log_softmax", "logsumexp"})
BOUNDED = frozenset({"acos", "asin", "atanh", "acosh", "erfinv", "special_ndtri", "logit"})
SPREAD = frozenset({"std", "var", "std_mean", "var_mean"})


def invalid_operation(fault: Fault, *, after: str) -> Finding:
    """Report the operation that made the first bad value of a forward pass.

    Args:
        fault: the operation, as a replay of the step found it.
        after: what became of the step, in words.

    Returns:
        An ``error`` with module, operation, source line and the ranges of its inputs.
    """
    evidence = (
        f"{fault.operation.name} {place_of(fault.operation)}: {outcome_of(fault.output)}, out of {_what(fault)}: "
        f"{inputs_of(fault)}{before_it(fault)}; {after}"
    )
    layer = fault.operation.spot.layer or None
    return Finding(RULE, Severity.ERROR, evidence, advice_for(fault), layer=layer, data=plain(fault))


def advice_for(fault: Fault) -> str:
    """One action, by the kind of operation."""
    name = fault.operation.name.removesuffix("_") if not fault.operation.name.startswith("_") else fault.operation.name
    if any(entry.seen is not None and entry.seen.nan for entry in fault.inputs):
        return "keep this NaN out of what is differentiated: select the good values before anything is computed of them"
    if name in MEANS and any(not entry.seen.count for entry in fault.inputs if entry.seen):
        return "nothing was selected: skip this term, or divide by max(count, 1), where the selection is empty"
    remedies = (
        (
            LOGARITHMS,
            "keep its argument above 0: clamp(min=1e-7), or log_softmax and logsigmoid in place of a logarithm",
        ),
        (frozenset({"log1p", "special_xlog1py"}), "keep its argument above -1: clamp(min=-1 + 1e-7)"),
        (ROOTS, "keep its argument above 0: add a small number inside the root"),
        (QUOTIENTS, "keep the divisor away from 0: add a small number to it, or divide only where it is not 0"),
        (SPREAD, "a single value has no unbiased variance: pass correction=0, or more values"),
        (LIKELIHOODS, "every label is ignored in this batch: skip the term, or sum and divide by max(count, 1)"),
        (SOFTMAXES, "every entry of a row is masked with -inf: leave at least one open, or mask with a finite number"),
        (BOUNDED, "clamp its argument to the open interval in which the function is finite"),
        (frozenset({"pow"}), "no fractional power of a negative number and no negative power of 0: clamp the base"),
        (frozenset({"empty", "empty_like", "empty_strided", "new_empty"}), "fill the memory before it is read"),
    )
    fitting = (advice for names, advice in remedies if name in names)
    return next(fitting, f"look at what {name} computes from these values")


def _what(fault: Fault) -> str:
    if any(entry.seen is not None and entry.seen.nan for entry in fault.inputs):
        return "NaN that no operation made"
    finite = all(entry.seen is None or entry.seen.is_finite for entry in fault.inputs)
    return "finite values" if finite else "infinities that were meant"
