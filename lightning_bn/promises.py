# SPDX-License-Identifier: Apache-2.0
"""Which callbacks of this package the command line of a LightningCLI asks for, and where it is sure to lose some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_bn import catalogue, recipe_files

PACKAGE = "lightning_bn."
SUBCOMMANDS = ("fit", "validate", "test", "predict")
LARGEST = 1 << 20  # bytes; no config is larger


@dataclass(frozen=True)
class Promise:
    """Callbacks that a config or the command line names.

    Args:
        source: the config as given, or the option.
        callbacks: names of their classes, in order.
        appends: whether they are to be added to those of the project, by ``callbacks+``.
        replaces: why callbacks of the project are lost beside these, where that is sure.
    """

    source: str
    callbacks: tuple[str, ...]
    appends: bool = True
    replaces: str | None = None


@dataclass(frozen=True)
class Given:
    """A value on the command line.

    Args:
        option: name of the option, without what follows ``=``.
        value: its value.
        nested: whether it stands in front of the subcommand, behind another config.
    """

    option: str
    value: str
    nested: bool = False


def promises(words: Sequence[str], environ: Mapping[str, str]) -> list[Promise]:
    """What configs, options and environment variables of LightningCLI ask for.

    Args:
        words: the command line, without the name of the program.
        environ: the environment.

    Returns:
        One promise for each source that names a callback of this package, in the order given. What a plain
        ``--trainer.callbacks`` replaces is no promise any more, as that is plainly meant.
    """
    found: list[Promise] = []
    for given in [*_from_environment(environ), *_from_words(words)]:
        if given.option == "--trainer.callbacks":
            found.clear()
        found.extend(_promise(given))
    if not any(given.option == "--trainer.callbacks" for given in _from_words(words)):
        shown = {promise.source for promise in found}
        opened = [f"{recipe_files.SCHEME}://{name}" for name in dict.fromkeys(recipe_files.OPENED)]
        found.extend(entry for url in opened if url not in shown for entry in _promise(Given("--config", url)))
    return found


def _from_words(words: Sequence[str]) -> Iterator[Given]:
    subcommand = next((place for place, word in enumerate(words) if word in SUBCOMMANDS), 0)
    configs = 0
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not equals:
            value = words[place + 1] if place + 1 < len(words) else ""
        if option in {"-c", "--config"}:
            yield Given("--config", value, nested=place < subcommand and configs > 0)
            configs += 1
        elif option in {"--trainer", "--trainer.callbacks"} or (option == "--trainer.callbacks+"):
            yield Given(option, value)
        elif word.startswith("--trainer.callbacks+="):
            yield Given("--trainer.callbacks+", word.partition("+=")[2])


def _from_environment(environ: Mapping[str, str]) -> Iterator[Given]:
    for name, value in environ.items():
        if name.startswith("PL_") and name.endswith("CONFIG"):
            yield Given("--config", value)
        elif name.startswith("PL_") and name.endswith("TRAINER__CALLBACKS"):
            yield Given("--trainer.callbacks+", value)


def _promise(given: Given) -> Iterator[Promise]:
    text = _text(given.value)
    if PACKAGE not in text:
        return
    content = _parsed(text)
    source = given.value if "\n" not in given.value else given.option
    if "callbacks" in given.option:
        yield from _named(given.option, content, appends=given.option.endswith("+"))
    elif not isinstance(content, Mapping):
        return
    elif given.option == "--trainer":
        why = f"--trainer {source} takes the place of the whole trainer section, and callbacks+ then appends to nothing"
        yield from _sure_loss(_of(source, content), why)
    else:
        yield from _of(source, _trainer_of(content))
        for name in SUBCOMMANDS:
            section = content.get(name)
            nested = _of(source, _trainer_of(section)) if isinstance(section, Mapping) else iter(())
            why = f"{source} stands in front of the subcommand {name}, where callbacks+ takes the place of a list"
            yield from _sure_loss(nested, why) if given.nested else nested


def _of(source: str, trainer: Mapping[str, Any]) -> Iterator[Promise]:
    """The promise of a trainer section."""
    appended, plain = trainer.get("callbacks+"), trainer.get("callbacks")
    if appended is not None and plain:
        both = f"{source} has callbacks and callbacks+ in one section, of which LightningCLI takes callbacks+ alone"
        yield from (replace(entry, replaces=both) for entry in _named(source, appended, appends=True))
    elif appended is not None:
        yield from _named(source, appended, appends=True)
    else:
        yield from _named(source, plain, appends=False)


def _named(source: str, callbacks: Any, *, appends: bool) -> Iterator[Promise]:
    """The promise of a list of callbacks, of a single one, or of a class path alone."""
    entries = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [entry.get("class_path") if isinstance(entry, Mapping) else entry for entry in entries]
    names = tuple(path.rpartition(".")[2] for path in paths if isinstance(path, str) and path.startswith(PACKAGE))
    if names:
        yield Promise(source, names, appends)


def _sure_loss(found: Iterator[Promise], why: str) -> Iterator[Promise]:
    return (replace(entry, replaces=why) if entry.appends and not entry.replaces else entry for entry in found)


def _trainer_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The trainer section of a config, also where its keys are written flat, as in ``trainer.callbacks+``."""
    section = content.get("trainer")
    flat = {name.removeprefix("trainer."): value for name, value in content.items() if str(name).startswith("trainer.")}
    return {**(section if isinstance(section, Mapping) else {}), **flat}


def _text(value: str) -> str:
    """What stands in a config: of a recipe, of a file, or the value itself."""
    scheme, separator, name = value.partition("://")
    try:
        if separator and scheme == recipe_files.SCHEME:
            return catalogue.text(name.strip("/"))
        path = Path(value)
        if "\n" not in value and path.is_file() and path.stat().st_size <= LARGEST:
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # no such file, no text, a name too long for one
        return value
    return value


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None
