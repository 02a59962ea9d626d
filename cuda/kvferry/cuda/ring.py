"""Kernels and a ring of device memory: pages are gathered into whole shards, which travel in large copies.

The ring has a few parts, each with room for some shards. While the shards of one part are on the link, a kernel works
on the next. A part goes round like this:

    gather:   page ids -> [pages stream] kernel: pages to part -> filled -> [slots stream] part to slots -> done
    scatter:  [slots stream] slots to part -> filled -> [pages stream] page ids, kernel: part to pages -> done

Who owns what
  * Each direction has two streams. Its pages stream is the only one that touches the engine's pages, and the one that
    waits for the engine's marks; its slots stream only touches slots and the ring. Those of loads are urgent.
  * ``filled`` and ``done`` belong to a part. ``done`` is waited for by the stager's thread before it fills the part
    anew, for with the part it takes over the host memory that the page ids are sent from. So no more is ever queued
    than the ring holds.
  * A gather of some pages of a block first brings the slot's other bytes into the part: the whole shard travels back.

Owned by the stager's thread.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvferry.connector.staging import PageIds
from kvferry.cuda.batch import CopyCall
from kvferry.cuda.driver import (
    Addresses,
    Device,
    Event,
    Held,
    Kernel,
    Kernels,
    Stream,
    do_all,
    one_copy,
    wait_for_all,
)
from kvferry.cuda.geometry import CopyGeometry

__all__ = ["KernelPath", "RingSize"]

_THREADS = 512
"""Of a thread block."""

_ALIGNMENT_BYTES = 256
"""Parts and tables begin on such a boundary of device memory, more than any vector needs."""


class RingSize(NamedTuple):
    """How much of the GPU is taken."""

    nbytes: int = 64 << 20
    """Device memory of the ring. A part never holds less than one shard, so it may be more."""
    parts: int = 2
    thread_blocks: int = 16
    """Of a kernel, at most: what bounds the multiprocessors that it takes from the model."""


class _Part(NamedTuple):
    shards: int
    """Device address of the room for shards."""
    ids: PageIds
    """Host memory for the page ids, registered: ``[shards, pages_per_block]``."""
    ids_on_device: int
    filled: Event
    done: Event


class _Lane(NamedTuple):
    """The streams of one direction."""

    pages: Stream
    slots: Stream


class KernelPath:
    """Moves shards by kernels: a ``CopyPath`` of ``DeviceStaging``.

    Args:
        device: Where the pages are.
        pages: Address of the engine's memory.
        geometry: How a page is copied.
        kernels: ``kernels/staging.cu``, compiled for this device. Closed with this object.
        copy: How shards are handed to the driver.
        size: How much of the GPU to take.

    Raises:
        DeviceError: The device has no memory left, or a kernel is missing.
    """

    def __init__(
        self,
        device: Device,
        pages: int,
        geometry: CopyGeometry,
        kernels: Kernels,
        copy: CopyCall,
        size: RingSize = RingSize(),
    ) -> None:
        self._pages = pages
        self._geometry = geometry = geometry.at(pages, _ALIGNMENT_BYTES)
        self._copy = copy
        self._thread_blocks = size.thread_blocks
        self._kernels = kernels
        self._gather = kernels.kernel(geometry.kernel_name("gather"))
        self._scatter = kernels.kernel(geometry.kernel_name("scatter"))
        self._save = _Lane(device.stream(is_urgent=False), device.stream(is_urgent=False))
        self._load = _Lane(device.stream(is_urgent=True), device.stream(is_urgent=True))
        self._end = device.event()
        self._shards_per_part = max(1, size.nbytes // size.parts // geometry.shard_bytes)
        self._turn = 0
        self._held: list[Held] = []
        try:
            self._parts = self._make_parts(device, size.parts)
            self._layer_offsets = self._send_layer_offsets(device)
        except BaseException:
            self.close()
            raise

    def wait(self, mark: Event) -> None:
        """Have whatever touches the engine's pages from now on come after ``mark``."""
        self._save.pages.wait(mark)
        self._load.pages.wait(mark)

    def gather(self, page_ids: PageIds, shards: Addresses) -> None:
        """Queue copies of pages ``page_ids[i, j]`` to page j of the shard at ``shards[i]``.

        Blocks only until a part of the ring is free.
        """
        for part, ids, in_slots in self._rounds(page_ids, shards):
            in_part, sizes = self._in_part(part, ids)
            is_partial = (ids < 0).any(axis=1)
            if is_partial.any():
                self._copy(self._save.pages, in_part[is_partial], in_slots[is_partial], sizes[is_partial])
            self._launch(self._gather, self._save.pages, part, ids)
            self._save.pages.record(part.filled)
            self._save.slots.wait(part.filled)
            self._copy(self._save.slots, in_slots, in_part, sizes)
            self._save.slots.record(part.done)

    def scatter(self, page_ids: PageIds, shards: Addresses) -> None:
        """Queue copies of page j of the shard at ``shards[i]`` to pages ``page_ids[i, j]``.

        Blocks only until a part of the ring is free.
        """
        for part, ids, in_slots in self._rounds(page_ids, shards):
            in_part, sizes = self._in_part(part, ids)
            self._copy(self._load.slots, in_part, in_slots, sizes)
            self._load.slots.record(part.filled)
            self._load.pages.wait(part.filled)
            self._launch(self._scatter, self._load.pages, part, ids)
            self._load.pages.record(part.done)

    def finish(self) -> None:
        """Wait until everything queued is done, also where queueing ended early."""
        wait_for_all((*self._save, *self._load), self._end)

    def close(self) -> None:
        """Give the device's memory back. Idempotent; nothing may be queued."""
        held, self._held = self._held[::-1], []
        do_all([*(one.close for one in held), self._kernels.close])

    def _rounds(self, page_ids: PageIds, shards: Addresses) -> Iterator[tuple[_Part, PageIds, Addresses]]:
        """Yield a free part with as many blocks as it takes, until all had their turn."""
        for start in range(0, len(page_ids), self._shards_per_part):
            part = self._parts[self._turn]
            self._turn = (self._turn + 1) % len(self._parts)
            part.done.synchronize()
            end = start + self._shards_per_part
            yield part, page_ids[start:end], shards[start:end]

    def _in_part(self, part: _Part, ids: PageIds) -> tuple[Addresses, Addresses]:
        """Return where the shards lie in a part, and their sizes."""
        shard_bytes = self._geometry.shard_bytes
        addresses = part.shards + np.arange(len(ids)) * shard_bytes
        return addresses.astype(np.uint64), np.full(len(ids), shard_bytes, np.uint64)

    def _launch(self, kernel: Kernel, stream: Stream, part: _Part, ids: PageIds) -> None:
        """Send the page ids and run a kernel on a part."""
        part.ids[: len(ids)] = ids
        stream.copy_each(*one_copy(part.ids_on_device, part.ids.ctypes.data, ids.nbytes))
        needed = -(-self._geometry.steps(ids.size) // _THREADS)
        arguments = (
            self._geometry.pack(),
            *(
                address.to_bytes(8, "little")
                for address in (self._layer_offsets, self._pages, part.shards, part.ids_on_device)
            ),
            struct.pack("<i", ids.size),
        )
        stream.launch(kernel, min(self._thread_blocks, needed), _THREADS, arguments)

    def _make_parts(self, device: Device, count: int) -> list[_Part]:
        """Allocate the ring, and host memory to send page ids from."""
        shape = (self._shards_per_part, self._geometry.pages_per_block)
        ids_bytes = shape[0] * shape[1] * np.dtype(np.int32).itemsize
        room = _aligned(self._shards_per_part * self._geometry.shard_bytes)
        ring = self._keep(device.allocate(count * (room + _aligned(ids_bytes))))
        sent_from = _host_memory(count * ids_bytes)
        self._keep(device.register_host(sent_from.ctypes.data, sent_from.nbytes))
        return [
            _Part(
                shards=ring + index * room,
                ids=sent_from[index * ids_bytes :][:ids_bytes].view(np.int32).reshape(shape),
                ids_on_device=ring + count * room + index * _aligned(ids_bytes),
                filled=device.event(),
                done=device.event(),
            )
            for index in range(count)
        ]

    def _send_layer_offsets(self, device: Device) -> int:
        """Return the device address of the table of layers, once it is there."""
        offsets = self._geometry.offsets_array()
        sent_from = _host_memory(offsets.nbytes)
        sent_from[: offsets.nbytes] = offsets.view(np.uint8)
        table = self._keep(device.allocate(offsets.nbytes))
        registered = device.register_host(sent_from.ctypes.data, sent_from.nbytes)
        try:
            self._save.pages.copy_each(*one_copy(table, sent_from.ctypes.data, offsets.nbytes))
            self.finish()
        finally:
            registered.close()
        return table

    def _keep(self, held: Held) -> int:
        self._held.append(held)
        return held.address


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _host_memory(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return whole pages of host memory, which nobody else registers with the driver."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
