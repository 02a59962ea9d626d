"""Handoffs on vLLM's /metrics page: what was held for others, what was read from them, and why not."""

from __future__ import annotations

import prometheus_client
import pytest

from kvferry.connector.explain import RequestRecord
from kvferry.connector.metrics import Counts, build_registry
from kvferry.engines.jobs import PeerCounts
from kvferry.engines.vllm.stats import SchedulerStats


class NoService:
    """A service that has nothing to count."""

    def report(self, counts: Counts) -> None:
        """Add nothing."""


@pytest.fixture
def stats() -> SchedulerStats:
    return SchedulerStats(NoService())


def page(stats: SchedulerStats) -> prometheus_client.CollectorRegistry:
    """What the page shows after everything that was counted."""
    registry, exporter = build_registry()
    taken = stats.take(0.0)
    assert taken is not None
    exporter.feed(taken.data)
    return registry


def shown(stats: SchedulerStats, name: str, **labels: str) -> float | None:
    return page(stats).get_sample_value(name, labels)


def finished(**fields: object) -> RequestRecord:
    return RequestRecord(request_id="r", block_tokens=64, prompt_tokens=128, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"matched_tokens": {"peer": 128}, "peer_ms": 12.0}, "ok"),
        ({"failed": True, "peer_failed": "gone", "peer_ms": 2.0}, "failed"),
        ({"peer_failed": "params"}, "failed"),
    ],
)
def test_a_request_that_came_with_pages_is_counted_once(
    stats: SchedulerStats, fields: dict[str, object], outcome: str
) -> None:
    stats.count_request(finished(**fields))
    assert shown(stats, "kvferry_handoffs_total", side="taken", outcome=outcome) == 1


def test_any_other_request_is_no_handoff(stats: SchedulerStats) -> None:
    stats.count_request(finished())
    taken = stats.take(0.0)
    assert taken is not None
    assert "kvferry_handoffs_total" not in taken.data


def test_a_failure_has_its_reason(stats: SchedulerStats) -> None:
    stats.count_request(finished(failed=True, peer_failed="checksum"))
    assert shown(stats, "kvferry_handoff_failures_total", reason="checksum") == 1


def test_tokens_of_a_peer_are_hits_of_the_tier_peer(stats: SchedulerStats) -> None:
    stats.count_request(finished(matched_tokens={"peer": 127}, peer_ms=12.0))
    assert shown(stats, "kvferry_hit_tokens_total", tier="peer") == 127


def test_what_ranks_read_adds_up(stats: SchedulerStats) -> None:
    stats.count_peer(PeerCounts(bytes=100, seconds=[0.1, 0.3]))
    stats.count_peer(PeerCounts(bytes=20, seconds=[0.2]))
    registry = page(stats)
    assert registry.get_sample_value("kvferry_handoff_bytes_total") == 120
    assert registry.get_sample_value("kvferry_handoff_seconds_count") == 3
    assert registry.get_sample_value("kvferry_handoff_seconds_sum") == pytest.approx(0.6)


def test_what_is_given_is_held_or_declined(stats: SchedulerStats) -> None:
    stats.count_given(held=2)
    stats.count_given(declined=1)
    given = page(stats)
    assert given.get_sample_value("kvferry_handoffs_total", {"side": "given", "outcome": "ok"}) == 2
    assert given.get_sample_value("kvferry_handoffs_total", {"side": "given", "outcome": "declined"}) == 1


def test_leases_are_shown_as_they_are_and_expired_ones_are_counted_once(stats: SchedulerStats) -> None:
    stats.show_leases(3, 300)
    stats.show_leases(1, 100)
    stats.show_expired(1)
    stats.show_expired(2)
    stats.show_expired(2)
    registry = page(stats)
    assert registry.get_sample_value("kvferry_handoff_leases") == 1
    assert registry.get_sample_value("kvferry_handoff_held_pages") == 100
    assert registry.get_sample_value("kvferry_handoff_expired_total") == 2
