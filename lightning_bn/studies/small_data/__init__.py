# SPDX-License-Identifier: Apache-2.0
"""Study ``small_data``: 100 images in batches of 8, with BatchNorm, GroupNorm, LayerNorm and without any."""

from __future__ import annotations

from lightning_bn.studies.small_data.measure import STUDY

__all__ = ["STUDY"]
