"""A rank's GPU pages, staged one by one for transports that copy through the host, by ``kvferry.cuda``.

Readers come and go, up to hundreds, each with a thread; what is held of the GPU and of pinned memory must not grow with
them. So all of them share one staging for each range of heads, and take turns: they share the link to the host anyway.
Bytes pass through pinned memory of the range's own, for that of a connection comes and goes, too.

Any thread may call.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kvferry.connector.errors import ClosedError
from kvferry.connector.layout import Shard
from kvferry.connector.staging import BatchBounds, Bytes, PageIds, SlotIds, Staging
from kvferry.connector.transport import Heads, PageStaging, narrow, page_block
from kvferry.cuda.driver import do_all
from kvferry.cuda.staging import DevicePages

__all__ = ["GpuPages"]

_ROOM_BYTES = 1 << 20
"""Pinned for each range of heads, or one page."""
_MOST_RANGES = 16
"""Kept at a time, more than peers of all tensor-parallel sizes ask for together. Beyond it the oldest goes, and giving
its memory back may have the driver wait for the GPU."""


class _Range(NamedTuple):
    staging: Staging
    room: Bytes
    """``[pages, page_bytes]``, known to the GPU from its first use on."""


class GpuPages:
    """Stagings of single pages, made when they are first needed.

    Args:
        pages: The rank's.
        make_staging: Makes a staging of some heads of them, by blocks of one page; may raise DeviceError.
    """

    def __init__(self, pages: DevicePages, make_staging: Callable[[DevicePages], Staging]) -> None:
        self._pages = pages
        self._make_staging = make_staging
        self._lock = threading.Lock()
        self._ranges: dict[Heads, _Range] = {}
        self._is_closed = False

    def stage(self, heads: Heads) -> PageStaging:
        """Return the staging of a range of the rank's heads.

        Raises:
            DeviceError: The GPU has no room for another one, or refused.
            LayoutError: The rank does not hold all of these heads.
            ClosedError: After ``close``.
        """
        with self._lock:
            self._range(heads)
        return _HeadPages(self, heads)

    def gather(self, heads: Heads, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy pages to rows of ``arena``: see ``connector.transport.PageStaging``. Raises as ``stage``."""
        with self._lock:
            staging, room = self._range(heads)
            self._bounds(room).check_gather(page_ids, slots, arena)
            for ids, some, rows in _turns(page_ids, slots, room):
                try:
                    staging.gathers.copy(ids, rows, room)
                finally:
                    staging.gathers.finish()
                arena[some, : room.shape[1]] = room[: len(rows)]

    def scatter(self, heads: Heads, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy rows of ``arena`` over pages. Raises as ``stage``."""
        with self._lock:
            staging, room = self._range(heads)
            self._bounds(room).check_scatter(page_ids, slots, arena)
            for ids, some, rows in _turns(page_ids, slots, room):
                room[: len(rows)] = arena[some, : room.shape[1]]
                try:
                    staging.scatters.copy(ids, rows, room)
                finally:
                    staging.scatters.finish()

    def close(self) -> None:
        """Give everything back. Idempotent; waits for a copy that is under way.

        Raises:
            DeviceError: The first refusal.
        """
        with self._lock:
            self._is_closed = True
            ranges, self._ranges = self._ranges, {}
            do_all(one.staging.close for one in ranges.values())

    def _range(self, heads: Heads) -> _Range:
        if self._is_closed:
            raise ClosedError("the rank's pages are closed")
        if heads not in self._ranges:
            if len(self._ranges) >= _MOST_RANGES:
                self._ranges.pop(next(iter(self._ranges))).staging.close()
            self._ranges[heads] = self._make(heads)
        return self._ranges[heads]

    def _make(self, heads: Heads) -> _Range:
        layout = narrow(self._pages.layout, self._pages.shard, heads)
        block = page_block(self._pages.block, layout.page_tokens, heads)
        own = Shard(0, 0, heads.count, True)
        staging = self._make_staging(self._pages._replace(layout=layout, block=block, shard=own))
        num_pages = max(1, _ROOM_BYTES // block.payload_bytes)
        room = np.frombuffer(mmap.mmap(-1, num_pages * block.payload_bytes), np.uint8)
        return _Range(staging, room.reshape(num_pages, block.payload_bytes))

    def _bounds(self, room: Bytes) -> BatchBounds:
        return BatchBounds(self._pages.layout.num_pages, 1, room.shape[1])


class _HeadPages:
    """A ``PageStaging`` that holds nothing."""

    def __init__(self, pages: GpuPages, heads: Heads) -> None:
        self._pages = pages
        self._heads = heads

    def gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._pages.gather(self._heads, page_ids, slots, arena)

    def scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._pages.scatter(self._heads, page_ids, slots, arena)


def _turns(page_ids: PageIds, slots: SlotIds, room: Bytes) -> Iterator[tuple[PageIds, SlotIds, SlotIds]]:
    """Yield the pages that are not left out, as many as there is room for: their ids, slots, and rows of the room."""
    has_page = page_ids[:, 0] >= 0
    page_ids, slots = page_ids[has_page], slots[has_page]
    for start in range(0, len(slots), len(room)):
        some = slots[start : start + len(room)]
        yield page_ids[start : start + len(room)], some, np.arange(len(some))
