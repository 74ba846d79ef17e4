# SPDX-License-Identifier: Apache-2.0
"""Six starts, with and without BatchNorm, at three depths: what the first forward pass shows, and which ones train."""

from __future__ import annotations

from lightning_bn.studies.init.measure import STUDY

__all__ = ["STUDY"]
