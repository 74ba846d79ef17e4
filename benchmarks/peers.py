# SPDX-License-Identifier: Apache-2.0
"""What ActivationMonitor costs beside its peers: each of them paired with plain training, in one process.

Run:     OMP_NUM_THREADS=1 python benchmarks/peers.py [--out docs/costs.md]
Needs:   the peers, named by the extra ``bench``; one that is missing gets a row that says so. Beside a CPU build of
         torch leave out torchvision, with which lightning fails: ``pip install --no-deps fastai``, then the rest.
Output:  a markdown table, also between two markers of the file that --out names. Times as by ``overhead.py --only``, in
         a fit with a TensorBoard logger; that a peer leaves no hook behind is checked each time. Memory and files: of a
         stretch of steps in a process of its own, where none lives on what another has freed; only on Linux.

What runs of each peer, on the network inside the LightningModule where nothing else is said:
    fastai: an ActivationStats, whose own before_fit (hooks on all leaves with parameters), before_batch, after_batch
        and after_fit are called at Lightning's places for them; only the Learner that they ask is a stand-in.
    transformers: a DebugUnderflowOverflow on the LightningModule; it keeps no handles: its hooks are sought and taken.
        Only the own hook of the LightningModule is never called, since training_step calls the network inside.
    wandb: Run.watch and Run.unwatch in an offline run; each due step is committed with an empty Run.log.
    Lightning: grad_norm given to log_dict in on_before_optimizer_step, as its documentation shows; anomaly mode.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from culprits import hooked
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import grad_norm
from networks import ON_CPU, Subject, fit
from overhead import Switch, Variant, present, row
from torch.nn.modules import module as modules

from lightning_bn import ActivationMonitor

MARKERS = ("<!-- peers: begin -->", "<!-- peers: end -->")
BETWEEN = re.compile(r"(?<=^{}\n).*?(?=^{}$)".format(*MARKERS), re.DOTALL | re.MULTILINE)
PLAIN = "none"
LOG_EVERY, WATCH_EVERY = 50, 1000  # defaults of Lightning's log_every_n_steps and of wandb.watch
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HEAD = (
    "| network | with | rounds | plain step | extra | x plain | middle half | range "
    "| peak, MiB | growth, KiB a step | files, bytes a step |\n|---|---|---:|---:|---:|---:|---|---|---:|---:|---:|"
)


@contextmanager
def activation_stats(trainer: Trainer) -> Iterator[None]:
    """The ActivationStats of fastai with its defaults: every step."""
    stats = import_module("fastai.callback.hook").ActivationStats()
    stats.learn = SimpleNamespace(model=trainer.lightning_module.net, training=True)
    stats("before_fit")
    before, after = (lambda *_, event=event: stats(event) for event in ("before_batch", "after_batch"))
    with present(LambdaCallback(on_train_batch_start=before, on_train_batch_end=after), trainer):
        yield
    stats("after_fit")


@contextmanager
def watched(trainer: Trainer, *, every: int) -> Iterator[None]:
    """Weights & Biases watches parameters and gradients."""
    wandb, net, steps = import_module("wandb"), trainer.lightning_module.net, count(1)
    run = wandb.init(mode="offline", dir=trainer.default_root_dir, settings={"console": "off", "silent": True})
    run.watch(net, log="all", log_freq=every, idx=0)  # idx: or each further watch of a process gets names of its own

    def commit(*_: object) -> None:
        if next(steps) % every == 0:
            run.log({}, commit=True)

    with present(LambdaCallback(on_train_batch_end=commit), trainer):
        yield
    run.unwatch(net)
    run.finish()


@contextmanager
def normed(trainer: Trainer) -> Iterator[None]:
    """Lightning's grad_norm; what it has logged would go on being logged without it, and is taken away."""
    norms = LambdaCallback(on_before_optimizer_step=lambda _, model, *__: model.log_dict(grad_norm(model, norm_type=2)))
    with present(norms, trainer):
        yield
    results: dict[str, object] = trainer._results or {}  # noqa: SLF001  (no public name)
    for name in [name for name in results if name.startswith("on_before_optimizer_step.grad_")]:
        del results[name]


