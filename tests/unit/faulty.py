"""The kit's tiers as a plugin: ``memory``, and ``faulty``, which wraps any other and misbehaves.

Load it with ``plugins: ["faulty"]`` and this directory on ``sys.path`` (``PYTHONPATH=tests/unit`` for an
engine).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.hooks import hookimpl
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.testing.faulty import LOAD_MODES, MODES, FaultyTier
from kvferry.connector.testing.memory import MemoryTier
from kvferry.connector.tier import TierContext, TierType

__all__ = ["LOAD_MODES", "MODES", "FaultyTier", "MemoryTier"]


class MemoryOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    capacity_blocks: int = 1 << 30


class FaultyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    inner: dict[str, object]
    """Configuration of the tier that is wrapped."""
    seed: int = 0
    rate: float = 0.2
    modes: tuple[str, ...] = MODES
    slow_s: float = 0.5
    die_after: int = 0


def _make_memory(options: MemoryOptions, context: TierContext) -> MemoryTier:
    return MemoryTier(options.capacity_blocks * (HEADER_BYTES + context.layout.payload_bytes), context)


def _make_faulty(options: FaultyOptions, context: TierContext) -> FaultyTier:
    inner = dict(options.inner)
    inner_type = PluginRegistry(["faulty"]).tier_type(str(inner.pop("type")))
    return FaultyTier(
        inner_type.create(msgspec.convert(inner, inner_type.options), context),
        options.seed,
        rate=options.rate,
        modes=options.modes,
        slow_s=options.slow_s,
        die_after=options.die_after,
    )


@hookimpl
def kvferry_tier_types() -> Sequence[TierType]:
    return [
        TierType("memory", MemoryOptions, _make_memory, "a dict, for tests"),
        TierType("faulty", FaultyOptions, _make_faulty, "another tier that misbehaves, for tests"),
    ]
