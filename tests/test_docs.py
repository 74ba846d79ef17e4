# SPDX-License-Identifier: Apache-2.0
"""The pages of the site: their code runs, their links lead somewhere, their tables are complete.

A block of Python is executed, all blocks of a page one after the other in one namespace and one empty folder. A block
of YAML is loaded by the LightningCLI of two projects in ``tests/hosts``. The blocks of bash run one after the other,
in a folder that has the recipes and what ``SETUPS`` puts there. A block of text directly below one that is run shows
what it prints: decimals and times may differ, ``...`` stands for anything, and tables, which wrap by the length of
numbers, are not compared. Comments above a block tell the tests what its reader is told in words:

``<!-- file: train.py -->``: the block is this file, for the commands on the page.
``<!-- project: train_lightning.py base.yaml -->``: ``train.py`` and ``config.yaml`` are those of ``tests/hosts``.
``<!-- raises: NonFiniteError -->``, ``<!-- exits: 1 -->``: how the block ends.
``<!-- adds: --trainer.max_epochs 1 -->``: words behind each of its commands, which keep them short here.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from pytorch_lightning.cli import LightningCLI as OtherCLI

import lightning_bn
from lightning_bn.findings import Finding, Severity
from lightning_bn.rules import SLUGS
from lightning_bn.sinks import FindingsFile
from lightning_bn.studies import STUDIES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOSTS = Path(__file__).parent / "hosts"
PACKAGE = ROOT / "lightning_bn"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "results" not in path.parts)  # these are parts of other pages
CALLBACKS = sorted(path for path in DOCS.glob("callbacks/*.md") if path.stem != "diagnose")
LANGUAGES = {"python", "yaml", "bash", "text", "console"}
RUN = {"cat", "exit", "lightning-bn", "ls", "python"}
NOT_RUN = {
    "pip": "changes the environment that the tests run in",
    "tensorboard": "starts a server, which does not end",
}
BLOCK = re.compile(r"^(?:<!-- (\w+): ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DIFFERS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|-?\d*\.\d+(?:e[+-]?\d+)?%?|\d+e[+-]\d+|\d+%")
BORDERS = tuple("┏┃┡│├└")
DIRECTIVES = {"", "adds", "command", "exits", "file", "project", "raises"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: what a comment above it asks for, and what a block of text below says it prints."""

    line: int
    directive: str
    value: str
    language: str
    code: str
    prints: str = ""


def blocks(page):
    """All fenced blocks of a page."""
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    for match, following in zip_longest(found, found[1:]):
        below = following is not None and following[3] in {"text", "console"} and not following[1]
        adjacent = below and not text[match.end() : following.start()].strip()
        yield Block(
            text[: match.start(4)].count("\n") + 1,
            *(part or "" for part in match.groups()),
            prints=following[4] if adjacent and match[3] in {"python", "bash"} else "",
        )


def of(language):
    """The pages that have blocks of a language which are run, as parameters of a test."""
    found = [page for page in PAGES if any(is_run(block, language) for block in blocks(page))]
    return [pytest.param(page, id=page.relative_to(DOCS).as_posix()) for page in found]


def is_run(block, language):
    return block.language == language and block.directive != "file"


def shows(block, printed):
    """Whether a text has all lines that the page says are printed, but for what may differ."""
    plain = [line for line in block.prints.splitlines() if not line.startswith(BORDERS)]
    parts = [part for line in plain for part in line.split("...") if part.strip()]
    missing = [part for part in parts if DIFFERS.sub("#", part.rstrip()) not in DIFFERS.sub("#", printed)]
    assert not missing, f"{missing} is not in what line {block.line} prints:\n{printed[-3000:]}"


def loaded(path, name):
    """A Python file that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def past_runs(folder):
    """Four runs with findings, and the training script of a CI job: what a reader of report.md has."""
    for number in range(4):
        file = FindingsFile(str(folder / "lightning_logs" / f"version_{number}"))
        finding = Finding("dead-units", Severity.WARNING, f"{number + 1} of 8 units", "wait", layer="net.2")
        file.append(finding, run=f"2026-01-0{number + 1}T00:00:00+00:00", monitor="ActivationMonitor")
    shutil.copytree(HOSTS, folder, dirs_exist_ok=True)
    (folder / "script_lightning.py").rename(folder / "train.py")


def your_project(folder):
    """A project with a LightningCLI and a script without, under the names that recipes.md has for them."""
    shutil.copytree(HOSTS, folder, dirs_exist_ok=True)
    names = {"train_lightning.py": "your_train.py", "script_lightning.py": "your_script.py", "base.yaml": "your.yaml"}
    for source, target in names.items():
        (folder / source).rename(folder / target)


def almost_done(name):
    """A study that was stopped before its last run, as the whole takes minutes; the command goes on with it."""

    def prepare(folder):
        rows = (DOCS / "studies" / "results" / f"{name}.csv").read_text().splitlines(keepends=True)
        (folder / "studies").mkdir()
        (folder / "studies" / f"{name}.csv").write_text("".join(rows[:-1]))

    return prepare


SETUPS = {
    "recipes.md": your_project,
    "report.md": past_runs,
    **{f"studies/{name}.md": almost_done(name) for name in STUDIES},
}
"""What has to be in the folder of a page before its first command, where the page's own blocks do not make it."""


