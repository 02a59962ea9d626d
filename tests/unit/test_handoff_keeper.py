"""Keeping leases: renewed while requests wait, released afterwards, and no peer keeps another from it."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from handoff_kit import FINGERPRINT, TOKEN, Giver, frozen_server, wait_until

from kvferry.engines.handoff import keeper as keeper_module
from kvferry.engines.handoff.keeper import LeaseKeeper
from kvferry.engines.jobs import PeerSource

SHORT_LEASE_S = 0.8


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "_CALL_S", 0.1)
    monkeypatch.setattr(keeper_module, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(keeper_module, "_LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of half a minute are renewed all the time, so that no test depends on being fast."""
    monkeypatch.setattr(keeper_module, "_RENEWALS", 600)


@pytest.fixture
def give() -> Iterator[Callable[..., Giver]]:
    with contextlib.ExitStack() as stack:

        def start(**options: object) -> Giver:
            giver = Giver(**options)  # type: ignore[arg-type]
            stack.callback(giver.close)
            return giver

        yield start


@pytest.fixture
def keeper() -> Iterator[LeaseKeeper]:
    found = LeaseKeeper("", FINGERPRINT, "taker")
    yield found
    found.close(5.0)
    assert not keeper_threads()


def keeper_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kvferry-lease-keeper"]


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_lease_lives_for_as_long_as_its_request_waits(
    give: Callable[..., Giver], keeper: LeaseKeeper, is_kept: bool
) -> None:
    giver = give(lease_s=SHORT_LEASE_S)
    giver.hand_over()
    if is_kept:
        keeper.adopt("mine", giver.source(), "taker/mine")
    ended: list[str] = []
    until = time.monotonic() + 1.25 * SHORT_LEASE_S
    while time.monotonic() < until:
        ended += giver.ended()
        time.sleep(0.01)
    assert ended == ([] if is_kept else ["r"])
    assert not keeper.is_gone("mine")
    keeper.drop("mine")
    keeper.drop("mine")
    wait_until(lambda: not giver.ended() and not len(giver.table))
    assert giver.table.expired_count == (0 if is_kept else 1)


def test_a_lease_that_is_over_is_known_to_be(give: Callable[..., Giver], keeper: LeaseKeeper) -> None:
    giver = give()
    giver.hand_over()
    keeper.adopt("mine", giver.source(), "taker/mine")
    keeper.adopt("late", giver.source("over already"), "taker/late")
    wait_until(lambda: keeper.is_gone("late"))
    assert not keeper.is_gone("mine")
    keeper.drop("late")
    assert not keeper.is_gone("late")
    assert not keeper.is_gone("never adopted")


@pytest.mark.usefixtures("_eager")
def test_two_requests_for_the_same_pages_are_two_readers(
    give: Callable[..., Giver], keeper: LeaseKeeper
) -> None:
    giver = give()
    giver.hand_over()
    keeper.adopt("one", giver.source(), "taker/one")
    keeper.adopt("two", giver.source(), "taker/two")
    giver.wait_for_renewals(4)
    keeper.drop("one")
    giver.wait_for_renewals(2)
    assert not giver.ended()
    keeper.drop("two")
    wait_until(lambda: giver.ended() == ["r"])


def test_a_request_that_is_dropped_at_once_still_releases(
    give: Callable[..., Giver], keeper: LeaseKeeper
) -> None:
    giver = give()
    giver.hand_over()
    keeper.drop("mine")
    keeper.adopt("mine", giver.source(), "taker/mine")
    keeper.drop("mine")
    wait_until(lambda: giver.ended() == ["r"])


@pytest.mark.usefixtures("_eager")
def test_many_leases_are_renewed_in_a_few_messages(give: Callable[..., Giver], keeper: LeaseKeeper) -> None:
    giver = give()
    names = [f"r{number}" for number in range(600)]
    for name in names:
        giver.hand_over(name)
        keeper.adopt(name, giver.source(name), f"taker/{name}")
    giver.wait_for_renewals(2, names[-1])
    assert {name for _, name in giver.table.renewals} == set(names)
    for name in names:
        keeper.drop(name)
    wait_until(lambda: not giver.ended() and not len(giver.table))
    assert giver.table.expired_count == 0


