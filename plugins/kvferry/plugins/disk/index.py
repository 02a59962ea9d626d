"""The index file: which record holds which block, in LMDB.

One entry per block: the key, then record, sequence number and a check of all three, so that a
flipped bit in an entry loses that entry and nothing else. An LMDB write transaction is the moment a
block starts or ceases to exist; the free records are whatever no entry names, so nothing can leak.

What is assumed of the medium. A killed process leaves all that it handed to the kernel, and LMDB
copies pages before changing them, so the last committed transaction stands. After a crash of the
machine that holds only when the index was ``durable``; ``directory`` keeps track of it. Bytes that
somebody else changed are never given to LMDB, which would crash on them: ``lmdb.verify`` walks the
file first.

``Index`` is thread-safe; its lock is held for one transaction at a time. The directory's lock keeps
other processes out, so LMDB's own lock file is not used.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import lmdb
import xxhash
from lmdb import verify

from kvferry.connector.errors import TierUnavailable
from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.plugins.disk.options import INDEX_BATCH

__all__ = ["Entry", "Index", "IndexFull"]

_VALUE = struct.Struct("<QQQ")


class Entry(NamedTuple):
    """One block as the index knows it."""

    key: BlockKey
    record: int
    sequence: int
    """Larger is later."""


class IndexFull(Exception):
    """The transaction found no room, in the index or on the medium; nothing was changed."""


class Index:
    """The index of one directory.

    Args:
        tier: The tier's name, for messages.
        path: The index file; created when absent.
        max_bytes: The file's size, preallocated and never exceeded; a file that is larger from an
            earlier, larger capacity keeps its size until ``compact``.
        is_durable: Flush every transaction to the medium.

    Raises:
        TierUnavailable: The file is damaged, or there is no room for it.
    """

    def __init__(self, tier: str, path: Path, max_bytes: int, *, is_durable: bool) -> None:
        self._tier = tier
        self._path = path
        self._max_bytes = max(max_bytes, path.stat().st_size) if path.exists() else max_bytes
        self._is_durable = is_durable
        self._lock = threading.Lock()
        self._next_sequence = 0
        if path.exists():
            self._check()
        else:
            self._create()
        self._env = self._open(path)
        self._preallocate()

    def entries(self) -> tuple[list[Entry], int]:
        """Return the intact entries, least recently stored first, and the number of damaged ones.

        Reads the whole index; call it once, before the first ``update``. Damaged entries are removed.
        """
        entries: list[Entry] = []
        damaged: list[bytes] = []
        try:
            with self._lock, self._env.begin() as transaction:
                for key, value in transaction.cursor():
                    entry = _unpack(key, value)
                    if entry is None:
                        damaged.append(key)
                    else:
                        entries.append(entry)
            self._purge(damaged)
        except lmdb.Error as error:
            raise self._unavailable(f"cannot be read: {error}", _START_EMPTY) from error
        entries.sort(key=lambda entry: entry.sequence)
        self._next_sequence = entries[-1].sequence + 1 if entries else 0
        return entries, len(damaged)

    def update(
        self, stored: Sequence[tuple[BlockKey, int]], removed: Iterable[tuple[BlockKey, int]] = ()
    ) -> None:
        """Make blocks exist or not, all or none of them.

        Args:
            stored: Keys and the records that hold them now.
            removed: Keys and the records that held them; one that has moved to another record since
                is left alone. At most ``INDEX_BATCH`` keys in all.

        Raises:
            IndexFull: There was no room for the change.
            TierUnavailable: The index cannot be written.
        """
        try:
            with self._lock, self._env.begin(write=True) as transaction:
                for key, record in removed:
                    value = transaction.get(key)
                    if value is not None and _VALUE.unpack(value)[0] == record:
                        transaction.delete(key)
                for key, record in stored:
                    transaction.put(key, _pack(key, record, self._next_sequence))
                    self._next_sequence += 1
        except lmdb.MapFullError as error:
            raise IndexFull(str(error)) from error
        except lmdb.Error as error:
            if error.code in (errno.ENOSPC, errno.EDQUOT):
                raise IndexFull(str(error)) from error
            raise self._unavailable(f"cannot be written: {error}", "check the disk") from error

    @property
    def size_bytes(self) -> int:
        """Bytes that the file takes."""
        return self._max_bytes

    def compact(self, max_bytes: int) -> None:
        """Rewrite the file without its free pages, for a directory whose capacity has shrunk.

        Raises:
            TierUnavailable: There is no room for the second copy.
        """
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        try:
            self._env.copy(str(fresh), compact=True)
            self._env.close()
            os.replace(fresh, self._path)
        except (lmdb.Error, OSError) as error:
            raise self._unavailable(f"cannot be compacted: {error}", "make room on the filesystem") from error
        self._max_bytes = max_bytes
        self._env = self._open(self._path)
        self._preallocate()

    def close(self) -> None:
        """Flush everything to the medium and close.

        Raises:
            TierUnavailable: It could not be flushed; it is closed all the same.
        """
        try:
            with self._lock:
                self._env.sync(True)
        except lmdb.Error as error:
            raise self._unavailable(f"cannot be flushed: {error}", "check the disk") from error
        finally:
            self._env.close()

    def _create(self) -> None:
        """Make an empty index under another name first: a kill must not leave half of one."""
        fresh = self._path.with_suffix(".new")
        environment = self._open(fresh)
        environment.sync(True)
        environment.close()
        os.replace(fresh, self._path)

    def _open(self, path: Path) -> lmdb.Environment:
        try:
            return lmdb.open(
                str(path),
                map_size=self._max_bytes,
                subdir=False,
                mode=0o600,
                lock=False,
                readahead=False,
                sync=self._is_durable,
                metasync=self._is_durable,
            )
        except lmdb.Error as error:
            raise self._unavailable(f"cannot be opened: {error}", _START_EMPTY) from error

    def _check(self) -> None:
        """Refuse a file that LMDB must not see: truncated, flipped bits, not LMDB at all."""
        try:
            problems = verify.verify(str(self._path), subdir=False)  # type: ignore[no-untyped-call]
        except (verify.VerifyError, OSError) as error:
            problems = [str(error)]
        if problems:
            raise self._unavailable(f"is damaged: {problems[0]}", _START_EMPTY)

    def _preallocate(self) -> None:
        """Take the file's space now, so that no later transaction runs out of it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.posix_fallocate(descriptor, 0, self._max_bytes)
        except OSError as error:
            self._env.close()
            raise self._unavailable(
                f"cannot take {self._max_bytes} bytes: {error.strerror}", "make room on the filesystem"
            ) from error
        finally:
            os.close(descriptor)

    def _purge(self, keys: list[bytes]) -> None:
        for start in range(0, len(keys), INDEX_BATCH):
            with self._lock, self._env.begin(write=True) as transaction:
                for key in keys[start : start + INDEX_BATCH]:
                    transaction.delete(key)

    def _unavailable(self, why: str, hint: str) -> TierUnavailable:
        return TierUnavailable(self._tier, f"the index {self._path} {why}", hint)


_START_EMPTY = "restore it, or delete this one file to start with an empty cache"


def _check_of(key: bytes, record: int, sequence: int) -> int:
    return xxhash.xxh3_64_intdigest(key + record.to_bytes(8, "little") + sequence.to_bytes(8, "little"))


def _pack(key: bytes, record: int, sequence: int) -> bytes:
    return _VALUE.pack(record, sequence, _check_of(key, record, sequence))


def _unpack(key: bytes, value: bytes) -> Entry | None:
    if len(key) != KEY_BYTES or len(value) != _VALUE.size:
        return None
    record, sequence, check = _VALUE.unpack(value)
    if check != _check_of(key, record, sequence):
        return None
    return Entry(BlockKey(key), record, sequence)
