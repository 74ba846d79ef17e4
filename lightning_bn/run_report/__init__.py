# SPDX-License-Identifier: Apache-2.0
"""``lightning-bn report``: what was found in one run or in several; imports neither torch nor Lightning."""

from __future__ import annotations

from lightning_bn.run_report.comparison import Comparison, Fault, compare, document
from lightning_bn.run_report.printing import report
from lightning_bn.run_report.runs import RunFindings, Said, collect

__all__ = ["Comparison", "Fault", "RunFindings", "Said", "collect", "compare", "document", "report"]
