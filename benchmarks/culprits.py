# SPDX-License-Identifier: Apache-2.0
"""Whom three tools blame for NaN: ten planted faults side by side, and what each tool costs.

Run:     OMP_NUM_THREADS=1 python benchmarks/culprits.py [--seeds 3] [--rounds 31]
Output:  a markdown table. An answer is right where it names the planted module or the planted source line (of bad data:
         the tensor); naming anything else is wrong. Shown is the answer for the first seed, and how many seeds got
         what. The last row is the time of a step with the tool over that of a plain one, paired, on ResNet-18: median
         and range. DebugUnderflowOverflow needs Hugging Face transformers; without it its column says so.
"""

from __future__ import annotations

import argparse
import copy
import io
import linecache
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from statistics import median
from typing import Any

import networks
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from networks import FEATURES, ON_CPU, WIDTH, Attention, Between, Classifier, Distances, LogOfProbability, Magnitude
from overhead import paired
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import NaNGuard, NonFiniteError, Severity

try:
    from transformers.debug_utils import DebugUnderflowOverflow
except ImportError:
    DebugUnderflowOverflow = None

CLASSES, TOKENS = 5, 6
BATCH, BATCHES, BAD = 16, 6, 3
SAMPLE = 5
CONTROL = "control: healthy"


@dataclass(frozen=True)
class Fault:
    """A planted fault and the right answers to it.

    Args:
        planted: where it is, for the table.
        build: makes the model.
        places: right answers: modules, or pieces of source lines of ``networks.py``, or words of an answer.
        spoil: changes one batch in place.
        shape: of one sample.
        limit: of an overflow the largest value that fits: the right answer is the first layer to go beyond it.
    """

    planted: str
    build: Callable[[], Classifier]
    places: tuple[str, ...] = ()
    spoil: Callable[[Tensor, Tensor], object] | None = None
    shape: tuple[int, ...] = (FEATURES,)
    limit: float | None = None

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """What is trained on."""
        found = [(torch.randn(BATCH, *self.shape), torch.randint(CLASSES, (BATCH,))) for _ in range(BATCHES)]
        if self.spoil:
            self.spoil(*found[BAD])
        return found

    def right(self) -> set[str]:
        """The right answers, source lines by number."""
        source = enumerate(linecache.getlines(networks.__file__), 1)
        lines = {f"networks.py:{number}" for number, line in source for place in self.places if place in line}
        return lines | set(self.places)


def mlp(*middle: nn.Module) -> nn.Sequential:
    """A hidden layer with BatchNorm, more modules, a head."""
    hidden = [nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    return nn.Sequential(*hidden, *middle, nn.Linear(WIDTH, CLASSES))


def wide(depth: int, dtype: torch.dtype) -> nn.Sequential:
    """Layers without BatchNorm whose weights are drawn from N(0, 1000²)."""
    sizes = [FEATURES, *[WIDTH] * (depth - 1), CLASSES]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=1000)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).to(dtype)


def scaled(net: nn.Sequential) -> nn.Sequential:
    """The network with its first weight times 1e20."""
    net[0].weight.data.mul_(1e20)
    return net


def first_beyond(net: nn.Module, x: Tensor, limit: float) -> str:
    """The first layer whose output, in float64, goes beyond a limit."""
    y = x.double()
    for name, layer in net.double().named_children():
        y = layer(y)
        if y.abs().max() > limit:
            return f"net.{name}"
    return ""


