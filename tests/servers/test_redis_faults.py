"""A server that is killed, frozen, filled or restarted under a running service: requests go on, hits resume.

The service is the real one (queue, threads, deadline, circuit breaker); the engine is played, and every
byte that it reads is checked. Times are bounds, not measurements.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from redis_kit import keys as block_keys
from redis_kit import load, open_tier, store
from redis_server import RedisCluster, RedisServer
from test_embedded import Worker, prefix

from kvferry.connector.errors import TierError, TierTimeout, TierUnavailable
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Outcome

StartRedis = Callable[..., RedisServer]
Start = Callable[..., Worker]

DEADLINE_S = 0.5
"""Of the tier: short, so that a frozen server costs the tests little."""
GRACE_S = 1.5


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Worker] = []

    def make(server: RedisServer | RedisCluster, slots: int = 8, **options: object) -> Worker:
        tier = {
            "type": "redis",
            "url": server.url,
            "deadline_s": DEADLINE_S,
            "ask": "always",
            "admission": "always",
            **options,
        }
        started.append(Worker(slots, plugins=["kvferry.plugins.redis"], tiers=[tier], retry_failed_s=0.05))
        return started[-1]

    yield make
    for worker in started:
        worker.close(2.0)


def request(worker: Worker, keys: Sequence[BlockKey]) -> tuple[int, float]:
    """Do what an engine does with a prompt: ask, wait while blocks are coming, read; return hits and seconds."""
    began = time.monotonic()
    end = began + DEADLINE_S + GRACE_S
    while True:
        worker.service.poll()
        coming = worker.service.prefetch("request", keys).blocks
        if worker.service.lookup(keys).ready >= coming or time.monotonic() > end:
            break
        worker.wait_until(lambda: False, 0.005)
    return worker.read(keys, "request"), time.monotonic() - began


def fill(worker: Worker, count: int = 6) -> list[list[BlockKey]]:
    """Save prompts of four blocks each, more than the arena holds."""
    prompts = [prefix(4, str(number)) for number in range(count)]
    for keys in prompts:
        assert worker.save(keys) == 4
        worker.settle()
    return prompts


def hits_resume(worker: Worker, prompts: Sequence[Sequence[BlockKey]], seconds: float = 30.0) -> None:
    """Go on asking until every prompt is found whole again."""
    end = time.monotonic() + seconds
    missing = list(prompts)
    while missing:
        assert time.monotonic() < end, f"{len(missing)} prompts are not found again"
        missing = [keys for keys in missing if request(worker, keys)[0] < 4]


def test_a_second_engine_loads_what_the_first_one_stored(start: Start, start_redis: StartRedis) -> None:
    server = start_redis()
    first = start(server)
    prompts = fill(first)
    first.close()
    second = start(server)
    for keys in prompts:
        assert request(second, keys)[0] == 4
    second.assert_nothing_leaked()


def test_killed_in_mid_load_and_started_again(start: Start, start_redis: StartRedis) -> None:
    server = start_redis("--appendonly", "yes", "--appendfsync", "always")
    worker = start(server)
    prompts = fill(worker)
    assert request(worker, prompts[0])[0] == 4
    for keys in prompts[1:4]:
        worker.service.prefetch("under way", keys)
    server.kill()
    worker.service.release_owner("under way")
    for keys in prompts * 2:
        hits, seconds = request(worker, keys)
        assert 0 <= hits <= 4
        assert seconds < DEADLINE_S + GRACE_S
    assert worker.service.counters().tiers["redis"].breaker == "open"
    server.start()
    hits_resume(worker, prompts)
    assert worker.service.counters().tiers["redis"].breaker == "closed"
    later = prefix(4, "stored after the restart")
    worker.save(later)
    worker.settle()
    hits_resume(worker, [*prompts, later])
    worker.assert_nothing_leaked()


def test_frozen_and_thawed(start: Start, start_redis: StartRedis) -> None:
    server = start_redis()
    worker = start(server)
    prompts = fill(worker)
    with server.frozen():
        slowest = 0.0
        for keys in prompts * 3:
            hits, seconds = request(worker, keys)
            slowest = max(slowest, seconds)
            assert hits in (0, 4)
        assert slowest < DEADLINE_S + GRACE_S
        assert worker.service.counters().tiers["redis"].breaker != "closed"
        began = time.monotonic()
        for keys in prompts:
            request(worker, keys)
        assert time.monotonic() - began < len(prompts) * (DEADLINE_S + GRACE_S)
    hits_resume(worker, prompts)
    worker.assert_nothing_leaked()


def test_filled_up_and_relieved(start: Start, start_redis: StartRedis) -> None:
    server = start_redis()
    worker = start(server)
    prompts = fill(worker, 4)
    with contextlib.closing(server.client()) as client:
        client.config_set("maxmemory", "1mb")
        full = prefix(4, "full")
        worker.save(full)
        worker.settle()
        assert worker.service.counters().tiers["redis"].no_room_stores == 4
        assert worker.service.counters().tiers["redis"].breaker == "closed", "full is not broken"
        for keys in prompts:
            assert request(worker, keys)[0] == 4
        client.config_set("maxmemory", 0)
    later = prefix(4, "later")
    worker.save(later)
    worker.settle()
    fill(worker, 3)
    assert request(worker, later)[0] == 4
    worker.assert_nothing_leaked()


def test_evictions_by_the_server_are_misses(start: Start, start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru")
    worker = start(server)
    prompts = fill(worker, 150)
    hits = [request(worker, keys)[0] for keys in prompts]
    assert 0 < sum(hits) < 4 * 150
    assert worker.service.counters().tiers["redis"].failed_loads == 0
    worker.assert_nothing_leaked()


def test_a_cluster_that_loses_a_node_and_gets_it_back(
    start: Start, start_cluster: Callable[..., RedisCluster]
) -> None:
    cluster = start_cluster()
    worker = start(cluster)
    prompts = fill(worker)
    with cluster.nodes[1].frozen():
        for keys in prompts * 2:
            hits, seconds = request(worker, keys)
            assert 0 <= hits <= 4
            assert seconds < DEADLINE_S + GRACE_S
    cluster.wait_until_whole()
    hits_resume(worker, prompts)
    worker.assert_nothing_leaked()


# --- the tier alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["load", "store", "contains", "delete"])
def test_a_call_to_a_frozen_server_ends_with_its_deadline(start_redis: StartRedis, verb: str) -> None:
    server = start_redis()
    tier, some = open_tier(server.url, deadline_s=DEADLINE_S), block_keys(200)
    store(tier, some)
    fresh = block_keys(200, "fresh")
    calls: dict[str, Callable[[], object]] = {
        "load": lambda: load(tier, some),
        "store": lambda: store(tier, fresh),
        "contains": lambda: tier.contains(some),
        "delete": lambda: tier.delete(some),
    }
    with server.frozen():
        for _ in range(3):  # the first on a connection that stands, the others on new ones
            began = time.monotonic()
            with pytest.raises(TierTimeout, match="did not answer in time"):
                calls[verb]()
            assert time.monotonic() - began < DEADLINE_S * 1.5 + 0.3
    calls[verb]()
    tier.close()


def test_a_server_that_answers_a_drop_at_a_time_is_too_late() -> None:
    """Every receive succeeds; the call ends all the same."""

    def drip(listener: socket.socket, stop: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    while b"GET" not in connection.recv(4096):
                        connection.sendall(b"+OK\r\n")
                    connection.sendall(b"$15616\r\n")
                    while not stop.wait(0.02):
                        connection.sendall(b"x")

    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener, stop), name="drip", daemon=True)
        thread.start()
        tier = open_tier(f"redis://127.0.0.1:{listener.getsockname()[1]}", deadline_s=DEADLINE_S)
        began = time.monotonic()
        with pytest.raises(TierTimeout):
            load(tier, block_keys(1))
        assert time.monotonic() - began < DEADLINE_S * 2 + 0.3
        tier.close()
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_server_that_dies_while_it_sends_leaves_no_block_half_loaded(start_redis: StartRedis) -> None:
    server = start_redis()
    tier, some = open_tier(server.url, deadline_s=5.0), block_keys(400)
    store(tier, some)
    timer = threading.Timer(0.004, server.process.kill)  # type: ignore[union-attr]
    timer.start()
    with contextlib.suppress(TierError):
        while True:
            assert set(load(tier, some)) <= {Outcome.OK, Outcome.FAILED}
    timer.join()
    server.kill()
    with pytest.raises(TierUnavailable, match=r"127\.0\.0\.1"):
        load(tier, some)
    server.start()
    assert load(tier, some) == [Outcome.MISSING] * 400
    tier.close()


def test_a_server_that_is_loading_its_data_is_not_there_yet(start_redis: StartRedis) -> None:
    server = start_redis("--key-load-delay", "5000", "--loading-process-events-interval-bytes", "1024")
    tier, some = open_tier(server.url, deadline_s=5.0), block_keys(300)
    store(tier, some)
    with contextlib.closing(server.client()) as client:
        client.config_set("save", "3600 1")
        client.save()
    server.kill()
    server.start(until_ready=False)
    outcomes: list[Outcome] = []
    end = time.monotonic() + 30
    was_loading = False
    while outcomes != [Outcome.OK] * 300:
        assert time.monotonic() < end
        try:
            outcomes = load(tier, some)
        except TierUnavailable as error:
            was_loading = was_loading or "loading" in str(error)
    assert was_loading
    tier.close()


def test_a_replica_takes_no_stores_and_gives_what_it_has(start_redis: StartRedis) -> None:
    server = start_redis()
    tier, some = open_tier(server.url), block_keys(3)
    store(tier, some)
    with contextlib.closing(server.client()) as client:
        client.config_set("replica-read-only", "yes")
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(TierError, match="replica"):
            store(tier, block_keys(2, "new"))
        assert load(tier, some) == [Outcome.OK] * 3
        client.replicaof("no", "one")
    assert store(tier, block_keys(2, "new")) == [Outcome.OK] * 2
    tier.close()
