"""Reading from peers: whatever a peer or a transport does, each read is answered once, and by its deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from transport_kit import Rank, context, even_ranks, rank_over

from kvferry.connector.config import PeerConfig
from kvferry.connector.errors import HandoffFailed
from kvferry.connector.keys import pages_fingerprint
from kvferry.connector.layout import Shard
from kvferry.connector.transport import Heads, RemotePages, TransportType
from kvferry.engines.handoff import reading
from kvferry.engines.handoff.digest import PageDigester
from kvferry.engines.handoff.exporting import PageExports, export_pages
from kvferry.engines.handoff.reading import PeerReads, shared_heads
from kvferry.engines.handoff.side_channel import SideChannel
from kvferry.engines.handoff.table import Handed, HandoffTable
from kvferry.engines.jobs import ExportJob, PeerRead, PeerSource
from kvferry.plugins.peer.socket_transport import SOCKET

FINGERPRINT = bytes(32)
PAGES = 4
TOKENS = PAGES * 16
DEADLINE_S = 10.0


def content(count: int) -> bytes:
    return count.to_bytes(32, "little")


class Giver:
    """An engine that holds all its pages for a request."""

    def __init__(
        self, rank: Rank, transports: list[TransportType], peer: PeerConfig, fingerprint: bytes = FINGERPRINT
    ) -> None:
        self.exports = export_pages(rank.memory, transports, context(), peer.verify)
        assert self.exports is not None
        self.table = HandoffTable(peer.lease_s)
        self.channel = SideChannel(peer, "", fingerprint, "giver", self.table)
        self.channel.set_ranks([self.exports.pages])
        self.channel.start()
        handed = Handed("theirs", tuple(range(PAGES)), TOKENS, content)
        self.seq = self.table.hand_over(handed, time.monotonic())

    def digest(self) -> None:
        assert isinstance(self.exports, PageExports)
        self.exports.submit([ExportJob(self.seq, tuple(range(PAGES)))])
        end = time.monotonic() + DEADLINE_S
        while not (digests := self.exports.take_digests()):
            assert time.monotonic() < end
            time.sleep(0.001)
        self.table.set_digests(self.seq, 0, digests[self.seq][0])

    def read(self, **changes: object) -> PeerRead:
        host, port = self.channel.address
        source = PeerSource(host, port, "giver", "theirs", TOKENS)
        return PeerRead(
            source, "taker/ours", TOKENS, FINGERPRINT, content(TOKENS), 0, tuple(range(PAGES))
        )._replace(**changes)

    def close(self) -> None:
        self.channel.close(1.0)
        assert self.exports is not None
        self.exports.close()


class Answers:
    """What reads were answered."""

    def __init__(self, reads: PeerReads) -> None:
        self._reads = reads
        self._answers: queue.SimpleQueue[HandoffFailed | None] = queue.SimpleQueue()

    def submit(self, read: PeerRead) -> None:
        self._reads.submit(read, lambda failure, moved, seconds: self._answers.put(failure))

    def next(self) -> HandoffFailed | None:
        return self._answers.get(timeout=DEADLINE_S)

    def reason(self, read: PeerRead) -> str:
        self.submit(read)
        failure = self.next()
        return failure.reason if failure else "ok"


@pytest.fixture
def ranks() -> tuple[Rank, Rank]:
    return even_ranks(PAGES)


@pytest.fixture
def giver(ranks: tuple[Rank, Rank]) -> Iterator[Giver]:
    giver = Giver(ranks[0], [SOCKET], PeerConfig())
    yield giver
    giver.close()


def reads_of(rank: Rank, *transports: TransportType, **peer: object) -> PeerReads:
    config = msgspec.structs.replace(PeerConfig(deadline_s=5.0), **peer)
    return PeerReads(rank.memory, {transport.name: transport for transport in transports}, context(), config)


@pytest.fixture
def answers(ranks: tuple[Rank, Rank]) -> Iterator[Answers]:
    reads = reads_of(ranks[1], SOCKET)
    yield Answers(reads)
    reads.close()


def test_what_is_held_is_read(giver: Giver, answers: Answers, ranks: tuple[Rank, Rank]) -> None:
    giver.digest()
    assert answers.reason(giver.read()) == "ok"
    theirs, ours = (PageDigester(rank.memory).digest(range(PAGES)) for rank in ranks)
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"content": content(7)}, "content"),
        ({"num_tokens": TOKENS + 1, "content": content(TOKENS + 1)}, "content"),
        ({"fingerprint": bytes(31) + b"1"}, "incompatible"),
    ],
    ids=["other-tokens", "more-than-it-has", "another-model"],
)
def test_what_is_not_held_is_refused(
    giver: Giver, answers: Answers, changes: dict[str, object], reason: str
) -> None:
    assert answers.reason(giver.read(**changes)) == reason


@pytest.mark.parametrize(
    ("theirs", "ours", "reason"),
    [("", "", "ok"), ("vec", "vec", "ok"), ("vec", "amx", "incompatible"), ("vec", "", "incompatible")],
)
@pytest.mark.parametrize("is_told_apart", [True, False])
def test_pages_are_read_from_pages_of_their_own_order_only(
    ranks: tuple[Rank, Rank], theirs: str, ours: str, reason: str, is_told_apart: bool
) -> None:
    """The side channel tells them apart; if it did not, the reader would."""
    giving, taking = (
        rank_over(rank.pages, msgspec.structs.replace(rank.layout, order=order), rank.block, rank.shard)
        for rank, order in zip(ranks, (theirs, ours), strict=True)
    )
    before = taking.pages.copy()
    of_pages = pages_fingerprint(FINGERPRINT, theirs if is_told_apart else ours)
    giver = Giver(giving, [SOCKET], PeerConfig(), of_pages)
    reads = reads_of(taking, SOCKET)
    giver.digest()
    assert Answers(reads).reason(giver.read()) == reason
    assert np.array_equal(taking.pages, before) == (reason != "ok")
    reads.close()
    giver.close()


def test_another_engine_or_request_at_the_address_is_refused(giver: Giver, answers: Answers) -> None:
    source = giver.read().source
    assert answers.reason(giver.read(source=source._replace(engine_id="who"))) == "gone"
    assert answers.reason(giver.read(source=source._replace(request_id="what"))) == "gone"


def test_digests_that_never_come_end_at_the_deadline(giver: Giver, ranks: tuple[Rank, Rank]) -> None:
    reads = reads_of(ranks[1], SOCKET, deadline_s=0.3)
    assert Answers(reads).reason(giver.read()) == "timeout"
    reads.close()


def test_an_engine_that_digests_nothing_is_not_waited_for(giver: Giver, answers: Answers) -> None:
    giver.table.set_digests(giver.seq, 0, b"")
    assert answers.reason(giver.read()) == "ok"


def test_a_connection_that_died_is_made_anew(
    giver: Giver, answers: Answers, ranks: tuple[Rank, Rank]
) -> None:
    giver.digest()
    assert answers.reason(giver.read()) == "ok"
    port = giver.channel.address[1]
    giver.channel.close(1.0)
    peer = PeerConfig(listen=f"tcp://127.0.0.1:{port}")
    giver.channel = SideChannel(peer, "", FINGERPRINT, "giver", giver.table)
    giver.channel.set_ranks([giver.exports.pages])
    giver.channel.start()
    assert answers.reason(giver.read()) == "ok"


def test_a_transport_that_does_not_get_through_makes_room_for_the_next(
    giver: Giver, ranks: tuple[Rank, Rank]
) -> None:
    def unlucky(*arguments: object) -> object:
        raise HandoffFailed("transport", "there is only TCP")

    better = msgspec.structs.replace(SOCKET, name="better", connect=unlucky, priority=9)
    other = Giver(ranks[0], [better, SOCKET], PeerConfig())
    other.digest()
    reads = reads_of(ranks[1], better, SOCKET)
    assert Answers(reads).reason(other.read()) == "ok"
    reads.close()
    reads = reads_of(ranks[1], better)
    assert Answers(reads).reason(other.read()) == "transport"
    reads.close()
    other.close()


def test_a_transport_that_gets_nowhere_leaves_time_for_the_next(ranks: tuple[Rank, Rank]) -> None:
    def stuck(remote: object, offer: object, own: object, about: object, deadline: float) -> object:
        time.sleep(max(0.0, deadline - time.monotonic()))
        raise HandoffFailed("timeout", "nobody answers")

    better = msgspec.structs.replace(SOCKET, name="better", connect=stuck, priority=9)
    giver = Giver(ranks[0], [better, SOCKET], PeerConfig())
    giver.digest()
    reads = reads_of(ranks[1], better, SOCKET, deadline_s=1.0)
    assert Answers(reads).reason(giver.read()) == "ok"
    reads.close()
    giver.close()


def test_a_transport_that_raises_anything_costs_the_read_only(giver: Giver, ranks: tuple[Rank, Rank]) -> None:
    def broken(*arguments: object) -> object:
        raise RuntimeError("a fault")

    reads = reads_of(ranks[1], msgspec.structs.replace(SOCKET, connect=broken))
    answers = Answers(reads)
    assert [answers.reason(giver.read()) for _ in range(2)] == ["transport", "transport"]
    reads.close()


def test_there_are_not_more_peers_than_may_be(
    giver: Giver, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MOST_LINKS", 1)
    giver.digest()
    assert answers.reason(giver.read()) == "ok"
    elsewhere = giver.read().source._replace(host="localhost")
    assert answers.reason(giver.read(source=elsewhere)) == "aborted"


def test_a_peer_that_nobody_reads_from_is_forgotten(
    giver: Giver, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_IDLE_S", 0.05)
    giver.digest()
    assert answers.reason(giver.read()) == "ok"
    end = time.monotonic() + DEADLINE_S
    while any(thread.name.startswith("kvferry-peer-127.0.0.1:") for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert answers.reason(giver.read()) == "ok"


def test_closing_answers_what_has_not_begun(giver: Giver, ranks: tuple[Rank, Rank]) -> None:
    reads = reads_of(ranks[1], SOCKET)
    answers = Answers(reads)
    for _ in range(5):
        answers.submit(giver.read())  # its digests do not come
    reads.close()
    reasons = {failure.reason for failure in (answers.next() for _ in range(5)) if failure}
    assert reasons <= {"aborted", "timeout"}
    assert answers.reason(giver.read()) == "aborted"


def remote(ranks: tuple[Rank, Rank], rank: int, first: int, count: int) -> RemotePages:
    return msgspec.structs.replace(ranks[0].remote(), shard=Shard(rank, first, count, True))


@pytest.mark.parametrize(
    ("shards", "wanted", "expected"),
    [
        ([(0, 0, 4)], Heads(0, 4), [(0, 0, 4)]),
        ([(0, 0, 4)], Heads(2, 2), [(0, 2, 2)]),
        ([(0, 0, 2), (1, 2, 2)], Heads(0, 4), [(0, 0, 2), (1, 2, 2)]),
        ([(1, 2, 2), (0, 0, 2)], Heads(1, 2), [(0, 1, 1), (1, 2, 1)]),
        ([(0, 0, 1), (1, 0, 1), (2, 1, 1), (3, 1, 1)], Heads(0, 2), [(0, 0, 1), (2, 1, 1)]),
    ],
    ids=["one", "a-part", "two", "across", "replicas"],
)
def test_each_head_is_read_once(
    ranks: tuple[Rank, Rank],
    shards: list[tuple[int, int, int]],
    wanted: Heads,
    expected: list[tuple[int, int, int]],
) -> None:
    found = shared_heads([remote(ranks, *shard) for shard in shards], wanted)
    assert [(pages.shard.rank, heads.first, heads.count) for pages, heads in found] == expected


def test_heads_that_nobody_holds_are_missed_at_once(ranks: tuple[Rank, Rank]) -> None:
    with pytest.raises(HandoffFailed, match="no rank of the peer holds head 2"):
        shared_heads([remote(ranks, 0, 0, 2)], Heads(0, 4))
