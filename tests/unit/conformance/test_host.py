"""The conformance kit on the host tier: the arena and its manager, made to look like any other tier.

The host tier is no ``Tier``: blocks get into it by reserve, copy, commit and out by lease, copy, release, on
one thread. ``HostAsTier`` does that for each call, under a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvferry.connector.arena import Arena
from kvferry.connector.config import Config, HostConfig
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.keys import BlockKey
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.testing import TierTests
from kvferry.connector.tier import Capabilities, Frame, Outcome, Tier, TierContext, TierStats


class HostAsTier:
    """Stores bodies in the arena; headers and lengths, which the arena does not keep, in a dict."""

    def __init__(self, context: TierContext, capacity_bytes: int) -> None:
        self._context = context
        self._service = EmbeddedService(
            Config(host=HostConfig(capacity=capacity_bytes, eviction="lru")),
            context.layout,
            context.fingerprint,
            PluginRegistry(use_entry_points=False),
        )
        self._arena = Arena.attach(self._service.arena)
        self._headers: dict[BlockKey, tuple[bytes, int]] = {}
        self._lock = threading.Lock()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(is_persistent=False, is_shared=False, is_bounded=True)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        with self._lock:
            return [self._is_held(key) for key in keys]

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        with self._lock:
            self._service.poll()
            return [self._load(frame) for frame in into]

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        with self._lock:
            self._service.poll()
            outcomes = [self._store(frame) for frame in frames]
            evicted = self._take_events()
        if evicted:
            self._context.on_removed(evicted)
        return outcomes

    def delete(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            self._service.report_load_failed(keys)
            self._take_events()

    def scan(self) -> Iterator[BlockKey]:
        with self._lock:
            self._service.poll()
            return iter([key for key in self._headers if self._is_held(key)])

    def stats(self) -> TierStats:
        with self._lock:
            self._service.poll()
            counters = self._service.counters()
            return TierStats(
                blocks=counters.host_blocks,
                used_bytes=counters.used_slots * self._context.layout.slot_bytes,
                capacity_bytes=counters.capacity_bytes,
                evictions=counters.host_evictions,
            )

    def close(self) -> None:
        with self._lock:
            self._service.close(1.0)
            self._arena.close()

    def _is_held(self, key: BlockKey) -> bool:
        return self._service.lookup([key]).ready == 1

    def _load(self, frame: Frame) -> Outcome:
        lease = self._service.lease("kit", [frame.key])
        if not lease.places:
            return Outcome.MISSING
        (place,) = lease.places
        header, length = self._headers[frame.key]
        frame.header[:] = header
        frame.payload[:length] = self._arena.slot(place.slot)[:length]
        assert self._arena.generation(place.slot) == place.generation
        self._service.release(lease)
        return Outcome.OK

    def _store(self, frame: Frame) -> Outcome:
        reservation = self._service.reserve("kit", [frame.key])
        if not reservation.places:
            return Outcome.OK if self._is_held(frame.key) else Outcome.NO_ROOM
        (place,) = reservation.places
        self._arena.slot(place.slot)[: frame.length] = frame.body
        self._headers[frame.key] = (bytes(frame.header), frame.length)
        self._service.commit(reservation, [frame.key])
        return Outcome.OK

    def _take_events(self) -> list[BlockKey]:
        events = self._service.take_events()
        return [key for event in events if event.kind == "removed" for key in event.keys]


class TestHost(TierTests):
    small_capacity_bytes = 1 << 20

    def make_tier(self, context: TierContext, place: Path, capacity_bytes: int) -> Tier:
        return HostAsTier(context, capacity_bytes)
