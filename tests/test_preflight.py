# SPDX-License-Identifier: Apache-2.0
"""What can be read off loaders, layers, optimizers and the order of layers, without a step and without a batch."""

from __future__ import annotations

import math

import pytest
import torch
from harm import assert_identical
from identical import everything
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_bn.norms import find_batchnorm
from lightning_bn.parameter_groups import groups_of, trained
from lightning_bn.preflight import Loader, Run, loader_facts, loaders_in, norms_of, planned, scripted_norms, shapes_in
from lightning_bn.surroundings import surroundings

# Scripting announces its own end, and so does what the compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Untouchable(Dataset):
    """A data set of a length, whose samples nobody may take."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        raise AssertionError("a sample was taken")


class NoLength(Dataset):
    def __getitem__(self, index):
        raise AssertionError("a sample was taken")


class Stream(IterableDataset):
    """A stream that claims a length and may not be read."""

    def __init__(self, length=None):
        self.length = length

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length

    def __iter__(self):
        raise AssertionError("the data set was iterated")


class Bucketed(BatchSampler):
    """Forms batches in a way of its own."""

    def __iter__(self):
        raise AssertionError("the sampler was iterated")


class NotIterated(SequentialSampler):
    def __iter__(self):
        raise AssertionError("the sampler was iterated")


class Bare:
    """A loader with nothing but an iterator, which is not to be used."""

    def __iter__(self):
        raise AssertionError("the loader was iterated")


class Hostile(Bare):
    """Every attribute raises."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __len__(self):
        raise RuntimeError("length")


class WithBatchSize(Bare):
    batch_size = 8


def distributed(samples, replicas):
    return DistributedSampler(Untouchable(samples), num_replicas=replicas, rank=0, shuffle=False)


LOADERS = {
    "divides": (DataLoader(Untouchable(64), 16), Loader(16, 16, 64)),
    "rest of 1": (DataLoader(Untouchable(65), 16), Loader(16, 1, 65)),
    "rest dropped": (DataLoader(Untouchable(65), 16, drop_last=True), Loader(16, 16, 65)),
    "rest of 3, shuffled": (DataLoader(Untouchable(67), 16, shuffle=True), Loader(16, 3, 67)),
    "fewer samples than a batch": (DataLoader(Untouchable(5), 16), Loader(5, 5, 5)),
    "batch of 1": (DataLoader(Untouchable(5), 1), Loader(1, 1, 5)),
    "no batches are made": (DataLoader(Untouchable(5), batch_size=None), Loader(None, None, 5)),
    "two processes, padded": (DataLoader(Untouchable(65), 16, sampler=distributed(65, 2)), Loader(16, 1, 65)),
    "drawn with weights": (
        DataLoader(Untouchable(64), 16, sampler=WeightedRandomSampler([1.0] * 64, 33)),
        Loader(16, 1, 64),
    ),
    "sampler of one's own": (DataLoader(Untouchable(33), 16, sampler=NotIterated(range(33))), Loader(16, 1, 33)),
    "sampler without length": (DataLoader(NoLength(), 16, sampler=iter([])), Loader(16, None, None)),
    "data set without length": (DataLoader(NoLength(), 16, sampler=RandomSampler(range(33))), Loader(16, 1, None)),
    "stream": (DataLoader(Stream(), 16), Loader(16, None, None)),
    "stream that claims a length": (DataLoader(Stream(65), 16), Loader(16, None, 65)),
    "torch's batch sampler": (
        DataLoader(Untouchable(33), batch_sampler=BatchSampler(range(33), 16, drop_last=False)),
        Loader(16, 1, 33),
    ),
    "batch sampler of one's own": (
        DataLoader(Untouchable(33), batch_sampler=Bucketed(range(33), 16, drop_last=False)),
        Loader(16, None, 33),
    ),
    "batches as lists": (DataLoader(Untouchable(33), batch_sampler=[[0, 1], [2]]), Loader(None, None, 33)),
    "no attributes": (Bare(), Loader()),
    "attributes that raise": (Hostile(), Loader()),
    "batch size alone": (WithBatchSize(), Loader(8, None, None)),
    "a tensor": (torch.ones(3), Loader()),
}


