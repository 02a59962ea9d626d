"""The disk tier at work: frames in and out of slabs, the index as the only truth.

How a block is stored: its key is announced, a record is reserved (a free one, one of a new slab, or an
evicted block's), the frame is written, the index transaction commits, the block becomes visible. A
process killed anywhere before the transaction leaves the record free; after it, the block is whole.
An evicted block leaves the index, in a transaction of its own, before its record is written again.

Who owns what
  * ``_lock`` guards ``_records`` and the counters, never across I/O or an index transaction.
  * ``_changed`` (on the same lock) is notified when announced keys are settled.
  * ``_gate`` counts the calls under way; what ``close`` releases is used by nobody by then.
  * ``_growth`` is held by the one thread that adds a slab.
  * A reserved record belongs to the call that reserved it; a pinned one is nobody's to write.
  * ``index`` and ``slabs`` bring their own thread-safety. There are no threads here: callers bring them.

A batch counts as used last block to first, so that the eviction policy drops a prefix's tail before its
head, without which the tail is of no use.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvferry.connector.errors import LayoutError, TierUnavailable, short_key
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Capabilities, Frame, Outcome, TierContext, TierStats
from kvferry.plugins.disk.directory import Directory
from kvferry.plugins.disk.gate import Gate
from kvferry.plugins.disk.index import Index, IndexFull
from kvferry.plugins.disk.options import INDEX_BATCH, DiskOptions, Geometry
from kvferry.plugins.disk.records import Census, Records
from kvferry.plugins.disk.slabs import Slabs, Truncated, record_of, whole_sectors

__all__ = ["DiskTier"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_GROW_AGAIN_S = 30.0
_EVICT_AHEAD = 128
"""One part in so many of the records is evicted ahead, to share the eviction's transaction."""
_OTHER_STORE_S = 30.0
_CLOSE_S = 30.0


