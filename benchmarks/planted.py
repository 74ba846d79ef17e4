# SPDX-License-Identifier: Apache-2.0
"""What all monitors together say of planted faults, and of healthy controls.

Run:     OMP_NUM_THREADS=1 python benchmarks/planted.py [--seeds 10] [--only NAME ...] [--out docs/planted.md]
Data:    scikit-learn's digits, 1100 to train on unless said otherwise, 600 to validate; MLPs of width 128 with ReLU,
         He's weights, Adam 1e-3, batches of 64, 15 epochs unless said otherwise.
Output:  a markdown table: for each run the rule that has to speak, in how many seeds it did, and all warnings and
         errors that were said, with the number of seeds. Controls have to have none.
"""

from __future__ import annotations

import argparse
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from overfitting_cases import Block, Classifier, Sets, adam, affine, cnn, digits, mlp, others, sgd
from pages import write_between
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_bn import Finding, Severity, diagnose


def chain(
    norm: Callable[[int], nn.Module] | None, depth: int, *, act: type[nn.Module] = nn.ReLU, std: float = 0.0
) -> nn.Module:
    """Linear, norm and activation; He's weights, or normal ones."""
    layers: list[nn.Module] = []
    for place in range(depth):
        linear = nn.Linear(128 if place else 64, 128)
        nn.init.normal_(linear.weight, std=std or (2 / linear.in_features) ** 0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, *([norm(128)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def dead() -> nn.Module:
    """The second layer's β is -10, and frozen."""
    net = mlp(depth=3)
    nn.init.constant_(net[4].bias, -10.0)
    net[4].bias.requires_grad_(False)
    return net


def switched_off() -> nn.Module:
    """γ = β = 0 everywhere."""
    net = mlp()
    for x in affine(net):
        nn.init.zeros_(x)
    return net


def residual() -> nn.Module:
    """Three residual blocks, γ = 0 on what closes them."""
    blocks = [Block(16) for _ in range(3)]
    for block in blocks:
        nn.init.zeros_(block.norm2.weight)
    stem = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def overflowing() -> nn.Module:
    """The first weight is so large that the variance behind it is beyond float32."""
    net = mlp()
    with torch.no_grad():
        net[0].weight.mul_(1e20)
    return net


def images() -> nn.Module:
    """The CNN, on flat inputs."""
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), cnn())


def decayed(model: nn.Module) -> Optimizer:
    """AdamW with decay 100 on γ and β alone."""
    return AdamW(
        [{"params": others(model), "weight_decay": 0.0}, {"params": affine(model), "weight_decay": 100.0}], lr=1e-3
    )


class Resting(Classifier):
    """Puts BatchNorm into eval mode at each epoch's start."""

    def on_train_epoch_start(self) -> None:
        """As fine-tuning scripts do."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()


@dataclass(frozen=True)
class Planted:
    """One kind of run.

    Args:
        said: rules of which one has to speak; none for a control.
        net: builds the network.
        optimizer: builds the optimizer.
        batch: batch size.
        epochs: number of epochs.
        size: training images.
        noise: share of labels drawn anew.
        model: what trains it.
    """

    said: tuple[str, ...]
    net: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer] = field(default_factory=lambda: adam(1e-3))
    batch: int = 64
    epochs: int = 15
    size: int = 1100
    noise: float = 0.0
    model: type[Classifier] = Classifier


NORM = nn.BatchNorm1d
RUNS: dict[str, Planted] = {
    "vanishing signal: depth 20, N(0, 0.01²), SGD": Planted(
        ("vanishing-signal",), lambda: chain(None, 20, std=0.01), sgd(0.01), epochs=3
    ),
    "exploding gradient: BatchNorm, depth 50": Planted(("exploding-gradient",), lambda: chain(NORM, 50), epochs=2),
    "dead units: β = -10": Planted(("dead-units",), dead),
    "saturated tanh: five layers, N(0, 1)": Planted(
        ("saturated-units",), lambda: chain(None, 5, act=nn.Tanh, std=1.0), epochs=5
    ),
    "frozen weights: BatchNorm, N(0, 1000²)": Planted(("tiny-updates",), lambda: chain(NORM, 5, std=1000.0), epochs=3),
    "γ = β = 0": Planted(("zero-gamma", "collapsed-gamma"), switched_off, epochs=3),
    "running variance beyond float32": Planted(("overflowed-running-statistics",), overflowing, epochs=1),
    "BatchNorm in eval mode": Planted(("batchnorm-in-eval-mode",), mlp, model=Resting),
    "momentum 0.001": Planted(("wrong-running-statistics",), lambda: mlp(momentum=0.001)),
    "momentum 0.9, batch 8": Planted(("wrong-running-statistics",), lambda: mlp(momentum=0.9), batch=8, epochs=10),
    "noise: batch 2": Planted(("noisy-batch-statistics",), mlp, batch=2, epochs=5, size=400),
    "decay 100 on γ, β": Planted(("collapsed-gamma",), mlp, decayed),
    "dropout 0.5 in front": Planted(
        ("dropout-before-batchnorm",), lambda: mlp(dropout=0.5), batch=8, epochs=20, size=100, noise=0.3
    ),
    "control: BatchNorm": Planted((), mlp),
    "control: BatchNorm, dropout 0.3": Planted((), lambda: mlp(dropout=0.3)),
    "control: BatchNorm, 60 epochs": Planted((), mlp, epochs=60),
    "control: CNN": Planted((), images, epochs=10),
    "control: CNN, batch 2": Planted((), images, batch=2, epochs=4, size=400),
    "control: no norm, He, depth 20": Planted((), lambda: chain(None, 20)),
    "control: residual, γ = 0": Planted((), residual, epochs=8),
}


def findings(run: Planted, seed: int) -> list[Finding]:
    """Train one run with all monitors."""
    seed_everything(seed, verbose=False)
    sets: Sets = digits(seed, run.size, run.noise)
    monitors = diagnose()
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=run.epochs,
            callbacks=[*monitors],
            default_root_dir=folder,
            logger=False,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = DataLoader(sets[0], run.batch, shuffle=True, drop_last=True), DataLoader(sets[1], 64)
        try:
            trainer.fit(run.model(run.net(), run.optimizer), *loaders)
        except RuntimeError as error:  # NaNGuard's own is one
            if "lightning_bn" not in str(error):
                raise
    return [finding for monitor in monitors for finding in monitor.findings]


def line(name: str, seeds: int) -> str:
    """What was said of one kind of run."""
    run, said, hits, notes = RUNS[name], Counter[str](), 0, 0
    for seed in range(seeds):
        found = findings(run, seed)
        loud = {finding.rule for finding in found if finding.severity is not Severity.INFO}
        hits += bool(loud & set(run.said))
        notes += bool({finding.rule for finding in found} & set(run.said))
        said.update(loud)
    wanted = f"{' or '.join(run.said)} | {hits} of {seeds}" if run.said else "nothing | "
    told = ", ".join(f"{rule} ({count})" for rule, count in said.most_common()) or "nothing"
    quiet = f", {notes - hits} as a note" if notes > hits else ""
    return f"| {name} | {wanted}{quiet} | {told} |"


def table(names: Sequence[str], seeds: int) -> Iterator[str]:
    """All lines."""
    yield from (f"torch {torch.__version__}, CPU, seeds 0 to {seeds - 1}.", "")
    yield from ("| run | has to be said | warned | all warnings and errors, with their seeds |", "|---|---|---|---|")
    yield from (line(name, seeds) for name in names)


def main() -> None:
    """Print the table, and write it where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="kinds of runs")
    parser.add_argument("--out", type=Path, help="page with the markers of planted")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    lines = []
    for text in table(options.only, options.seeds):
        print(text, flush=True)
        lines.append(text)
    if options.out:
        write_between(options.out, "planted", lines)


if __name__ == "__main__":
    main()
