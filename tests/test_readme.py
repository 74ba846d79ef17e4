# SPDX-License-Identifier: Apache-2.0
"""What the README and the docs promise, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_bn
from lightning_bn import read_findings
from lightning_bn.rules import SLUGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def command(name):
    """The bash block behind a marker of the README."""
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.DOTALL).group(1).strip()


@pytest.mark.slow
def test_the_readmes_python_finds_its_planted_fault(tmp_path):
    """The example ends in a NonFiniteError that names the planted module, and the finding is on disk."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line.strip()) for line in block.splitlines()) == 10
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "NonFiniteError: lightning_bn error: invalid-operation net.2.act1" in done.stderr
    (finding,) = read_findings(tmp_path / "lightning_logs" / "version_0")
    assert finding.layer == "net.2.act1"


def test_the_python_on_the_page_about_initialisation_runs(capsys):
    """The notebook example prints one row for each parameter."""
    page = (ROOT / "docs" / "initialisation.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "docs/initialisation.md", "exec"), {})  # noqa: S102  (our own page)
    assert capsys.readouterr().out.split("\n")[0].startswith("0.weight lsuv ")


def test_the_picture_shows_what_the_example_prints():
    """The README's picture was made from its present example."""
    picture = (ROOT / "docs" / "pictures" / "first_nan.svg").read_text().replace("&#160;", " ")
    assert "invalid-operation net.2.act1" in picture
    assert "return torch.log(x)" in picture
    assert "; lightning_logs/version_0/lightning_bn/findings.jsonl" in picture


def test_the_readme_has_one_command_for_the_demonstration_and_one_for_the_tests():
    """Each is one line that starts from nothing and uses the constraints."""
    assert command("demo").count("\n") == 0
    assert command("demo").endswith("lightning-bn fit --config lbn://digits")
    assert command("test").endswith("pytest -n 2")
    assert all("pip install -c constraints.txt" in command(name) for name in ("demo", "test"))


def test_ci_runs_the_readmes_test_command():
    """CI reads the command from the README instead of repeating it."""
    assert "readme_command test" in (ROOT / ".ci" / "run").read_text()
    assert not re.search(r"\bpytest\b", (ROOT / ".ci" / "run").read_text())


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_of_the_readme_lead_somewhere(link):
    """Every relative link names a file or folder of the repository."""
    assert (ROOT / link).exists()


@pytest.mark.parametrize("slug", SLUGS)
def test_every_rule_has_a_page(slug):
    """What it sees, why it matters, what to do, and when it is a false alarm."""
    page = (ROOT / "docs" / "rules" / f"{slug}.md").read_text()
    assert page.startswith(f"# {slug}\n")
    assert all(f"**{part}**" in page for part in ("What it sees.", "Why it matters.", "What to do."))
    assert "**When it is a false alarm.**" in page


def test_every_page_is_of_a_rule():
    """No page is left of a rule that is gone."""
    assert {path.stem for path in (ROOT / "docs" / "rules").glob("*.md")} - {"index"} == set(SLUGS)


@pytest.mark.slow
def test_static_type_checkers_see_every_public_name(tmp_path):
    """A type checker knows the lazy names as what they are."""
    names = ", ".join(lightning_bn.__all__)
    code = f"from lightning_bn import {names}\nreveal_type(NaNGuard().action)\nNaNGuard(action=3)\n"
    (tmp_path / "user.py").write_text(code)
    words = [sys.executable, "-m", "mypy", "--no-incremental", "--follow-imports=silent", "user.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Literal['raise'] | Literal['stop'] | Literal['warn']" in done.stdout.replace('"', "'")
    assert 'user.py:3: error: Argument "action"' in done.stdout
    assert "Found 1 error" in done.stdout
