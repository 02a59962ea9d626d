"""The last hour of a cache server in rings of fixed size: fill, hit rate and throughput of each tier.

``History.take`` takes a sample of the server's totals and keeps what happened since the last one;
``History.report`` hands out the newest samples as columns. Memory is bounded: an array per column, and only
for pools that exist, of which at most ``max_pools`` are followed.

Threading: one thread takes samples, any thread reads them.
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Mapping

import msgspec

from kvferry.connector.counters import ServiceCounters, TierCounters
from kvferry.connector.server.status import PoolStatus, ServerStatus
from kvferry.connector.service import HOST

__all__ = ["History", "HistoryReport", "PoolHistory", "Ring", "StatusDocument", "TierHistory", "document"]

INTERVAL_S = 2.0
POINTS = 1800
MAX_POOLS = 256
_DIGITS = 4
_NONE = float("nan")

Column = list[float | None]
"""Samples, oldest first; None where there was nothing to measure."""


class TierHistory(msgspec.Struct, frozen=True, kw_only=True):
    """One tier of a pool."""

    fill: Column
    """Used part of its capacity, 0 to 1; none without a capacity."""
    hit_rate: Column
    """Part of the looked-up blocks that it would have delivered, 0 to 1; none without lookups."""
    loaded: Column
    """Bytes a second brought from it; from the host: leased by engines."""
    stored: Column
    """Bytes a second written to it; into the host: saved by engines."""
    evicted: Column
    """Blocks a second evicted from it."""


class PoolHistory(msgspec.Struct, frozen=True, kw_only=True):
    """One pool. Its columns end with the newest sample and begin when it was opened."""

    tenant: str
    fingerprint: str
    hit_rate: Column
    """Part of the looked-up blocks that were found, 0 to 1; none without lookups."""
    miss_rate: Column
    """Lookups a second that ended at a missing block."""
    tiers: dict[str, TierHistory]


class HistoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """The newest samples."""

    interval_s: float
    count: int
    """Samples that were ever taken; what to give as ``since`` the next time."""
    times: list[float]
    """Unix time of each sample, oldest first."""
    requests: Column
    """Requests a second."""
    lookup_p99: Column
    """Seconds within which 99 of 100 lookups were answered, the upper bound of a bucket; the last bound also
    stands for what took longer."""
    pools: list[PoolHistory]


class StatusDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What ``/status.json`` holds."""

    status: ServerStatus
    """``lookup_seconds`` without the infinite bound, which JSON can't write."""
    lookups: int
    """Lookups since the start."""
    history: HistoryReport


class Ring:
    """The newest values of a column, in 8 bytes each. Not thread-safe.

    Values are rounded when they come, so that handing out an hour of them takes no time worth speaking of from the
    thread that answers engines.
    """

    def __init__(self, size: int) -> None:
        self._values = array("d")
        self._size = size
        self._next = 0

    def append(self, value: float | None) -> None:
        """Add a value; the oldest goes when the ring is full."""
        value = _NONE if value is None else float(f"{value:.{_DIGITS}g}")
        if len(self._values) < self._size:
            self._values.append(value)
            return
        self._values[self._next] = value
        self._next = (self._next + 1) % self._size

    def newest(self, count: int) -> Column:
        """Return the newest values, oldest first, rounded; fewer if there are not as many."""
        ordered = self._values[self._next :] + self._values[: self._next]
        return [None if value != value else value for value in ordered[max(0, len(ordered) - count) :]]


class _Tier:
    """Rings of a tier and the totals they were last moved on from."""

    def __init__(self, points: int) -> None:
        self.rings = {name: Ring(points) for name in TierHistory.__struct_fields__}
        self.last = (0, 0, 0)

    def append(
        self, fill: float | None, hit_rate: float | None, totals: tuple[int, int, int], seconds: float | None
    ) -> None:
        loaded, stored, evicted = (
            _rate(now, before, seconds) for now, before in zip(totals, self.last, strict=True)
        )
        self.last = totals
        values = dict(fill=fill, hit_rate=hit_rate, loaded=loaded, stored=stored, evicted=evicted)
        for name, value in values.items():
            self.rings[name].append(value)

    def report(self, count: int) -> TierHistory:
        return TierHistory(**{name: ring.newest(count) for name, ring in self.rings.items()})


class _Pool:
    """Rings of a pool."""

    def __init__(self, tiers: Mapping[str, TierCounters], points: int) -> None:
        self.tiers = {name: _Tier(points) for name in (HOST, *tiers)}
        self.hit_rate = Ring(points)
        self.miss_rate = Ring(points)
        self._asked = 0
        self._found: dict[str, int] = {}
        self._missed = 0

    def append(self, pool: PoolStatus, seconds: float | None) -> None:
        """Add a sample; ``seconds`` since the last, None for the first."""
        decisions = pool.counters.decisions
        asked = decisions.lookup_blocks - self._asked if seconds is not None else 0
        found = {name: decisions.found.get(name, 0) - self._found.get(name, 0) for name in self.tiers}
        missed = sum(decisions.misses.values())
        self.hit_rate.append(_part(sum(found.values()), asked))
        self.miss_rate.append(_rate(missed, self._missed, seconds))
        for name, tier in self.tiers.items():
            fill, totals = _host(pool) if name == HOST else _lower(pool.counters.tiers.get(name))
            tier.append(fill, _part(found[name], asked), totals, seconds)
        self._asked, self._found, self._missed = decisions.lookup_blocks, dict(decisions.found), missed

    def report(self, tenant: str, fingerprint: str, count: int) -> PoolHistory:
        return PoolHistory(
            tenant=tenant,
            fingerprint=fingerprint,
            hit_rate=self.hit_rate.newest(count),
            miss_rate=self.miss_rate.newest(count),
            tiers={name: tier.report(count) for name, tier in self.tiers.items()},
        )


