"""The tier: blocks in two tables of one SQLite file, used by several processes at once.

``blocks`` says which keys there are and when each was used last; ``frames`` holds their bytes. Two tables,
because an UPDATE rewrites its row as a whole. A transaction is the moment a block starts or ceases to exist,
so it is whole or absent, for every reader, after every crash.

Connections and the threads' turns on them are the pool's; ``_lock`` guards what is in memory here, which
blocks were used and the last known size, and is never held across I/O.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence

from kvferry.connector.errors import ConfigError
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Capabilities, Frame, Outcome, TierContext, TierStats
from kvferry_sqlite import SqliteOptions
from kvferry_sqlite.pool import PAGE_BYTES, NoSpace, Pool

__all__ = ["SqliteTier"]

_CHUNK_BYTES = 128 << 10
"""Read at once: small enough to be in the processor's cache when it is copied on."""
_SPARE_PAGES = 8
"""Kept free beside a block's own pages, for tables and indexes that grow."""
_MIN_BLOCKS = 4
_MAX_USES = 4096
"""Uses remembered between two stores."""


class SqliteTier:
    """Blocks in a SQLite file; see the module docstring. Thread-safe.

    Args:
        options: The operator's options.
        context: What kvferry gave the tier.

    Raises:
        ConfigError: The capacity is too small, or the file is another program's.
        TierError: The file cannot be opened.
    """

    def __init__(self, options: SqliteOptions, context: TierContext) -> None:
        needed = (_MIN_BLOCKS * _pages(context.layout.payload_bytes) + _SPARE_PAGES) * PAGE_BYTES
        if options.capacity < needed:
            path = f"tiers.{context.name}.capacity"
            raise ConfigError(
                path, f"{options.capacity} bytes hold too few blocks", f"give at least {needed}"
            )
        self._capacity_pages = options.capacity // PAGE_BYTES
        self._context = context
        self._lock = threading.Lock()
        self._uses: dict[BlockKey, int] = {}
        self._size = TierStats(blocks=0, used_bytes=0, capacity_bytes=options.capacity)
        self._pool = Pool(options.path, options.capacity, context)
        try:
            with self._changing() as (connection, evicted):  # the capacity may be less than it was
                self._make_room(connection, 0, time.time_ns(), evicted)
        except BaseException:
            self._pool.close()
            raise

    @property
    def capabilities(self) -> Capabilities:
        """The file outlives the process, may have other users, and is bounded."""
        return Capabilities(is_persistent=True, is_shared=True, is_bounded=True)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Tell for each key whether it is held. Reads the file."""
        with self._pool.transaction("BEGIN") as connection:
            return [_number_of(connection, key) is not None for key in keys]

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Read the blocks as they all are at one moment. Waits for no writer."""
        with self._pool.transaction("BEGIN") as connection:
            outcomes = [_load(connection, frame) for frame in into]
        self._note_uses([frame.key for frame in into])
        return outcomes

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Write the frames in one transaction; what was used longest ago makes room."""
        now = time.time_ns()
        try:
            with self._changing() as (connection, evicted):
                outcomes = [self._store(connection, frame, now, evicted) for frame in frames]
        except NoSpace:
            return [Outcome.NO_ROOM] * len(frames)
        self._note_uses([frame.key for frame in frames])
        return outcomes

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget the keys in one transaction."""
        with self._changing() as (connection, _):
            connection.executemany("DELETE FROM blocks WHERE key = ?", [(key,) for key in keys])

    def scan(self) -> Iterator[BlockKey]:
        """Yield the keys held when called, in the order they were stored."""
        with self._pool.transaction("BEGIN") as connection:
            rows = connection.execute("SELECT key FROM blocks ORDER BY id").fetchall()
        return (BlockKey(key) for (key,) in rows)

    def stats(self) -> TierStats:
        """Return the size after this process's last change; other processes' show with the next one."""
        self._pool.require_open()
        return self._size

    def close(self) -> None:
        """Wait for calls under way and close the file."""
        self._pool.close()

    def _note_uses(self, keys: Sequence[BlockKey]) -> None:
        """Remember uses until the next change. A batch's first block counts as used last.

        The head of a prefix is of use without its tail, not the other way round.
        """
        now = time.time_ns()
        with self._lock:
            self._uses.update((key, now - index) for index, key in enumerate(keys))
            while len(self._uses) > _MAX_USES:
                del self._uses[next(iter(self._uses))]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[sqlite3.Connection, list[BlockKey]]]:
        """Lend a writing transaction and a list for evicted keys; afterwards account for both."""
        evicted: list[BlockKey] = []
        with self._lock:
            uses, self._uses = self._uses, {}
        with self._pool.transaction("BEGIN IMMEDIATE") as connection:
            connection.executemany(
                "UPDATE blocks SET used = ? WHERE key = ?", [(used, key) for key, used in uses.items()]
            )
            yield connection, evicted
            (blocks,) = connection.execute("SELECT count(*) FROM blocks").fetchone()
            used_bytes = (self._capacity_pages - self._free_pages(connection)) * PAGE_BYTES
        with self._lock:
            self._size = TierStats(
                blocks=blocks,
                used_bytes=used_bytes,
                capacity_bytes=self._size.capacity_bytes,
                evictions=self._size.evictions + len(evicted),
            )
        if evicted:
            self._context.on_removed(evicted)

    def _store(
        self, connection: sqlite3.Connection, frame: Frame, now: int, evicted: list[BlockKey]
    ) -> Outcome:
        if _number_of(connection, frame.key) is not None:
            return Outcome.OK
        if not self._make_room(connection, _pages(frame.length), now, evicted):
            return Outcome.NO_ROOM
        row = connection.execute("INSERT INTO blocks (key, used) VALUES (?, ?)", (frame.key, now))
        connection.execute(
            "INSERT INTO frames VALUES (?, ?, zeroblob(?))", (row.lastrowid, frame.header, frame.length)
        )
        assert row.lastrowid is not None
        with connection.blobopen("frames", "body", row.lastrowid) as blob:
            blob.write(frame.body)
        return Outcome.OK

    def _make_room(
        self, connection: sqlite3.Connection, pages: int, now: int, evicted: list[BlockKey]
    ) -> bool:
        """Evict until ``pages`` are free; False when only blocks that were used since ``now`` are left."""
        while self._free_pages(connection) < pages + _SPARE_PAGES:
            oldest = "SELECT id, key FROM blocks WHERE used < ? ORDER BY used LIMIT 1"
            victim = connection.execute(oldest, (now,)).fetchone()
            if victim is None:
                return False
            connection.execute("DELETE FROM blocks WHERE id = ?", victim[:1])
            evicted.append(BlockKey(victim[1]))
        return True

    def _free_pages(self, connection: sqlite3.Connection) -> int:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (unused,) = connection.execute("PRAGMA freelist_count").fetchone()
        return int(self._capacity_pages - pages + unused)


def _pages(body_bytes: int) -> int:
    """Return the most pages that a frame of this size takes, each holding 4 bytes less than it has."""
    return (HEADER_BYTES + body_bytes) // (PAGE_BYTES - 4) + 2


def _number_of(connection: sqlite3.Connection, key: BlockKey) -> int | None:
    row = connection.execute("SELECT id FROM blocks WHERE key = ?", (key,)).fetchone()
    return None if row is None else int(row[0])


def _load(connection: sqlite3.Connection, frame: Frame) -> Outcome:
    row = connection.execute(
        "SELECT id, header, length(body) FROM blocks JOIN frames USING (id) WHERE key = ?", (frame.key,)
    ).fetchone()
    if row is None:
        return Outcome.MISSING
    number, header, length = row
    if len(header) != HEADER_BYTES or length > frame.length:
        return Outcome.FAILED
    frame.header[:] = header
    with connection.blobopen("frames", "body", number, readonly=True) as blob:
        for start in range(0, length, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, length)
            frame.payload[start:end] = blob.read(end - start)
    return Outcome.OK
