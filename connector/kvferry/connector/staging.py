"""Staging: engine pages to arena slots and back. What it promises, and how it is done on the host, by strided copies.

Two descriptions meet here: an engine's pages as byte strides (``PageLayout``) and the canonical block
(``BlockLayout``). Both are turned into numpy views once, at construction; a copy is then one
``np.copyto`` per page and group of evenly spaced layers, with no loop over layers, heads or tokens.
Neighbouring dimensions that are contiguous on both sides are merged, and what remains contiguous is
moved as one opaque element, so the innermost copy is as long as the two layouts allow. Pages that the engine packs
in an order of its own are another matter (``packed``).

A ``HostStaging`` holds no mutable state: threads may copy different blocks at the same time, and
numpy releases the GIL while it copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.packed import PackedRuns

__all__ = ["BatchBounds", "Bytes", "Copies", "HostStaging", "PageIds", "SlotIds", "Staging"]

Bytes = npt.NDArray[np.uint8]
PageIds = npt.NDArray[np.int32]
SlotIds = npt.NDArray[np.int64]


class _Dim(NamedTuple):
    """One dimension of a copy: how many steps, and how far each goes on either side, in bytes."""

    size: int
    page_stride: int
    slot_stride: int


class _LayerGroup(NamedTuple):
    """Evenly spaced layers, copied together."""

    pages: npt.NDArray[Any]
    """The engine's memory as ``[page, *shape]``; of packed pages as ``[page, head, layer, k_or_v, half_bytes]``."""
    slot_offset: int
    """Byte of a slot at which the group's first page begins."""
    shape: tuple[int, ...]
    """Of one page in a slot."""
    slot_strides: tuple[int, ...]


