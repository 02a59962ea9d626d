"""The smallest tier that is right: frames in a dict, bounded, gone with the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from kvferry.connector.errors import ClosedError
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Capabilities, Frame, Outcome, TierContext, TierStats

__all__ = ["MemoryTier"]


class MemoryTier:
    """Holds frames in memory and evicts what was stored first; something to test other things with.

    Thread-safe: one lock guards everything, and is held while bytes are copied.

    Args:
        capacity_bytes: Most bytes of headers and bodies together.
        context: What kvferry gave the tier.
    """

    def __init__(self, capacity_bytes: int, context: TierContext) -> None:
        self._capacity_bytes = capacity_bytes
        self._context = context
        self._blocks: dict[BlockKey, tuple[bytes, bytes]] = {}
        self._used_bytes = 0
        self._evictions = 0
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def capabilities(self) -> Capabilities:
        """Bounded, and nothing else."""
        return Capabilities(is_persistent=False, is_shared=False, is_bounded=True)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Tell for each key whether it is held."""
        with self._lock:
            self._require_open()
            return [key in self._blocks for key in keys]

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Copy the blocks that are held into their buffers."""
        with self._lock:
            self._require_open()
            return [self._load(frame) for frame in into]

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Copy the frames; the oldest blocks make room."""
        evicted: list[BlockKey] = []
        with self._lock:
            self._require_open()
            outcomes = [self._store(frame, evicted) for frame in frames]
        if evicted:
            self._context.on_removed(evicted)
        return outcomes

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget the keys."""
        with self._lock:
            self._require_open()
            for key in keys:
                self._forget(key)

    def scan(self) -> Iterator[BlockKey]:
        """Yield the keys held when called, oldest first."""
        with self._lock:
            self._require_open()
            return iter(list(self._blocks))

    def stats(self) -> TierStats:
        """Return the current size."""
        with self._lock:
            self._require_open()
            return TierStats(
                blocks=len(self._blocks),
                used_bytes=self._used_bytes,
                capacity_bytes=self._capacity_bytes,
                evictions=self._evictions,
            )

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._is_closed = True
            self._blocks.clear()

    def _load(self, frame: Frame) -> Outcome:
        held = self._blocks.get(frame.key)
        if held is None:
            return Outcome.MISSING
        header, body = held
        if len(body) > frame.length:
            return Outcome.FAILED
        frame.header[:] = header
        frame.payload[: len(body)] = body
        return Outcome.OK

    def _store(self, frame: Frame, evicted: list[BlockKey]) -> Outcome:
        size = HEADER_BYTES + frame.length
        if frame.key in self._blocks:
            return Outcome.OK
        if size > self._capacity_bytes:
            return Outcome.NO_ROOM
        while self._used_bytes + size > self._capacity_bytes:
            oldest = next(iter(self._blocks))
            self._forget(oldest)
            self._evictions += 1
            evicted.append(oldest)
        self._blocks[frame.key] = (bytes(frame.header), bytes(frame.body))
        self._used_bytes += size
        return Outcome.OK

    def _forget(self, key: BlockKey) -> None:
        held = self._blocks.pop(key, None)
        if held is not None:
            self._used_bytes -= HEADER_BYTES + len(held[1])

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"tier {self._context.name!r} is closed")
