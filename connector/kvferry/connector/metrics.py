"""The one table of metrics: names, kinds, labels, help; and the counts that feed it.

Adding a metric is one line in the table. What happens is counted in a ``Counts`` (cheap, plain dicts);
its ``take`` yields a *delta* of JSON-like data that crosses any process boundary, such as vLLM's
connector-stats channel; an ``Exporter`` makes the Prometheus objects from the table and feeds them
deltas. Standalone use is ``build_registry``; vLLM passes its own metric classes instead.

A delta is ``{metric name: {label values joined by "|": value}}``; the value is a number to add (counter), a
number to show (gauge) or a list of observations (histogram). Label values never contain ``|``.

Threading: a ``Counts`` is owned by one thread. An ``Exporter`` may be fed from one thread while another
serves its metrics.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import prometheus_client

__all__ = ["METRICS", "Counts", "Delta", "Exporter", "Kind", "Metric", "build_registry", "merge", "reference"]

Delta = dict[str, dict[str, float | list[float]]]
"""What was counted since the last delta, as plain data."""

MAX_OBSERVATIONS = 4096
"""Observations one delta keeps per metric and label; more are left out of the histogram."""
_SEPARATOR = "|"
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_STEP = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2)


class Kind(enum.Enum):
    """How a metric behaves."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(msgspec.Struct, frozen=True):
    """One line of the table."""

    name: str
    help: str
    unit: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> Kind:
        """Counter when the name ends in ``_total``, histogram when there are buckets, else gauge."""
        if self.name.endswith("_total"):
            return Kind.COUNTER
        return Kind.HISTOGRAM if self.buckets else Kind.GAUGE


TIER = ("tier",)
REASON = ("reason",)

REQUESTS = Metric(
    "kvferry_requests_total",
    "Requests by outcome: hit, partial, miss, passed, failed.",
    "requests",
    ("outcome",),
)
PASSED = Metric(
    "kvferry_passed_requests_total", "Requests that kvferry leaves alone, by reason.", "requests", REASON
)
MISSES = Metric(
    "kvferry_misses_total", "Requests whose prefix ended at a missing block, by reason.", "requests", REASON
)
LOOKUP_TOKENS = Metric("kvferry_lookup_tokens_total", "Prompt tokens that were looked up.", "tokens")
LOOKUP_BLOCKS = Metric("kvferry_lookup_blocks_total", "Blocks that were looked up.", "blocks")
HIT_TOKENS = Metric(
    "kvferry_hit_tokens_total", "Prompt tokens found, by the tier they come from.", "tokens", TIER
)
HIT_BLOCKS = Metric("kvferry_hit_blocks_total", "Blocks found, by the tier they come from.", "blocks", TIER)
LOADED_BLOCKS = Metric(
    "kvferry_loaded_blocks_total", "Blocks brought from a tier and verified.", "blocks", TIER
)
LOADED_BYTES = Metric("kvferry_loaded_bytes_total", "Bytes brought from a tier and verified.", "bytes", TIER)
STORED_BLOCKS = Metric("kvferry_stored_blocks_total", "Blocks written to a tier.", "blocks", TIER)
STORED_BYTES = Metric("kvferry_stored_bytes_total", "Bytes written to a tier.", "bytes", TIER)
FAILED_LOADS = Metric(
    "kvferry_failed_loads_total", "Blocks a tier failed to deliver; each is a miss.", "blocks", TIER
)
FAILED_STORES = Metric("kvferry_failed_stores_total", "Blocks a tier failed to take.", "blocks", TIER)
SHED_STORES = Metric(
    "kvferry_shed_stores_total", "Blocks not stored because the tier's queue was full.", "blocks", TIER
)
REFUSALS = Metric(
    "kvferry_refusals_total", "Blocks whose bytes were refused, by reason.", "blocks", ("tier", "reason")
)
EVICTIONS = Metric("kvferry_evictions_total", "Blocks evicted to make room.", "blocks", TIER)
LOAD_SECONDS = Metric(
    "kvferry_load_seconds", "Time of one batch of loads from a tier.", "seconds", TIER, _FAST
)
STORE_SECONDS = Metric(
    "kvferry_store_seconds", "Time of one batch of stores to a tier.", "seconds", TIER, _FAST
)
WAIT_SECONDS = Metric(
    "kvferry_request_wait_seconds", "Time a request waited for its blocks.", "seconds", (), _FAST
)
SCHEDULER_SECONDS = Metric(
    "kvferry_scheduler_seconds",
    "Time one engine step spent in kvferry's scheduler side.",
    "seconds",
    (),
    _STEP,
)
GATHERED_BYTES = Metric(
    "kvferry_gathered_bytes_total", "Bytes copied from the engine's pages into the arena.", "bytes"
)
SCATTERED_BYTES = Metric(
    "kvferry_scattered_bytes_total", "Bytes copied from the arena into the engine's pages.", "bytes"
)
TIER_BLOCKS = Metric("kvferry_tier_blocks", "Blocks a tier holds.", "blocks", TIER)
TIER_USED_BYTES = Metric("kvferry_tier_used_bytes", "Bytes a tier holds.", "bytes", TIER)
TIER_CAPACITY_BYTES = Metric(
    "kvferry_tier_capacity_bytes", "Bytes a tier may hold; absent without a bound.", "bytes", TIER
)
TIER_QUEUED_BLOCKS = Metric(
    "kvferry_tier_queued_blocks", "Blocks waiting to be stored in a tier.", "blocks", TIER
)
BREAKER = Metric(
    "kvferry_breaker_state", "Circuit breaker of a tier: 0 closed, 1 half open, 2 open.", "state", TIER
)
LEASES = Metric("kvferry_leases", "Leases that are held.", "leases")
RESERVATIONS = Metric("kvferry_reservations", "Reservations that wait for commit or abort.", "reservations")
EXPLAIN_DROPPED = Metric(
    "kvferry_explain_dropped_total", "Request records dropped because the writer was behind.", "records"
)

