# SPDX-License-Identifier: Apache-2.0
"""Findings survive JSON, pickle and unknown keys; severities have an order."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch

from lightning_bn.findings import Finding, NonFiniteError, Severity

FULL = Finding(
    "non-finite-output",
    Severity.WARNING,
    "3 of 8 values are NaN",
    "look at the logarithm",
    layer="net.2",
    step=7,
    epoch=1,
    data={"nan": 3, "shapes": [[4, 2]], "harmless": True, "largest": 2.5, "kind": None},
)
LEAN = Finding("not-watched", Severity.INFO, "it is compiled", "")


@pytest.mark.parametrize("finding", [pytest.param(FULL, id="every field"), pytest.param(LEAN, id="required fields")])
def test_a_finding_survives_json(finding):
    """What is written as JSON and read back is the same finding."""
    line = json.dumps(finding.to_dict(), allow_nan=False)
    assert Finding.from_dict(json.loads(line)) == finding


def test_keys_that_a_finding_does_not_have_are_passed_over():
    """A line of a later version, or with a time and a run, is still read."""
    assert Finding.from_dict({**FULL.to_dict(), "time": "now", "run": 3}) == FULL


@pytest.mark.parametrize("key", ["rule", "severity", "evidence", "advice"])
def test_a_missing_key_is_named(key):
    """Without one of the four required keys there is no finding, and the error names the key."""
    row = {name: value for name, value in FULL.to_dict().items() if name != key}
    with pytest.raises(KeyError, match=key):
        Finding.from_dict(row)


@pytest.mark.parametrize("key", ["layer", "step", "epoch", "data"])
def test_an_optional_key_may_be_missing(key):
    """What a finding need not have is filled with nothing."""
    row = {name: value for name, value in FULL.to_dict().items() if name != key}
    assert not getattr(Finding.from_dict(row), key)


def test_an_unknown_severity_is_an_error():
    """A severity that there is not is never taken for another one."""
    with pytest.raises(ValueError, match="fatal"):
        Finding.from_dict({**FULL.to_dict(), "severity": "fatal"})


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        pytest.param(math.nan, "NaN", id="NaN"),
        pytest.param(math.inf, "Infinity", id="+inf"),
        pytest.param(-math.inf, "-Infinity", id="-inf"),
        pytest.param([1.0, math.nan], [1.0, "NaN"], id="inside a list"),
        pytest.param({"a": (math.inf, 2)}, {"a": ["Infinity", 2]}, id="nested"),
        pytest.param({3: "x"}, {"3": "x"}, id="number as key"),
        pytest.param({4}, [4], id="set"),
        pytest.param(torch.float16, "torch.float16", id="other object"),
        pytest.param(1.5, 1.5, id="healthy twin"),
    ],
)
def test_data_become_plain_json(value, plain):
    """NaN and infinities become strings, containers lists and dictionaries, other objects their text."""
    row = Finding("r", Severity.INFO, "e", "", data={"value": value}).to_dict()
    assert row["data"]["value"] == plain
    json.dumps(row, allow_nan=False)


def test_a_finding_cannot_be_changed():
    """A finding that was said stays what it was."""
    with pytest.raises(FrozenInstanceError):
        FULL.rule = "other"


@pytest.mark.parametrize(
    ("heavy", "light"),
    [
        pytest.param(Severity.ERROR, Severity.WARNING, id="error over warning"),
        pytest.param(Severity.WARNING, Severity.INFO, id="warning over info"),
        pytest.param(Severity.ERROR, Severity.INFO, id="error over info"),
    ],
)
def test_a_worse_severity_outweighs_a_lighter_one(heavy, light):
    """Error outweighs warning, warning outweighs info, and never the other way round."""
    assert heavy.outweighs(light)
    assert not light.outweighs(heavy)


@pytest.mark.parametrize("severity", list(Severity))
def test_no_severity_outweighs_itself(severity):
    """What was said once is not said again for being as bad as before."""
    assert not severity.outweighs(severity)


def test_an_error_is_pickled_with_its_findings():
    """A spawned process hands message and findings to its parent."""
    error = pickle.loads(pickle.dumps(NonFiniteError("the report", [FULL, LEAN])))  # noqa: S301  (our own bytes)
    assert type(error) is NonFiniteError
    assert (str(error), error.findings) == ("the report", (FULL, LEAN))


def test_an_error_is_a_runtime_error_without_findings_by_default():
    """Code that catches RuntimeError catches it, and its message is the report."""
    with pytest.raises(RuntimeError, match="the report") as caught:
        raise NonFiniteError("the report")
    assert caught.value.findings == ()
