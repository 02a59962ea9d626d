"""A process using a disk tier is killed at any instant; what is on disk is whole or absent each time."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_kit import LAYOUT, bytes_on_disk, capacity_for, key_of, load_verified, open_tier, store

from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Outcome
from kvferry.plugins.disk.options import SECTOR_BYTES

WRITER = Path(__file__).with_name("writer.py")
BLOCKS = 30
CAPACITY = capacity_for(BLOCKS)
KILLS = 120
EARLY_KILLS = 10
"""At least so many while the tier is being opened."""
DEADLINE_S = 30.0


class Nursery:
    """Starts writers (see ``writer.py``) and kills them."""

    def __init__(self) -> None:
        command = [sys.executable, str(WRITER)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._buffer = b""
        self._writer = 0

    def start(self, path: Path, command: str, capacity: int = CAPACITY) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path} {capacity} {command}\n".encode())
        self._process.stdin.flush()
        self._writer = int(self.read_until("pid")[-1].split()[1])

    def kill(self) -> list[str]:
        """Kill the writer; return what it had still printed."""
        os.kill(self._writer, signal.SIGKILL)
        return self.reap()

    def read_until(self, start: str) -> list[str]:
        """Return the lines up to and with one that begins with ``start``."""
        lines: list[str] = []
        while not (lines and lines[-1].startswith(start)):
            lines.append(self.read_line())
        return lines

    def reap(self) -> list[str]:
        """Wait for the writer's death by SIGKILL; return what it had still printed."""
        *lines, last = self.read_until("reaped")
        self._writer = 0
        assert last == f"reaped {signal.SIGKILL.value}"
        return lines

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._writer:
            os.kill(self._writer, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._process.stdout.close()

    def read_line(self) -> str:
        """Return the next line of the nursery or the writer."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([descriptor], [], [], DEADLINE_S)
            assert readable, "the writer is silent"
            received = os.read(descriptor, 65536)
            assert received, "the nursery is gone"
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.close()


def fill(path: Path, capacity: int) -> None:
    opened = open_tier(path, capacity)
    store(opened, [key_of(number) for number in range(400)])
    opened.close()


def assert_recovers(path: Path, capacity: int = CAPACITY) -> list[BlockKey]:
    """Open what was left, check all of it, and return the keys that are there."""
    if path.exists():
        assert bytes_on_disk(path) <= capacity
    opened = open_tier(path, capacity)
    keys = list(opened.scan())
    assert load_verified(opened, keys) == [Outcome.OK] * len(keys)
    census = opened.census()
    records = sum(slab.stat().st_size for slab in path.glob("slab-*")) // (SECTOR_BYTES + LAYOUT.slot_bytes)
    assert census.held == len(keys)
    assert census.free + census.held == sum(census) == records
    assert bytes_on_disk(path) <= capacity
    opened.close()
    return keys


def test_a_writer_killed_at_random_points_leaves_whole_blocks_and_no_leak(
    nursery: Nursery, tmp_path: Path
) -> None:
    rng = random.Random(20261123)
    held: list[int] = []
    early = 0
    while len(held) < KILLS or early < EARLY_KILLS:
        assert len(held) < 10 * KILLS, f"only {early} kills while the tier was being opened"
        nursery.start(tmp_path / "cache", f"random {len(held)}")
        is_early = rng.random() < 0.25
        if not is_early:
            nursery.read_until("stored")
        time.sleep(rng.uniform(0, 0.02) if is_early else rng.expovariate(1 / 0.03))
        early += "stored" not in nursery.kill() and is_early
        held.append(len(assert_recovers(tmp_path / "cache")))
    assert max(held) == BLOCKS


STEPS_WHILE_NEW = [
    *[(f"replace-{when}", count) for count in (1, 2, 3, 6) for when in ("before", "after")],
    *[(f"fallocate-{when}", count) for count in (1, 2, 5) for when in ("before", "after")],
    *[(f"fsync-{when}", 1) for when in ("before", "after")],
    *[(f"pwritev-{when}", count) for count in (1, 9) for when in ("before", "within", "after")],
    *[(f"update-{when}", count) for count in (1, 2) for when in ("before", "after")],
]
STEPS_WHILE_FULL = [
    *[(f"replace-{when}", 1) for when in ("before", "after")],
    *[(f"fallocate-{when}", 1) for when in ("before", "after")],
    *[(f"fsync-{when}", count) for count in (1, 2) for when in ("before", "after")],
    *[(f"pwritev-{when}", count) for count in (1, 9, 60) for when in ("before", "within", "after")],
    *[(f"update-{when}", count) for count in range(1, 12) for when in ("before", "after")],
]


def test_a_writer_killed_at_each_step_of_a_new_directory(nursery: Nursery, tmp_path: Path) -> None:
    for point, count in STEPS_WHILE_NEW:
        path = tmp_path / f"{point}-{count}"
        nursery.start(path, f"at {point} {count}")
        nursery.reap()
        assert_recovers(path)


def test_a_writer_killed_at_each_step_of_evicting(nursery: Nursery, tmp_path: Path) -> None:
    fill(tmp_path / "cache", CAPACITY)
    for point, count in STEPS_WHILE_FULL:
        nursery.start(tmp_path / "cache", f"at {point} {count}")
        nursery.reap()
        assert assert_recovers(tmp_path / "cache")


STEPS_WHILE_SHRINKING = [
    *[(f"update-{when}", count) for count in (1, 3) for when in ("before", "after")],
    *[(f"ftruncate-{when}", count) for count in (1, 2) for when in ("before", "after")],
    *[(f"unlink-{when}", count) for count in (1, 2, 5) for when in ("before", "after")],
    *[(f"replace-{when}", 2) for when in ("before", "after")],
]


def test_a_kill_at_each_step_of_fitting_to_a_smaller_capacity(nursery: Nursery, tmp_path: Path) -> None:
    fill(tmp_path / "large", capacity_for(400))
    for point, count in STEPS_WHILE_SHRINKING:
        path = tmp_path / f"{point}-{count}"
        shutil.copytree(tmp_path / "large", path)
        nursery.start(path, f"at {point} {count}", CAPACITY)
        nursery.reap()
        open_tier(path, CAPACITY).close()
        assert assert_recovers(path)


def test_a_block_whose_store_returned_is_there_after_the_kill(nursery: Nursery, tmp_path: Path) -> None:
    capacity = capacity_for(4000)
    rng = random.Random(5)
    safe: set[BlockKey] = set()
    for seed in range(12):
        nursery.start(tmp_path / "cache", f"ack {seed}", capacity)
        lines = [nursery.read_line() for _ in range(rng.randrange(1, 150))]
        lines += nursery.kill()
        safe |= {key_of(int(line)) for line in lines}
        held = set(assert_recovers(tmp_path / "cache", capacity))
        assert safe <= held
        assert len(held) <= len(safe) + 4 * (seed + 1)
    assert len(safe) > 300
