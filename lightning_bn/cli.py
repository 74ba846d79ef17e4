# SPDX-License-Identifier: Apache-2.0
"""``lightning-bn``: recipes, reports and studies; everything else is LightningCLI's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_bn import catalogue

if TYPE_CHECKING:
    from rich.table import Table

LIGHTNING = {
    "fit": "train a model, and print what the monitors found",
    "validate": "run the validation loop",
    "test": "run the test loop",
    "predict": "run the prediction loop",
    "replay": "run again a step that NaNGuard saved: lightning-bn replay FILE --config CONFIG",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: the words after the command; None takes those of the process.
    """
    words = sys.argv[1:] if args is None else list(args)
    parser = command_parser()
    if words and words[0] not in {"recipes", "report", "study", "-h", "--help"}:
        from lightning_bn.training_cli import run  # noqa: PLC0415  (imports Lightning, which takes seconds)

        run(None if args is None else words)
        return
    options = parser.parse_args(words)
    if "command" not in options:
        parser.print_help()
        return
    try:
        status = options.command(options)
    except (ValueError, OSError) as error:
        sys.exit(f"lightning-bn: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # as shells count it
    sys.exit(status)


def command_parser() -> argparse.ArgumentParser:
    """The parser of the commands; those of LightningCLI stand in its help alone."""
    parser = argparse.ArgumentParser("lightning-bn", description="Why does my network not train?")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_recipes(commands.add_parser("recipes", help="list, show or copy the recipes that --config lbn://NAME takes"))
    _add_report(commands.add_parser("report", help="what was found in one run or in several"))
    _add_study(commands.add_parser("study", help="put a claim about BatchNorm to the test"))
    for name, text in LIGHTNING.items():
        commands.add_parser(name, help=text)
    return parser


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_list_recipes)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    actions.add_parser("list", help="name and question of each; the same as no action").set_defaults(
        command=_list_recipes
    )
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", metavar="NAME", help="one of the list")
    show.set_defaults(command=_show_recipe)
    copy = actions.add_parser("copy", help="copy a recipe, to change it")
    copy.add_argument("name", metavar="NAME", help="one of the list")
    copy.add_argument("target", metavar="FILE", nargs="?", help="file or folder; NAME.yaml here if not given")
    copy.add_argument("--force", action="store_true", help="overwrite a file that is there")
    copy.set_defaults(command=_copy_recipe)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logdirs", metavar="LOGDIR", nargs="+", help="log directory of a run, or a folder of such")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    levels = ("error", "warning", "info", "never")
    parser.add_argument("--fail-on", choices=levels, default="never", help="exit with 1 from this severity on")
    parser.set_defaults(command=_report)


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="which study; without a name they are listed")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("studies"), help="folder for the results")
    parser.add_argument("--seeds", metavar="N", type=int, help="number of seeds; each study has its own")
    parser.add_argument("--jobs", metavar="N", type=int, help="processes of one thread each (two, if there are cores)")
    parser.set_defaults(command=_study)


def _list_recipes(_: argparse.Namespace) -> None:
    _print(_two_columns("recipe", {name: catalogue.question(name) for name in catalogue.names()}))
    _print("Append one to your own config: python your_train.py fit --config your.yaml --config lbn://NAME")


def _show_recipe(options: argparse.Namespace) -> None:
    sys.stdout.write(catalogue.text(options.name))


def _copy_recipe(options: argparse.Namespace) -> None:
    _print(str(catalogue.copy(options.name, options.target, force=options.force)))


def _report(options: argparse.Namespace) -> int:
    from lightning_bn.run_report import report  # noqa: PLC0415  (the other commands do not need it)

    return report(options.logdirs, as_json=options.json, fail_on=options.fail_on)


def _study(options: argparse.Namespace) -> None:
    from lightning_bn.studies import STUDIES  # noqa: PLC0415  (imports torch, as the next one does)
    from lightning_bn.studies.runner import default_jobs, run_study  # noqa: PLC0415

    if options.name is None:
        _print(_two_columns("study", STUDIES))
    else:
        jobs = default_jobs() if options.jobs is None else options.jobs
        run_study(options.name, options.out, seeds=options.seeds, jobs=jobs)


def _two_columns(title: str, texts: dict[str, str]) -> Table:
    from rich.table import Table  # noqa: PLC0415  (only what is printed needs it)

    table = Table(title, "question", box=None, pad_edge=False)
    for name, text in texts.items():
        table.add_row(name, text)
    return table


def _print(content: Table | str) -> None:
    from rich.console import Console  # noqa: PLC0415  (the same)

    Console().print(content, highlight=False, soft_wrap=isinstance(content, str))


if __name__ == "__main__":
    main()
