# SPDX-License-Identifier: Apache-2.0
"""Wherever layers are built, whatever life a model leads, in one process or two: initialised once, or rightly not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from init_lives import BUILT, IMPOSSIBLE, LIVES, summary, without_us

SCRIPT = Path(__file__).parent.parent / "init_script.py"
NOTES = {"resumed": ["not-initialised"], "fitted twice": ["not-initialised"]}
REFUSED = {
    "ddp": {*IMPOSSIBLE, *(("lazy", life) for life in LIVES)},  # DDP takes no lazy modules
    "fsdp2": {("configure_model", life) for life in LIVES if life.startswith("averaged")},  # FSDP2 cannot be copied
}
CELLS = [(built, life) for built in BUILT for life in LIVES]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning"),  # WeightAveraging's own word
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning"),
]


@pytest.mark.parametrize(("built", "life"), [cell for cell in CELLS if cell not in IMPOSSIBLE])
def test_in_one_process(make_trainer, tmp_path, built, life):
    """The weights are those of the one initialisation that counts, or untouched; a note says what did not happen."""
    seen = summary(LIVES[life](BUILT[built], make_trainer, tmp_path))
    assert seen["weights"] == seen["expected"]
    assert seen["notes"] == NOTES.get(life, [])
    assert not seen["off"]


@pytest.mark.parametrize(("built", "life"), IMPOSSIBLE)
def test_what_lightning_cannot_do_fails_alike_without_us(make_trainer, tmp_path, built, life):
    """The same error comes without WeightInit."""
    errors = []
    for make in (make_trainer, without_us(make_trainer)):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            LIVES[life](BUILT[built], make, tmp_path)
        errors.append(str(caught.value).split(" in <")[0])
    assert errors[0] == errors[1]


@pytest.fixture
def lived(request, tmp_path_factory):
    """All lives under one strategy, led in two processes: the reports of both ranks."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root = shared / f"lives_{request.param}"
    with FileLock(f"{root}.lock"):  # the first test of the first worker leads them, all others read
        if not root.exists():
            root.mkdir()
            lead(request.param, root)
    return [json.loads(report.read_text()) for report in sorted(root.glob("rank*.json"))]


def lead(strategy, root):
    """Start both processes, which leave their reports in a folder."""
    words = [*("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), str(SCRIPT), strategy]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words, str(root)],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    reports = sorted(root.glob("rank*.json"))
    assert len(reports) == 2, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize(
    ("lived", "strategy", "built", "life"),
    [
        *(("ddp", "ddp", *cell) for cell in CELLS),
        *(("fsdp2", "fsdp2", "configure_model", life) for life in LIVES),
    ],
    indirect=["lived"],
)
def test_in_two_processes(lived, strategy, built, life):
    """The same on both ranks, whose own random states differ; only the first one reports."""
    one, other = (rank[f"{built}, {life}"] for rank in lived)
    if (built, life) in REFUSED[strategy]:
        assert one["error"] == one["without us"] == other["error"] == other["without us"]
        return
    assert one["weights"] == other["weights"] == one["expected"]
    assert one["notes"] == NOTES.get(life, [])
    assert other["notes"] == []
    assert not one["off"]
    assert not other["off"]