@dataclass(frozen=True)
class Peer:
    """Something that watches training.

    Args:
        label: its name in the table.
        variant: lets it come, and go.
        needs: the module that has to be there.
        interval: steps from one due step to the next.
        monitor: makes a callback that a fit has to have from its start, in place of ``variant``.
    """

    label: str
    variant: Callable[[Trainer], Variant] | None = None
    needs: str = "torch"
    interval: int = 1
    monitor: Callable[[], Callback] | None = None

    def missing(self) -> str:
        """Why it cannot be measured; empty where it can."""
        try:
            import_module(self.needs)
        except ModuleNotFoundError as error:
            return f"not installed: no module named {error.name}"
        return ""

    def ready(self) -> tuple[list[Callback], Callable[[Trainer], Variant]]:
        """The callbacks that a fit has to have, and what lets the peer come and go in it."""
        callbacks = [self.monitor()] if self.monitor else []
        variant = partial(present, *callbacks) if callbacks else self.variant
        return callbacks, partial(self._clean, variant)

    @contextmanager
    def _clean(self, variant: Callable[[Trainer], Variant], trainer: Trainer) -> Iterator[None]:
        """Let it come and go, and see that it is gone."""
        before = hooks(trainer.lightning_module)
        with variant(trainer):
            yield
        if left := hooks(trainer.lightning_module) - before:
            raise RuntimeError(f"{self.label} has left {left} hooks behind: the steps after it are not plain")


def hooks(model: LightningModule) -> int:
    """How many hooks there are: on modules, on parameters, on everything; anomaly mode counts as one."""
    owners, kinds = [*model.modules(), *model.parameters()], [*HOOKS, "_post_accumulate_grad_hooks"]
    own = sum(len(getattr(owner, kind, None) or ()) for owner in owners for kind in kinds)
    return own + sum(len(getattr(modules, f"_global{kind}")) for kind in HOOKS) + torch.is_anomaly_enabled()


EACH: dict[str, Any] = {"every_n_steps": 1, "max_overhead": None}
PEERS = {
    PLAIN: Peer("nothing (noise)", lambda _: nullcontext()),
    "monitor": Peer("ActivationMonitor, every step", monitor=lambda: ActivationMonitor(**EACH)),
    "monitor-default": Peer("ActivationMonitor, defaults", monitor=ActivationMonitor, interval=LOG_EVERY),
    "fastai": Peer("fastai ActivationStats", activation_stats, "fastai.callback.hook"),
    "transformers": Peer("transformers DebugUnderflowOverflow", hooked, "transformers.debug_utils"),
    "wandb": Peer('wandb.watch(log="all", log_freq=1)', partial(watched, every=1), "wandb"),
    "wandb-default": Peer('wandb.watch(log="all")', partial(watched, every=WATCH_EVERY), "wandb", WATCH_EVERY),
    "grad-norm": Peer("Lightning grad_norm, every step", normed),
    "detect-anomaly": Peer("Lightning detect_anomaly", lambda _: torch.autograd.set_detect_anomaly(True)),
}


def log(trainer: Trainer, *_: object, **__: object) -> None:
    """Give a trainer the logger that most have."""
    trainer.loggers = [TensorBoardLogger(trainer.default_root_dir)]