@pytest.mark.parametrize(("loader", "facts"), LOADERS.values(), ids=LOADERS)
def test_a_loader_is_known_by_its_attributes_alone(loader, facts):
    """Batch size, last batch and data set are read where an attribute tells them, and nothing is iterated or taken."""
    assert loader_facts(loader) == facts


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("samples", [1, 5, 16, 17, 31, 32, 33])
def test_the_last_batch_is_that_which_the_loader_gives(samples, drop_last):
    """The size of the last batch, and of the first one, is what iterating another such loader gives."""
    sizes = [len(batch) for batch in DataLoader(range(samples), 16, drop_last=drop_last)]
    facts = loader_facts(DataLoader(Untouchable(samples), 16, drop_last=drop_last))
    assert not sizes or (facts.batch_size, facts.last) == (sizes[0], sizes[-1])


@pytest.mark.parametrize(
    ("batches", "last"),
    [pytest.param(4, 16, id="cut"), pytest.param(5, 1, id="just reached"), pytest.param(math.inf, 1, id="no limit")],
)
def test_a_last_batch_that_the_trainer_cuts_off_is_none(batches, last):
    """With ``limit_train_batches`` the short batch at the end may never come."""
    assert loader_facts(DataLoader(Untouchable(65), 16), batches).last == last


def test_the_loaders_of_any_collection_are_found():
    """Dictionaries, lists and nested ones, as Lightning takes them; one loader is one, nothing is none."""
    a, b, c = Bare(), WithBatchSize(), DataLoader(Untouchable(3))
    assert loaders_in({"a": a, "rest": [b, (c,)]}) == [a, b, c]
    assert loaders_in(CombinedLoader([a, {"b": b}]).iterables) == [a, b]
    assert loaders_in(a) == [a]
    assert loaders_in(None) == []


def test_the_shapes_of_a_batch_are_those_of_its_tensors():
    """Nested tensors with an axis are listed; scalars, numbers and strings are not."""
    batch = {"x": torch.ones(2, 3), "rest": [torch.ones(2), torch.tensor(1.0), 7, "name"]}
    assert shapes_in(batch) == ((2, 3), (2,))


@pytest.mark.parametrize(
    ("run", "size", "rows"),
    [
        pytest.param(Run((Loader(8),), ((8, 3), (8,))), 8, 2, id="as the loader says"),
        pytest.param(Run((Loader(8),), ((16, 3), (16,))), 8, 0, id="another number of rows"),
        pytest.param(Run((Loader(),), ((8, 3), (8,))), 8, 2, id="by the batch alone"),
        pytest.param(Run((Loader(),), ((8, 3), (4,))), None, 0, id="rows that differ"),
        pytest.param(Run((Loader(),)), None, 0, id="no tensors"),
        pytest.param(Run((Loader(8), Loader(8)), ((8, 3),)), None, 0, id="two loaders"),
        pytest.param(Run(), None, 0, id="nothing known"),
    ],
)
def test_the_batch_of_a_process_is_known_from_loader_and_first_batch(run, size, rows):
    """The loader's own word counts; tensors that do not have as many rows are no samples of it."""
    assert run.batch_size == size
    assert len(run.by_row) == rows


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        pytest.param((10, 5, -1, 1), 50, id="epochs"),
        pytest.param((10, 5, 20, 1), 20, id="steps end it"),
        pytest.param((10, 5, 20, 4), 50, id="steps of four batches"),
        pytest.param((10, -1, 20, 4), 80, id="steps alone"),
        pytest.param((10, None, -1, 1), math.inf, id="no limit"),
        pytest.param((math.inf, 5, -1, 1), math.inf, id="stream"),
        pytest.param((math.inf, 5, 20, 2), 40, id="stream with a limit"),
    ],
)
def test_the_planned_batches_are_those_of_the_nearest_limit(limits, batches):
    """Epochs count batches, steps count windows of accumulation; without a limit the number is infinite."""
    assert planned(*limits) == batches


def net(**options):
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.ReLU(), nn.Linear(4, 2))


