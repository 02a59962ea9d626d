"""The disk tier never takes more than its capacity, whatever happens, and makes room by evicting."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from disk_kit import (
    LAYOUT,
    Fifo,
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

from kvferry.connector.errors import ConfigError, TierUnavailable
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.tier import Outcome
from kvferry.plugins.disk.options import DiskOptions, plan_geometry
from kvferry.plugins.disk.slabs import Slabs


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A real filesystem of 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "kvferry", path], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting needs privileges that this machine does not give")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("capacity", [1 << 20, 10 << 20, 300 << 20, 10 << 30, 4 << 40, 100 << 40])
@pytest.mark.parametrize("slot_pages", [1, 5, 256, 1000])
def test_the_sizes_add_up_to_no_more_than_the_capacity(capacity: int, slot_pages: int) -> None:
    layout = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=16 * slot_pages, itemsize=2)
    assert layout.slot_bytes == slot_pages * 4096
    try:
        geometry = plan_geometry("disk", DiskOptions(path="/", capacity=capacity), layout)
    except ConfigError:
        assert capacity // layout.slot_bytes < 300
        return
    data_bytes = geometry.record_count * geometry.record_bytes
    slabs = -(-geometry.record_count // geometry.slab_records)
    assert slabs <= 128
    assert data_bytes + geometry.index_bytes + slabs * 4096 <= capacity
    if geometry.record_count > 1000 and slot_pages >= 256:
        assert data_bytes > 0.95 * capacity


def test_a_capacity_below_a_few_blocks_names_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tiers\.disk\.capacity: 100000 bytes .*give at least \d+"
    ) as caught:
        open_tier(tmp_path / "cache", 100_000)
    needed = int(str(caught.value).split("at least ")[1].rstrip(")"))
    assert not (tmp_path / "cache").exists()
    opened = open_tier(tmp_path / "cache", needed)
    assert store(opened, [key_of(1)]) == [Outcome.OK]
    opened.close()


def test_small_use_takes_little(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, 1 << 30)
    store(opened, [key_of(1)])
    assert bytes_on_disk(tmp_path) < 128 << 20
    opened.close()


def test_under_random_load_the_capacity_is_never_exceeded_and_no_record_is_lost(tmp_path: Path) -> None:
    removed: list[BlockKey] = []
    capacity = capacity_for(30)
    opened = open_tier(tmp_path, capacity, make_context(on_removed=removed.extend))
    rng = random.Random(7)
    stored: set[BlockKey] = set()
    for _ in range(300):
        keys = [key_of(rng.randrange(200)) for _ in range(rng.randrange(1, 12))]
        assert store(opened, keys) == [Outcome.OK] * len(keys)
        stored |= set(keys)
        stored -= set(removed)
        removed.clear()
        victims = [key_of(rng.randrange(200)) for _ in range(rng.randrange(4))]
        opened.delete(victims)
        stored -= set(victims)
        assert bytes_on_disk(tmp_path) <= capacity
    assert set(opened.scan()) == stored
    assert sum(opened.census()) == 30
    assert opened.stats().evictions > 100
    opened.close()
    assert bytes_on_disk(tmp_path) <= capacity


def test_a_batch_larger_than_the_tier_fills_it_and_reports_the_rest(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, capacity_for(10))
    outcomes = store(opened, [key_of(number) for number in range(25)])
    assert outcomes == [Outcome.OK] * 10 + [Outcome.NO_ROOM] * 15
    assert opened.stats().blocks == 10
    opened.close()


def test_a_block_that_is_being_read_is_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_tier(tmp_path, capacity_for(10))
    store(opened, [key_of(number) for number in range(10)])
    reading, go_on = threading.Event(), threading.Event()
    read = Slabs.read

    def slow(slabs: Slabs, record: int, header: memoryview, payload: memoryview) -> None:
        reading.set()
        assert go_on.wait(20)
        read(slabs, record, header, payload)

    monkeypatch.setattr(Slabs, "read", slow)
    outcomes: list[Outcome] = []
    reader = threading.Thread(
        target=lambda: outcomes.extend(load_verified(opened, [key_of(0)])), name="reader"
    )
    reader.start()
    assert reading.wait(20)
    for number in range(10, 30):
        assert store(opened, [key_of(number)]) == [Outcome.OK]
    assert opened.contains([key_of(0), key_of(1)]) == [True, False]
    go_on.set()
    reader.join(20)
    assert outcomes == [Outcome.OK]
    opened.close()


def test_a_block_deleted_while_it_is_read_keeps_its_bytes_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_tier(tmp_path, capacity_for(10))
    store(opened, [key_of(number) for number in range(10)])
    read = Slabs.read

    def delete_first(slabs: Slabs, record: int, header: memoryview, payload: memoryview) -> None:
        monkeypatch.setattr(Slabs, "read", read)
        opened.delete([key_of(0)])
        assert store(opened, [key_of(number) for number in range(10, 20)]) == [Outcome.OK] * 9 + [
            Outcome.NO_ROOM
        ]
        read(slabs, record, header, payload)

    monkeypatch.setattr(Slabs, "read", delete_first)
    assert load_verified(opened, [key_of(0)]) == [Outcome.OK]
    assert opened.contains([key_of(0)]) == [False]
    assert opened.census().free == 1
    opened.close()


def test_readers_and_writers_at_once_never_see_another_blocks_bytes(tmp_path: Path) -> None:
    capacity = capacity_for(24)
    opened = open_tier(tmp_path, capacity)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(120):
                keys = [key_of(rng.randrange(60)) for _ in range(rng.randrange(1, 6))]
                if rng.random() < 0.5:
                    store(opened, keys)
                else:
                    load_verified(opened, keys)
                if rng.random() < 0.1:
                    opened.delete(keys[:1])
        except BaseException as error:  # noqa: BLE001 - boundary: the thread's failure belongs to the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), name=f"work-{seed}") for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    census = opened.census()
    assert sum(census) == 24
    assert census.reserved == census.leaving == census.aside == 0
    assert bytes_on_disk(tmp_path) <= capacity
    opened.close()


class Stubborn(Fifo):
    """A policy that proposes nothing, or nonsense."""

    def victims(self, count: int, is_evictable: object) -> list[BlockKey]:
        return [key_of(12345)]


def test_when_nothing_can_be_evicted_there_is_no_room(tmp_path: Path) -> None:
    context = msgspec.structs.replace(make_context(), make_eviction_policy=lambda name: Stubborn())
    opened = open_tier(tmp_path, capacity_for(10), context)
    assert store(opened, [key_of(number) for number in range(10)]) == [Outcome.OK] * 10
    assert store(opened, [key_of(10)]) == [Outcome.NO_ROOM]
    assert opened.stats().blocks == 10
    opened.close()


def test_a_smaller_capacity_at_restart_evicts_until_it_fits(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, capacity_for(400))
    keys = [key_of(number) for number in range(400)]
    store(opened, keys)
    opened.close()
    capacity = capacity_for(30)
    opened = open_tier(tmp_path, capacity)
    assert bytes_on_disk(tmp_path) <= capacity
    held = list(opened.scan())
    assert len(held) == 30
    assert load_verified(opened, held) == [Outcome.OK] * 30
    assert store(opened, [key_of(1000 + number) for number in range(60)])[:30] == [Outcome.OK] * 30
    assert bytes_on_disk(tmp_path) <= capacity
    opened.close()


def test_a_larger_capacity_at_restart_is_used(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, capacity_for(10))
    store(opened, [key_of(number) for number in range(10)])
    opened.close()
    opened = open_tier(tmp_path, capacity_for(50))
    keys = [key_of(number) for number in range(50)]
    assert store(opened, keys) == [Outcome.OK] * 50
    assert load_verified(opened, keys) == [Outcome.OK] * 50
    opened.close()


def test_on_a_full_filesystem_the_tier_goes_on_with_what_it_has(
    small_filesystem: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_tier(small_filesystem, capacity_for(400))
    for number in range(0, 200, 5):
        assert store(opened, [key_of(number + one) for one in range(5)]) == [Outcome.OK] * 5
    assert [message for message in caplog.messages if "no further slab" in message] == [
        "tier 'disk': no further slab can be added: No space left on device"
    ]
    held = list(opened.scan())
    assert 20 < len(held) < 200
    assert load_verified(opened, held) == [Outcome.OK] * len(held)
    assert opened.stats().evictions == 200 - len(held)
    opened.close()


@pytest.mark.parametrize(("room", "what"), [(400 << 10, "index"), (1200 << 10, "cache cannot be used")])
def test_a_filesystem_without_room_for_index_or_slab_is_refused(
    small_filesystem: Path, room: int, what: str
) -> None:
    (small_filesystem / "cache").mkdir()
    (small_filesystem / "other").write_bytes(bytes((2 << 20) - room))
    with pytest.raises(TierUnavailable, match=f"{what}.*No space left on device; make room"):
        open_tier(small_filesystem / "cache", capacity_for(800))
    (small_filesystem / "other").unlink()
    opened = open_tier(small_filesystem / "cache", capacity_for(50))
    assert store(opened, [key_of(1)]) == [Outcome.OK]
    opened.close()


def test_growing_is_tried_again_once_there_may_be_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_tier(tmp_path, capacity_for(64))
    store(opened, [key_of(number) for number in range(4)])

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    now = 1000.0
    monkeypatch.setattr("kvferry.plugins.disk.tier.time.monotonic", lambda: now)
    with monkeypatch.context() as fault:
        fault.setattr(os, "posix_fallocate", full)
        assert store(opened, [key_of(4)]) == [Outcome.OK]
        assert opened.stats().blocks == 4
    store(opened, [key_of(5)])
    assert opened.stats().blocks == 4
    now += 60.0
    store(opened, [key_of(6)])
    assert opened.stats().blocks == 5
    assert not list(tmp_path.glob("*.new"))
    opened.close()


@pytest.mark.parametrize(
    ("cause", "outcome", "aside"),
    [(errno.ENOSPC, Outcome.NO_ROOM, 0), (errno.EROFS, Outcome.FAILED, 0), (errno.EIO, Outcome.FAILED, 1)],
)
def test_a_failed_write_costs_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: int, outcome: Outcome, aside: int
) -> None:
    opened = open_tier(tmp_path, capacity_for(10))
    pwritev = os.pwritev
    calls: list[int] = []

    def fail_second(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(cause, os.strerror(cause))
        return pwritev(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", fail_second)
    keys = [key_of(number) for number in range(3)]
    assert store(opened, keys) == [Outcome.OK, outcome, Outcome.OK]
    assert load_verified(opened, keys) == [Outcome.OK, Outcome.MISSING, Outcome.OK]
    census = opened.census()
    assert (census.held, census.aside, census.reserved) == (2, aside, 0)
    assert store(opened, [keys[1]]) == [Outcome.OK]
    opened.close()


def test_a_block_that_fails_to_read_is_dropped_and_its_record_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[BlockKey] = []
    opened = open_tier(tmp_path, capacity_for(10), make_context(on_removed=removed.extend))
    keys = [key_of(number) for number in range(3)]
    store(opened, keys)

    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as fault:
        fault.setattr(os, "preadv", fail)
        assert opened.load([empty_frame(keys[1])]) == [Outcome.FAILED]
    assert removed == [keys[1]]
    assert load_verified(opened, keys) == [Outcome.OK, Outcome.MISSING, Outcome.OK]
    assert opened.census().aside == 1
    opened.close()
    opened = open_tier(tmp_path, capacity_for(10))
    assert opened.contains(keys) == [True, False, True]
    assert sum(opened.census()) == len(opened.store([sealed_frame(key_of(9))])) + 2 + opened.census().free
    opened.close()


def test_a_slot_is_read_into_in_full(tmp_path: Path) -> None:
    opened = open_tier(tmp_path, capacity_for(10))
    store(opened, [key_of(0)])
    frame = empty_frame(key_of(0))
    opened.load([frame])
    assert bytes(frame.payload[LAYOUT.payload_bytes :]) == b"\xee" * (
        LAYOUT.slot_bytes - LAYOUT.payload_bytes
    )
    opened.close()


def test_a_prefix_loses_its_tail_before_its_head_also_after_a_restart(tmp_path: Path) -> None:
    prefix = [key_of(number) for number in range(6)]
    opened = open_tier(tmp_path, capacity_for(10))
    assert store(opened, prefix) == [Outcome.OK] * 6
    assert list(opened.scan()) == prefix[::-1]
    opened.close()
    opened = open_tier(tmp_path, capacity_for(10))
    assert store(opened, [key_of(number) for number in range(100, 107)]) == [Outcome.OK] * 7
    assert opened.contains(prefix) == [True] * 3 + [False] * 3
    opened.close()
