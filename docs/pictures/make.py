# SPDX-License-Identifier: Apache-2.0
"""Make the README's picture from a real run of the README's own example.

Run:     python docs/pictures/make.py
Writes:  docs/pictures/first_nan.svg
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
STYLES = {"lightning_bn error": "bold red", "lightning_bn.": "bold red", "  ->": "green"}


def example() -> str:
    """The first Python block of the README."""
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    if block is None:
        raise ValueError(f"{README} needs a block of Python, and has none")
    return block.group(1)


def transcript() -> list[str]:
    """What the example prints about its fault."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-W", "ignore", "-c", example()]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    lines = (done.stdout + done.stderr).splitlines()
    findings = [line for line in lines if line.startswith("lightning_bn error")]
    if len(findings) != 1:
        raise RuntimeError(f"the example needs to print one error, and printed {len(findings)}:\n{done.stderr}")
    start = lines.index(findings[0])
    stop = next(place for place, line in enumerate(lines) if line.startswith("lightning_bn: 1 error"))
    return lines[start : stop + 1]


def main() -> None:
    """Draw the transcript as a terminal."""
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=104, file=nowhere, force_terminal=True)
        console.print(Text("$ python train.py", style="bold"))
        for line in transcript():
            style = next((style for start, style in STYLES.items() if line.startswith(start)), "")
            console.print(Text(line, style=style))
        console.print()  # room for fonts that are taller than the one that the frame was made for
    console.save_svg(str(HERE / "first_nan.svg"), title="lightning_bn")


if __name__ == "__main__":
    main()