def changed(change, model=None):
    model = model or net()
    with torch.no_grad():
        change(model)
    return model


STATES = {
    "as made": (lambda m: None, {}),
    "eval mode": (lambda m: m[1].eval(), {"training": False, "by_batch": False, "updates": False}),
    "no flag": (lambda m: setattr(m[1], "track_running_stats", False), {"tracks": False, "updates": False}),
    "momentum 0": (lambda m: setattr(m[1], "momentum", 0.0), {"momentum": 0.0, "updates": False}),
    "cumulative": (lambda m: setattr(m[1], "momentum", None), {"momentum": None, "updates": True}),
    "mean moved": (lambda m: m[1].running_mean.add_(1), {"fresh": False}),
    "variance moved": (lambda m: m[1].running_var[2].mul_(2), {"fresh": False}),
    "γ = 0": (lambda m: m[1].weight.zero_(), {"zero_gamma": True, "zero_beta": True}),
    "one γ = 0": (lambda m: m[1].weight[1:].zero_(), {"zero_gamma": False}),
    "β": (lambda m: m[1].bias.add_(1), {"zero_beta": False}),
    "γ, β frozen": (lambda m: m[1].requires_grad_(False), {"learns": False, "amid_learning": True}),
    "all frozen": (lambda m: m.requires_grad_(False), {"learns": False, "amid_learning": False}),
}


@pytest.mark.parametrize(("change", "expected"), STATES.values(), ids=STATES)
def test_a_layer_is_described_as_it_is(change, expected):
    """Mode, statistics, γ, β and what is trained, each by the one attribute that tells it."""
    (norm,) = norms_of(changed(change))
    usual = {"name": "1", "training": True, "by_batch": True, "updates": True, "fresh": True, "zero_gamma": False}
    usual |= {"learns": True, "amid_learning": True, "synchronised": False, "lazy": False, "momentum": 0.1}
    assert {key: getattr(norm, key) for key in usual | expected} == usual | expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(
            net(track_running_stats=False), {"stored": False, "by_batch": True, "fresh": None}, id="no statistics"
        ),
        pytest.param(net(affine=False), {"zero_gamma": None, "learns": False, "amid_learning": True}, id="no γ and β"),
        pytest.param(nn.Sequential(nn.LazyBatchNorm1d()), {"lazy": True, "fresh": None, "zero_gamma": None}, id="lazy"),
        pytest.param(
            nn.Sequential(nn.BatchNorm1d(3, device="meta")), {"fresh": None, "zero_gamma": None}, id="no values yet"
        ),
        pytest.param(nn.Sequential(nn.SyncBatchNorm(3)), {"synchronised": True}, id="synchronised"),
        pytest.param(nn.Sequential(nn.BatchNorm1d(0)), {"fresh": None, "zero_gamma": None}, id="no channels here"),
    ],
)
def test_what_a_layer_does_not_have_is_not_known(model, expected):
    """Values that are not there are None, never a guess."""
    (norm,) = norms_of(model)
    assert {key: getattr(norm, key) for key in expected} == expected


class Shifted(nn.BatchNorm1d):
    """Takes γ as a difference from 1."""

    def forward(self, x):
        return F.batch_norm(x, None, None, 1 + self.weight, self.bias, training=True)


def test_the_gamma_of_a_layer_with_a_forward_of_its_own_is_not_judged():
    """What 0 means there is the layer's own business."""
    (norm,) = norms_of(nn.Sequential(changed(lambda m: m.weight.zero_(), Shifted(3))))
    assert norm.zero_gamma is None


def test_a_parameter_that_no_optimizer_holds_is_not_trained():
    """``requires_grad`` alone trains nothing; where optimizers hold none of the model's parameters it has to do."""
    model = net()
    others = torch.optim.SGD(net().parameters(), 0.1)
    head = torch.optim.SGD(model[3].parameters(), 0.1)
    assert trained(model, [others]) is None
    assert trained(model, [others, head]) == {id(x) for x in model[3].parameters()}
    assert norms_of(model, trained(model, [others]))[0].learns
    assert not norms_of(model, trained(model, [head]))[0].learns


