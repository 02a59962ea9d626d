"""One table describes every metric; plain deltas carry the counts to whoever exports them."""

from __future__ import annotations

import json

import prometheus_client
import pytest

from kvferry.connector import metrics
from kvferry.connector.metrics import METRICS, Counts, Exporter, Kind, build_registry, merge


def sample(registry: prometheus_client.CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_the_table_is_consistent() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.name.startswith("kvferry_")
        assert metric.help.endswith(".")
        assert metric.unit
        if metric.unit == "seconds":
            assert metric.name.removesuffix("_total").endswith("_seconds")
        if "bytes" in metric.name:
            assert metric.unit == "bytes"


def test_counts_reach_prometheus_through_plain_data() -> None:
    counts = Counts()
    counts.add(metrics.LOADED_BYTES, 100, "disk")
    counts.add(metrics.LOADED_BYTES, 20, "disk")
    counts.add(metrics.REFUSALS, 1, "disk", "checksum")
    counts.show(metrics.LEASES, 3)
    counts.show(metrics.LEASES, 2)
    counts.observe(metrics.LOAD_SECONDS, 0.02, "disk")
    counts.observe(metrics.LOAD_SECONDS, 0.04, "disk")
    registry, exporter = build_registry()
    exporter.feed(json.loads(json.dumps(counts.take())))
    assert sample(registry, "kvferry_loaded_bytes_total", tier="disk") == 120
    assert sample(registry, "kvferry_refusals_total", tier="disk", reason="checksum") == 1
    assert sample(registry, "kvferry_leases") == 2
    assert sample(registry, "kvferry_load_seconds_count", tier="disk") == 2
    assert sample(registry, "kvferry_load_seconds_sum", tier="disk") == pytest.approx(0.06)


def test_a_delta_is_taken_once() -> None:
    counts = Counts()
    counts.add(metrics.LOOKUP_BLOCKS, 1)
    assert counts.take() != {}
    assert counts.take() == {}


def test_feeding_two_deltas_equals_feeding_their_merger() -> None:
    def delta(amount: float, gauge: float) -> metrics.Delta:
        counts = Counts()
        counts.add(metrics.STORED_BLOCKS, amount, "disk")
        counts.show(metrics.RESERVATIONS, gauge)
        counts.observe(metrics.STORE_SECONDS, amount, "disk")
        return counts.take()

    apart, exporter = build_registry()
    exporter.feed(delta(1, 5))
    exporter.feed(delta(2, 4))
    together, exporter = build_registry()
    exporter.feed(merge(delta(1, 5), delta(2, 4)))
    for name, labels in [
        ("kvferry_stored_blocks_total", {"tier": "disk"}),
        ("kvferry_reservations", {}),
        ("kvferry_store_seconds_sum", {"tier": "disk"}),
        ("kvferry_store_seconds_count", {"tier": "disk"}),
    ]:
        assert sample(apart, name, **labels) == sample(together, name, **labels)
    assert sample(apart, "kvferry_stored_blocks_total", tier="disk") == 3
    assert sample(apart, "kvferry_reservations") == 4


def test_merging_changes_neither_delta() -> None:
    counts = Counts()
    counts.observe(metrics.STORE_SECONDS, 1, "disk")
    first = counts.take()
    second: metrics.Delta = {"kvferry_store_seconds": {"disk": [2.0]}}
    merge(first, second)
    assert first == {"kvferry_store_seconds": {"disk": [1]}}
    assert second == {"kvferry_store_seconds": {"disk": [2.0]}}


def test_observations_of_one_delta_are_bounded() -> None:
    counts = Counts()
    for _ in range(metrics.MAX_OBSERVATIONS + 10):
        counts.observe(metrics.WAIT_SECONDS, 1.0)
    delta = counts.take()
    assert len(delta["kvferry_request_wait_seconds"][""]) == metrics.MAX_OBSERVATIONS  # type: ignore[arg-type]


def test_an_engines_own_labels_come_first() -> None:
    registry = prometheus_client.CollectorRegistry()
    kinds = {
        kind: kind
        for kind in (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    }
    exporter = Exporter(kinds, ["model_name", "engine"], {"registry": registry})
    counts = Counts()
    counts.add(metrics.EVICTIONS, 4, "host")
    exporter.feed(counts.take(), ["llama", "0"])
    assert sample(registry, "kvferry_evictions_total", model_name="llama", engine="0", tier="host") == 4


@pytest.mark.parametrize(
    "delta",
    [
        {"kvferry_of_a_later_version_total": {"": 1.0}},
        {"kvferry_evictions_total": {"host|unexpected": 1.0}},
        {"kvferry_evictions_total": {"host": [1.0]}},
        {"kvferry_load_seconds": {"disk": 1.0}},
    ],
)
def test_a_delta_of_another_version_does_no_harm(delta: metrics.Delta) -> None:
    registry, exporter = build_registry()
    exporter.feed(delta)
    samples = [
        one
        for family in registry.collect()
        for one in family.samples
        if one.value and "created" not in one.name
    ]
    assert samples == []


def test_kinds_follow_from_the_line() -> None:
    assert metrics.EVICTIONS.kind is Kind.COUNTER
    assert metrics.LEASES.kind is Kind.GAUGE
    assert metrics.LOAD_SECONDS.kind is Kind.HISTOGRAM


def test_the_reference_has_a_row_for_every_metric() -> None:
    text = "\n".join(metrics.reference())
    assert all(f"| `{metric.name}` |" in text for metric in METRICS)
