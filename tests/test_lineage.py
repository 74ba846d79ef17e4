# SPDX-License-Identifier: Apache-2.0
"""Bad values are followed through operations back to the one that made them, and meant infinities are let through."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from lightning_bn.lineage import CollectiveError, Lineage
from lightning_bn.operations import Fault, Outside
from lightning_bn.replay import follow
from lightning_bn.source import Names

NOTHING = Names(nn.Identity())


def origin(build, *inputs):
    """Where the bad values of what ``build`` returns come from."""
    with Lineage(NOTHING) as lineage:
        for place, x in enumerate(inputs):
            lineage.enter("batch", f"batch[{place}]", x)
        result = build(*inputs)
    return lineage.origin_of(result)


def name_of(found):
    return found.operation.name if isinstance(found, Fault) else found.path if found else None


X = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
NAN = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
MASK = torch.tensor([[True, False], [True, True]])


def in_a_view(x):
    x = x.clone()
    x[0].log_()
    x[1] = 5.0
    return x.sum()


def overwritten(x):
    y = torch.log(x - 10)
    y.fill_(1.0)
    return y.sum()


def through_a_list(x):
    parts = [torch.sqrt(x[0] - 9), x[1]]
    torch._foreach_mul_(parts, 2.0)
    return torch.stack(parts).sum()


def garbage():
    """Memory as ``torch.empty`` may give it."""
    return torch.empty(2, 2).fill_(float("nan"))


def out_argument(x):
    y = garbage()
    torch.log(x - 10, out=y)
    return y.sum()


def filled_garbage(x):
    y = garbage()
    y[:] = torch.log(x - 10)
    return y.sum()


CASES = {
    "finite": (lambda x: x.sum(), None),
    "logarithm": (lambda x: torch.log(x).sum(), "log"),
    "times 0": (lambda x: (torch.log(x.abs()) * 0).sum(), "log"),
    "a view in place": (in_a_view, "log_"),
    "overwritten": (overwritten, None),
    "through a list in place": (through_a_list, "sqrt"),
    "out argument": (out_argument, "log"),
    "garbage filled": (filled_garbage, "log"),
    "garbage drawn over": (lambda x: garbage().normal_().sum(), None),
    "garbage left": (lambda x: (garbage() * x).sum(), "fill_"),
    "meant infinity": (lambda x: x.masked_fill(MASK, float("-inf")), None),
    "NaN of meant infinities": (lambda x: torch.softmax(x.masked_fill(MASK, float("-inf")), 1), "_softmax"),
    "difference of meant infinities": (lambda x: x.masked_fill(MASK, float("inf")) * 0, "mul"),
    "a literal infinity": (lambda x: torch.full_like(x, float("inf")).minimum(x).sum(), None),
    "a tensor of infinities": (lambda x: torch.tensor(float("inf")).minimum(x).sum(), None),
    "where takes it out": (lambda x: torch.where(x > 0, torch.log(x), 0 * x).sum(), None),
    "nan_to_num takes it out": (lambda x: torch.nan_to_num(torch.log(x)).sum(), None),
    "two faults": (lambda x: torch.sqrt(torch.log(x)).sum(), "log"),
    "overflow": (lambda x: torch.exp(x * 1000).sum(), "exp"),
    "complex": (lambda x: torch.log(torch.complex(x * 0, x * 0)).real.sum(), "log"),
    "norm of nothing": (lambda x: x[x > 9].mean(), "mean"),
    "vmap": (lambda x: torch.func.vmap(torch.log)(x).sum(), "log"),
}


@pytest.mark.parametrize(("build", "expected"), CASES.values(), ids=CASES)
def test_the_operation_that_made_the_first_bad_value_is_found(build, expected):
    """In place, through views, lists, masks and transforms; None where the result is finite or meant."""
    assert name_of(origin(build, X.clone())) == expected


@pytest.mark.parametrize("second", [False, True])
def test_bad_values_of_the_batch_are_told_from_what_an_operation_made(second):
    """A sample's NaN keeps its path and index through the pass."""
    inputs = (X.clone(), NAN.clone()) if second else (NAN.clone(), X.clone())
    found = origin(lambda x, y: (x @ y).relu().sum(), *inputs)
    assert isinstance(found, Outside)
    assert (found.path, found.index) == (f"batch[{int(second)}]", (0, 1))


def test_minus_infinity_in_the_batch_is_meant():
    """Masks are handed over in batches; NaN that is made of them is blamed on what made it."""
    mask = torch.tensor([[0.0, float("-inf")], [float("-inf")] * 2])
    assert origin(lambda x, m: torch.softmax((x + m)[:1], 1), X.clone(), mask) is None
    assert name_of(origin(lambda x, m: torch.softmax(x + m, 1), X.clone(), mask)) == "_softmax"


def test_the_ranges_are_those_before_a_change_in_place():
    """The input of ``sqrt_`` is shown as it came, with its name."""
    found = origin(lambda x: x.sqrt_().sum(), X.clone())
    assert (found.inputs[0].low, found.inputs[0].high, found.inputs[0].name) == (-2.0, 3.0, "batch[0]")


