"""Looking for a server: in the background, with pauses, and with one line about what somebody must correct."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest
from scripted_server import Clock, ScriptedServer

from kvferry.connector.errors import AccessRefused
from kvferry.connector.joining import Joined
from kvferry.connector.pace import MOST_UNDER_WAY, Pace
from kvferry.connector.reconnecting import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, Reconnector, pause_s

DEADLINE_S = 10.0
LOGGER = logging.getLogger("kvferry.test")


class Attempts:
    """Fails as it is told, in this order, then finds the server."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.made = 0
        self.server = ScriptedServer(Clock())

    def __call__(self, is_given_up: Callable[[], bool]) -> Joined:
        self.made += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.server.join()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.connector.reconnecting.LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr("kvferry.connector.reconnecting.SHORTEST_PAUSE_S", 0.001)


def found(reconnector: Reconnector) -> Joined:
    end = time.monotonic() + DEADLINE_S
    while (joined := reconnector.take()) is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    return joined


@pytest.mark.usefixtures("short_pauses")
def test_it_goes_on_until_the_server_is_there() -> None:
    attempts = Attempts(
        ConnectionRefusedError("away"), TimeoutError("slow"), RuntimeError("a mistake of ours")
    )
    reconnector = Reconnector(attempts, LOGGER)
    reconnector.begin()
    assert isinstance(reconnector.wait_for_first(DEADLINE_S), ConnectionRefusedError)
    found(reconnector).close()
    assert attempts.made == 4
    assert reconnector.take() is None, "it is handed over once"
    reconnector.close()


@pytest.mark.usefixtures("short_pauses")
def test_a_refusal_is_reported_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    attempts = Attempts(
        ConnectionRefusedError("away"), AccessRefused("bad token"), AccessRefused("bad token")
    )
    reconnector = Reconnector(attempts, LOGGER)
    reconnector.begin()
    reconnector.wait_for_first(DEADLINE_S)
    found(reconnector).close()
    assert caplog.text.count("bad token") == 1
    reconnector.close()


@pytest.mark.usefixtures("short_pauses")
def test_a_connection_that_nobody_took_is_closed() -> None:
    attempts = Attempts()
    reconnector = Reconnector(attempts, LOGGER)
    reconnector.begin()
    assert reconnector.wait_for_first(DEADLINE_S) is None
    reconnector.close()
    assert attempts.server.link.is_closed


def test_closing_ends_a_long_pause_at_once() -> None:
    reconnector = Reconnector(Attempts(AccessRefused("no")), LOGGER)
    reconnector.begin()
    reconnector.wait_for_first(DEADLINE_S)
    started = time.monotonic()
    reconnector.close()
    assert time.monotonic() - started < LONGEST_PAUSE_S / 2
    assert not any(thread.name == "kvferry-reconnect" for thread in threading.enumerate())


def test_a_server_that_drops_us_again_and_again_is_not_stormed() -> None:
    attempts = Attempts()
    reconnector = Reconnector(attempts, LOGGER)
    pauses: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return False

    reconnector._stop = Stop()
    for _ in range(6):
        reconnector.begin()
        found(reconnector).close()
    assert len(pauses) == 5, "only the first was not preceded by another"
    assert all(0 <= pause <= pause_s(attempts) for attempts, pause in enumerate(pauses, start=1))
    reconnector.close()


def test_pauses_double_up_to_the_longest() -> None:
    assert [pause_s(attempts) for attempts in (1, 2, 3)] == [
        SHORTEST_PAUSE_S,
        2 * SHORTEST_PAUSE_S,
        4 * SHORTEST_PAUSE_S,
    ]
    assert pause_s(10_000) == LONGEST_PAUSE_S


def test_the_pace_begins_slowly_and_backs_off() -> None:
    pace = Pace()
    assert pace.allows(0)
    assert not pace.allows(1)
    for _ in range(3):
        pace.in_time()
    assert pace.limit == 8
    pace.late()
    assert pace.limit == 4
    for _ in range(20):
        pace.in_time()
    assert pace.limit == MOST_UNDER_WAY
    pace.restart()
    pace.late()
    assert pace.limit == 1, "one may always be asked"
