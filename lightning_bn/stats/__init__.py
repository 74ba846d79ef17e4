# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on tensors: torch only, no hooks, no wording."""
