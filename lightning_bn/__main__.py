# SPDX-License-Identifier: Apache-2.0
"""``python -m lightning_bn``: the same as the command ``lightning-bn``."""

from lightning_bn.cli import main

if __name__ == "__main__":
    main()
