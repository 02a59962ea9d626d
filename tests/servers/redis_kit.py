"""Small blocks, contexts and tiers for the tests of the Redis tier."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence

from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.testing import Blocks, key_of
from kvferry.connector.tier import Outcome, TierContext
from kvferry.plugins.redis.opening import open_redis_tier
from kvferry.plugins.redis.options import RedisOptions
from kvferry.plugins.redis.tier import RedisTier

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=2, block_tokens=64, head_dim=30, itemsize=2)
"""15,360 bytes of payload."""
FINGERPRINT = bytes(range(32))
BLOCKS = Blocks(LAYOUT, FINGERPRINT)
LOGGER = logging.getLogger("kvferry.test.redis")


def fresh_prefix() -> str:
    """Return a prefix that no other test on the same server has."""
    return f"t-{uuid.uuid4().hex[:12]}"


def context(
    deadline_s: float = 10.0, removed: list[BlockKey] | None = None, fingerprint: bytes = FINGERPRINT
) -> TierContext:
    def no_policy(name: str) -> object:
        raise AssertionError(f"a Redis tier has no use for the policy {name}")

    return TierContext(
        name="r",
        layout=LAYOUT,
        fingerprint=fingerprint,
        instance="",
        on_removed=(removed if removed is not None else []).extend,
        make_eviction_policy=no_policy,
        logger=LOGGER,
        deadline_s=deadline_s,
    )


def open_tier(
    url: str,
    deadline_s: float = 10.0,
    removed: list[BlockKey] | None = None,
    fingerprint: bytes = FINGERPRINT,
    **options: object,
) -> RedisTier:
    chosen = RedisOptions(url=url, **options)  # type: ignore[arg-type]
    return open_redis_tier(chosen, context(deadline_s, removed, fingerprint))


def keys(count: int, salt: str = "") -> list[BlockKey]:
    return [key_of(number, salt) for number in range(count)]


def store(tier: RedisTier, wanted: Sequence[BlockKey]) -> list[Outcome]:
    return tier.store(BLOCKS.sealed(wanted).sources())


def load(tier: RedisTier, wanted: Sequence[BlockKey]) -> list[Outcome]:
    """Load into dirty buffers; every block that is OK is verified, every byte of it."""
    batch = BLOCKS.empty(wanted)
    outcomes = tier.load(batch.frames)
    batch.check_guards()
    for frame, outcome in zip(batch.frames, outcomes, strict=True):
        if outcome is Outcome.OK:
            BLOCKS.verify(frame)
    return outcomes
