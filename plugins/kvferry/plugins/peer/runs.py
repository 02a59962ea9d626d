"""Which bytes a read copies: the longest runs that both sides keep together, as descriptors with a stride per page.

A *run* is a number of contiguous bytes of one page that lie contiguous on the other side too: at best everything the
page holds of a layer, at worst one K or V vector. Every page has the same runs at the same distance, so a descriptor
names all pages at once, and nothing here grows with the number of pages an engine has. A *row* is one run's
descriptor; the transfer's index of row r and page p is ``r * num_pages + p``.

Values only: no I/O, usable from any thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.connector.errors import HandoffFailed, LayoutError
from kvferry.connector.layout import PageLayout, Shard
from kvferry.connector.transport import Heads, PageIds, narrow

__all__ = ["Runs", "Side", "batches", "check_pages", "common_heads", "common_runs"]

MAX_INDEX = 1 << 31
"""NIXL's indices are 32 bits wide."""

Offsets = npt.NDArray[np.int64]
Rows = npt.NDArray[np.uint64]


class Side(msgspec.Struct, frozen=True):
    """Where one side keeps the runs."""

    offsets: Offsets
    """Of each run in page 0, in bytes from the base. ``[rows]``"""
    page_stride: int
    num_pages: int

    def rows(self, part: slice, run_bytes: int, address: int, device_id: int) -> Rows:
        """Return some rows as NIXL takes them: ``[rows, (address, length, device, stride, count)]``."""
        offsets = self.offsets[part]
        rows = np.empty((len(offsets), 5), np.uint64)
        rows[:, 0] = np.uint64(address) + offsets.astype(np.uint64)
        rows[:, 1:] = run_bytes, device_id, self.page_stride, self.num_pages
        return rows


class Runs(msgspec.Struct, frozen=True):
    """The runs of one page, the same number and length on both sides."""

    run_bytes: int
    own: Side
    remote: Side

    @property
    def page_bytes(self) -> int:
        """Bytes that are copied for each page."""
        return len(self.own.offsets) * self.run_bytes

    def parts(self) -> list[slice]:
        """Split the rows so that indices into each part fit NIXL's; one part for all but giants."""
        most_pages = max(self.own.num_pages, self.remote.num_pages)
        size = (MAX_INDEX - 1) // most_pages
        if not size:
            raise LayoutError(f"NIXL cannot number {most_pages} pages")
        count = len(self.own.offsets)
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def common_heads(one: Shard, other: Shard) -> Heads:
    """Return the heads that both ranks hold.

    Raises:
        LayoutError: There are none.
    """
    first = max(one.first_head, other.first_head)
    end = min(one.first_head + one.num_heads, other.first_head + other.num_heads)
    if end <= first:
        raise LayoutError(f"{one} and {other} have no head in common")
    return Heads(first, end - first)


def common_runs(
    own: PageLayout, own_shard: Shard, remote: PageLayout, remote_shard: Shard, heads: Heads
) -> Runs:
    """Return the longest runs of ``heads`` that both layouts keep together.

    Args:
        own: This side's pages, checked.
        own_shard: Whose they are.
        remote: The other side's, as many layers and tokens and as large vectors.
        remote_shard: Whose they are.
        heads: Which heads are copied; both have them.

    Raises:
        LayoutError: A rank does not hold all of the heads, or pages overlap.
    """
    sides = narrow(own, own_shard, heads), narrow(remote, remote_shard, heads)
    axes = _axes(sides)
    run_bytes = own.head_bytes
    while whole := next((axis for axis in axes if axis.is_dense(run_bytes)), None):
        axes.remove(whole)
        run_bytes *= whole.size
    if any(side.page_stride < run_bytes and side.num_pages > 1 for side in sides):
        raise LayoutError("pages overlap")
    # The side that is read decides the order: descriptors that meet there have a chance to become one.
    axes.sort(key=lambda axis: int(np.abs(axis.offsets[1]).max()), reverse=True)
    ours, theirs = (
        Side(_sum([axis.offsets[index] for axis in axes]), max(side.page_stride, run_bytes), side.num_pages)
        for index, side in enumerate(sides)
    )
    return Runs(run_bytes, ours, theirs)


def check_pages(runs: Runs, remote_pages: PageIds, local_pages: PageIds) -> None:
    """Raise HandoffFailed (``transport``) unless these pages exist and none is written twice."""
    if remote_pages.shape != local_pages.shape or local_pages.ndim != 1:
        raise HandoffFailed("transport", f"{len(remote_pages)} pages cannot be read into {len(local_pages)}")
    if not remote_pages.dtype == local_pages.dtype == np.int32:
        raise HandoffFailed("transport", "page ids have 32 bits")
    # Python's own loops: as little as they are, calls into numpy take longer after a read has emptied the caches.
    theirs, ours = remote_pages.tolist(), local_pages.tolist()
    for what, pages, side in (("remote", theirs, runs.remote), ("own", ours, runs.own)):
        if pages and not 0 <= min(pages) <= max(pages) < side.num_pages:
            raise HandoffFailed("transport", f"{what} page ids are outside the {side.num_pages} pages there")
    if len(set(ours)) != len(ours):
        raise HandoffFailed("transport", "an own page was named twice")


def batches(
    runs: Runs, part: slice, remote_pages: PageIds, local_pages: PageIds, most: int
) -> Iterator[tuple[PageIds, PageIds]]:
    """Yield own and remote indices of every run of these pages, at most ``most`` at a time.

    A run's pages follow one another, so that neighbours in memory are neighbours in the list.
    """
    pages = len(local_pages)
    if not pages:
        return
    step = max(1, most // pages)
    for first in range(0, part.stop - part.start, step):
        rows = np.arange(first, min(first + step, part.stop - part.start), dtype=np.int32)[:, None]
        for page in range(0, pages, most):
            own = rows * np.int32(runs.own.num_pages) + local_pages[page : page + most]
            remote = rows * np.int32(runs.remote.num_pages) + remote_pages[page : page + most]
            yield own.ravel(), remote.ravel()


class _Axis:
    """One dimension of a page: how far its steps are from the first, on both sides."""

    def __init__(self, own: Offsets, remote: Offsets) -> None:
        self.offsets = own, remote
        self.size = len(own)

    def is_dense(self, step: int) -> bool:
        """Tell whether both sides keep steps of this many bytes without a gap."""
        expected = np.arange(self.size, dtype=np.int64) * step
        return all(np.array_equal(offsets, expected) for offsets in self.offsets)


def _axes(sides: tuple[PageLayout, PageLayout]) -> list[_Axis]:
    """Return a page's dimensions but those of size 1; the first layer's place is one of its own."""
    own, remote = sides
    firsts = [np.array([side.layer_offsets[0]], np.int64) for side in sides]
    layers = [
        np.array(side.layer_offsets, np.int64) - first for side, first in zip(sides, firsts, strict=True)
    ]
    axes = [_Axis(*layers)]
    for count, own_stride, remote_stride in (
        (own.num_heads, own.head_stride, remote.head_stride),
        (own.page_tokens, own.token_stride, remote.token_stride),
        (own.kv_factor, own.kv_stride, remote.kv_stride),
    ):
        steps = np.arange(count, dtype=np.int64)
        axes.append(_Axis(steps * own_stride, steps * remote_stride))
    return [axis for axis in axes if axis.size > 1] + [_Axis(*firsts)]


def _sum(axes: list[Offsets]) -> Offsets:
    total = np.zeros(1, np.int64)
    for offsets in axes:
        total = np.add.outer(total, offsets).ravel()
    return total