@pytest.mark.usefixtures("_eager")
def test_dead_and_frozen_peers_do_not_cost_others_their_leases(
    give: Callable[..., Giver], keeper: LeaseKeeper
) -> None:
    giver, dead = give(), give()
    dead.close()
    giver.hand_over()
    keeper.adopt("mine", giver.source(), "taker/mine")
    giver.wait_for_renewals(1)
    with contextlib.ExitStack() as stack:
        for number in range(3):
            port = stack.enter_context(frozen_server())
            keeper.adopt(f"frozen {number}", PeerSource("127.0.0.1", port, "p", "r", 40), "taker/frozen")
        keeper.adopt("dead", dead.source(), "taker/dead")
        times = giver.wait_for_renewals(6)
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 1.0
        assert not keeper.is_gone("dead"), "it did not say so"
        began = time.monotonic()
        keeper.drop("frozen 0")
        keeper.adopt("another", giver.source("other"), "taker/other")
        assert time.monotonic() - began < 0.09, "nobody waits for the keeper"


@pytest.mark.usefixtures("_eager")
def test_an_engine_that_starts_again_knows_nothing(give: Callable[..., Giver], keeper: LeaseKeeper) -> None:
    giver = give()
    giver.hand_over()
    keeper.adopt("mine", giver.source(), "taker/mine")
    giver.wait_for_renewals(1)
    port = giver.port
    giver.close()
    give(port=port)
    wait_until(lambda: keeper.is_gone("mine"))


@pytest.mark.usefixtures("_eager")
def test_a_peer_whose_connections_were_lost_is_called_again(
    give: Callable[..., Giver], keeper: LeaseKeeper
) -> None:
    giver = give()
    giver.hand_over()
    keeper.adopt("mine", giver.source(), "taker/mine")
    giver.wait_for_renewals(1)
    for channel in list(giver.channel._channels):
        channel.interrupt()
    giver.wait_for_renewals(2)
    assert not keeper.is_gone("mine")


@pytest.mark.usefixtures("_eager")
def test_connections_are_bounded(
    give: Callable[..., Giver], keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_MOST_CONNECTIONS", 2)
    givers = [give() for _ in range(4)]
    for number, giver in enumerate(givers):
        giver.hand_over()
        keeper.adopt(f"{number}", giver.source(), f"taker/{number}")
    for giver in givers:
        giver.wait_for_renewals(2)
    wait_until(lambda: sum(giver.channel._listener.connections for giver in givers) <= 2)


def test_idle_connections_are_closed(
    give: Callable[..., Giver], keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_IDLE_S", 0.05)
    giver = give()
    giver.hand_over()
    keeper.adopt("mine", giver.source(), "taker/mine")
    wait_until(lambda: giver.channel._listener.connections == 1)
    keeper.drop("mine")
    wait_until(lambda: giver.channel._listener.connections == 0)


def test_closing_sends_the_releases_that_are_left(give: Callable[..., Giver]) -> None:
    keeper = LeaseKeeper(TOKEN, FINGERPRINT, "taker")
    givers = [give(token=TOKEN) for _ in range(2)]
    with frozen_server() as port:
        keeper.adopt("frozen", PeerSource("127.0.0.1", port, "p", "r", 40), "taker/frozen")
        for number, giver in enumerate(givers):
            giver.hand_over()
            keeper.adopt(f"{number}", giver.source(), f"taker/{number}")
        keeper.drop("0")
        keeper.close(5.0)
    for giver in givers:
        assert giver.ended() == ["r"]
    keeper.adopt("late", givers[0].source(), "taker/late")
    keeper.close(5.0)


def test_closing_is_bounded() -> None:
    keeper = LeaseKeeper("", FINGERPRINT, "taker")
    with contextlib.ExitStack() as stack:
        for number in range(5):
            port = stack.enter_context(frozen_server())
            keeper.adopt(f"{number}", PeerSource("127.0.0.1", port, "p", "r", 40), "taker/frozen")
        began = time.monotonic()
        keeper.close(0.2)
        assert time.monotonic() - began < 1.0
