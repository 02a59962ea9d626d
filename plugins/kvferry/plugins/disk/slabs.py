"""Slabs: preallocated files of equal records, read and written past the page cache.

A record is one sector with the frame's header, then the slot's bytes. It is written by one ``pwritev``
and read by one ``preadv``, straight from and into the arena's slots. A record is named by one number:
its slab's number in the upper 32 bits, its position there in the lower.

Slabs are added one by one, each with all its space taken at once, so that a full filesystem shows
when a slab is added and not when a block is written.

Who may use a record is not known here (see ``records``). ``read`` and ``write`` may be called from
any thread; ``grow``, ``trim`` and ``close`` by one thread at a time.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from kvferry.connector.frame import HEADER_BYTES
from kvferry.plugins.disk.manifest import flush_names
from kvferry.plugins.disk.options import SECTOR_BYTES

__all__ = ["Slabs", "Truncated", "record_of", "split_record", "supports_direct_io", "whole_sectors"]

_NAME = re.compile(r"slab-(\d{5})")
_SLAB_SHIFT = 32
_POSITION_MASK = (1 << _SLAB_SHIFT) - 1


class Truncated(Exception):
    """The file ends within the record."""


def record_of(slab: int, position: int) -> int:
    """Return the number of the record at ``position`` of ``slab``."""
    return slab << _SLAB_SHIFT | position


def split_record(record: int) -> tuple[int, int]:
    """Return the slab and the position of a record."""
    return record >> _SLAB_SHIFT, record & _POSITION_MASK


def whole_sectors(length: int) -> int:
    """Return ``length`` rounded up to sectors."""
    return -(-length // SECTOR_BYTES) * SECTOR_BYTES


class _Scratch(threading.local):
    """One aligned sector per thread, through which headers pass."""

    def __init__(self) -> None:
        self.sector = memoryview(mmap.mmap(-1, SECTOR_BYTES))


class Slabs:
    """The slab files of one directory.

    Args:
        path: The directory.
        record_bytes: Length of a record.
        use_direct_io: Try O_DIRECT; ``is_direct`` tells what came of it.

    Raises:
        OSError: The files cannot be opened.
    """

    def __init__(self, path: Path, record_bytes: int, *, use_direct_io: bool) -> None:
        self._path = path
        self._record_bytes = record_bytes
        self._scratch = _Scratch()
        self._descriptors: dict[int, int] = {}
        self._records: dict[int, int] = {}
        self.is_direct = use_direct_io and supports_direct_io(path)
        try:
            for file in sorted(path.iterdir()):
                if match := _NAME.fullmatch(file.name):
                    self._add(int(match[1]), file)
        except OSError:
            self.close()
            raise

    @property
    def sizes(self) -> dict[int, int]:
        """Number of whole records in each slab, by the slab's number."""
        return dict(self._records)

    def grow(self, records: int) -> int:
        """Add a slab of ``records`` records and return its number.

        Raises:
            OSError: There is no room (ENOSPC, EDQUOT, EFBIG) or the medium fails; nothing was added.
        """
        slab = next(number for number in range(len(self._records) + 1) if number not in self._records)
        file = self._path / f"slab-{slab:05}"
        fresh = file.with_suffix(".new")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, records * self._record_bytes)
            os.replace(fresh, file)
            flush_names(self._path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        self._add(slab, file)
        return slab

    def trim(self, slab: int, records: int) -> None:
        """Cut ``slab`` down to ``records`` records; none of them removes the file.

        Raises:
            OSError: The file cannot be changed.
        """
        if records:
            os.ftruncate(self._descriptors[slab], records * self._record_bytes)
            self._records[slab] = records
            return
        (self._path / f"slab-{slab:05}").unlink()
        os.close(self._descriptors.pop(slab))
        del self._records[slab]

    def write(self, record: int, header: memoryview, payload: memoryview) -> None:
        """Write a record. Blocks; whether it is on the medium is known only after ``sync``.

        A payload shorter than the record leaves what the record held behind it; ``read`` returns that
        too, and the frame's header says that it is not the block.

        Args:
            record: The record's number.
            header: The frame's header.
            payload: Whole sectors, aligned.

        Raises:
            OSError: The record was not written, or only in part.
        """
        sector = self._scratch.sector
        sector[:HEADER_BYTES] = header
        buffers, (descriptor, offset) = [sector, payload], self._locate(record)
        while True:
            written = os.pwritev(descriptor, buffers, offset)
            offset += written
            buffers = _rest(buffers, written)
            if not buffers:
                return
            if not written:
                raise OSError(errno.EIO, "nothing was written")

    def read(self, record: int, header: memoryview, payload: memoryview) -> None:
        """Read a record into ``header`` and ``payload``. Blocks; nothing is verified.

        Raises:
            Truncated: The file ends within the record.
            OSError: The record could not be read.
        """
        sector = self._scratch.sector
        buffers, (descriptor, offset) = [sector, payload], self._locate(record)
        end = offset + self._record_bytes
        while buffers:
            read = os.preadv(descriptor, buffers, offset)
            offset += read
            buffers = _rest(buffers, read)
            if buffers and (not read or os.fstat(descriptor).st_size < end):
                raise Truncated
        header[:] = sector[:HEADER_BYTES]

    def sync(self, records: Iterable[int] | None = None) -> None:
        """Flush the slabs of ``records``, by default all slabs, to the medium. Blocks.

        Raises:
            OSError: The medium failed; what it holds is unknown.
        """
        slabs = set(self._descriptors) if records is None else {record >> _SLAB_SHIFT for record in records}
        for slab in slabs:
            os.fdatasync(self._descriptors[slab])

    def close(self) -> None:
        """Close the files. Idempotent; no read or write may be under way."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _locate(self, record: int) -> tuple[int, int]:
        slab, position = split_record(record)
        return self._descriptors[slab], position * self._record_bytes

    def _add(self, slab: int, file: Path) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if self.is_direct else 0)
        descriptor = os.open(file, flags)
        self._descriptors[slab] = descriptor
        self._records[slab] = os.fstat(descriptor).st_size // self._record_bytes


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    """Return what is left of ``buffers`` after their first ``done`` bytes."""
    rest = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(0, done - len(buffer))
    return rest


def supports_direct_io(path: Path, probe_name: str = "probe.new") -> bool:
    """Tell whether a sector can really be written and read with O_DIRECT in the directory ``path``.

    Writes a file of the given name and removes it.

    Raises:
        OSError: Nothing can be written there.
    """
    probe = path / probe_name
    sector = mmap.mmap(-1, SECTOR_BYTES)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT
        descriptor = os.open(probe, flags, 0o600)
        try:
            wrote = os.pwrite(descriptor, sector, 0)
            return wrote == SECTOR_BYTES and os.preadv(descriptor, [sector], 0) == SECTOR_BYTES
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        probe.unlink(missing_ok=True)
