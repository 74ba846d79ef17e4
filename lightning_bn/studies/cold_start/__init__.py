# SPDX-License-Identifier: Apache-2.0
"""Weights from N(0, σ²) with a large σ in front of BatchNorm: NaN or not, silent or not, trained or not."""

from __future__ import annotations

from lightning_bn.studies.cold_start.measure import STUDY

__all__ = ["STUDY"]
