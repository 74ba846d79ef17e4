# SPDX-License-Identifier: Apache-2.0
"""Run a model, backward included, and leave no trace of it."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_bn.taps import deaf

CONTAINERS = frozenset({list, deque, set, dict, OrderedDict, defaultdict, Counter})
"""Containers whose contents are put back; a subclass of them may have a life of its own and is left alone."""

LEFT = frozenset(vars(nn.Module())) - {"training", "_buffers", "_non_persistent_buffers_set"} | {"_trainer", "_fabric"}
"""Attributes of a module that are left as they are: parameters, submodules, hooks, and what the model belongs to."""


PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Values that nothing can change in place."""

SMALL, FEW = 4096, 1000
"""Of objects of other classes only what a meter or a counter holds is put back: tensors of at most so many values, and
containers of at most so many of these and of plain values. What is larger would cost a copy that nobody asked for."""

FOREIGN = frozenset(
    {"builtins", "lightning", "lightning_fabric", "lightning_bn", "numpy", "pytorch_lightning", "torch", "torchmetrics"}
)
"""Packages whose objects are left alone, where they are not named above."""


@contextmanager
def quarantine(model: nn.Module) -> Iterator[None]:
    """Let a model be run, with or without backward, so that everything is as before when the block is left.

    Inside, the model starts from its present state, with gradients switched on. Afterwards, on an exception too, the
    same objects hold the same values, bit for bit:

    - the random streams of torch (CPU, and all CUDA devices where CUDA is in use), numpy and ``random``, and of the
      generators that hang on a module;
    - buffers, ``training`` and plain attributes of every module, also of one that only a plain attribute leads to.
      Lists, deques, sets, dictionaries and tuples are followed into each other. Tensors are copies inside; what was one
      tensor under two names stays one, views of one memory do not stay views;
    - of objects of the user's own classes in them, such as meters: numbers, strings, small tensors, small containers of
      these. All else that such an object holds is left alone;
    - ``grad`` (None inside) and ``requires_grad`` of every parameter.

    Inside, ``log`` and ``log_dict`` of a LightningModule do nothing, and who listens to the model since before
    (:func:`~lightning_bn.taps.listen`) does not hear it. Parameters are not copied, for the sake of memory: the block
    must not step an optimizer or write to a parameter. A backward pass belongs inside too. Hooks, parameters and
    submodules that are added inside stay. In distributed training, no backward pass inside may fall between forward
    and backward of a real step, and all ranks have to enter if the model talks to other ranks.

    Args:
        model: the network. Costs a copy of all buffers and of all tensors in plain attributes, metric states included.

    Raises:
        ValueError: where lazy modules have not seen data yet, as what they would become is for good.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with quarantine(norm):
        ...     norm(torch.randn(8, 2)).sum().backward()
        ...     int(norm.num_batches_tracked)
        1
        >>> int(norm.num_batches_tracked), norm.weight.grad
        (0, None)
    """
    if lazy := lazy_tensors(model):
        raise ValueError(f"model must have no lazy modules that have not seen data yet, got {', '.join(lazy[:3])}")
    with ExitStack() as undo:
        # A copy that is made in inference mode could not take part in a backward pass.
        for state in (torch.inference_mode(False), torch.enable_grad(), deaf()):
            undo.enter_context(state)
        for rewind in _global_streams():
            undo.callback(rewind)
        _Shelf(undo).stand_in(model)
        yield


