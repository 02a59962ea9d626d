"""The remote tier on real cache servers: what it stores, opens, spreads, and says when it cannot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cache_server import CacheServer
from remote_kit import keys, load, open_tier, start, store

from kvferry.connector.tier import Outcome


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheServer]:
    with start(tmp_path_factory) as started:
        yield started


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_blocks_come_back_from_a_server(server: CacheServer, scheme: str) -> None:
    tier = open_tier(getattr(server, scheme))
    wanted = keys(8, scheme)
    assert load(tier, wanted) == [Outcome.MISSING] * 8
    assert store(tier, wanted[::2]) == [Outcome.OK] * 4
    assert tier.contains(wanted) == [True, False] * 4
    assert load(tier, wanted) == [Outcome.OK, Outcome.MISSING] * 4
    tier.close()
