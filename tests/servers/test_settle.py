"""A producer's blocks are there when it says so: engines that share a Valkey, and clients of one cache server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_embedded
from cache_server import CacheServer
from redis_kit import fresh_prefix
from redis_server import RedisServer
from test_embedded import Worker, prefix
from test_embedded_shared import fetch

from kvferry.connector.arena import Arena
from kvferry.connector.client import ClientService
from kvferry.connector.config import Config
from kvferry.connector.keys import BlockKey
from kvferry.connector.lane import Lane
from kvferry.connector.layout import BlockLayout

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=16, head_dim=64, itemsize=2)
BLOCKS = 40
ROUNDS = 5
LONG_S = 20.0
ANSWER_S = 1.0
"""Budget of a step's answers that a machine busy with other tests keeps."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Starts services with Redis as the only tier below an arena of their own."""
    monkeypatch.setattr(test_embedded, "LAYOUT", LAYOUT)
    started: list[Worker] = []

    def make(server: RedisServer, names: str, **options: object) -> Worker:
        tier = {"type": "redis", "url": server.url, "prefix": names, "ask": "always", **options}
        started.append(Worker(256, plugins=["kvferry.plugins.redis"], tiers=[tier]))
        return started[-1]

    yield make
    for worker in started:
        worker.close(1.0)


@pytest.mark.parametrize(
    "rule",
    [{}, {"admission": "second-touch"}, {"write": "back"}, {"queue_blocks": 8}],
    ids=["adaptive", "second-touch", "write-back", "short-queue"],
)
def test_what_is_settled_in_valkey_another_engine_finds_at_once(
    shared_redis: RedisServer, engine: Callable[..., Worker], rule: dict[str, object]
) -> None:
    names = fresh_prefix()
    producer, consumer = engine(shared_redis, names, **rule), engine(shared_redis, names)
    for number in range(ROUNDS):
        keys = prefix(BLOCKS, f"prompt {number}")
        assert producer.save(keys) == BLOCKS
        assert producer.service.settle(keys, LONG_S)
        assert fetch(consumer, keys) == BLOCKS
    producer.assert_nothing_leaked()
    consumer.assert_nothing_leaked()


def test_without_settling_a_block_may_not_be_there_yet(
    shared_redis: RedisServer, engine: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: while its store takes its time, what is only committed is not found."""
    store, may_store = Lane._store, threading.Event()

    def store_later(*arguments: object) -> object:
        may_store.wait(LONG_S)
        return store(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Lane, "_store", store_later)
    names, keys = fresh_prefix(), prefix(4, "committed")
    producer = engine(shared_redis, names)
    producer.save(keys)
    assert fetch(engine(shared_redis, names), keys) == 0
    may_store.set()
    assert producer.service.settle(keys, LONG_S)
    assert fetch(engine(shared_redis, names), keys) == 4


def test_a_valkey_that_is_gone_or_stuck_ends_the_wait(
    start_redis: Callable[..., RedisServer], engine: Callable[..., Worker]
) -> None:
    server = start_redis()
    producer, keys = engine(server, fresh_prefix()), prefix(4, "frozen")
    with server.frozen():
        producer.save(keys)
        started = time.monotonic()
        assert not producer.service.settle(keys, 0.3)
        assert time.monotonic() - started < LONG_S / 2
    assert producer.service.settle(keys, LONG_S), "it comes later"
    server.kill()
    producer.save(prefix(4, "gone"))
    assert not producer.service.settle(prefix(4, "gone"), LONG_S)


def test_what_is_settled_in_a_cache_server_as_a_tier_another_engine_finds_at_once(short_path: Path) -> None:
    with CacheServer(short_path, {"host": {"capacity": "64MiB"}}) as server:
        tier = {"type": "remote", "servers": [server.tcp], "ask": "always", "admission": "second-touch"}
        plugins = ["kvferry.plugins.remote"]
        producer, consumer = (Worker(256, plugins=plugins, tiers=[tier]) for _ in range(2))
        try:
            for number in range(ROUNDS):
                keys = prefix(BLOCKS, f"prompt {number}")
                assert producer.save(keys) == BLOCKS
                assert producer.service.settle(keys, LONG_S)
                assert fetch(consumer, keys) == BLOCKS
        finally:
            producer.close(1.0)
            consumer.close(1.0)


class Client:
    """An engine's scheduler and worker on a server's arena."""

    def __init__(self, server: CacheServer) -> None:
        config = Config(service=server.unix, answer_budget_s=ANSWER_S)
        self.service = ClientService(config, LAYOUT, test_embedded.FINGERPRINT, "test")
        assert self.service.arena is not None
        self.arena = Arena.attach(self.service.arena)

    def save(self, keys: list[BlockKey]) -> int:
        self.service.poll()
        reservation = self.service.reserve("save", keys)
        assert reservation is not None
        for place in reservation.places:
            self.arena.slot(place.slot)[: LAYOUT.payload_bytes] = content(place.key)
        self.service.commit(reservation, [place.key for place in reservation.places])
        return len(reservation.places)

    def read(self, keys: list[BlockKey]) -> int:
        """Return how many blocks are there now, every byte of them checked."""
        self.service.poll()
        lease = self.service.lease("load", keys[: self.service.lookup(keys).ready])
        for place in lease.places:
            assert bytes(self.arena.slot(place.slot)[: LAYOUT.payload_bytes]) == content(place.key)
        self.service.release(lease)
        return len(lease.places)

    def close(self) -> None:
        self.service.close(1.0)
        self.arena.close()


def content(key: BlockKey) -> bytes:
    return (key * (LAYOUT.payload_bytes // len(key) + 1))[: LAYOUT.payload_bytes]


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settle")


def test_what_one_client_of_a_server_settles_another_finds_at_once(short_path: Path) -> None:
    with CacheServer(short_path, {"host": {"capacity": "64MiB"}}) as server:
        producer, consumer = Client(server), Client(server)
        try:
            for number in range(4 * ROUNDS):
                keys = prefix(BLOCKS, f"prompt {number}")
                assert producer.save(keys) == BLOCKS
                assert producer.service.settle(keys, LONG_S)
                assert consumer.read(keys) == BLOCKS
            unsaved = prefix(BLOCKS, "never saved")
            assert not producer.service.settle(unsaved, LONG_S)
            with server.frozen():
                started = time.monotonic()
                assert not producer.service.settle(keys, 0.3)
                assert time.monotonic() - started < LONG_S / 2
            server.kill()
            producer.service.poll()
            assert not producer.service.settle(keys, LONG_S)
        finally:
            producer.close()
            consumer.close()
