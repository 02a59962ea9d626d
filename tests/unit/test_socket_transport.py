"""The ``socket`` transport: held to the kit, and to what only it can get wrong."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_kit import (
    TOKEN,
    Bytes,
    Exported,
    Rank,
    TransportTests,
    context,
    even_ranks,
    expected,
    ids,
    rank_over,
    soon,
    two_ranks,
    vectors,
)

from kvferry.connector.address import Address
from kvferry.connector.channel import Channel
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import HandoffFailed, WireError
from kvferry.connector.staging import PageIds, SlotIds
from kvferry.connector.transport import Heads, PageMemory, PageReader, PageStaging, TransportType
from kvferry.plugins.peer import socket_exporter, socket_pieces, socket_reader, socket_wire
from kvferry.plugins.peer.socket_pieces import PieceBuffer
from kvferry.plugins.peer.socket_transport import SOCKET
from kvferry.plugins.peer.socket_wire import Offer


@contextmanager
def exported_here(rank: Rank, token: str = "") -> Iterator[bytes]:
    exporter = SOCKET.export(rank.memory, context(token))
    try:
        yield exporter.offer
    finally:
        exporter.close()
        exporter.close()


def connect(giver: Rank, offer: bytes, taker: Rank, token: str = "") -> PageReader:
    return SOCKET.connect(giver.remote(socket=offer), offer, taker.memory, context(token), soon())


class TestSocketTransport(TransportTests):
    @pytest.fixture
    def transport(self) -> TransportType:
        return SOCKET

    @pytest.fixture
    def exported(self) -> Exported:
        return exported_here


def staged(rank: Rank, around: Callable[[Callable[[], None]], None]) -> Rank:
    """Return a rank of which every copy of a page goes through ``around``."""
    stage = rank.memory.stage

    class Staging:
        def __init__(self, heads: Heads) -> None:
            self._staging = stage(heads)

        def gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
            for row in range(len(slots)):
                one = slice(row, row + 1)
                around(lambda one=one: self._staging.gather(page_ids[one], slots[one], arena))

        def scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
            for row in range(len(slots)):
                one = slice(row, row + 1)
                around(lambda one=one: self._staging.scatter(page_ids[one], slots[one], arena))

    return rank._replace(memory=with_stage(rank.memory, Staging))


def with_stage(memory: PageMemory, stage: Callable[[Heads], PageStaging], device: str = "cpu") -> PageMemory:
    return PageMemory(
        address=memory.address,
        nbytes=memory.nbytes,
        device=device,
        device_id=0,
        layout=memory.layout,
        block=memory.block,
        shard=memory.shard,
        stage=stage,
    )


class Gate:
    """Lets ``free`` copies through; the next one waits until the gate is opened."""

    def __init__(self, free: int) -> None:
        self._free = free
        self.copies = 0
        self.is_reached, self._is_open = threading.Event(), threading.Event()

    def __call__(self, copy: Callable[[], None]) -> None:
        self.copies += 1
        if self.copies > self._free:
            self.is_reached.set()
            assert self._is_open.wait(10.0)
        copy()

    def open(self) -> None:
        self._is_open.set()


class Faulty:
    """Raises after ``free`` copies."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __call__(self, copy: Callable[[], None]) -> None:
        if self.free == 0:
            raise RuntimeError("the engine has torn down its memory")
        self.free -= 1
        copy()


class Reading(threading.Thread):
    """A read of all pages on another thread."""

    def __init__(self, reader: PageReader, pages: int, deadline: float) -> None:
        super().__init__()
        self._arguments = ids(range(pages)), ids(range(pages)), deadline
        self._reader = reader
        self.failure: HandoffFailed | None = None
        self.start()

    def run(self) -> None:
        try:
            self._reader.read(*self._arguments)
        except HandoffFailed as failure:
            self.failure = failure

    def reason(self) -> str:
        self.join(10.0)
        assert not self.is_alive()
        assert self.failure is not None
        return self.failure.reason


