# SPDX-License-Identifier: Apache-2.0
"""Print beside a progress bar."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def print_above_bar(trainer: Trainer, text: str) -> None:
    """Print so that the text survives the TQDM bar, the Rich bar and no bar at all; a closed stream is no error."""
    bar = trainer.progress_bar_callback
    console = getattr(bar, "_console", None)  # Rich: a console of its own, which moves the bar down
    with contextlib.suppress(OSError, ValueError):
        if console is not None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif hasattr(bar, "_train_progress_bar"):  # TQDM; its own print drops the text while no bar is shown
            from tqdm import tqdm  # noqa: PLC0415  (only where Lightning itself uses it)

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)  # noqa: T201
