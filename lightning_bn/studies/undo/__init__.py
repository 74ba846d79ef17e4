# SPDX-License-Identifier: Apache-2.0
"""Do γ = √(σ² + ε) and β = μ undo BatchNorm: in evaluation, in training, and in networks that were trained?"""

from __future__ import annotations

from lightning_bn.studies.undo.measure import STUDY

__all__ = ["STUDY"]
