# SPDX-License-Identifier: Apache-2.0
"""The loss is finite and its gradients are not: the derivative of an operation has no finite value there."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.operations import Fault
from lightning_bn.rules.account import before_it, inputs_of, outcome_of, place_of, plain

RULE = "invalid-gradient"
REMEDIES = (
    (("Sqrt", "Rsqrt"), "the slope of a root at 0 is infinite: add a small number inside the root"),
    (
        ("Log", "Log2", "Log10", "Log1P", "Div", "Reciprocal", "Xlogy"),
        "keep the argument away from 0 before the operation, not by torch.where behind it",
    ),
    (("Pow",), "a power below 1 has an infinite slope at 0: clamp the base away from 0"),
    (("Acos", "Asin", "Atanh", "Erfinv"), "clamp the argument to the open interval: the slope at its ends is infinite"),
    (
        ("LinalgSvd", "LinalgEigh", "LinalgEig", "LinalgQr"),
        "the derivative needs distinct singular values or eigenvalues: add a small noise",
    ),
)
"""By the name of the operation that is differentiated, as autograd's node has it in front of ``Backward``."""


def invalid_gradient(fault: Fault | None, *, parameter: str, parameters: int, loss: float | None) -> Finding:
    """Report the backward operation that made the first bad gradient, and the forward line that it differentiates.

    Args:
        fault: the backward operation, as a replay of the step found it; None where it could not be told.
        parameter: the first parameter, in the order of the backward pass, whose gradient is not finite.
        parameters: how many have such gradients.
        loss: the loss.

    Returns:
        An ``error``.
    """
    said = "" if loss is None else f"the loss is {loss:.4g} and finite; "
    who = f"{said}the gradients of {parameters} parameters are not, first that of {parameter}"
    data = {"parameter": parameter, "parameters": parameters, "loss": loss}
    if fault is None:
        advice = "run the step under torch.autograd.detect_anomaly(): the operation was not found by a replay"
        return Finding(RULE, Severity.ERROR, who, advice, layer=parameter.rpartition(".")[0], data=data)
    operation = fault.operation
    evidence = (
        f"{operation.node or operation.name}, backward of what ran {place_of(operation)}: {operation.name} gives "
        f"{outcome_of(fault.output)}, out of {inputs_of(fault)}{before_it(fault)}; {who}"
    )
    layer = operation.spot.layer or None
    return Finding(RULE, Severity.ERROR, evidence, advice_for(fault), layer=layer, data={**data, **plain(fault)})


def advice_for(fault: Fault) -> str:
    """One action, by the kind of operation that is differentiated."""
    differentiated = fault.operation.node.partition("Backward")[0]
    fitting = (advice for names, advice in REMEDIES if differentiated in names)
    return next(fitting, f"look at the derivative of this line: {fault.operation.name} has no finite value there")
