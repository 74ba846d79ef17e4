# SPDX-License-Identifier: Apache-2.0
"""BatchNorm against GroupNorm and LayerNorm by batch size, with the effective samples that BatchNorm normalises by."""

from __future__ import annotations

from lightning_bn.studies.batch_size.measure import STUDY

__all__ = ["STUDY"]
