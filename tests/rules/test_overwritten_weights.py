# SPDX-License-Identifier: Apache-2.0
"""Weights that look loaded are named before they are overwritten, with the pattern that keeps them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lightning_bn.findings import Severity
from lightning_bn.rules.overwritten_weights import RULE, overwritten_weights
from lightning_bn.scope import Scope
from lightning_bn.stats.freshness import why_not_drawn, why_not_new


def marks_of(net):
    """What tells the parameters of a network from fresh ones, by name."""
    marks = {name: why_not_drawn(value) for name, value in net.named_parameters()}
    for path, module in net.named_modules():
        if isinstance(module, nn.BatchNorm1d):
            marks |= {f"{path}.{name}": why_not_new(module) for name in ("weight", "bias")}
    return {name: mark for name, mark in marks.items() if mark}


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


def trained():
    """The same after 40 steps on random labels."""
    net = network()
    inputs, labels = torch.randn(128, 64), torch.randint(2, (128,))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net


def test_a_trained_network_is_a_warning_and_its_fresh_twin_is_none():
    """A weight and a BatchNorm layer that were trained are named with what tells them; just built, nothing is."""
    finding = overwritten_weights(marks_of(trained()), 6, "he")
    assert (finding.rule, finding.severity) == (RULE, Severity.WARNING)
    assert {"0.weight", "1.weight", "1.bias"} <= set(finding.data["marks"])
    assert "1.weight (its running statistics have seen 40 batches)" in finding.evidence
    assert overwritten_weights(marks_of(network()), 6, "he") is None


@pytest.mark.parametrize(
    ("number", "words"),
    [
        pytest.param(1, "1 of 20 parameters that he is about to overwrite holds values", id="one"),
        pytest.param(2, "2 of 20 parameters that he is about to overwrite hold values", id="two"),
        pytest.param(3, "leaves: p0 (odd), p1 (odd), p2 (odd); they were loaded", id="three are named"),
        pytest.param(5, "p2 (odd) and 2 more; they were loaded, trained or set on purpose", id="five are counted"),
    ],
)
def test_the_evidence_counts_names_and_claims_no_more_than_was_seen(number, words):
    """Number, total, scheme, the first three with what was seen, and three ways by which it may have come."""
    marks = {f"p{place}": "odd" for place in range(number)}
    finding = overwritten_weights(marks, 20, "he")
    assert words in finding.evidence
    assert finding.data["marks"] == marks
    assert (finding.data["total"], finding.data["scheme"]) == (20, "he")
    assert json.loads(json.dumps(dict(finding.data))) == dict(finding.data)


@pytest.mark.parametrize(
    ("names", "globs"),
    [
        pytest.param(["backbone.0.weight", "backbone.1.bias"], ["backbone.*"], id="one backbone"),
        pytest.param(["net.body.0.weight", "net.body.12.weight"], ["net.body.*"], id="deep"),
        pytest.param(["net.1.weight", "net.12.weight"], ["net.*"], id="numbers that begin alike"),
        pytest.param(["head.weight", "head.bias"], ["head.*"], id="one layer"),
        pytest.param(["a.weight", "b.0.weight", "b.1.weight"], ["a.*", "b.*"], id="nothing in common"),
        pytest.param(["scale", "b.weight"], ["scale", "b.*"], id="a parameter of the model itself"),
    ],
)
def test_the_advice_names_the_deepest_module_that_holds_them_all(names, globs):
    """One pattern for the module that holds all named parameters, else one for each outermost module."""
    finding = overwritten_weights(dict.fromkeys(names, "odd"), 20, "he")
    assert finding.data["exclude"] == globs
    assert finding.advice == f"to keep them, pass exclude={globs}"


def test_the_advice_keeps_what_was_named():
    """``exclude`` with the patterns of the advice leaves every named parameter alone, and nothing outside of them."""
    model = nn.ModuleDict({"backbone": trained(), "head": nn.Linear(2, 2)})
    marks = marks_of(model)
    exclude = overwritten_weights(marks, 8, "he").data["exclude"]
    kept = set(Scope(exclude=exclude).outside(model))
    assert set(marks) <= kept == {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
