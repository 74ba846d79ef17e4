# SPDX-License-Identifier: Apache-2.0
"""Which weights look drawn: fresh ones of every kind, and trained ones after 1 to 30 epochs.

Run:     python benchmarks/freshness.py [--seeds 50] [--runs 3] [--processes 2]
Output:  markdown tables: false alarms among fresh tensors, with the largest statistic in units of its limit; the share
         of trained tensors that are told from fresh ones, and how many trained models have at least one.
Needs:   scikit-learn. Takes 3 to 4 minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from lightning_bn.demo import DigitsData, DigitsMLP, DigitsResNet
from lightning_bn.stats.freshness import LIMITS, departures, looks_drawn, why_not_new

Fill = Callable[[tuple[int, ...]], Tensor]
EPOCHS = (1, 3, 10, 30)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)


def filled(fill: Callable[..., object], shape: tuple[int, ...], dtype: torch.dtype, **options: float) -> Tensor:
    """A tensor that a function of ``torch.nn.init`` has filled."""
    weight = torch.empty(shape, dtype=dtype)
    fill(weight, **options)
    return weight


def init(fill: Callable[..., object], dtype: torch.dtype = torch.float32, **options: float) -> Fill:
    """The same, waiting for its shape."""
    return lambda shape: filled(fill, shape, dtype, **options)


def truncated(sigmas: float) -> Fill:
    """Normal with a standard deviation of 0.02, cut at so many of them."""
    return init(nn.init.trunc_normal_, std=0.02, a=-0.02 * sigmas, b=0.02 * sigmas)


def stacked(fill: Callable[[Tensor], object], blocks: int) -> Fill:
    """Blocks along axis 0, each filled by itself, as the gates of an LSTM."""

    def make(shape: tuple[int, ...]) -> Tensor:
        weight = torch.zeros(shape)
        for block in weight.chunk(blocks):
            fill(block)
        return weight

    return make


def per_channel_orthogonal(shape: tuple[int, ...]) -> Tensor:
    """Every row a unit vector of its own, as an orthogonal start of a depthwise convolution gives."""
    weight = torch.randn(shape)
    return weight / weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))


def swapped_orthogonal(shape: tuple[int, ...]) -> Tensor:
    """Orthogonal with inputs and outputs exchanged, as for a transposed convolution."""
    return filled(nn.init.orthogonal_, (shape[1], shape[0], *shape[2:]), torch.float32).transpose(0, 1)


def with_zero_row(shape: tuple[int, ...]) -> Tensor:
    """An embedding with a padding row."""
    weight = torch.randn(shape)
    weight[0] = 0
    return weight


def with_constant_block(shape: tuple[int, ...]) -> Tensor:
    """PyTorch's default with one quarter of ones, as a forget gate's bias."""
    weight = torch.rand(shape) * 0.2 - 0.1
    weight.chunk(4)[1].fill_(1.0)
    return weight


def repeated_rows(shape: tuple[int, ...]) -> Tensor:
    """Every row four times, as ICNR does for sub-pixel convolutions."""
    rows = filled(nn.init.kaiming_normal_, (math.ceil(shape[0] / 4), *shape[1:]), torch.float32)
    return rows.repeat_interleave(4, 0)[: shape[0]]


def sparse(shape: tuple[int, ...]) -> Tensor:
    """Nine of ten inputs of each unit are exactly 0."""
    return filled(nn.init.sparse_, (shape[0], math.prod(shape[1:])), torch.float32, sparsity=0.9).reshape(shape)


def pattern(shape: tuple[int, ...]) -> Tensor:
    """An identity in the middle of the kernel."""
    weight = torch.zeros(shape)
    middle = tuple(size // 2 for size in shape[2:])
    for place in range(min(shape[:2])):
        weight[(place, place, *middle)] = 1
    return weight


KINDS: dict[str, Fill] = {
    "uniform, PyTorch's default": init(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "uniform, He": init(nn.init.kaiming_uniform_),
    "uniform, Xavier": init(nn.init.xavier_uniform_),
    "uniform, 0 to 1": init(nn.init.uniform_),
    "uniform, drawn in bfloat16": init(nn.init.uniform_, torch.bfloat16, a=-0.1, b=0.1),
    "uniform, rounded to bfloat16": lambda shape: (torch.rand(shape) - 0.5).bfloat16(),
    "uniform, rounded to float16": lambda shape: (torch.rand(shape) - 0.5).half(),
    "uniform, one block of ones": with_constant_block,
    "normal, He": init(nn.init.kaiming_normal_),
    "normal, Xavier": init(nn.init.xavier_normal_),
    "normal, 0.01": init(nn.init.normal_, std=0.01),
    "normal, 1": init(nn.init.normal_),
    "normal, 1e-6 in float16": init(nn.init.normal_, torch.float16, std=1e-6),
    "normal, 4e-7 in float16": init(nn.init.normal_, torch.float16, std=4e-7),
    "normal, drawn in bfloat16": init(nn.init.normal_, torch.bfloat16, std=0.02),
    "normal, rounded to bfloat16": lambda shape: (0.02 * torch.randn(shape)).bfloat16(),
    "normal, float64": init(nn.init.normal_, torch.float64, std=0.02),
    "normal, padding row": with_zero_row,
    "normal, repeated rows": repeated_rows,
    "normal, sparse": sparse,
    "truncated normal, torch's default": init(nn.init.trunc_normal_),
    "truncated normal, 0.02 at ±2": init(nn.init.trunc_normal_, std=0.02),
    "truncated normal, 1 std": truncated(1),
    "truncated normal, 2 std": truncated(2),
    "truncated normal, 3 std": truncated(3),
    "truncated normal, drawn in bfloat16": init(nn.init.trunc_normal_, torch.bfloat16, std=0.02),
    "orthogonal": init(nn.init.orthogonal_),
    "orthogonal, gain √2": init(nn.init.orthogonal_, gain=math.sqrt(2)),
    "orthogonal, rounded to bfloat16": lambda shape: filled(nn.init.orthogonal_, shape, torch.float32).bfloat16(),
    "orthogonal, four blocks": stacked(nn.init.orthogonal_, 4),
    "orthogonal, transposed": swapped_orthogonal,
    "orthogonal, row by row": per_channel_orthogonal,
    "identity": pattern,
    "zeros": torch.zeros,
    "ones": torch.ones,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "Linear 10 x 64": (10, 64),
    "Linear 128 x 64": (128, 64),
    "Linear 1000 x 512": (1000, 512),
    "Conv 16 x 3 x 3²": (16, 3, 3, 3),
    "Conv 16 x 16 x 3²": (16, 16, 3, 3),
    "Conv 256 x 256 x 3²": (256, 256, 3, 3),
    "depthwise 256 x 3²": (256, 1, 3, 3),
    "Embedding 1000 x 64": (1000, 64),
    "LSTM 256 x 64": (256, 64),
    "MHA in_proj 192 x 64": (192, 64),
}
BUILT: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(512, 256),
    "Conv2d": lambda: nn.Conv2d(32, 128, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(64, 128, 4),
    "Conv1d, depthwise": lambda: nn.Conv1d(256, 256, 5, groups=256),
    "Embedding": lambda: nn.Embedding(1000, 64, padding_idx=0),
    "LSTM": lambda: nn.LSTM(40, 64, bidirectional=True),
    "GRU": lambda: nn.GRU(40, 100),
    "MultiheadAttention": lambda: nn.MultiheadAttention(64, 4),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(64, 4, 256),
    "Bilinear": lambda: nn.Bilinear(20, 30, 40),
}
INITS: dict[str, Callable[[Tensor], object]] = {
    "PyTorch": lambda _weight: None,
    "He normal": nn.init.kaiming_normal_,
    "Xavier uniform": nn.init.xavier_uniform_,
    "trunc normal 0.02": partial(nn.init.trunc_normal_, std=0.02),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam 1e-3": partial(torch.optim.Adam, lr=1e-3),
    "SGD 0.05": partial(torch.optim.SGD, lr=0.05),
}
NETWORKS: dict[str, Callable[[str], nn.Module]] = {
    "MLP": lambda norm: DigitsMLP(norm).net,  # type: ignore[arg-type]
    "ResNet": lambda norm: DigitsResNet(norm, depth=1).net,  # type: ignore[arg-type]
}


def fresh(kind: str, seeds: int) -> tuple[str, int, int, dict[str, float]]:
    """Tensors tried, false alarms, and the largest of each statistic in units of its limit."""
    torch.set_num_threads(1)
    tensors = alarms = 0
    largest = dict.fromkeys(LIMITS, 0.0)
    for weight in _fresh_tensors(kind, seeds):
        found = {name: value / LIMITS[name] for name, value in departures(weight).items()}
        tensors, alarms = tensors + 1, alarms + any(value > 1 for value in found.values())
        largest = {name: max(value, found.get(name, 0.0)) for name, value in largest.items()}
    return kind, tensors, alarms, largest


def _fresh_tensors(kind: str, seeds: int) -> Iterator[Tensor]:
    place = list(KINDS).index(kind) if kind in KINDS else len(KINDS)
    for seed in range(seeds):
        torch.manual_seed(place * seeds + seed)  # no two kinds are the same draws on another scale
        if kind in KINDS:
            yield from (KINDS[kind](shape) for shape in SHAPES.values())
        else:
            yield from (parameter for build in BUILT.values() for parameter in build().parameters())


def trained(network: str, norm: str, start: str, optimizer: str, seed: int) -> list[tuple[int, int, bool]]:
    """After each of the epochs: weight tensors told from fresh ones, weight tensors, whether a norm layer tells."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = DigitsData()
    data.setup("fit")
    images, labels = data.train_set.tensors  # type: ignore[union-attr]
    net = NETWORKS[network](norm)
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for weight in weights:
        INITS[start](weight)
    steps = OPTIMIZERS[optimizer](net.parameters())
    rows = []
    for epoch in range(1, max(EPOCHS) + 1):
        for batch in torch.randperm(len(images)).split(64):
            steps.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            steps.step()
        if epoch in EPOCHS:
            told = any(why_not_new(module) for module in net.modules() if isinstance(module, NORMS))
            rows.append((sum(not looks_drawn(weight) for weight in weights), len(weights), told))
    return rows


