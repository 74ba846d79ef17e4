# SPDX-License-Identifier: Apache-2.0
"""``lightning-bn fit``: a LightningCLI for any model and data that ends with a table of findings, and replays steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lightning_bn.callbacks.base import Monitor, callbacks_of
from lightning_bn.callbacks.rerun import Rerun
from lightning_bn.findings import Finding, NonFiniteError
from lightning_bn.sinks import findings_table


class ReplayingTrainer(Trainer):
    """A Trainer that can also run again a step that NaNGuard saved."""

    replayed: Sequence[Finding] = ()
    """What the last replay found."""

    def replay(self, model: LightningModule, file: str, datamodule: LightningDataModule | None = None) -> list[Finding]:
        """Run a saved step again, forward and backward, and say which operation makes it bad.

        Nothing is trained or logged, and no other callback runs; weights, buffers and random streams are those of the
        file, model and precision those of the config.

        Args:
            model: the model that the step was saved from.
            file: a ``batch_step*.pt`` beside the findings, from NaNGuard with ``save_batch: true``.
            datamodule: the data; only its ``setup`` is used, where the model needs it.

        Returns:
            What was found; empty where the step is finite now.
        """
        try:
            rerun = Rerun(file)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"lightning-bn: {error}")
        self.callbacks, self.loggers = [rerun], []
        self.limit_train_batches = self.limit_val_batches = self.num_sanity_val_steps = 0
        self.fit(model, datamodule=datamodule)
        print_replay(rerun)
        self.replayed = rerun.found
        return rerun.found


class DiagnosisCLI(LightningCLI):
    """LightningCLI in subclass mode; after a fit it prints what the monitors found."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of LightningCLI, and ``replay``."""
        return {**LightningCLI.subcommands(), "replay": {"model", "datamodule"}}

    def after_fit(self) -> None:
        """Print the findings; called by LightningCLI."""
        print_findings(self.trainer)

    def after_replay(self) -> None:
        """End with 1 where the step is bad, as a fit does; called by LightningCLI."""
        if getattr(self.trainer, "replayed", ()):
            sys.exit(1)

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


def print_replay(rerun: Rerun) -> None:
    """Print what a replay found.

    Args:
        rerun: the callback that ran it.
    """
    console = Console()
    where = f"step {rerun.packed['step']} of epoch {rerun.packed['epoch']}, batch {rerun.packed['batch_idx']}"
    if rerun.found:
        console.print(findings_table(rerun.found))
    else:
        console.print(f"lightning_bn: {where} is finite in this replay.")


def with_names(args: list[str]) -> list[str]:
    """Let the file of ``replay`` be given without the ``--file`` that LightningCLI makes of it.

    Example:
        >>> with_names(["replay", "batch_step3_rank0.pt", "--config", "my.yaml"])
        ['replay', '--file', 'batch_step3_rank0.pt', '--config', 'my.yaml']
    """
    if args[:1] == ["replay"] and len(args) > 1 and not args[1].startswith("-"):
        return ["replay", "--file", *args[1:]]
    return args


def run(args: list[str] | None = None) -> None:
    """Run LightningCLI.

    Args:
        args: the words after the command; None takes those of the process.
    """
    if args is None:  # LightningCLI warns where it is given words beside those of the process
        sys.argv[1:] = with_names(sys.argv[1:])
    try:
        DiagnosisCLI(
            LightningModule,
            LightningDataModule,
            trainer_class=ReplayingTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=1,
            args=args if args is None else with_names(args),
        )
    except NonFiniteError as error:
        sys.exit(f"{type(error).__name__}: {error}")
