# SPDX-License-Identifier: Apache-2.0
"""The callbacks; the only layer below the command line that knows Lightning."""
