"""Clients on a real cache server: whole engines, whose every byte is checked, share it, outlive it and die on it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from played_engine import FINGERPRINT, LAYOUT, PlayedEngine

from kvferry.connector.client import ClientService
from kvferry.connector.config import Config, HostConfig
from kvferry.connector.errors import AccessRefused
from kvferry.connector.joining import JoinRefused
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.server.config import ServerConfig, ServerSettings
from kvferry.connector.server.running import CacheServer
from kvferry.connector.service import MissReason

BLOCK = LAYOUT.block_tokens
DEADLINE_S = 20.0
SLOTS = 64
TOKEN = "a token that is long enough for the server to take"


def prompt(blocks: int, seed: int = 0) -> list[int]:
    return [(seed * 1000 + index) % 50000 for index in range(blocks * BLOCK + 1)]


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


class Machine:
    """A machine with one server's address, the servers that come and go there, and engines."""

    def __init__(self, directory: Path) -> None:
        self.address = f"unix://{directory}/kvferry.sock"
        self.server: CacheServer | None = None
        self.engines: list[PlayedEngine] = []

    def start(self, **server: object) -> CacheServer:
        self.server = CacheServer(
            ServerSettings(
                server=ServerConfig(listen=(self.address,), http="", **server),
                cache=Config(host=HostConfig(capacity=(SLOTS + 2) * LAYOUT.slot_bytes)),
            )
        )
        self.server.start()
        return self.server

    def stop(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.close(1.0)

    def config(self, **changes: object) -> Config:
        # A budget that a machine busy with other tests keeps: what is late is tested elsewhere.
        return Config(service=self.address, answer_budget_s=1.0, **changes)

    def client(self, **changes: object) -> ClientService:
        return ClientService(self.config(**changes), LAYOUT, FINGERPRINT, "test")

    def engine(self, world_size: int = 1) -> PlayedEngine:
        engine = PlayedEngine(self.config(), world_size, service=self.client())
        self.engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.stop()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with contextlib.closing(Machine(tmp_path)) as machine:
        yield machine


def test_an_engine_is_warm_from_another(machine: Machine) -> None:
    machine.start()
    first, second = machine.engine(), machine.engine(world_size=2)
    first.run(prompt(4))
    record = second.run(prompt(4))
    assert record.loaded_tokens == 4 * BLOCK
    assert record.matched_tokens == {"host": 4 * BLOCK}


@contextlib.contextmanager
def closing(client: ClientService) -> Iterator[ClientService]:
    yield client
    client.close(1.0)


def test_what_one_client_has_settled_another_finds_at_once(machine: Machine) -> None:
    machine.start()
    with closing(machine.client()) as first, closing(machine.client()) as second:
        keys = [BlockKey(bytes([number]) * 32) for number in range(8)]
        reservation = first.reserve("r", keys)
        assert reservation is not None
        assert not first.settle(keys, DEADLINE_S), "reserved is not committed"
        first.commit(reservation, keys)
        assert first.settle(keys, DEADLINE_S)
        assert second.lookup(keys).ready == 8
        machine.stop()
        assert not first.settle(keys, DEADLINE_S)


def test_a_server_that_restarts_is_found_again(machine: Machine) -> None:
    machine.start()
    engine = machine.engine()
    engine.run(prompt(3))
    old = engine.service.arena
    machine.stop()
    assert engine.run(prompt(3)).missing_reason == "tier_down"
    assert engine.service.arena is None
    machine.start()
    wait_until(lambda: engine.run(prompt(3, seed=1)) is not None and engine.service.arena is not None)
    assert engine.service.arena != old
    engine.run(prompt(3, seed=2))
    assert engine.run(prompt(3, seed=2)).loaded_tokens == 3 * BLOCK


def test_a_request_that_runs_while_the_server_restarts_is_saved_afterwards(machine: Machine) -> None:
    machine.start()
    engine = machine.engine()
    machine.stop()
    request = engine.arrive(prompt(3))
    engine.step()
    machine.start()

    def is_back() -> bool:
        engine.step()
        return engine.service.arena is not None

    wait_until(is_back)
    request.tokens.append(7)
    engine.step()
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt(3)).loaded_tokens == 3 * BLOCK


def test_an_engine_that_ends_leaves_nothing_behind(machine: Machine) -> None:
    server = machine.start()
    engine, other = machine.engine(), machine.engine()
    engine.run(prompt(2))
    engine.arrive(prompt(4, seed=7))
    engine.step(collect=False)  # slots are reserved, copies under way
    (pool,) = server.status().pools
    assert pool.counters.reservations == 1
    engine.service.close(1.0)
    wait_until(lambda: server.status().pools[0].dead_writers == 1)
    assert server.status().pools[0].counters.reservations == 1, "its worker may still write"
    for rank in engine.ranks:
        rank.close()
    wait_until(lambda: server.status().pools[0].dead_writers == 0)
    (pool,) = server.status().pools
    assert (pool.counters.reservations, pool.counters.leases) == (0, 0)
    assert other.run(prompt(4, seed=7)).loaded_tokens == 0, "what was not committed is not there"
    machine.engines.remove(engine)


def test_a_server_that_comes_later_is_used(machine: Machine) -> None:
    engine = machine.engine()
    assert engine.run(prompt(2)).missing_reason == MissReason.TIER_DOWN.value
    machine.start()
    wait_until(lambda: engine.run(prompt(2)).loaded_tokens > 0)


def test_descriptors_come_back(machine: Machine) -> None:
    machine.start()
    machine.client().close(1.0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        client = machine.client()
        assert client.arena is not None
        client.close(1.0)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_wrong_token_is_an_error_at_the_start(machine: Machine) -> None:
    machine.start(token=TOKEN)
    with pytest.raises(AccessRefused, match="token"):
        machine.client(token="another token that is just as long as that")
    machine.client(token=TOKEN).close(1.0)


def test_other_blocks_under_the_same_name_are_an_error_at_the_start(machine: Machine) -> None:
    machine.start()
    machine.engine()
    other = BlockLayout(num_layers=3, num_kv_heads=2, block_tokens=8, head_dim=4, itemsize=2)
    with pytest.raises(JoinRefused, match="block_tokens"):
        ClientService(machine.config(), other, FINGERPRINT)


def test_a_cleared_cache_is_empty_for_this_engine_and_not_for_others(machine: Machine) -> None:
    machine.start()
    first, second = machine.engine(), machine.engine()
    first.run(prompt(2))
    first.sessions.clear()
    assert first.run(prompt(2)).loaded_tokens == 0
    assert second.run(prompt(2)).loaded_tokens == 2 * BLOCK
