"""Memory to try copies on: pages laid out as an engine's, and slots, both of this process alone.

What a path of copies is worth depends on how the pages lie, not on what is in them or on how many there are. So paths
are timed on a few pages of the same strides, and an engine's own are never touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import TracebackType

import msgspec
import numpy as np

from kvferry.connector.arena import Arena
from kvferry.connector.layout import BlockLayout, PageLayout
from kvferry.connector.staging import Bytes, PageIds, SlotIds
from kvferry.cuda.driver import Device
from kvferry.cuda.geometry import CopyGeometry
from kvferry.cuda.staging import CopyPath, DevicePages, DeviceStaging

__all__ = ["Scratch", "miniature"]

MakePath = Callable[[int, CopyGeometry], CopyPath]
"""Makes a path from the address of pages and how they are copied."""


class Scratch:
    """Pages on a GPU and as many slots as they fill. Blocks lie scattered over both. A context manager.

    Args:
        device: Where the pages are.
        layout: Of the pages.
        block: A block of which one rank has every head.

    Raises:
        DeviceError: The GPU has no room for them.
        ArenaError: The host has not.
    """

    def __init__(self, device: Device, layout: PageLayout, block: BlockLayout) -> None:
        device.activate()
        self._device = device
        self._block = block
        per_block = block.block_tokens // layout.page_tokens
        num_blocks = layout.num_pages // per_block
        self._memory = device.allocate(layout.extent_bytes())
        try:
            self._arena = Arena.create(num_blocks, block.slot_bytes)
        except BaseException:
            self._memory.close()
            raise
        shard = block.shard(0, 1)
        self.pages = DevicePages(self._memory.address, layout.extent_bytes(), layout, block, shard)
        order = np.random.default_rng(0)
        pages = order.permutation(layout.num_pages)[: num_blocks * per_block].astype(np.int32)
        self.page_ids: PageIds = pages.reshape(num_blocks, per_block)
        """Of every block, ``[blocks, pages_per_block]``."""
        self.slot_ids: SlotIds = order.permutation(num_blocks)
        """Of every block."""

    @property
    def slots(self) -> Bytes:
        """The arena's slots."""
        return self._arena.slots_array

    def staging(self, make_path: MakePath) -> DeviceStaging:
        """Return a staging over the pages; close it before this.

        Raises:
            DeviceError: There is no such path here.
        """

        def make(geometry: CopyGeometry) -> CopyPath:
            return make_path(self.pages.address, geometry)

        return DeviceStaging(self._device, self.pages, make, lambda: 0)

    def close(self) -> None:
        """Give the memory back. Idempotent; nothing may be under way."""
        self._memory.close()
        self._arena.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def miniature(layout: PageLayout, num_pages: int) -> PageLayout:
    """Return the same pages, only fewer: strides that span all pages shrink, the others and every gap stay.

    Args:
        layout: Of an engine.
        num_pages: No more than it has.
    """
    all_pages = layout.num_pages * layout.page_stride
    fewer = (layout.num_pages - num_pages) * layout.page_stride

    def shrunk(stride: int) -> int:
        # The last page may have no gap behind it, so what spans all pages may be short of that by less than a page.
        return stride - (stride + layout.page_stride - 1) // all_pages * fewer

    in_order = sorted(layout.layer_offsets)
    steps = [shrunk(after - before) for before, after in itertools.pairwise([0, *in_order])]
    offsets = dict(zip(in_order, itertools.accumulate(steps), strict=True))
    return msgspec.structs.replace(
        layout,
        num_pages=num_pages,
        layer_offsets=tuple(offsets[offset] for offset in layout.layer_offsets),
        head_stride=shrunk(layout.head_stride),
        token_stride=shrunk(layout.token_stride),
        kv_stride=shrunk(layout.kv_stride),
    )