def make_index():
    return loaded(DOCS / "rules" / "make_index.py", "make_index")


def commands(block):
    """The commands of a block of bash that are run; each of the others is one that is known not to be."""
    added = f" {block.value}" if block.directive == "adds" else ""
    for line in filter(str.strip, block.code.splitlines()):
        word = re.sub(r"^(?:\w+=\S+\s+)+", "", line).split()[0]
        assigns = re.fullmatch(r"\w+=\S*", word)
        assert word in RUN or word in NOT_RUN or assigns, f"is {word} to be run, or not and why?"
        if word not in NOT_RUN:
            yield line + added


def test_every_block_is_of_a_kind_that_is_tested():
    """No block is without language or in another one, none is indented, and no comment asks for the unknown."""
    for page in PAGES:
        found = list(blocks(page))
        assert page.read_text().count("```") == 2 * len(found), page
        assert {block.language for block in found} <= LANGUAGES, page
        assert {block.directive for block in found} <= DIRECTIVES, page


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        pytest.param("```\nx\n```\n", {""}, id="no language"),
        pytest.param("<!-- exits: 1 -->\n```bash\nls\n```\n", {"bash"}, id="with a comment"),
        pytest.param("```python\nx\n```\n\n```text\n1\n```\n", {"python", "text"}, id="two"),
    ],
)
def test_blocks_are_found_with_their_language(tmp_path, page, expected):
    """The search for blocks sees those without language, with a comment above, and several."""
    (tmp_path / "page.md").write_text(page)
    assert {block.language for block in blocks(tmp_path / "page.md")} == expected


def test_a_printed_line_that_is_missing_is_seen():
    """What a page says is printed is looked for, but for decimals and what three dots stand for."""
    block = Block(1, "", "", "python", "", prints="a 1.5 of 3\n  b ... c\n")
    shows(block, "a 1.7 of 3\n  b and c\n")
    for other in ("a 1.7 of 4\n  b and c\n", "a 1.5 of 3\n"):
        with pytest.raises(AssertionError, match="is not in what line 1 prints"):
            shows(block, other)


