"""What a copy between engine pages and canonical shards needs to know, for kernels and for direct DMA.

A shard on the device is contiguous ``[head][layer][token][k_or_v][head_dim]`` of one block; the shards of a
batch lie one behind the other. ``copy_geometry`` compares that with an engine's pages and folds every inner
dimension that is contiguous on both sides into one *run*; what remains are steps with a stride on either
side. ``pack`` gives the C struct that the kernels take (``kernels/geometry.cuh`` is its twin), ``runs`` the
same copy as offsets for DMA.

Values only: no CUDA, no I/O, usable from any thread.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard

__all__ = ["GEOMETRY_FORMAT", "CopyGeometry", "Direction", "copy_geometry"]

Direction = Literal["gather", "scatter"]
"""Pages to shards, or shards to pages."""

GEOMETRY_FORMAT = struct.Struct("<11q7I4x")
"""The C struct ``Geometry``: strides and sizes in bytes, then counts; padded to a multiple of 8."""

_WIDEST_VECTOR_BYTES = 16
_VECTORS_PER_THREAD = 4
"""``kVectorsPerThread`` of the kernels."""
_WARP_LANES = 32
_FEWEST_LANES = 8
"""Eight neighbouring lanes touch at least 128 bytes in one access where vectors are 16 bytes wide."""
_COUNT_LIMIT = 1 << 31


class CopyGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """How one page of a shard is copied. Strides and sizes in bytes; a folded dimension has one step.

    ``*_page_stride`` is a stride in the engine's memory, ``*_shard_stride`` one within a shard.
    """

    page_stride: int
    """From one engine page to the next, within a layer."""
    head_page_stride: int
    token_page_stride: int
    kv_page_stride: int
    shard_bytes: int
    """Bytes of one shard, and the distance between shards of a batch."""
    page_shard_stride: int
    """From one page of a block to its next."""
    head_shard_stride: int
    layer_shard_stride: int
    token_shard_stride: int
    kv_shard_stride: int
    run_bytes: int
    """What is contiguous on both sides."""
    num_heads: int
    num_tokens: int
    num_kv: int
    pages_per_block: int
    layer_offsets: tuple[int, ...]
    """Where each layer begins in the engine's memory; the first one only where layers are folded."""
    slot_offset: int
    """Byte of an arena slot at which this rank's shard begins."""
    vector_bytes: int
    """Width of one access, 16, 8, 4, 2 or 1: it divides every offset, stride and size, and so far every address."""

    @property
    def num_layers(self) -> int:
        """Steps over layers."""
        return len(self.layer_offsets)

    @property
    def runs_per_page(self) -> int:
        """Runs of one page: what a copy without a kernel moves one by one."""
        return self.num_heads * self.num_layers * self.num_tokens * self.num_kv

    @property
    def lanes(self) -> int:
        """Neighbouring threads that share a run: as few as cover it at four vectors each, at least eight."""
        vectors = self.run_bytes // self.vector_bytes
        fewest = min(_FEWEST_LANES, _power_of_two(vectors))
        return min(_WARP_LANES, max(fewest, _power_of_two(-(-vectors // _VECTORS_PER_THREAD))))

    @property
    def slices(self) -> int:
        """Steps of one thread that a run takes."""
        stretch_bytes = self.lanes * _VECTORS_PER_THREAD * self.vector_bytes
        return self.lanes * -(-self.run_bytes // stretch_bytes)

    def steps(self, num_pages: int) -> int:
        """Return how many steps of one thread a copy of ``num_pages`` pages takes: more threads than that are idle."""
        return num_pages * self.runs_per_page * self.slices

    def at(self, *addresses: int) -> CopyGeometry:
        """Return this geometry with vectors narrow enough for these base addresses too."""
        return msgspec.structs.replace(self, vector_bytes=math.gcd(self.vector_bytes, *addresses))

    def kernel_name(self, direction: Direction) -> str:
        """Return the name of the kernel that copies this geometry."""
        return f"kvferry_{direction}_v{self.vector_bytes}"

    def pack(self) -> bytes:
        """Return the C struct that kernels take by value."""
        return GEOMETRY_FORMAT.pack(
            self.page_stride,
            self.head_page_stride,
            self.token_page_stride,
            self.kv_page_stride,
            self.shard_bytes,
            self.page_shard_stride,
            self.head_shard_stride,
            self.layer_shard_stride,
            self.token_shard_stride,
            self.kv_shard_stride,
            self.run_bytes,
            self.num_heads,
            self.num_layers,
            self.num_tokens,
            self.num_kv,
            self.pages_per_block,
            self.lanes.bit_length() - 1,
            self.slices,
        )

    def offsets_array(self) -> npt.NDArray[np.int64]:
        """Return ``layer_offsets`` as the kernels read them, ``[layers]``."""
        return np.array(self.layer_offsets, np.int64)

    def runs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return where every run of one page begins, ``[runs_per_page]`` each.

        The first array is relative to ``page_id * page_stride`` in the engine's memory, the second to the
        page's place in the shard, ``index_in_block * page_shard_stride``.
        """
        in_page = _sums(
            np.arange(self.num_heads) * self.head_page_stride,
            self.offsets_array(),
            np.arange(self.num_tokens) * self.token_page_stride,
            np.arange(self.num_kv) * self.kv_page_stride,
        )
        in_shard = _sums(
            np.arange(self.num_heads) * self.head_shard_stride,
            np.arange(self.num_layers) * self.layer_shard_stride,
            np.arange(self.num_tokens) * self.token_shard_stride,
            np.arange(self.num_kv) * self.kv_shard_stride,
        )
        return in_page, in_shard


class _Dim(NamedTuple):
    """Steps of one dimension and their length on either side, in bytes; zero where there is one step."""

    size: int
    page_stride: int
    shard_stride: int


def copy_geometry(page_layout: PageLayout, block: BlockLayout, shard: Shard) -> CopyGeometry:
    """Work out how this rank's pages are copied to and from shards of blocks.

    ``vector_bytes`` does not know any address yet: call ``at`` with those of the engine's memory and of the shards.

    Args:
        page_layout: Where the engine's vectors lie.
        block: The canonical block.
        shard: The heads of it that this rank owns.

    Raises:
        LayoutError: The three do not fit together, a stride or offset is negative, or there are
            2**31 pages or bytes of a block.
    """
    page_layout.check(block, shard)
    _check_range(page_layout, block)
    layers = page_layout.layer_offsets
    dims = [
        _dim(page_layout.kv_factor, page_layout.kv_stride, page_layout.head_bytes),
        _dim(page_layout.page_tokens, page_layout.token_stride, block.token_bytes),
        _dim(len(layers), _even_stride(layers), block.run_bytes),
        _dim(page_layout.num_heads, page_layout.head_stride, block.num_layers * block.run_bytes),
    ]
    run_bytes, (kv, token, layer, head) = _fold(page_layout.head_bytes, dims)
    offsets = layers[: layer.size]
    pages_per_block = block.block_tokens // page_layout.page_tokens
    geometry = CopyGeometry(
        page_stride=page_layout.page_stride,
        head_page_stride=head.page_stride,
        token_page_stride=token.page_stride,
        kv_page_stride=kv.page_stride,
        shard_bytes=shard.num_heads * block.num_layers * block.run_bytes,
        page_shard_stride=page_layout.page_tokens * block.token_bytes,
        head_shard_stride=head.shard_stride,
        layer_shard_stride=layer.shard_stride,
        token_shard_stride=token.shard_stride,
        kv_shard_stride=kv.shard_stride,
        run_bytes=run_bytes,
        num_heads=head.size,
        num_tokens=token.size,
        num_kv=kv.size,
        pages_per_block=pages_per_block,
        layer_offsets=offsets,
        slot_offset=shard.first_head * block.num_layers * block.run_bytes,
        vector_bytes=_WIDEST_VECTOR_BYTES,
    )
    return _narrowed(geometry)


def _check_range(layout: PageLayout, block: BlockLayout) -> None:
    if layout.packing is not None:
        raise LayoutError("kernels copy pages by strides and know no packing")
    strides = (layout.page_stride, layout.head_stride, layout.token_stride, layout.kv_stride)
    if min(*strides, *layout.layer_offsets) < 0:
        raise LayoutError(f"page strides and layer offsets must not be negative: {layout}")
    if max(layout.num_pages, block.payload_bytes) >= _COUNT_LIMIT:
        raise LayoutError(
            f"kernels count in 31 bits, too few for {layout.num_pages} pages or {block.payload_bytes} bytes a block"
        )


def _dim(size: int, page_stride: int, shard_stride: int) -> _Dim:
    return _Dim(size, page_stride, shard_stride) if size > 1 else _Dim(1, 0, 0)


def _even_stride(offsets: Sequence[int]) -> int:
    """Return the distance between layers, or -1 where distances differ."""
    steps = {after - before for before, after in itertools.pairwise(offsets)}
    return steps.pop() if len(steps) == 1 else -1


def _fold(run_bytes: int, dims: Sequence[_Dim]) -> tuple[int, list[_Dim]]:
    """Join dimensions, innermost first, to the run for as long as they continue it on both sides."""
    folded = list(dims)
    for index, dim in enumerate(dims):
        if dim.size == 1:
            continue
        if not dim.page_stride == dim.shard_stride == run_bytes:
            break
        run_bytes *= dim.size
        folded[index] = _Dim(1, 0, 0)
    return run_bytes, folded


def _narrowed(geometry: CopyGeometry) -> CopyGeometry:
    """Choose the widest vectors that fit everything but base addresses."""
    return geometry.at(
        geometry.page_stride,
        geometry.head_page_stride,
        geometry.token_page_stride,
        geometry.kv_page_stride,
        geometry.shard_bytes,
        geometry.page_shard_stride,
        geometry.head_shard_stride,
        geometry.layer_shard_stride,
        geometry.token_shard_stride,
        geometry.kv_shard_stride,
        geometry.run_bytes,
        *geometry.layer_offsets,
    )


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _sums(*axes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return every sum of one offset from each axis, the last axis fastest, flat."""
    total = np.zeros(1, np.int64)
    for axis in axes:
        total = np.add.outer(total, axis).ravel()
    return total