class History:
    """Samples of a server.

    Args:
        interval_s: Seconds between samples, for those who read them; rates are computed from the clock.
        points: Samples that are kept.
        max_pools: Pools that are followed at the same time; further ones have no history.
    """

    def __init__(
        self, interval_s: float = INTERVAL_S, points: int = POINTS, max_pools: int = MAX_POOLS
    ) -> None:
        self._interval_s = interval_s
        self._points = points
        self._max_pools = max_pools
        self._lock = threading.Lock()
        self._count = 0
        self._times: deque[float] = deque(maxlen=points)
        self._requests = Ring(points)
        self._lookup_p99 = Ring(points)
        self._pools: dict[tuple[str, str], _Pool] = {}
        self._last: ServerStatus | None = None

    def take(self, status: ServerStatus) -> None:
        """Take a sample. Pools that are gone are forgotten. A clock that went back makes no rates."""
        with self._lock:
            last, self._last = self._last, status
            seconds = status.now - last.now if last is not None and status.now > last.now else None
            before = sum(last.requests.values()) if last is not None else 0
            self._requests.append(_rate(sum(status.requests.values()), before, seconds))
            self._lookup_p99.append(_p99(status, last))
            self._count += 1
            self._times.append(round(status.now, 1))
            self._take_pools(status.pools, seconds)

    def report(self, since: int = 0) -> HistoryReport:
        """Return samples as columns.

        Args:
            since: The ``count`` of the report one has; its successors are returned. Negative: so many of the
                newest.
        """
        with self._lock:
            wanted = -since if since < 0 else max(0, self._count - since)
            count = min(wanted, len(self._times))
            return HistoryReport(
                interval_s=self._interval_s,
                count=self._count,
                times=list(self._times)[len(self._times) - count :],
                requests=self._requests.newest(count),
                lookup_p99=self._lookup_p99.newest(count),
                pools=[pool.report(*key, count) for key, pool in self._pools.items()],
            )

    def _take_pools(self, pools: list[PoolStatus], seconds: float | None) -> None:
        present = {(pool.tenant, pool.fingerprint): pool for pool in pools}
        self._pools = {key: pool for key, pool in self._pools.items() if key in present}
        for key, status in present.items():
            pool = self._pools.get(key)
            is_new = pool is None
            if pool is None:
                if len(self._pools) >= self._max_pools:
                    continue
                pool = self._pools[key] = _Pool(status.counters.tiers, self._points)
            pool.append(status, None if is_new else seconds)


def document(status: ServerStatus, history: HistoryReport) -> StatusDocument:
    """Return what ``/status.json`` holds."""
    bounded = [(bound, count) for bound, count in status.lookup_seconds if bound != float("inf")]
    lookups = status.lookup_seconds[-1][1] if status.lookup_seconds else 0
    status = msgspec.structs.replace(status, lookup_seconds=bounded)
    return StatusDocument(status=status, lookups=lookups, history=history)


def _host(pool: PoolStatus) -> tuple[float | None, tuple[int, int, int]]:
    counters: ServiceCounters = pool.counters
    leased, saved = sum(counters.decisions.hits.values()), counters.decisions.saved
    totals = (leased * pool.block_bytes, saved * pool.block_bytes, counters.host_evictions)
    return _part(counters.used_slots, counters.slots), totals


def _lower(tier: TierCounters | None) -> tuple[float | None, tuple[int, int, int]]:
    if tier is None:
        return None, (0, 0, 0)
    fill = _part(tier.used_bytes, tier.capacity_bytes or 0)
    return fill, (tier.loaded_bytes, tier.stored_bytes, tier.evictions)


def _part(part: int, whole: int) -> float | None:
    return part / whole if whole > 0 and part >= 0 else None


def _rate(now: int, before: int, seconds: float | None) -> float | None:
    """Return what was added per second; totals that fell began anew."""
    return (now - before) / seconds if seconds is not None and now >= before else None


def _p99(status: ServerStatus, last: ServerStatus | None) -> float | None:
    before = dict(last.lookup_seconds) if last is not None else {}
    added = [(bound, count - before.get(bound, 0)) for bound, count in status.lookup_seconds]
    if not added or added[-1][1] <= 0:
        return None
    finite = [bound for bound, _ in added if bound != float("inf")]
    return next(
        (bound for bound, count in added if count >= 0.99 * added[-1][1] and bound in finite), finite[-1]
    )
