"""Streaming clients: blocks over a socket, verified before they are seen, from every tier of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_kit import (
    DEADLINE_S,
    FINGERPRINT,
    LAYOUT,
    Client,
    ServerInside,
    content,
    disk,
    prefix,
    soon,
    wait_until,
)

from kvferry.connector import wire
from kvferry.connector.errors import BlockRefused
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.server import stream as stream_module

KEYS = prefix(8)


@pytest.fixture
def inside() -> Iterator[ServerInside]:
    with ServerInside() as inside:
        yield inside


def test_a_block_comes_back_bit_for_bit(inside: ServerInside) -> None:
    client = inside.client()
    assert client.load(KEYS) == [False] * 8
    assert client.store(KEYS) == ["ok"] * 8
    assert client.load(KEYS) == [True] * 8
    assert client.load([*KEYS[4:], *prefix(2, "other")]) == [True] * 4 + [False] * 2
    assert client.contains([KEYS[7], *prefix(1, "other"), KEYS[0]]) == [True, False, True]


def test_a_block_that_is_held_is_not_sent_again(inside: ServerInside) -> None:
    client = inside.client()
    client.store(KEYS[:4])
    wanted = client.ask(wire.Store(id=9, keys=wire.pack_keys(KEYS)))
    assert isinstance(wanted, wire.Wanted)
    assert wanted.indices == [4, 5, 6, 7]


def test_local_engines_and_streaming_clients_share_a_pool(inside: ServerInside) -> None:
    pool = inside.pool()
    engine, client = inside.engine(pool), inside.client(pool)
    engine.save(KEYS[:4])
    assert engine.lookup(KEYS).ready == 4
    assert client.load(KEYS) == [True] * 4 + [False] * 4
    client.store(KEYS[4:])
    assert engine.read(KEYS) == 8


def test_bytes_that_change_in_the_arena_after_they_were_sealed_are_refused(inside: ServerInside) -> None:
    pool = inside.pool()
    engine, client = inside.engine(pool), inside.client(pool)
    client.store(KEYS[:1])
    assert client.load(KEYS[:1]) == [True]
    (slot,) = engine.lease(KEYS[:1]).slots
    engine.arena.slot(slot)[0] ^= 1
    with pytest.raises(BlockRefused, match="checksum"):
        client.load(KEYS[:1])


def test_a_slot_that_holds_another_block_has_another_header(inside: ServerInside) -> None:
    client = inside.client()
    for start in range(0, 64, 8):
        keys = prefix(64)[start : start + 8]
        client.store(keys)
        assert client.load(keys) == [True] * 8


@pytest.mark.parametrize("fault", ["body", "header", "key", "fingerprint", "mac"])
def test_a_damaged_block_never_becomes_visible(inside: ServerInside, fault: str) -> None:
    client = inside.client()

    def spoilt(key: BlockKey) -> list[bytes]:
        if key != KEYS[2]:
            return client.frame(key)
        header = bytearray(HEADER_BYTES)
        payload = bytearray(content(key))
        fingerprint = b"x" * 32 if fault == "fingerprint" else FINGERPRINT
        seal = FrameSeal(fingerprint, LAYOUT.payload_bytes, "secret" if fault == "mac" else None)
        seal.seal(KEYS[3] if fault == "key" else key, memoryview(header), memoryview(payload))
        if fault == "body":
            payload[77] ^= 1
        if fault == "header":
            header[80] ^= 1
        return [bytes(header), bytes(payload)]

    outcomes = client.store(KEYS, spoilt)
    if fault == "mac":
        assert outcomes == ["ok"] * 8, "a server without a secret reads signed frames"
        return
    assert outcomes == ["ok", "ok", "failed", "ok", "ok", "ok", "ok", "ok"]
    assert client.load(KEYS) == [index != 2 for index in range(8)]


def test_what_finds_no_room_is_said_so(inside: ServerInside) -> None:
    pool = inside.pool()
    engine, client = inside.engine(pool), inside.client(pool)
    keys = prefix(16, "leased")
    engine.save(keys)
    engine.lease(keys)
    assert client.store(KEYS) == ["no_room"] * 8


def storing_one(client: Client) -> wire.Wanted:
    """Begin to store a block, so that its bytes are waited for."""
    wanted = client.ask(wire.Store(id=1, keys=wire.pack_keys(KEYS[:1])))
    assert isinstance(wanted, wire.Wanted)
    assert wanted.indices == [0]
    return wanted


def test_a_block_that_another_client_is_storing_is_waited_for(inside: ServerInside) -> None:
    first, second = inside.client(), inside.client()
    storing_one(first)
    wanted = second.ask(wire.Store(id=1, keys=wire.pack_keys(KEYS[:2])))
    assert isinstance(wanted, wire.Wanted)
    assert wanted.indices == [1]
    second.channel.send_bytes(second.frame(KEYS[1]), soon())
    reader = inside.client()
    wait_until("its own is there", lambda: reader.contains(KEYS[1:2]) == [True])
    first.channel.send_bytes(first.frame(KEYS[0]), soon())
    assert second.channel.receive_reply(soon()) == wire.Stored(id=1, outcomes=["ok", "ok"])
    assert second.load(KEYS[:2]) == [True, True]


def test_who_takes_long_to_store_a_block_does_not_make_others_take_long(
    inside: ServerInside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_OTHERS_S", 0.05)
    storing_one(inside.client())
    assert inside.client().store(KEYS) == ["ok"] * 8
    assert inside.client().contains(KEYS) == [False] + [True] * 7


def test_a_block_that_another_client_fails_to_store_is_not_said_to_be_held(inside: ServerInside) -> None:
    first, second = inside.client(), inside.client()
    storing_one(first)
    second.channel.send(wire.Store(id=1, keys=wire.pack_keys(KEYS[:1])), soon())
    assert second.channel.receive_reply(soon()) == wire.Wanted(id=1, indices=[])
    first.channel.close()
    assert second.channel.receive_reply(soon()) == wire.Stored(id=1, outcomes=["failed"])
    assert second.store(KEYS[:1]) == ["ok"]


def test_a_client_that_dies_while_it_stores_leaves_nothing(inside: ServerInside) -> None:
    pool = inside.pool()
    client = inside.client(pool)
    assert isinstance(client.ask(wire.Store(id=1, keys=wire.pack_keys(KEYS))), wire.Wanted)
    client.channel.send_bytes([client.frame(KEYS[0])[0], b"half"], soon())
    assert inside.used_slots(pool) == 8
    client.channel.close()
    wait_until("its slots are free", lambda: inside.used_slots(pool) == 0)
    assert inside.engine(pool).lookup(KEYS).ready == 0


def test_a_client_that_dies_while_it_loads_leaves_nothing(inside: ServerInside) -> None:
    pool = inside.pool()
    engine, client = inside.engine(pool), inside.client(pool)
    keys = prefix(16, "leased")
    engine.save(keys)
    client.channel.send(wire.Load(id=1, keys=wire.pack_keys(keys), wait_s=1.0), soon())
    client.channel.close()
    wait_until("it has gone", lambda: len(inside.ended) == 1)
    inside.index.call(lambda: None, soon())  # what it posted at its end is done before this
    assert len(engine.reserve(prefix(16, "others")).slots) == 16, "nothing is leased any more"


def test_blocks_come_from_the_servers_disk(tmp_path: Path) -> None:
    with ServerInside(tiers=[disk(tmp_path)]) as inside:
        client = inside.client()
        client.store(KEYS)
    with ServerInside(tiers=[disk(tmp_path)]) as inside:
        client = inside.client()
        assert client.contains(KEYS) == [True] * 8
        assert client.load(KEYS) == [True] * 8


def test_blocks_of_the_servers_shared_tier_are_asked_for(tmp_path: Path) -> None:
    common = [{"type": "common", "place": str(tmp_path), "admission": "always"}]
    with ServerInside(tiers=common) as inside:
        inside.client().store(KEYS)
    with ServerInside(tiers=common) as inside:
        client = inside.client()
        assert client.contains([*KEYS, *prefix(1, "other")]) == [True] * 8 + [False]
    with ServerInside(tiers=common) as inside:
        assert inside.client().load([*KEYS, *prefix(1, "other")]) == [True] * 8 + [False]


def test_more_blocks_than_slots_come_as_far_as_there_is_room(tmp_path: Path) -> None:
    with ServerInside(slots=4, tiers=[disk(tmp_path)]) as inside:
        client = inside.client()
        for key in KEYS:
            assert client.store([key]) == ["ok"]
            wait_until("it is on disk", lambda: _is_idle(inside))
        found = client.load(KEYS)
        assert found.count(True) >= 4
        assert client.load(KEYS[:4]) == [True] * 4


def _is_idle(inside: ServerInside) -> bool:
    (pool,) = inside.index.pools
    return not inside.index.call(pool.service.has_pending, soon())


def test_deleted_blocks_are_not_offered(inside: ServerInside) -> None:
    client = inside.client()
    client.store(KEYS)
    assert isinstance(client.ask(wire.Delete(id=4, keys=wire.pack_keys(KEYS[:2]))), wire.Done)
    assert client.load(KEYS) == [False, False] + [True] * 6
    assert client.store(KEYS) == ["ok"] * 8
    assert client.load(KEYS) == [True] * 8


def test_how_full_it_is(inside: ServerInside) -> None:
    client = inside.client()
    client.store(KEYS)
    size = client.ask(wire.Stats(id=5))
    assert isinstance(size, wire.Size)
    assert (size.blocks, size.used_bytes) == (8, 8 * inside.pool().service.arena.total_bytes // 16)


@pytest.mark.parametrize(
    "message",
    [wire.Lookup(id=1, keys=b""), wire.Reserve(id=1, owner="", keys=b""), wire.Clear()],
    ids=lambda message: type(message).__name__,
)
def test_messages_of_the_map_mode_are_refused(inside: ServerInside, message: wire.Request) -> None:
    client = inside.client()
    refused = client.ask(message)
    assert isinstance(refused, wire.Refused)
    client.thread.join(DEADLINE_S)
    assert not client.thread.is_alive()


def test_consecutive_blocks_come_from_a_tier_in_batches(tmp_path: Path) -> None:
    with ServerInside(tiers=[disk(tmp_path)]) as inside:
        inside.client().store(KEYS)
    with ServerInside(tiers=[disk(tmp_path)]) as inside:
        client = inside.client()
        assert client.load(KEYS) == [True] * 8
        (pool,) = inside.index.pools
        tier = inside.index.call(lambda: pool.service.counters().tiers["disk"], soon())
        assert (tier.loaded_blocks, tier.load_batches) == (8, 1)


def test_long_requests_are_served_in_portions(inside: ServerInside) -> None:
    client = inside.client()
    client.store(KEYS)
    many = [*prefix(300, "others"), *KEYS]
    assert client.load(many) == [False] * 300 + [True] * 8
    assert client.contains(many) == [False] * 300 + [True] * 8
