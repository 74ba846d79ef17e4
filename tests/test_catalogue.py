# SPDX-License-Identifier: Apache-2.0
"""Recipes by name: on the command line, as files of ``lbn://``, and as copies."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from lightning_bn import catalogue, recipe_files
from lightning_bn.cli import main

RECIPES = Path(__file__).parent.parent / "recipes"


def spoken(capsys, *words):
    """What the command prints, and how it ends."""
    status = 0
    try:
        main([*words])
    except SystemExit as end:
        status = end.code
    streams = capsys.readouterr()
    return streams.out, streams.err, status


def test_every_recipe_of_the_checkout_has_a_name():
    """The names are those of the files."""
    assert catalogue.names() == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    wanted = ["diagnose", "why_nan", "activations", "overfitting", "init_he", "init_xavier", "init_naive"]
    assert set(wanted) <= set(catalogue.names())


def test_the_list_shows_each_question(capsys, monkeypatch):
    """``lightning-bn recipes`` prints name and question, and how to use one."""
    monkeypatch.setenv("COLUMNS", "200")
    for words in (["recipes"], ["recipes", "list"]):
        out, _, status = spoken(capsys, *words)
        assert not status
        assert all(name in out and catalogue.question(name) in out for name in catalogue.names())
        assert "--config lbn://NAME" in out


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_is_shown_to_the_letter(capsys, name):
    """``lightning-bn recipes show NAME`` prints the file, and ``lbn://NAME`` opens the same bytes."""
    text = (RECIPES / f"{name}.yaml").read_text()
    assert spoken(capsys, "recipes", "show", name) == (text, "", None)
    for url in (f"lbn://{name}", f"lbn://{name}.yaml"):
        with fsspec.open(url, "r") as file:
            assert file.read() == text


def test_a_recipe_is_copied_and_nothing_is_overwritten(capsys, tmp_path, monkeypatch):
    """``copy`` writes into the working directory, a folder or a file; a file that is there stays, unless forced."""
    monkeypatch.chdir(tmp_path)
    assert spoken(capsys, "recipes", "copy", "why_nan")[0].strip() == "why_nan.yaml"
    assert spoken(capsys, "recipes", "copy", "why_nan", "new/mine.yaml")[0].strip() == "new/mine.yaml"
    assert spoken(capsys, "recipes", "copy", "why_nan", "new")[0].strip() == "new/why_nan.yaml"
    assert all(path.read_text() == catalogue.text("why_nan") for path in tmp_path.rglob("*.yaml"))
    (tmp_path / "why_nan.yaml").write_text("mine")
    assert (
        "FILE must be a file that is not there yet, got why_nan.yaml" in spoken(capsys, "recipes", "copy", "why_nan")[2]
    )
    assert (tmp_path / "why_nan.yaml").read_text() == "mine"
    spoken(capsys, "recipes", "copy", "why_nan", "--force")
    assert (tmp_path / "why_nan.yaml").read_text() == catalogue.text("why_nan")


def test_a_name_that_is_none_gets_the_names_that_are(capsys, monkeypatch):
    """The error names what is needed, what it got and the nearest name, also where ``lbn://`` is opened, and once."""
    _, _, status = spoken(capsys, "recipes", "show", "why_nam")
    assert all(
        words in status for words in ("NAME must be one of", "activations", "'why_nam'", "did you mean why_nan?")
    )
    monkeypatch.setattr(recipe_files, "_REFUSED", set())
    for _ in range(2):
        with pytest.raises(FileNotFoundError), fsspec.open("lbn://why_nam"):
            pass
    assert capsys.readouterr().err.count("lbn://why_nam: NAME must be one of") == 1


def test_the_files_can_be_listed_and_not_written():
    """``lbn://`` is a folder of all recipes, read-only."""
    filesystem = fsspec.filesystem("lbn")
    assert filesystem.ls("lbn://", detail=False) == catalogue.names()
    (row,) = filesystem.ls("lbn://why_nan")
    assert row == {"name": "why_nan", "size": len(catalogue.text("why_nan").encode()), "type": "file"}
    assert filesystem.isdir("lbn://")
    with pytest.raises(ValueError, match="recipes are read-only, got 'wb'"):
        filesystem.open("lbn://why_nan", "wb")


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_all_commands(capsys, words):
    """Those of this package and those of LightningCLI, without importing the latter."""
    out, _, _ = spoken(capsys, *words)
    assert all(
        f"    {command}" in out for command in ("recipes", "report", "study", "fit", "validate", "test", "replay")
    )


def test_an_interrupt_ends_without_a_traceback(capsys, monkeypatch):
    """Ctrl-C ends one of our commands with 130, as shells count it."""

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "names", interrupt)
    assert spoken(capsys, "recipes") == ("", "", 130)
