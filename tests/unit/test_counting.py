"""Running totals become deltas: each block is counted once, sizes are shown as they are."""

from __future__ import annotations

import msgspec

from kvferry.connector.counters import ServiceCounters, TierCounters
from kvferry.connector.counting import CountersDelta
from kvferry.connector.manager import Counters
from kvferry.connector.metrics import Counts


def totals(**tier: object) -> ServiceCounters:
    return ServiceCounters(
        decisions=Counters(),
        slots=10,
        used_slots=4,
        capacity_bytes=1000,
        host_blocks=3,
        host_evictions=7,
        leases=2,
        reservations=1,
        pending_transfers=0,
        tiers={"disk": TierCounters(**tier)},
    )


def test_what_was_counted_is_not_counted_again() -> None:
    delta, counts = CountersDelta(), Counts()
    delta.add(totals(stored_blocks=5, refused={"mac": 2}), counts)
    first = counts.take()
    assert first["kvferry_stored_blocks_total"] == {"disk": 5}
    assert first["kvferry_refusals_total"] == {"disk|mac": 2}
    assert first["kvferry_evictions_total"]["host"] == 7
    delta.add(totals(stored_blocks=6, refused={"mac": 2, "key": 1}), counts)
    second = counts.take()
    assert second["kvferry_stored_blocks_total"] == {"disk": 1}
    assert second["kvferry_refusals_total"] == {"disk|mac": 0, "disk|key": 1}
    assert second["kvferry_evictions_total"]["host"] == 0


def test_sizes_and_states_are_shown_as_they_are() -> None:
    counts = Counts()
    CountersDelta().add(totals(blocks=9, breaker="open", capacity_bytes=None), counts)
    shown = counts.take()
    assert shown["kvferry_tier_used_bytes"]["host"] == 400
    assert shown["kvferry_tier_blocks"] == {"host": 3, "disk": 9}
    assert shown["kvferry_breaker_state"] == {"disk": 2}
    assert "disk" not in shown["kvferry_tier_capacity_bytes"], "a tier without a bound has no capacity"


def test_lost_writes_grow_too() -> None:
    delta, counts = CountersDelta(), Counts()
    lost = msgspec.structs.replace(totals(), decisions=Counters(lost_writes=3))
    delta.add(lost, counts)
    delta.add(lost, counts)
    assert counts.take()["kvferry_lost_writes_total"] == {"": 3}