FAULTS = {
    "NaN in the batch": Fault(
        f"batch {BAD}, sample {SAMPLE}",
        lambda: Classifier(mlp()),
        (f"sample {SAMPLE}", "input[0] has nans"),
        lambda x, _: x[SAMPLE, 3].fill_(torch.nan),
    ),
    "log of a negative number": Fault(
        "own forward of net.3", lambda: Classifier(mlp(Between())), ("net.3", "torch.log(self.a(x))")
    ),
    "log(0)": Fault("loss", lambda: LogOfProbability(mlp()), ("torch.log(p)",)),
    "√ at 0, backward only": Fault("loss", lambda: Distances(mlp()), ("torch.sqrt(",)),
    "float16 overflow, no BatchNorm": Fault(
        "N(0, 1000²), depth 5", lambda: Classifier(wide(5, torch.float16)), limit=torch.finfo(torch.float16).max
    ),
    "float32 overflow by initialisation": Fault(
        "N(0, 1000²), depth 20", lambda: Classifier(wide(20, torch.float32)), limit=torch.finfo(torch.float32).max
    ),
    "softmax of a row that is all masked": Fault(
        f"own forward of net.0, by batch {BAD}",
        lambda: Classifier(nn.Sequential(Attention(), nn.ReLU(), nn.Linear(WIDTH, CLASSES))),
        ("net.0", "torch.softmax(scores"),
        lambda x, _: x[SAMPLE].zero_(),
        (TOKENS, FEATURES),
    ),
    "mean over no label": Fault(
        f"loss, by batch {BAD}",
        lambda: Classifier(mlp()),
        ("cross_entropy(logits",),
        lambda _, labels: labels.fill_(-100),
    ),
    "0/0 in a backward pass of the user's own": Fault(
        "net.3",
        lambda: Classifier(mlp(Magnitude())),
        ("net.3", "_Magnitude.apply(", "grad * (x / x.abs())", "_MagnitudeBackward"),
    ),
    "variance overflow in BatchNorm, loss finite": Fault(
        "net.0.weight × 1e20, net.1", lambda: Classifier(scaled(mlp())), ("net.0", "net.1")
    ),
    CONTROL: Fault("nowhere", lambda: Classifier(mlp())),
}


def train(model: Classifier, batches: Sequence[Any], callbacks: list[Callback], **options: Any) -> None:
    """A short fit."""
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=callbacks,
            **options,
        ).fit(model, DataLoader(batches, batch_size=None))


def ask_guard(model: Classifier, batches: Sequence[Any]) -> str:
    """The first error that NaNGuard reports; where there is none, its first warning."""
    guard = NaNGuard()
    with suppress(NonFiniteError):
        train(model, batches, [guard])
    told = [finding for finding in guard.findings if finding.severity is not Severity.INFO]
    if not told:
        return ""
    first = min(told, key=lambda finding: finding.severity is not Severity.ERROR)
    data = first.data
    sample = re.search(r"sample \d+", first.evidence)
    line = f"{PurePath(data['file']).name}:{data['line']}" if data.get("file") else ""
    what = data.get("node") or data.get("operation") or data.get("path") or first.rule
    return ", ".join(filter(None, (what, first.layer, line, sample and sample[0])))


def ask_anomaly_mode(model: Classifier, batches: Sequence[Any]) -> str:
    """The function that ``detect_anomaly`` names, and the innermost line of its traceback that is not of torch."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            train(model, batches, [], detect_anomaly=True)
        except RuntimeError as error:
            function = re.search(r"Function '(\w+)'", str(error))
            told = "".join(str(entry.message) for entry in said)
            lines = re.findall(r'File "[^"]*?(\w+\.py)", line (\d+)', told)
            own = [f"{file}:{line}" for file, line in lines if file == PurePath(networks.__file__).name]
            return ", ".join([function[1] if function else str(error), *own[-1:]])
    return ""


def ask_detector(model: Classifier, batches: Sequence[Any]) -> str:
    """The last module that DebugUnderflowOverflow lists, and which of its tensors it found bad."""
    DebugUnderflowOverflow(model)
    with redirect_stdout(io.StringIO()) as said:
        try:
            train(model, batches, [])
        except ValueError:
            module = re.findall(r"^ {17} ([\w.]*) \w+$", said.getvalue(), re.MULTILINE)[-1]
            tensor, what = re.findall(r"^(.*) has (\w+)$", said.getvalue(), re.MULTILINE)[0]
            return f"{module}, {tensor} has {what}"
    return ""


@contextmanager
def hooked(trainer: Trainer) -> Iterator[None]:
    """DebugUnderflowOverflow on a trainer's model, which it cannot leave by itself."""
    before = {module: list(module._forward_hooks) for module in trainer.lightning_module.modules()}  # noqa: SLF001
    DebugUnderflowOverflow(trainer.lightning_module)
    yield
    for module, kept in before.items():
        for key in set(module._forward_hooks) - set(kept):  # noqa: SLF001  (no public name)
            del module._forward_hooks[key]  # noqa: SLF001  (the same)


