"""Staging between a GPU's pages and arena slots: batches of blocks, beside the engine's own work.

``DeviceStaging`` keeps the contract of ``kvferry.connector.staging.Staging``: it checks a batch, makes the arena known
to the GPU, and orders copies against the engine's work by events. How the bytes travel is its path's business: by
kernels and a ring of device memory (``ring``), or by DMA straight from page to slot (``batch``).

Who owns what
  * Each direction belongs to a thread, with all of its path's streams, events and memory. Only arenas are common to
    both: whichever needs one first registers it, which pins its memory and takes a while, under a lock. It is let go
    of in ``detach``, before it is unmapped.
  * A mark is an event on the engine's stream, made on the engine's thread. The path's streams wait for it, no thread
    does. The other way round, ``finish`` waits on the host: only then are pages and slots given to others.
  * Nothing here waits for the whole device.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import numpy as np

from kvferry.connector.errors import DeviceError, LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import BatchBounds, Bytes, Copies, PageIds, SlotIds
from kvferry.cuda.driver import Addresses, Device, Event, Held, do_all, insist
from kvferry.cuda.geometry import CopyGeometry, copy_geometry

__all__ = ["CopyPath", "DevicePages", "DeviceStaging", "PathCopies"]


class PathCopies(Protocol):
    """One direction of a path. Used by one thread at a time; every call may raise DeviceError."""

    def wait(self, mark: Event) -> None:
        """Have whatever touches the engine's pages from now on come after ``mark``."""

    def copy(self, page_ids: PageIds, shards: Addresses) -> None:
        """Queue copies between pages ``page_ids[i, j]`` and page j of the shard at ``shards[i]``, in registered memory.

        Ids exist, negative ones are left out; no row is without a page.
        """

    def finish(self) -> None:
        """Wait until everything queued is done, also where queueing ended early.

        Every stream is waited for, also behind one that refused.
        """


class CopyPath(Protocol):
    """A way to move shards."""

    @property
    def gathers(self) -> PathCopies:
        """Moves shards out of pages."""

    @property
    def scatters(self) -> PathCopies:
        """Moves shards into pages."""

    def close(self) -> None:
        """Give back what is held, also behind something that was refused. Idempotent; nothing may be queued."""


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
        path_name: What ``cuda.path`` calls the path.

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
        path_name: str = "",
    ) -> None:
        device.activate()
        geometry = pages.geometry(device)
        self._device = device
        self._path = path = make_path(geometry)
        self._engine_stream = engine_stream
        self._arenas = _Arenas(device)
        bounds = BatchBounds.of(pages.layout, pages.block)
        self.pages_per_block = bounds.pages_per_block
        first = geometry.slot_offset
        self.gathers: Copies = _DeviceCopies(device, path.gathers, bounds.check_gather, self._arenas, first)
        self.scatters: Copies = _DeviceCopies(
            device, path.scatters, bounds.check_scatter, self._arenas, first
        )
        self.path_name = path_name
        """By which other stagings of the same pages can be made without measuring again."""

    def mark(self) -> Event:
        """Return an event behind the work that is queued on the engine's stream now."""
        self._device.activate()
        event = self._device.event()
        self._device.engine_stream(self._engine_stream()).record(event)
        return event

    def detach(self, arena: Bytes) -> None:
        """Let go of an arena, which is about to be unmapped. No copy from or to it may be under way."""
        self._device.activate()
        self._arenas.let_go(arena)

    def close(self) -> None:
        """Wait for what is under way and let go of everything. Idempotent.

        What is refused keeps nothing else from being given back. A wait is asked for twice: a GPU that refuses both has
        lost its context, as after a fault of a kernel, and copies nothing any more.

        Raises:
            DeviceError: The first refusal.
        """
        path = self._path
        waits = [functools.partial(insist, way.finish) for way in (path.gathers, path.scatters)]
        do_all([self._device.activate, *waits, path.close, self._arenas.let_all_go])


class _DeviceCopies:
    """One direction: ``Copies`` over a path's."""

    def __init__(
        self,
        device: Device,
        way: PathCopies,
        check: Callable[[PageIds, SlotIds, Bytes], None],
        arenas: _Arenas,
        slot_offset: int,
    ) -> None:
        self._device = device
        self._way = way
        self._check = check
        self._arenas = arenas
        self._slot_offset = slot_offset

    def wait(self, mark: object) -> None:
        """Have all later copies come after ``mark``. Does not block."""
        self._device.activate()
        self._way.wait(cast(Event, mark))

    def copy(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Queue copies; may block until the path has room for them."""
        self._check(page_ids, slots, arena)
        has_pages = (page_ids >= 0).any(axis=1)
        if not has_pages.any():
            return
        self._device.activate()
        first = self._arenas.address(arena) + self._slot_offset
        shards = first + slots[has_pages] * arena.shape[1]
        self._way.copy(page_ids[has_pages], shards.view(np.uint64))

    def finish(self) -> None:
        """Wait until all copies so far are complete."""
        self._device.activate()
        self._way.finish()


class _Arenas:
    """Arenas that are known to the GPU. Any thread that the device is active on may call."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._registered: dict[int, Held] = {}

    def address(self, arena: Bytes) -> int:
        """Return where an arena is for the GPU, to which it is made known."""
        address = arena.ctypes.data
        with self._lock:
            if address not in self._registered:
                self._registered[address] = self._device.register_host(address, arena.nbytes)
        return address

    def let_go(self, arena: Bytes) -> None:
        with self._lock:
            held = self._registered.pop(arena.ctypes.data, None)
        if held is not None:
            held.close()

    def let_all_go(self) -> None:
        with self._lock:
            held = [self._registered.popitem()[1] for _ in range(len(self._registered))]
        do_all(one.close for one in held)
