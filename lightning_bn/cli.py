# SPDX-License-Identifier: Apache-2.0
"""``lightning-bn``: a LightningCLI for any model and data, that ends with a table of the findings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lightning_bn.callbacks.base import Monitor, callbacks_of
from lightning_bn.findings import NonFiniteError
from lightning_bn.sinks import findings_table

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class DiagnosisCLI(LightningCLI):
    """LightningCLI in subclass mode; after a fit it prints what the monitors found."""

    def after_fit(self) -> None:
        """Print the findings; called by LightningCLI."""
        print_findings(self.trainer)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Fit, and print the findings also where a monitor stops the run; called by LightningCLI."""
        try:
            self.trainer.fit(model, **kwargs)
        except NonFiniteError:
            print_findings(self.trainer)
            raise


@rank_zero_only
def print_findings(trainer: Trainer) -> None:
    """Print a table of what all monitors of a trainer found, and how to open TensorBoard.

    Args:
        trainer: a trainer after its fit.
    """
    console = Console()
    monitors = [callback for callback in callbacks_of(trainer) if isinstance(callback, Monitor)]
    findings = [finding for monitor in monitors for finding in monitor.findings]
    if findings:
        console.print(findings_table(findings))
    elif monitors:
        console.print(f"lightning_bn: nothing found by {', '.join(type(monitor).__name__ for monitor in monitors)}.")
    for logger in trainer.loggers:
        if logger.save_dir:
            console.print(f"Pictures: tensorboard --logdir {logger.save_dir}", soft_wrap=True, highlight=False)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: the words after the command; None takes those of the process.
    """
    try:
        DiagnosisCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=1,
            args=args,
        )
    except NonFiniteError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
