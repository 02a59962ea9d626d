"""A plugin: tier ``slow``, a memory tier whose calls take as long as the test says."""

from __future__ import annotations

import msgspec

from kvferry.connector.hooks import hookimpl
from kvferry.connector.testing.faulty import SlowTier
from kvferry.connector.testing.memory import MemoryTier
from kvferry.connector.tier import TierContext, TierType


class SlowOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


def open_slow(options: SlowOptions, context: TierContext) -> SlowTier:
    return SlowTier(MemoryTier(64 << 20, context), delay_s=0.0)


@hookimpl
def kvferry_tier_types() -> list[TierType]:
    return [TierType("slow", SlowOptions, open_slow, "a memory tier that takes its time, for tests")]
