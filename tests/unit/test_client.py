"""A client of a cache server: what is late, lost or wrong costs hits and never time, bytes or slots."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import msgspec
import pytest
from scripted_server import BUDGET_S, SLOTS, Clock, ScriptedServer, chain, connect

from kvferry.connector import wire
from kvferry.connector.client import LEASE_BUDGET_S, ClientService
from kvferry.connector.errors import ClosedError
from kvferry.connector.joining import JoinRefused
from kvferry.connector.metrics import Counts
from kvferry.connector.service import Coming, Lease, Match, MissReason, Reservation

KEYS = chain(0, 4)
STEP_S = 0.03


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer(Clock())


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[ClientService]:
    client = connect(server)
    yield client
    client.close(1.0)


def later(client: ClientService, server: ScriptedServer, seconds: float = STEP_S) -> None:
    """The engine computes, then begins its next step."""
    server.clock.now += seconds
    client.poll()


def metrics_of(client: ClientService) -> dict[str, object]:
    counts = Counts()
    client.report(counts)
    return {name: series[""] for name, series in counts.take().items()}


class TestInTime:
    def test_a_lookup_tells_what_the_server_said(self, client: ClientService, server: ScriptedServer) -> None:
        server.held.update(KEYS[:3])
        assert client.lookup(KEYS) == Match(3, 3, ("host",) * 3, MissReason.NEVER_STORED)

    def test_a_lease_has_the_servers_places(self, client: ClientService, server: ScriptedServer) -> None:
        server.held.update(KEYS)
        lease = client.lease("r", KEYS)
        assert [place.key for place in lease.places] == KEYS
        assert len({place.slot for place in lease.places}) == 4
        client.release(lease)
        assert not server.link.leases

    def test_what_is_saved_is_found(self, client: ClientService, server: ScriptedServer) -> None:
        reservation = client.reserve("r", KEYS)
        assert reservation is not None
        client.commit(reservation, KEYS)
        assert client.lookup(KEYS).ready == 4
        assert not server.link.reservations

    def test_what_is_held_already_is_not_reserved_again(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        server.held.add(KEYS[1])
        reservation = client.reserve("r", KEYS)
        assert reservation is not None
        assert [place.key for place in reservation.places] == [KEYS[0], *KEYS[2:]]

    def test_a_question_and_its_prefetch_are_two_requests(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        client.lookup(KEYS)
        client.prefetch("r", KEYS, 0.1)
        assert len(server.link.requests) == 2


class TestLate:
    @pytest.fixture(autouse=True)
    def _is_late(self, client: ClientService, server: ScriptedServer) -> None:
        client.poll()
        server.held.update(KEYS)
        server.delay_s = 0.01

    def test_a_late_lookup_is_not_known_yet_and_there_in_the_next_step(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        assert client.lookup(KEYS).missing is MissReason.NOT_ASKED
        later(client, server)
        assert client.lookup(KEYS).ready == 4
        assert server.link.count(wire.Lookup) == 1, "nothing was asked twice"

    def test_an_answer_serves_once(self, client: ClientService, server: ScriptedServer) -> None:
        client.lookup(KEYS)
        later(client, server)
        client.lookup(KEYS)
        client.lookup(KEYS)
        assert server.link.count(wire.Lookup) == 2

    def test_an_old_answer_is_not_believed(self, client: ClientService, server: ScriptedServer) -> None:
        client.lookup(KEYS)
        later(client, server)
        later(client, server, 0.2)
        assert client.lookup(KEYS).missing is MissReason.NOT_ASKED

    def test_a_failed_load_makes_answers_old(self, client: ClientService, server: ScriptedServer) -> None:
        client.lookup(KEYS)
        later(client, server)
        client.report_load_failed(KEYS)
        assert client.lookup(KEYS).missing is MissReason.NOT_ASKED

    def test_all_of_a_late_prefetch_is_coming(self, client: ClientService) -> None:
        assert client.prefetch("r", KEYS) == Coming(4)

    def test_a_step_waits_for_its_budget_and_no_longer(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        started = server.clock.now
        for seed in range(50):
            client.lookup(chain(seed, 3))
            client.prefetch("r", chain(seed, 3))
            client.reserve("r", chain(seed, 3))
        assert server.clock.now - started == pytest.approx(BUDGET_S, abs=1e-5)
        later(client, server)
        client.lookup(chain(99, 3))
        assert server.waited_s == pytest.approx(2 * BUDGET_S, abs=1e-5), (
            "the next step has a budget of its own"
        )

    def test_a_reservation_that_no_later_step_can_use_is_waited_for(self, client: ClientService) -> None:
        assert client.reserve("r", chain(1, 3)) is None
        answer = client.reserve("r", chain(2, 3), wait_s=10.0)
        assert answer is not None
        assert len(answer.places) == 3

    def test_leases_wait_longer_but_all_of_a_step_together(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        assert client.lease("r", KEYS).places
        server.delay_s = None
        started = server.clock.now
        for index in range(10):
            assert client.lease(f"r{index}", KEYS) == Lease(0, ())
        assert server.clock.now - started <= LEASE_BUDGET_S + 1e-5

    def test_a_lease_that_comes_too_late_is_given_back(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        server.delay_s = 0.05
        assert client.lease("r", KEYS) == Lease(0, ())
        assert len(server.link.leases) == 1
        later(client, server, 0.1)
        assert not server.link.leases

    def test_blocks_are_not_blamed_for_a_late_lease(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        server.delay_s = 0.05
        client.lease("r", KEYS)
        client.report_load_failed(KEYS)
        assert server.link.count(wire.Failed) == 0
        client.report_load_failed(KEYS)
        assert server.link.count(wire.Failed) == 1, "the excuse holds once"

    def test_a_late_reservation_is_kept_for_who_asks_again(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        server.held.clear()
        assert client.reserve("r", KEYS) is None
        later(client, server)
        reservation = client.reserve("r", KEYS)
        assert reservation is not None
        assert len(reservation.places) == 4
        assert server.link.count(wire.Reserve) == 1

    def test_a_late_reservation_that_nobody_asks_for_is_aborted(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        server.held.clear()
        client.reserve("r", KEYS)
        later(client, server)
        assert len(server.link.reservations) == 1
        later(client, server, 1.1)
        assert not server.link.reservations

    def test_late_answers_are_counted(self, client: ClientService, server: ScriptedServer) -> None:
        client.lookup(KEYS)
        later(client, server)
        shown = metrics_of(client)
        assert shown["kvferry_server_late_answers_total"] == 1
        assert shown["kvferry_server_request_seconds"] == [pytest.approx(BUDGET_S + STEP_S, abs=1e-5)]


class TestPaceOfAConnection:
    def test_what_is_over_the_limit_is_not_sent(self, client: ClientService, server: ScriptedServer) -> None:
        client.poll()
        server.delay_s = 1e-4
        for seed in range(3):
            client.lookup(chain(seed, 1))
        server.delay_s = None
        before = len(server.link.requests)
        for seed in range(10, 40):
            assert client.lookup(chain(seed, 1)).missing is MissReason.NOT_ASKED
        assert len(server.link.requests) - before == 4, "1 doubled thrice, halved once: what is late"

    def test_a_new_connection_begins_with_one(self, client: ClientService, server: ScriptedServer) -> None:
        for seed in range(10):
            client.lookup(chain(seed, 1))
        server.link.is_dead = True
        client.poll()
        client.poll()
        server.delay_s = None
        for seed in range(10):
            client.lookup(chain(seed, 1))
        assert len(server.link.requests) == 1


class TestSettle:
    """What the server says it can find, others find."""

    def save(self, client: ClientService) -> None:
        reservation = client.reserve("r", KEYS)
        assert reservation is not None
        client.commit(reservation, [place.key for place in reservation.places])

    def test_what_was_committed_before_is_found_by_others(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        self.save(client)
        assert client.settle(KEYS, 1.0)
        assert [type(request) for request in server.link.requests[-2:]] == [wire.Commit, wire.Lookup]

    def test_it_waits_longer_than_a_step_and_no_longer_than_its_deadline(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        self.save(client)
        server.delay_s = 0.5
        later(client, server)
        server.waited_s = 0.0
        assert not client.settle(KEYS, 0.2)
        assert server.waited_s == pytest.approx(0.2)
        later(client, server, 0.5)
        assert client.settle(KEYS, 1.0)
        assert server.waited_s == pytest.approx(0.7)

    def test_an_answer_from_before_the_commit_is_not_taken(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        reservation = client.reserve("r", KEYS)
        assert reservation is not None
        server.delay_s = 0.01
        assert client.lookup(KEYS).missing is MissReason.NOT_ASKED, "the question is under way"
        client.commit(reservation, KEYS)
        assert client.settle(KEYS, 1.0)

    def test_what_the_server_did_not_take_in_is_not_visible(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        self.save(client)
        server.held.discard(KEYS[2])
        assert not client.settle(KEYS, 1.0)
        assert client.settle(KEYS[:2], 1.0)

    def test_a_commit_that_went_with_its_connection_is_not_visible(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        reservation = client.reserve("r", KEYS)
        assert reservation is not None
        server.die()
        later(client, server)
        assert not client.settle(KEYS, 1.0), "there is no server"
        server.is_there = True
        later(client, server)
        client.commit(reservation, KEYS)
        assert not client.settle(KEYS, 1.0), "there is one that knows nothing of it"
        assert server.waited_s == 0

    def test_a_server_that_dies_meanwhile_ends_the_wait(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        self.save(client)
        server.die()
        assert not client.settle(KEYS, 1.0)
        assert server.waited_s == 0

    def test_a_silent_server_is_not_waited_for(self, client: ClientService, server: ScriptedServer) -> None:
        self.save(client)
        server.delay_s = None
        client.lookup(KEYS)
        later(client, server, 1.5)
        server.waited_s = 0.0
        assert not client.settle(KEYS, 1.0)
        assert server.waited_s == 0

    def test_many_blocks_are_asked_for_in_several_messages(
        self, client: ClientService, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wire, "MAX_KEYS", 3)
        server.held.update(KEYS)
        assert client.settle(KEYS, 1.0)
        assert server.link.count(wire.Lookup) == 2
        server.held.discard(KEYS[3])
        assert not client.settle(KEYS, 1.0)

    def test_for_no_blocks_nothing_is_asked(self, client: ClientService, server: ScriptedServer) -> None:
        assert client.settle([], 1.0)
        assert server.link.requests == []


class TestSilence:
    @pytest.fixture(autouse=True)
    def _is_silent(self, client: ClientService, server: ScriptedServer) -> None:
        client.poll()
        server.held.update(KEYS)
        server.delay_s = None
        client.lookup(KEYS)
        later(client, server, 1.1)

    def test_nothing_waits_for_a_silent_server(self, client: ClientService, server: ScriptedServer) -> None:
        server.waited_s = 0.0
        assert client.lookup(KEYS) == Match(0, 0, (), MissReason.TIER_DOWN)
        assert client.prefetch("r", KEYS) == Coming(0, MissReason.TIER_DOWN)
        assert client.lease("r", KEYS) == Lease(0, ())
        assert client.reserve("r", KEYS) is None
        assert server.waited_s == 0
        assert metrics_of(client)["kvferry_server_up"] == 0

    def test_it_is_pinged_once_a_second(self, client: ClientService, server: ScriptedServer) -> None:
        for _ in range(40):
            later(client, server, 0.1)
        assert server.link.count(wire.Ping) == pytest.approx(5, abs=1)

    def test_it_is_used_again_when_it_answers(self, client: ClientService, server: ScriptedServer) -> None:
        server.delay_s = 0.0
        server.link.catch_up()
        later(client, server)
        assert client.lookup(KEYS).ready == 4
        assert metrics_of(client)["kvferry_server_up"] == 1

    def test_an_engine_that_was_busy_itself_does_not_take_the_server_for_silent(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        server.link.catch_up()
        server.delay_s = 0.005
        client.poll()
        client.lookup(chain(5, 2))
        later(client, server, 10.0)
        assert client.lookup(chain(6, 2)).missing is not MissReason.TIER_DOWN


class TestLost:
    def test_a_lost_server_is_down_at_once_and_found_again(
        self, client: ClientService, server: ScriptedServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.held.update(KEYS)
        first = client.arena
        server.die()
        assert client.lookup(KEYS) == Match(0, 0, (), MissReason.TIER_DOWN)
        assert client.arena is None
        assert "not connected" in client.description
        server.is_there = True
        client.poll()
        assert client.lookup(KEYS).ready == 4
        assert first is not None
        assert client.arena is not None
        assert client.arena.connection == first.connection + 1
        assert metrics_of(client)["kvferry_server_reconnects_total"] == 1
        assert caplog.text.count("lost the cache server") == 1

    def test_grants_of_a_lost_connection_are_worth_nothing(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        server.held.update(KEYS[:2])
        lease, reservation = client.lease("r", KEYS[:2]), client.reserve("r", KEYS)
        other = client.reserve("q", chain(3, 2))
        assert reservation is not None
        assert other is not None
        server.die()
        client.poll()
        server.is_there = True
        client.poll()
        new_lease, new_reservation = client.lease("r", KEYS[:2]), client.reserve("r", KEYS)
        assert new_reservation is not None
        client.release(lease)
        client.commit(reservation, [place.key for place in reservation.places])
        client.abort(other)
        assert len(server.link.leases) == len(server.link.reservations) == 1, "the server's ids are the same"
        assert {lease.id, reservation.id}.isdisjoint({new_lease.id, new_reservation.id})

    def test_blocks_are_not_blamed_for_a_lost_lease(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        server.held.update(KEYS)
        lease = client.lease("r", KEYS)
        server.die()
        client.poll()
        server.is_there = True
        client.poll()
        client.release(lease)
        client.report_load_failed(KEYS)
        assert server.link.count(wire.Failed) == 0

    def test_a_server_that_says_goodbye_is_no_warning(
        self, client: ClientService, server: ScriptedServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        server.link.say(wire.Goodbye())
        server.is_there = False
        client.poll()
        assert client.arena is None
        assert [record.levelname for record in caplog.records if "it is stopping" in record.message] == [
            "INFO"
        ]

    def test_a_server_that_refuses_to_go_on_is_left(
        self, client: ClientService, server: ScriptedServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.link.say(wire.Refused(code="internal", why="see the log", is_mistake=False))
        client.poll()
        assert "see the log" in caplog.text
        assert server.link.is_closed

    def test_a_server_that_is_away_at_the_start_is_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        server = ScriptedServer(Clock())
        server.is_there = False
        client = connect(server)
        assert client.lookup(KEYS).missing is MissReason.TIER_DOWN
        assert caplog.text.count("no cache server") == 1
        server.is_there = True
        client.poll()
        assert client.lookup(KEYS).missing is MissReason.NEVER_STORED
        client.close(1.0)

    def test_a_mistake_is_an_error_at_the_start(self) -> None:
        server = ScriptedServer(Clock())
        server.refusal = wire.Refused(code="layout", why="other blocks", is_mistake=True)
        with pytest.raises(JoinRefused, match="other blocks"):
            connect(server)


def found(reply: wire.Reply, **changes: object) -> wire.Reply:
    return msgspec.structs.replace(reply, **changes)


class TestLies:
    """Whatever does not fit what was asked ends the connection, and nothing of it gets any further."""

    @pytest.mark.parametrize(
        "changes",
        [
            dict(id=999),
            dict(ready=5, reachable=5, runs=[("host", 5)]),
            dict(ready=-1),
            dict(ready=4, reachable=3),
            dict(runs=[("host", 3)]),
            dict(runs=[("host", 8), ("disk", -4)]),
        ],
        ids=str,
    )
    def test_in_a_lookup(
        self, client: ClientService, server: ScriptedServer, changes: dict[str, object]
    ) -> None:
        server.held.update(KEYS)
        server.distort = lambda reply: found(reply, **changes)
        assert client.lookup(KEYS) == Match(0, 0, (), MissReason.TIER_DOWN)
        assert server.link.is_closed

    @pytest.mark.parametrize(
        "changes",
        [
            dict(slots=[0, 1, 2, SLOTS]),
            dict(slots=[0, 1, 2, -1]),
            dict(slots=[0, 1, 2, 2]),
            dict(slots=[0, 1, 2]),
            dict(generations=[1, 1, 1, -1]),
            dict(slots=[0, 1, 2, 3, 4], generations=[1] * 5),
            dict(lease=0),
        ],
        ids=str,
    )
    def test_in_a_lease(
        self, client: ClientService, server: ScriptedServer, changes: dict[str, object]
    ) -> None:
        server.held.update(KEYS)
        server.distort = lambda reply: found(reply, **changes)
        assert client.lease("r", KEYS) == Lease(0, ())
        assert server.link.is_closed

    @pytest.mark.parametrize(
        "changes",
        [
            dict(indices=[0, 1, 2, 4]),
            dict(indices=[0, 1, 2, 2]),
            dict(indices=[0, 1, 2, -1]),
            dict(indices=[0, 1]),
            dict(slots=[1, 1, 2, 3]),
            dict(reservation=0),
        ],
        ids=str,
    )
    def test_in_a_reservation(
        self, client: ClientService, server: ScriptedServer, changes: dict[str, object]
    ) -> None:
        server.distort = lambda reply: found(reply, **changes)
        assert client.reserve("r", KEYS) is None
        assert server.link.is_closed

    @pytest.mark.parametrize(
        "reply",
        [
            wire.Done(id=1),
            wire.Pong(id=1),
            wire.Coming(id=1, blocks=1, cut=MissReason.NO_ROOM),
            wire.Events(kind="stored", tier="disk", keys=b"no key"),
        ],
        ids=lambda reply: type(reply).__name__,
    )
    def test_in_the_kind_of_answer(
        self, client: ClientService, server: ScriptedServer, reply: wire.Reply
    ) -> None:
        server.distort = lambda _: reply
        assert client.lookup(KEYS).missing is MissReason.TIER_DOWN
        assert server.link.is_closed

    def test_nobody_asked(self, client: ClientService, server: ScriptedServer) -> None:
        server.link.say(wire.Pong(id=1))
        client.poll()
        assert client.arena is None


class TestTheRest:
    def test_events_are_handed_on(self, client: ClientService, server: ScriptedServer) -> None:
        server.link.say(wire.Events(kind="stored", tier="disk", keys=wire.pack_keys(KEYS)))
        client.poll()
        (event,) = client.take_events()
        assert (event.kind, event.tier, event.keys) == ("stored", "disk", tuple(KEYS))
        assert client.take_events() == ()

    def test_a_clear_drops_what_this_engine_holds(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        client.poll()
        server.delay_s = 0.01
        assert client.reserve("r", KEYS) is None
        later(client, server)
        client.clear()
        assert server.link.count(wire.Clear) == 1
        assert not server.link.reservations, "slots that came for a prompt of the old weights"

    @pytest.mark.parametrize(
        "owner", ["r" * 1000, "\ud800", "\u00fc" * 300], ids=["long", "surrogate", "umlauts"]
    )
    def test_a_request_may_be_called_anything(
        self, client: ClientService, server: ScriptedServer, owner: str
    ) -> None:
        server.held.update(KEYS)
        lease = client.lease(owner, KEYS)
        assert lease.places
        client.release_owner(owner)
        assert not server.link.leases
        assert client.arena is not None

    def test_a_prompt_longer_than_a_message_is_asked_for_as_far_as_it_fits(
        self, client: ClientService, server: ScriptedServer
    ) -> None:
        keys = chain(1, wire.MAX_KEYS + 1)
        server.held.update(keys)
        assert client.lookup(keys).ready == wire.MAX_KEYS
        assert client.prefetch("r", keys).blocks == wire.MAX_KEYS

    def test_nothing_is_asked_about_nothing(self, client: ClientService, server: ScriptedServer) -> None:
        assert client.lookup([]) == Match(0, 0, (), MissReason.NONE)
        assert client.lease("r", []) == Lease(0, ())
        assert client.reserve("r", []) == Reservation(0, ())
        assert not server.link.requests

    def test_closed_means_closed(self, client: ClientService) -> None:
        client.close(1.0)
        client.close(1.0)
        assert client.arena is None
        with pytest.raises(ClosedError):
            client.lookup(KEYS)
