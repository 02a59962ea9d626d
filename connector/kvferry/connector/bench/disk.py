"""The disk tier against raw direct I/O: the same bytes, threads and call sizes, into preallocated files.

Both sides move the slots of one arena. The tier's side is what kvferry does in service: frames are sealed
before they are stored and verified after they are loaded. The raw side is one ``pwritev`` or ``preadv``
per record on a file opened with O_DIRECT, and no bookkeeping at all. Both are filled before anything is
timed, so every store overwrites, as in a cache that has been in use for a while.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure
from kvferry.connector.bench.host import MIB, SHAPES, SMALL
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.bench.tier_side import Slots, TierSide, against_raw, context_of
from kvferry.connector.errors import ConfigError
from kvferry.connector.layout import SLOT_ALIGNMENT_BYTES, BlockLayout
from kvferry.connector.memory import format_bytes
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import typed_options
from kvferry.connector.tier import DEFAULT_THREADS, Tier

__all__ = ["DISK"]

FILLS = 4
"""Room of both sides, in batches."""


def _measure(context: BenchContext) -> Sequence[Figure]:
    shapes = SMALL if context.quick else SHAPES
    figures: list[Figure] = []
    for index, (name, layout) in enumerate(shapes.items()):

        def progress(part: float, done: int = index) -> None:
            context.progress((done + part) / len(shapes))

        figures += _compare(name, layout, context, progress)
    return figures


def _compare(
    name: str, layout: BlockLayout, context: BenchContext, progress: Callable[[float], None]
) -> list[Figure]:
    """Store and load blocks of one shape, both sides in turn."""
    count = (2 if context.quick else 256) * MIB // layout.slot_bytes
    directory = context.directory(f"disk-{layout.slot_bytes}")
    capacity = (FILLS * count + 1) * (layout.slot_bytes + SLOT_ALIGNMENT_BYTES) + 16 * MIB
    _require_room(directory, 2 * capacity)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        arena = Arena.create(count, layout.slot_bytes)
        stack.callback(arena.close)
        threads = stack.enter_context(ThreadPoolExecutor(DEFAULT_THREADS, "kvferry-bench"))
        opened = _open_tier(directory / "tier", layout, capacity)
        stack.callback(opened.close)
        tier = TierSide(opened, layout, arena, threads)
        raw = stack.enter_context(_RawSide.open(directory / "raw", layout, arena, threads))
        for fill in range(FILLS + 1):
            tier.store(fill)
            raw.store(fill)
        sides = {"store": tier.store, "raw store": raw.store, "load": tier.load, "raw load": raw.load}
        seconds = interleaved(sides, 3 if context.quick else 9, progress)
    calls = {"store": "O_DIRECT pwritev", "load": "O_DIRECT preadv"}
    what = f"{name} blocks, {DEFAULT_THREADS} threads"
    return against_raw("disk", what, count * layout.payload_bytes, seconds, calls)


class _RawSide(Slots):
    """Writes and reads records of the same size in a preallocated file, past the page cache."""

    def __init__(
        self, descriptor: int, layout: BlockLayout, arena: Arena, threads: ThreadPoolExecutor
    ) -> None:
        super().__init__(layout, arena, threads)
        self._descriptor = descriptor
        self._record_bytes = SLOT_ALIGNMENT_BYTES + arena.handle.slot_bytes
        self._sectors = [memoryview(mmap.mmap(-1, SLOT_ALIGNMENT_BYTES)) for _ in self.slots]
        self._written = 0

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, layout: BlockLayout, arena: Arena, threads: ThreadPoolExecutor
    ) -> Iterator[_RawSide]:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise BenchSkipped(f"{path.parent} has no O_DIRECT; give --path on a local disk") from error
            raise
        try:
            side = cls(descriptor, layout, arena, threads)
            os.posix_fallocate(descriptor, 0, FILLS * len(side.slots) * side._record_bytes)
            yield side
        finally:
            os.close(descriptor)

    def store(self, _: int) -> None:
        """Write every slot over what was written ``FILLS`` stores ago."""
        self._written = (self._written + 1) % FILLS
        self.everywhere(self._write)

    def load(self, _: int) -> None:
        """Read what was written last."""
        self.everywhere(self._read)

    def _write(self, indices: range) -> None:
        for index in indices:
            buffers = [self._sectors[index], self.slots[index]]
            self._require_whole(os.pwritev(self._descriptor, buffers, self._offset(index)))

    def _read(self, indices: range) -> None:
        for index in indices:
            buffers = [self._sectors[index], self.slots[index]]
            self._require_whole(os.preadv(self._descriptor, buffers, self._offset(index)))

    def _offset(self, index: int) -> int:
        return (self._written * len(self.slots) + index) * self._record_bytes

    def _require_whole(self, moved: int) -> None:
        if moved != self._record_bytes:
            raise BenchSkipped(f"raw direct I/O moved {moved} of {self._record_bytes} bytes")


def _open_tier(path: Path, layout: BlockLayout, capacity: int) -> Tier:
    """Open a disk tier through the registry, as a service would."""
    registry = PluginRegistry()
    try:
        tier_type = registry.tier_type("disk")
    except ConfigError as error:
        raise BenchSkipped(f"no disk tier: {error}") from error
    raw_options = {"path": str(path), "capacity": capacity, "eviction": "lru"}
    options = typed_options(tier_type, raw_options, "tiers[0]")
    return tier_type.create(options, context_of("disk", layout, DEFAULT_THREADS))


def _require_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise BenchSkipped(
            f"{directory} has {format_bytes(free)} free, the measurement needs {format_bytes(needed)}; "
            "give --path on a larger disk"
        )


DISK = BenchCase("disk", "the disk tier, checksums included, against raw O_DIRECT", _measure)
