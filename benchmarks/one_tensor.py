# SPDX-License-Identifier: Apache-2.0
"""What the statistics of one large tensor cost, against reading it once.

Run:     OMP_NUM_THREADS=1 python benchmarks/one_tensor.py
Output:  milliseconds, median of 31 with a cold cache: a plain sum, which reads the tensor once, the sums that
         ActivationMonitor takes with and without counting zeros, and its careful two passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from lightning_bn.stats.moments import measure
from lightning_bn.stats.sketch import sketch
from lightning_bn.stats.slots import Slots


def cold(run: Callable[[], object], flush: torch.Tensor) -> float:
    """Median of the milliseconds that a call takes when nothing of its tensor is in the cache."""
    spent = []
    for _ in range(31):
        flush.add_(1)
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return 1e3 * median(spent)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    x = torch.randn(64, 64, 32, 32).relu()
    flush, slots = torch.zeros(64 * 1024 * 1024 // 4), Slots(x.device)

    def sums(*, zeros: bool) -> None:
        slots.clear()
        sketch(x, slots, zeros=zeros)

    read = cold(x.sum, flush)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {x.numel() * 4 / 1e6:.1f} MB\n")
    print("| | ms | cold reads |\n|---|---:|---:|")
    runs: dict[str, Callable[[], object]] = {
        "one read (sum)": x.sum,
        "sums, without zeros": lambda: sums(zeros=False),
        "sums, with zeros": lambda: sums(zeros=True),
        "two careful passes": lambda: measure(x),
    }
    for name, call in runs.items():
        spent = cold(call, flush)
        print(f"| {name} | {spent:.2f} | {spent / read:.1f} |")


if __name__ == "__main__":
    main()
