# SPDX-License-Identifier: Apache-2.0
"""Train with another normalisation in the place of BatchNorm, without a change to the project's code."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from lightning_bn.callbacks.arguments import check_choice, check_flag, check_strings
from lightning_bn.callbacks.base import Monitor, callbacks_of, shielded
from lightning_bn.callbacks.late_layers import after_building
from lightning_bn.norms import find_batchnorm
from lightning_bn.rules.listing import listed
from lightning_bn.rules.swapped_batchnorm import at_initial_statistics, nothing_swapped, other_than_saved, swapped
from lightning_bn.rules.unmatched_layers import unmatched_layers
from lightning_bn.stats.freshness import why_not_new
from lightning_bn.swap import FrozenBatchNorm, swap_batchnorm
from lightning_bn.taps import plain_name

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Target = Literal["group", "layer", "instance", "frozen"]
FROZEN = "BatchNorm by its running statistics"
MEAN, RESTORES = ".running_mean", "on_load_checkpoint"
SWAPPED = "_lightning_bn_swapped"
"""Attribute of a LightningModule: what its replaced layers are, by path. It travels with copies of the module."""


class SwapBatchNorm(Monitor):
    """Replace BatchNorm layers by a normalisation that does not look at the batch, before the optimizer is made.

    For small batches: GroupNorm, LayerNorm and instance norm normalise each sample by itself. γ and β stay the same
    ``Parameter`` objects; everything that comes after, from optimizer to strategy, knows the new layers alone, also
    where a project builds its layers in ``setup`` or ``configure_model``. Fit, validate, test and predict swap alike,
    each model once: checkpoints of a run with this callback are resumed, validated and tested with it. A checkpoint
    that was trained with BatchNorm ends in an error, but by ``frozen``, which goes on from it. Sharded layers are
    refused. Costs nothing after the start. List it after ``WeightInit``, before callbacks that average weights.

    Args:
        to: ``group``: GroupNorm (Wu & He 2018); ``layer``: GroupNorm with one group, LayerNorm over all axes of a
            sample; ``instance``: each channel of each sample by itself; ``frozen``: BatchNorm by its running statistics
            in training too, for trained weights.
        include: shell patterns on paths, or names of classes, of BatchNorm layers or of modules around them, one or a
            list; None is all of them.
        exclude: the same, to leave alone.
        groups: most groups of ``group``, at least 1. A layer gets the largest divisor of its channels that is not
            above it and leaves at least ``fewest`` channels in a group.
        fewest: see ``groups``; None is 2 for ``BatchNorm2d`` and ``BatchNorm3d``, and 16 for all others, whose inputs
            may be vectors.
        train_affine: False freezes γ and β of ``frozen``.
        ignore: slugs of findings that are not to be reported, out of swapped-batchnorm, unmatched-layers.

    Raises:
        ValueError: if an argument is out of its range; in ``setup`` where a layer cannot be replaced, see
            :func:`~lightning_bn.swap.swap_batchnorm`.

    Example:
        ``Trainer(callbacks=[lightning_bn.SwapBatchNorm("group")])``
    """

    stages: ClassVar[frozenset[str]] = frozenset({"fit", "validate", "test", "predict"})

    def __init__(
        self,
        to: Target = "group",
        *,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        groups: int = 32,
        fewest: int | None = None,
        train_affine: bool = True,
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__(ignore=ignore)
        check_choice("to", to, get_args(Target))
        self.to = to
        self.include = check_strings("include", include)
        self.exclude = check_strings("exclude", exclude)
        self.groups = groups
        self.fewest = fewest
        self.train_affine = check_flag("train_affine", train_affine)
        self._replace(nn.Identity(), [])  # which checks the other arguments
        self.swapped: dict[str, str] = {}
        self._undo = ExitStack()
        self._forget()

    def _forget(self) -> None:
        self._undo.close()
        self._new: dict[str, nn.Module] = {}  # of this fit
        self._trained: list[str] = []
        self._matched: set[str] = set()
        self._known: set[str] = set()
        self._restored: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the layers, or arrange for it where they are not built yet; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        # Outside the shield: every process swaps, also one that cannot report, or training ends with the reason.
        self._forget()
        self.swapped = vars(pl_module).setdefault(SWAPPED, {})
        self._undo.enter_context(_checked_restore(pl_module, self.swapped))
        self._undo.callback(after_building(pl_module, lambda: self._swap(trainer, pl_module, stage)))

    @shielded
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was replaced; called by Lightning."""
        self._undo.close()
        self._tell(pl_module)

    @shielded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what a checkpoint has restored; called by Lightning."""
        self.emit(other_than_saved(self._restored, self.swapped))
        frozen = {name: layer for name, layer in self._new.items() if isinstance(layer, FrozenBatchNorm)}
        self.emit(at_initial_statistics([name for name, layer in frozen.items() if _is_initial(layer)], len(frozen)))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model; called by Lightning."""
        self._forget()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model; called by Lightning."""
        self._forget()
        super().teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """What each replaced layer is; called by Lightning."""
        return {**super().state_dict(), "layers": dict(self.swapped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; called by Lightning."""
        super().load_state_dict(state_dict)
        self._restored = dict(state_dict.get("layers", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to a model in progress."""
        return {**super().__getstate__(), "_undo": ExitStack(), "_new": {}}

    def _swap(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        layers = find_batchnorm(pl_module)
        for model in (pl_module, *_copies_of(pl_module, trainer)):
            new = self._replace(model, self._choose(model))
            if model is pl_module:
                self._new |= new
                self._trained += [name for name in new if self.to != "frozen" and why_not_new(layers[name])]
                self.swapped.update({name: _kind_of(layer) for name, layer in new.items()})
        if stage != "fit" and (self._new or not self.swapped):  # in a fit this may run again, and is told later
            self._tell(pl_module)

    def _choose(self, model: nn.Module) -> list[str]:
        chosen = []
        for name, ways in _called(model).items():
            self._known |= ways
            entries = {entry for entry in (*(self.include or ()), *(self.exclude or ())) if _matches(entry, ways)}
            self._matched |= entries
            if (self.include is None or entries & {*self.include}) and not entries & {*(self.exclude or ())}:
                chosen.append(name)
        return chosen

    def _replace(self, model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
        layers = find_batchnorm(model)
        if sharded := [name for name in names if any(hasattr(x, "to_local") for x in layers[name].parameters())]:
            need = "layers that are not sharded yet; call swap_batchnorm in configure_model, before fully_shard"
            raise ValueError(f"SwapBatchNorm needs {need}; got DTensor parameters in {listed(sharded)}")
        exact = [glob.escape(name) for name in names]
        try:
            return swap_batchnorm(
                model, self.to, layers=exact, groups=self.groups, fewest=self.fewest, train_affine=self.train_affine
            )
        except ValueError as error:
            raise ValueError(str(error).replace("leave it out by layers", "leave it out by exclude")) from None

    @shielded
    def _tell(self, pl_module: LightningModule) -> None:
        if self._new:
            new = {name: self.swapped[name] for name in self._new}
            self.emit(swapped(new, self._trained, in_copy=_trains_a_copy(self.live.trainer)))
        else:
            self.emit(nothing_swapped(len(find_batchnorm(pl_module)), len(self.swapped)))
        for argument in ("include", "exclude"):
            for entry in getattr(self, argument) or ():
                if self._known and entry not in self._matched and (self._new or not self.swapped):
                    what = "a BatchNorm layer, a module around one, or the class of either"
                    near = get_close_matches(entry, sorted(self._known), n=3, cutoff=0.0)
                    self.emit(unmatched_layers(entry, near, argument=argument, what=what))


def _called(model: nn.Module) -> dict[str, set[str]]:
    """For each BatchNorm layer all that it may be called by: paths and classes, its own and of modules around it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {layer: name for name, layer in find_batchnorm(model).items()}
    found: dict[str, set[str]] = {name: set() for name in first.values()}
    for path, module in modules.items():
        if isinstance(module, _BatchNorm):
            parts = path.split(".") if path else []
            above = [".".join(parts[:length]) for length in range(len(parts) + 1)]
            for each in above:
                found[first[module]] |= {plain_name(each), *_classes(modules[each])} - {""}
    return found


def _classes(module: nn.Module) -> set[str]:
    kinds = type(module).__mro__
    return {kind.__name__ for kind in kinds[: kinds.index(nn.Module)] if not kind.__name__.startswith("_")}


def _matches(entry: str, ways: set[str]) -> bool:
    return entry.removeprefix("torch.").removeprefix("nn.") in ways or any(fnmatchcase(way, entry) for way in ways)


def _copies_of(pl_module: LightningModule, trainer: Trainer) -> Iterator[nn.Module]:
    """Copies of the model that callbacks in front of this one have made to average weights in."""
    for callback in callbacks_of(trainer):
        for held in vars(callback).values():
            copy = held.module if isinstance(held, AveragedModel) else held
            if type(copy) is type(pl_module) and copy is not pl_module:
                yield copy


def _trains_a_copy(trainer: Trainer) -> bool:
    """Whether processes were forked or spawned, which give back parameters and no modules."""
    kinds = type(trainer.strategy.launcher).__mro__  # of a private module: by name
    return any(kind.__name__ == "_MultiProcessingLauncher" for kind in kinds)


def _kind_of(layer: nn.Module) -> str:
    if isinstance(layer, nn.GroupNorm):
        return f"GroupNorm with {layer.num_groups} group{'' if layer.num_groups == 1 else 's'}"
    return FROZEN if isinstance(layer, FrozenBatchNorm) else "instance norm"


def _is_initial(layer: FrozenBatchNorm) -> bool:
    return not bool(layer.running_mean.any()) and bool((layer.running_var == 1).all())


@contextmanager
def _checked_restore(pl_module: LightningModule, replaced: Mapping[str, str]) -> Iterator[None]:
    """While the block lasts, look at a checkpoint when the model's ``on_load_checkpoint`` is through with it."""
    own, present = vars(pl_module), pl_module.on_load_checkpoint
    before = own.get(RESTORES)
    if getattr(before, "__module__", "") == __name__:  # another instance does it
        yield
        return

    def then_check(checkpoint: dict[str, Any]) -> None:
        present(checkpoint)
        if getattr(pl_module, "strict_loading", True):  # older versions of Lightning are always strict
            _refuse_batchnorm(checkpoint.get("state_dict", {}), replaced)

    own[RESTORES] = then_check
    try:
        yield
    finally:
        del own[RESTORES]
        own.update({} if before is None else {RESTORES: before})


def _refuse_batchnorm(state: Mapping[str, Any], replaced: Mapping[str, str]) -> None:
    names = [plain_name(key.removesuffix(MEAN)) for key in state if key.endswith(MEAN)]
    foreign = [name for name in names if replaced.get(name, FROZEN) != FROZEN]
    if foreign:
        raise ValueError(
            f"SwapBatchNorm needs a checkpoint of a run in which the same layers were replaced; this one has running "
            f"statistics of {listed(foreign)}, so its weights were trained with BatchNorm, and {foreign[0]} is "
            f"{replaced[foreign[0]]} here. Use it without SwapBatchNorm, or with to: frozen, or train from the start"
        )
