"""Staging between a GPU's pages and arena slots: batches of blocks, beside the engine's own work.

``DeviceStaging`` keeps the contract of ``kvferry.connector.staging.Staging``: it checks a batch, makes the arena known
to the GPU, and orders copies against the engine's work by events. How the bytes travel is its path's business: by
kernels and a ring of device memory (``ring``), or by DMA straight from page to slot (``batch``).

Who owns what
  * A mark is an event on the engine's stream, made on the engine's thread. The path's streams wait for it, no thread
    does. The other way round, ``finish`` waits on the host: only then are pages and slots given to others.
  * An arena is registered when it is first used, which pins its memory and takes a while, on the stager's thread; it is
    let go of in ``detach``, before it is unmapped.
  * Nothing here waits for the whole device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import numpy as np

from kvferry.connector.errors import DeviceError, LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import BatchBounds, Bytes, PageIds, SlotIds
from kvferry.cuda.driver import Addresses, Device, Event, Held
from kvferry.cuda.geometry import CopyGeometry, copy_geometry

__all__ = ["CopyPath", "DevicePages", "DeviceStaging"]


class CopyPath(Protocol):
    """A way to move shards. Called by one thread; every call may raise DeviceError."""

    def wait(self, mark: Event) -> None:
        """Have whatever touches the engine's pages from now on come after ``mark``."""

    def gather(self, page_ids: PageIds, shards: Addresses) -> None:
        """Queue copies of pages ``page_ids[i, j]`` to page j of the shard at ``shards[i]``, in registered memory.

        Ids exist, negative ones are left out; no row is without a page.
        """

    def scatter(self, page_ids: PageIds, shards: Addresses) -> None:
        """Queue copies of page j of the shard at ``shards[i]`` to pages ``page_ids[i, j]``."""

    def finish(self) -> None:
        """Wait until everything queued is done, also where queueing ended early."""

    def close(self) -> None:
        """Give back what is held. Idempotent; nothing may be queued."""


class DevicePages(NamedTuple):
    """A rank's pages on a GPU."""

    address: int
    """Of the allocation; the layout's offsets count from it."""
    nbytes: int
    layout: PageLayout
    block: BlockLayout
    shard: Shard

    def geometry(self, device: Device) -> CopyGeometry:
        """Return how pages are copied.

        Raises:
            LayoutError: Layout, block and shard do not fit together, or span more than there is.
            DeviceError: This is not memory of ``device``.
        """
        geometry = copy_geometry(self.layout, self.block, self.shard)
        extent = self.layout.extent_bytes()
        if extent > self.nbytes:
            raise LayoutError(f"the pages span {extent} bytes, the engine's memory has {self.nbytes}")
        if not device.holds(self.address, self.nbytes):
            raise DeviceError(
                f"stage the {self.nbytes} bytes at {self.address:#x}",
                "they are not this GPU's memory",
                "pages in host memory, or of another GPU, need a staging of their own",
            )
        return geometry.at(self.address)


class DeviceStaging:
    """Copies one rank's shard of blocks between a GPU's pages and arena slots: see ``connector.staging.Staging``.

    Args:
        device: Where the pages are.
        pages: They themselves.
        make_path: Makes the way that bytes go, from the pages' geometry. The path is closed with this object.
        engine_stream: Returns the handle of the stream that the engine's work is queued on now. Called by ``mark``,
            on the engine's thread.

    Raises:
        LayoutError: The pages are not what they are said to be.
        DeviceError: They are not this GPU's memory, or the GPU refused.
    """

    def __init__(
        self,
        device: Device,
        pages: DevicePages,
        make_path: Callable[[CopyGeometry], CopyPath],
        engine_stream: Callable[[], int],
    ) -> None:
        device.activate()
        geometry = pages.geometry(device)
        self._device = device
        self._path = make_path(geometry)
        self._engine_stream = engine_stream
        self._slot_offset = geometry.slot_offset
        self._bounds = BatchBounds(
            num_pages=pages.layout.num_pages,
            pages_per_block=geometry.pages_per_block,
            payload_bytes=pages.block.payload_bytes,
        )
        self._registered: dict[int, Held] = {}

    @property
    def pages_per_block(self) -> int:
        """Engine pages that make up one block."""
        return self._bounds.pages_per_block

    def mark(self) -> Event:
        """Return an event behind the work that is queued on the engine's stream now."""
        self._device.activate()
        event = self._device.event()
        self._device.engine_stream(self._engine_stream()).record(event)
        return event

    def wait(self, mark: object) -> None:
        """Have all later copies come after ``mark``. Does not block."""
        self._device.activate()
        self._path.wait(cast(Event, mark))

    def gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Queue copies of blocks out of the engine's pages into slots."""
        self._bounds.check_gather(page_ids, slots, arena)
        self._copy(self._path.gather, page_ids, slots, arena)

    def scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Queue copies of blocks out of slots into the engine's pages."""
        self._bounds.check_scatter(page_ids, slots, arena)
        self._copy(self._path.scatter, page_ids, slots, arena)

    def finish(self) -> None:
        """Wait until all copies so far are complete."""
        self._device.activate()
        self._path.finish()

    def detach(self, arena: Bytes) -> None:
        """Let go of an arena, which is about to be unmapped. Nothing may be under way."""
        held = self._registered.pop(arena.ctypes.data, None)
        if held is not None:
            self._device.activate()
            held.close()

    def close(self) -> None:
        """Wait for what is under way and let go of everything. Idempotent."""
        self._device.activate()
        self._path.finish()
        self._path.close()
        while self._registered:
            self._registered.popitem()[1].close()

    def _copy(
        self,
        copy: Callable[[PageIds, Addresses], None],
        page_ids: PageIds,
        slots: SlotIds,
        arena: Bytes,
    ) -> None:
        has_pages = (page_ids >= 0).any(axis=1)
        if not has_pages.any():
            return
        self._device.activate()
        first = self._known(arena) + self._slot_offset
        shards = first + slots[has_pages] * arena.shape[1]
        copy(page_ids[has_pages], shards.view(np.uint64))

    def _known(self, arena: Bytes) -> int:
        """Make an arena known to the GPU; return its address."""
        address = arena.ctypes.data
        if address not in self._registered:
            self._registered[address] = self._device.register_host(address, arena.nbytes)
        return address