class Copies(Protocol):
    """Copies in one direction, many blocks at a time: of a ``Staging``.

    A batch is ``page_ids`` ``[blocks, pages_per_block]`` int32 and ``slots`` ``[blocks]`` int64. ``page_ids[i, j]`` is
    the engine's page with the tokens of page j of the block in slot ``slots[i]``. A negative id means: not this page
    of the block; its bytes are left alone on either side. So are a slot's bytes of other shards.

    Used by one thread at a time.
    """

    def wait(self, mark: object) -> None:
        """Have all later copies come after a ``Staging.mark``."""

    def copy(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy blocks. They may still be under way when this returns, and those of several calls are in no order.

        A call that raises LayoutError has copied nothing. After any other error ``finish`` comes first.

        Args:
            page_ids: See the class. Where pages are written, each at most once.
            slots: Those of the blocks. Where slots are written, each at most once.
            arena: All slots, ``[slots, slot_bytes]`` uint8, contiguous; stays mapped until ``Staging.detach``.

        Raises:
            LayoutError: Ids or slots that do not exist, or arrays of other shapes or types.
            DeviceError: A GPU refused.
        """

    def finish(self) -> None:
        """Wait until all copies so far, also after an error, are complete and visible to everybody."""


class Staging(Protocol):
    """Copies one rank's shard of blocks between engine pages and the slots of an arena.

    Each direction has a thread of its own, and both go on at once. Until a direction has been finished, nothing that it
    writes may be read or written by another copy of either direction.

    ``mark`` is called on the engine's thread.
    """

    @property
    def pages_per_block(self) -> int:
        """Engine pages that make up one block."""

    @property
    def gathers(self) -> Copies:
        """Copies blocks out of the engine's pages into slots."""

    @property
    def scatters(self) -> Copies:
        """Copies blocks out of slots into the engine's pages."""

    def mark(self) -> object:
        """Return a point in the engine's work that copies submitted now must come after."""

    def detach(self, arena: Bytes) -> None:
        """Let go of an arena, which is about to be unmapped. No copy from or to it may be under way."""

    def close(self) -> None:
        """Let go of everything. Idempotent; neither direction's thread may be at work."""


class BatchBounds(NamedTuple):
    """What the ids of a batch must stay within."""

    num_pages: int
    pages_per_block: int
    payload_bytes: int

    @classmethod
    def of(cls, pages: PageLayout, block: BlockLayout) -> Self:
        """Return those of batches between such pages and whole blocks."""
        return cls(pages.num_pages, block.block_tokens // pages.page_tokens, block.payload_bytes)

    def check_gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Raise LayoutError unless this is a batch of pages and slots that exist, and no slot is written twice."""
        self._check(page_ids, slots, arena)
        _check_distinct("slot", slots)

    def check_scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Raise LayoutError unless this is a batch of pages and slots that exist, and no page is written twice."""
        self._check(page_ids, slots, arena)
        _check_distinct("page", page_ids[page_ids >= 0])

    def _check(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        if page_ids.dtype != np.int32 or slots.dtype != np.int64 or arena.dtype != np.uint8:
            raise LayoutError(
                f"page ids, slots and arena are int32, int64 and uint8, not {page_ids.dtype}, "
                f"{slots.dtype} and {arena.dtype}"
            )
        if slots.ndim != 1 or page_ids.shape != (slots.size, self.pages_per_block):
            raise LayoutError(
                f"{slots.shape} slots do not go with {page_ids.shape} pages: a block has {self.pages_per_block} pages"
            )
        if arena.ndim != 2 or not arena.flags.c_contiguous:
            raise LayoutError("the slots must be given as contiguous [slots, slot_bytes]")
        if arena.shape[1] < self.payload_bytes:
            raise LayoutError(f"a slot of {arena.shape[1]} bytes cannot hold a block of {self.payload_bytes}")
        if not slots.size:
            return
        if page_ids.max() >= self.num_pages:
            raise LayoutError(f"page {page_ids.max()} is outside the engine's {self.num_pages} pages")
        if slots.min() < 0 or slots.max() >= len(arena):
            raise LayoutError(f"slots {slots.min()} to {slots.max()} are outside the arena's {len(arena)}")


def _check_distinct(what: str, ids: PageIds | SlotIds) -> None:
    if ids.size > 1:
        in_order = np.sort(ids)
        twice = in_order[1:][in_order[1:] == in_order[:-1]]
        if twice.size:
            raise LayoutError(f"{what} {twice[0]} is written twice by one batch")


class _PlainRuns:
    """Copies what lies in the same order on both sides; see ``PackedRuns`` for what does not."""

    def unpack(self, in_pages: npt.NDArray[Any], in_slot: npt.NDArray[Any]) -> None:
        np.copyto(in_slot, in_pages)

    def pack(self, in_slot: npt.NDArray[Any], in_pages: npt.NDArray[Any]) -> None:
        np.copyto(in_pages, in_slot)


class _Complete:
    """A direction whose copies are complete when they return, of an engine that works only in between."""

    def __init__(self, copy: Callable[[PageIds, SlotIds, Bytes], None]) -> None:
        self._copy = copy

    def wait(self, mark: object) -> None:
        pass

    def copy(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._copy(page_ids, slots, arena)

    def finish(self) -> None:
        pass


class HostStaging:
    """Copies one rank's shard of blocks between engine pages in host memory and arena slots: see ``Staging``.

    The engine's own work on such pages is over whenever it calls, and copies are complete when they return, so there
    is nothing to wait for.

    Args:
        pages: The engine's KV memory, 1-D uint8, a view and not a copy; kept for the object's life.
        page_layout: Where in ``pages`` every vector lies.
        block: Geometry of the canonical block.
        shard: Which heads of the block this rank owns.

    Raises:
        LayoutError: The three do not fit together, or ``pages`` is too short.
    """

    def __init__(self, pages: Bytes, page_layout: PageLayout, block: BlockLayout, shard: Shard) -> None:
        page_layout.check(block, shard)
        _check_pages(pages, page_layout)
        self._bounds = BatchBounds.of(page_layout, block)
        self._page_step = page_layout.page_tokens * block.token_bytes
        self._runs = PackedRuns(page_layout) if page_layout.packing else _PlainRuns()
        group = _packed_group if page_layout.packing else _layer_group
        even = _even_runs(page_layout.layer_offsets)
        self._groups = [group(pages, page_layout, block, shard, *run) for run in even]

    @property
    def pages_per_block(self) -> int:
        """Engine pages that make up one block."""
        return self._bounds.pages_per_block

    @property
    def gathers(self) -> Copies:
        """``gather``, as a direction of a ``Staging``."""
        return _Complete(self.gather)

    @property
    def scatters(self) -> Copies:
        """``scatter``, as a direction of a ``Staging``."""
        return _Complete(self.scatter)

    def mark(self) -> object:
        """Return nothing of use: the engine's work is over."""
        return None

    def gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy blocks out of the engine's pages into slots. Blocks until they are there."""
        self._bounds.check_gather(page_ids, slots, arena)
        for in_pages, in_slot in self._pairs(page_ids, slots, arena):
            self._runs.unpack(in_pages, in_slot)

    def scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy blocks out of slots into the engine's pages. Blocks until they are there."""
        self._bounds.check_scatter(page_ids, slots, arena)
        for in_pages, in_slot in self._pairs(page_ids, slots, arena):
            self._runs.pack(in_slot, in_pages)

    def detach(self, arena: Bytes) -> None:
        """Do nothing: no arena is held."""

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def _pairs(
        self, page_ids: PageIds, slots: SlotIds, arena: Bytes
    ) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Yield the same bytes in the engine's memory and in a slot, a page of a group of layers at a time."""
        rows, indices = np.nonzero(page_ids >= 0)
        pages = page_ids[rows, indices].tolist()
        offsets = (slots[rows] * arena.shape[1] + indices * self._page_step).tolist()
        for group in self._groups:
            element = group.pages.dtype
            for page, offset in zip(pages, offsets, strict=True):
                at = offset + group.slot_offset
                in_slot: npt.NDArray[Any] = np.ndarray(group.shape, element, arena, at, group.slot_strides)
                yield group.pages[page, ...], in_slot


def _check_pages(pages: Bytes, layout: PageLayout) -> None:
    if pages.ndim != 1 or pages.dtype != np.uint8 or not pages.flags.c_contiguous:
        raise LayoutError("the engine's memory must be given as contiguous one-dimensional uint8")
    strides = (layout.page_stride, layout.head_stride, layout.token_stride, layout.kv_stride)
    if min(*strides, *layout.layer_offsets) < 0:
        raise LayoutError(f"page strides and layer offsets must not be negative: {layout}")
    if layout.extent_bytes() > pages.nbytes:
        raise LayoutError(
            f"the pages span {layout.extent_bytes()} bytes, the engine's memory has {pages.nbytes}"
        )


def _even_runs(offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Split layers into (first, count) runs whose offsets are evenly spaced and ascending."""
    runs: list[tuple[int, int]] = []
    first = 0
    while first < len(offsets):
        count = 1
        if first + 1 < len(offsets) and offsets[first + 1] >= offsets[first]:
            step = offsets[first + 1] - offsets[first]
            while (
                first + count < len(offsets) and offsets[first + count] - offsets[first + count - 1] == step
            ):
                count += 1
        runs.append((first, count))
        first += count
    return runs


def _layer_group(
    pages: Bytes, layout: PageLayout, block: BlockLayout, shard: Shard, first: int, count: int
) -> _LayerGroup:
    *outer, run = _merge(
        [
            _Dim(layout.num_heads, layout.head_stride, block.num_layers * block.run_bytes),
            _Dim(count, _layer_stride(layout, first, count), block.run_bytes),
            _Dim(layout.page_tokens, layout.token_stride, block.token_bytes),
            _Dim(layout.kv_factor, layout.kv_stride, layout.head_bytes),
            _Dim(layout.head_bytes, 1, 1),
        ]
    )
    shape = tuple(dim.size for dim in outer)
    element: np.dtype[Any] = np.dtype((np.void, run.size))
    return _LayerGroup(
        pages=np.ndarray(
            (layout.num_pages, *shape),
            element,
            buffer=pages,
            offset=layout.layer_offsets[first],
            strides=(layout.page_stride, *(dim.page_stride for dim in outer)),
        ),
        slot_offset=_slot_offset(block, shard, first),
        shape=shape,
        slot_strides=tuple(dim.slot_stride for dim in outer),
    )


def _packed_group(
    pages: Bytes, layout: PageLayout, block: BlockLayout, shard: Shard, first: int, count: int
) -> _LayerGroup:
    half_bytes = layout.page_tokens * layout.head_bytes
    return _LayerGroup(
        pages=np.ndarray(
            (layout.num_pages, layout.num_heads, count, 2, half_bytes),
            np.uint8,
            buffer=pages,
            offset=layout.layer_offsets[first],
            strides=(
                layout.page_stride,
                layout.head_stride,
                _layer_stride(layout, first, count),
                half_bytes,
                1,
            ),
        ),
        slot_offset=_slot_offset(block, shard, first),
        shape=(layout.num_heads, count, layout.page_tokens, 2, layout.head_bytes),
        slot_strides=(
            block.num_layers * block.run_bytes,
            block.run_bytes,
            block.token_bytes,
            layout.head_bytes,
            1,
        ),
    )


def _layer_stride(layout: PageLayout, first: int, count: int) -> int:
    return layout.layer_offsets[first + 1] - layout.layer_offsets[first] if count > 1 else 0


def _slot_offset(block: BlockLayout, shard: Shard, first_layer: int) -> int:
    return (shard.first_head * block.num_layers + first_layer) * block.run_bytes


def _merge(dims: Sequence[_Dim]) -> list[_Dim]:
    """Drop dimensions of one step and join neighbours that are contiguous on both sides.

    The last of the result is always the contiguous run: stride 1 on both sides.
    """
    merged = [dims[-1]]
    for dim in reversed(dims[:-1]):
        inner = merged[0]
        if dim.size == 1:
            continue
        if (dim.page_stride, dim.slot_stride) == (
            inner.size * inner.page_stride,
            inner.size * inner.slot_stride,
        ):
            merged[0] = _Dim(dim.size * inner.size, inner.page_stride, inner.slot_stride)
        else:
            merged.insert(0, dim)
    return merged
