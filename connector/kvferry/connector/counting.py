"""From a service's totals to metrics: what has grown since the last look, and what is shown as it is.

Whoever reports for a service keeps a ``CountersDelta`` and shows it the totals now and then: an engine for its
embedded service, the cache server for each of its pools.

Owned by one thread.
"""

from __future__ import annotations

from kvferry.connector import metrics
from kvferry.connector.counters import ServiceCounters, TierCounters
from kvferry.connector.service import HOST

__all__ = ["CountersDelta"]

_BREAKER_STATES = {"closed": 0, "half_open": 1, "open": 2}
_TIER_TOTALS = {
    "loaded_blocks": metrics.LOADED_BLOCKS,
    "loaded_bytes": metrics.LOADED_BYTES,
    "failed_loads": metrics.FAILED_LOADS,
    "stored_blocks": metrics.STORED_BLOCKS,
    "stored_bytes": metrics.STORED_BYTES,
    "failed_stores": metrics.FAILED_STORES,
    "shed_stores": metrics.SHED_STORES,
    "no_room_stores": metrics.NO_ROOM_STORES,
    "asked_blocks": metrics.ASKED_BLOCKS,
    "missing_loads": metrics.MISSING_LOADS,
    "late_transfers": metrics.LATE_TRANSFERS,
    "evictions": metrics.EVICTIONS,
}


class CountersDelta:
    """Turns one service's running totals into counts."""

    def __init__(self) -> None:
        self._last_tiers: dict[str, TierCounters] = {}
        self._host_evictions = 0
        self._lost_writes = 0

    def add(self, totals: ServiceCounters, counts: metrics.Counts) -> None:
        """Count what has grown since the last call, and show the sizes as they are now.

        Args:
            totals: The service's.
            counts: Where to; the caller takes the deltas from there.
        """
        counts.show(metrics.LEASES, totals.leases)
        counts.show(metrics.RESERVATIONS, totals.reservations)
        counts.show(metrics.TIER_BLOCKS, totals.host_blocks, HOST)
        counts.show(metrics.TIER_CAPACITY_BYTES, totals.capacity_bytes, HOST)
        counts.show(metrics.TIER_USED_BYTES, totals.used_bytes, HOST)
        counts.add(metrics.EVICTIONS, totals.host_evictions - self._host_evictions, HOST)
        self._host_evictions = totals.host_evictions
        lost = totals.decisions.lost_writes
        if lost > self._lost_writes:
            counts.add(metrics.LOST_WRITES, lost - self._lost_writes)
            self._lost_writes = lost
        for name, tier in totals.tiers.items():
            _add_tier(counts, name, tier, self._last_tiers.get(name, TierCounters()))
        self._last_tiers = totals.tiers


def _add_tier(counts: metrics.Counts, name: str, tier: TierCounters, last: TierCounters) -> None:
    for attribute, metric in _TIER_TOTALS.items():
        grown = getattr(tier, attribute) - getattr(last, attribute)
        if grown:
            counts.add(metric, grown, name)
    for reason, blocks in tier.refused.items():
        counts.add(metrics.REFUSALS, blocks - last.refused.get(reason, 0), name, reason)
    counts.show(metrics.TIER_BLOCKS, tier.blocks, name)
    counts.show(metrics.TIER_USED_BYTES, tier.used_bytes, name)
    if tier.capacity_bytes is not None:
        counts.show(metrics.TIER_CAPACITY_BYTES, tier.capacity_bytes, name)
    counts.show(metrics.TIER_QUEUED_BLOCKS, tier.queued_blocks, name)
    counts.show(metrics.BREAKER, _BREAKER_STATES.get(tier.breaker, 2), name)
