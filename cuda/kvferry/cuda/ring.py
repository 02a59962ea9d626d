"""Kernels and rings of device memory: pages are gathered into whole shards, which travel in large copies.

Each direction has a ring of a few parts, each with room for some shards. While the shards of one part are on the link,
a kernel works on the next. A part goes round like this:

    gather:   page ids -> [pages stream] kernel: pages to part -> filled -> [slots stream] part to slots -> done
    scatter:  [slots stream] slots to part -> filled -> [pages stream] page ids, kernel: part to pages -> done

Who owns what
  * A direction belongs to one thread, with its ring and two streams. Its pages stream is the only one that touches the
    engine's pages, and the one that waits for the engine's marks; its slots stream only touches slots and the ring.
    Those of loads are urgent. What both share never changes: kernels, the table of layers, the geometry.
  * ``filled`` and ``done`` belong to a part. ``done`` is waited for by the direction's thread before it fills the part
    anew, for with the part it takes over the host memory that the page ids are sent from. So no more is ever queued
    than the ring holds.
  * A gather of some pages of a block first brings the slot's other bytes into the part: the whole shard travels back.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
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
from kvferry.cuda.staging import PathCopies

__all__ = ["KernelPath", "RingSize"]

_THREADS = 512
"""Of a thread block."""

_ALIGNMENT_BYTES = 256
"""Parts and tables begin on such a boundary of device memory, more than any vector needs."""


class RingSize(NamedTuple):
    """How much of the GPU is taken."""

    nbytes: int = 64 << 20
    """Device memory of both directions' rings. A part never holds less than one shard, so it may be more."""
    parts: int = 2
    """Of each direction's ring."""
    thread_blocks: int = 16
    """Of a kernel, at most: what bounds the multiprocessors that it takes from the model."""

    @property
    def part_bytes(self) -> int:
        """What a direction moves at once, where it is more than a shard."""
        return self.nbytes // (2 * self.parts)


class _Part(NamedTuple):
    shards: int
    """Device address of the room for shards."""
    ids: PageIds
    """Host memory for the page ids, registered: ``[shards, pages_per_block]``."""
    ids_on_device: int
    filled: Event
    done: Event


