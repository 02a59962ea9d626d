"""Small blocks, contexts and tiers for the tests of the remote tier."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
from cache_server import CacheServer

from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.testing import Blocks, key_of
from kvferry.connector.tier import Outcome, TierContext
from kvferry.plugins.remote.opening import open_remote_tier
from kvferry.plugins.remote.options import RemoteOptions
from kvferry.plugins.remote.tier import RemoteTier

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=2, block_tokens=64, head_dim=30, itemsize=2)
"""15,360 bytes of payload."""
FINGERPRINT = bytes(range(32))
BLOCKS = Blocks(LAYOUT, FINGERPRINT)
TOKEN = "a token of enough characters"
SMALL = {"host": {"capacity": "16MiB"}}


def context(deadline_s: float = 10.0, **changes: object) -> TierContext:
    def no_policy(name: str) -> object:
        raise AssertionError(f"a remote tier has no use for the policy {name}")

    def not_removed(keys: Sequence[BlockKey]) -> None:
        raise AssertionError("a remote tier drops nothing by itself")

    given: dict[str, object] = {
        "name": "far",
        "layout": LAYOUT,
        "fingerprint": FINGERPRINT,
        "instance": "",
        "on_removed": not_removed,
        "make_eviction_policy": no_policy,
        "logger": logging.getLogger("kvferry.test.remote"),
        "deadline_s": deadline_s,
    }
    return TierContext(**(given | changes))  # type: ignore[arg-type]


def open_tier(*servers: str, deadline_s: float = 10.0, **options: object) -> RemoteTier:
    chosen = RemoteOptions(servers=list(servers), **options)  # type: ignore[arg-type]
    return open_remote_tier(chosen, context(deadline_s))


def keys(count: int, salt: str = "") -> list[BlockKey]:
    return [key_of(number, salt) for number in range(count)]


def store(tier: RemoteTier, wanted: Sequence[BlockKey]) -> list[Outcome]:
    return tier.store(BLOCKS.sealed(wanted).sources())


def load(tier: RemoteTier, wanted: Sequence[BlockKey]) -> list[Outcome]:
    """Load blocks; each that is ``OK`` has to be the right one, and nothing beside it may be written."""
    batch = BLOCKS.empty(wanted)
    outcomes = tier.load(batch.frames)
    batch.check_guards()
    for frame, outcome in zip(batch.frames, outcomes, strict=True):
        if outcome is Outcome.OK:
            BLOCKS.verify(frame)
    return outcomes


def start(factory: pytest.TempPathFactory, config: dict[str, object] | None = None) -> CacheServer:
    """Start a server in a directory of its own; the caller ends it."""
    return CacheServer(factory.mktemp("kv"), SMALL if config is None else config)
