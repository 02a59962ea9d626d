"""Files that somebody else changed: a refusal or a miss, never a wrong byte and never a crash."""

from __future__ import annotations

import os
import random
from pathlib import Path

import lmdb
import pytest
from disk_kit import (
    LAYOUT,
    SEAL,
    capacity_for,
    empty_frame,
    key_of,
    load_verified,
    make_context,
    open_tier,
    store,
)

from kvferry.connector.errors import BlockRefused, TierUnavailable
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Outcome
from kvferry.plugins.disk.index import Index, IndexFull
from kvferry.plugins.disk.options import INDEX_BATCH, SECTOR_BYTES, index_budget_bytes

KEYS = [key_of(number) for number in range(12)]
CAPACITY = capacity_for(20)
RECORD_BYTES = SECTOR_BYTES + LAYOUT.slot_bytes


@pytest.fixture
def used(tmp_path: Path) -> Path:
    opened = open_tier(tmp_path / "cache", CAPACITY)
    store(opened, KEYS)
    opened.close()
    return tmp_path / "cache"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    descriptor = os.open(path, os.O_RDWR)
    (byte,) = os.pread(descriptor, 1, offset)
    os.pwrite(descriptor, bytes([byte ^ 1 << bit]), offset)
    os.close(descriptor)


def slabs_of(path: Path) -> list[Path]:
    return sorted(path.glob("slab-*"))


def test_a_slab_truncated_while_in_use_costs_the_blocks_beyond(used: Path) -> None:
    removed: list[BlockKey] = []
    opened = open_tier(used, CAPACITY, make_context(on_removed=removed.extend))
    os.truncate(slabs_of(used)[0], RECORD_BYTES + 5000)
    outcomes = load_verified(opened, KEYS)
    lost = [key for key, outcome in zip(KEYS, outcomes, strict=True) if outcome is Outcome.MISSING]
    assert lost == removed == KEYS[1:2]
    assert opened.contains(lost) == [False]
    assert store(opened, lost) == [Outcome.OK]
    assert load_verified(opened, KEYS) == [Outcome.OK] * 12
    opened.close()


def test_a_slab_truncated_or_missing_at_start_costs_the_blocks_beyond(
    used: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, *_ = slabs_of(used)
    os.truncate(first, RECORD_BYTES + 5000)
    second.unlink()
    opened = open_tier(used, CAPACITY)
    outcomes = load_verified(opened, KEYS)
    assert outcomes == [Outcome.OK] + [Outcome.MISSING] * 3 + [Outcome.OK] * 8
    assert "3 blocks are gone: 0 damaged index entries, 3 outside the slabs" in caplog.text
    assert first.stat().st_size == RECORD_BYTES
    more = [key_of(number) for number in range(100, 120)]
    assert store(opened, more) == [Outcome.OK] * 20
    assert load_verified(opened, more) == [Outcome.OK] * 20
    opened.close()


def test_a_flipped_bit_in_a_record_is_refused_and_the_block_can_be_dropped(used: Path) -> None:
    rng = random.Random(3)
    for _ in range(60):
        offset = rng.choice([rng.randrange(256), SECTOR_BYTES + rng.randrange(LAYOUT.payload_bytes)])
        flip(slabs_of(used)[0], offset, rng.randrange(8))
        opened = open_tier(used, CAPACITY)
        frame = empty_frame(KEYS[0])
        outcome = opened.load([frame])
        if offset >= 144 and offset < 256:
            SEAL.verify(KEYS[0], frame.header, frame.payload)
        else:
            assert outcome == [Outcome.OK]
            with pytest.raises(BlockRefused):
                SEAL.verify(KEYS[0], frame.header, frame.payload)
        opened.delete(KEYS[:1])
        assert opened.contains(KEYS[:1]) == [False]
        assert store(opened, KEYS[:1]) == [Outcome.OK]
        assert load_verified(opened, KEYS) == [Outcome.OK] * 12
        opened.close()


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 8191, 8192])
def test_a_truncated_index_is_refused_and_kept(used: Path, length: int) -> None:
    os.truncate(used / "index.mdb", length)
    with pytest.raises(TierUnavailable, match=r"index .*index\.mdb is damaged.*delete this one file"):
        open_tier(used, CAPACITY)
    assert (used / "index.mdb").stat().st_size == length
    (used / "index.mdb").unlink()
    opened = open_tier(used, CAPACITY)
    assert opened.stats().blocks == 0
    assert store(opened, KEYS) == [Outcome.OK] * 12
    opened.close()


@pytest.mark.parametrize("content", [b"", b"\x00" * 20000, b"not an index " * 2000, os.urandom(20000)])
def test_an_index_that_is_none_is_refused(used: Path, content: bytes) -> None:
    (used / "index.mdb").write_bytes(content)
    with pytest.raises(TierUnavailable, match="is damaged"):
        open_tier(used, CAPACITY)


