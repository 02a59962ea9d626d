"""The one table of metrics: names, kinds, labels, help; and the exporter that shows them.

Adding a metric is one line in the table. What happens is counted in a ``Counts``, which yields deltas of plain
data (``delta``); an ``Exporter`` makes the Prometheus objects from the table and feeds them deltas. Standalone
use is ``build_registry``; vLLM passes its own metric classes instead.

Threading: a ``Counts`` is owned by one thread. An ``Exporter`` may be fed from one thread while another
serves its metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import prometheus_client

from kvferry.connector.delta import MAX_OBSERVATIONS, SEPARATOR, Counts, Delta, merge
from kvferry.connector.latency import BATCH_BOUNDS_S
from kvferry.connector.metric import Kind, Metric, Scope

__all__ = [
    "MAX_OBSERVATIONS",
    "METRICS",
    "Counts",
    "Delta",
    "Exporter",
    "Kind",
    "Metric",
    "Scope",
    "build_registry",
    "merge",
    "reference",
]

_STEP = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2)

TIER = ("tier",)
REASON = ("reason",)

REQUESTS = Metric(
    "kvferry_requests_total",
    "Requests by outcome: hit, partial, miss, passed, failed.",
    "requests",
    ("outcome",),
    scope=Scope.ENGINE,
)
PASSED = Metric(
    "kvferry_passed_requests_total",
    "Requests that kvferry leaves alone, by reason.",
    "requests",
    REASON,
    scope=Scope.ENGINE,
)
MISSES = Metric(
    "kvferry_misses_total",
    "Requests whose prefix ended at a missing block, by reason.",
    "requests",
    REASON,
    scope=Scope.ENGINE,
)
LOOKUP_TOKENS = Metric(
    "kvferry_lookup_tokens_total", "Prompt tokens that were looked up.", "tokens", scope=Scope.ENGINE
)
LOOKUP_BLOCKS = Metric(
    "kvferry_lookup_blocks_total", "Blocks that were looked up.", "blocks", scope=Scope.ENGINE
)
HIT_TOKENS = Metric(
    "kvferry_hit_tokens_total",
    "Prompt tokens found, by the tier they come from.",
    "tokens",
    TIER,
    scope=Scope.ENGINE,
)
HIT_BLOCKS = Metric(
    "kvferry_hit_blocks_total",
    "Blocks found, by the tier they come from.",
    "blocks",
    TIER,
    scope=Scope.ENGINE,
)
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
NO_ROOM_STORES = Metric("kvferry_no_room_stores_total", "Blocks a tier had no room for.", "blocks", TIER)
LOST_WRITES = Metric(
    "kvferry_lost_writes_total",
    "Deferred writes given up because the block had to leave the arena first.",
    "blocks",
)
ASKED_BLOCKS = Metric(
    "kvferry_asked_blocks_total", "Blocks of which a shared tier said whether it holds them.", "blocks", TIER
)
MISSING_LOADS = Metric(
    "kvferry_missing_loads_total",
    "Blocks a tier was thought to hold and did not: evicted, expired or removed by others.",
    "blocks",
    TIER,
)
LATE_TRANSFERS = Metric(
    "kvferry_late_transfers_total", "Calls of a tier that passed its deadline.", "calls", TIER
)
REFUSALS = Metric(
    "kvferry_refusals_total", "Blocks whose bytes were refused, by reason.", "blocks", ("tier", "reason")
)
EVICTIONS = Metric("kvferry_evictions_total", "Blocks evicted to make room.", "blocks", TIER)
LOAD_SECONDS = Metric(
    "kvferry_load_seconds", "Time of one batch of loads from a tier.", "seconds", TIER, BATCH_BOUNDS_S
)
STORE_SECONDS = Metric(
    "kvferry_store_seconds", "Time of one batch of stores to a tier.", "seconds", TIER, BATCH_BOUNDS_S
)
WAIT_SECONDS = Metric(
    "kvferry_request_wait_seconds",
    "Time a request waited for its blocks.",
    "seconds",
    (),
    BATCH_BOUNDS_S,
    scope=Scope.ENGINE,
)
REGRET_SECONDS = Metric(
    "kvferry_regret_seconds_total",
    "Time lost to waits that took longer than computing, by the tier waited for (`several`: not one alone).",
    "seconds",
    TIER,
    scope=Scope.ENGINE,
)
DECLINED_BLOCKS = Metric(
    "kvferry_declined_blocks_total",
    "Blocks left in a tier because the engine was expected to compute them sooner.",
    "blocks",
    TIER,
    scope=Scope.ENGINE,
)
PREFILL_RATE = Metric(
    "kvferry_prefill_tokens_per_second",
    "Prompt tokens the engine computes in a second, as measured; absent until known.",
    "tokens/s",
    scope=Scope.ENGINE,
)
SCHEDULER_SECONDS = Metric(
    "kvferry_scheduler_seconds",
    "Time one engine step spent in kvferry's scheduler side.",
    "seconds",
    (),
    _STEP,
    scope=Scope.ENGINE,
)
GATHERED_BYTES = Metric(
    "kvferry_gathered_bytes_total",
    "Bytes copied from the engine's pages into the arena.",
    "bytes",
    scope=Scope.ENGINE,
)
SCATTERED_BYTES = Metric(
    "kvferry_scattered_bytes_total",
    "Bytes copied from the arena into the engine's pages.",
    "bytes",
    scope=Scope.ENGINE,
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
    "kvferry_explain_dropped_total",
    "Request records dropped because the writer was behind.",
    "records",
    scope=Scope.ENGINE,
)

SERVER_UP = Metric(
    "kvferry_server_up",
    "1 while the engine's cache server is connected and answers; absent without one.",
    "state",
    scope=Scope.ENGINE,
)
LATE_ANSWERS = Metric(
    "kvferry_server_late_answers_total",
    "Answers of the cache server that an engine step did not wait for any longer.",
    "answers",
    scope=Scope.ENGINE,
)
RECONNECTS = Metric(
    "kvferry_server_reconnects_total",
    "Connections to the cache server after the first.",
    "connections",
    scope=Scope.ENGINE,
)
ANSWER_SECONDS = Metric(
    "kvferry_server_request_seconds",
    "Time from a question to the cache server until its answer was taken in.",
    "seconds",
    buckets=_STEP,
    scope=Scope.ENGINE,
)

HANDOFFS = Metric(
    "kvferry_handoffs_total",
    "Requests to be handed over. Side `given`: `ok`, the pages are held, or `declined`; side `taken`: `ok`, the pages "
    "were read, or `failed`.",
    "requests",
    ("side", "outcome"),
    scope=Scope.ENGINE,
)
HANDOFF_FAILURES = Metric(
    "kvferry_handoff_failures_total",
    "Requests that another engine had prefilled and whose pages could not be had, by reason.",
    "requests",
    REASON,
    scope=Scope.ENGINE,
)
HANDOFF_BYTES = Metric(
    "kvferry_handoff_bytes_total",
    "Bytes read from other engines' pages and found good.",
    "bytes",
    scope=Scope.ENGINE,
)
HANDOFF_SECONDS = Metric(
    "kvferry_handoff_seconds",
    "Time a rank took to read a request's pages, from the first message to the last check.",
    "seconds",
    buckets=BATCH_BOUNDS_S,
    scope=Scope.ENGINE,
)
HANDOFF_LEASES = Metric(
    "kvferry_handoff_leases",
    "Finished requests whose pages are held for a decoding engine.",
    "requests",
    scope=Scope.ENGINE,
)
HANDOFF_HELD_PAGES = Metric(
    "kvferry_handoff_held_pages", "Pages that are held for decoding engines.", "pages", scope=Scope.ENGINE
)
HANDOFF_EXPIRED = Metric(
    "kvferry_handoff_expired_total",
    "Requests whose pages were freed because no decoding engine released them in time.",
    "requests",
    scope=Scope.ENGINE,
)

SERVED_LOOKUP_BLOCKS = Metric(
    "kvferry_server_lookup_blocks_total",
    "Blocks that lookups asked for; repeated lookups count again.",
    "blocks",
    scope=Scope.POOL,
)
SERVED_FOUND_BLOCKS = Metric(
    "kvferry_server_found_blocks_total",
    "Of these, blocks that were found, by the tier they would come from.",
    "blocks",
    TIER,
    scope=Scope.POOL,
)
SERVED_MISSES = Metric(
    "kvferry_server_misses_total",
    "Lookups that ended at a missing block, by reason; repeated lookups count again.",
    "lookups",
    REASON,
    scope=Scope.POOL,
)
LEASED_BLOCKS = Metric(
    "kvferry_server_leased_blocks_total",
    "Blocks leased to engines, by the tier they came from.",
    "blocks",
    TIER,
    scope=Scope.POOL,
)
SAVED_BLOCKS = Metric(
    "kvferry_server_saved_blocks_total", "Blocks that engines saved.", "blocks", scope=Scope.POOL
)
NO_ROOM_BLOCKS = Metric(
    "kvferry_no_room_blocks_total",
    "Blocks that found no slot in the arena, to be saved or to be loaded.",
    "blocks",
    scope=Scope.POOL,
)
EXPIRED_LEASES = Metric(
    "kvferry_expired_leases_total",
    "Leases that ended because their time had passed.",
    "leases",
    scope=Scope.POOL,
)
EXPIRED_RESERVATIONS = Metric(
    "kvferry_expired_reservations_total",
    "Reservations that nobody settled in time.",
    "reservations",
    scope=Scope.POOL,
)
VOID_COMMITS = Metric(
    "kvferry_void_commits_total",
    "Commits that came after their reservation's end; nothing of them became visible.",
    "commits",
    scope=Scope.POOL,
)
POOL_CONNECTIONS = Metric(
    "kvferry_pool_connections", "Clients that use the pool.", "connections", scope=Scope.POOL
)
DEAD_WRITERS = Metric(
    "kvferry_dead_writers",
    "Engines that are gone while one of their processes may still write; what they reserved waits for it.",
    "engines",
    scope=Scope.POOL,
)
MISSING_TIERS = Metric(
    "kvferry_missing_tiers", "Configured tiers that the pool goes on without.", "tiers", scope=Scope.POOL
)
SERVER_INFO = Metric(
    "kvferry_server_info", "Always 1; the version is a label.", "server", ("version",), scope=Scope.SERVER
)
SERVER_START = Metric(
    "kvferry_server_start_time_seconds", "Unix time of the start.", "seconds", scope=Scope.SERVER
)
SERVER_READY = Metric(
    "kvferry_server_ready", "1 while the server listens and does not drain.", "state", scope=Scope.SERVER
)
SERVER_DRAINING = Metric(
    "kvferry_server_draining", "1 while the server finishes what is under way.", "state", scope=Scope.SERVER
)
SERVER_CONNECTIONS = Metric(
    "kvferry_server_connections",
    "Connected clients, by mode: map (on this machine) or stream.",
    "connections",
    ("mode",),
    scope=Scope.SERVER,
)
SERVER_REQUESTS = Metric(
    "kvferry_server_requests_total",
    "Requests of clients, by type of message.",
    "requests",
    ("type",),
    scope=Scope.SERVER,
)
REFUSED_CONNECTIONS = Metric(
    "kvferry_server_refused_connections_total",
    "Connections that were refused or cut, by reason.",
    "connections",
    REASON,
    scope=Scope.SERVER,
)
SERVER_LOOKUP_SECONDS = Metric(
    "kvferry_server_lookup_seconds",
    "Time from a lookup's arrival to its answer.",
    "seconds",
    buckets=_STEP,
    scope=Scope.SERVER,
)

METRICS: tuple[Metric, ...] = tuple(line for line in list(globals().values()) if isinstance(line, Metric))
"""Every metric, in the order of the table."""

_KINDS = {metric.name: metric.kind for metric in METRICS}


class Exporter:
    """Prometheus objects for every metric of the table that an engine shows, fed with deltas.

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
        shown = [metric for metric in METRICS if metric.scope in (Scope.ENGINE, Scope.CACHE)]
        self._label_counts = {metric.name: len(metric.labels) for metric in shown}
        self._objects = {
            metric.name: _make(metric, classes, [*labels, *metric.labels], options or {}) for metric in shown
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
                own = label.split(SEPARATOR) if label else []
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
    """Return a registry of its own with every metric that an engine shows, and the exporter that feeds it."""
    registry = prometheus_client.CollectorRegistry()
    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    return registry, Exporter({kind: kind for kind in kinds}, options={"registry": registry})


def reference() -> Iterator[str]:
    """Yield the lines of ``docs/reference/metrics.md``."""
    yield from (
        "# Metrics",
        "",
        "| name | kind | labels | unit | of | meaning |",
        "|---|---|---|---|---|---|",
    )
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        kind, scope = metric.kind.value, metric.scope.value
        yield f"| `{metric.name}` | {kind} | {labels} | {metric.unit} | {scope} | {metric.help} |"