def test_a_parameter_group_is_counted_by_role():
    """γ and β, matrices, and the rest; the learning rate is that before the schedule; frozen ones are left out."""
    model = net()
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": model[:2].parameters(), "lr": 0.5}, {"params": model[3].parameters(), "weight_decay": 0.25}], 0.125
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # a warm-up that begins at 0
    first, second = groups_of(model, [optimizer])
    assert (first.optimizer, first.law, first.lr, first.decay) == ("AdamW", "adamw", 0.5, 0.01)
    assert (first.affine, first.weights, first.other, first.layers) == (8, 12, 4, ("1",))
    assert (second.lr, second.decay) == (0.125, 0.25)
    assert (second.affine, second.weights, second.other, second.layers) == (0, 0, 2, ())


@pytest.mark.parametrize(
    ("make", "law", "momentum"),
    [
        pytest.param(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "sgd", 0.9, id="SGD"),
        pytest.param(lambda p: torch.optim.Adam(p), "adam", 0.0, id="Adam"),
        pytest.param(lambda p: torch.optim.AdamW(p), "adamw", 0.0, id="AdamW"),
        pytest.param(lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True), "adamw", 0.0, id="NAdam, decoupled"),
        pytest.param(lambda p: torch.optim.RMSprop(p), "", 0.0, id="another one"),
        pytest.param(lambda p: torch.optim.LBFGS(p), "", 0.0, id="L-BFGS"),
    ],
)
def test_how_weight_decay_acts_is_known_of_sgd_and_adam(make, law, momentum):
    """Beside the step, through the gradient, or unknown."""
    (group,) = groups_of(net(), [make(net().parameters())])
    assert (group.law, group.momentum) == (law, momentum)


def test_scripted_layers_are_listed():
    """A ScriptModule's BatchNorm is none of torch's class any more, and is named."""
    model = nn.Sequential(torch.jit.script(net()), nn.BatchNorm1d(2))
    assert scripted_norms(model) == ["0.1"]
    assert list(find_batchnorm(model)) == ["1"]


class Calls(nn.Module):
    """A model whose forward is a function of its parts."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.calls = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.calls(self, x)


LINEAR, NORM = (lambda: nn.Linear(4, 4)), (lambda: nn.BatchNorm1d(4))
ORDERS = {
    # name: model, layers whose bias is useless
    "behind one another": (lambda: net(), {"0": 4}),
    "no bias": (lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)), {}),
    "bias frozen": (lambda: changed(lambda m: m[0].bias.requires_grad_(False)), {}),
    "norm in eval mode": (lambda: changed(lambda m: m[1].eval()), {}),
    "ReLU between": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)), {}),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), {"0": 4}),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)), {}),
    "used elsewhere too": (lambda: Calls(lambda m, x: m.bn(y := m.a(x)) + y, a=LINEAR(), bn=NORM()), {}),
    "called twice, once without": (
        lambda: Calls(lambda m, x: m.bn(m.a(m.a(x).relu())), a=LINEAR(), bn=NORM()),
        {},
    ),
    "called twice, both times": (
        lambda: Calls(lambda m, x: m.two(m.a(m.one(m.a(x)))), a=LINEAR(), one=NORM(), two=NORM()),
        {"a": 4},
    ),
    "registered in another order": (
        lambda: Calls(lambda m, x: m.bn(m.a(x)), bn=NORM(), other=LINEAR(), a=LINEAR()),
        {"a": 4},
    ),
    "channels that are no features": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(9)), {}),
    "a sum between": (lambda: Calls(lambda m, x: m.bn(m.a(x) + x), a=LINEAR(), bn=NORM()), {}),
    "in a part of a model that cannot be traced": (
        lambda: Calls(lambda m, x: m.part(x) if x.sum() > 0 else x, part=nn.Sequential(LINEAR(), NORM())),
        {"part.0": 4},
    ),
    "compiled": (lambda: nn.Sequential(torch.compile(nn.Sequential(LINEAR(), NORM()), backend="eager")), {"0.0": 4}),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), {}),
}


@pytest.mark.parametrize(("build", "expected"), ORDERS.values(), ids=ORDERS)
def test_a_bias_is_useless_where_batchnorm_takes_all_of_the_output(build, expected):
    """By the order in which the forward calls layers, not by that in which they are registered."""
    assert surroundings(build()).biased == expected


@pytest.mark.parametrize("case", [name for name, (_, biased) in ORDERS.items() if biased and name != "compiled"])
def test_a_useless_bias_has_no_effect_and_no_gradient(case):
    """An independent check of the table above: the output stays as it is when the bias changes."""
    model = ORDERS[case][0]()
    shape = (6, 3, 5, 5) if case == "convolution" else (6, 3 if case == "behind one another" else 4)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    before = model(x)
    for name in ORDERS[case][1]:
        nn.init.normal_(model.get_submodule(name).bias, std=3.0)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_an_active_dropout_is_found_through_one_layer_with_weights():
    """Dropout, reshaping, linear layer or convolution, BatchNorm; not through two, not inactive, not in eval mode."""
    dropout, norm = nn.Dropout(0.4), nn.BatchNorm1d(4)
    direct = nn.Sequential(dropout, nn.Flatten(), nn.Linear(4, 4), norm)
    assert surroundings(direct).dropped == {"3": ("0", 0.4)}
    assert surroundings(nn.Sequential(dropout, LINEAR(), LINEAR(), norm)).dropped == {}
    assert surroundings(nn.Sequential(dropout, LINEAR(), nn.ReLU(), norm)).dropped == {}
    assert surroundings(nn.Sequential(nn.Dropout(0.0), LINEAR(), norm)).dropped == {}
    assert surroundings(direct.eval()).dropped == {}


class Projected(nn.Module):
    """A backbone of convolutions, its mean over the pixels, and a projection head."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.head(self.pool(self.body(x)))


