"""The conformance kit: what a tier has to get right, as tests that its author runs.

Subclass ``TierTests``, give a factory, run pytest::

    from kvferry.connector.testing import TierTests

    class TestMyTier(TierTests):
        def make_tier(self, context, place, capacity_bytes):
            return MyTier(MyOptions(path=str(place), capacity=capacity_bytes), context)

The kit needs pytest (``kvferry[test]``). Nothing else in kvferry imports it. The tiers kvferry ships are
held to the same class. Besides it there are tiers to test other things with: ``MemoryTier``, and
``FaultyTier`` and ``SlowTier``, which wrap another and misbehave.
"""

from __future__ import annotations

import pytest

_WITH_ASSERTS = (
    "capacity",
    "case",
    "concurrency",
    "contents",
    "faults",
    "lifecycle",
    "restart",
    "round_trip",
)
pytest.register_assert_rewrite(*[f"{__name__}.{module}" for module in _WITH_ASSERTS])  # before their import

from kvferry.connector.testing.blocks import Batch, Blocks, content_of, hostile_keys, key_of  # noqa: E402  # see above
from kvferry.connector.testing.case import Damage, TierCase  # noqa: E402  # see above
from kvferry.connector.testing.faulty import FaultyTier, SlowTier  # noqa: E402  # see above
from kvferry.connector.testing.memory import MemoryTier  # noqa: E402  # see above
from kvferry.connector.testing.suite import TierTests  # noqa: E402  # see above

__all__ = [
    "Batch",
    "Blocks",
    "Damage",
    "FaultyTier",
    "MemoryTier",
    "SlowTier",
    "TierCase",
    "TierTests",
    "content_of",
    "hostile_keys",
    "key_of",
]
