# SPDX-License-Identifier: Apache-2.0
"""Little else than γ and β is trained, and there are more of them than samples."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "affine-outnumbers-samples"
SHARE = 0.5
"""Share of the trained values from which on it is noted. Beside weights that are trained too, the number of γ and β
tells nothing: a ResNet-50 has 53,120 of them, and is fine-tuned on fewer samples every day."""


def affine_outnumbers_samples(affine: int, trained: int, samples: int | None) -> Finding | None:
    """Say how many γ and β are trained on how many samples, where they are most of what is trained.

    Args:
        affine: number of γ and β values that are trained.
        trained: number of all values that are trained.
        samples: samples in the training set; None if unknown.

    Returns:
        An ``info`` where γ and β are half of the trained values or more, and as many as the samples or more; else None.
    """
    if not samples or affine < samples or affine < SHARE * trained:
        return None
    evidence = (
        f"{affine:,} γ and β are {affine / trained:.0%} of the {trained:,} values that are trained, on {samples:,} "
        "samples: they alone can fit the training set"
    )
    data = {"affine": affine, "trained": trained, "samples": samples}
    return Finding(RULE, Severity.INFO, evidence, "compare training and validation loss", data=data)