class Context(nn.Module):
    """Its pooled branch normalises maps of one pixel."""

    def __init__(self, size=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.branch = nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        y = self.stem(x)
        return y + F.interpolate(self.branch(y), y.shape[2:])


ROWS = {
    # name: model, shape of a tensor of the batch, layers without spatial extent, those of them with one row per sample
    "perceptron": (lambda: net(), (8, 3), ["1"], ["1"]),
    "perceptron on pictures": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)),
        (8, 3, 2, 2),
        ["2"],
        ["2"],
    ),
    "other features": (lambda: net(), (8, 5), ["1"], []),
    "sets of points": (lambda: net(), (1, 1024, 3), ["1"], []),
    "first element of a batch of batches": (
        lambda: Calls(lambda m, x: m.net(x[0]), net=net()),
        (1, 32, 3),
        ["net.1"],
        [],
    ),
    "rows folded into the batch": (
        lambda: Calls(lambda m, x: m.net(x.view(-1, 3)), net=net()),
        (8, 6, 3),
        ["net.1"],
        [],
    ),
    "one row per sample, by view": (
        lambda: Calls(lambda m, x: m.net(x.view(x.size(0), -1)), net=net()),
        (8, 1, 3),
        ["net.1"],
        ["net.1"],
    ),
    "the same by shape": (
        lambda: Calls(lambda m, x: m.net(x.reshape(x.shape[0], -1)), net=net()),
        (8, 1, 3),
        ["net.1"],
        ["net.1"],
    ),
    "both halves joined along samples": (
        lambda: Calls(lambda m, x: m.net(torch.cat([x, x])), net=net()),
        (8, 3),
        ["net.1"],
        [],
    ),
    "residual perceptron": (
        lambda: Calls(lambda m, x: m.bn(m.a(x) + x.relu() * 0.5), a=LINEAR(), bn=NORM()),
        (8, 4),
        [],
        [],
    ),
    "two linear layers added": (
        lambda: Calls(lambda m, x: m.bn(m.a(x) + m.b(x)), a=LINEAR(), b=LINEAR(), bn=NORM()),
        (8, 4),
        ["bn"],
        ["bn"],
    ),
    "channels that are no features": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(9)), (8, 9, 3), [], []),
    "one of two has its rows exchanged": (
        lambda: Calls(lambda m, x: m.bn(m.a(x) + m.b(x.flip(0))), a=LINEAR(), b=LINEAR(), bn=NORM()),
        (8, 4),
        ["bn"],
        [],
    ),
    "along a sequence": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (8, 3, 9), [], []),
    "axes exchanged": (
        lambda: Calls(lambda m, x: m.bn(m.a(x).transpose(1, 2)), a=LINEAR(), bn=NORM()),
        (8, 9, 4),
        [],
        [],
    ),
    "head behind a mean": (lambda: Projected(lambda y: y.mean((2, 3))), (8, 3, 9, 9), ["head.1"], ["head.1"]),
    "head behind flattened pooling": (
        lambda: Projected(lambda y: torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)),
        (8, 3, 9, 9),
        ["head.1"],
        ["head.1"],
    ),
    "head over places": (
        lambda: Projected(lambda y: y.permute(0, 2, 3, 1).reshape(-1, 8)),
        (8, 3, 9, 9),
        ["head.1"],
        [],
    ),
    "maps of one pixel": (lambda: Context(), (8, 3, 9, 9), ["branch.2"], ["branch.2"]),
    "maps of four pixels": (lambda: Context(2), (8, 3, 9, 9), [], []),
    "network of convolutions": (lambda: Projected(nn.Identity()).body, (8, 3, 9, 9), [], []),
    "a part that cannot be traced": (
        lambda: Calls(lambda m, x: m.net(x) if x.sum() > 0 else x, net=net()),
        (8, 3),
        ["net.1"],
        ["net.1"],
    ),
    "a part of a part": (
        lambda: Calls(lambda m, x: m.a(x), a=Calls(lambda m, x: m.net(x) if x.sum() > 0 else x, net=net())),
        (8, 3),
        ["a.net.1"],
        [],
    ),
}


