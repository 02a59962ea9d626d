"""Cache servers that are killed, frozen or stopped under a remote tier: misses in time, and never a wrong byte.

Real servers. Whatever a tier calls ``OK`` is compared byte by byte.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cache_server import CacheServer
from remote_kit import SMALL, TOKEN, keys, load, open_tier, start, store
from test_embedded import Worker, prefix
from test_embedded_shared import fetch

from kvferry.connector.channel import Channel
from kvferry.connector.errors import ConfigError, TierError, TierTimeout
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Outcome
from kvferry.plugins.remote.ring import Ring
from kvferry.plugins.remote.tier import RemoteTier

DEADLINE_S = 0.6
"""Of a call that nobody answers: short, so that it costs the tests little."""
GRACE_S = 1.0
"""For two busy cores."""
LATER_S = 30.0
MANY = 600
"""Blocks, more than all the buffers between a server and a tier hold."""

OK, MISSING, FAILED = Outcome.OK, Outcome.MISSING, Outcome.FAILED

CALLS: dict[str, Callable[[RemoteTier, Sequence[BlockKey]], object]] = {
    "load": load,
    "store": store,
    "contains": lambda tier, wanted: tier.contains(wanted),
    "delete": lambda tier, wanted: tier.delete(wanted),
}


def eventually(what: str, holds: Callable[[], bool]) -> None:
    """Wait until a call has gone as it should; one that raises has not."""
    end = time.monotonic() + LATER_S
    while True:
        with contextlib.suppress(TierError):
            if holds():
                return
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


def assert_every_call_fails_in_time(
    tier: RemoteTier, wanted: Sequence[BlockKey], error: type[TierError]
) -> None:
    for call in CALLS.values():
        began = time.monotonic()
        with pytest.raises(error):
            call(tier, wanted)
        assert time.monotonic() - began < DEADLINE_S + GRACE_S


# --- killed ---------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheServer]:
    with start(tmp_path_factory) as started:
        yield started


def kill_at_block(server: CacheServer, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a server when this process is in the middle of a load or store, having moved ``number`` blocks."""
    left = itertools.count(2 * number, -1)  # header and body
    receive_into, send_bytes = Channel.receive_into, Channel.send_bytes

    def receive(channel: Channel, buffer: memoryview | bytearray, deadline: float) -> None:
        if isinstance(buffer, memoryview) and next(left) == 0:
            server.kill()
        receive_into(channel, buffer, deadline)

    def send(channel: Channel, buffers: Sequence[memoryview | bytes | bytearray], deadline: float) -> None:
        send_bytes(channel, buffers[: 2 * number], deadline)
        if len(buffers) > 2 * number:
            server.kill()
            send_bytes(channel, buffers[2 * number :], deadline)

    monkeypatch.setattr(Channel, "receive_into", receive)
    monkeypatch.setattr(Channel, "send_bytes", send)


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_killed_in_the_middle_of_a_load(
    server: CacheServer, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(getattr(server, scheme), deadline_s=DEADLINE_S * 10)
    wanted = keys(MANY)
    assert store(tier, wanted) == [OK] * MANY
    with monkeypatch.context() as patched:
        kill_at_block(server, 20, patched)
        outcomes = load(tier, wanted)
    assert outcomes.count(OK) >= 20
    assert FAILED in outcomes
    assert set(outcomes) == {OK, FAILED}
    assert_every_call_fails_in_time(tier, wanted, TierError)
    server.start()
    eventually("it serves again", lambda: load(tier, wanted) == [MISSING] * MANY)
    assert store(tier, wanted) == [OK] * MANY
    assert load(tier, wanted) == [OK] * MANY
    tier.close()


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_killed_in_the_middle_of_a_store(
    server: CacheServer, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(getattr(server, scheme), deadline_s=DEADLINE_S * 10)
    wanted = keys(MANY)
    with monkeypatch.context() as patched:
        kill_at_block(server, 20, patched)
        with pytest.raises(TierError):
            store(tier, wanted)
    assert_every_call_fails_in_time(tier, wanted, TierError)
    server.start()
    eventually("it serves again", lambda: load(tier, wanted) == [MISSING] * MANY)
    assert store(tier, wanted) == [OK] * MANY
    assert load(tier, wanted) == [OK] * MANY
    tier.close()


def test_killed_at_any_moment_under_many_threads(server: CacheServer) -> None:
    """Loads and stores of four threads; the server dies and comes back three times."""
    tier = open_tier(server.tcp, deadline_s=DEADLINE_S * 5)
    is_over = threading.Event()
    good: queue.SimpleQueue[int] = queue.SimpleQueue()
    wrong: list[BaseException] = []
    slowest = [0.0] * 4

    def work(number: int) -> None:
        wanted = keys(60, str(number))
        while not is_over.is_set():
            began = time.monotonic()
            try:
                assert set(store(tier, wanted)) <= {OK, FAILED}
                good.put(load(tier, wanted).count(OK))
            except TierError:
                is_over.wait(0.01)
            except BaseException as error:  # noqa: BLE001  # boundary: a thread of the test
                wrong.append(error)
                return
            slowest[number] = max(slowest[number], time.monotonic() - began)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            for _ in range(10):
                good.get(timeout=LATER_S)
            server.kill()
            server.start()
            while not good.empty():
                good.get()
        eventually("all are served again", lambda: good.get(timeout=LATER_S) == 60)
    finally:
        is_over.set()
    for thread in threads:
        thread.join(LATER_S)
        assert not thread.is_alive()
    assert not wrong
    assert max(slowest) < 2 * DEADLINE_S * 5 + GRACE_S
    tier.close()


# --- frozen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_frozen_and_resumed(server: CacheServer, scheme: str) -> None:
    tier = open_tier(getattr(server, scheme), deadline_s=DEADLINE_S)
    wanted = keys(8)
    assert store(tier, wanted) == [OK] * 8
    with server.frozen():
        assert_every_call_fails_in_time(tier, wanted, TierTimeout)
        assert tier.stats().blocks >= 0, "what it said last, without asking"
    eventually("it is used again", lambda: all(tier.contains(wanted[:4])))
    tier.close()


# --- two servers, one of which dies ---------------------------------------------------------------------


def test_the_keys_of_a_server_that_dies_go_to_the_other_and_come_home(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with start(tmp_path_factory) as survivor, start(tmp_path_factory) as mortal:
        tier = open_tier(survivor.tcp, mortal.tcp, deadline_s=5.0)
        there, here = open_tier(survivor.tcp), open_tier(mortal.tcp)
        wanted = keys(40)
        homes = Ring([survivor.tcp, mortal.tcp]).assign(wanted, [survivor.tcp, mortal.tcp])
        stays, moves = ([wanted[at] for at in homes[one.tcp]] for one in (survivor, mortal))
        assert min(len(stays), len(moves)) > 5
        assert store(tier, wanted) == [OK] * 40
        assert there.contains(wanted) == [key in stays for key in wanted]

        mortal.kill()
        assert load(tier, stays) == [OK] * len(stays)
        assert load(tier, wanted) == [OK if key in stays else FAILED for key in wanted]
        eventually("the other takes them", lambda: store(tier, wanted) == [OK] * 40)
        assert load(there, wanted) == [OK] * 40
        assert load(tier, wanted) == [OK] * 40

        mortal.start()
        eventually(
            "they come home", lambda: store(tier, moves) == [OK] * len(moves) and all(here.contains(moves))
        )
        assert load(tier, wanted) == [OK] * 40
        assert here.contains(stays) == [False] * len(stays)
        there.delete(moves)
        assert load(tier, wanted) == [OK] * 40, "from home, not from where they were meanwhile"
        for one in (tier, there, here):
            one.close()


# --- below the arena of a whole service -----------------------------------------------------------------


@pytest.fixture
def engine() -> Iterator[Callable[..., Worker]]:
    """Starts services with a remote tier below an arena of their own: ``engine(server, **options)``."""
    started: list[Worker] = []

    def make(*servers: CacheServer, slots: int = 32, **options: object) -> Worker:
        addresses = [server.tcp for server in servers]
        tier = {"type": "remote", "servers": addresses, "deadline_s": 5.0, "ask": "always", **options}
        plugins = ["kvferry.plugins.remote", "kvferry.plugins.codecs"]
        started.append(Worker(slots, plugins=plugins, tiers=[tier], retry_failed_s=0.2))
        return started[-1]

    yield make
    for worker in started:
        worker.close()


def test_an_engine_finds_what_another_one_stored(server: CacheServer, engine: Callable[..., Worker]) -> None:
    wanted = prefix(20)
    first = engine(server)
    assert first.save(wanted) == 20
    first.settle()
    second = engine(server)
    assert fetch(second, wanted) == 20
    assert fetch(second, prefix(4, "nobody's")) == 0
    for worker in (first, second):
        worker.assert_nothing_leaked()


def test_an_engine_finds_it_on_two_servers(
    tmp_path_factory: pytest.TempPathFactory, engine: Callable[..., Worker]
) -> None:
    with start(tmp_path_factory) as one, start(tmp_path_factory) as other:
        wanted = prefix(20)
        first = engine(one, other)
        first.save(wanted)
        first.settle()
        assert fetch(engine(other, one), wanted) == 20


def test_blocks_outlive_a_server_that_has_a_disk_and_hardly_any_memory(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, engine: Callable[..., Worker]
) -> None:
    disk = {"type": "disk", "path": str(tmp_path), "capacity": "64MiB", "admission": "always"}
    with start(tmp_path_factory, {"host": {"capacity": "256KiB"}, "tiers": [disk]}) as server:
        prompts = [prefix(6, str(number)) for number in range(8)]
        first = engine(server)
        for wanted in prompts:
            assert first.save(wanted) == 6
            first.settle()
        server.stop()
        assert fetch(first, prompts[7]) == 6, "from its own memory"
        server.start()
        second = engine(server)
        for wanted in prompts:
            assert fetch(second, wanted) == 6
        eventually("the first uses it again", lambda: fetch(first, prompts[0]) == 6)
        for worker in (first, second):
            worker.assert_nothing_leaked()


def test_a_server_that_is_killed_under_an_engine_is_a_miss_until_it_is_back(
    server: CacheServer, engine: Callable[..., Worker]
) -> None:
    worker, wanted = engine(server, slots=8), prefix(6)
    worker.save(wanted)
    worker.settle()
    server.kill()
    began = time.monotonic()
    assert worker.save(prefix(8, "others")) == 8, "which takes the place of the first"
    assert fetch(worker, wanted) < 6
    assert time.monotonic() - began < 5.0 + GRACE_S
    server.start()
    other = engine(server)
    other.save(wanted)
    other.settle()
    eventually("it is used again", lambda: fetch(worker, wanted) == 6)


# --- mistakes -------------------------------------------------------------------------------------------


def test_a_wrong_token_is_a_mistake_that_names_the_tier(
    tmp_path_factory: pytest.TempPathFactory, engine: Callable[..., Worker]
) -> None:
    with start(tmp_path_factory, {**SMALL, "server": {"token": TOKEN}}) as server:
        for token in ("", "another token, but as long"):
            with pytest.raises(ConfigError) as raised:
                engine(server, token=token)
            assert raised.value.path == "tiers.remote.token"
            assert TOKEN not in str(raised.value)
            assert not token or token not in str(raised.value)
        worker = engine(server, token=TOKEN)
        worker.save(prefix(4))
        worker.settle()
        assert fetch(engine(server, token=TOKEN), prefix(4)) == 4


def test_a_codec_is_a_mistake_that_names_the_tier(server: CacheServer, engine: Callable[..., Worker]) -> None:
    with pytest.raises(ConfigError) as raised:
        engine(server, codec="zstd")
    assert raised.value.path == "tiers.remote.codec"


def test_a_server_that_is_away_is_no_mistake(
    server: CacheServer, engine: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    server.kill()
    with caplog.at_level(logging.WARNING):
        worker = engine(server)
    assert "opened anyway" in caplog.text
    assert fetch(worker, prefix(4)) == 0
    server.start()
    other = engine(server)
    other.save(prefix(4))
    other.settle()
    eventually("it is used", lambda: fetch(worker, prefix(4)) == 4)
