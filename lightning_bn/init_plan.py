# SPDX-License-Identifier: Apache-2.0
"""What an initialisation will do to each parameter of a model, before it does anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_bn.gains import NONLINEARITIES, Follower, followers, gain
from lightning_bn.layers import Role, Slot, slots
from lightning_bn.norms import find_batchnorm, residual_closing
from lightning_bn.schemes import Fill, Scheme, check_scheme, fill_for, uses_gain
from lightning_bn.scope import Scope
from lightning_bn.taps import is_below, plain_name

ZEROS = Fill("zeros", "constant")
ONES = Fill("ones", "constant", value=1.0)
LAZY = "a lazy module that has not seen its first batch"
FORGET = 1
"""Place of the forget gate among the four blocks of an LSTM's bias."""


@dataclass(frozen=True)
class Planned:
    """One parameter, and what will become of it.

    Args:
        name: its path; of a parameter that several layers share, the first one.
        layer: path of the layer that decides how it is filled.
        tensor: the parameter, or what a parametrization computes in its place.
        slot: what it does in its layer; None in a module of a kind that is not known.
        fill: how it will be filled; None if it keeps its values.
        why: why it keeps its values, or what is particular about the fill.
        chosen: whether it keeps its values because the user asked for it.
        follower: the nonlinearity behind the layer; None where it is unknown or does not matter.
    """

    name: str
    layer: str
    tensor: Tensor
    slot: Slot | None = None
    fill: Fill | None = None
    why: str = ""
    chosen: bool = False
    follower: Follower | None = None


