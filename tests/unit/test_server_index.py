"""The index thread with local engines: what they share, what they cannot do, and what their deaths leave behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from server_kit import DEADLINE_S, LAYOUT, Engine, ServerInside, prefix, soon, wait_until

from kvferry.connector import wire
from kvferry.connector.errors import ClosedError
from kvferry.connector.server import index as index_module
from kvferry.connector.service import MissReason

KEYS = prefix(8)


@pytest.fixture
def inside() -> Iterator[ServerInside]:
    with ServerInside() as inside:
        yield inside


def refusal(engine: Engine) -> wire.Refused:
    reply = engine.channel.receive_reply(soon())
    assert isinstance(reply, wire.Refused)
    with pytest.raises(OSError, match=r"closed|reset"):
        engine.channel.receive_reply(soon())
    return reply


def test_what_one_engine_saves_another_reads(inside: ServerInside) -> None:
    first, second = inside.engine(), inside.engine()
    assert second.lookup(KEYS).missing is MissReason.NEVER_STORED
    first.save(KEYS)
    assert first.lookup(KEYS).ready == len(KEYS)
    found = second.lookup(prefix(10))
    assert (found.ready, found.reachable, found.runs) == (8, 8, [("host", 8)])
    assert second.read(KEYS) == len(KEYS)


def test_requests_may_be_pipelined(inside: ServerInside) -> None:
    engine = inside.engine()
    engine.save(KEYS)
    for number in range(100, 200):
        engine.tell(wire.Lookup(id=number, keys=wire.pack_keys(KEYS)))
    for number in range(100, 200):
        found = engine.channel.receive_reply(soon())
        assert isinstance(found, wire.Found)
        assert (found.id, found.ready) == (number, 8)


def test_leases_end_with_the_connection(inside: ServerInside) -> None:
    pool = inside.pool()
    reader, writer = inside.engine(pool), inside.engine(pool)
    writer.save(KEYS)
    assert len(reader.lease(KEYS).slots) == 8
    others = prefix(16, "others")
    assert len(writer.reserve(others).slots) == 8, "what is leased is not evicted"
    reader.die()
    wait_until("the reader has gone", lambda: bool(inside.ended))
    assert len(writer.reserve(others).slots) == 8, "the other eight"


def test_what_a_dying_writer_may_still_write_goes_to_nobody_before_it_is_dead(inside: ServerInside) -> None:
    pool = inside.pool()
    writer, other = inside.engine(pool), inside.engine(pool)
    granted = writer.reserve(prefix(16))
    assert len(granted.slots) == 16
    writer.disconnect()
    wait_until("the server noticed", lambda: inside.index.call(lambda: pool.dead_writers, soon()) == 1)
    assert other.reserve(prefix(4, "other")).slots == [], "a worker of the dead engine may be copying"
    writer.die()
    wait_until("its processes are gone", lambda: inside.index.call(lambda: pool.dead_writers, soon()) == 0)
    assert len(other.reserve(prefix(16, "more")).slots) == 16
    assert other.lookup(prefix(1)).ready == 0, "nothing of it became visible"


def test_an_expired_reservation_of_a_dead_engine_comes_back_too() -> None:
    with ServerInside(lease_s=0.05) as inside:
        pool = inside.pool()
        writer, other = inside.engine(pool), inside.engine(pool)
        writer.reserve(prefix(16))
        writer.disconnect()
        wait_until("it is void", lambda: _expired(inside) == 1)
        assert other.reserve(prefix(2, "other")).slots == []
        writer.die()
        wait_until("the slots are free", lambda: inside.used_slots(pool) == 0)


def _expired(inside: ServerInside) -> int:
    (pool,) = inside.index.pools
    return inside.index.call(lambda: pool.service.counters().decisions.expired_reservations, soon())


def test_a_commit_of_another_engines_reservation_is_refused(inside: ServerInside) -> None:
    pool = inside.pool()
    writer, thief = inside.engine(pool), inside.engine(pool)
    granted = writer.reserve(KEYS)
    thief.tell(wire.Commit(reservation=granted.reservation, keys=wire.pack_keys(KEYS)))
    assert refusal(thief).code == "protocol"
    assert writer.lookup(KEYS).ready == 0
    writer.tell(wire.Commit(reservation=granted.reservation, keys=wire.pack_keys(KEYS)))
    assert writer.lookup(KEYS).ready == 8


def test_a_release_of_another_engines_lease_changes_nothing(inside: ServerInside) -> None:
    pool = inside.pool()
    writer, reader, thief = inside.engine(pool), inside.engine(pool), inside.engine(pool)
    writer.save(KEYS)
    lease = reader.lease(KEYS)
    thief.tell(wire.Release(lease=lease.lease))
    thief.lookup(KEYS)
    assert len(writer.reserve(prefix(16, "others")).slots) == 8


def test_owners_of_two_engines_with_the_same_name_are_two(inside: ServerInside) -> None:
    pool = inside.pool()
    first, second = inside.engine(pool), inside.engine(pool)
    first.save(KEYS)
    first.lease(KEYS, "request-1")
    second.tell(wire.ReleaseOwner(owner="request-1"))
    second.lookup(KEYS)
    assert len(second.reserve(prefix(16, "others")).slots) == 8, "the first one's lease still holds"


def test_after_a_clear_nothing_reserved_before_becomes_visible(inside: ServerInside) -> None:
    engine = inside.engine()
    engine.save(KEYS)
    granted = engine.reserve(prefix(4, "old"))
    engine.lease(KEYS)
    engine.tell(wire.Clear())
    engine.tell(wire.Commit(reservation=granted.reservation, keys=wire.pack_keys(prefix(4, "old"))))
    assert engine.lookup(prefix(4, "old")).ready == 0
    assert len(engine.reserve(prefix(16, "others")).slots) == 16, "leases are gone, slots are back"
    assert engine.lookup(KEYS).ready == 0


@pytest.mark.parametrize(
    "message",
    [
        wire.Hello(mode="map", fingerprint=bytes(32), layout=LAYOUT),
        wire.Load(id=1, keys=b"", wait_s=1.0),
        wire.Stats(id=1),
        wire.Commit(reservation=77, keys=b""),
        wire.Abort(reservation=77),
        wire.Lookup(id=1, keys=b"short"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_breaks_the_protocol_ends_that_connection_and_no_other(
    inside: ServerInside, message: wire.Request
) -> None:
    bad, good = inside.engine(), inside.engine()
    good.save(KEYS)
    bad.tell(message)
    assert refusal(bad).code == "protocol"
    assert good.read(KEYS) == 8


@pytest.mark.parametrize("data", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\5\0\0\0hello", b"\1\0\0\0\x80"])
def test_garbage_ends_that_connection_and_no_other(inside: ServerInside, data: bytes) -> None:
    bad, good = inside.engine(), inside.engine()
    bad.channel.send_bytes([data], soon())
    assert refusal(bad).code == "protocol"
    assert good.lookup(KEYS).ready == 0


def test_an_engine_that_does_not_read_its_answers_is_disconnected(
    inside: ServerInside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_MAX_UNREAD_BYTES", 1 << 16)
    silent, good = inside.engine(), inside.engine()
    question = wire.encode(wire.Lookup(id=1, keys=wire.pack_keys(KEYS)))

    def ask_without_end() -> None:
        while True:
            silent.channel.send_bytes([question * 100], soon())

    with pytest.raises(OSError, match=r"pipe|reset|closed"):
        ask_without_end()
    assert good.lookup(KEYS).ready == 0


def test_the_number_of_leases_of_one_connection_is_bounded(
    inside: ServerInside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.connector.server.mapping.MAX_GRANTS", 10)
    engine = inside.engine()
    engine.save(KEYS)
    for _ in range(10):
        assert engine.lease(KEYS).lease
    engine.tell(wire.Lease(id=99, owner="reader", keys=wire.pack_keys(KEYS)))
    assert "release" in refusal(engine).why


def test_events_reach_those_who_want_them(inside: ServerInside) -> None:
    pool = inside.pool()
    listener, writer = inside.engine(pool, wants_events=True), inside.engine(pool)
    writer.save(KEYS)
    event = listener.channel.receive_reply(soon())
    assert isinstance(event, wire.Events)
    assert (event.kind, event.tier, wire.unpack_keys(event.keys)) == ("stored", "host", KEYS)
    assert [one.kind for one in inside.events] == ["stored"], "and whoever publishes them"


def test_engines_are_told_when_the_server_stops(inside: ServerInside) -> None:
    engine = inside.engine()
    inside.index.call(inside.index.say_goodbye, soon())
    assert isinstance(engine.channel.receive_reply(soon()), wire.Goodbye)


def test_an_error_in_posted_work_ends_nothing(inside: ServerInside, caplog: pytest.LogCaptureFixture) -> None:
    inside.index.post(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inside.index.call(lambda: 1 / 0, soon())
    assert inside.engine().lookup(KEYS).ready == 0
    assert "ZeroDivisionError" in caplog.text


def test_a_call_has_a_deadline(inside: ServerInside) -> None:
    blocked = threading.Event()
    inside.index.post(lambda: blocked.wait(DEADLINE_S))
    try:
        with pytest.raises(TimeoutError):
            inside.index.call(lambda: None, time.monotonic() + 0.01)
    finally:
        blocked.set()


def test_a_call_after_the_end_says_so() -> None:
    with ServerInside() as inside:
        pass
    with pytest.raises(ClosedError):
        inside.index.call(lambda: None, soon())


def test_lookups_are_counted_by_their_time(inside: ServerInside) -> None:
    engine = inside.engine()
    for _ in range(5):
        engine.lookup(KEYS)
    assert sum(inside.index.call(lambda: list(inside.index.lookups), soon())) == 5
    assert inside.index.call(lambda: inside.index.requests["Lookup"], soon()) == 5
