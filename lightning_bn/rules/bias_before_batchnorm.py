# SPDX-License-Identifier: Apache-2.0
"""A bias in front of BatchNorm, which subtracts it again."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import counted, listed, the_one

RULE = "bias-before-batchnorm"


def bias_before_batchnorm(biases: Mapping[str, int]) -> Finding | None:
    """Say which layers have a bias that BatchNorm takes away.

    BatchNorm subtracts the mean of each channel, and a bias with it (Ioffe & Szegedy 2015, sec. 3.2): in training
    neither the output nor the loss depends on it, so that its gradient is 0 but for rounding.

    Args:
        biases: layers whose output goes to BatchNorm in training mode alone, with the number of values of their bias.

    Returns:
        An ``info``: it costs a little memory and time, and nothing else. None without such layers.
    """
    if not biases:
        return None
    layers = list(biases)
    number = counted(sum(biases.values()), "parameter")
    evidence = f"BatchNorm subtracts the bias of {listed(layers)}: {number} that nothing depends on in training"
    advice = "pass bias=False to them; it changes no output"
    return Finding(RULE, Severity.INFO, evidence, advice, layer=the_one(layers), data={"biases": dict(biases)})