@pytest.mark.slow
@pytest.mark.parametrize("page", of("python"))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capfd):
    """The blocks of a page run as they stand there, one after the other, and print what the page says."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if not is_run(block, "python"):
            continue
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        ends = pytest.raises(Exception, match=r"\S") if block.directive == "raises" else nullcontext()
        with warnings.catch_warnings(), ends as error:
            warnings.simplefilter("ignore")
            exec(code, namespace)  # noqa: S102  (our own page)
        assert block.directive != "raises" or error.typename == block.value
        printed = capfd.readouterr()
        shows(block, printed.out + printed.err)


@pytest.mark.slow
@pytest.mark.parametrize("page", of("yaml"))
@pytest.mark.parametrize(
    ("host", "cli"),
    [
        pytest.param("train_lightning", LightningCLI, id="lightning"),
        pytest.param("train_pytorch_lightning", OtherCLI, id="pytorch_lightning"),
    ],
)
def test_the_yaml_of_a_page_is_taken_by_any_project(page, host, cli, tmp_path, monkeypatch):
    """Each block, behind a project's own configuration, gives its Trainer the callbacks that it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(HOSTS)
    project = loaded(HOSTS / f"{host}.py", host)
    for block in blocks(page):
        if not is_run(block, "yaml"):
            continue
        content = yaml.safe_load(block.code)
        assert isinstance(content, dict), block.code
        if "trainer" not in content:
            continue
        (tmp_path / "block.yaml").write_text(block.code)
        words = ["--config", str(HOSTS / "base.yaml"), "--config", "block.yaml"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = cli(project.Net, project.Data, run=False, args=words, save_config_callback=None)
        present = {type(callback).__name__ for callback in made.trainer.callbacks}
        entries = content["trainer"].get("callbacks+", []) + content["trainer"].get("callbacks", [])
        assert entries, block.code
        for entry in entries:
            path = entry if isinstance(entry, str) else entry["class_path"]
            assert path.rpartition(".")[2] in present


def is_watched(command):
    """Whether a command trains with callbacks of this package: by its last configuration or by the variable."""
    _, config, rest = command.rpartition("--config ")
    return "LIGHTNING_BN=" in command or (bool(config) and "callbacks null" not in rest)


def prepared(block, folder):
    """Put into a folder what a block, or the comment above it, says is there."""
    if block.directive == "file":
        (folder / block.value).write_text(block.code)
    if block.directive == "project":
        shutil.copytree(HOSTS, folder, dirs_exist_ok=True)
        for source, target in zip(block.value.split(), ("train.py", "config.yaml"), strict=True):
            (folder / source).rename(folder / target)


def shell(folder, *words):
    """Run bash in a folder, with the commands of this environment, and no callbacks but those that are asked for."""
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTNING_BN"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    bash = [shutil.which("bash"), *words]
    return subprocess.run(bash, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", of("bash"))
def test_the_commands_of_a_page_run(page, tmp_path):
    """The blocks run one after the other in a folder, end as the page says, and every fit is watched."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    SETUPS.get(page.relative_to(DOCS).as_posix(), lambda folder: None)(tmp_path)
    for block in blocks(page):
        prepared(block, tmp_path)
        if block.language != "bash":
            continue
        assert shell(tmp_path, "-n", "-c", block.code).returncode == 0, block.code
        script = "\n".join(commands(block))
        done = shell(tmp_path, "-euo", "pipefail", "-c", script)
        printed = done.stdout + done.stderr
        assert done.returncode == (int(block.value) if block.directive == "exits" else 0), printed[-3000:]
        shows(block, printed)
        fits = [line for line in script.splitlines() if is_watched(line)]
        reports = re.findall(r"^lightning_bn: (?:no findings|\d+ )", printed, re.MULTILINE)
        assert len(reports) == len(fits), printed[-3000:]


def test_a_command_that_is_not_known_is_refused():
    """A page cannot have a command that is neither run nor listed with a reason."""
    block = Block(1, "", "", "bash", "LIGHTNING_BN=nan python train.py\ntensorboard --logdir x\n")
    assert list(commands(block)) == ["LIGHTNING_BN=nan python train.py"]
    with pytest.raises(AssertionError, match="is rm to be run"):
        list(commands(Block(1, "", "", "bash", "rm -r x\n")))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    """``mkdocs build --strict`` passes, every rule has its page, and no page asks another host for anything."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # about the future of MkDocs, not about these pages
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    made = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in PAGES} <= made
    for path in made:
        html = (tmp_path / "site" / path).read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:", html), path
    index = (tmp_path / "site" / "index.html").read_text()
    assert all(f'href="rules/{slug}.html"' in index for slug in SLUGS)


def test_the_table_of_rules_is_that_of_its_command():
    """``docs/rules/index.md`` is what ``python docs/rules/make_index.py`` writes, and it has every rule."""
    text = (DOCS / "rules" / "index.md").read_text()
    assert text == make_index().index()
    assert re.findall(r"^\| \[`([a-z-]+)`\]", text, re.MULTILINE) == list(SLUGS)


def test_every_rule_has_a_severity_and_a_callback_that_says_it():
    """No row of the table has an empty cell."""
    rows = [line for line in make_index().index().splitlines() if line.startswith("| [`")]
    assert len(rows) == len(SLUGS)
    assert not [row for row in rows if any(not cell.strip() for cell in row.strip("|").split("|"))]


def rules_in_reach(module):
    """Slugs of the rules that a module of the package imports, itself or by what it imports."""
    seen, waiting = set(), [module]
    while waiting:
        path = PACKAGE.parent / f"{waiting.pop().replace('.', '/')}.py"
        if path in seen or not path.exists():
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_bn."):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {path.stem.replace("_", "-") for path in seen if path.parent.name == "rules"} & set(SLUGS)


@pytest.mark.parametrize("page", CALLBACKS, ids=lambda path: path.stem)
def test_the_page_of_a_callback_names_the_rules_that_it_can_speak(page):
    """Its links to rules, the table of rules and the docstring agree with what the callback's code imports."""
    text = page.read_text()
    name = text.splitlines()[0].removeprefix("# ")
    index = make_index()
    spoken = index.spoken(name)
    said = text.split("## What it says")[1].split("## What it costs")[0]
    linked = set(re.findall(r"\.\./rules/([a-z-]+)\.md", said))
    assert spoken <= linked
    assert rules_in_reach(getattr(lightning_bn, name).__module__) == spoken | index.COMMON
    assert index.page(name) == page.name
    assert f"::: lightning_bn.{name}\n" in text


def test_what_every_callback_says_comes_of_their_base_class():
    """The rules that the table gives to every callback are those that the base class imports."""
    assert rules_in_reach("lightning_bn.callbacks.base") == make_index().COMMON


def test_every_callback_has_a_page():
    """No monitor is without an example, its arguments, its rules, its cost and its limits."""
    assert {page.name for page in CALLBACKS} == {make_index().page(name) for name in make_index().monitors()}
    for page in CALLBACKS:
        parts = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
        assert parts == ["Example", "Arguments", "What it says", "What it costs", "Limits"], page


def test_the_reference_has_every_public_name():
    """Each name of ``lightning_bn.__all__`` is documented once in the reference, and is in its table."""
    pages = "".join(page.read_text() for page in sorted(DOCS.glob("reference/*.md")))
    documented = re.findall(r"^::: lightning_bn\.(\w+)$", pages, re.MULTILINE)
    assert sorted(documented) == sorted(lightning_bn.__all__)
    table = (DOCS / "reference" / "index.md").read_text()
    assert all(f"`{name}`" in table for name in lightning_bn.__all__)