class DiskTier:
    """Blocks on a local filesystem; see the module docstring. Made by ``opening.open_disk_tier``.

    Args:
        options: The operator's options.
        context: What kvferry gave the tier.
        geometry: Sizes that follow from the two.
        directory: Locked by this process; owned by the tier from now on, like the next three.
        index: The index; consistent with ``records``.
        slabs: The slab files.
        records: All records of the slabs.
    """

    def __init__(
        self,
        options: DiskOptions,
        context: TierContext,
        geometry: Geometry,
        directory: Directory,
        index: Index,
        slabs: Slabs,
        records: Records,
    ) -> None:
        self._options = options
        self._context = context
        self._geometry = geometry
        self._directory = directory
        self._index = index
        self._slabs = slabs
        self._records = records
        self._gate = Gate(context.name)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._growth = threading.Lock()
        self._grow_again_at = 0.0
        self._reported: set[object] = set()

    @property
    def capabilities(self) -> Capabilities:
        """Persistent, private to this process, bounded."""
        return Capabilities(is_persistent=True, is_shared=False, is_bounded=True)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Tell for each key whether it is held. Does not block on I/O."""
        with self._gate, self._lock:
            return [key in self._records for key in keys]

    def scan(self) -> Iterator[BlockKey]:
        """Yield the keys held when called, least recently stored first."""
        with self._gate, self._lock:
            return iter(list(self._records))

    def stats(self) -> TierStats:
        """Return the current size."""
        with self._gate, self._lock:
            return TierStats(
                blocks=len(self._records),
                used_bytes=len(self._records) * self._geometry.record_bytes,
                capacity_bytes=self._options.capacity,
                evictions=self._records.evictions,
            )

    def census(self) -> Census:
        """Count the records by state: they always add up to the records of all slabs."""
        with self._gate, self._lock:
            return self._records.census()

    # ---- load

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Read the blocks into the frames' buffers. Blocks on the disk; nothing is verified."""
        with self._gate:
            self._check_buffers(into)
            with self._lock:
                pinned = [self._records.pin(frame.key) for frame in reversed(into)]
            pinned.reverse()
            lost: dict[BlockKey, int] = {}
            broken: dict[BlockKey, int] = {}
            try:
                outcomes = [
                    self._read(frame, record, lost, broken)
                    for frame, record in zip(into, pinned, strict=True)
                ]
            finally:
                with self._lock:
                    for record in pinned:
                        if record is not None:
                            self._records.unpin(record)
            if lost or broken:
                self._drop(lost, is_bad=False)
                self._drop(broken, is_bad=True)
            return outcomes

    def _read(
        self, frame: Frame, record: int | None, lost: dict[BlockKey, int], broken: dict[BlockKey, int]
    ) -> Outcome:
        if record is None:
            return Outcome.MISSING
        try:
            self._slabs.read(record, frame.header, frame.payload)
        except Truncated:
            self._report(
                "truncated", f"block {short_key(frame.key)} lies beyond the end of its slab; dropped"
            )
            lost[frame.key] = record
            return Outcome.MISSING
        except OSError as error:
            self._report(error.errno, f"block {short_key(frame.key)} cannot be read: {error.strerror}")
            if error.errno == errno.EIO:
                broken[frame.key] = record
            return Outcome.FAILED
        return Outcome.OK

    def _drop(self, records: Mapping[BlockKey, int], *, is_bad: bool) -> None:
        """Remove blocks whose records turned out unreadable."""
        with self._lock:
            gone = [
                (key, record)
                for key, record in records.items()
                if self._records.remove(key, only=record) is not None
            ]
        self._forget(gone, is_bad=is_bad)
        if gone:
            self._context.on_removed([key for key, _ in gone])

    # ---- store

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Write frames and commit them, in one index transaction per ``INDEX_BATCH``. Blocks on the disk.

        A key that another call is storing meanwhile is waited for, not written twice.
        """
        with self._gate:
            self._check_buffers(frames)
            outcomes: list[Outcome] = []
            for start in range(0, len(frames), INDEX_BATCH):
                outcomes += self._store_batch(frames[start : start + INDEX_BATCH])
            return outcomes

    def _store_batch(self, frames: Sequence[Frame]) -> list[Outcome]:
        with self._lock:
            results = {frame.key: Outcome.OK for frame in frames if frame.key in self._records}
            mine = {frame.key: frame for frame in frames if self._records.announce(frame.key)}
        broken: set[BlockKey] = set()
        visible: list[tuple[BlockKey, int]] = []
        try:
            placed = self._place(list(mine))
            for key, frame in mine.items():
                results[key] = self._write(frame, placed[key], broken) if key in placed else Outcome.NO_ROOM
            visible = self._commit(
                [(key, placed[key]) for key in reversed(mine) if results[key] is Outcome.OK]
            )
        finally:
            self._settle(reversed(mine), {key for key, _ in visible}, broken)
        if not visible:
            results |= {key: Outcome.NO_ROOM for key in mine if results[key] is Outcome.OK}
        return self._await_others([frame.key for frame in frames], results)

    def _place(self, keys: Sequence[BlockKey]) -> dict[BlockKey, int]:
        """Reserve a record for as many of the announced ``keys`` as possible."""
        placed = self._reserve(keys)
        while len(placed) < len(keys) and self._grow():
            placed = self._reserve(keys)
        if len(placed) < len(keys):
            self._evict(len(keys) - len(placed), keys)
            placed = self._reserve(keys)
        return placed

    def _reserve(self, keys: Sequence[BlockKey]) -> dict[BlockKey, int]:
        with self._lock:
            reserved = {key: self._records.reserve(key) for key in keys}
        return {key: record for key, record in reserved.items() if record is not None}

    def _grow(self) -> bool:
        """Add a slab while the capacity allows; False when there is nothing to be had that way."""
        with self._growth:
            with self._lock:
                if self._records.has_free():
                    return True
            left = self._geometry.record_count - sum(self._slabs.sizes.values())
            if left <= 0 or time.monotonic() < self._grow_again_at:
                return False
            count = min(left, self._geometry.slab_records)
            try:
                slab = self._slabs.grow(count)
            except OSError as error:
                self._grow_again_at = time.monotonic() + _GROW_AGAIN_S
                self._report(("grow", error.errno), f"no further slab can be added: {error.strerror}")
                return False
            with self._lock:
                self._records.add_free([record_of(slab, position) for position in range(count)])
            return True

    def _evict(self, count: int, keys: Sequence[BlockKey]) -> None:
        """Evict ``count`` blocks, and a few ahead, and give their records to the announced ``keys``."""
        ahead = self._geometry.record_count // _EVICT_AHEAD
        with self._lock:
            victims = self._records.evict(min(count + ahead, INDEX_BATCH))
        if not victims:
            return
        self._update_index(removed=victims)
        with self._lock:
            for _, record in victims:
                self._records.settle(record)
            for key in keys:
                self._records.reserve(key)
        self._context.on_removed([key for key, _ in victims])

    def _write(self, frame: Frame, record: int, broken: set[BlockKey]) -> Outcome:
        try:
            self._slabs.write(record, frame.header, frame.payload[: whole_sectors(frame.length)])
        except OSError as error:
            self._report(error.errno, f"block {short_key(frame.key)} cannot be written: {error.strerror}")
            if error.errno == errno.EIO:
                broken.add(frame.key)
            return Outcome.NO_ROOM if error.errno in _FULL else Outcome.FAILED
        return Outcome.OK

    def _commit(self, written: list[tuple[BlockKey, int]]) -> list[tuple[BlockKey, int]]:
        """Make written blocks exist: all, or none when the index found no room."""
        if not written:
            return []
        try:
            if self._options.sync:
                self._slabs.sync(record for _, record in written)
            self._index.update(written)
        except IndexFull as error:
            self._report("index", f"the index has no room: {error}")
            return []
        except OSError as error:
            raise TierUnavailable(
                self._context.name,
                f"{self._directory.path} cannot be flushed: {error.strerror}",
                "check the disk",
            ) from error
        return written

    def _settle(self, mine: Iterable[BlockKey], visible: set[BlockKey], broken: set[BlockKey]) -> None:
        """End the storing of ``mine``: visible, or given up."""
        with self._changed:
            for key in mine:
                if key in visible:
                    self._records.publish(key)
                else:
                    self._records.withdraw(key, is_bad=key in broken)
            self._changed.notify_all()

    def _await_others(self, keys: Sequence[BlockKey], results: dict[BlockKey, Outcome]) -> list[Outcome]:
        """Complete ``results`` with the keys that other calls are storing."""
        others = [key for key in keys if key not in results]
        if others:
            with self._changed:
                self._changed.wait_for(
                    lambda: not any(map(self._records.is_announced, others)), _OTHER_STORE_S
                )
                for key in others:
                    results[key] = Outcome.OK if key in self._records else Outcome.FAILED
        return [results[key] for key in keys]

    # ---- delete

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget the keys, in one index transaction per ``INDEX_BATCH``."""
        with self._gate:
            for start in range(0, len(keys), INDEX_BATCH):
                with self._lock:
                    removed = [(key, self._records.remove(key)) for key in keys[start : start + INDEX_BATCH]]
                self._forget([(key, record) for key, record in removed if record is not None])

    def _forget(self, removed: Sequence[tuple[BlockKey, int]], *, is_bad: bool = False) -> None:
        """Tell the index that blocks are gone, then let go of their records."""
        if not removed:
            return
        self._update_index(removed)
        with self._lock:
            for _, record in removed:
                self._records.settle(record, is_bad=is_bad)

    def _update_index(self, removed: Sequence[tuple[BlockKey, int]]) -> None:
        """Remove blocks from the index; they are reinstated when that fails."""
        try:
            self._index.update((), removed)
        except (IndexFull, TierUnavailable) as error:
            with self._lock:
                for key, record in removed:
                    self._records.reinstate(key, record)
            if isinstance(error, TierUnavailable):
                raise
            raise TierUnavailable(
                self._context.name, f"the index has no room: {error}", "make room"
            ) from error

    # ---- life

    def close(self) -> None:
        """Wait for calls under way, put everything on the medium, mark the directory clean.

        Raises:
            TierTimeout: Calls are still under way; nothing was released, and close may be tried again.
        """
        if not self._gate.close(_CLOSE_S):
            return
        is_clean = False
        try:
            self._slabs.sync()
            self._index.close()
            is_clean = True
        except (OSError, TierUnavailable) as error:
            self._report("close", f"{self._directory.path} could not be flushed: {error}")
        finally:
            self._slabs.close()
            self._directory.release(is_clean=is_clean)

    def _check_buffers(self, frames: Sequence[Frame]) -> None:
        slot_bytes = self._context.layout.slot_bytes
        for frame in frames:
            if len(frame.header) != HEADER_BYTES or len(frame.payload) != slot_bytes:
                raise LayoutError(
                    f"tier {self._context.name!r} block {short_key(frame.key)}: buffers of {len(frame.header)} and "
                    f"{len(frame.payload)} bytes, not {HEADER_BYTES} and {slot_bytes}"
                )

    def _report(self, cause: object, message: str) -> None:
        """Log the first of each kind of trouble; outcomes count the rest."""
        with self._lock:
            is_new = cause not in self._reported
            self._reported.add(cause)
        if is_new:
            self._context.logger.warning("tier %r: %s", self._context.name, message)
