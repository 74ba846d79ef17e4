# SPDX-License-Identifier: Apache-2.0
"""What the gradient of a due step is, and what the optimizer makes of it, parameter by parameter."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_bn.findings import Finding
from lightning_bn.rules.exploding_gradient import exploding_gradient
from lightning_bn.rules.huge_updates import huge_updates
from lightning_bn.rules.no_gradient import no_gradient
from lightning_bn.rules.tiny_updates import tiny_updates
from lightning_bn.rules.vanishing_gradient import Weight, vanishing_gradient
from lightning_bn.taps import plain_name

KEPT = 5
"""Due steps that the rules may look back on."""


class Updates:
    """Norms of weights, gradients and updates on due steps; all of them stay on the device until they are asked for.

    The weights are copied in front of the optimizer step, and the copies are dropped behind it.

    Args:
        model: the network whose parameters are named.
    """

    def __init__(self, model: nn.Module) -> None:
        self.latest: dict[str, Weight] = {}
        """What the last due step did to each parameter, in the order of the model."""
        self._names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
        self._largest: dict[str, float] = {}
        self._steps: deque[dict[str, Weight]] = deque(maxlen=KEPT)
        self._forget()

    def _forget(self) -> None:
        self._copies: list[tuple[nn.Parameter, Tensor]] = []
        self._rows: dict[str, list[Tensor | None]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._rates: dict[str, float] = {}

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the parameters of an optimizer that is about to step."""
        for group in optimizer.param_groups:
            held = [parameter for parameter in group["params"] if self._can_measure(parameter)]
            for parameter in held:
                name, rate = self._names[parameter], float(group.get("lr") or 0.0)
                self._shapes[name], self._rates[name] = tuple(parameter.shape), rate
                self._largest[name] = max(rate, self._largest.get(name, 0.0))
            weights = [parameter.detach() for parameter in held]
            graded = [parameter for parameter in held if parameter.grad is not None and not parameter.grad.is_sparse]
            norms = dict(zip(graded, _norms([p.grad.detach() for p in graded if p.grad is not None]), strict=True))
            for parameter, norm in zip(held, _norms(weights), strict=True):
                self._rows[self._names[parameter]] = [norm, norms.get(parameter)]
            self._copies += [(parameter, parameter.detach().clone()) for parameter in held]

    def after(self) -> list[Tensor]:
        """Look at them when it has stepped: all norms, 0-dimensional, in the order in which :meth:`read` wants them."""
        now = [parameter.detach() for parameter, _ in self._copies]
        changes = torch._foreach_sub(now, [copy for _, copy in self._copies]) if now else ()  # noqa: SLF001  (what torch's optimizers use)
        for (parameter, _), norm in zip(self._copies, _norms(changes), strict=True):
            self._rows[self._names[parameter]].append(norm)
        self._copies = []
        return [value for row in self._rows.values() for value in row if value is not None]

    def read(self, values: Sequence[float], heard: Mapping[str, bool] | None) -> Iterator[Finding]:
        """Name the numbers that :meth:`after` gave, when they are on the host, and judge them.

        Args:
            values: the numbers.
            heard: modules that ran in this step, and whether gradients were recorded; None where not known.
        """
        numbers, found = iter(values), {}
        for name, row in self._rows.items():
            weight, gradient, update = (None if value is None else next(numbers) for value in row)
            rates = {"lr": self._rates[name], "largest_lr": self._largest[name]}
            found[name] = Weight(self._shapes[name], weight or 0.0, gradient, update or 0.0, **rates)
        self._forget()
        if found:
            self.latest = {name: found[name] for name in self._names.values() if name in found}
            self._steps.append(self.latest)
            steps = list(self._steps)
            called = None if heard is None else {name for name, graded in heard.items() if graded}
            said = [vanishing_gradient(steps), exploding_gradient(steps), tiny_updates(steps), huge_updates(steps)]
            yield from (
                finding
                for finding in (*said, no_gradient(steps, called, heard and heard.keys()))
                if finding is not None
            )

    def _can_measure(self, parameter: nn.Parameter) -> bool:
        """Whether it is trained, named, not complex, and whole on this rank."""
        sharded = hasattr(parameter, "to_local")
        return parameter.requires_grad and parameter in self._names and not sharded and parameter.is_floating_point()


def ratios(weights: Mapping[str, Weight]) -> list[float]:
    """‖Δw‖/‖w‖ of each weight of two or more dimensions that is not 0."""
    return [row.update / row.weight for row in weights.values() if len(row.shape) > 1 and row.weight]


def _norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_norm(list(tensors)) if tensors else ()  # noqa: SLF001  (what clip_grad_norm_ uses)
