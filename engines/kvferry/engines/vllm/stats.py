"""kvferry's metrics through vLLM's connector-stats channel, onto vLLM's own /metrics page.

The scheduler half counts into a ``Counts``; its deltas travel as plain data to the API server, which
feeds them to metrics that it made from the same table (``kvferry.connector.metrics``).
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvferry.connector import metrics
from kvferry.connector.counters import ServiceCounters, TierCounters
from kvferry.connector.explain import RequestRecord
from kvferry.connector.service import HOST
from kvferry.engines.jobs import WorkerReport

__all__ = ["KVFerryPromMetrics", "KVFerryStats", "SchedulerStats"]

_INTERVAL_S = 1.0
_BREAKER_STATES = {"closed": 0, "half_open": 1, "open": 2}
_TIER_TOTALS = {
    "loaded_blocks": metrics.LOADED_BLOCKS,
    "loaded_bytes": metrics.LOADED_BYTES,
    "failed_loads": metrics.FAILED_LOADS,
    "stored_blocks": metrics.STORED_BLOCKS,
    "stored_bytes": metrics.STORED_BYTES,
    "failed_stores": metrics.FAILED_STORES,
    "shed_stores": metrics.SHED_STORES,
    "evictions": metrics.EVICTIONS,
}


class _Countable(Protocol):
    def counters(self) -> ServiceCounters: ...


class KVFerryStats(KVConnectorStats):  # type: ignore[misc]  # vLLM's base is untyped
    """A delta on its way to the API server."""

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVFerryStats:
        """Join a later delta to this one."""
        self.data = metrics.merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Sum up the interval for vLLM's log line."""
        summary = {}
        for metric in (metrics.HIT_TOKENS, metrics.SCATTERED_BYTES, metrics.GATHERED_BYTES):
            values = [
                value for value in self.data.get(metric.name, {}).values() if not isinstance(value, list)
            ]
            summary[metric.name.removeprefix("kvferry_").removesuffix("_total")] = sum(values)
        return summary

    def is_empty(self) -> bool:
        """Tell whether nothing was counted."""
        return not self.data


class KVFerryPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM's base is untyped
    """The API server's side: Prometheus objects of every metric."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._exporter = metrics.Exporter(metric_types, labelnames)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Feed one engine's delta."""
        self._exporter.feed(transfer_stats_data, self.per_engine_labelvalues[engine_idx])


class SchedulerStats:
    """Counts requests and copies, and turns the service's totals into deltas.

    Owned by the scheduler thread.
    """

    def __init__(self, service: _Countable) -> None:
        self._service = service
        self._counts = metrics.Counts()
        self._last_taken = 0.0
        self._last_totals: dict[str, TierCounters] = {}
        self._host_evictions = 0

    def count_request(self, record: RequestRecord) -> None:
        """Count a finished request."""
        counts = self._counts
        counts.add(metrics.REQUESTS, 1, record.outcome)
        if record.passed:
            counts.add(metrics.PASSED, 1, record.passed)
            return
        counts.add(metrics.LOOKUP_TOKENS, record.prompt_tokens)
        counts.add(metrics.LOOKUP_BLOCKS, record.prompt_tokens // record.block_tokens)
        counts.observe(metrics.WAIT_SECONDS, record.wait_ms / 1e3)
        if record.missing_block is not None:
            counts.add(metrics.MISSES, 1, record.missing_reason)
        for tier, tokens in record.matched_tokens.items():
            counts.add(metrics.HIT_TOKENS, tokens, tier)
            counts.add(metrics.HIT_BLOCKS, -(-tokens // record.block_tokens), tier)

    def count_copies(self, report: WorkerReport) -> None:
        """Count what the workers copied."""
        self._counts.add(metrics.GATHERED_BYTES, report.bytes_saved)
        self._counts.add(metrics.SCATTERED_BYTES, report.bytes_loaded)

    def take(self, hook_seconds: float) -> KVFerryStats | None:
        """Return the delta since the last call, at most once a second.

        Args:
            hook_seconds: Time spent in the scheduler's hooks since the last call.
        """
        self._counts.observe(metrics.SCHEDULER_SECONDS, hook_seconds)
        now = time.monotonic()
        if now - self._last_taken < _INTERVAL_S:
            return None
        self._last_taken = now
        self._count_service(self._service.counters())
        return KVFerryStats(data=self._counts.take())

    def _count_service(self, totals: ServiceCounters) -> None:
        counts = self._counts
        counts.show(metrics.LEASES, totals.leases)
        counts.show(metrics.RESERVATIONS, totals.reservations)
        counts.show(metrics.TIER_BLOCKS, totals.host_blocks, HOST)
        counts.show(metrics.TIER_CAPACITY_BYTES, totals.capacity_bytes, HOST)
        used = totals.capacity_bytes // totals.slots * totals.used_slots
        counts.show(metrics.TIER_USED_BYTES, used, HOST)
        counts.add(metrics.EVICTIONS, totals.host_evictions - self._host_evictions, HOST)
        self._host_evictions = totals.host_evictions
        for name, tier in totals.tiers.items():
            self._count_tier(name, tier, self._last_totals.get(name, TierCounters()))
        self._last_totals = totals.tiers

    def _count_tier(self, name: str, tier: TierCounters, last: TierCounters) -> None:
        counts = self._counts
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
