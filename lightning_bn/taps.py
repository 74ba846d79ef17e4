# SPDX-License-Identifier: Apache-2.0
"""Choose modules by name, and listen to what passes through them while a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

FAST_IN_EVAL = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
COMPILED = "it is compiled (torch.compile)"
"""Why hooks do not reach a module, and all below it, unless it is run eagerly."""

_deaf_blocks: ContextVar[int] = ContextVar("_deaf_blocks", default=0)
"""How many blocks of :func:`deaf` this thread is in."""

Hear = Callable[[str, nn.Module, Any, Any], None]
"""Called after a module's forward pass with its name, the module, ``(args, kwargs)`` and its output."""

Expect = Callable[[str, nn.Module, Any], None]
"""Called before a module's forward pass with its name, the module and ``(args, kwargs)``."""


@dataclass(frozen=True)
class Choice:
    """Which modules will be listened to, and what was asked for in vain.

    Args:
        layers: module by name, in the order of ``named_modules``.
        unmatched: globs that match no module, each with the nearest names there are.
        unseen: modules that no hook can reach, by name, with the reason; of a compiled or scripted module and
            all below it, only the module itself.
    """

    layers: dict[str, nn.Module]
    unmatched: dict[str, list[str]]
    unseen: dict[str, str]


def choose(
    model: nn.Module, globs: Sequence[str] | None = None, *, leaves_only: bool = True, eager: bool = False
) -> Choice:
    """Choose modules of a model.

    Args:
        model: the network; its own name is the empty string.
        globs: shell patterns on module names (``*`` also crosses dots); a module that matches any of them is
            chosen, leaf or not. The words ``leaf``, ``norm``, ``activation`` and ``all`` stand for modules without
            submodules, normalisation layers, torch's activation modules and every module; a word that is no module's
            name but the name of a class of some stands for these. ``None`` chooses every module that ``leaves_only``
            admits.
        leaves_only: without globs, choose only modules without submodules.
        eager: whether compiled modules will be run eagerly, where hooks reach them like any others.

    Returns:
        The choice. Metrics of torchmetrics are never chosen: they are no layers. Compiled and scripted modules are
        listed as unseen, and torch's transformer encoders in eval mode, which compute differently under hooks.

    Example:
        >>> list(choose(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), ["*0"]).layers)
        ['0']
    """
    layers, unseen = reachable(model, eager=eager)
    if globs is None:
        leaves = {name: module for name, module in layers.items() if not (leaves_only and _has_children(module))}
        return Choice(leaves, {}, _tops(unseen))
    everyone = {plain_name(name): module for name, module in model.named_modules()}
    every = {name: everyone[name] for name in [*layers, *unseen]}
    matched = {glob: _matching(every, glob) for glob in globs}
    unmatched = {
        glob: get_close_matches(glob.replace("*", ""), list(every), n=3, cutoff=0.0)
        for glob, names in matched.items()
        if not names
    }
    chosen = set().union(*matched.values())
    wanted = {name: module for name, module in layers.items() if name in chosen}
    hidden = {name: why for name, why in unseen.items() if name in chosen}
    return Choice(wanted, unmatched, _tops(hidden))


def reachable(model: nn.Module, *, eager: bool = False) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules that hooks can reach now, by name, and those that they cannot, with the reason.

    Args:
        model: the network.
        eager: whether compiled modules will be run eagerly.
    """
    layers: dict[str, nn.Module] = {}
    unseen: dict[str, str] = {}
    hidden: dict[str, str] = {}  # compiled and scripted modules
    metrics: list[str] = []
    for path, module in model.named_modules():
        if _is_metric(module) or any(is_below(path, metric) for metric in metrics):
            metrics.append(path)
            continue
        reason = next((why for top, why in hidden.items() if is_below(path, top)), None) or _unreachable(module)
        reason = None if eager and reason == COMPILED else reason
        if reason is None:
            layers[plain_name(path)] = module
        else:
            hidden[path] = unseen[plain_name(path)] = reason
    return layers, unseen


@contextmanager
def listen(layers: Mapping[str, nn.Module], hear: Hear, expect: Expect | None = None) -> Iterator[None]:
    """Call ``hear`` after every forward pass of the given modules, until the block is left.

    A pass that activation checkpointing repeats inside backward is not heard again. What ``hear`` returns is
    dropped: a forward hook that returns something would replace the module's output. Copies and pickles that are
    made of a module meanwhile do not listen.

    Args:
        layers: module by name.
        hear: called with name, module, ``(args, kwargs)`` and output, with gradients switched off.
        expect: called before the pass with name, module and ``(args, kwargs)``, which the pass may change in place.
    """
    with ExitStack() as handles:
        for name, module in layers.items():
            if expect is not None:
                before = module.register_forward_pre_hook(_Hook(name, expect), with_kwargs=True)
                handles.callback(before.remove)
            after = module.register_forward_hook(_Hook(name, hear), with_kwargs=True)
            handles.callback(after.remove)
        yield


@contextmanager
def deaf() -> Iterator[None]:
    """Keep what runs in this block, on this thread, from all who listen since before; who begins inside hears."""
    token = _deaf_blocks.set(_deaf_blocks.get() + 1)
    try:
        yield
    finally:
        _deaf_blocks.reset(token)


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested container with its path: tuples, lists, mappings and dataclasses.

    Example:
        >>> [path for path, _ in tensors_in({"image": torch.ones(1), "boxes": [torch.ones(2)]}, "batch")]
        ["batch['image']", "batch['boxes'][0]"]
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from tensors_in(entry, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from tensors_in(entry, f"{path}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name, None), f"{path}.{entry.name}")


def plain_name(name: str) -> str:
    """A module path without what ``torch.compile`` inserts."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_below(name: str, top: str) -> bool:
    """Whether a module path lies inside another one; everything lies inside the model itself, the empty path.

    Example:
        >>> is_below("net.10", "net.1"), is_below("net.1.conv", "net.1"), is_below("net", "")
        (False, True, True)
    """
    return name != top and (not top or name.startswith(f"{top}."))


