"""Statuses of a cache server that does not exist, and an operation server that shows them."""

from __future__ import annotations

import logging
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from kvferry.connector import latency
from kvferry.connector.counters import ServiceCounters, TierCounters
from kvferry.connector.server.http import OperationServer
from kvferry.connector.server.status import ConnectionStatus, PoolStatus, ServerStatus
from kvferry.connector.tally import Counters

GIB = 1 << 30
BLOCK_BYTES = 1 << 20
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


def disk_counters(step: int = 10) -> TierCounters:
    buckets = latency.empty_buckets()
    for seconds, times in ((0.004, 7), (0.08, 2), (60.0, 1)):
        for _ in range(times * step):
            latency.note(buckets, seconds)
    return TierCounters(
        loaded_blocks=40 * step,
        loaded_bytes=40 * step * BLOCK_BYTES,
        load_batches=10 * step,
        load_seconds=6.2 * step,
        load_buckets=buckets,
        stored_blocks=25 * step,
        stored_bytes=25 * step * BLOCK_BYTES,
        store_batches=4 * step,
        store_seconds=0.4 * step,
        store_buckets=list(buckets),
        refused={"checksum": 2},
        failed_loads=3,
        shed_stores=17,
        blocks=1200 * step,
        used_bytes=min(55 * GIB, 5 * GIB * step),
        capacity_bytes=64 * GIB,
        evictions=4 * step,
    )


def pool(
    step: int = 10, tenant: str = "", fingerprint: str = "9f3c21ab", **tiers: TierCounters
) -> PoolStatus:
    decisions = Counters(
        lookup_blocks=200 * step,
        found=Counter(host=90 * step, disk=40 * step),
        hits=Counter(host=88 * step, disk=38 * step),
        misses=Counter(never_stored=7 * step, evicted=2 * step, slower_than_recompute=step),
        saved=60 * step,
        no_room=1,
        expired_leases=2,
        expired_holds=1,
        expired_reservations=4,
        void_commits=5,
    )
    return PoolStatus(
        tenant=tenant,
        fingerprint=fingerprint,
        block_tokens=16,
        block_bytes=BLOCK_BYTES,
        connections=2,
        dead_writers=0,
        counters=ServiceCounters(
            decisions=decisions,
            slots=8000,
            used_slots=min(7600, 600 * step),
            capacity_bytes=8000 * BLOCK_BYTES,
            host_blocks=min(7500, 590 * step),
            host_evictions=13 * step,
            leases=5,
            reservations=1,
            pending_transfers=2,
            tiers=tiers or {"disk": disk_counters(step)},
        ),
    )


def status(step: int = 10, *pools: PoolStatus, **changes: object) -> ServerStatus:
    """A status that is ``step`` samples of two seconds old."""
    connections = [
        ConnectionStatus(
            engine=f"vllm-{index}",
            tenant="",
            fingerprint="9f3c21ab",
            mode="map" if index else "stream",
            connected_s=400.0 * (index + 1),
            requests=3000 * index,
        )
        for index in range(3)
    ]
    lookups = 900 * step
    made = ServerStatus(
        version="0.1.0",
        server_id="5f1c0a77d2b94e10",
        started=1_790_000_000.0,
        now=1_790_000_000.0 + 2 * step,
        is_ready=True,
        is_draining=False,
        pools=list(pools) or [pool(step)],
        connections=connections,
        requests={"Lookup": lookups, "Lease": 40 * step},
        refused_connections={"credential": 2},
        lookup_seconds=[
            (2e-5, lookups * 9 // 10),
            (1e-4, lookups * 995 // 1000),
            (0.5, lookups - 1),
            (float("inf"), lookups),
        ],
    )
    return msgspec.structs.replace(made, **changes)


@contextmanager
def serving(source: Callable[[], ServerStatus], address: str = "127.0.0.1:0") -> Iterator[OperationServer]:
    server = OperationServer(address, source, logging.getLogger("kvferry.test"))
    server.start()
    try:
        yield server
    finally:
        server.close(time.monotonic() + 20.0)


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Ask the server; return status, headers in lower case, and body."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20.0) as answer:
            return answer.status, {key.lower(): value for key, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {key.lower(): value for key, value in error.headers.items()}, error.read()
