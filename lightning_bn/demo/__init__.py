# SPDX-License-Identifier: Apache-2.0
"""A data set and two networks to try the callbacks on; needs scikit-learn."""

from lightning_bn.demo.data import DigitsData
from lightning_bn.demo.models import DigitsMLP, DigitsResNet

__all__ = ["DigitsData", "DigitsMLP", "DigitsResNet"]
