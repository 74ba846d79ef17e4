# SPDX-License-Identifier: Apache-2.0
"""Scripts in two processes of one job, forked from a server that has imported what takes seconds to import."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import traceback
import warnings
from multiprocessing import forkserver
from pathlib import Path

RANKS = 2
SECONDS = 120


def in_two_processes(script, *words, root):
    """Run a script as both ranks of a job that was started from outside, as a cluster does.

    Args:
        script: path of the script; it sees ``LOCAL_RANK``.
        words: its command line.
        root: folder for what the processes print.

    Returns:
        The ends of what both printed, for the message of an assertion.
    """
    context = _server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    logs = [root / f"printed{rank}.txt" for rank in range(RANKS)]
    ranks = [
        context.Process(target=_as_rank, args=(rank, port, str(script), [*map(str, words)], str(log)))
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    for process in ranks:
        if process.is_alive():
            process.kill()
    printed = [log.read_text()[-2000:] for log in logs if log.exists()]
    for log in logs:
        log.unlink(missing_ok=True)
    return "\n".join(printed)


def _server():
    """A context of processes that are forked from a server with everything imported; one server for each process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the server does not take over sys.path
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({} if before is None else {"PYTHONPATH": before})
    return context


def _as_rank(rank, port, script, words, log):
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in job.items()}, OMP_NUM_THREADS="1")
    with open(log, "w") as file:  # noqa: PTH123  (its descriptor takes the place of the streams')
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        sys.argv = [script, *words]
        sys.path.insert(0, str(Path(script).parent))
        warnings.simplefilter("ignore")
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:  # noqa: BLE001  (the report of it is all that is left of the process)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
