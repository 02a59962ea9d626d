"""Pages whose elements lie in an engine's own order, and the canonical bytes they stand for.

Some attention kernels keep K and V in the order in which they will multiply them: inside one (layer, page, head) the
elements of all tokens are mixed. Where that order is known (``layout.Packing``) a block need not be: elements are put
in canonical order on their way out of the pages, and back in the engine's on the way in. They are moved, never looked
at.

A page of a group of evenly spaced layers is worked off by a handful of numpy calls, whatever the number of heads,
layers and tokens in it, straight from one side's memory to the other's. What lies together on both sides is moved as
one element. Where a few elements take turns in memory that lie apart in a block, each of these *planes* is picked out
first, so that the rest moves in longer runs.

Immutable once made: threads may copy different blocks at the same time, and numpy releases the GIL while it copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.connector.layout import BlockLayout, ElementOrder, PageLayout, Shard

__all__ = ["PackedPages", "PackedRuns"]

_Array = npt.NDArray[Any]
_Bytes = npt.NDArray[np.uint8]

_MOST_PLANES = 8


class _Half:
    """How the K, or the V, of some runs is moved."""

    def __init__(self, order: ElementOrder, page_tokens: int, item_bytes: int) -> None:
        shape, axes = order.shape, order.axes
        num_token_axes = order.token_axes(page_tokens)
        while len(axes) > num_token_axes and axes[-1] == len(shape) - 1:
            item_bytes *= shape[-1]
            shape, axes = shape[:-1], axes[:-1]
        self._item = _opaque(item_bytes)
        self._shape = shape
        self._sizes = tuple(shape[axis] for axis in axes)
        self._axes = axes
        self._planes = 0
        last = len(shape) - 1
        if len(axes) > num_token_axes and axes[-1] == last - 1 and shape[last] <= _MOST_PLANES:
            self._planes = shape[last]
            self._plane_axis = axes.index(last)
            self._run = _opaque(item_bytes * shape[last - 1])
            self._sizes = self._sizes[:-1]
            self._axes = tuple(axis for axis in axes[:-1] if axis != last)

    def unpack(self, packed: _Bytes, plain: _Bytes) -> None:
        """Copy ``packed`` ``[..., half_bytes]`` to ``plain`` ``[..., page_tokens, head_bytes]``."""
        in_memory = self._in_memory(packed)
        if not self._planes:
            np.copyto(self._in_block(plain, self._item), self._transposed(in_memory))
            return
        in_block = self._in_block(plain, self._run)
        for plane in range(self._planes):
            picked = np.ascontiguousarray(in_memory[..., plane])
            np.copyto(self._plane(in_block, plane), self._runs(picked))

    def pack(self, plain: _Bytes, packed: _Bytes) -> None:
        """Copy the other way."""
        in_memory = self._in_memory(packed)
        if not self._planes:
            np.copyto(self._transposed(in_memory), self._in_block(plain, self._item))
            return
        in_block = self._in_block(plain, self._run)
        picked = np.empty(in_memory.shape[:-1], self._item)
        for plane in range(self._planes):
            np.copyto(self._runs(picked), self._plane(in_block, plane))
            np.copyto(in_memory[..., plane], picked)

    def _in_memory(self, packed: _Bytes) -> _Array:
        return packed.view(self._item).reshape(*packed.shape[:-1], *self._shape)

    def _in_block(self, plain: _Bytes, item: np.dtype[Any]) -> _Array:
        return plain.view(item).reshape(*plain.shape[:-2], *self._sizes)

    def _transposed(self, in_memory: _Array) -> _Array:
        num_outer = in_memory.ndim - len(self._axes)
        return in_memory.transpose(*range(num_outer), *(num_outer + axis for axis in self._axes))

    def _runs(self, picked: _Array) -> _Array:
        """View one plane, contiguous, as a block's runs in a block's order."""
        runs = picked.view(self._run).reshape(picked.shape[:-1])
        return self._transposed(runs)

    def _plane(self, in_block: _Array, plane: int) -> _Array:
        num_outer = in_block.ndim - len(self._sizes)
        return in_block[(slice(None),) * (num_outer + self._plane_axis) + (plane,)]


class PackedRuns:
    """Turns packed runs into canonical ones and back. A run is one (layer, page, head).

    Args:
        layout: Of pages with a packing, which fits (``PageLayout.check``).
    """

    def __init__(self, layout: PageLayout) -> None:
        packing = layout.packing
        assert packing is not None
        item_bytes = layout.page_tokens * layout.head_bytes // math.prod(packing.k.shape)
        self._halves = [_Half(order, layout.page_tokens, item_bytes) for order in (packing.k, packing.v)]

    def unpack(self, packed: _Bytes, plain: _Bytes) -> None:
        """Copy runs out of the engine's order.

        Args:
            packed: ``[..., k_or_v, half_bytes]``, the last axis contiguous.
            plain: ``[..., token, k_or_v, head_bytes]``, the last axis contiguous.
        """
        for index, half in enumerate(self._halves):
            half.unpack(packed[..., index, :], plain[..., index, :])

    def pack(self, plain: _Bytes, packed: _Bytes) -> None:
        """Copy runs into the engine's order: as ``unpack``, the other way."""
        for index, half in enumerate(self._halves):
            half.pack(plain[..., index, :], packed[..., index, :])


