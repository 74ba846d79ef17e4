# SPDX-License-Identifier: Apache-2.0
"""Weights are drawn as wide as the papers say, each from a stream of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_bn.layers import slots
from lightning_bn.schemes import SCHEMES, Fill, check_scheme, draw, fill_for, stream_seed, target_std


@pytest.mark.parametrize(
    ("scheme", "fan_in", "fan_out", "gain", "variance"),
    [
        pytest.param("he", 50, 7, None, 2 / 50, id="He"),
        pytest.param("he_uniform", 50, 7, None, 2 / 50, id="He, uniform"),
        pytest.param("he_fan_out", 50, 7, None, 2 / 7, id="He, fan-out"),
        pytest.param("he_fan_out_uniform", 50, 7, 1.0, 1 / 7, id="He, fan-out, uniform, linear"),
        pytest.param("he", 50, 7, 5 / 3, 25 / 9 / 50, id="He before tanh"),
        pytest.param("xavier", 30, 10, None, 2 / (30 + 10), id="Xavier"),
        pytest.param("xavier_uniform", 30, 10, 5 / 3, 25 / 9 * 2 / (30 + 10), id="Xavier, uniform, before tanh"),
        pytest.param("naive", 50, 7, 3.0, 0.01**2, id="naive, whatever the gain"),
        pytest.param("uniform", 50, 7, None, 0.1**2 / 12, id="U(-0.05, 0.05)"),
        pytest.param(1000.0, 50, 7, None, 1e6, id="N(0, 1000²)"),
        pytest.param("he", 0, 0, None, 2, id="He without inputs"),
    ],
)
def test_the_target_is_that_of_the_paper(scheme, fan_in, fan_out, gain, variance):
    """He: gain²/fan. Xavier: gain²·2/(fan_in + fan_out). Naive, uniform and plain numbers: whatever the layer."""
    assert target_std(scheme, fan_in, fan_out, gain) ** 2 == pytest.approx(variance)


@pytest.mark.parametrize("scheme", ["orthogonal", "lsuv", "pytorch"])
def test_schemes_whose_spread_the_fans_do_not_decide_have_no_target(scheme):
    """Asking for it is an error."""
    with pytest.raises(ValueError, match=f"scheme must be one whose spread the fans decide, got '{scheme}'"):
        target_std(scheme, 3, 3)


@pytest.mark.parametrize("scheme", ["kaiming", "He", "", 0, -1.0, math.inf, math.nan, True, None, [1]])
def test_an_unknown_scheme_is_an_error(scheme):
    """The error lists the schemes, says that a number will do, and shows what was given."""
    with pytest.raises(ValueError, match=r"scheme must be one of he, .*pytorch, or a standard deviation above 0, got"):
        check_scheme(scheme)


@pytest.mark.parametrize("scheme", [*SCHEMES, 1, 0.02, 1000.0])
def test_every_scheme_and_every_positive_number_is_known(scheme):
    """Names pass as they are; numbers become floats."""
    assert check_scheme(scheme) == scheme


def drawn(fill, shape, seed=5):
    values = torch.full(shape, math.nan)
    draw(values, fill, seed)
    return values.double()


def test_a_normal_has_its_standard_deviation_and_tails():
    """Mean, spread and kurtosis of 200,000 draws, within five standard errors."""
    values, n = drawn(Fill("he", "normal", 0.3), (400, 500)), 200_000
    assert values.mean().item() == pytest.approx(0, abs=5 * 0.3 / math.sqrt(n))
    assert values.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(2 * n))
    assert ((values / 0.3) ** 4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / n))


def test_a_uniform_has_its_standard_deviation_and_ends():
    """All values lie within √3 standard deviations, and reach nearly that far."""
    values, n = drawn(Fill("he_uniform", "uniform", 0.3), (400, 500)), 200_000
    assert values.std().item() == pytest.approx(0.3, rel=5 * math.sqrt(0.2 / n))
    assert 0.999 * 0.3 * math.sqrt(3) < values.abs().max() <= 0.3 * math.sqrt(3) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("shape", "blocks", "swapped"),
    [
        pytest.param((40, 60), 1, False, id="wide"),
        pytest.param((60, 40), 1, False, id="tall"),
        pytest.param((90, 30), 3, False, id="three gates"),
        pytest.param((20, 8, 3, 3), 2, False, id="two groups of a convolution"),
        pytest.param((8, 20, 3, 3), 1, True, id="transposed convolution"),
    ],
)
def test_orthogonal_matrices_have_orthogonal_rows_or_columns(shape, blocks, swapped):
    """Each block is gain times a matrix with orthonormal rows, or columns where it is tall."""
    gain = 1.5
    rows = shape[1] if swapped else shape[0] // blocks
    columns = math.prod(shape) // blocks // rows
    values = drawn(Fill("orthogonal", "orthogonal", gain / math.sqrt(max(rows, columns)), 0, blocks, swapped), shape)
    matrices = [(block.transpose(0, 1) if swapped else block).flatten(1) for block in values.chunk(blocks)]
    for matrix in matrices:
        small = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
        assert torch.allclose(small, gain**2 * torch.eye(len(small), dtype=torch.float64), atol=1e-5)
    assert len(matrices) == 1 or not torch.equal(matrices[0], matrices[1])


def test_constants_and_one_raised_block():
    """A constant fills everything, a raised block a quarter."""
    assert drawn(Fill("ones", "constant", value=1.0), (3,)).tolist() == [1, 1, 1]
    assert drawn(Fill("forget", "constant", value=2.0, raised=1), (8,)).tolist() == [0, 0, 2, 2, 0, 0, 0, 0]


def test_a_stream_is_its_own():
    """The same seed gives the same numbers, another seed others, and the global random state is not read or moved."""
    fill, before = Fill("he", "normal", 1.0), torch.get_rng_state()
    one, again, other = drawn(fill, (50,)), drawn(fill, (50,)), drawn(fill, (50,), seed=6)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_seed_depends_on_seed_and_name():
    """Seeds are distinct for distinct names and seeds, also where both together read the same, and fit 63 bits."""
    seeds = [stream_seed(*pair) for pair in [(1, "a"), (2, "a"), (1, "b"), (11, "a"), (1, "1/a")]]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        ("he", "orthogonal"),
        ("xavier_uniform", "orthogonal"),
        ("orthogonal", "orthogonal"),
        ("lsuv", "orthogonal"),
        ("naive", "normal"),
        ("uniform", "uniform"),
        (0.1, "normal"),
    ],
)
def test_recurrent_weights_are_orthogonal_unless_the_scheme_is_blind(scheme, shape):
    """Schemes that look at fans leave recurrent weights orthogonal, gate by gate; the others draw them like all."""
    slot = next(slot for slot in slots(nn.LSTM(4, 8)) if slot.name == "weight_hh_l0")
    fill = fill_for(slot, scheme)
    assert fill.shape == shape
    assert fill.blocks == (4 if shape == "orthogonal" else 1)


@pytest.mark.parametrize("scheme", ["orthogonal", "lsuv"])
def test_an_embedding_is_not_made_orthogonal(scheme):
    """It is looked up, not multiplied: a row of an orthogonal table would shrink with the vocabulary."""
    (slot,) = slots(nn.Embedding(1000, 8))
    assert fill_for(slot, scheme, 1.0) == Fill("he", "normal", 1.0)