@pytest.mark.parametrize(
    ("build", "wide"),
    [
        pytest.param(lambda x: (x.half() * 60000 * 60000).sum(), "finite", id="float16"),
        pytest.param(lambda x: (x * 1e38 * 1e38).sum(), "finite", id="float32"),
        pytest.param(torch.log, "non-finite", id="logarithm"),
        pytest.param(lambda x: x / (x - x), "non-finite", id="quotient"),
    ],
)
def test_a_wider_dtype_tells_range_from_pole(build, wide):
    """The same operation in float64 is finite where only the range was too small."""
    assert origin(build, X.clone()).wide == wide


def test_a_gradient_leads_to_the_line_of_the_forward_operation():
    """A bad gradient names the backward operation, its node and the line that the node differentiates."""
    x = torch.zeros(3, requires_grad=True)
    with Lineage(NOTHING) as lineage:
        y = torch.sqrt(x)
        (y * 2 + 1).sum().backward()
    found = lineage.origin_of(x.grad)
    assert found.operation.node == "SqrtBackward0"
    assert found.operation.spot.line.code == "y = torch.sqrt(x)"


def test_a_gradient_of_a_gradient_is_followed_too():
    """A penalty on gradients, made with ``create_graph``, is traced to the operation in it."""
    x = torch.ones(3, requires_grad=True)
    with Lineage(NOTHING) as lineage:
        (slope,) = torch.autograd.grad((x * 2).sum(), x, create_graph=True)
        penalty = torch.sqrt(slope - 3).sum()
    assert lineage.origin_of(penalty).operation.name == "sqrt"


def test_a_value_that_is_tested_on_the_host_is_a_suspect():
    """``if isnan(loss)`` and a refusal by an operation itself leave the origin behind."""
    with Lineage(NOTHING) as lineage:
        bad = torch.log(X - 10)
        assert bool(torch.isnan(bad).any())
    assert lineage.suspect.operation.name == "log"
    with Lineage(NOTHING) as lineage, pytest.raises(RuntimeError):
        torch.multinomial(torch.sqrt(X - 10), 1)
    assert lineage.suspect.operation.name == "sqrt"
    with Lineage(NOTHING) as lineage:
        assert not bool(torch.isnan(torch.nan_to_num(torch.log(X))).any())
    assert lineage.suspect is None


def test_modules_and_their_weights_are_named():
    """Layer and class of the innermost module, below the one that runs it where it is shared, and parameter names."""
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.ReLU(), shared))
    with torch.no_grad():
        shared.weight.fill_(1e30)
    with Lineage(Names(model)) as lineage:
        follow(lineage, model)
        out = model(torch.ones(1, 2))
    found = lineage.origin_of(out)
    assert (found.operation.spot.layer, found.operation.spot.kind) == ("1.1", "Linear")
    assert "0.0.weight" in {entry.name for entry in found.inputs}
    assert [round(size / 1e30, 3) for _, size in found.sizes] == [2.0]


def test_the_operations_before_are_the_latest_first():
    """What made the inputs, and what made theirs."""
    found = origin(lambda x: torch.log(-(x.abs() + 1)), X.clone())
    assert [entry.name for entry in found.before] == ["neg", "add", "abs"]


def test_a_pass_that_one_rank_runs_alone_ends_where_it_would_wait(tmp_path):
    """A collective operation raises in place of waiting for ranks that do not come."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        with Lineage(NOTHING, alone=True), pytest.raises(CollectiveError, match="c10d"):
            torch.distributed.all_reduce(torch.ones(2))
        with Lineage(NOTHING):
            torch.distributed.all_reduce(torch.ones(2))
    finally:
        torch.distributed.destroy_process_group()


def test_results_are_those_of_a_plain_run_to_the_last_bit():
    """Forward and backward under the watch compute the same numbers."""

    def run():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)
        )
        loss = F.cross_entropy(model(torch.randn(5, 1, 8, 8)), torch.arange(5) % 3)
        loss.backward()
        return [loss, *(x.grad for x in model.parameters()), *model.buffers(), torch.get_rng_state()]

    plain = run()
    with Lineage(NOTHING):
        watched = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_what_a_pass_writes_to_tensors_from_before_can_be_put_back():
    """Parameters that the step itself changes get back their values, and autograd does not notice."""
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    version = weight._version
    with Lineage(NOTHING) as lineage, torch.no_grad():
        weight[1:].mul_(0.5)
        weight.add_(1)
        (weight * 2).sub_(1)
    assert weight.tolist() == [2.0, 1.5, 1.5]
    lineage.writes.put_back()
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert weight._version == version
    loss.backward()
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]


def test_nan_that_the_user_wrote_out_leads_to_the_line_that_wrote_it():
    """A constant is named where it first comes in."""
    found = origin(lambda x: (x.masked_fill(x > 0, float("nan")) * 2).sum(), X.clone())
    assert name_of(found) == "masked_fill"
    assert name_of(origin(lambda x: (x + torch.tensor(float("nan"))).sum(), X.clone())) == "constant"


def test_tensors_that_were_made_of_each_other_in_place_end_the_search():
    """Two tensors that are added to each other again and again are no endless story."""

    def swing(x):
        a, b = x.clone(), x.clone()
        for _ in range(20):
            a.add_(b)
            b.add_(a)
        return torch.log(-a.abs())

    assert [entry.name for entry in origin(swing, X.clone()).before] == ["neg", "abs", "add_", "add_"]
