# SPDX-License-Identifier: Apache-2.0
"""The noise of batch statistics is told in training, from what BatchNorm layers computed anyway."""

from __future__ import annotations

import pytest
import torch
from compiling import Mute, as_a_part, in_place
from specimens import Healthy, loader, network
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormMonitor, Severity
from lightning_bn.callbacks.noise import Noise, effective
from lightning_bn.callbacks.statistics_watch import StatisticsWatch


def follow(net, batches, *, run=None):
    noise = Noise(net)
    for place, x in enumerate(batches):
        noise.begin(second=bool(place % 2))
        with noise.listening(noise.hear):
            (run or net)(x).sum().backward()
        noise.end()
    return effective(noise.to_plain())


def batches(*shape, count=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    ("norm", "shape", "expected"),
    [
        pytest.param(nn.BatchNorm1d(32), (8, 32), 8, id="vectors: the batch"),
        pytest.param(nn.BatchNorm1d(32), (2, 32), 1.9, id="vectors, two"),
        pytest.param(nn.BatchNorm2d(32), (2, 32, 4, 4), 32, id="independent positions: all of them"),
    ],
)
def test_effective_samples_are_the_values_behind_a_channel(norm, shape, expected):
    """Of independent values m_eff counts batch and positions."""
    found, pairs = follow(norm, batches(*shape))
    assert pairs == 64
    assert found[""] == pytest.approx(expected, rel=0.15)


def test_positions_that_are_copies_do_not_count():
    """An image of one value repeated is one sample, however many positions it has."""
    found, _ = follow(nn.BatchNorm2d(32), [x.expand(-1, -1, 4, 4) for x in batches(8, 32, 1, 1)])
    assert found[""] == pytest.approx(8, rel=0.15)


def test_a_checkpointed_layer_is_measured_in_its_first_pass():
    """Where the graph holds no statistics they are computed, and the repeated pass is not heard."""
    net = nn.Sequential(nn.BatchNorm1d(32))
    plain, _ = follow(net, batches(8, 32))
    given = [x.requires_grad_() for x in batches(8, 32)]
    saved, _ = follow(net, given, run=lambda x: checkpoint(net, x, use_reentrant=False))
    assert saved["0"] == pytest.approx(plain["0"], rel=1e-3)


def test_a_checkpointed_layer_is_said_to_be_updated_twice_and_its_plain_twin_is_not():
    """Backward runs it again, which its counter of batches tells in the second batch of each pair."""

    def repeated(run):
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        noise = Noise(net)
        for place, x in enumerate(batches(8, 4, count=8)):
            noise.begin(second=bool(place % 2))
            with noise.listening(noise.hear):
                run(net, x).sum().backward()
            noise.end()
        return noise.repeated

    assert repeated(lambda net, x: checkpoint(net, x, use_reentrant=False)) == {"1": 4}
    assert repeated(lambda net, x: net(x)) == {}


def test_a_frozen_layer_is_not_measured():
    """A layer in eval mode does not normalise by the batch."""
    assert follow(nn.BatchNorm1d(4).eval(), [x.requires_grad_() for x in batches(8, 4)]) == ({}, 0)


def test_pairs_of_changing_layers_are_kept_apart():
    """A layer that is heard in some pairs only has as many pairs as it was heard in, and the noise of those."""
    one, other = nn.BatchNorm1d(32), nn.BatchNorm1d(16)
    noise = Noise(nn.ModuleList([one, other]))
    for place, (x, y) in enumerate(zip(batches(8, 32, count=120), batches(4, 16, count=120), strict=True)):
        noise.begin(second=bool(place % 2))
        with noise.listening(noise.hear):
            one(x)
            if place % 6 > 1:
                other(y)
        noise.end()
    plain = noise.to_plain()
    assert [plain[name][2] for name in ("0", "1")] == [60, 40]
    assert effective(plain)[0] == pytest.approx({"0": 8, "1": 4}, rel=0.2)


def test_batches_that_are_not_told_change_nothing_of_what_is_heard():
    """Who asks only when a batch may be heard, and at times sooner, hears the same batches as who asks every time."""
    every, some = StatisticsWatch(network()), StatisticsWatch(network())
    heard, last, wakes = ([], []), 0, 1
    for batch in range(1, 2101):
        if every.begin_batch():
            heard[0].append(batch)
        every.end_batch(batch)
        if batch >= wakes or batch % 37 == 0:  # an epoch begins
            if some.begin_batch(batch - last):
                heard[1].append(batch)
            last, wakes = batch, batch + some.until_heard()
            some.end_batch(batch)
    assert heard[0] == heard[1]
    assert wakes - last > 1


def test_pairs_are_whole_and_fewer_are_heard_later():
    """Two batches in a row of every ten in the first 320, of every fifty behind them, and one when there are enough."""
    watch = StatisticsWatch(network())
    heard = []
    for batch in range(1, 2101):
        if watch.begin_batch():
            heard.append(batch)
        watch.end_batch(batch)
    early = [batch for batch in heard if batch <= 320]
    late = [batch for batch in heard if 320 < batch <= 1920]
    assert early == [batch + more for batch in range(9, 320, 10) for more in (0, 1)]
    assert late == [batch + more for batch in range(349, 1921, 50) for more in (0, 1)]
    assert [batch for batch in heard if batch > 1920] == [1950, 2000, 2050, 2100]


def test_sums_of_processes_add_up():
    """Pairs that two processes saw count as those of one."""
    norm, parts = nn.BatchNorm1d(32), []
    for seed in (0, 1):
        noise = Noise(norm)
        for place, x in enumerate(batches(8, 32, seed=seed)):
            noise.begin(second=bool(place % 2))
            with noise.listening(noise.hear):
                norm(x)
            noise.end()
        parts.append(noise.to_plain())
    found, pairs = effective(*parts)
    assert pairs == 128
    assert found[""] == pytest.approx(8, rel=0.15)


def test_a_small_batch_of_vectors_is_a_warning_and_a_large_one_is_silent(make_trainer):
    """A batch of 2 in front of BatchNorm1d is said to be noise, one of 64 is not."""

    def said(batch):
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(1280, 12, generator=generator), torch.randint(4, (1280,), generator=generator))
        monitor = BatchNormMonitor(assess=False)
        make_trainer(monitor, max_epochs=1 if batch < 64 else 16, logger=False).fit(
            Healthy(lr=1e-3), DataLoader(data, batch)
        )
        return [f for f in monitor.findings if f.rule == "noisy-batch-statistics"]

    (finding,) = said(2)
    assert finding.severity is Severity.WARNING
    assert finding.data["effective"][finding.layer] < 3
    assert said(64) == []


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch.compile's own
@pytest.mark.parametrize("way", [torch.compile, as_a_part, in_place], ids=lambda way: way.__name__)
def test_compiled_layers_are_measured_like_their_plain_twins(make_trainer, way):
    """No hook reaches them; what one update did to the running statistics tells the batch's variance."""

    def effective_samples(way=None):
        torch._dynamo.reset()
        torch.manual_seed(0)
        monitor, model = BatchNormMonitor(assess=False), Mute(network(), lr=1e-3)
        trained = way(model, backend="eager") if way else model
        make_trainer(monitor, max_epochs=10, logger=False).fit(trained, loader(size=64, batch_size=4))
        (finding,) = [f for f in monitor.findings if f.rule == "noisy-batch-statistics"]
        return finding.data["effective"]

    plain, compiled = effective_samples(), effective_samples(way)
    assert compiled == pytest.approx(plain, rel=1e-3)
