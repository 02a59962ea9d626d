"""The disk tier against raw direct I/O: the same bytes, threads and call sizes, into preallocated files.

Both sides move the slots of one arena. The tier's side is what kvferry does in service: frames are sealed
before they are stored and verified after they are loaded. The raw side is one ``pwritev`` or ``preadv``
per record on a file opened with O_DIRECT, and no bookkeeping at all. Both are filled before anything is
timed, so every store overwrites, as in a cache that has been in use for a while.
"""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure, Goal
from kvferry.connector.bench.host import MIB, SHAPES, SMALL
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.config import TierConfig
from kvferry.connector.embedded import batch_blocks
from kvferry.connector.errors import ConfigError
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import SLOT_ALIGNMENT_BYTES, BlockLayout
from kvferry.connector.memory import format_bytes
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import typed_options
from kvferry.connector.tier import Frame, Outcome, Tier, TierContext

__all__ = ["DISK"]

GOAL = Goal(0.8, at_least=True)
FINGERPRINT = bytes(32)
THREADS = TierConfig(type="disk").threads
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
        threads = stack.enter_context(ThreadPoolExecutor(THREADS, "kvferry-bench"))
        tier = stack.enter_context(_TierSide.open(directory / "tier", layout, capacity, arena, threads))
        raw = stack.enter_context(_RawSide.open(directory / "raw", layout, arena, threads))
        for fill in range(FILLS + 1):
            tier.store(fill)
            raw.store(fill)
        sides = {"store": tier.store, "raw store": raw.store, "load": tier.load, "raw load": raw.load}
        seconds = interleaved(sides, 3 if context.quick else 9, progress)
    moved = count * layout.payload_bytes / 1e9
    return [
        Figure(
            name=f"disk {verb}, {name} blocks, {THREADS} threads",
            value=moved / seconds[verb],
            unit="GB/s",
            raw=moved / seconds[f"raw {verb}"],
            raw_name=call,
            goal=GOAL,
        )
        for verb, call in (("store", "O_DIRECT pwritev"), ("load", "O_DIRECT preadv"))
    ]


class _Side:
    """What both sides share: the slots, and threads that each take a transfer's worth of them."""

    def __init__(self, layout: BlockLayout, arena: Arena, threads: ThreadPoolExecutor) -> None:
        self.slots = [arena.slot(index) for index in range(arena.handle.num_slots)]
        self._threads = threads
        per_call = batch_blocks(layout)
        self._calls = [
            range(first, min(first + per_call, len(self.slots)))
            for first in range(0, len(self.slots), per_call)
        ]

    def everywhere(self, work: Callable[[range], None]) -> None:
        for _ in self._threads.map(work, self._calls):
            pass


class _TierSide(_Side):
    """Stores and loads through the real tier, sealing and verifying every frame."""

    def __init__(self, tier: Tier, layout: BlockLayout, arena: Arena, threads: ThreadPoolExecutor) -> None:
        super().__init__(layout, arena, threads)
        self._tier = tier
        self._seal = FrameSeal(FINGERPRINT, layout.payload_bytes)
        self._headers = [memoryview(bytearray(HEADER_BYTES)) for _ in self.slots]
        self._generations = itertools.count()
        self._stored = 0
        for slot in self.slots:
            slot[:] = os.urandom(SLOT_ALIGNMENT_BYTES) * (len(slot) // SLOT_ALIGNMENT_BYTES)

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, layout: BlockLayout, capacity: int, arena: Arena, threads: ThreadPoolExecutor
    ) -> Iterator[_TierSide]:
        tier = _open_tier(path, layout, capacity)
        try:
            yield cls(tier, layout, arena, threads)
        finally:
            tier.close()

    def store(self, _: int) -> None:
        """Store every slot under keys never used before."""
        self._stored = next(self._generations)
        self.everywhere(self._store)

    def load(self, _: int) -> None:
        """Load what was stored last."""
        self.everywhere(self._load)

    def _store(self, indices: range) -> None:
        frames = self._frames(indices)
        for frame in frames:
            self._seal.seal(frame.key, frame.header, frame.payload)
        _require_ok(self._tier.store(frames))

    def _load(self, indices: range) -> None:
        frames = self._frames(indices)
        _require_ok(self._tier.load(frames))
        for frame in frames:
            self._seal.verify(frame.key, frame.header, frame.payload)

    def _frames(self, indices: range) -> list[Frame]:
        return [
            Frame(
                BlockKey(self._stored.to_bytes(16, "little") + index.to_bytes(16, "little")),
                self._headers[index],
                self.slots[index],
            )
            for index in indices
        ]


class _RawSide(_Side):
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
    context = TierContext(
        name="disk",
        layout=layout,
        fingerprint=FINGERPRINT,
        instance="",
        on_removed=lambda keys: None,
        make_eviction_policy=registry.eviction_policy,
        logger=logging.getLogger(__name__),
    )
    return tier_type.create(typed_options(tier_type, raw_options, "tiers[0]"), context)


def _require_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise BenchSkipped(
            f"{directory} has {format_bytes(free)} free, the measurement needs {format_bytes(needed)}; "
            "give --path on a larger disk"
        )


def _require_ok(outcomes: Sequence[Outcome]) -> None:
    if any(outcome is not Outcome.OK for outcome in outcomes):
        raise BenchSkipped(f"the disk tier answered {[outcome.value for outcome in outcomes]}")


DISK = BenchCase("disk", "the disk tier, checksums included, against raw O_DIRECT", _measure)