@dataclass(frozen=True)
class Plan:
    """What will become of a model.

    Args:
        entries: one for each parameter, in the order of the modules.
        remarks: what else is worth saying: zero γ that stay, blocks that could not be looked into.
    """

    entries: tuple[Planned, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; every field is checked when the object is made.

    Args:
        scheme: a scheme's name, or a standard deviation.
        nonlinearity: a nonlinearity for all layers, or by shell pattern on module paths; None takes what follows.
        include: patterns and module types to initialise; None is everything.
        exclude: patterns and module types to leave alone.
        zero_init_residual: γ = 0 on the BatchNorm that closes a residual branch; None keeps a zero that is there.
        forget_bias: bias of the forget gate of LSTM layers; None is 0.

    Raises:
        ValueError: where a field is out of its range.
    """

    scheme: Scheme | float = "he"
    nonlinearity: str | Mapping[str, str] | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    zero_init_residual: bool | None = None
    forget_bias: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        object.__setattr__(self, "scheme", check_scheme(self.scheme))
        given = self.nonlinearity
        for name in given.values() if isinstance(given, Mapping) else [given]:
            if name is not None and name not in NONLINEARITIES:
                raise ValueError(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {name!r}")
        if self.zero_init_residual is not None and not isinstance(self.zero_init_residual, bool):
            raise ValueError(f"zero_init_residual must be true, false or None, got {self.zero_init_residual!r}")
        number = isinstance(self.forget_bias, int | float) and not isinstance(self.forget_bias, bool)
        if self.forget_bias is not None and not (number and math.isfinite(self.forget_bias)):
            raise ValueError(f"forget_bias must be a finite number, or None, got {self.forget_bias!r}")

    @property
    def scope(self) -> Scope:
        """The parameters that are meant."""
        return Scope(self.include, self.exclude)

    def follower(self, layer: str, found: Follower | None) -> Follower | None:
        """The nonlinearity of a layer: what was asked for, else what was found behind it."""
        given = self.nonlinearity
        if isinstance(given, Mapping):
            given = next((name for glob, name in given.items() if fnmatchcase(layer, glob)), None)
        return found if given is None else Follower(given, gain(given))


def plan(model: nn.Module, wishes: Wishes) -> Plan:
    """Decide for each parameter of a model how it will be filled, or why not; nothing is changed.

    A parameter that several layers share is one entry, under its first name; where an embedding shares it with a
    layer that multiplies, that layer decides. It is excluded if one of its names is, and included if one is.

    Args:
        model: the network.
        wishes: what the user asked for.
    """
    outside = wishes.scope.outside(model)
    found = followers(model) if uses_gain(wishes.scheme) else {}
    zeros, remarks = _zero_gammas(model, wishes)
    shared: dict[int, list[Planned]] = {}
    for use in _uses(model):
        shared.setdefault(id(use.tensor), []).append(use)
    entries = []
    for uses in shared.values():
        main = _main(uses)
        kept = _kept(main, [outside.get(use.name, "") for use in uses], wishes)
        entries.append(kept or _filled(main, wishes, found.get(main.layer), zeros.get(main.layer)))
    if wishes.forget_bias is not None and not any(entry.fill and entry.fill.raised is not None for entry in entries):
        remarks.append("forget_bias had no effect: no LSTM layer with biases is initialised")
    return Plan(tuple(entries), tuple(remarks))


def without(planned: Plan, names: AbstractSet[str], why: str) -> Plan:
    """The same plan, in which the named parameters keep their values, as somebody else has seen to them."""
    kept = (
        replace(entry, fill=None, why=why, chosen=True) if entry.name in names else entry for entry in planned.entries
    )
    return replace(planned, entries=tuple(kept))


def _uses(model: nn.Module) -> Iterator[Planned]:
    for path, module in model.named_modules():
        layer = plain_name(path)
        known = slots(module)
        for slot in known:
            yield Planned(_inside(layer, slot.name), layer, slot.tensor, slot)
        covered = {slot.name for slot in known}
        for name, tensor in module.named_parameters(recurse=False):
            if name not in covered:
                yield Planned(_inside(layer, name), layer, tensor, why=f"no rule for {type(module).__name__}")


def _main(uses: Sequence[Planned]) -> Planned:
    known = [use for use in uses if use.slot is not None]
    multiplying = [use for use in known if use.slot and use.slot.role is not Role.EMBEDDING]
    main = (multiplying or known or uses)[0]
    padding = next((use.slot.padding for use in known if use.slot and use.slot.padding is not None), None)
    slot = main.slot if main.slot is None or padding is None else replace(main.slot, padding=padding)
    return replace(main, name=uses[0].name, slot=slot)


def _kept(entry: Planned, outside: Sequence[str], wishes: Wishes) -> Planned | None:
    """The entry with the reason why it keeps its values; None if it does not."""
    excluded = next((why for why in outside if why.startswith("excluded")), "")
    chosen = "" if wishes.scheme == "pytorch" else excluded or (outside[0] if all(outside) else None)
    if chosen is not None:
        return replace(entry, why=chosen, chosen=True)
    why = _unfillable(entry.tensor) or (entry.why if entry.slot is None else "")
    return replace(entry, why=why) if why else None


def _filled(entry: Planned, wishes: Wishes, found: Follower | None, zero: str | None) -> Planned:
    slot = entry.slot
    if slot is None:
        raise TypeError(f"{entry.name} needs to be of a known kind of layer to be filled")
    if slot.role is Role.GAMMA:
        return replace(entry, fill=ONES if zero is None else ZEROS, why=zero or "")
    if slot.role in {Role.BETA, Role.BIAS} or (slot.role is Role.LSTM_BIAS and wishes.forget_bias is None):
        return replace(entry, fill=ZEROS)
    if slot.role is Role.LSTM_BIAS:
        value = float(wishes.forget_bias or 0.0)
        spread = abs(value) * math.sqrt(3) / 4  # of a quarter of values against three quarters of zeros
        return replace(entry, fill=Fill(f"forget gate {value:g}", "constant", spread, value=value, raised=FORGET))
    if slot.nonlinearity is not None:
        follower: Follower | None = Follower(slot.nonlinearity, gain(slot.nonlinearity))
    else:
        follower = wishes.follower(entry.layer, found)
    follower = follower if uses_gain(wishes.scheme) else None
    fill = fill_for(slot, wishes.scheme, None if follower is None else follower.gain)
    return replace(entry, fill=fill, follower=follower)


def _unfillable(parameter: Tensor) -> str:
    if not isinstance(parameter, nn.Parameter):
        return "computed from other parameters (a parametrization)"
    if not parameter.requires_grad:
        return "frozen (requires_grad=False)"
    if isinstance(parameter, UninitializedParameter):
        return LAZY
    if parameter.is_meta:
        return "on the meta device, without memory"
    if type(parameter.data) is not Tensor and not is_sharded(parameter):
        return f"held as {type(parameter.data).__name__}"
    return "" if parameter.is_floating_point() else f"of dtype {parameter.dtype}"


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a shard of a parameter, a DTensor: by name, as the class is a heavy import."""
    return type(parameter.data).__name__ == "DTensor"


def _zero_gammas(model: nn.Module, wishes: Wishes) -> tuple[dict[str, str], list[str]]:
    """BatchNorm layers whose γ will be 0, with the reason, and what is to be said about it."""
    norms = find_batchnorm(model)
    zero = [name for name, layer in norms.items() if _is_zero(layer.weight)]
    if wishes.scheme == "pytorch" or wishes.zero_init_residual is False or not (wishes.zero_init_residual or zero):
        return {}, []
    seen = residual_closing(model)
    blind = "; ".join(f"{block or 'the model'} ({why})" for block, why in seen.unseen.items())
    if wishes.zero_init_residual:
        remarks = (
            [f"zero_init_residual: it could not be seen which BatchNorm closes a branch in {blind}"] if blind else []
        )
        return dict.fromkeys(seen.closing, "closes a residual branch"), remarks
    closing = [name for name in zero if name in set(seen.closing)]
    hidden = [name for name in zero if name not in closing and any(is_below(name, block) for block in seen.unseen)]
    remarks = []
    if closing:
        remarks.append(f"γ = 0 stays in {len(closing)} BatchNorm layers that close a residual branch: {_few(closing)}")
    if hidden:
        remarks.append(
            f"γ = 0 stays in {_few(hidden)}: whether they close a residual branch could not be seen in {blind}"
        )
    return dict.fromkeys((*closing, *hidden), "γ was 0 already"), remarks


def _is_zero(gamma: Tensor | None) -> bool:
    readable = gamma is not None and not isinstance(gamma, UninitializedParameter) and not gamma.is_meta
    return readable and gamma is not None and gamma.numel() > 0 and not bool(gamma.detach().any())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")  # noqa: PLR2004


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
