"""What Prometheus is told about a server, made from its status; and the dashboard that shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from status_kit import HOSTILE, disk_counters, pool, status
from test_embedded import Worker, prefix, wrapped

from kvferry.connector import metrics
from kvferry.connector.metrics import METRICS, Scope
from kvferry.connector.server.exporting import Scraper
from kvferry.connector.server.status import ServerStatus

DASHBOARD = Path(__file__).parents[2] / "docs" / "deploy" / "grafana" / "kvferry.json"
POOL = {"tenant": "", "model": "9f3c21ab"}


class Page:
    """A scraped page by series."""

    def __init__(self, scraped: ServerStatus, accept: str = "") -> None:
        body, self.content_type = Scraper(lambda: scraped).scrape(accept)
        self.text = body.decode()
        if "openmetrics" not in self.content_type:
            self.samples = {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for family in text_string_to_metric_families(self.text)
                for sample in family.samples
            }

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, tuple(sorted(labels.items()))))

    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


def test_a_pools_totals_carry_its_tenant_and_model() -> None:
    page = Page(status(10))
    assert page.value("kvferry_loaded_blocks_total", **POOL, tier="disk") == 400
    assert page.value("kvferry_refusals_total", **POOL, tier="disk", reason="checksum") == 2
    assert page.value("kvferry_evictions_total", **POOL, tier="host") == 130
    assert page.value("kvferry_server_found_blocks_total", **POOL, tier="host") == 900
    assert page.value("kvferry_server_misses_total", **POOL, reason="evicted") == 20
    assert page.value("kvferry_expired_leases_total", **POOL) == 3
    assert page.value("kvferry_void_commits_total", **POOL) == 5
    assert page.value("kvferry_leases", **POOL) == 5


def test_the_latency_of_tiers_is_a_histogram() -> None:
    page = Page(status(10))
    series = dict(**POOL, tier="disk")
    assert page.value("kvferry_load_seconds_bucket", **series, le="0.005") == 70
    assert page.value("kvferry_load_seconds_bucket", **series, le="10.0") == 90
    assert page.value("kvferry_load_seconds_bucket", **series, le="+Inf") == 100
    assert page.value("kvferry_load_seconds_count", **series) == 100
    assert page.value("kvferry_load_seconds_sum", **series) == 62


def test_the_server_itself_is_told_about() -> None:
    page = Page(status(10, is_ready=False, is_draining=True))
    assert page.value("kvferry_server_ready") == 0
    assert page.value("kvferry_server_draining") == 1
    assert page.value("kvferry_server_connections", mode="map") == 2
    assert page.value("kvferry_server_requests_total", type="Lookup") == 9000
    assert page.value("kvferry_server_refused_connections_total", reason="credential") == 2
    assert page.value("kvferry_server_lookup_seconds_bucket", le="0.0001") == 8955
    assert page.value("kvferry_server_lookup_seconds_bucket", le="+Inf") == 9000
    assert page.value("kvferry_server_info", version="0.1.0") == 1
    assert page.value("process_resident_memory_bytes") is not None


def test_every_metric_of_a_server_appears() -> None:
    shown = Page(status(10, pool(10, disk=disk_counters()))).names()
    quiet = {metrics.LOST_WRITES.name}  # appears with the first
    for metric in METRICS:
        if metric.scope is not Scope.ENGINE and metric.name not in quiet:
            assert {metric.name, f"{metric.name}_bucket"} & shown, metric.name


def test_no_metric_of_an_engine_appears() -> None:
    shown = Page(status(10)).names()
    assert [m.name for m in METRICS if m.scope is Scope.ENGINE and m.name in shown] == []


def test_a_counter_of_a_tier_is_there_before_it_counts() -> None:
    """``rate`` and ``increase`` miss the step from nothing to one."""
    page = Page(status(1, pool(1, disk=msgspec.structs.replace(disk_counters(), failed_stores=0))))
    assert page.value("kvferry_failed_stores_total", **POOL, tier="disk") == 0


def test_a_breaker_is_a_number() -> None:
    for state, number in (("closed", 0), ("half_open", 1), ("open", 2)):
        tier = msgspec.structs.replace(disk_counters(), breaker=state)
        page = Page(status(1, pool(1, disk=tier)))
        assert page.value("kvferry_breaker_state", **POOL, tier="disk") == number


def test_a_pool_that_is_gone_leaves_no_series() -> None:
    statuses = [status(10, pool(10, tenant="departed"), pool(10)), status(10, pool(10))]
    scraper = Scraper(lambda: statuses.pop(0))
    assert b"departed" in scraper.scrape()[0]
    assert b"departed" not in scraper.scrape()[0]


def test_names_of_others_cannot_add_lines() -> None:
    page = Page(status(10, pool(10, tenant=f'{HOSTILE}"}}\nkvferry_forged 1')))
    assert page.names() == Page(status(10)).names()


def test_a_scraper_that_asks_for_openmetrics_gets_it() -> None:
    page = Page(status(10), "application/openmetrics-text; version=1.0.0")
    assert page.content_type.startswith("application/openmetrics-text")
    assert page.text.endswith("# EOF\n")


def test_a_status_that_cannot_be_had_is_the_scrapers_error() -> None:
    def stuck() -> ServerStatus:
        raise TimeoutError("the index thread does not answer")

    with pytest.raises(TimeoutError):
        Scraper(stuck).scrape()


def test_the_counters_of_a_real_service_arrive() -> None:
    worker = Worker(8, tiers=[wrapped()])
    try:
        keys = prefix(12)
        for start in (0, 4, 8):
            worker.save(keys[start : start + 4])
            worker.settle()
        assert worker.load(keys[:4]) == 4  # they had to make room, and came back from the tier
        served = msgspec.structs.replace(pool(1), counters=worker.service.counters())
        page = Page(status(1, served))
        assert page.value("kvferry_server_saved_blocks_total", **POOL) == 12
        assert page.value("kvferry_loaded_blocks_total", **POOL, tier="f") == 4
        assert page.value("kvferry_load_seconds_count", **POOL, tier="f") >= 1
        assert page.value("kvferry_server_leased_blocks_total", **POOL, tier="f") == 4
        lookups = page.value("kvferry_server_lookup_blocks_total", **POOL)
        found = page.value("kvferry_server_found_blocks_total", **POOL, tier="host")
        assert lookups is not None
        assert found is not None
        assert 4 <= found <= lookups
    finally:
        worker.close()


# The dashboard


def expressions() -> str:
    board = json.loads(DASHBOARD.read_text())
    return "\n".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))


def test_every_metric_of_the_dashboard_exists() -> None:
    named = set(re.findall(r"kvferry_\w+", expressions()))
    assert named
    known = {metric.name for metric in METRICS if metric.scope is not Scope.ENGINE}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} <= known


def test_every_metric_of_a_server_is_on_the_dashboard() -> None:
    shown = expressions()
    beside = {  # the same thing in other units, or never looked at over time
        "kvferry_loaded_blocks_total",
        "kvferry_stored_blocks_total",
        "kvferry_tier_blocks",
        "kvferry_server_start_time_seconds",
    }
    missing = [m.name for m in METRICS if m.scope is not Scope.ENGINE and m.name not in shown]
    assert set(missing) == beside


def test_the_dashboard_asks_for_its_data_source() -> None:
    board = json.loads(DASHBOARD.read_text())
    first = board["templating"]["list"][0]
    assert (first["name"], first["type"]) == ("datasource", "datasource")
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
