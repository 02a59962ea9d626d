"""A cache server's metrics for Prometheus, made anew from the status at each scrape.

The table in ``kvferry.connector.metrics`` says what there is. Nothing is kept from one scrape to the next, so
a pool that is gone leaves no series behind, however many come and go. A pool's series begin with its labels
``tenant`` and ``model``.

Threading: any thread may scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kvferry.connector import latency, metrics
from kvferry.connector.counters import TierCounters
from kvferry.connector.counting import CountersDelta
from kvferry.connector.metrics import Counts, Delta, Kind, Metric, Scope
from kvferry.connector.server.status import PoolStatus, ServerStatus

__all__ = ["POOL_LABELS", "Scraper", "StatusCollector"]

POOL_LABELS = ("tenant", "model")
"""Labels that a pool's series have before those of the table."""
_TIER_COUNTERS = tuple(
    metric
    for metric in metrics.METRICS
    if metric.scope is Scope.CACHE and metric.kind is Kind.COUNTER and metric.labels == metrics.TIER
)
_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_HISTOGRAMS: dict[str, Callable[[TierCounters], tuple[list[int], float]]] = {
    metrics.LOAD_SECONDS.name: lambda tier: (tier.load_buckets, tier.load_seconds),
    metrics.STORE_SECONDS.name: lambda tier: (tier.store_buckets, tier.store_seconds),
}


class StatusCollector(Collector):
    """Makes Prometheus' families from a status.

    Args:
        status: Returns the status; what it raises, ``collect`` raises.
    """

    def __init__(self, status: Callable[[], ServerStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[_Family]:
        """Yield one family per metric of the table that has something to show."""
        status = self._status()
        families = {
            metric.name: _family(metric) for metric in metrics.METRICS if metric.scope is not Scope.ENGINE
        }
        _add(families, _server_values(status), ())
        _add_lookups(families[metrics.SERVER_LOOKUP_SECONDS.name], status)
        for pool in status.pools:
            labels = (pool.tenant, pool.fingerprint)
            _add(families, _pool_values(pool), labels)
            for name, histogram in _HISTOGRAMS.items():
                for tier_name, tier in pool.counters.tiers.items():
                    _add_buckets(families[name], (*labels, tier_name), *histogram(tier))
        yield from (family for family in families.values() if family.samples)


class Scraper:
    """The text of ``/metrics``: the server's metrics, and the process's memory, time and descriptors."""

    def __init__(self, status: Callable[[], ServerStatus]) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(StatusCollector(status))
        prometheus_client.ProcessCollector(registry=self._registry)

    def scrape(self, accept: str = "") -> tuple[bytes, str]:
        """Return the metrics and their content type.

        Args:
            accept: The scraper's ``Accept`` header.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def _family(metric: Metric) -> _Family:
    leading = () if metric.scope is Scope.SERVER else POOL_LABELS
    labels = [*leading, *metric.labels]
    if metric.kind is Kind.COUNTER:
        return CounterMetricFamily(metric.name, metric.help, labels=labels)
    if metric.kind is Kind.HISTOGRAM:
        return HistogramMetricFamily(metric.name, metric.help, labels=labels)
    return GaugeMetricFamily(metric.name, metric.help, labels=labels)


def _add(families: dict[str, _Family], values: Delta, leading: Sequence[str]) -> None:
    for name, series in values.items():
        family = families[name]
        for label, value in series.items():
            if isinstance(family, CounterMetricFamily | GaugeMetricFamily) and not isinstance(value, list):
                family.add_metric([*leading, *(label.split("|") if label else ())], value)


def _pool_values(pool: PoolStatus) -> Delta:
    """Return the pool's totals: the delta from nothing."""
    counts = Counts()
    for metric in _TIER_COUNTERS:  # a rate needs to have seen the zero
        for tier in pool.counters.tiers:
            counts.add(metric, 0, tier)
    CountersDelta().add(pool.counters, counts)
    decisions = pool.counters.decisions
    for by_label, metric in (
        (decisions.found, metrics.SERVED_FOUND_BLOCKS),
        (decisions.misses, metrics.SERVED_MISSES),
        (decisions.hits, metrics.LEASED_BLOCKS),
    ):
        for label, value in by_label.items():
            counts.add(metric, value, label)
    counts.add(metrics.SERVED_LOOKUP_BLOCKS, decisions.lookup_blocks)
    counts.add(metrics.SAVED_BLOCKS, decisions.saved)
    counts.add(metrics.NO_ROOM_BLOCKS, decisions.no_room)
    counts.add(metrics.EXPIRED_LEASES, decisions.expired_leases + decisions.expired_holds)
    counts.add(metrics.EXPIRED_RESERVATIONS, decisions.expired_reservations)
    counts.add(metrics.VOID_COMMITS, decisions.void_commits)
    counts.show(metrics.POOL_CONNECTIONS, pool.connections)
    counts.show(metrics.DEAD_WRITERS, pool.dead_writers)
    counts.show(metrics.MISSING_TIERS, len(pool.problems))
    return counts.take()


def _server_values(status: ServerStatus) -> Delta:
    counts = Counts()
    counts.show(metrics.SERVER_INFO, 1, status.version)
    counts.show(metrics.SERVER_START, status.started)
    counts.show(metrics.SERVER_READY, int(status.is_ready))
    counts.show(metrics.SERVER_DRAINING, int(status.is_draining))
    modes = [connection.mode for connection in status.connections]
    for mode in ("map", "stream"):
        counts.show(metrics.SERVER_CONNECTIONS, modes.count(mode), mode)
    for message, value in status.requests.items():
        counts.add(metrics.SERVER_REQUESTS, value, message)
    for reason, value in status.refused_connections.items():
        counts.add(metrics.REFUSED_CONNECTIONS, value, reason)
    return counts.take()


def _add_lookups(family: _Family, status: ServerStatus) -> None:
    if isinstance(family, HistogramMetricFamily) and status.lookup_seconds:
        buckets = [(_bound(bound), count) for bound, count in status.lookup_seconds]
        family.add_metric([], buckets, sum_value=None)


def _add_buckets(family: _Family, labels: Sequence[str], buckets: list[int], seconds: float) -> None:
    if isinstance(family, HistogramMetricFamily):
        cumulated = [(_bound(bound), count) for bound, count in latency.cumulated(buckets)]
        family.add_metric(labels, cumulated, sum_value=seconds)


def _bound(seconds: float) -> str:
    return "+Inf" if seconds == float("inf") else repr(seconds)