TOOLS = {"NaNGuard": ask_guard, "detect_anomaly": ask_anomaly_mode, "DebugUnderflowOverflow": ask_detector}
COSTS = {"detect_anomaly": lambda _: torch.autograd.set_detect_anomaly(True), "DebugUnderflowOverflow": hooked}


def ask(tool: str, fault: Fault, seed: int) -> tuple[str, str]:
    """What a tool names, and whether that is right, wrong or nothing."""
    seed_everything(seed, verbose=False)
    model, batches = fault.build(), fault.batches()
    places = fault.right()
    if fault.limit:
        places |= {first_beyond(copy.deepcopy(model.net), batches[0][0], fault.limit)}
    named = TOOLS[tool](model, batches)
    if not named:
        return "", "silent"
    return named, "right" if places & {*named.split(", ")} else "wrong"


def print_answers(tools: Sequence[str], seeds: int) -> None:
    """The table of faults, and the row of counts."""
    counts: dict[str, Counter[str]] = {tool: Counter() for tool in TOOLS}
    print(f"| fault | planted in | {' | '.join(TOOLS)} |\n|---|---|{'---|' * len(TOOLS)}")
    for name, fault in FAULTS.items():
        cells = []
        for tool in TOOLS:
            found = [ask(tool, fault, seed) for seed in range(seeds)] if tool in tools else []
            verdicts = Counter(verdict for _, verdict in found)
            counts[tool].update({} if name == CONTROL else verdicts)
            tally = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
            named = f": {found[0][0]}" if found and found[0][0] else ""
            cells.append(f"{tally}{named}" if found else "not installed")
        print(f"| {name} | {fault.planted} | {' | '.join(cells)} |", flush=True)
    sums = [
        ", ".join(f"{counts[tool][verdict]} {verdict}" for verdict in ("right", "wrong", "silent"))
        if tool in tools
        else ""
        for tool in TOOLS
    ]
    print(f"| **all but the control** | | {' | '.join(sums)} |", flush=True)


def print_costs(tools: Sequence[str], rounds: int) -> None:
    """The row of costs."""
    others = {tool: variant for tool, variant in COSTS.items() if tool in tools}
    with redirect_stdout(io.StringIO()):
        pairs = paired(ON_CPU["ResNet-18"], {"NaNGuard": NaNGuard()}, others, rounds)
    ratios = {tool: [b / a for a, b in found] for tool, found in pairs.items()}
    cells = [
        f"{median(ratios[tool]):.2f} ({min(ratios[tool]):.2f} to {max(ratios[tool]):.2f})" if tool in ratios else ""
        for tool in TOOLS
    ]
    print(f"| x plain step, ResNet-18 | | {' | '.join(cells)} |")


def main() -> None:
    """Ask all tools about all faults, and measure what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of each fault (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=31, help="pairs of steps for the costs (default: %(default)s)")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    tools = [tool for tool in TOOLS if tool != "DebugUnderflowOverflow" or DebugUnderflowOverflow is not None]
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {options.seeds} seeds\n")
    print_answers(tools, options.seeds)
    print_costs(tools, options.rounds)


if __name__ == "__main__":
    main()
