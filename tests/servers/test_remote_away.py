"""Servers of a remote tier that are away: nobody waits for them, others stand in, and they are used again."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from cache_server import CacheServer
from remote_kit import keys, load, open_tier, start, store

from kvferry.connector.errors import TierError
from kvferry.connector.tier import Outcome

DEADLINE_S = 20.0
SOON_S = 1.0
"""Far more than a call takes, far less than it takes to give a server up."""


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[CacheServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(start(tmp_path_factory)) for _ in range(2)]


class Mute:
    """Takes connections and never says a word, as a machine does that hangs."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._taken: list[socket.socket] = []
        self._thread = threading.Thread(target=self._take, name="mute", daemon=True)
        self._thread.start()

    @property
    def knocks(self) -> int:
        return len(self._taken)

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._taken.append(self._listener.accept()[0])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)
        for sock in self._taken:
            sock.close()


def test_no_call_waits_for_servers_that_hang(tmp_path_factory: pytest.TempPathFactory) -> None:
    mutes = [Mute(), Mute()]
    with start(tmp_path_factory) as server:
        began = time.monotonic()
        tier = open_tier(server.tcp, *(mute.address for mute in mutes))
        assert time.monotonic() - began < 5.0, "they are waited for side by side"
        slowest = 0.0

        def knocked_again() -> bool:
            nonlocal slowest
            began = time.monotonic()
            assert store(tier, keys(12)) == [Outcome.OK] * 12
            assert load(tier, keys(12)) == [Outcome.OK] * 12
            slowest = max(slowest, time.monotonic() - began)
            return all(mute.knocks >= 3 for mute in mutes)

        wait_until(knocked_again, "both were tried again, twice")
        assert slowest < SOON_S
        tier.close()
    for mute in mutes:
        mute.close()


def test_others_stand_in_for_a_server_that_is_gone_and_its_blocks_come_home(pair: list[CacheServer]) -> None:
    tier, some = open_tier(*(server.tcp for server in pair)), keys(40)
    alone = open_tier(pair[0].tcp)
    assert store(tier, some) == [Outcome.OK] * 40
    at_home = alone.contains(some)
    assert 8 < sum(at_home) < 32
    pair[1].kill()
    outcomes = load(tier, some)
    assert [one is Outcome.OK for one in outcomes] == at_home, "its blocks are missed, and no others"
    wait_until(lambda: store(tier, some) == [Outcome.OK] * 40, "the other takes them all")
    assert load(tier, some) == [Outcome.OK] * 40
    assert alone.contains(some) == [True] * 40
    pair[1].start()
    missed = [not held for held in at_home]
    wait_until(
        lambda: [one is Outcome.MISSING for one in load(tier, some)] == missed,
        "the new server is asked for its own, which it does not have yet",
    )
    assert store(tier, some) == [Outcome.OK] * 40
    returned = open_tier(pair[1].tcp)
    assert returned.contains(some) == missed
    for one in (tier, alone, returned):
        one.close()


def test_a_server_that_is_frozen_keeps_back_only_its_own(pair: list[CacheServer]) -> None:
    tier, some = open_tier(*(server.tcp for server in pair), deadline_s=1.5), keys(40)
    assert store(tier, some) == [Outcome.OK] * 40
    alone = open_tier(pair[0].tcp)
    at_home = alone.contains(some)
    with pair[1].frozen():
        began = time.monotonic()
        outcomes = load(tier, some)
        assert time.monotonic() - began < 1.5 + SOON_S
        assert outcomes == [Outcome.OK if held else Outcome.FAILED for held in at_home]
        began = time.monotonic()
        assert set(load(tier, some)) <= {Outcome.OK, Outcome.MISSING}
        assert time.monotonic() - began < SOON_S, "it is not waited for twice"
    wait_until(lambda: load(tier, some) == [Outcome.OK] * 40, "all is as before")
    tier.close()
    alone.close()


def test_servers_killed_under_load_never_lead_to_a_wrong_block(pair: list[CacheServer]) -> None:
    """The kit's ``load`` compares every byte that is said to be right."""
    tier, some = open_tier(*(server.tcp for server in pair), deadline_s=3.0), keys(64)
    is_done = threading.Event()
    seen: list[set[Outcome]] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not is_done.is_set():
                with contextlib.suppress(TierError):
                    seen.append({*store(tier, some), *load(tier, some)})
        except BaseException as error:  # noqa: BLE001  # boundary: a test's thread, raised below
            errors.append(error)

    threads = [threading.Thread(target=work, name=f"load-{number}", daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for number in (1, 0, 1):
        before = len(seen)
        wait_until(lambda before=before: len(seen) > before + 3, "calls succeed")  # type: ignore[misc]
        pair[number].kill()
        pair[number].start()
    is_done.set()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert errors == []
    wait_until(lambda: store(tier, some) == [Outcome.OK] * 64, "all can be stored")
    assert load(tier, some) == [Outcome.OK] * 64
    tier.close()
