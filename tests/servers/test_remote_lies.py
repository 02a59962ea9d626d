"""The remote tier believes no server: what does not fit is a failure, soon, and is written nowhere."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable

import msgspec
import pytest
from liar import Answer, lying
from remote_kit import BLOCKS, LAYOUT, keys, open_tier, store

from kvferry.connector import wire
from kvferry.connector.channel import Channel
from kvferry.connector.errors import ConfigError, TierError
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Outcome

DEADLINE_S, GRACE_S = 2.0, 1.0
WHOLE = LAYOUT.payload_bytes
SHAPE = wire.ArenaShape(arena_id=bytes(16), slot_bytes=4096, num_slots=1, header_bytes=4096, total_bytes=8192)


def block(index: int, length: int = WHOLE, id_: int = 0) -> tuple[wire.Reply, bytes]:
    return wire.Block(id=id_ or 1, index=index, length=length), bytes(HEADER_BYTES + length)


def says(*parts: wire.Reply | bytes | tuple[wire.Reply, bytes], forever: bytes = b"") -> Answer:
    """Answer every request with these messages and bytes, ids as they have to be where they are 1."""

    def answer(channel: Channel, request: wire.Request, deadline: float) -> None:
        flat: Iterable[wire.Reply | bytes] = itertools.chain.from_iterable(
            part if isinstance(part, tuple) else (part,) for part in parts
        )
        for part in flat:
            if not isinstance(part, bytes) and getattr(part, "id", 0) == 1:
                part = msgspec.structs.replace(part, id=getattr(request, "id", 0))
            channel.send_bytes([part if isinstance(part, bytes) else wire.encode(part)], deadline)
        while forever:
            channel.send_bytes([forever], deadline)
        channel.receive(1, deadline)  # until the client is gone

    return answer


LOADS = {
    "longer": says(block(0, WHOLE + 1)),
    "shorter": says(block(0, WHOLE - 1)),
    "longer than anything": says(wire.Block(id=1, index=0, length=(1 << 40) - 1), forever=bytes(1 << 16)),
    "index beyond": says(block(3)),
    "other request": says(block(0, id_=99)),
    "another answer": says(wire.Done(id=1)),
    "an event": says(wire.Events(kind="stored", tier="host", keys=b"")),
    "goodbye": says(wire.Goodbye()),
    "refused": says(wire.Refused(code="internal", why="no", is_mistake=False)),
    "garbage": says(b"\xff" * 64),
    "empty message": says(bytes(4)),
    "a text": says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "endless": says(forever=bytes(range(256)) * 256),
    "silence": says(),
}


@pytest.mark.parametrize("lie", LOADS)
def test_a_load_that_is_lied_to_fails(lie: str) -> None:
    with lying(LOADS[lie]) as liar:
        tier = open_tier(liar.address, deadline_s=DEADLINE_S)
        for connections in (1, 2):
            batch = BLOCKS.empty(keys(3))
            before = batch.image()
            began = time.monotonic()
            with pytest.raises(TierError, match=liar.address):
                tier.load(batch.frames)
            assert time.monotonic() - began < DEADLINE_S + GRACE_S
            assert batch.image() == before
            assert liar.connections == connections, "a connection on which somebody lied is not used again"
        tier.close()


LATE = {
    "twice": says(block(1), block(1)),
    "longer": says(block(1), block(0, WHOLE + 1)),
    "half": says(block(1), wire.Block(id=1, index=0, length=WHOLE), bytes(WHOLE)),
    "garbage": says(block(1), b"\xff" * 64),
}


@pytest.mark.parametrize("lie", LATE)
def test_what_came_before_a_lie_counts_and_the_rest_has_failed(lie: str) -> None:
    with lying(LATE[lie]) as liar:
        tier = open_tier(liar.address, deadline_s=DEADLINE_S)
        batch = BLOCKS.empty(keys(3))
        assert tier.load(batch.frames) == [Outcome.FAILED, Outcome.OK, Outcome.FAILED]
        batch.check_guards()
        tier.close()


def test_bytes_after_an_answer_are_never_taken_for_the_next() -> None:
    last, payload = block(2)
    with lying(says(block(0), block(1), last, payload + b"left over")) as liar:
        tier = open_tier(liar.address, deadline_s=DEADLINE_S)
        answered = 0
        for _ in range(10):
            with contextlib.suppress(TierError):  # they came after the connection was looked at
                assert tier.load(BLOCKS.empty(keys(3)).frames) == [Outcome.OK] * 3
                answered += 1
        assert answered > 3
        assert liar.connections >= answered, "none was used again"
        tier.close()


STORES = {
    "wants too many": says(wire.Wanted(id=1, indices=[0, 1, 2, 3])),
    "wants one twice": says(wire.Wanted(id=1, indices=[1, 1])),
    "wants them backwards": says(wire.Wanted(id=1, indices=[2, 1])),
    "wants what is before the first": says(wire.Wanted(id=1, indices=[-1])),
    "knows too little": says(wire.Wanted(id=1, indices=[]), wire.Stored(id=1, outcomes=["ok"] * 2)),
    "knows too much": says(wire.Wanted(id=1, indices=[]), wire.Stored(id=1, outcomes=["ok"] * 4)),
    "knows before it asks": says(wire.Stored(id=1, outcomes=["ok"] * 3)),
    "takes none": says(wire.Wanted(id=1, indices=[0, 1, 2])),
}


@pytest.mark.parametrize("lie", STORES)
def test_a_store_that_is_lied_to_fails(lie: str) -> None:
    with lying(STORES[lie]) as liar:
        tier = open_tier(liar.address, deadline_s=DEADLINE_S)
        began = time.monotonic()
        with pytest.raises(TierError, match=liar.address):
            store(tier, keys(3))
        assert time.monotonic() - began < DEADLINE_S + GRACE_S
        tier.close()


def test_blocks_are_offered_in_order_so_that_the_beginning_of_a_prefix_finds_room() -> None:
    first, *others = keys(4)
    offered: list[list[BlockKey]] = []

    def answer(channel: Channel, request: wire.Request, deadline: float) -> None:
        assert isinstance(request, wire.Store)
        offered.append(wire.unpack_keys(request.keys))
        count = len(offered[-1])
        channel.send(wire.Wanted(id=request.id, indices=[]), deadline)
        outcomes = ["ok", *["no_room"] * (count - 1)]
        channel.send(
            msgspec.convert({"type": "stored", "id": request.id, "outcomes": outcomes}, wire.Stored), deadline
        )

    with lying(answer) as liar:
        tier = open_tier(liar.address, deadline_s=DEADLINE_S)
        no_room = [Outcome.NO_ROOM] * 3
        assert tier.store(BLOCKS.sealed([first, *others, first]).sources()) == [
            Outcome.OK,
            *no_room,
            Outcome.OK,
        ]
        tier.close()
    assert offered == [[first, *others]]


def test_a_server_that_reads_nothing_holds_a_store_up_no_longer_than_its_deadline() -> None:
    wanted = keys(2000)
    with lying(says(wire.Wanted(id=1, indices=list(range(2000))))) as liar:
        tier = open_tier(liar.address, deadline_s=DEADLINE_S)
        frames = BLOCKS.sealed(wanted).sources()
        began = time.monotonic()
        with pytest.raises(TierError):
            tier.store(frames)
        assert time.monotonic() - began < DEADLINE_S + GRACE_S
        tier.close()


@pytest.mark.parametrize("held", [b"", b"\1\1", b"\1\1\1\1", b"\1\0\2"])
def test_an_answer_for_other_keys_is_none(held: bytes) -> None:
    with lying(says(wire.Held(id=1, held=held))) as liar:
        tier = open_tier(liar.address, deadline_s=DEADLINE_S)
        with pytest.raises(TierError, match=liar.address):
            tier.contains(keys(3))
        tier.close()


@pytest.mark.parametrize(
    "greeting",
    [
        wire.Done(id=1),
        wire.Welcome(server_id=bytes(16), version="0", arena=SHAPE),
        wire.Refused(code="layout", why="other blocks\nthan ours", is_mistake=True),
    ],
)
def test_a_greeting_that_no_server_has_is_a_mistake(greeting: wire.Reply) -> None:
    with lying(says(), greeting) as liar:
        with pytest.raises(ConfigError) as raised:
            open_tier(liar.address, deadline_s=DEADLINE_S)
        assert raised.value.path == "tiers.far.servers"
        assert liar.address in raised.value.why
        assert "\n" not in raised.value.why


def test_a_refusal_that_may_pass_is_none(caplog: pytest.LogCaptureFixture) -> None:
    with lying(says(), wire.Refused(code="no_room", why="full", is_mistake=False)) as liar:
        tier = open_tier(liar.address, deadline_s=DEADLINE_S)
        assert caplog.text.count("full") == 1
        with pytest.raises(TierError, match="full"):
            tier.load(BLOCKS.empty(keys(1)).frames)
        tier.close()
