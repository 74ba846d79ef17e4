# SPDX-License-Identifier: Apache-2.0
"""The loss is NaN or infinite, and no batch, weight or module explains it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bn.findings import Finding, Severity
from lightning_bn.stats.finite import Census

RULE = "non-finite-loss"


def non_finite_loss(loss: Census, *, heard: int, arrived: str | None, unseen: Mapping[str, str]) -> Finding | None:
    """Judge the loss when no input, parameter or module that was looked at explains it.

    Args:
        loss: census of the loss.
        heard: number of module calls whose inputs and outputs were looked at.
        arrived: path of the first module that NaN or +inf came into; None where it came into none.
        unseen: modules that could not be listened to, with the reason; the fault may lie in one of them.

    Returns:
        An ``error``, or None if the loss is finite.
    """
    if loss.is_finite:
        return None
    kind = "NaN" if loss.nan else "+inf" if loss.posinf else "-inf"
    if arrived is None:
        modules = f"no weight and none of {heard} module outputs holds" if heard else "and no weight holds"
        place = f"no input{',' if heard else ''} {modules} NaN or +inf"
        advice = "look in training_step after the forward pass: a logarithm of 0, a root, or a mean over nothing"
    else:
        place = f"NaN or +inf came into {arrived or 'the model'} already, and none was seen in batch or weights"
        advice = f"look in training_step at what feeds {arrived or 'the model'}: a logarithm, root or quotient"
    if unseen:
        names = ", ".join(f"{name or 'the model'} ({why})" for name, why in unseen.items())
        place += f"; not listened to: {names}"
        advice = "fit once without torch.compile or TorchScript: the fault may lie in what could not be listened to"
    data = {"nan": loss.nan, "posinf": loss.posinf, "neginf": loss.neginf, "arrived": arrived, "unseen": list(unseen)}
    return Finding(RULE, Severity.ERROR, f"the loss is {kind}; {place}", advice, data=data)


def untraced_loss(loss: float, name: str = "") -> Finding:
    """Report a loss whose bad values no operation that was watched has made.

    Args:
        loss: NaN or infinite.
        name: the name that a validation or test step logged it under, where it is known by that alone.

    Returns:
        An ``error``.
    """
    if name:
        evidence = f"{name} is {loss:g} over the whole loop; in which batch is not known, as the step returns no loss"
        advice = "return the loss from this step too, so that the batch and the operation can be found"
        return Finding(RULE, Severity.ERROR, evidence, advice, data={"loss": loss, "name": name})
    evidence = f"the loss is {loss:g}; a replay of the step saw it, but no operation of torch that made it"
    advice = "look for what torch does not see: numpy, a compiled extension, memory that was never written"
    return Finding(RULE, Severity.ERROR, evidence, advice, data={"loss": loss})
