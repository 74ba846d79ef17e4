# SPDX-License-Identifier: Apache-2.0
"""Experiments that put claims about BatchNorm to the test: ``lightning-bn study NAME``."""

from __future__ import annotations

import importlib

from lightning_bn.studies.study import Row, Setting, Study, Verdict

STUDIES = {
    "init": "Six starts, with and without BatchNorm, at three depths, in three precisions: which of them train?",
    "cold_start": "Weights from N(0, 1000²) in front of BatchNorm: when is the first forward pass NaN, and when not?",
    "small_data": "100 images in batches of 8: which normalisation overfits, and by which measure?",
    "batch_size": "From which batch size on is BatchNorm better than GroupNorm, and how many samples does it see?",
    "undo": "Do γ = √(σ² + ε) and β = μ undo BatchNorm?",
}
"""Name and question of each study; the module of that name holds its ``STUDY``."""

__all__ = ["STUDIES", "Row", "Setting", "Study", "Verdict", "load_study"]


def load_study(name: str) -> Study:
    """The study of a name.

    Args:
        name: one of ``STUDIES``.

    Raises:
        ValueError: for any other name.
    """
    if name not in STUDIES:
        raise ValueError(f"NAME must be one of {', '.join(STUDIES)}, got {name!r}")
    study: Study = importlib.import_module(f"{__name__}.{name}").STUDY
    return study
