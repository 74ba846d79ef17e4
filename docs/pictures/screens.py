# SPDX-License-Identifier: Apache-2.0
"""Take the pictures of the documentation from real runs, in a real TensorBoard and a real browser.

Run:     python docs/pictures/screens.py [--only RUN] [--browser chromium]
Needs:   a Chromium or Chrome, and scikit-learn.
Writes:  docs/pictures/NAME.png, one for each entry of SCREENS and of FIGURES.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
RUNS = {
    # 8 epochs of the demonstration: a healthy network.
    "healthy": "--config lbn://digits",
    # 20 layers without a norm that start from N(0, 0.01²): the signal fades to nothing.
    "faded": "--config lbn://digits --model lightning_bn.demo.DigitsMLP --model.norm none --model.depth 20"
    " --trainer.max_epochs 1 --trainer.callbacks lightning_bn.WeightInit --trainer.callbacks.scheme naive"
    " --trainer.callbacks+ lightning_bn.NaNGuard",
    # 100 images in batches of 8, 30 % of the labels drawn at random: validation turns.
    "overfitting": "--config lbn://digits --model lightning_bn.demo.DigitsMLP --data.init_args.train_size 100"
    " --data.init_args.batch_size 8 --data.init_args.label_noise 0.3 --trainer.max_epochs 60",
}
SCREENS = {
    "overview": ("healthy", "#scalars&_smoothingWeight=0&tagFilter=bn_overview/(std|zero|gamma_drift)", (1500, 960)),
    "report": ("overfitting", "#text&tagFilter=bn_report", (1500, 620)),
}
FIGURES = {
    "heatmap": ("healthy", "bn_heatmap/std"),
    "signal": ("healthy", "bn_first_pass/signal"),
    "faded_signal": ("faded", "bn_first_pass/signal"),
    "losses": ("overfitting", "bn_verdict/losses"),
    "attribution": ("overfitting", "bn_verdict/attribution"),
    "noise": ("overfitting", "bn_verdict/noise"),
    "gamma_drift": ("overfitting", "bn_heatmap/gamma_drift"),
}


def fit(words: str, folder: Path) -> None:
    """Train with the command line, in a folder of its own."""
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "lightning_bn", "fit", *words.split()]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Serve a log directory; gives the address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0", "--load_fast", "false"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    try:
        lines = iter(process.stdout.readline, "") if process.stdout else iter(())
        found = next(match for line in lines if (match := re.search(r"http://\S+:\d+/", line)))
        address = found.group(0)
        for _ in range(60):  # until the runs are read
            with urllib.request.urlopen(f"{address}data/runs") as answer:  # noqa: S310  (our own server)
                if len(answer.read()) > len("[]"):
                    break
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def shoot(browser: str, url: str, size: tuple[int, int], target: Path) -> None:
    """Open a page and keep what is shown, with few colours and without empty space below."""
    with tempfile.TemporaryDirectory() as profile:
        words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
        quiet = "--disable-background-networking --disable-component-update --disable-sync --virtual-time-budget=20000"
        place = [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", f"--screenshot={target}", url]
        command = [browser, *words.split(), *quiet.split(), *place]
        subprocess.run(command, check=True, capture_output=True, timeout=180)  # noqa: S603
    Image.open(target).convert("RGB").quantize(128).save(target, optimize=True)


def figure(logdir: Path, tag: str, target: Path) -> None:
    """Keep a figure as TensorBoard has it."""
    (events,) = logdir.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0})
    image = accumulator.Reload().Images(tag)[-1].encoded_image_string
    Image.open(io.BytesIO(image)).convert("RGB").quantize(128).save(target, optimize=True)


def main() -> None:
    """Make the runs that are needed and take their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RUNS, help="the pictures of one run")
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome") or "chromium")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        for run in (name for name in RUNS if options.only in {None, name}):
            print(f"training: {run}")
            fit(RUNS[run], Path(scratch) / run)
            logdir = Path(scratch) / run / "lightning_logs"
            for name, (of, tag) in FIGURES.items():
                if of == run:
                    figure(logdir, tag, HERE / f"{name}.png")
            with tensorboard(logdir) as address:
                for name, (of, page, size) in SCREENS.items():
                    if of == run:
                        shoot(options.browser, f"{address}{page}", size, HERE / f"{name}.png")


if __name__ == "__main__":
    main()
