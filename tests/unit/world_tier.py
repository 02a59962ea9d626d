"""A tier on a simulated outside that can be frozen, killed, filled and damaged; right by itself.

``test_testing_kit`` breaks it in many ways. What several tiers of one place have in common is their
``World``: it stands for a server, or a disk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvferry.connector.errors import ClosedError, TierTimeout, TierUnavailable
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import Damage, TierTests
from kvferry.connector.tier import Capabilities, Frame, Outcome, Tier, TierContext, TierStats


class World:
    """The outside of one place."""

    def __init__(self) -> None:
        self.blocks: dict[BlockKey, bytes] = {}
        self.lock = threading.RLock()
        self.is_awake = threading.Event()
        self.is_awake.set()
        self.is_alive = True
        self.is_full = False
        self.owner = b""


class WorldTier:
    """Persistent, not shared, bounded; evicts what was stored first."""

    claims = Capabilities(is_persistent=True, is_shared=False, is_bounded=True)

    def __init__(self, context: TierContext, world: World, capacity_bytes: int) -> None:
        self.context, self.world, self.capacity_bytes = context, world, capacity_bytes
        self.evictions = 0
        self.is_closed = False
        self.reach()

    @property
    def capabilities(self) -> Capabilities:
        return self.claims

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        self.reach()
        with self.world.lock:
            return [key in self.world.blocks for key in keys]

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        self.reach()
        return [self.load_one(frame) for frame in into]

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        self.reach()
        return [self.store_one(frame) for frame in frames]

    def delete(self, keys: Sequence[BlockKey]) -> None:
        self.reach()
        with self.world.lock:
            for key in keys:
                self.world.blocks.pop(key, None)

    def scan(self) -> Iterator[BlockKey]:
        self.reach()
        with self.world.lock:
            return iter(list(self.world.blocks))

    def stats(self) -> TierStats:
        self.require_open()
        with self.world.lock:
            return TierStats(
                blocks=len(self.world.blocks),
                used_bytes=self.used_bytes(),
                capacity_bytes=self.capacity_bytes,
                evictions=self.evictions,
            )

    def close(self) -> None:
        self.is_closed = True

    # ---- what broken ones override

    def require_open(self) -> None:
        if self.is_closed:
            raise ClosedError("closed")

    def reach(self) -> None:
        """Come through to the outside, or give up in time."""
        self.require_open()
        if not self.world.is_alive:
            raise TierUnavailable(self.context.name, "the outside is gone")
        if not self.world.is_awake.wait(self.context.deadline_s):
            raise TierTimeout(self.context.name, "no answer")

    def load_one(self, frame: Frame) -> Outcome:
        with self.world.lock:
            raw = self.world.blocks.get(frame.key)
        if raw is None:
            return Outcome.MISSING
        body = raw[HEADER_BYTES:]
        if len(raw) < HEADER_BYTES or len(body) > frame.length:
            return Outcome.FAILED
        frame.header[:] = raw[:HEADER_BYTES]
        frame.payload[: len(body)] = body
        return Outcome.OK

    def store_one(self, frame: Frame) -> Outcome:
        evicted: list[BlockKey] = []
        with self.world.lock:
            if frame.key in self.world.blocks:
                return Outcome.OK
            if self.world.is_full:
                return Outcome.NO_ROOM
            while self.used_bytes() + HEADER_BYTES + frame.length > self.capacity_bytes:
                evicted.append(self.evict())
            self.put(frame)
        if evicted:
            self.report(evicted)
        return Outcome.OK

    def put(self, frame: Frame) -> None:
        self.world.blocks[frame.key] = bytes(frame.header) + bytes(frame.body)

    def evict(self) -> BlockKey:
        oldest = next(iter(self.world.blocks))
        del self.world.blocks[oldest]
        self.evictions += 1
        return oldest

    def report(self, evicted: Sequence[BlockKey]) -> None:
        self.context.on_removed(evicted)

    def used_bytes(self) -> int:
        return sum(map(len, self.world.blocks.values()))


class WorldKit(TierTests):
    """The kit on a kind of ``WorldTier``, with every back door."""

    kind: type[WorldTier] = WorldTier
    deadline_s = 1.0
    outage_deadline_s = 0.1
    grace_s = 0.4
    small_capacity_bytes = 400_000

    def make_tier(self, context: TierContext, place: Path, capacity_bytes: int) -> Tier:
        return self.kind(context, self.worlds().setdefault(place, World()), capacity_bytes)

    def damage(self, tier: Tier, place: Path, key: BlockKey, how: Damage) -> None:
        world = self.worlds()[place]
        world.blocks[key] = self.damaged(world.blocks[key], how)

    def suspend(self) -> None:
        self.worlds().setdefault(self.place, World()).is_awake.clear()

    def resume(self) -> None:
        self.worlds()[self.place].is_awake.set()

    def kill(self) -> None:
        world = self.worlds().setdefault(self.place, World())
        world.is_alive = False
        world.blocks.clear()

    def revive(self) -> None:
        self.worlds()[self.place].is_alive = True

    def exhaust(self, tier: Tier, place: Path) -> None:
        self.worlds()[place].is_full = True

    def relieve(self, tier: Tier, place: Path) -> None:
        self.worlds()[place].is_full = False

    def worlds(self) -> dict[Path, World]:
        """The places of this test."""
        known: dict[Path, World] = self.__dict__.setdefault("_worlds", {})
        return known