def times(subject: Subject, names: Sequence[str], rounds: int) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Seconds of a step without and with each peer, round by round.

    Where not every step is due, two blocks in a row hold one that is; these get a sixth of the rounds. For the default
    of ``wandb.watch`` they are still too short: in them no step is due.
    """
    long = [name for name in names if 2 * subject.block < PEERS[name].interval]
    few = (long, max(subject.block, LOG_EVERY // 2), min(rounds, max(3, rounds // 6)))
    for some, block, turns in (([name for name in names if name not in long], subject.block, rounds), few):
        ready = {name: PEERS[name].ready() for name in some}
        switch = Switch({name: variant for name, (_, variant) in ready.items()}, block=block, rounds=turns)
        residents = [callback for callbacks, _ in ready.values() for callback in callbacks]
        fit(subject, [LambdaCallback(setup=log), *residents, switch])
        if any(getattr(callback, "off", False) for callback in residents):
            raise RuntimeError("a monitor has failed, so its times are those of plain steps")
        yield from switch.pairs.items()


def resident(field: str) -> int:
    """Resident set of this process in bytes, now (VmRSS) or its highest since it was reset (VmHWM)."""
    ctypes.CDLL(None).malloc_trim(0)  # or it is chance how much of what is free stays
    return 1024 * int(Path("/proc/self/status").read_text(encoding="ascii").split(f"{field}:")[1].split()[0])


def written(folder: str) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


class Stretch(Callback):
    """A fifth of a stretch of plain steps, then the stretch with a variant there.

    Args:
        variant: lets it come, and go.
        steps: length of the stretch.
    """

    def __init__(self, variant: Callable[[Trainer], Variant], steps: int) -> None:
        self.peak = self.growth = self.files = 0.0
        """Bytes: highest resident set beyond that of the plain steps; its growth in a step; files of a step."""
        self._variant, self._steps, self._there = variant, steps, ExitStack()

    def on_train_start(self, trainer: Any, *_: object) -> None:
        """Begin without the variant."""
        trainer.callbacks = [self]

    def on_train_batch_end(self, trainer: Any, *_: object) -> None:
        """Take the measures at their steps."""
        steps, plain = trainer.global_step, self._steps // 5
        if steps == plain // 2:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest resident set begins anew
        elif steps == plain:
            self.peak = -resident("VmHWM")
            trainer.logger.experiment.flush()
            self.files = -written(trainer.default_root_dir) / self._steps
            self._there.enter_context(self._variant(trainer))
        elif steps == 2 * plain:
            self.growth = -resident("VmRSS")
        elif steps == plain + self._steps:
            self.growth = (self.growth + resident("VmRSS")) / (self._steps - plain)
            self.peak += resident("VmHWM")
            self._there.close()
            trainer.logger.experiment.flush()
            self.files += written(trainer.default_root_dir) / self._steps
            trainer.should_stop = True


def stretch(network: str, name: str, steps: int) -> tuple[float, float, float]:
    """Bytes: the peak, the growth a step and the files a step of :class:`Stretch`; called in a process of its own."""
    logging.disable()
    warnings.simplefilter("ignore")
    callbacks, variant = PEERS[name].ready()
    import_module(PEERS[name].needs)  # so that it is no growth
    taken = Stretch(variant, steps)
    fit(ON_CPU[network], [LambdaCallback(setup=log), *callbacks, taken])
    return taken.peak, taken.growth, taken.files


def table(options: argparse.Namespace) -> Iterator[str]:
    """The setting and the table, line by line."""
    names = [name for name in PEERS if name in {PLAIN, *options.only}]
    missing = {name: PEERS[name].missing() for name in names}
    here = [name for name in names if not missing[name]]
    packages = {"lightning", *(PEERS[name].needs.split(".")[0] for name in here)}
    versions = ", ".join(f"{package} {version(package)}" for package in sorted(packages))
    lengths = ", ".join(f"{options.stretch * ON_CPU[network].block} ({network})" for network in options.networks)
    yield f"{versions}; CPU, {torch.get_num_threads()} threads. Stretches of {lengths} steps.\n"
    yield HEAD
    for network in options.networks:
        subject, plain = ON_CPU[network], math.nan
        steps = options.stretch * subject.block
        for name, pairs in times(subject, here, options.rounds):
            rest = " | | "
            if steps:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    peak, growth, files = pool.submit(stretch, network, name, steps).result()
                plain = files if name == PLAIN else plain
                extra = f"{files - plain:.0f}" if PEERS[name].interval <= steps else "none due"
                rest = f"{peak / 2**20:+.1f} | {growth / 2**10:+.2f} | {extra}"
            yield f"| {network}, batch {subject.batch} | {PEERS[name].label} | {len(pairs)} | {row(pairs)} | {rest} |"
    yield from (f"| all | {PEERS[name].label} | {why} |{' |' * 8}" for name, why in missing.items() if why)


def main() -> None:
    """Print the setting and the table, and write them where they are wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="some alone", metavar="NAME")
    parser.add_argument("--networks", nargs="+", choices=ON_CPU, default=list(ON_CPU), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=31, help="of pairs, at least 2 (default: %(default)s)")
    parser.add_argument("--stretch", type=int, default=100, help="its blocks, at least 20, or 0 (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file with the markers")
    options = parser.parse_args()
    if options.rounds < 2 or 0 < options.stretch < 20:  # noqa: PLR2004  (as the help says)
        parser.error("--rounds must be at least 2, --stretch 0 or at least 20")
    text = options.out.read_text(encoding="utf-8") if options.out else ""
    if options.out and len(BETWEEN.findall(text)) != 1:
        parser.error(f"--out: {options.out} must have the lines {' and '.join(MARKERS)}, in this order, once")
    logging.disable()
    warnings.simplefilter("ignore")
    lines = [""]
    for line in table(options):
        print(line, flush=True)
        lines.insert(-1, line)
    if options.out:
        options.out.write_text(BETWEEN.sub(lambda _: "\n".join(lines), text), encoding="utf-8")


if __name__ == "__main__":
    main()