class _Group(NamedTuple):
    """Evenly spaced layers, copied together."""

    pages: _Bytes
    """The engine's memory as ``[page, head, layer, k_or_v, half_bytes]``."""
    slot_offset: int
    """Byte of a slot at which the group's first page begins."""


class PackedPages:
    """Copies one rank's shard of blocks between packed pages and slots.

    Args:
        pages: The engine's KV memory, 1-D uint8, at least as long as ``layout`` spans.
        layout: Where in ``pages`` every run lies, and in which order its elements.
        block: The canonical block; it and the shard fit the layout.
        shard: Which heads of the block this rank owns.
        even_layers: The layers as (first, count) whose offsets are evenly spaced.
    """

    def __init__(
        self,
        pages: _Bytes,
        layout: PageLayout,
        block: BlockLayout,
        shard: Shard,
        even_layers: Sequence[tuple[int, int]],
    ) -> None:
        self._runs = PackedRuns(layout)
        self._page_step = layout.page_tokens * block.token_bytes
        half_bytes = layout.page_tokens * layout.head_bytes
        self._shape = (layout.page_tokens, 2, layout.head_bytes)
        self._slot_strides = (
            block.num_layers * block.run_bytes,
            block.run_bytes,
            block.token_bytes,
            layout.head_bytes,
            1,
        )
        self._groups = []
        for first, count in even_layers:
            offset = layout.layer_offsets[first]
            layer_stride = layout.layer_offsets[first + 1] - offset if count > 1 else 0
            in_pages: _Bytes = np.ndarray(
                (layout.num_pages, layout.num_heads, count, 2, half_bytes),
                np.uint8,
                pages,
                offset,
                (layout.page_stride, layout.head_stride, layer_stride, half_bytes, 1),
            )
            slot_offset = (shard.first_head * block.num_layers + first) * block.run_bytes
            self._groups.append(_Group(in_pages, slot_offset))

    def gather(self, page_ids: npt.NDArray[np.int32], slots: npt.NDArray[np.int64], arena: _Bytes) -> None:
        """Copy a checked batch out of the pages, in canonical order."""
        for in_pages, in_slot in self._pairs(page_ids, slots, arena):
            self._runs.unpack(in_pages, in_slot)

    def scatter(self, page_ids: npt.NDArray[np.int32], slots: npt.NDArray[np.int64], arena: _Bytes) -> None:
        """Copy a checked batch into the pages, in the engine's order."""
        for in_pages, in_slot in self._pairs(page_ids, slots, arena):
            self._runs.pack(in_slot, in_pages)

    def _pairs(
        self, page_ids: npt.NDArray[np.int32], slots: npt.NDArray[np.int64], arena: _Bytes
    ) -> Iterator[tuple[_Bytes, _Bytes]]:
        """Yield the same runs in the engine's memory and in a slot, a page of a group of layers at a time."""
        rows, indices = np.nonzero(page_ids >= 0)
        pages = page_ids[rows, indices].tolist()
        offsets = (slots[rows] * arena.shape[1] + indices * self._page_step).tolist()
        for group in self._groups:
            shape = (*group.pages.shape[1:3], *self._shape)
            for page, offset in zip(pages, offsets, strict=True):
                at = offset + group.slot_offset
                in_slot: _Bytes = np.ndarray(shape, np.uint8, arena, at, self._slot_strides)
                yield group.pages[page], in_slot


def _opaque(nbytes: int) -> np.dtype[Any]:
    """Return an element of so many bytes; up to 8 of them as an integer, which numpy copies fastest."""
    return np.dtype(f"u{nbytes}") if nbytes in (1, 2, 4, 8) else np.dtype((np.void, nbytes))