METRICS: tuple[Metric, ...] = tuple(line for line in list(globals().values()) if isinstance(line, Metric))
"""Every metric, in the order of the table."""

_KINDS = {metric.name: metric.kind for metric in METRICS}


class Counts:
    """Counts what happens, cheaply, until somebody takes the delta."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: Delta = {}

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        """Add ``amount`` to a counter."""
        series = self._values.setdefault(metric.name, {})
        label = _SEPARATOR.join(labels)
        series[label] = series.get(label, 0.0) + amount  # type: ignore[operator]

    def show(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge to ``value``."""
        self._values.setdefault(metric.name, {})[_SEPARATOR.join(labels)] = value

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation to a histogram."""
        series = self._values.setdefault(metric.name, {})
        seen = series.setdefault(_SEPARATOR.join(labels), [])
        if isinstance(seen, list) and len(seen) < MAX_OBSERVATIONS:
            seen.append(value)

    def take(self) -> Delta:
        """Return what was counted since the last call and start again from nothing."""
        delta, self._values = self._values, {}
        return delta


def merge(first: Delta, second: Delta) -> Delta:
    """Return the delta of both periods: counters add up, the later gauge counts, observations join."""
    merged: Delta = {name: dict(series) for name, series in first.items()}
    for name, series in second.items():
        into = merged.setdefault(name, {})
        for label, value in series.items():
            into[label] = _merged(_KINDS.get(name), into.get(label), value)
    return merged


def _merged(
    kind: Kind | None, old: float | list[float] | None, new: float | list[float]
) -> float | list[float]:
    if isinstance(old, list) and isinstance(new, list):
        return (old + new)[:MAX_OBSERVATIONS]
    if kind is Kind.COUNTER and isinstance(old, int | float) and isinstance(new, int | float):
        return old + new
    return new


class Exporter:
    """Prometheus objects for every metric of the table, fed with deltas.

    Args:
        classes: Which class to use for each of prometheus_client's ``Counter``, ``Gauge`` and
            ``Histogram``; vLLM hands over its own.
        labels: Names of labels that come before the table's (``model_name``, ``engine``).
        options: Further keyword arguments for every class (``registry``).
    """

    def __init__(
        self,
        classes: Mapping[Any, Any],
        labels: Sequence[str] = (),
        options: Mapping[str, object] | None = None,
    ) -> None:
        self._label_counts = {metric.name: len(metric.labels) for metric in METRICS}
        self._objects = {
            metric.name: _make(metric, classes, [*labels, *metric.labels], options or {})
            for metric in METRICS
        }

    def feed(self, delta: Delta, label_values: Sequence[object] = ()) -> None:
        """Take in a delta.

        Args:
            delta: From ``Counts.take``; metrics this version does not know are left out.
            label_values: Values of the leading labels.
        """
        for name, series in delta.items():
            if name not in self._objects:
                continue
            for label, value in series.items():
                own = label.split(_SEPARATOR) if label else []
                if len(own) == self._label_counts[name]:
                    self._feed_one(name, [*label_values, *own], value)

    def _feed_one(self, name: str, labels: list[object], value: float | list[float]) -> None:
        target = self._objects[name].labels(*labels) if labels else self._objects[name]
        kind = _KINDS[name]
        if isinstance(value, list):
            if kind is Kind.HISTOGRAM:
                for observation in value:
                    target.observe(observation)
        elif kind is Kind.COUNTER:
            target.inc(value)
        elif kind is Kind.GAUGE:
            target.set(value)


def _make(
    metric: Metric, classes: Mapping[Any, Any], labels: list[str], options: Mapping[str, object]
) -> Any:
    common = {"name": metric.name, "documentation": metric.help, "labelnames": labels, **options}
    if metric.kind is Kind.COUNTER:
        return classes[prometheus_client.Counter](**common)
    if metric.kind is Kind.GAUGE:
        return classes[prometheus_client.Gauge](**common, multiprocess_mode="mostrecent")
    return classes[prometheus_client.Histogram](**common, buckets=list(metric.buckets))


def build_registry() -> tuple[prometheus_client.CollectorRegistry, Exporter]:
    """Return a registry of its own with every metric, and the exporter that feeds it."""
    registry = prometheus_client.CollectorRegistry()
    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    return registry, Exporter({kind: kind for kind in kinds}, options={"registry": registry})


def reference() -> Iterator[str]:
    """Yield the lines of ``docs/reference/metrics.md``."""
    yield from ("# Metrics", "", "| name | kind | labels | unit | meaning |", "|---|---|---|---|---|")
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        yield f"| `{metric.name}` | {metric.kind.value} | {labels} | {metric.unit} | {metric.help} |"
