"""The arena: a shared-memory region of equal slots, one block to a slot.

The memory is an anonymous file (``memfd_create``): nothing lies in ``/dev/shm``, no name can clash,
and the kernel frees it when the last process that maps it ends, however it ends.

Who owns what
  * The creator (the scheduler's process) owns the generation table and decides what lies in a slot.
  * Attached processes (workers) write a slot only while it is reserved for them and read it only
    under a lease; they see the table read-only by convention.
  * All memory is allocated at creation. The file's size is sealed, so no mapping can meet SIGBUS.
  * Where the arena belongs to a cache server, every process that maps it also holds the write end of a pipe, the
    *lifeline*, for as long. When the server reads the pipe's end, nobody who came that way can write any more.

Layout: header (magic, version, 16 random bytes, geometry), one u64 generation per slot, padding to
4096, then the slots, each starting and ending on ``SLOT_ALIGNMENT_BYTES``.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import struct

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.connector.errors import ArenaError, ClosedError, ConfigError, UsageError
from kvferry.connector.layout import SLOT_ALIGNMENT_BYTES
from kvferry.connector.memory import available_bytes, format_bytes, huge_page_bytes

__all__ = ["MIN_SLOTS", "Arena", "ArenaHandle", "slots_for"]

MIN_SLOTS = 2
"""One block to read from and one to fill: fewer slots cannot serve anybody."""

_MAGIC = b"KVFARENA"
_VERSION = 1
_HEADER = struct.Struct("<8sI16sQQQ")
_TABLE_OFFSET = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ArenaHandle(msgspec.Struct, frozen=True, kw_only=True):
    """What another process of the same user needs to map an arena."""

    pid: int
    fd: int
    """File descriptor in the creator's process."""
    arena_id: bytes
    """16 random bytes, also in the header: a reused pid or descriptor is recognised."""
    slot_bytes: int
    num_slots: int
    header_bytes: int
    """Offset of the first slot."""
    total_bytes: int
    lifeline_fd: int = -1
    """Descriptor, in the same process, of the pipe's end that whoever maps the arena holds open; -1 without."""
    connection: int = 0
    """Tells apart several ways to one arena: a lifeline must be the one of the present connection."""


