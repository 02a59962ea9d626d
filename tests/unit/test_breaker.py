"""The circuit breaker: closed, open, half open with one probe, pauses that double up to a cap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.connector.breaker import BreakerState, CircuitBreaker


@pytest.fixture
def breaker() -> CircuitBreaker:
    return CircuitBreaker(failures_to_open=3, first_pause_s=1.0, max_pause_s=4.0, probe_s=10.0)


def opened(breaker: CircuitBreaker, now: float) -> CircuitBreaker:
    for _ in range(3):
        breaker.fail(now)
    return breaker


def test_single_failures_do_not_open_it(breaker: CircuitBreaker) -> None:
    for _ in range(5):
        assert not breaker.fail(0.0)
        assert not breaker.fail(0.0)
        breaker.succeed()
    assert breaker.allow(0.0)


def test_failures_in_a_row_open_it(breaker: CircuitBreaker) -> None:
    assert [breaker.fail(5.0) for _ in range(3)] == [False, False, True]
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allow(5.99)


def test_after_the_pause_exactly_one_probe_goes_through(breaker: CircuitBreaker) -> None:
    opened(breaker, 5.0)
    assert breaker.would_allow(6.0)
    assert [breaker.allow(6.0) for _ in range(3)] == [True, False, False]
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.succeed()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.allow(6.0)


def test_each_failed_probe_doubles_the_pause_up_to_the_cap(breaker: CircuitBreaker) -> None:
    opened(breaker, 0.0)
    now = 0.0
    for pause in (1.0, 2.0, 4.0, 4.0):
        assert not breaker.allow(now + pause - 0.01)
        now += pause
        assert breaker.allow(now)
        assert breaker.fail(now)
    now += 4.0
    assert breaker.allow(now)
    breaker.succeed()
    opened(breaker, now)
    assert breaker.allow(now + 1.0)  # success forgets the long pauses


def test_an_unanswered_probe_counts_as_failed(breaker: CircuitBreaker) -> None:
    opened(breaker, 0.0)
    assert breaker.allow(1.0)
    assert not breaker.allow(10.9)
    assert not breaker.allow(11.0)  # given up: open for two seconds more
    assert breaker.state is BreakerState.OPEN
    assert breaker.allow(13.0)


def test_late_failures_of_earlier_calls_do_not_lengthen_the_pause(breaker: CircuitBreaker) -> None:
    opened(breaker, 0.0)
    assert not breaker.fail(0.5)
    assert breaker.allow(1.0)


@given(st.lists(st.tuples(st.sampled_from(["allow", "fail", "succeed"]), st.floats(0, 20)), max_size=60))
def test_it_never_stays_open_for_longer_than_probe_and_longest_pause(steps: list[tuple[str, float]]) -> None:
    breaker = CircuitBreaker(failures_to_open=2, first_pause_s=1.0, max_pause_s=4.0, probe_s=10.0)
    now = 0.0
    for step, later in steps:
        now += later
        if step == "allow":
            breaker.allow(now)
        elif step == "fail":
            breaker.fail(now)
        else:
            breaker.succeed()
    assert any(breaker.allow(now + wait) for wait in (0.0, 4.0, 10.0, 14.0, 18.0))
