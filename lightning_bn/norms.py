# SPDX-License-Identifier: Apache-2.0
"""Find the BatchNorm layers of a model."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.taps import plain_name


def find_batchnorm(model: nn.Module) -> dict[str, _BatchNorm]:
    """All BatchNorm layers by module path, in the order of ``named_modules``.

    Subclasses of ``BatchNorm1d/2d/3d``, ``SyncBatchNorm`` and direct subclasses of torch's common base class
    are found; a layer that is used in several places is listed once, under its first name.

    Args:
        model: any module.

    Returns:
        Layer by name; without BatchNorm an empty dict.

    Example:
        >>> list(find_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        ['1']
    """
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