def slots_for(capacity_bytes: int, slot_bytes: int, huge_pages: bool = False) -> int:
    """Return how many slots fit into a capacity, header included.

    Raises:
        ConfigError: Fewer than ``MIN_SLOTS`` fit.
    """
    unit = huge_page_bytes() if huge_pages else SLOT_ALIGNMENT_BYTES
    usable = capacity_bytes // unit * unit
    slots = max(0, usable // (slot_bytes + 8))
    while slots and _header_bytes(slots) + slots * slot_bytes > usable:
        slots -= 1
    if slots < MIN_SLOTS:
        needed = -(-(_header_bytes(MIN_SLOTS) + MIN_SLOTS * slot_bytes) // unit) * unit
        raise ConfigError(
            "host.capacity",
            f"{format_bytes(capacity_bytes)} holds {slots} blocks of {format_bytes(slot_bytes)}",
            f"give at least {needed} bytes ({format_bytes(needed)}), or lower block_tokens",
        )
    return slots


class Arena:
    """A mapped arena. ``create`` in the owning process, ``attach`` in all others.

    Threads may use different slots at the same time; the methods themselves hold no locks.
    """

    def __init__(
        self, handle: ArenaHandle, fd: int, mapping: mmap.mmap, is_owner: bool, lifeline_fd: int = -1
    ) -> None:
        self._handle = handle
        self._fd = fd
        self._lifeline_fd = lifeline_fd
        self._mapping: mmap.mmap | None = mapping
        self._is_owner = is_owner
        whole = np.frombuffer(mapping, dtype=np.uint8)
        slots_end = handle.header_bytes + handle.num_slots * handle.slot_bytes
        self._slots = whole[handle.header_bytes : slots_end].reshape(handle.num_slots, handle.slot_bytes)
        table_end = _TABLE_OFFSET + 8 * handle.num_slots
        self._generations: npt.NDArray[np.uint64] = whole[_TABLE_OFFSET:table_end].view(np.uint64)

    @classmethod
    def create(
        cls, num_slots: int, slot_bytes: int, huge_pages: bool = False, logger: logging.Logger | None = None
    ) -> Arena:
        """Allocate an arena; blocks while the kernel clears the memory.

        Args:
            num_slots: See :func:`slots_for`.
            slot_bytes: Bytes of one slot, a multiple of ``SLOT_ALIGNMENT_BYTES``.
            huge_pages: Try huge pages; falls back to normal ones, saying so.
            logger: Where the fallback is reported.

        Raises:
            ArenaError: The memory is not there, or the kernel refuses.
        """
        if num_slots < 1 or slot_bytes < 1 or slot_bytes % SLOT_ALIGNMENT_BYTES:
            raise ArenaError(
                f"cannot make {num_slots} slots of {slot_bytes} bytes: "
                f"slots are positive multiples of {SLOT_ALIGNMENT_BYTES} bytes"
            )
        header_bytes = _header_bytes(num_slots)
        fd, total_bytes = _allocate(
            header_bytes + num_slots * slot_bytes, huge_pages, logger or logging.getLogger(__name__)
        )
        try:
            mapping = mmap.mmap(fd, total_bytes, flags=mmap.MAP_SHARED)
        except OSError as error:
            os.close(fd)
            raise ArenaError(f"cannot map {format_bytes(total_bytes)} of shared memory: {error}") from error
        handle = ArenaHandle(
            pid=os.getpid(),
            fd=fd,
            arena_id=os.urandom(16),
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            header_bytes=header_bytes,
            total_bytes=total_bytes,
        )
        mapping[: _HEADER.size] = _pack_header(handle)
        return cls(handle, fd, mapping, is_owner=True)

    @classmethod
    def attach(cls, handle: ArenaHandle) -> Arena:
        """Map an arena that another process (or this one) created.

        Raises:
            ArenaError: The creator is gone or another user's, or what lies there is not this arena.
        """
        # The lifeline first: whoever exports both closes the arena first, so if the arena is the right one
        # afterwards, the lifeline was too.
        lifeline_fd = _open_lifeline(handle) if handle.lifeline_fd >= 0 else -1
        fd = -1
        try:
            fd = _open_exported(handle, handle.fd, os.O_RDWR)
            mapping = _map_verified(fd, handle)
        except BaseException:
            _close_fds(fd, lifeline_fd)
            raise
        return cls(handle, fd, mapping, is_owner=False, lifeline_fd=lifeline_fd)

    @staticmethod
    def verify(fd: int, handle: ArenaHandle) -> None:
        """Make sure that a descriptor which this process was given is the arena of ``handle``.

        Raises:
            ArenaError: It is something else.
        """
        _map_verified(fd, handle).close()

    @property
    def handle(self) -> ArenaHandle:
        """What other processes need to attach. Valid while the creator runs."""
        return self._handle

    @property
    def slots_array(self) -> npt.NDArray[np.uint8]:
        """All slots: ``[num_slots, slot_bytes]`` uint8, writable, the shared memory itself."""
        self._require_open()
        return self._slots

    def slot(self, index: int) -> memoryview:
        """Return a slot's ``slot_bytes`` bytes, writable, the shared memory itself."""
        self._require_open()
        if not 0 <= index < self._handle.num_slots:
            raise UsageError(f"slot {index} is outside the arena's {self._handle.num_slots}")
        return memoryview(self._slots[index])

    def generation(self, index: int) -> int:
        """Return the generation of a slot: changes whenever the slot changes hands."""
        self._require_open()
        return int(self._generations[index])

    def set_generation(self, index: int, generation: int) -> None:
        """Publish a slot's generation to all processes. Owner only."""
        self._require_open()
        if not self._is_owner:
            raise UsageError("only the arena's creator decides which generation a slot has")
        self._generations[index] = generation

    def close(self) -> None:
        """Unmap. Idempotent; memory behind views that still exist goes with the last of them."""
        if self._mapping is None:
            return
        mapping, self._mapping = self._mapping, None
        del self._slots, self._generations
        try:
            mapping.close()
        except BufferError:
            pass  # a view is still in use
        _close_fds(self._fd, self._lifeline_fd)

    def _require_open(self) -> None:
        if self._mapping is None:
            raise ClosedError("the arena is closed")


def _header_bytes(num_slots: int) -> int:
    return -(-(_TABLE_OFFSET + 8 * num_slots) // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES


def _pack_header(handle: ArenaHandle) -> bytes:
    return _HEADER.pack(
        _MAGIC, _VERSION, handle.arena_id, handle.num_slots, handle.slot_bytes, handle.header_bytes
    )


def _allocate(needed_bytes: int, huge_pages: bool, logger: logging.Logger) -> tuple[int, int]:
    """Return (descriptor, size) of a sealed, fully allocated memfd."""
    if huge_pages:
        unit = huge_page_bytes()
        total_bytes = -(-needed_bytes // unit) * unit
        try:
            return _memfd(total_bytes, os.MFD_HUGETLB), total_bytes
        except OSError as error:
            logger.warning(
                "no huge pages for an arena of %s (%s): using normal pages; reserve %d in vm.nr_hugepages",
                format_bytes(total_bytes),
                error.strerror,
                total_bytes // unit,
            )
    room = available_bytes()
    if room is not None and needed_bytes > room:
        raise ArenaError(
            f"an arena of {format_bytes(needed_bytes)} does not fit into the {format_bytes(room)} of memory "
            "that this process may still take; lower host.capacity"
        )
    try:
        return _memfd(needed_bytes, 0), needed_bytes
    except OSError as error:
        why = "not enough memory" if error.errno in (errno.ENOSPC, errno.ENOMEM) else str(error)
        raise ArenaError(
            f"cannot allocate {format_bytes(needed_bytes)} of shared memory: {why}; lower host.capacity"
        ) from error


def _memfd(total_bytes: int, flags: int) -> int:
    fd = os.memfd_create("kvferry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, total_bytes)
        os.posix_fallocate(fd, 0, total_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_exported(handle: ArenaHandle, number: int, flags: int) -> int:
    path = f"/proc/{handle.pid}/fd/{number}"
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise ArenaError(
            f"cannot open the arena of process {handle.pid} ({path}): {error.strerror}; "
            "it must still run, as the same user and in the same container"
        ) from error


def _open_lifeline(handle: ArenaHandle) -> int:
    """Hold the lifeline too. O_NONBLOCK: opening a pipe must never wait for whoever reads it."""
    fd = _open_exported(handle, handle.lifeline_fd, os.O_WRONLY | os.O_NONBLOCK)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise ArenaError(f"descriptor {handle.lifeline_fd} of process {handle.pid} is no lifeline (reused)")


def _close_fds(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def _map_verified(fd: int, handle: ArenaHandle) -> mmap.mmap:
    where = f"what process {handle.pid} holds as descriptor {handle.fd}"
    hint = "the engine that made the arena has probably ended; restart this worker with it"
    found = os.fstat(fd)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if not stat.S_ISREG(found.st_mode) or seals & _SEALS != _SEALS:
        raise ArenaError(f"{where} is no arena (not a sealed memory file); {hint}")
    if found.st_uid != os.geteuid():
        raise ArenaError(f"{where} belongs to user {found.st_uid}, not to {os.geteuid()}; {hint}")
    needed = handle.header_bytes + handle.num_slots * handle.slot_bytes
    if found.st_size != handle.total_bytes or needed > handle.total_bytes:
        raise ArenaError(f"{where} has {found.st_size} bytes, expected {handle.total_bytes}; {hint}")
    try:
        mapping = mmap.mmap(fd, handle.total_bytes, flags=mmap.MAP_SHARED)
    except OSError as error:
        raise ArenaError(f"cannot map {format_bytes(handle.total_bytes)} of {where}: {error}") from error
    header = mapping[: _HEADER.size]
    if header != _pack_header(handle):
        why = "another arena" if header[: len(_MAGIC)] == _MAGIC else "no arena"
        mapping.close()
        raise ArenaError(f"{where} is {why} (pid or descriptor reused); {hint}")
    return mapping