def read_all(giver: Rank, taker: Rank, reader: PageReader) -> None:
    before = taker.pages.copy()
    pages = giver.layout.num_pages
    reader.read(ids(range(pages)), ids(range(pages)), soon())
    pairs = zip(range(pages), range(pages), strict=True)
    assert np.array_equal(taker.pages, expected(giver, taker, pairs, before))


def threads_of_readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvferry-socket")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


# Who may read


def test_beyond_this_machine_nothing_is_exported_without_a_token() -> None:
    giver, _ = even_ranks()
    open_to_all = msgspec.structs.replace(context(), host="0.0.0.0")
    with pytest.raises(HandoffFailed, match="KVFERRY_TOKEN") as failed:
        SOCKET.export(giver.memory, open_to_all)
    assert failed.value.reason == "transport"
    exporter = SOCKET.export(giver.memory, msgspec.structs.replace(open_to_all, token=TOKEN))
    assert Offer.decode(exporter.offer)[0].host == "127.0.0.1"
    exporter.close()


def test_an_address_that_is_not_here_is_an_error() -> None:
    giver, _ = even_ranks()
    for host in ("192.0.2.1", "no host", "", "::g"):
        with pytest.raises(HandoffFailed) as failed:
            SOCKET.export(giver.memory, msgspec.structs.replace(context(TOKEN), host=host))
        assert failed.value.reason == "transport"


def test_an_offer_of_a_former_life_is_refused() -> None:
    giver, taker = even_ranks()
    with exported_here(giver) as first, exported_here(giver) as second:
        former, now = (Offer.decode(offer)[0] for offer in (first, second))
        stale = msgspec.structs.replace(former, port=now.port).encode()
        with pytest.raises(HandoffFailed, match="started anew") as failed:
            connect(giver, stale, taker)
        assert failed.value.reason == "transport"


def test_an_offer_of_another_version_is_refused() -> None:
    giver, taker = even_ranks()
    with exported_here(giver) as offer:
        newer = msgspec.structs.replace(Offer.decode(offer)[0], version=socket_wire.VERSION + 1)
        with pytest.raises(HandoffFailed, match="version 2"):
            connect(giver, newer.encode(), taker)


def test_nobody_there_is_unreachable() -> None:
    giver, taker = even_ranks()
    with exported_here(giver) as offer:
        pass
    with pytest.raises(HandoffFailed) as failed:
        connect(giver, offer, taker)
    assert failed.value.reason == "unreachable"


def test_there_are_only_so_many_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_exporter, "_MOST_READERS", 1)
    giver, taker = even_ranks()
    with exported_here(giver) as offer:
        first = connect(giver, offer, taker)
        with pytest.raises(HandoffFailed) as failed:
            connect(giver, offer, taker)
        assert failed.value.reason == "unreachable"
        first.close()
        wait_until(lambda: not threads_of_readers())
        second = connect(giver, offer, taker)
        read_all(giver, taker, second)
        second.close()


def test_somebody_who_says_nothing_costs_no_more_than_the_deadline() -> None:
    giver, taker = even_ranks()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        offer = Offer(
            version=socket_wire.VERSION, host="127.0.0.1", port=port, incarnation=bytes(16)
        ).encode()
        started = time.monotonic()
        with pytest.raises(HandoffFailed) as failed:
            SOCKET.connect(giver.remote(socket=offer), offer, taker.memory, context(), soon(0.1))
        assert failed.value.reason == "timeout"
        assert time.monotonic() - started < 5.0


def test_an_ipv6_address_is_offered_as_it_is() -> None:
    offer = Offer(version=socket_wire.VERSION, host="::1", port=4711, incarnation=bytes(16))
    assert Offer.decode(offer.encode()) == (offer, Address(scheme="tcp", host="::1", port=4711))


# Heads