@pytest.mark.parametrize(("build", "shape", "flat", "sure"), ROWS.values(), ids=ROWS)
def test_layers_without_spatial_extent_are_told_from_others(build, shape, flat, sure):
    """Flat is what sees one value for each row and channel; sure is what sees one row for each sample."""
    found = surroundings(build())
    assert found.flat() == flat
    assert [name for name in flat if found.by_sample(name, [shape, shape[:1]])] == sure


@pytest.mark.parametrize("case", [name for name, (*_, sure) in ROWS.items() if sure])
def test_one_sample_raises_where_it_is_said_to(case):
    """An independent check of the table above: torch refuses one sample, and accepts two."""
    build, shape, *_ = ROWS[case]
    build()(torch.rand(2, *shape[1:]))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        build()(torch.rand(1, *shape[1:]))


@pytest.mark.parametrize(
    "case",
    [
        "rows folded into the batch",
        "both halves joined along samples",
        "head over places",
        "channels that are no features",
    ],
)
def test_one_sample_does_not_raise_where_it_is_not_sure(case):
    """The other side: these networks take one sample, and to foretell an error would be false."""
    build, shape, *_ = ROWS[case]
    build()(torch.rand(1, *shape[1:]))


def test_what_could_not_be_traced_is_named_with_the_reason():
    """The module whose forward depends on a value is told; what lies below is looked into."""
    found = surroundings(ROWS["a part of a part"][0]())
    assert found.unseen == {"a": "its way depends on the value or the shape of a tensor"}


@pytest.mark.parametrize("build", [lambda: net(), Context, ROWS["a part of a part"][0]], ids=["net", "context", "part"])
def test_looking_leaves_the_model_as_it_was(build):
    """Parameters, buffers, modes, attributes and random streams are the same objects with the same values."""
    model = build()
    before = everything(model)
    surroundings(model)
    norms_of(model)
    groups_of(model, [torch.optim.SGD(model.parameters(), 0.1)])
    assert_identical(everything(model), before)


def test_a_data_set_of_tensors_is_taken_by_its_length():
    """A TensorDataset in the usual loader: the facts of every demonstration."""
    assert loader_facts(DataLoader(TensorDataset(torch.rand(10, 2)), 4)) == Loader(4, 2, 10)
