"""What goes out through vLLM's own channels: KV events, connector stats, hit sources."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import prometheus_client
import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvferry.connector.config import Config, HostConfig
from kvferry.connector.counters import TierCounters
from kvferry.connector.counting import CountersDelta
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.explain import RequestRecord
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.metrics import Counts
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.service import ServiceEvent
from kvferry.engines.jobs import WorkerReport
from kvferry.engines.vllm.compat import hit_sources
from kvferry.engines.vllm.events import translate
from kvferry.engines.vllm.stats import KVFerryPromMetrics, KVFerryStats, SchedulerStats

KEY = BlockKey(bytes(range(32)))


@pytest.mark.parametrize(("tier", "medium"), [("host", "CPU"), ("disk", "STORAGE")])
def test_events_name_the_block_and_the_medium_and_can_be_published(tier: str, medium: str) -> None:
    stored = translate(ServiceEvent("stored", tier, (KEY,)), 64)
    removed = translate(ServiceEvent("removed", tier, (KEY,)), 64)
    assert isinstance(stored, BlockStored)
    assert (stored.block_hashes, stored.block_size, stored.medium) == ([KEY], 64, medium)
    assert isinstance(removed, BlockRemoved)
    assert (removed.block_hashes, removed.medium) == ([KEY], medium)
    assert msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=[stored, removed]))


def test_hits_are_split_over_vllm_sources() -> None:
    sources = hit_sources({"host": 64, "disk": 128, "a plugin's": 1, "another's": 2})
    assert sources == {
        CacheHitSource.HOST: 64,
        CacheHitSource.DISK: 128,
        CacheHitSource.EXTERNAL_UNSPECIFIED: 3,
    }


class Service:
    """A real service's totals with a tier's beside them that a test sets."""

    def __init__(self) -> None:
        layout = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=16, itemsize=2)
        config = Config(host=HostConfig(capacity=1 << 20))
        self.real = EmbeddedService(config, layout, bytes(32), PluginRegistry())
        self.disk = TierCounters()
        self._counting = CountersDelta()

    def report(self, counts: Counts) -> None:
        tiers = {"disk": msgspec.structs.replace(self.disk)}
        totals = msgspec.structs.replace(self.real.counters(), host_evictions=3, leases=1, tiers=tiers)
        self._counting.add(totals, counts)


def test_what_was_counted_arrives_in_the_api_server() -> None:
    service = Service()
    service.disk.stored_blocks = 5
    stats = SchedulerStats(service)
    record = RequestRecord(
        request_id="r", block_tokens=64, prompt_tokens=200, matched_tokens={"disk": 128}, loaded_tokens=128
    )
    stats.count_request(record)
    stats.count_copies(WorkerReport(bytes_loaded=1000, bytes_saved=10))
    delta = stats.take(0.001)
    assert delta is not None
    assert stats.take(0.001) is None, "at most one delta a second"
    service.real.close(1.0)

    registry = prometheus_client.CollectorRegistry()

    def made(kind: Any) -> Any:
        return lambda **options: kind(registry=registry, **options)

    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = KVFerryPromMetrics(config, {kind: made(kind) for kind in kinds}, ["engine"], {0: ["0"]})
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(delta.to_dict()))
    metrics.observe(plain, 0)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"engine": "0", **labels})

    assert value("kvferry_hit_tokens_total", tier="disk") == 128
    assert value("kvferry_stored_blocks_total", tier="disk") == 5
    assert value("kvferry_scattered_bytes_total") == 1000
    assert value("kvferry_evictions_total", tier="host") == 3
    assert value("kvferry_leases") == 1


def test_deltas_of_an_interval_join() -> None:
    first = KVFerryStats(data={"kvferry_hit_tokens_total": {"host": 64.0}})
    joined = first.aggregate(KVFerryStats(data={"kvferry_hit_tokens_total": {"host": 1.0, "disk": 2.0}}))
    assert joined.reduce()["hit_tokens"] == 67
    assert not joined.is_empty()
