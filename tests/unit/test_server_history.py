"""The last hour of a server: rates from totals, gaps where nothing was measured, and memory that does not grow."""

from __future__ import annotations

import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from status_kit import BLOCK_BYTES, pool, status

from kvferry.connector.server.history import History, Ring, StatusDocument, document


def taken(*steps: int, **options: int) -> History:
    history = History(**options)
    for step in steps:
        history.take(status(step))
    return history


@given(st.lists(st.none() | st.integers(-1000, 1000)), st.integers(1, 20), st.integers(0, 30))
def test_a_ring_keeps_the_newest_values_in_order(values: list[int | None], size: int, count: int) -> None:
    ring = Ring(size)
    for value in values:
        ring.append(value)
    kept = values[-size:]
    assert ring.newest(count) == (kept[-count:] if count else [])


def test_rates_are_what_was_added_in_the_time_between() -> None:
    report = taken(10, 11, 13).report()
    (found,) = report.pools
    host, disk = found.tiers["host"], found.tiers["disk"]
    assert report.times == [1790000020.0, 1790000022.0, 1790000026.0]
    assert report.requests == [None, 470.0, 470.0]
    assert found.hit_rate == [None, 0.65, 0.65]
    assert found.miss_rate == [None, 5.0, 5.0]
    assert (host.hit_rate[1], disk.hit_rate[1]) == (0.45, 0.2)
    assert disk.loaded[1] == pytest.approx(20 * BLOCK_BYTES, rel=1e-3)
    assert disk.stored[2] == pytest.approx(12.5 * BLOCK_BYTES, rel=1e-3)
    assert host.loaded[1] == pytest.approx(63 * BLOCK_BYTES, rel=1e-3)
    assert host.stored[1] == pytest.approx(30 * BLOCK_BYTES, rel=1e-3)
    assert (host.evicted[1], disk.evicted[1]) == (6.5, 2.0)
    assert host.fill == [0.75, 0.825, 0.95]


def test_lookups_are_judged_by_the_slowest_of_a_hundred() -> None:
    report = taken(10, 11).report()
    assert report.lookup_p99 == [1e-4, 1e-4]
    slow = status(12, lookup_seconds=[(1e-4, 9900), (0.5, 9900), (float("inf"), 19_900)])
    history = taken(10, 11)
    history.take(slow)
    assert history.report().lookup_p99[-1] == 0.5  # the last bound stands for what took longer


def test_without_lookups_there_is_no_hit_rate() -> None:
    history = taken(10)
    history.take(msgspec.structs.replace(status(10), now=1790000030.0))
    report = history.report()
    assert report.pools[0].hit_rate == [None, None]
    assert report.pools[0].tiers["disk"].loaded == [None, 0.0]
    assert report.lookup_p99[-1] is None


def test_a_tier_without_a_bound_has_no_fill() -> None:
    counters = pool().counters.tiers["disk"]
    counters.capacity_bytes = None
    history = History()
    history.take(status(10, pool(10, redis=counters)))
    assert history.report().pools[0].tiers["redis"].fill == [None]


def test_totals_that_fell_make_no_rate() -> None:
    """A pool that was closed and opened again between two samples counts from zero."""
    history = taken(10, 11)
    history.take(status(12, pool(1)))
    report = history.report()
    assert report.pools[0].tiers["disk"].loaded[-1] is None
    assert report.pools[0].hit_rate[-1] is None


def test_a_clock_that_went_back_makes_no_rate() -> None:
    assert taken(11, 10).report().requests == [None, None]


def test_only_what_is_new_is_reported() -> None:
    history = taken(10, 11, 12, 13)
    assert history.report(since=0).count == 4
    assert history.report(since=3).times == [1790000026.0]
    assert history.report(since=4).times == []
    assert history.report(since=-2).times == [1790000024.0, 1790000026.0]
    assert history.report(since=999).times == []
    assert len(history.report(since=2).pools[0].tiers["disk"].fill) == 2


def test_a_pool_that_is_gone_is_forgotten_and_a_new_one_begins_at_its_opening() -> None:
    history = taken(10, 11)
    history.take(status(12, pool(12), pool(1, tenant="late", fingerprint="11111111")))
    history.take(status(13, pool(13), pool(2, tenant="late", fingerprint="11111111")))
    first, late = history.report().pools
    assert (len(first.hit_rate), len(late.hit_rate)) == (4, 2)
    assert late.hit_rate == [None, 0.65]
    history.take(status(14, pool(14)))
    assert [one.tenant for one in history.report().pools] == [""]


def test_memory_is_bounded() -> None:
    history = History(points=50, max_pools=3)
    for step in range(1, 200):
        history.take(status(step, *(pool(step, tenant=f"t{number}") for number in range(5))))
    report = history.report()
    assert (len(report.times), report.count) == (50, 199)
    assert [one.tenant for one in report.pools] == ["t0", "t1", "t2"]
    assert {len(one.hit_rate) for one in report.pools} == {50}
    ring = Ring(1800)
    for number in range(4000):
        ring.append(number)
    assert sys.getsizeof(ring._values) < 1800 * 8 * 1.3


def test_the_document_is_json_that_can_be_read_back() -> None:
    made = document(status(10), taken(10, 11).report())
    assert made.lookups == 9000
    found = msgspec.json.decode(
        msgspec.json.encode(made), type=StatusDocument, dec_hook=lambda kind, value: kind(value)
    )
    assert found.history == made.history
    assert found.status.pools[0].counters.tiers == made.status.pools[0].counters.tiers
