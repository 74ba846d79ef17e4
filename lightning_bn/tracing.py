# SPDX-License-Identifier: Apache-2.0
"""Trace a model's forward into a graph of the layers it calls: no layer runs, and the model stays as it was."""

from __future__ import annotations

import dis
import inspect
import io
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_bn.quarantine import quarantine

LAYER_MODULES = ("torch.nn.", "torch.ao.nn.", "torchmetrics.")
NO_LAYERS = ("torch.nn.modules.container", "torch.nn.modules.module", "torch.nn.modules.lazy")
FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.linspace, torch.rand, torch.randn)
LONGEST_REASON = 80
UNREGISTERED = "?"
"""In the place of a path, for a module that the model calls but does not list."""
TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]
"""Where a module keeps submodules, parameters, buffers and hooks; quarantine leaves most of them alone."""


@dataclass(frozen=True)
class Trace:
    """What a model's forward does.

    Args:
        graph: calls of layers (the target is the module's path below the root), functions and methods, in order; the
            forward of every other module is traced into it. None where the root's own forward could not be traced.
        entered: modules whose forward is in the graph.
        refused: modules whose forward could not be traced, with the reason; in the graph each is one call.
    """

    graph: fx.Graph | None
    entered: tuple[nn.Module, ...]
    refused: dict[nn.Module, str]


