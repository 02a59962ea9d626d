"""A shared tier as a plugin: every tier of type ``common`` with the same ``place`` is one dict in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import msgspec

from kvferry.connector.errors import TierUnavailable
from kvferry.connector.hooks import hookimpl
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing.faulty import SlowTier
from kvferry.connector.testing.memory import MemoryTier
from kvferry.connector.tier import Capabilities, Frame, Outcome, TierContext, TierStats, TierType

PLACES: dict[str, MemoryTier] = {}
CAPACITY_BYTES = 64 << 20
STUCK_S = 30.0


class CommonOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    place: str


class CommonTier:
    """One client of a place; counts what it was asked for."""

    capabilities = Capabilities(is_persistent=True, is_shared=True, is_bounded=False)

    def __init__(self, options: CommonOptions, context: TierContext) -> None:
        quiet = msgspec.structs.replace(context, on_removed=lambda keys: None)
        self._place = PLACES.setdefault(options.place, MemoryTier(CAPACITY_BYTES, quiet))
        self.questions: list[int] = []
        self.is_dead = False
        self.may_store = threading.Event()
        """While it is clear, stores wait."""
        self.may_store.set()

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        self.questions.append(len(keys))
        return self._alive().contains(keys)

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        return self._alive().load(into)

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        self.may_store.wait(STUCK_S)
        return self._alive().store(frames)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        self._alive().delete(keys)

    def _alive(self) -> MemoryTier:
        if self.is_dead:
            raise TierUnavailable("common", "dead")
        return self._place

    def scan(self) -> Iterator[BlockKey]:
        return iter(())

    def stats(self) -> TierStats:
        return msgspec.structs.replace(self._place.stats(), capacity_bytes=None)

    def close(self) -> None:
        self.may_store.set()


def open_slow(options: CommonOptions, context: TierContext) -> SlowTier:
    return SlowTier(CommonTier(options, context), delay_s=0.0)


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    return [
        TierType("common", CommonOptions, CommonTier, "a dict that several tiers share, for tests"),
        TierType("slow-common", CommonOptions, open_slow, "the same, and takes its time"),
    ]