class _Streams(NamedTuple):
    """Those of one direction."""

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
        geometry = geometry.at(pages, _ALIGNMENT_BYTES)
        self._kernels = kernels
        self._held: list[Held] = []
        gather, scatter = (kernels.kernel(geometry.kernel_name(verb)) for verb in ("gather", "scatter"))
        saves, loads = _streams(device, is_urgent=False), _streams(device, is_urgent=True)
        ends = device.event(), device.event()
        try:
            out, back = self._make_rings(device, geometry, size)
            table = self._send_layer_offsets(device, geometry, saves.pages, ends[0])
        except BaseException:
            self.close()
            raise
        about = _Copying(geometry, pages, table, copy, size.thread_blocks)
        self.gathers: PathCopies = _Gathers(about, gather, saves, out, ends[0])
        self.scatters: PathCopies = _Scatters(about, scatter, loads, back, ends[1])

    def close(self) -> None:
        """Give the device's memory back. Idempotent; nothing may be queued."""
        held, self._held = self._held[::-1], []
        do_all([*(one.close for one in held), self._kernels.close])

    def _make_rings(
        self, device: Device, geometry: CopyGeometry, size: RingSize
    ) -> tuple[list[_Part], list[_Part]]:
        """Allocate both rings, and host memory to send page ids from."""
        shape = (max(1, size.part_bytes // geometry.shard_bytes), geometry.pages_per_block)
        count = 2 * size.parts
        ids_bytes = shape[0] * shape[1] * np.dtype(np.int32).itemsize
        room = _aligned(shape[0] * geometry.shard_bytes)
        memory = self._keep(device.allocate(count * (room + _aligned(ids_bytes))))
        sent_from = _host_memory(count * ids_bytes)
        self._keep(device.register_host(sent_from.ctypes.data, sent_from.nbytes))
        parts = [
            _Part(
                shards=memory + index * room,
                ids=sent_from[index * ids_bytes :][:ids_bytes].view(np.int32).reshape(shape),
                ids_on_device=memory + count * room + index * _aligned(ids_bytes),
                filled=device.event(),
                done=device.event(),
            )
            for index in range(count)
        ]
        return parts[: size.parts], parts[size.parts :]

    def _send_layer_offsets(self, device: Device, geometry: CopyGeometry, stream: Stream, end: Event) -> int:
        """Return the device address of the table of layers, once it is there."""
        offsets = geometry.offsets_array()
        sent_from = _host_memory(offsets.nbytes)
        sent_from[: offsets.nbytes] = offsets.view(np.uint8)
        table = self._keep(device.allocate(offsets.nbytes))
        registered = device.register_host(sent_from.ctypes.data, sent_from.nbytes)
        try:
            stream.copy_each(*one_copy(table, sent_from.ctypes.data, offsets.nbytes))
            wait_for_all((stream,), end)
        finally:
            registered.close()
        return table

    def _keep(self, held: Held) -> int:
        self._held.append(held)
        return held.address


class _Copying(NamedTuple):
    """What both directions' copies have in common."""

    geometry: CopyGeometry
    pages: int
    """Address of the engine's memory."""
    layer_offsets: int
    """Address of the table."""
    copy: CopyCall
    thread_blocks: int


class _Direction:
    """A ring, the streams that it turns between, and the kernel on the pages' side.

    Copying blocks only until a part of the ring is free.
    """

    def __init__(
        self, about: _Copying, kernel: Kernel, streams: _Streams, parts: Sequence[_Part], end: Event
    ) -> None:
        self._about = about
        self._kernel = kernel
        self._streams = streams
        self._parts = parts
        self._end = end
        self._turn = 0

    def wait(self, mark: Event) -> None:
        self._streams.pages.wait(mark)

    def finish(self) -> None:
        wait_for_all(self._streams, self._end)

    def _rounds(self, page_ids: PageIds, shards: Addresses) -> Iterator[tuple[_Part, PageIds, Addresses]]:
        """Yield a free part with as many blocks as it takes, until all had their turn."""
        shards_per_part = len(self._parts[0].ids)
        for start in range(0, len(page_ids), shards_per_part):
            part = self._parts[self._turn]
            self._turn = (self._turn + 1) % len(self._parts)
            part.done.synchronize()
            end = start + shards_per_part
            yield part, page_ids[start:end], shards[start:end]

    def _in_part(self, part: _Part, ids: PageIds) -> tuple[Addresses, Addresses]:
        """Return where the shards lie in a part, and their sizes."""
        shard_bytes = self._about.geometry.shard_bytes
        addresses = part.shards + np.arange(len(ids)) * shard_bytes
        return addresses.astype(np.uint64), np.full(len(ids), shard_bytes, np.uint64)

    def _launch(self, part: _Part, ids: PageIds) -> None:
        """Send the page ids and run the kernel on a part."""
        about, stream = self._about, self._streams.pages
        part.ids[: len(ids)] = ids
        stream.copy_each(*one_copy(part.ids_on_device, part.ids.ctypes.data, ids.nbytes))
        needed = -(-about.geometry.steps(ids.size) // _THREADS)
        arguments = (
            about.geometry.pack(),
            *(
                address.to_bytes(8, "little")
                for address in (about.layer_offsets, about.pages, part.shards, part.ids_on_device)
            ),
            struct.pack("<i", ids.size),
        )
        stream.launch(self._kernel, min(about.thread_blocks, needed), _THREADS, arguments)


class _Gathers(_Direction):
    def copy(self, page_ids: PageIds, shards: Addresses) -> None:
        pages, slots = self._streams
        for part, ids, in_slots in self._rounds(page_ids, shards):
            in_part, sizes = self._in_part(part, ids)
            is_partial = (ids < 0).any(axis=1)
            if is_partial.any():
                self._about.copy(pages, in_part[is_partial], in_slots[is_partial], sizes[is_partial])
            self._launch(part, ids)
            pages.record(part.filled)
            slots.wait(part.filled)
            self._about.copy(slots, in_slots, in_part, sizes)
            slots.record(part.done)


class _Scatters(_Direction):
    def copy(self, page_ids: PageIds, shards: Addresses) -> None:
        pages, slots = self._streams
        for part, ids, in_slots in self._rounds(page_ids, shards):
            in_part, sizes = self._in_part(part, ids)
            self._about.copy(slots, in_part, in_slots, sizes)
            slots.record(part.filled)
            pages.wait(part.filled)
            self._launch(part, ids)
            pages.record(part.done)


def _streams(device: Device, is_urgent: bool) -> _Streams:
    return _Streams(device.stream(is_urgent), device.stream(is_urgent))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _host_memory(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return whole pages of host memory, which nobody else registers with the driver."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
