# SPDX-License-Identifier: Apache-2.0
"""Projects of somebody else's, run in this process: what a process of its own would do, without its start."""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path

import lightning.pytorch
import pytorch_lightning

from lightning_bn import auto, recipe_files

HOSTS = Path(__file__).parent / "hosts"


class Hosting:
    """Runs projects as ``python PROJECT WORDS...`` would, in the working directory.

    Args:
        monkeypatch: undoes what is changed for it.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.trainers = []
        for package in (lightning.pytorch, pytorch_lightning):
            self._record(package.Trainer)
        monkeypatch.syspath_prepend(HOSTS)
        monkeypatch.delenv(auto.VARIABLE, raising=False)

    def __call__(self, project, *words):
        """Run a script of the folder ``hosts``; gives its last trainer."""
        self._words(project, words)
        runpy.run_path(str(HOSTS / project), run_name="__main__")
        return self.trainers[-1]

    def command(self, *words):
        """Run ``lightning-bn WORDS...``; gives how it ends."""
        from lightning_bn.cli import main  # noqa: PLC0415  (as the console script does)

        self._words("lightning-bn", words)
        try:
            main()
        except SystemExit as end:
            return end.code
        return 0

    def _words(self, program, words):
        self.monkeypatch.setattr(auto, "_witnessed", [])
        self.monkeypatch.setattr(recipe_files, "OPENED", [])
        self.monkeypatch.setattr(sys, "argv", [program, *map(str, words)])

    def _record(self, trainer_class):
        fit, trainers = trainer_class.fit, self.trainers

        @functools.wraps(fit)
        def recorded(self, *args, **kwargs):
            trainers.append(self)
            return fit(self, *args, **kwargs)

        self.monkeypatch.setattr(trainer_class, "fit", recorded)
