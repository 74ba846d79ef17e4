# SPDX-License-Identifier: Apache-2.0
"""LSUV gives every layer's output variance 1 on a batch, and changes nothing but the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_bn.initialization import initialize
from lightning_bn.lsuv import unit_variance


def convolutional():
    """Convolutions, dropout and BatchNorm, and a linear head."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.BatchNorm2d(16), nn.Tanh()),
        *(nn.ConvTranspose2d(16, 8, 3), nn.Dropout(0.3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)),
    )


def outputs(model, batch):
    """Variance of the output of each layer with weights, with the weights that it has, by an ordinary forward."""
    found = {}
    x = batch
    for place, layer in enumerate(model):
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            found[place] = x.double().var(correction=0).item()
    return found


def test_every_layer_puts_out_variance_1():
    """Measured by an ordinary forward pass afterwards, with the same dropout draws."""
    model, batch = convolutional(), torch.randn(32, 3, 8, 8)
    torch.manual_seed(3)
    initialize(model, "lsuv", batch=batch)
    torch.manual_seed(3)
    assert outputs(model, batch) == {place: pytest.approx(1, abs=1e-3) for place in (0, 2, 5, 9)}


def test_nothing_else_is_changed():
    """Running statistics, modes, random state and gradients are those of a model that has not run."""
    model, batch = convolutional(), torch.randn(32, 3, 8, 8)
    twin = convolutional()
    initialize(twin, "orthogonal", nonlinearity="linear")
    before = torch.get_rng_state()
    initialize(model, "lsuv", batch=batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, dict(twin.named_buffers())[name]) for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_weights_keep_their_direction():
    """Each weight is the orthogonal one times one number."""
    model, twin = convolutional(), convolutional()
    initialize(twin, "orthogonal", nonlinearity="linear")
    report = initialize(model, "lsuv", batch=torch.randn(32, 3, 8, 8))
    for place in (0, 2, 5, 9):
        ratio = (model[place].weight / twin[place].weight).detach()
        assert ratio.std().item() == pytest.approx(0, abs=1e-4 * ratio.mean().item())
    rows = {row.name: row for row in report.rows}
    for name, parameter in model.named_parameters():
        assert rows[name].actual_std == pytest.approx(parameter.std(correction=0).item(), rel=1e-4, abs=1e-7)


def test_attention_stays_as_drawn_and_the_layers_around_it_are_scaled():
    """What attention multiplies by itself cannot be heard; nobody is warned of that."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    report = initialize(layer, "lsuv", batch=torch.randn(8, 5, 16))
    rows = {row.name: row for row in report.rows}
    out = layer.self_attn.out_proj.weight.detach()
    assert torch.allclose(out @ out.T, torch.eye(16), atol=1e-5)
    assert rows["linear1.weight"].actual_std != pytest.approx(1 / math.sqrt(32), rel=1e-3)
    assert not any(row.why for row in report.rows)


def test_a_bias_that_stays_is_not_scaled():
    """A frozen bias is taken out before the variance is measured, and is there again for the next layer."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[0].bias.requires_grad_(False).fill_(5.0)
    batch = torch.randn(64, 6)
    initialize(model, "lsuv", batch=batch)
    first = model[0](batch)
    assert (first - 5).var(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert (model[1](first)).var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_layers_that_share_a_weight_share_its_factor():
    """The first use decides; the second sees the scaled weight."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    batch = torch.randn(64, 6)
    initialize(model, "lsuv", batch=batch)
    assert model[0](batch).var(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert model[2].weight is model[0].weight


def test_a_constant_output_is_left_and_said():
    """Behind a layer that puts out zeros there is nothing to scale to: a warning names the layer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Threshold(1e9, 0.0), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="lsuv did not scale 2: no output, or a constant one"):
        report = initialize(model, "lsuv", batch=torch.randn(16, 4))
    assert report.rows[2].why.startswith("not scaled")


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(torch.ones(8, 3).cumsum(0), id="a tensor"),
        pytest.param((torch.ones(8, 3).cumsum(0),), id="arguments"),
        pytest.param({"input": torch.ones(8, 3).cumsum(0)}, id="keywords"),
    ],
)
def test_the_batch_is_what_the_model_is_called_with(batch):
    """One tensor, a tuple of arguments or a dict of keywords."""
    model = nn.Linear(3, 3)
    initialize(model, "lsuv", batch=batch)
    assert model(torch.ones(8, 3).cumsum(0)).var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_without_a_batch_it_is_an_error():
    """LSUV looks at outputs: the error says so."""
    with pytest.raises(ValueError, match="batch must be what the model is called with, as lsuv looks at outputs, got"):
        initialize(nn.Linear(3, 3), "lsuv")


def test_half_precision_is_measured_in_single():
    """A bfloat16 output whose square would lose the spread still gets variance 1."""
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    batch = torch.randn(256, 64, dtype=torch.bfloat16)
    factors = unit_variance({"": model}, lambda: model(batch))
    exact = (model.weight.double() @ batch.double().T).var(correction=0).rsqrt().item()
    assert factors[""] == pytest.approx(exact, rel=0.02)
