"""kvferry's metrics through vLLM's connector-stats channel, onto vLLM's own /metrics page.

The scheduler half counts into a ``Counts``; its deltas travel as plain data to the API server, which
feeds them to metrics that it made from the same table (``kvferry.connector.metrics``).
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvferry.connector import metrics
from kvferry.connector.explain import RequestRecord
from kvferry.engines.jobs import PeerCounts, WorkerReport

__all__ = ["KVFerryPromMetrics", "KVFerryStats", "SchedulerStats"]

_INTERVAL_S = 1.0


class _Reporting(Protocol):
    def report(self, counts: metrics.Counts) -> None: ...


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
    """Counts requests and copies, and has the service count what it did.

    Owned by the scheduler thread.
    """

    def __init__(self, service: _Reporting) -> None:
        self._service = service
        self._counts = metrics.Counts()
        self._last_taken = 0.0
        self._expired = 0

    def count_request(self, record: RequestRecord) -> None:
        """Count a finished request."""
        counts = self._counts
        counts.add(metrics.REQUESTS, 1, record.outcome)
        if record.peer_failed:
            counts.add(metrics.HANDOFFS, 1, "taken", "failed")
            counts.add(metrics.HANDOFF_FAILURES, 1, record.peer_failed)
        elif record.peer_ms:
            counts.add(metrics.HANDOFFS, 1, "taken", "ok")
        if record.passed:
            counts.add(metrics.PASSED, 1, record.passed)
            return
        counts.add(metrics.LOOKUP_TOKENS, record.prompt_tokens)
        counts.add(metrics.LOOKUP_BLOCKS, record.prompt_tokens // record.block_tokens)
        counts.observe(metrics.WAIT_SECONDS, record.wait_ms / 1e3)
        if record.missing_block is not None:
            counts.add(metrics.MISSES, 1, record.missing_reason)
        for tier, blocks in record.declined_blocks.items():
            counts.add(metrics.DECLINED_BLOCKS, blocks, tier)
        if record.regret_ms:
            counts.add(metrics.REGRET_SECONDS, record.regret_ms / 1e3, record.regret_tier)
        for tier, tokens in record.matched_tokens.items():
            counts.add(metrics.HIT_TOKENS, tokens, tier)
            counts.add(metrics.HIT_BLOCKS, -(-tokens // record.block_tokens), tier)

    def show_prefill_rate(self, tokens_per_s: float | None) -> None:
        """Show how fast the engine computes prompts, once it is known."""
        if tokens_per_s is not None:
            self._counts.show(metrics.PREFILL_RATE, tokens_per_s)

    def count_copies(self, report: WorkerReport) -> None:
        """Count what the workers copied."""
        self._counts.add(metrics.GATHERED_BYTES, report.bytes_saved)
        self._counts.add(metrics.SCATTERED_BYTES, report.bytes_loaded)

    def count_given(self, held: int = 0, declined: int = 0) -> None:
        """Count requests that a router wants another engine to go on with.

        Args:
            held: Their pages are kept for it.
            declined: They are not: too many are, or nothing of the request can be handed over.
        """
        for count, outcome in ((held, "ok"), (declined, "declined")):
            if count:
                self._counts.add(metrics.HANDOFFS, count, "given", outcome)

    def count_peer(self, peer: PeerCounts) -> None:
        """Count what the workers read from other engines' pages.

        Whether a request's handoff succeeded is counted with its record, once for all ranks.
        """
        if peer.bytes:
            self._counts.add(metrics.HANDOFF_BYTES, peer.bytes)
        for seconds in peer.seconds:
            self._counts.observe(metrics.HANDOFF_SECONDS, seconds)

    def show_leases(self, requests: int, pages: int) -> None:
        """Show how many finished requests are held for other engines, and in how many pages."""
        self._counts.show(metrics.HANDOFF_LEASES, requests)
        self._counts.show(metrics.HANDOFF_HELD_PAGES, pages)

    def show_expired(self, requests: int) -> None:
        """Count requests whose pages were freed because no engine released them in time.

        Args:
            requests: How many, from the start on.
        """
        if requests > self._expired:
            self._counts.add(metrics.HANDOFF_EXPIRED, requests - self._expired)
            self._expired = requests

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
        self._service.report(self._counts)
        return KVFerryStats(data=self._counts.take())