def test_a_flipped_bit_anywhere_in_the_index_is_refused_or_costs_that_block(used: Path) -> None:
    index = used / "index.mdb"
    intact = index.read_bytes()
    used_pages = [page for page in range(0, len(intact), 4096) if any(intact[page : page + 4096])]
    rng = random.Random(11)
    refused = lost = 0
    for _ in range(250):
        page = rng.choice(used_pages)
        places = [place for place in range(page, page + 4096) if intact[place]]
        index.write_bytes(intact)
        flip(index, rng.choice(places), rng.randrange(8))
        try:
            opened = open_tier(used, CAPACITY)
        except TierUnavailable as error:
            assert "index.mdb" in str(error)  # noqa: PT017 - which of the two happens is up to the bit
            refused += 1
            continue
        outcomes = load_verified(opened, KEYS)
        assert set(outcomes) <= {Outcome.OK, Outcome.MISSING}
        assert outcomes.count(Outcome.MISSING) == 12 - opened.stats().blocks
        lost += Outcome.MISSING in outcomes
        opened.close()
    assert refused > 20
    assert lost > 20


def test_two_entries_for_one_record_leave_only_the_later(used: Path) -> None:
    index = Index("disk", used / "index.mdb", 1 << 20, is_durable=False)
    entries, _ = index.entries()
    index.update([(key_of(99), entries[-1].record)])
    index.close()
    opened = open_tier(used, CAPACITY)
    assert opened.contains([KEYS[0], key_of(99)]) == [False, True]
    assert opened.census().held == 12
    frame = empty_frame(key_of(99))
    assert opened.load([frame]) == [Outcome.OK]
    with pytest.raises(BlockRefused, match="key"):
        SEAL.verify(key_of(99), frame.header, frame.payload)
    opened.close()


def test_when_the_index_fails_a_store_changes_nothing(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_tier(used, CAPACITY)
    store(opened, [key_of(50)])
    opened.delete([key_of(50)])
    before = opened.census()
    assert before.free > 0

    def fail(*args: object, **kwargs: object) -> None:
        raise TierUnavailable("disk", "the index cannot be written")

    with monkeypatch.context() as fault:
        fault.setattr(Index, "update", fail)
        with pytest.raises(TierUnavailable):
            store(opened, [key_of(50)])
        with pytest.raises(TierUnavailable):
            opened.delete(KEYS[:2])
        assert opened.census() == before
        assert load_verified(opened, KEYS) == [Outcome.OK] * 12

        fault.setattr(Index, "update", lambda *args: (_ for _ in ()).throw(IndexFull("full")))
        assert store(opened, [key_of(50)]) == [Outcome.NO_ROOM]
    assert opened.census() == before
    assert store(opened, [key_of(50)]) == [Outcome.OK]
    opened.close()


def test_an_index_as_full_as_it_can_be_stays_within_its_budget(tmp_path: Path) -> None:
    """Stores and removals in random order, then the worst for the tree: one key left per leaf page."""
    count = 3000
    index = Index("disk", tmp_path / "index.mdb", index_budget_bytes(count), is_durable=False)
    rng = random.Random(5)
    held: dict[BlockKey, int] = {}
    for step in range(400):
        added = [(key_of(step * INDEX_BATCH + one), step * INDEX_BATCH + one) for one in range(INDEX_BATCH)]
        if len(held) + INDEX_BATCH > count:
            gone = rng.sample(sorted(held.items()), len(held) + INDEX_BATCH - count)
            index.update((), gone)
            for key, _ in gone:
                del held[key]
        index.update(added)
        held |= dict(added)
    ordered = sorted(held.items())
    for start in range(0, len(ordered), INDEX_BATCH):
        index.update((), [item for item in ordered[start : start + INDEX_BATCH] if ordered.index(item) % 16])
    entries, damaged = index.entries()
    assert {entry.key: entry.record for entry in entries} == dict(ordered[::16])
    assert damaged == 0
    index.close()
    assert (tmp_path / "index.mdb").stat().st_size == index_budget_bytes(count)


def test_an_index_without_room_changes_nothing(tmp_path: Path) -> None:
    index = Index("disk", tmp_path / "index.mdb", 16 * 4096, is_durable=False)
    stored: list[BlockKey] = []
    with pytest.raises(IndexFull):  # noqa: PT012 - which transaction is the last is LMDB's business
        for start in range(0, 100_000, INDEX_BATCH):
            keys = [key_of(start + one) for one in range(INDEX_BATCH)]
            index.update([(key, 1) for key in keys])
            stored += keys
    assert {entry.key for entry in index.entries()[0]} == set(stored)
    index.close()


def test_entries_that_are_not_ours_are_removed(tmp_path: Path) -> None:
    index = Index("disk", tmp_path / "index.mdb", 1 << 20, is_durable=False)
    index.update([(key_of(1), 7)])
    index.close()
    with lmdb.open(str(tmp_path / "index.mdb"), subdir=False, lock=False, map_size=1 << 20) as environment:
        with environment.begin(write=True) as transaction:
            transaction.put(b"short", b"x" * 24)
            transaction.put(key_of(2), b"x" * 23)
            transaction.put(key_of(3), b"x" * 24)
    index = Index("disk", tmp_path / "index.mdb", 1 << 20, is_durable=False)
    entries, damaged = index.entries()
    assert [(entry.key, entry.record) for entry in entries] == [(key_of(1), 7)]
    assert damaged == 3
    assert index.entries()[1] == 0
    index.close()
