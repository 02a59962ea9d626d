"""The engine's speed is learned from steps that tell it, and from nothing else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.engines.prefill import MIN_STEPS, MIN_TOKENS, PrefillRate

TOKEN_S = 0.0001
DECODE_S = 0.01


class Engine:
    """Plans ``ahead`` steps before the first of them is through, and runs them one after the other."""

    def __init__(self, ahead: int = 1, noise: float = 0.0) -> None:
        self.rate = PrefillRate()
        self.now = 100.0
        self._ahead = ahead
        self._noise = noise
        self._random = random.Random(5)
        self._under_way: list[int] = []

    def step(self, tokens: int) -> None:
        self.now += 0.0001
        self.rate.step_planned(tokens, self.now)
        self._under_way.append(tokens)
        if len(self._under_way) >= self._ahead:
            self._end()

    def idle(self, seconds: float) -> None:
        while self._under_way:
            self._end()
        self.now += seconds

    def _end(self) -> None:
        seconds = DECODE_S + self._under_way.pop(0) * TOKEN_S
        self.now += seconds * self._random.lognormvariate(0.0, self._noise)
        self.rate.step_ended(self.now)


def test_nothing_is_known_before_enough_steps() -> None:
    engine = Engine()
    for _ in range(MIN_STEPS - 1):
        engine.step(2048)
        assert engine.rate.tokens_per_s is None
        assert engine.rate.seconds(64) is None
    engine.step(2048)
    assert engine.rate.seconds(2048) == pytest.approx(2048 * TOKEN_S + DECODE_S, rel=0.01)


def test_steps_that_only_decode_or_hardly_prefill_tell_nothing() -> None:
    engine = Engine()
    for tokens in [0, 1, MIN_TOKENS - 1] * 20:
        engine.step(tokens)
    assert engine.rate.tokens_per_s is None


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_rate_is_right_however_far_the_engine_plans_ahead(ahead: int) -> None:
    engine = Engine(ahead)
    for _ in range(10):
        engine.step(4096)
        for _ in range(5):
            engine.step(8)  # decoding, in a tenth of the time
    engine.idle(0.0)
    assert engine.rate.seconds(4096) == pytest.approx(4096 * TOKEN_S + DECODE_S, rel=0.02)


@pytest.mark.parametrize("ahead", [1, 2])
def test_time_without_work_does_not_count(ahead: int) -> None:
    engine = Engine(ahead)
    for _ in range(10):
        engine.step(4096)
        engine.idle(30.0)
    assert engine.rate.tokens_per_s == pytest.approx(1 / TOKEN_S, rel=0.05)


def test_noise_and_a_step_that_was_held_up_do_not_move_it() -> None:
    engine = Engine(noise=0.2)
    for number in range(30):
        engine.step(2048)
        if number % 7 == 3:
            engine.rate.step_planned(2048, engine.now)
            engine.now += 20.0
            engine.rate.step_ended(engine.now)
    assert engine.rate.tokens_per_s == pytest.approx(1 / TOKEN_S, rel=0.2)


def test_large_steps_say_more_than_small_ones() -> None:
    engine = Engine()
    for _ in range(5):
        engine.step(8192)
        engine.step(MIN_TOKENS)
    assert engine.rate.tokens_per_s == pytest.approx(1 / TOKEN_S, rel=0.05)


def test_an_engine_that_became_faster_is_followed() -> None:
    engine = Engine()
    for _ in range(40):
        engine.step(2048)
    for _ in range(40):
        engine.rate.step_planned(2048, engine.now)
        engine.now += 2048 * TOKEN_S / 10
        engine.rate.step_ended(engine.now)
    assert engine.rate.tokens_per_s == pytest.approx(10 / TOKEN_S, rel=0.05)


@pytest.mark.parametrize("lost", [1, 5, 20])
def test_ends_that_were_not_told_do_no_harm_after_a_pause(lost: int) -> None:
    engine = Engine()
    for _ in range(lost):
        engine.rate.step_planned(4096, engine.now)
    engine.idle(10.0)
    for _ in range(40):
        engine.step(2048)
        for _ in range(3):
            engine.step(0)
    assert engine.rate.tokens_per_s == pytest.approx(1 / TOKEN_S, rel=0.1)


def test_an_end_without_a_step_is_ignored() -> None:
    rate = PrefillRate()
    rate.step_ended(1.0)
    assert rate.tokens_per_s is None


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 100_000), st.floats(0.0, 1e6, allow_nan=False)), max_size=60
    )
)
def test_whatever_is_told_the_rate_is_none_or_positive(told: list[tuple[bool, int, float]]) -> None:
    rate, now = PrefillRate(), 0.0
    for is_plan, tokens, later in told:
        now += later
        if is_plan:
            rate.step_planned(tokens, now)
        else:
            rate.step_ended(now)
        assert rate.tokens_per_s is None or rate.tokens_per_s > 0