def lazy_tensors(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers whose shape is not known before the model has seen data."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if is_lazy(tensor)]


class _Shelf:
    """Puts aside what a run may change, each object once however many names it has.

    Args:
        undo: gets a call for each thing that has to be put back.
    """

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo
        self._known: dict[int, tuple[Any, Any]] = {}  # id: the object, lest its id is used again, and its stand-in

    def stand_in(self, value: Any) -> Any:
        """What takes the place of a value inside; of all but tensors, and tuples of them, it is the value itself."""
        if id(value) not in self._known:
            self._known[id(value)] = value, value  # where a container holds itself
            self._known[id(value)] = value, self._put_aside(value)
        return self._known[id(value)][1]

    def _put_aside(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            self._module(value)
        elif type(value) in CONTAINERS:
            self._container(value)
        elif type(value) is tuple:
            inside = tuple(map(self.stand_in, value))
            return inside if _ids(inside) != _ids(value) else value
        elif (rewind := _rewind_of(value)) is not None:
            self._undo.callback(rewind)
        elif _is_own(value):
            self._object(value)
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            return _twin(value)
        self._undo.callback(setattr, value, "grad", value.grad)
        self._undo.callback(value.requires_grad_, value.requires_grad)
        value.grad = None
        return value

    def _container(self, value: Any) -> None:
        kept: Any = dict(value) if isinstance(value, dict) else list(value)
        self._undo.callback(_refill, value, kept)
        if isinstance(value, dict):
            _refill(value, {key: self.stand_in(entry) for key, entry in kept.items()})
        elif not isinstance(value, set):  # a tensor in a set is there for its identity
            _refill(value, [self.stand_in(entry) for entry in kept])

    def _module(self, module: nn.Module) -> None:
        attributes = vars(module)
        kept = {name: value for name, value in attributes.items() if name not in LEFT}
        self._undo.callback(_reset, attributes, kept)
        attributes.update({name: self.stand_in(value) for name, value in kept.items()})
        for part in (*module.parameters(recurse=False), *module.children()):
            self.stand_in(part)
        if isinstance(module, torch.jit.ScriptModule):
            self._script(module)
        if hasattr(type(module), "log") and hasattr(type(module), "log_dict"):
            attributes.update(log=_nothing, log_dict=_nothing)

    def _object(self, value: Any) -> None:
        attributes = vars(value)
        kept = {name: entry for name, entry in attributes.items() if _is_small(entry)}
        self._undo.callback(_reset_object, attributes, kept, frozenset(attributes))
        attributes.update({name: self.stand_in(entry) for name, entry in kept.items()})

    def _script(self, module: nn.Module) -> None:
        """A ScriptModule keeps flag and buffers out of Python's sight, but takes another tensor for a buffer."""
        self._undo.callback(setattr, module, "training", module.training)
        for name, buffer in list(module.named_buffers(recurse=False)):
            self._undo.callback(setattr, module, name, buffer)
            setattr(module, name, self.stand_in(buffer))


def _twin(x: Tensor) -> Tensor:
    """A copy that is a leaf or not as the tensor is, and from which no gradient reaches the tensor's own graph."""
    if x.requires_grad and not x.is_leaf:
        return x.detach().requires_grad_().clone()
    return x.detach().clone().requires_grad_(x.requires_grad)


def _global_streams() -> list[Callable[[], Any]]:
    """What puts each global random stream back to where it stands now."""
    rewinds: list[Callable[[], Any]] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        rewinds.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if (numpy := sys.modules.get("numpy.random")) is not None:
        rewinds.append(partial(numpy.set_state, numpy.get_state(legacy=False)))
    return rewinds


def _rewind_of(value: Any) -> Callable[[], Any] | None:
    """What puts a random generator back to where it stands now; None for all other objects."""
    numpy = sys.modules.get("numpy.random")
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return partial(value.setstate, value.getstate())
    if numpy is not None and isinstance(value, numpy.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.RandomState):
        return partial(value.set_state, value.get_state(legacy=False))
    return None


def _is_own(value: Any) -> bool:
    """Whether a value is an instance of a class of the user's own, with attributes."""
    attributes = getattr(value, "__dict__", None)
    plain = type(attributes) is dict and not isinstance(value, type | ModuleType)
    return plain and type(value).__module__.partition(".")[0] not in FOREIGN


def _is_small(value: Any) -> bool:
    if type(value) in CONTAINERS:
        entries = value.values() if isinstance(value, dict) else value
        return len(value) <= FEW and all(map(_is_single, entries))
    return _is_single(value)


def _is_single(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and not is_lazy(value) and value.numel() <= SMALL
    return type(value) in PLAIN


def _reset_object(attributes: dict[str, Any], kept: Mapping[str, Any], known: frozenset[str]) -> None:
    """Put back what was kept; what came new and is as small as that goes, all else stays."""
    for name in [name for name, entry in attributes.items() if name not in known and _is_small(entry)]:
        del attributes[name]
    attributes.update(kept)


def _refill(container: Any, contents: Any) -> None:
    """Give a container these contents in place; one that has them already is not touched."""
    if _ids(container) != _ids(contents):
        container.clear()
        (container.extend if isinstance(container, list | deque) else container.update)(contents)


def _ids(contents: Any) -> list[int]:
    return [id(entry) for entry in ([*contents, *contents.values()] if isinstance(contents, dict) else contents)]


def _reset(attributes: dict[str, Any], kept: Mapping[str, Any]) -> None:
    for name in [name for name in attributes if name not in kept and name not in LEFT]:
        del attributes[name]
    attributes.update(kept)


def _nothing(*_: Any, **__: Any) -> None:
    """What ``log`` and ``log_dict`` do inside."""
