"""``settle`` of the embedded service: when it says yes, another engine finds the blocks; it says no in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from test_embedded import Worker, prefix, wrapped
from test_embedded_shared import Place, Start, common_tier, fetch, place, start

from kvferry.connector.errors import ClosedError
from kvferry.connector.testing.faulty import SlowTier

__all__ = ["place", "start"]

DELAY_S = 0.1
LONG_S = 20.0


def slow(place: Place, **options: object) -> Place:
    return {**place, "type": "slow-common", **options}


def slow_tier(worker: Worker) -> SlowTier:
    tier = worker.service._tiers[-1].tier
    assert isinstance(tier, SlowTier)
    return tier


def timed(call: Callable[[], bool]) -> tuple[bool, float]:
    started = time.monotonic()
    return call(), time.monotonic() - started


@pytest.mark.parametrize(
    "rule",
    [{}, {"admission": "second-touch"}, {"write": "back"}],
    ids=["through", "second-touch", "write-back"],
)
def test_the_moment_it_says_yes_another_engine_finds_the_blocks(
    start: Start, place: Place, rule: dict[str, object]
) -> None:
    first, second, keys = start(slow(place, **rule)), start(place), prefix(12)
    slow_tier(first).delay_s = DELAY_S
    first.save(keys)
    assert common_tier(second).contains(keys) == [False] * 12
    assert first.service.settle(keys, LONG_S)
    assert common_tier(second).contains(keys) == [True] * 12
    assert fetch(second, keys) == 12
    first.assert_nothing_leaked()


def test_without_a_settle_what_admission_keeps_back_is_not_found(start: Start, place: Place) -> None:
    first, second, keys = start(place | {"admission": "second-touch"}), start(place), prefix(4)
    first.save(keys)
    first.settle()
    assert fetch(second, keys) == 0


def test_it_waits_no_longer_than_its_deadline_and_the_blocks_come_later(start: Start, place: Place) -> None:
    first, second, keys = start(place), start(place), prefix(4)
    common_tier(first).may_store.clear()
    first.save(keys)
    is_visible, seconds = timed(lambda: first.service.settle(keys, 0.05))
    assert not is_visible
    assert 0.04 < seconds < LONG_S / 2
    common_tier(first).may_store.set()
    assert first.wait_until(lambda: common_tier(second).contains(keys) == [True] * 4)
    assert first.service.settle(keys, LONG_S)


def test_without_time_it_still_has_the_blocks_written(start: Start, place: Place) -> None:
    first, second, keys = start(place | {"admission": "second-touch"}), start(place), prefix(4)
    common_tier(first).may_store.clear()
    first.save(keys)
    assert not first.service.settle(keys, 0.0)
    common_tier(first).may_store.set()
    first.settle()
    assert first.service.settle(keys, 0.0), "what is visible needs no time"
    assert fetch(second, keys) == 4


def test_a_tier_that_fails_ends_the_wait(start: Start, place: Place) -> None:
    worker, keys = start(place), prefix(4)
    common_tier(worker).is_dead = True
    worker.save(keys)
    is_visible, seconds = timed(lambda: worker.service.settle(keys, LONG_S))
    assert not is_visible
    assert seconds < LONG_S / 2
    worker.assert_nothing_leaked()


def test_without_a_shared_tier_it_returns_at_once() -> None:
    keys = prefix(4)
    worker = Worker(tiers=[wrapped(rate=1.0, modes=["slow"], slow_s=LONG_S)])
    try:
        worker.save(keys)
        is_visible, seconds = timed(lambda: worker.service.settle(keys, LONG_S))
        assert is_visible
        assert seconds < LONG_S / 2
    finally:
        worker.close(0.0)


def test_it_sleeps_while_it_waits(start: Start, place: Place) -> None:
    worker, keys = start(slow(place)), prefix(4)
    slow_tier(worker).delay_s = 0.4
    worker.save(keys)
    before = time.thread_time()
    assert worker.service.settle(keys, LONG_S)
    assert time.thread_time() - before < 0.1


def test_what_ends_meanwhile_is_taken_in(start: Start, place: Place) -> None:
    """It does what ``poll`` does, so that nothing is lost by waiting."""
    first, second, keys = start(place), start(slow(place)), prefix(8)
    first.save(keys[:2])
    first.settle()
    assert fetch(second, keys[:1]) == 1
    second.service.prefetch("reader", keys[:2])
    slow_tier(second).delay_s = DELAY_S
    second.save(keys[2:])
    assert second.service.settle(keys[2:], LONG_S)
    events = [event for event in second.service.take_events() if event.kind == "stored"]
    assert {key for event in events for key in event.keys} >= set(keys[2:])
    second.service.release_owner("reader")


def test_a_closed_service_says_so(start: Start, place: Place) -> None:
    worker = start(place)
    worker.close(1.0)
    with pytest.raises(ClosedError):
        worker.service.settle(prefix(1), 1.0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvferry-common")]
