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
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.connector.layout import ElementOrder, PageLayout

__all__ = ["PackedRuns"]

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


def _opaque(nbytes: int) -> np.dtype[Any]:
    """Return an element of so many bytes; up to 8 of them as an integer, which numpy copies fastest."""
    return np.dtype(f"u{nbytes}") if nbytes in (1, 2, 4, 8) else np.dtype((np.void, nbytes))