@pytest.mark.parametrize("field", ["first_head", "num_heads", "page_bytes"])
def test_heads_that_the_rank_does_not_hold_are_refused(field: str) -> None:
    giver, _ = even_ranks()
    with exported_here(giver) as offered:
        offer, address = Offer.decode(offered)
        opening = socket_wire.Opening(
            incarnation=offer.incarnation,
            first_head=0,
            num_heads=2,
            page_bytes=giver.memory.page_bytes(Heads(0, 2)),
        )
        for bad, is_good in ((opening, True), (changed(opening, field, 1), False)):
            channel = open_channel(address)
            socket_wire.send_opening(channel, bad, soon())
            if is_good:
                socket_wire.receive_verdict(channel, soon())
            else:
                with pytest.raises(WireError, match="does not hold these heads"):
                    socket_wire.receive_verdict(channel, soon())
            channel.close()


def changed(opening: socket_wire.Opening, field: str, by: int) -> socket_wire.Opening:
    return msgspec.structs.replace(opening, **{field: getattr(opening, field) + by})


def open_channel(address: Address) -> Channel:
    return dial(address, "", TlsConfig(), soon())


@pytest.mark.parametrize("piece_bytes", [1, 300, 5000, 1 << 24])
@pytest.mark.parametrize("seed", range(12))
def test_however_pages_are_cut_the_same_bytes_arrive(
    seed: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    giver, taker = two_ranks(seed)
    common = min(giver.layout.num_pages, taker.layout.num_pages)
    before = taker.pages.copy()
    with exported_here(giver) as offer:
        monkeypatch.setattr(socket_pieces, "PIECE_BYTES", piece_bytes)
        reader = connect(giver, offer, taker)
        monkeypatch.setattr(socket_pieces, "PIECE_BYTES", piece_bytes // 2 + 1)
        reader.read(ids(range(common)), ids(reversed(range(common))), soon())
        reader.close()
    pairs = zip(range(common), reversed(range(common)), strict=True)
    assert np.array_equal(taker.pages, expected(giver, taker, pairs, before))


def test_a_page_in_gpu_memory_is_staged_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_pieces, "PIECE_BYTES", 1)
    rank, _ = even_ranks()
    staged_heads: dict[str, list[Heads]] = {"cpu": [], "cuda": []}
    for device, heads in staged_heads.items():

        def stage(some: Heads, heads: list[Heads] = heads) -> PageStaging:
            heads.append(some)
            return rank.memory.stage(some)

        PieceBuffer(with_stage(rank.memory, stage, device), Heads(0, 2))
    assert staged_heads == {"cpu": [Heads(0, 1), Heads(1, 1)], "cuda": [Heads(0, 2)]}


def test_more_pages_than_a_request_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_wire, "MOST_PAGES", 3)
    giver, taker = even_ranks()
    with exported_here(giver) as offer:
        reader = connect(giver, offer, taker)
        read_all(giver, taker, reader)
        reader.close()


# Faults


def test_an_exporter_that_closes_ends_the_read_and_touches_memory_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket_pieces, "PIECE_BYTES", 1)  # so that there is something to send between copies
    giver, taker = even_ranks()
    gate = Gate(free=2)
    exporter = SOCKET.export(staged(giver, gate).memory, context())
    reading = Reading(connect(giver, exporter.offer, taker), 8, soon())
    assert gate.is_reached.wait(10.0)
    closing = threading.Thread(target=exporter.close)
    closing.start()
    assert reading.reason() == "disconnected"
    gate.open()
    closing.join(10.0)
    assert not closing.is_alive()
    assert threads_of_readers() == []
    assert gate.copies == 3


def test_a_deadline_ends_a_read_in_the_middle() -> None:
    giver, taker = even_ranks()
    gate = Gate(free=2)
    with exported_here(staged(giver, gate)) as offer:
        reading = Reading(connect(giver, offer, taker), 8, soon(0.2))
        assert reading.reason() == "timeout"
        after = taker.pages.copy()
        gate.open()
        wait_until(lambda: not threads_of_readers())
        assert np.array_equal(taker.pages, after)


