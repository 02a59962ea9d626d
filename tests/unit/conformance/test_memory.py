"""The conformance kit on the tier that lives in a dict."""

from __future__ import annotations

from pathlib import Path

from kvferry.connector.testing import MemoryTier, TierTests
from kvferry.connector.tier import Tier, TierContext


class TestMemory(TierTests):
    def make_tier(self, context: TierContext, place: Path, capacity_bytes: int) -> Tier:
        return MemoryTier(capacity_bytes, context)
