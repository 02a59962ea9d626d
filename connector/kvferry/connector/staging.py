"""Staging on the host: engine pages to arena slots and back, by strided copies.

Two descriptions meet here: an engine's pages as byte strides (``PageLayout``) and the canonical block
(``BlockLayout``). Both are turned into numpy views once, at construction; a copy is then one
``np.copyto`` per page and group of evenly spaced layers, with no loop over layers, heads or tokens.
Neighbouring dimensions that are contiguous on both sides are merged, and what remains contiguous is
moved as one opaque element, so the innermost copy is as long as the two layouts allow.

A ``HostStaging`` holds no mutable state: threads may copy different blocks at the same time, and
numpy releases the GIL while it copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard

__all__ = ["HostStaging"]

Bytes = npt.NDArray[np.uint8]


class _Dim(NamedTuple):
    """One dimension of a copy: how many steps, and how far each goes on either side, in bytes."""

    size: int
    page_stride: int
    slot_stride: int


class _LayerGroup(NamedTuple):
    """Evenly spaced layers, copied together."""

    pages: npt.NDArray[np.void]
    """The engine's memory as ``[page, *shape]``."""
    slot_offset: int
    """Byte of a slot at which the group's first page begins."""
    shape: tuple[int, ...]
    slot_strides: tuple[int, ...]


class HostStaging:
    """Copies one rank's shard of blocks between engine pages and arena slots.

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
        self._num_pages = page_layout.num_pages
        self._pages_per_block = block.block_tokens // page_layout.page_tokens
        self._page_step = page_layout.page_tokens * block.token_bytes
        self._payload_bytes = block.payload_bytes
        self._groups = [
            _layer_group(pages, page_layout, block, shard, first, count)
            for first, count in _even_runs(page_layout.layer_offsets)
        ]

    @property
    def pages_per_block(self) -> int:
        """Engine pages that make up one block."""
        return self._pages_per_block

    def gather(self, page_ids: Sequence[int], slot: memoryview | Bytes) -> None:
        """Copy all pages of a block into the shard's bytes of a slot.

        Args:
            page_ids: The block's pages in token order, ``pages_per_block`` of them.
            slot: At least ``payload_bytes`` writable bytes; bytes of other shards are not touched.

        Raises:
            LayoutError: A wrong number of pages, an id outside the engine's pages, a short slot.
        """
        if len(page_ids) != self._pages_per_block:
            raise LayoutError(f"a block has {self._pages_per_block} pages, not {len(page_ids)}")
        self._check(page_ids, slot)
        for group in self._groups:
            for index, page in enumerate(page_ids):
                np.copyto(self._in_slot(group, slot, index), group.pages[page, ...])

    def scatter(self, slot: memoryview | Bytes, page_ids: Sequence[int], first_page: int = 0) -> None:
        """Copy pages ``first_page`` onwards of a block from a slot into the given engine pages.

        Args:
            slot: At least ``payload_bytes`` bytes.
            page_ids: Where the pages go; may end before the block does.
            first_page: Index within the block of the page that goes to ``page_ids[0]``.

        Raises:
            LayoutError: More pages than the block has, an id outside the engine's pages, a short slot.
        """
        if first_page < 0 or first_page + len(page_ids) > self._pages_per_block:
            raise LayoutError(
                f"pages {first_page} to {first_page + len(page_ids)} are outside a block "
                f"of {self._pages_per_block}"
            )
        self._check(page_ids, slot)
        for group in self._groups:
            for index, page in enumerate(page_ids, first_page):
                np.copyto(group.pages[page, ...], self._in_slot(group, slot, index))

    def _in_slot(self, group: _LayerGroup, slot: memoryview | Bytes, index: int) -> npt.NDArray[np.void]:
        """View page ``index`` of the block in a slot."""
        offset = group.slot_offset + index * self._page_step
        return np.ndarray(
            group.shape, group.pages.dtype, buffer=slot, offset=offset, strides=group.slot_strides
        )

    def _check(self, page_ids: Sequence[int], slot: memoryview | Bytes) -> None:
        for page in page_ids:
            if not 0 <= page < self._num_pages:
                raise LayoutError(f"page {page} is outside the engine's {self._num_pages} pages")
        if slot.nbytes < self._payload_bytes:
            raise LayoutError(f"a slot of {slot.nbytes} bytes cannot hold a block of {self._payload_bytes}")


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
    offset = layout.layer_offsets[first]
    layer_stride = layout.layer_offsets[first + 1] - offset if count > 1 else 0
    *outer, run = _merge(
        [
            _Dim(layout.num_heads, layout.head_stride, block.num_layers * block.run_bytes),
            _Dim(count, layer_stride, block.run_bytes),
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
            offset=offset,
            strides=(layout.page_stride, *(dim.page_stride for dim in outer)),
        ),
        slot_offset=(shard.first_head * block.num_layers + first) * block.run_bytes,
        shape=shape,
        slot_strides=tuple(dim.slot_stride for dim in outer),
    )


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