class _Hook:
    """A forward hook, or forward pre-hook, whose copies and pickles do nothing."""

    def __init__(self, name: str, tell: Callable[..., None]) -> None:
        self._name = name
        self._tell = tell
        self._depth = _deaf_blocks.get()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if _deaf_blocks.get() > self._depth:
            return
        # Not in backward (where checkpointing runs modules again), nor while somebody traces the model.
        if torch._C._current_graph_task_id() == -1 and not torch._C._is_tracing():  # noqa: SLF001  (no public names)
            with torch.no_grad(), _unrecorded():
                self._tell(self._name, module, (args, kwargs), *output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _deaf

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_deaf, ()


def _make_deaf() -> Callable[..., None]:
    return _deaf


def _unrecorded() -> AbstractContextManager[Any]:
    """Keep our operations out of selective activation checkpointing, which would replay them as the model's own."""
    if not torch._C._len_torch_dispatch_stack():  # noqa: SLF001  (no public name)
        return _NOTHING
    modes = _get_current_dispatch_mode_stack()
    caching = any(type(mode).__name__ == "_CachingTorchDispatchMode" for mode in modes)
    return _disable_current_modes() if caching else nullcontext()


_NOTHING = nullcontext()


def _deaf(*_: Any) -> None:
    """What a hook becomes in a copy of the model."""


def _matching(modules: Mapping[str, nn.Module], glob: str) -> set[str]:
    """The names that a pattern or a word chooses."""
    if glob in GROUPS:
        return {name for name, module in modules.items() if GROUPS[glob](module)}
    named = {name for name in modules if fnmatchcase(name, glob)}
    return named or {name for name, module in modules.items() if glob in {base.__name__ for base in _kinds(module)}}


def _kinds(module: nn.Module) -> list[type]:
    return [base for base in type(module).__mro__ if base not in (nn.Module, object)]


def _is_from(module: nn.Module, *files: str) -> bool:
    """Whether a module is of a class, or of a subclass of one, that torch keeps in one of these files."""
    return any(base.__module__.removeprefix("torch.nn.modules.") in files for base in _kinds(module))


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _tops(unseen: Mapping[str, str]) -> dict[str, str]:
    return {name: why for name, why in unseen.items() if not any(is_below(name, other) for other in unseen)}


def _unreachable(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule"
    # OptimizedModule is recognised by its one child: naming its class would import torch._dynamo.
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:  # noqa: SLF001
        return COMPILED
    if isinstance(module, FAST_IN_EVAL) and not module.training:
        return "torch takes another way through it in eval mode while nothing listens"
    return None


def _is_metric(module: nn.Module) -> bool:
    return any(base.__module__.startswith("torchmetrics.") for base in type(module).__mro__)


GROUPS: dict[str, Callable[[nn.Module], bool]] = {
    "leaf": lambda module: not _has_children(module),
    "norm": lambda module: _is_from(module, "batchnorm", "instancenorm", "normalization"),
    "activation": lambda module: _is_from(module, "activation") and not isinstance(module, nn.MultiheadAttention),
    "all": lambda module: True,  # noqa: ARG005  (as the others)
}
"""Words that stand for kinds of modules."""
