"""The S3 tier on a real server: blocks come back bit for bit, and nothing but whole blocks does."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Sequence

import pytest
from s3_server import BUCKET, FINGERPRINT, LAYOUT, OpenS3, Weed, client, make_context, names_below, prefix_of

from kvferry.connector.errors import BlockRefused, ClosedError
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.tier import Frame, Outcome
from kvferry.plugins.s3.tier import S3Tier

SEAL = FrameSeal(FINGERPRINT, LAYOUT.payload_bytes)


def key_of(number: int) -> BlockKey:
    return BlockKey(hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest())


def empty_frame(key: BlockKey, layout: BlockLayout = LAYOUT) -> Frame:
    """Return a frame with buffers as the arena would give them: aligned, full of something else."""
    slot = memoryview(mmap.mmap(-1, layout.slot_bytes))
    slot[:] = b"\xee" * layout.slot_bytes
    return Frame(key, memoryview(bytearray(HEADER_BYTES)), slot, layout.payload_bytes)


def payload_of(key: BlockKey, layout: BlockLayout = LAYOUT) -> bytes:
    return (key * (layout.payload_bytes // len(key) + 1))[: layout.payload_bytes]


def sealed_frame(key: BlockKey, layout: BlockLayout = LAYOUT) -> Frame:
    frame = empty_frame(key, layout)
    frame.payload[: layout.payload_bytes] = payload_of(key, layout)
    FrameSeal(FINGERPRINT, layout.payload_bytes).seal(key, frame.header, frame.payload)
    return Frame(key, frame.header.toreadonly(), frame.payload.toreadonly(), frame.length)


def load_verified(tier: S3Tier, keys: Sequence[BlockKey], layout: BlockLayout = LAYOUT) -> list[Outcome]:
    frames = [empty_frame(key, layout) for key in keys]
    outcomes = tier.load(frames)
    seal = FrameSeal(FINGERPRINT, layout.payload_bytes)
    for frame, outcome in zip(frames, outcomes, strict=True):
        if outcome is Outcome.OK:
            seal.verify(frame.key, frame.header, frame.payload)
            assert bytes(frame.body) == payload_of(frame.key, layout)
            assert set(frame.payload[frame.length :]) <= {0xEE}, "bytes beyond the block were written"
    return outcomes


def object_of(tier: S3Tier, key: BlockKey) -> str:
    return tier._name(key)


def test_what_was_stored_is_loaded_bit_for_bit(s3_tier: S3Tier) -> None:
    keys = [key_of(number) for number in range(100)]
    assert s3_tier.store([sealed_frame(key) for key in keys]) == [Outcome.OK] * 100
    assert load_verified(s3_tier, keys) == [Outcome.OK] * 100


@pytest.mark.parametrize("mebibytes", [1, 4, 16])
def test_blocks_of_real_sizes(mebibytes: int, weed: Weed, open_s3: OpenS3) -> None:
    layout = BlockLayout(
        num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=mebibytes * 4096 - 3, itemsize=2
    )
    tier = open_s3(weed, make_context(layout=layout))
    keys = [key_of(number) for number in range(4)]
    assert tier.store([sealed_frame(key, layout) for key in keys]) == [Outcome.OK] * 4
    assert load_verified(tier, keys, layout) == [Outcome.OK] * 4


def test_a_shorter_block_fills_as_much_as_was_stored(s3_tier: S3Tier) -> None:
    key = key_of(1)
    whole = sealed_frame(key)
    short = Frame(key, whole.header, whole.payload, 1000)
    assert s3_tier.store([short]) == [Outcome.OK]
    target = empty_frame(key)
    assert s3_tier.load([target]) == [Outcome.OK]
    assert bytes(target.header) == bytes(short.header)
    assert bytes(target.payload[:1000]) == bytes(short.body)
    assert set(target.payload[1000:]) == {0xEE}


def test_blocks_that_are_not_there_are_missing_and_the_rest_is_loaded(s3_tier: S3Tier) -> None:
    held, absent = [key_of(1), key_of(2)], [key_of(3), key_of(4)]
    s3_tier.store([sealed_frame(key) for key in held])
    assert load_verified(s3_tier, [absent[0], held[0], absent[1], held[1]]) == [
        Outcome.MISSING,
        Outcome.OK,
        Outcome.MISSING,
        Outcome.OK,
    ]


def test_contains_tells_for_each_key(s3_tier: S3Tier) -> None:
    s3_tier.store([sealed_frame(key_of(1)), sealed_frame(key_of(3))])
    assert s3_tier.contains([key_of(number) for number in range(5)]) == [False, True, False, True, False]
    assert s3_tier.contains([]) == []


def test_deleted_blocks_are_missing_and_unknown_ones_are_ignored(s3_tier: S3Tier) -> None:
    s3_tier.store([sealed_frame(key_of(1)), sealed_frame(key_of(2))])
    s3_tier.delete([key_of(1), key_of(7)])
    assert load_verified(s3_tier, [key_of(1), key_of(2)]) == [Outcome.MISSING, Outcome.OK]


def test_storing_again_replaces_the_object(s3_tier: S3Tier, weed: Weed) -> None:
    key = key_of(1)
    s3_tier.store([sealed_frame(key)])
    client(weed.endpoint).put_object(Bucket=BUCKET, Key=object_of(s3_tier, key), Body=b"something else")
    assert s3_tier.store([sealed_frame(key)]) == [Outcome.OK]
    assert load_verified(s3_tier, [key]) == [Outcome.OK]


def test_a_batch_larger_than_the_bound_of_requests(weed: Weed, open_s3: OpenS3) -> None:
    tier = open_s3(weed, max_in_flight=1)
    keys = [key_of(number) for number in range(20)]
    assert tier.store([sealed_frame(key) for key in keys]) == [Outcome.OK] * 20
    assert load_verified(tier, keys) == [Outcome.OK] * 20


def test_a_key_twice_in_a_batch(s3_tier: S3Tier) -> None:
    assert s3_tier.store([sealed_frame(key_of(1))] * 2) == [Outcome.OK] * 2
    assert load_verified(s3_tier, [key_of(1)] * 2) == [Outcome.OK] * 2


def test_hostile_keys_are_bytes_like_any_other(s3_tier: S3Tier) -> None:
    keys = [BlockKey(part * (32 // len(part))) for part in (b"\0", b"/", b"..", b"\xff", b"%2F.", b"a\nb/")]
    keys = [BlockKey(key.ljust(32, b"/")) for key in keys]
    assert s3_tier.store([sealed_frame(key) for key in keys]) == [Outcome.OK] * len(keys)
    assert load_verified(s3_tier, keys) == [Outcome.OK] * len(keys)


def test_another_process_finds_what_this_one_stored(weed: Weed, open_s3: OpenS3) -> None:
    first, second = open_s3(weed), open_s3(weed)
    first.store([sealed_frame(key_of(1))])
    assert second.contains([key_of(1)]) == [True]
    assert load_verified(second, [key_of(1)]) == [Outcome.OK]


def test_models_do_not_meet(weed: Weed, open_s3: OpenS3) -> None:
    open_s3(weed).store([sealed_frame(key_of(1))])
    other = open_s3(weed, make_context(fingerprint=b"\x07" * 32))
    assert other.contains([key_of(1)]) == [False]


def test_the_prefix_is_the_tiers_own(weed: Weed, open_s3: OpenS3, request: pytest.FixtureRequest) -> None:
    prefix = prefix_of(request)
    by_url = open_s3(weed, bucket="", url=f"s3://{BUCKET}/{prefix}/below/")
    by_url.store([sealed_frame(key_of(1))])
    key = key_of(1).hex()
    assert names_below(weed.endpoint, prefix) == [f"{prefix}/below/{FINGERPRINT[:4].hex()}/{key[:2]}/{key}"]
    assert open_s3(weed, prefix=f"{prefix}/below").contains([key_of(1)]) == [True]


# ---- objects that are not what was stored


def tamper(weed: Weed, tier: S3Tier, key: BlockKey, body: bytes) -> None:
    client(weed.endpoint).put_object(Bucket=BUCKET, Key=object_of(tier, key), Body=body)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
def test_an_object_shorter_than_a_header_fails(length: int, s3_tier: S3Tier, weed: Weed) -> None:
    tamper(weed, s3_tier, key_of(1), bytes(length))
    s3_tier.store([sealed_frame(key_of(2))])
    assert load_verified(s3_tier, [key_of(1), key_of(2)]) == [Outcome.FAILED, Outcome.OK]


@pytest.mark.parametrize("excess", [1, 30 << 20])
def test_an_object_longer_than_a_block_fails_and_is_not_read(
    excess: int, s3_tier: S3Tier, weed: Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    monkeypatch.setattr("kvferry.plugins.s3.tier._fill", lambda *arguments: filled.append(1))
    frame = sealed_frame(key_of(1))
    tamper(weed, s3_tier, key_of(1), bytes(frame.header) + bytes(frame.body) + bytes(excess))
    target = empty_frame(key_of(1))
    assert s3_tier.load([target]) == [Outcome.FAILED]
    assert filled == []
    assert set(target.payload) == {0xEE}


def test_a_truncated_object_is_refused(s3_tier: S3Tier, weed: Weed) -> None:
    frame = sealed_frame(key_of(1))
    tamper(weed, s3_tier, key_of(1), bytes(frame.header) + bytes(frame.body)[:-1])
    with pytest.raises(BlockRefused):
        load_verified(s3_tier, [key_of(1)])


def test_a_changed_byte_is_refused(s3_tier: S3Tier, weed: Weed) -> None:
    frame = sealed_frame(key_of(1))
    body = bytearray(frame.body)
    body[100] ^= 1
    tamper(weed, s3_tier, key_of(1), bytes(frame.header) + bytes(body))
    with pytest.raises(BlockRefused, match="checksum"):
        load_verified(s3_tier, [key_of(1)])


def test_another_blocks_object_is_refused(s3_tier: S3Tier, weed: Weed) -> None:
    frame = sealed_frame(key_of(2))
    tamper(weed, s3_tier, key_of(1), bytes(frame.header) + bytes(frame.body))
    with pytest.raises(BlockRefused, match="another block"):
        load_verified(s3_tier, [key_of(1)])


# ---- life


def test_it_promises_what_it_keeps(s3_tier: S3Tier) -> None:
    promised = s3_tier.capabilities
    assert promised.is_persistent
    assert promised.is_shared
    assert not promised.is_bounded
    assert list(s3_tier.scan()) == []


def test_the_size_it_tells_is_what_this_process_stored(s3_tier: S3Tier) -> None:
    s3_tier.store([sealed_frame(key_of(number)) for number in range(3)])
    stats = s3_tier.stats()
    assert (stats.blocks, stats.used_bytes) == (3, 3 * (HEADER_BYTES + LAYOUT.payload_bytes))
    assert stats.capacity_bytes is None


def test_a_closed_tier_says_so_and_leaves_no_thread(weed: Weed, open_s3: OpenS3) -> None:
    tier = open_s3(weed)
    tier.store([sealed_frame(key_of(1))])
    tier.close()
    tier.close()
    for call in (
        lambda: tier.contains([key_of(1)]),
        lambda: tier.load([empty_frame(key_of(1))]),
        lambda: tier.store([sealed_frame(key_of(1))]),
        lambda: tier.delete([key_of(1)]),
        tier.scan,
        tier.stats,
    ):
        with pytest.raises(ClosedError):
            call()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvferry-s3-io"]


def test_many_threads_at_once(s3_tier: S3Tier) -> None:
    failures: list[object] = []

    def work(first: int) -> None:
        keys = [key_of(number) for number in range(first, first + 10)]
        outcomes = s3_tier.store([sealed_frame(key) for key in keys]) + load_verified(s3_tier, keys)
        if outcomes != [Outcome.OK] * 20:
            failures.append(outcomes)

    threads = [threading.Thread(target=work, args=(number * 5,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []


def test_no_memory_of_the_caller_is_held_after_a_store(s3_tier: S3Tier) -> None:
    slot = mmap.mmap(-1, LAYOUT.slot_bytes)
    slot[: LAYOUT.payload_bytes] = os.urandom(LAYOUT.payload_bytes)
    view = memoryview(slot)
    frame = Frame(key_of(1), memoryview(bytearray(HEADER_BYTES)), view, LAYOUT.payload_bytes)
    assert s3_tier.store([frame]) == [Outcome.OK]
    del frame
    view.release()
    slot.close()  # raises BufferError if anybody still uses it