def print_fresh(rows: list[tuple[str, int, int, dict[str, float]]]) -> None:
    """The table of the controls."""
    print(f"| fresh | tensors | false alarms | {' | '.join(f'largest {name}' for name in LIMITS)} |")
    print(f"|---|---:|---:|{'---:|' * len(LIMITS)}")
    for kind, tensors, alarms, largest in rows:
        print(f"| {kind} | {tensors} | {alarms} | {' | '.join(f'{value:.2f}' for value in largest.values())} |")
    print(f"| all | {sum(row[1] for row in rows)} | {sum(row[2] for row in rows)} |{' |' * len(LIMITS)}\n")


def print_trained(cases: list[tuple[str, ...]], results: list[list[list[tuple[int, int, bool]]]]) -> None:
    """The table of the trained networks."""
    heads = " | ".join(f"{epoch} epoch{'s' if epoch > 1 else ''}" for epoch in EPOCHS)
    print(f"| network | norm | weights | optimizer | {heads} |\n|---|---|---|---|{'---:|' * len(EPOCHS)}")
    for case, runs in zip(cases, results, strict=True):
        print(f"| {' | '.join(case)} | {' | '.join(_cell(step) for step in zip(*runs, strict=True))} |")
    print("\ntensors told from fresh ones, models with at least one, models where a norm layer tells")


def _cell(runs: tuple[tuple[int, int, bool], ...]) -> str:
    share = sum(told for told, _, _ in runs) / sum(tensors for _, tensors, _ in runs)
    models, norms = sum(told > 0 for told, _, _ in runs), sum(norm for _, _, norm in runs)
    return f"{share:.0%}, {models}/{len(runs)}, {norms}/{len(runs)}"


def main() -> None:
    """Draw, train, judge, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="fresh tensors of each kind and shape (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="trainings of each network (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="at a time, one thread each (%(default)s)")
    options = parser.parse_args()
    cases = list(itertools.product(NETWORKS, ("batch", "group", "none"), INITS, OPTIMIZERS))
    with get_context("spawn").Pool(options.processes) as pool:
        kinds = [*KINDS, "PyTorch's layers as built"]
        print_fresh(pool.starmap(fresh, [(kind, options.seeds) for kind in kinds], chunksize=1))
        runs = pool.starmap(trained, [(*case, seed) for case in cases for seed in range(options.runs)], chunksize=1)
    print_trained(cases, [runs[place : place + options.runs] for place in range(0, len(runs), options.runs)])


if __name__ == "__main__":
    main()
