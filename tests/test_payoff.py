"""Something optional is tried, kept while it saves time, and left alone for longer and longer while it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moecache.payoff import GLANCE, LONGEST_REST, REST, TRIAL, WARM_UP, Mean, Payoff

WORK = 5e-3  # seconds per chance


def chances(payoff: Payoff, count: int, *, saves: float, costs: float) -> list[bool]:
    """Take `count` chances; whether each was taken."""
    taken = []
    for _ in range(count):
        payoff.took(WORK + (costs if payoff.on else 0))
        taken.append(payoff.next())
        if taken[-1]:
            payoff.saved(saves)
    return taken


def test_nothing_is_tried_before_the_warm_up_is_over() -> None:
    assert not any(chances(Payoff(), WARM_UP - 1, saves=1, costs=0))


def test_what_saves_more_than_it_costs_stays_on() -> None:
    taken = chances(Payoff(), WARM_UP + 20 * TRIAL, saves=2e-3, costs=1e-3)
    assert taken.index(True) == WARM_UP - 1
    assert all(taken[WARM_UP - 1 :])


def test_what_costs_more_than_it_saves_ends_with_its_trial_and_is_tried_again_after_a_rest() -> None:
    taken = chances(Payoff(), WARM_UP + TRIAL + REST + TRIAL, saves=1e-3, costs=1.2e-3)
    first = taken.index(True)
    off = taken.index(False, first)
    assert off - first == TRIAL
    assert taken.index(True, off) - off == REST


@pytest.mark.parametrize(("costs", "chances_taken"), [(1.2e-3, TRIAL), (1.3e-3, GLANCE), (1, GLANCE)])
def test_a_trial_that_loses_a_twentieth_of_the_time_is_short(costs: float, chances_taken: int) -> None:
    taken = chances(Payoff(), WARM_UP + 2 * TRIAL, saves=1e-3, costs=costs)
    assert sum(taken) == chances_taken


def test_each_trial_in_vain_doubles_the_rest_up_to_a_limit() -> None:
    taken = chances(Payoff(), 6 * LONGEST_REST, saves=0, costs=1e-3)
    rests = [len(run) for run in "".join("10"[not t] for t in taken).split("1") if run][1:-1]
    assert rests[:3] == [REST, 2 * REST, 4 * REST]
    assert rests[-1] == LONGEST_REST
    assert rests == sorted(rests)


def test_it_is_switched_off_when_it_stops_to_pay() -> None:
    payoff = Payoff()
    chances(payoff, WARM_UP + 4 * TRIAL, saves=2e-3, costs=1e-3)
    assert payoff.on
    chances(payoff, 4 * TRIAL, saves=0, costs=1e-3)
    assert not payoff.on


def test_work_that_becomes_slower_for_other_reasons_is_no_gain() -> None:
    payoff = Payoff()
    chances(payoff, WARM_UP, saves=0, costs=0)
    for _ in range(GLANCE - 1):
        payoff.took(WORK + 3e-3)
        payoff.next()
        payoff.saved(1e-3)
    assert payoff.balance == pytest.approx(-2e-3, rel=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_a_mean_lies_within_its_values_and_is_exact_while_there_are_few(values: list[float]) -> None:
    mean = Mean()
    for x in values:
        mean.add(x)
    assert min(values) - 1e-9 <= mean.value <= max(values) + 1e-9
    if len(values) <= 100:
        assert mean.value == pytest.approx(sum(values) / len(values))
