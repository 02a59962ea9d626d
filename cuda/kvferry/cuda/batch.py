"""Direct DMA: every run of a page goes by itself, straight between the engine's pages and the slots.

Nothing runs on the GPU's multiprocessors and no device memory is needed, but each run is a copy of its own. So this is
the way where pages are long runs (``CopyGeometry.runs_per_page`` is small), and the only one without a compiler.

Where the driver copies many pieces in one call (``cuMemcpyBatchAsync``), they are handed over as arrays of addresses,
worked out for a whole batch at once; elsewhere each costs a call. Which of the two is the ``CopyCall``.

Each direction has a stream, the one of loads is urgent. Nothing is common to both but what never changes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvferry.connector.staging import PageIds
from kvferry.cuda.driver import Addresses, Device, Event, Stream, wait_for_all
from kvferry.cuda.geometry import CopyGeometry
from kvferry.cuda.staging import PathCopies

__all__ = ["CopyCall", "DirectPath", "copy_batch", "copy_each"]

CopyCall = Callable[[Stream, Addresses, Addresses, Addresses], None]
"""``call(stream, targets, sources, sizes)``: how contiguous pieces are copied."""

_MOST_COPIES = 1 << 16
"""Handed to the driver at once: bounds the arrays of addresses to a few MiB."""


def copy_each(stream: Stream, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
    """Copy pieces with a call of the driver for each."""
    stream.copy_each(targets, sources, sizes)


def copy_batch(stream: Stream, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
    """Copy pieces with one call of the driver; only where the device ``has_batch_copies``."""
    stream.copy_batch(targets, sources, sizes)


class DirectPath:
    """Moves shards without a kernel: a ``CopyPath`` of ``DeviceStaging``.

    Args:
        device: Where the pages are.
        pages: Address of the engine's memory.
        geometry: How a page is copied.
        copy: How pieces are handed to the driver.

    Raises:
        DeviceError: There is no stream to be had.
    """

    def __init__(self, device: Device, pages: int, geometry: CopyGeometry, copy: CopyCall) -> None:
        runs = _Runs(pages, geometry)
        self.gathers: PathCopies = _Gathers(runs, copy, device.stream(is_urgent=False), device.event())
        self.scatters: PathCopies = _Scatters(runs, copy, device.stream(is_urgent=True), device.event())

    def close(self) -> None:
        """Do nothing: streams go with their last reference."""


class _Runs:
    """Where every run of a page and of a shard lies."""

    def __init__(self, pages: int, geometry: CopyGeometry) -> None:
        self._pages = pages
        self._geometry = geometry
        self._in_page, self._in_shard = geometry.runs()
        self.nbytes = geometry.run_bytes

    def pairs(self, page_ids: PageIds, shards: Addresses) -> tuple[Addresses, Addresses]:
        """Return where the runs of a batch lie on either side: addresses in pages and in shards."""
        rows, indices = np.nonzero(page_ids >= 0)
        pages = self._pages + page_ids[rows, indices].astype(np.int64) * self._geometry.page_stride
        in_block = shards[rows].astype(np.int64) + indices * self._geometry.page_shard_stride
        in_pages = np.add.outer(pages, self._in_page).ravel()
        in_shards = np.add.outer(in_block, self._in_shard).ravel()
        return in_pages.view(np.uint64), in_shards.view(np.uint64)


class _Direction:
    """What both directions have in common."""

    def __init__(self, runs: _Runs, copy: CopyCall, stream: Stream, end: Event) -> None:
        self._runs = runs
        self._copy = copy
        self._stream = stream
        self._end = end

    def wait(self, mark: Event) -> None:
        self._stream.wait(mark)

    def finish(self) -> None:
        wait_for_all((self._stream,), self._end)

    def _queue(self, targets: Addresses, sources: Addresses) -> None:
        sizes = np.full(min(len(targets), _MOST_COPIES), self._runs.nbytes, np.uint64)
        for start in range(0, len(targets), _MOST_COPIES):
            some = targets[start : start + _MOST_COPIES]
            self._copy(self._stream, some, sources[start : start + _MOST_COPIES], sizes[: len(some)])


class _Gathers(_Direction):
    def copy(self, page_ids: PageIds, shards: Addresses) -> None:
        in_pages, in_shards = self._runs.pairs(page_ids, shards)
        self._queue(in_shards, in_pages)


class _Scatters(_Direction):
    def copy(self, page_ids: PageIds, shards: Addresses) -> None:
        in_pages, in_shards = self._runs.pairs(page_ids, shards)
        self._queue(in_pages, in_shards)