def test_a_reader_that_is_closed_ends_its_read() -> None:
    giver, taker = even_ranks()
    gate = Gate(free=2)
    with exported_here(staged(giver, gate)) as offer:
        reader = connect(giver, offer, taker)
        reading = Reading(reader, 8, soon())
        assert gate.is_reached.wait(10.0)
        reader.close()
        assert reading.reason() == "disconnected"
        gate.open()


@pytest.mark.parametrize(("free", "reason"), [(0, "transport"), (7, "disconnected")])
def test_pages_that_the_exporter_cannot_gather(
    free: int, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first byte it can say so; later it can only hang up. It goes on serving."""
    monkeypatch.setattr(socket_pieces, "PIECE_BYTES", 1)
    giver, taker = even_ranks()
    faulty = Faulty(free)
    with exported_here(staged(giver, faulty)) as offer:
        assert Reading(connect(giver, offer, taker), 8, soon()).reason() == reason
        wait_until(lambda: not threads_of_readers())
        assert "the engine has torn down its memory" in caplog.text
        faulty.free = 1000
        reader = connect(giver, offer, taker)
        read_all(giver, taker, reader)
        reader.close()


def test_pages_that_the_reader_cannot_scatter() -> None:
    giver, taker = even_ranks()
    with exported_here(giver) as offer:
        reader = connect(giver, offer, staged(taker, Faulty(3)))
        assert Reading(reader, 8, soon()).reason() == "transport"
        assert Reading(reader, 8, soon()).reason() == "disconnected"


def test_a_reader_survives_a_long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_exporter, "IDLE_S", 0.02)
    giver, taker = even_ranks()
    with exported_here(giver) as offer:
        unaware = connect(giver, offer, taker)
        monkeypatch.setattr(socket_reader, "IDLE_S", 0.02)
        aware = connect(giver, offer, taker)
        wait_until(lambda: not threads_of_readers())
        monkeypatch.setattr(socket_exporter, "IDLE_S", 10.0)
        assert Reading(unaware, 8, soon()).reason() == "disconnected"
        read_all(giver, taker, aware)
        aware.close()


# Hostile bytes

GIVER, TAKER = even_ranks()
INCARNATION = bytes(range(socket_wire.INCARNATION_BYTES))
OPENING = socket_wire.Opening(
    incarnation=INCARNATION, first_head=0, num_heads=2, page_bytes=GIVER.memory.page_bytes(Heads(0, 2))
)
COUNTS = st.sampled_from(
    [0, 1, 2, 8, 100, socket_wire.MOST_PAGES, socket_wire.MOST_PAGES + 1, 2**31, 2**32 - 1]
)
PAGES = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 8), max_size=20)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request, the number before it maybe a lie."""
    pages = draw(PAGES)
    count = draw(st.just(len(pages)) | COUNTS)
    return count.to_bytes(4, "little") + np.array(pages, "<i4").tobytes()


STREAMS = st.lists(requests() | st.binary(max_size=40), max_size=5).map(b"".join)


def said_to(sock: socket.socket, stream: bytes) -> threading.Thread:
    """Say something, hang up, and take whatever is answered."""

    def say() -> None:
        with sock, suppress(OSError):
            sock.sendall(stream)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass

    thread = threading.Thread(target=say)
    thread.start()
    return thread


@settings(max_examples=50, deadline=None)
@given(stream=STREAMS)
def test_whatever_a_reader_asks_for_only_its_own_connection_ends(stream: bytes) -> None:
    here, there = socket.socketpair()
    saying = said_to(there, stream)
    with here, pytest.raises((WireError, OSError)):
        socket_exporter.answer(Channel(here), OPENING, GIVER.memory, INCARNATION)
    saying.join(10.0)
    assert not saying.is_alive()


@settings(max_examples=50, deadline=None)
@given(body=st.binary(max_size=80), length=st.none() | st.integers(0, 2**32 - 1))
def test_an_opening_that_is_none_is_refused(body: bytes, length: int | None) -> None:
    here, there = socket.socketpair()
    said = len(body) if length is None else length
    saying = said_to(there, said.to_bytes(4, "little") + body)
    with here, pytest.raises((WireError, OSError)):
        socket_wire.receive_opening(Channel(here), soon())
    saying.join(10.0)


@settings(max_examples=60, deadline=None)
@given(verdicts=st.booleans(), stream=st.binary(max_size=300), repeated=st.integers(1, 2000))
def test_whatever_an_exporter_answers_a_read_ends(verdicts: bool, stream: bytes, repeated: int) -> None:
    here, there = socket.socketpair()
    saying = said_to(there, (b"\0\0" if verdicts else b"") + stream * repeated)
    taker = rank_over(TAKER.pages.copy(), TAKER.layout, TAKER.block, TAKER.shard)
    offer = Offer(version=socket_wire.VERSION, host="127.0.0.1", port=1, incarnation=INCARNATION)
    with mock.patch.object(socket_reader, "dial", return_value=Channel(here)):
        with suppress(HandoffFailed):
            reader = connect(GIVER, offer.encode(), taker)
            try:
                reader.read(ids([1, 2]), ids([3, 4]), soon())
            finally:
                reader.close()
    saying.join(10.0)
    assert not saying.is_alive()
    untouched = np.ones(taker.pages.size, bool)
    for page in (3, 4):
        untouched[vectors(taker, Heads(0, 2), page)] = False
    assert np.array_equal(taker.pages[untouched], TAKER.pages[untouched])


@settings(max_examples=100, deadline=None)
@given(offered=st.binary(max_size=200))
def test_an_offer_that_is_none_is_refused(offered: bytes) -> None:
    with pytest.raises(WireError):
        Offer.decode(offered)


@settings(max_examples=100, deadline=None)
@given(
    host=st.text(max_size=300),
    port=st.integers(-1, 1 << 17),
    incarnation=st.binary(min_size=14, max_size=18),
)
def test_what_an_offer_names_is_an_address_or_refused(host: str, port: int, incarnation: bytes) -> None:
    offer = Offer(version=socket_wire.VERSION, host=host, port=port, incarnation=incarnation)
    try:
        offered = offer.encode()
    except UnicodeEncodeError:
        return
    try:
        decoded, address = Offer.decode(offered)
    except WireError:
        return
    assert decoded == offer
    assert (address.scheme, address.host, address.port) == ("tcp", host, port)
    assert 0 < port < 1 << 16
    assert len(incarnation) == socket_wire.INCARNATION_BYTES


def test_strangers_leave_the_exporter_as_it_was() -> None:
    giver, taker = even_ranks()
    with exported_here(giver) as offer:
        _, address = Offer.decode(offer)
        for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(200)):
            with socket.create_connection((address.host, address.port)) as sock:
                sock.sendall(nonsense)
        for first in (b"\xff\xff\xff\xff", b"\4\0\0\0nope", bytes(4)):
            channel = open_channel(address)
            channel.send_bytes([first], soon())
            with pytest.raises(ConnectionError):
                channel.receive(1, soon())
            channel.close()
        reader = connect(giver, offer, taker)
        read_all(giver, taker, reader)
        reader.close()


def test_what_an_exporter_holds_for_a_reader_is_bounded() -> None:
    """Whatever it asks for: a piece, or one page of one head where that is more."""
    rank, _ = even_ranks()
    buffer = PieceBuffer(rank.memory, Heads(0, 2))
    most = socket_pieces.PIECE_BYTES
    assert all(piece.data.nbytes <= most for piece in buffer.pieces([0] * socket_wire.MOST_PAGES))
    assert sum(piece.data.nbytes for piece in buffer.pieces([0] * 1000)) == 1000 * OPENING.page_bytes