def trace(root: nn.Module) -> Trace:
    """Trace the forward of a module as it is in eval mode, where no chance decides which way it takes.

    Arguments without a default stand for tensors, the others keep their default. Layers of torch and BatchNorm layers
    are not run, nor are hooks. The Python code of every other module runs with stand-ins for tensors: random streams,
    attributes, buffers and parameters of the model are afterwards what they were, what it prints is dropped. What it
    does to objects outside the model (globals, files) is not undone.

    Args:
        root: a module with a forward, of any device, initialised or not.

    Returns:
        The trace. A module that cannot be traced is refused, never raised. A root whose class leaves forward
        unwritten has neither graph nor refusal.
    """
    if isinstance(root, torch.jit.ScriptModule):
        return Trace(None, (), {root: "it is a ScriptModule"})
    tracer = _Tracer()
    try:
        with _without_trace(root):
            graph = tracer.trace(root)
    except Exception as error:  # noqa: BLE001  (the model's own code may raise anything)
        unwritten = isinstance(error, NotImplementedError) and 'missing the required "forward"' in str(error)
        return Trace(None, (), {} if unwritten else {root: _reason(error)})
    return Trace(graph, (root, *tracer.entered), tracer.refused)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a unit of computation: BatchNorm, scripted, or of a torch class without BatchNorm below."""
    if isinstance(module, _BatchNorm | torch.jit.ScriptModule):
        return True
    origins = (base.__module__ for base in type(module).__mro__)
    known = any(origin.startswith(LAYER_MODULES) and origin not in NO_LAYERS for origin in origins)
    return known and not any(isinstance(below, _BatchNorm) for below in module.modules())


def wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper of ``torch.compile``, data parallelism or activation checkpointing calls; None for all others."""
    parts = module._modules  # noqa: SLF001  (an attribute could be computed)
    if "_orig_mod" in parts:
        return parts["_orig_mod"]
    parallel = type(module).__module__.startswith(("torch.nn.parallel.", "torch.distributed."))
    return next(iter(parts.values())) if parallel and len(parts) == 1 else None


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=FACTORIES, param_shapes_constant=True)
        self._autowrap_search.append(torch)
        self._qualname_counter = defaultdict(int)  # torch counts on the class, for all tracers of a process
        self.entered: list[nn.Module] = []
        self.refused: dict[nn.Module, str] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:  # noqa: ARG002, FBT001  (torch's signature)
        forward = self.root.forward
        listed: list[fx.Proxy] = []
        named: dict[str, fx.Proxy] = {}
        for parameter in _needed(forward):
            proxy = self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = proxy
            else:
                listed.append(proxy)

        def run() -> Any:
            return forward(*listed, **named)

        return run, []

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002  (torch's signature; its forward runs hooks)
        while (inner := wrapped(m)) is not None:
            m = inner
        path = (self.submodule_paths or {}).get(m)
        if path is not None and not is_layer(m):
            nodes, entered = len(self.graph.nodes), len(self.entered)
            try:
                output = m.forward(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  (the model's own code may raise anything)
                self._forget(nodes, entered)
                self.refused[m] = _reason(error)
            else:
                self.entered.append(m)
                return output
        return self.create_proxy("call_module", UNREGISTERED if path is None else path, args, kwargs)

    def _forget(self, nodes: int, entered: int) -> None:
        for node in reversed(list(self.graph.nodes)[nodes:]):
            self.graph.erase_node(node)
        del self.entered[entered:]

    def create_arg(self, a: Any) -> Any:
        try:
            return super().create_arg(a)
        except (NotImplementedError, NameError):  # an object that torch does not know, or a foreign parameter
            return None

    def to_bool(self, obj: fx.Proxy) -> bool:  # noqa: ARG002  (torch's signature)
        passing = _passing_outcome(sys._getframe(2))  # noqa: SLF001  (the caller of Proxy.__bool__)
        if passing is None:
            raise TraceError("its way depends on the value or the shape of a tensor")
        return passing

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:  # noqa: ARG002  (torch's signature)
        raise TraceError("it loops over a tensor or a container whose length is not known")


def _needed(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The arguments without a default; where there are none, the first one."""
    parameters = list(inspect.signature(forward).parameters.values())
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each for each in parameters if each.default is each.empty and each.kind not in many]
    return needed or [each for each in parameters[:1] if each.kind is not each.VAR_KEYWORD]


@contextmanager
def _without_trace(root: nn.Module) -> Iterator[None]:
    modules = [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
    tables = [vars(module)[name] for module in modules for name in TABLES if name in vars(module)]
    kept = [(table, dict(table)) for table in tables]
    try:
        with torch.inference_mode(False):
            _hide_parameters(modules)
        with quarantine(root), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            for module in modules:
                vars(module)["training"] = False
            yield
    finally:
        for table, contents in kept:
            table.clear()
            table.update(contents)


def _hide_parameters(modules: list[nn.Module]) -> None:
    """Put shapes in the place of parameters, which the forward could write to, and of what has no shape yet."""
    twins: dict[int, torch.Tensor] = {}
    for module in modules:
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]  # noqa: SLF001  (no public way to swap)
        for table in tables:
            for name, tensor in table.items():
                if isinstance(tensor, nn.Parameter) or is_lazy(tensor):
                    table[name] = twins.setdefault(id(tensor), _shape_only(tensor))


def _shape_only(tensor: Any) -> torch.Tensor:
    empty = torch.empty(0 if is_lazy(tensor) else tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _passing_outcome(frame: FrameType) -> bool | None:
    """The outcome of the condition at which a frame stands after which nothing is raised; None if both go on.

    Assertions and checks of the input are thus taken as passed.
    """
    steps = list(dis.get_instructions(frame.f_code))
    ahead = [place for place, step in enumerate(steps) if step.offset >= frame.f_lasti][:3]
    jump = next((place for place in ahead if steps[place].opname.startswith("POP_JUMP")), None)
    if jump is None:
        return None
    target = next(place for place, step in enumerate(steps) if step.offset == steps[jump].argval)
    jumps_if = steps[jump].opname.endswith("_TRUE")
    if _raises(steps[jump + 1 :]):
        return jumps_if
    return not jumps_if if _raises(steps[target:]) else None


def _raises(steps: list[dis.Instruction]) -> bool:
    """Whether code does nothing but raise."""
    names = (step.opname for step in steps)
    leaving = (name for name in names if name.startswith(("RAISE", "RERAISE", "RETURN", "STORE")) or "JUMP" in name)
    return next(leaving, "").startswith("RAISE")


def _reason(error: Exception) -> str:
    """One clause for what went wrong."""
    said = " ".join(str(error).split("\n", 1)[0].split())
    if isinstance(error, TraceError) and said.startswith("it"):
        return said
    short = said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON].rstrip()}…"
    return f"its forward cannot be traced ({type(error).__name__}{': ' if short else ''}{short})"
