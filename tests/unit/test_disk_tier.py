"""The disk tier as the tier protocol describes it: what goes in comes out, once, and stays over restarts."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import threading
from pathlib import Path

import msgspec
import pytest
from disk_kit import (
    LAYOUT,
    bytes_on_disk,
    capacity_for,
    empty_frame,
    key_of,
    load_verified,
    make_context,
    open_tier,
    sealed_frame,
    store,
)

from kvferry.connector.errors import ClosedError, LayoutError, TierTimeout
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Frame, Outcome, Tier
from kvferry.plugins.disk import kvferry_tier_types, tier
from kvferry.plugins.disk.slabs import Slabs

KEYS = [key_of(number) for number in range(8)]
CAPACITY = capacity_for(20)


def test_the_plugin_offers_the_tier_type_disk(tmp_path: Path) -> None:
    (disk,) = kvferry_tier_types()
    options = msgspec.convert({"path": str(tmp_path / "cache"), "capacity": CAPACITY}, disk.options)
    opened = disk.create(options, make_context())
    assert isinstance(opened, Tier)
    assert opened.capabilities.is_persistent
    assert opened.capabilities.is_bounded
    assert not opened.capabilities.is_shared
    opened.close()
    with pytest.raises(msgspec.ValidationError, match="capacitty"):
        msgspec.convert({"path": "x", "capacity": 1, "capacitty": 2}, disk.options)


@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_blocks_come_back_bit_for_bit(tmp_path: Path, direct_io: str) -> None:
    opened = open_tier(tmp_path, CAPACITY, direct_io=direct_io)
    assert store(opened, KEYS) == [Outcome.OK] * 8
    assert load_verified(opened, KEYS) == [Outcome.OK] * 8
    opened.close()


def test_a_block_that_was_never_stored_is_missing_and_its_buffers_stay_untouched(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    store(opened, KEYS[:1])
    frames = [empty_frame(KEYS[1]), empty_frame(KEYS[0])]
    assert opened.load(frames) == [Outcome.MISSING, Outcome.OK]
    assert bytes(frames[0].payload) == b"\xee" * LAYOUT.slot_bytes
    assert opened.contains([KEYS[1], KEYS[0]]) == [False, True]
    opened.close()


def test_blocks_survive_a_restart_in_the_order_they_were_stored(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    for key in reversed(KEYS):
        store(opened, [key])
    opened.delete(KEYS[3:4])
    opened.close()
    opened = open_tier(tmp_path, CAPACITY)
    expected = [key for key in reversed(KEYS) if key != KEYS[3]]
    assert list(opened.scan()) == expected
    assert load_verified(opened, expected) == [Outcome.OK] * 7
    opened.close()


def test_a_deleted_block_is_gone_and_its_record_is_free(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    store(opened, KEYS)
    free = opened.census().free
    opened.delete([*KEYS[:3], key_of(99), KEYS[0]])
    assert load_verified(opened, KEYS) == [Outcome.MISSING] * 3 + [Outcome.OK] * 5
    assert opened.census().free == free + 3
    opened.close()


def test_a_key_that_is_held_is_not_written_again(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    store(opened, KEYS[:1])
    other = empty_frame(KEYS[0])
    assert opened.store([other]) == [Outcome.OK]
    assert load_verified(opened, KEYS[:1]) == [Outcome.OK]
    opened.close()


def test_a_key_twice_in_a_batch_takes_one_record(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    assert store(opened, [KEYS[0], KEYS[1], KEYS[0]]) == [Outcome.OK] * 3
    assert opened.stats().blocks == opened.census().held == 2
    opened.close()


def test_a_batch_of_any_length_is_stored(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, capacity_for(300))
    keys = [key_of(number) for number in range(200)]
    assert store(opened, keys) == [Outcome.OK] * 200
    assert load_verified(opened, keys) == [Outcome.OK] * 200
    opened.delete(keys)
    assert opened.stats().blocks == 0
    opened.close()


def test_a_block_is_not_visible_before_its_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    seen: list[tuple[list[bool], list[Outcome]]] = []
    write = Slabs.write

    def observe(slabs: Slabs, record: int, header: memoryview, payload: memoryview) -> None:
        write(slabs, record, header, payload)
        seen.append((opened.contains(KEYS[:1]), load_verified(opened, KEYS[:1])))

    monkeypatch.setattr(Slabs, "write", observe)
    assert store(opened, KEYS[:1]) == [Outcome.OK]
    assert seen == [([False], [Outcome.MISSING])]
    opened.close()


def test_stats_follow_the_blocks(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    store(opened, KEYS)
    stats = opened.stats()
    assert (stats.blocks, stats.evictions, stats.capacity_bytes) == (8, 0, CAPACITY)
    assert 8 * LAYOUT.payload_bytes < stats.used_bytes < CAPACITY
    opened.close()


def test_buffers_of_the_wrong_length_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    good, frame = sealed_frame(KEYS[0]), sealed_frame(KEYS[1])
    for bad in (
        Frame(KEYS[1], frame.header[:100], frame.payload, frame.length),
        Frame(KEYS[1], frame.header, frame.payload[:4096], frame.length),
    ):
        with pytest.raises(LayoutError, match=KEYS[1][:4].hex()):
            opened.store([good, bad])
        with pytest.raises(LayoutError):
            opened.load([bad])
    assert opened.stats().blocks == 0
    opened.close()


def test_after_close_every_call_says_so(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    opened.close()
    opened.close()
    for call in (
        opened.stats,
        opened.scan,
        lambda: opened.contains(KEYS),
        lambda: opened.load([]),
        lambda: opened.store([]),
        lambda: opened.delete(KEYS),
    ):
        with pytest.raises(ClosedError, match="'disk' is closed"):
            call()


def test_close_waits_for_calls_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    writing, go_on = threading.Event(), threading.Event()
    write = Slabs.write

    def slow(slabs: Slabs, record: int, header: memoryview, payload: memoryview) -> None:
        writing.set()
        assert go_on.wait(20)
        write(slabs, record, header, payload)

    monkeypatch.setattr(Slabs, "write", slow)
    outcomes: list[Outcome] = []
    writer = threading.Thread(target=lambda: outcomes.extend(store(opened, KEYS[:1])), name="writer")
    writer.start()
    assert writing.wait(20)
    monkeypatch.setattr(tier, "_CLOSE_S", 0.01)
    with pytest.raises(TierTimeout, match="still under way"):
        opened.close()
    monkeypatch.setattr(tier, "_CLOSE_S", 20.0)
    closer = threading.Thread(target=opened.close, name="closer")
    closer.start()
    go_on.set()
    writer.join(20)
    closer.join(20)
    assert outcomes == [Outcome.OK]
    opened = open_tier(tmp_path, CAPACITY)
    assert load_verified(opened, KEYS[:1]) == [Outcome.OK]
    opened.close()


def test_nobody_else_can_read_the_files(tmp_path: Path) -> None:
    opened = open_tier(tmp_path / "cache", CAPACITY)
    store(opened, KEYS)
    opened.close()
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    files = list((tmp_path / "cache").iterdir())
    assert len(files) > 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_engines_of_one_deployment_use_a_directory_each(tmp_path: Path) -> None:
    first = open_tier(tmp_path, CAPACITY, make_context(instance="dp0"))
    second = open_tier(tmp_path, CAPACITY, make_context(instance="dp1"))
    store(first, KEYS)
    assert second.contains(KEYS) == [False] * 8
    first.close()
    second.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dp0", "dp1"]


def test_sync_flushes_the_records_before_the_transaction_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_tier(tmp_path, CAPACITY, sync=True)
    flushed: list[int] = []
    visible: list[list[bool]] = []
    fdatasync = os.fdatasync

    def observe(descriptor: int) -> None:
        flushed.append(descriptor)
        visible.append(opened.contains(KEYS[:1]))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", observe)
    store(opened, KEYS[:1])
    assert len(flushed) == 1
    assert visible == [[False]]
    monkeypatch.undo()
    opened.close()


def test_without_direct_io_the_tier_says_so_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def without_direct_io(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument", str(path))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", without_direct_io)
    with caplog.at_level(logging.WARNING):
        opened = open_tier(tmp_path, CAPACITY)
    assert [message for message in caplog.messages if "no direct I/O" in message] == [
        f"tier 'disk': {tmp_path} has no direct I/O; going through the page cache"
    ]
    assert store(opened, KEYS) == [Outcome.OK] * 8
    assert load_verified(opened, KEYS) == [Outcome.OK] * 8
    opened.close()


def test_a_real_filesystem_without_direct_io_or_preallocation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mounted = subprocess.run(["mount", "-t", "ramfs", "kvferry", tmp_path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting needs privileges that this machine does not give")
    try:
        opened = open_tier(tmp_path, CAPACITY)
        assert "has no direct I/O" in caplog.text
        for first in range(0, 60, 6):
            keys = [key_of(number) for number in range(first, first + 6)]
            assert store(opened, keys) == [Outcome.OK] * 6
            assert load_verified(opened, keys) == [Outcome.OK] * 6
        assert bytes_on_disk(tmp_path) <= CAPACITY
        opened.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_short_reads_and_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_tier(tmp_path, CAPACITY, direct_io="off")
    pwritev, preadv = os.pwritev, os.preadv

    def some(buffers: list[memoryview]) -> list[memoryview]:
        first = buffers[0]
        return [first[: max(1, len(first) // 2)]]

    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, some(buffers), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, some(buffers), offset))
    assert store(opened, KEYS) == [Outcome.OK] * 8
    assert load_verified(opened, KEYS) == [Outcome.OK] * 8
    opened.close()


def test_concurrent_stores_of_one_key_write_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    written: list[int] = []
    barrier = threading.Barrier(4)
    write = Slabs.write

    def count(slabs: Slabs, record: int, header: memoryview, payload: memoryview) -> None:
        written.append(record)
        write(slabs, record, header, payload)

    monkeypatch.setattr(Slabs, "write", count)
    outcomes: list[Outcome] = []

    def storing(keys: list[BlockKey]) -> None:
        barrier.wait(20)
        outcomes.extend(store(opened, keys))

    orders = [KEYS, KEYS[::-1], KEYS, KEYS[::-1]]
    threads = [
        threading.Thread(target=storing, args=(order,), name=f"store-{n}") for n, order in enumerate(orders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outcomes == [Outcome.OK] * 32
    assert len(written) == len(set(written)) == 8
    assert load_verified(opened, KEYS) == [Outcome.OK] * 8
    opened.close()


def test_a_store_that_waited_for_one_that_failed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_tier(tmp_path, CAPACITY)
    writing, go_on = threading.Event(), threading.Event()

    def fail(slabs: Slabs, record: int, header: memoryview, payload: memoryview) -> None:
        writing.set()
        assert go_on.wait(20)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(Slabs, "write", fail)
    outcomes: dict[str, list[Outcome]] = {}
    first = threading.Thread(target=lambda: outcomes.update(first=store(opened, KEYS[:1])), name="first")
    first.start()
    assert writing.wait(20)
    second = threading.Thread(target=lambda: outcomes.update(second=store(opened, KEYS[:1])), name="second")
    second.start()
    go_on.set()
    first.join(20)
    second.join(20)
    assert outcomes == {"first": [Outcome.FAILED], "second": [Outcome.FAILED]}
    monkeypatch.undo()
    assert store(opened, KEYS[:1]) == [Outcome.OK]
    opened.close()
