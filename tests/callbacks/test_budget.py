# SPDX-License-Identifier: Apache-2.0
"""The interval of a monitor grows until it costs no more than it may."""

from __future__ import annotations

import pytest

from lightning_bn.callbacks.budget import LOOKS, WARM_UP, Budget


def run(budget, spent, rest, interval, steps):
    return [share for _ in range(steps) if (share := budget.judge(spent, rest, interval)) is not None]


def test_an_interval_that_costs_too_much_grows_once_to_where_it_does_not():
    """Ten per cent of every step at a limit of two are brought down to every fifth step, and that is the end of it."""
    budget = Budget(0.02)
    assert run(budget, 0.1, 1.0, 1, 100) == [pytest.approx(0.1)]
    assert budget.factor == 5


def test_an_interval_that_costs_little_stays():
    """Below the limit nothing changes, however long it runs."""
    budget = Budget(0.02)
    assert run(budget, 0.1, 1.0, 50, 100) == []
    assert budget.factor == 1


def test_without_a_limit_nothing_is_judged():
    """``None`` keeps the interval at any cost."""
    budget = Budget(None)
    assert run(budget, 9.0, 1.0, 1, 100) == []


def test_the_first_steps_are_not_judged():
    """Neither the first due steps, which warm up, nor fewer than eight others widen anything."""
    budget = Budget(0.02)
    assert run(budget, 9.0, 1.0, 1, WARM_UP + LOOKS - 1) == []
    assert len(run(budget, 9.0, 1.0, 1, 1)) == 1


def test_one_slow_step_is_no_reason():
    """The median decides: a step that was held up by something else does not."""
    budget = Budget(0.02)
    run(budget, 0.01, 1.0, 1, 50)
    assert run(budget, 50.0, 1.0, 1, 1) == []


def test_the_clock_counts_what_runs_inside_of_it():
    """Of a due step the time inside the blocks is told apart from the rest."""
    budget = Budget(0.02)
    budget.begin()
    with budget:
        sum(range(100_000))
    with budget:
        sum(range(100_000))
    budget.end()
    spent, rest = budget.latest
    assert spent > 10 * rest >= 0
