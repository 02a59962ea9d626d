"""S3 below the arena of a whole service: engines find each other's blocks, and an outage is a miss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from s3_server import BUCKET, Weed, client, names_below, prefix_of
from test_embedded import Worker, prefix
from test_embedded_shared import fetch

RESUME_S = 60.0
"""How long hits may take to resume once the store answers again."""


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Callable[..., Worker]]:
    """Starts services with S3 as the only tier below an arena of their own: ``engine(weed, **options)``."""
    started: list[Worker] = []

    def make(weed: Weed, **options: object) -> Worker:
        own = {"deadline_s": 2.0, "ask": "always", **options}
        tier = {"type": "s3", **weed.options(prefix=prefix_of(request)), **own}
        started.append(
            Worker(32, plugins=["kvferry.plugins.s3"], tiers=[tier], load_deadline_s=2.0, retry_failed_s=1.0)
        )
        return started[-1]

    yield make
    for worker in started:
        worker.close()


def test_a_second_engine_with_an_empty_host_reuses_the_blocks_of_the_first(
    weed: Weed, engine: Callable[..., Worker]
) -> None:
    keys = prefix(20)
    first = engine(weed)
    assert first.save(keys) == 20
    first.settle()
    second = engine(weed)
    assert fetch(second, keys) == 20
    second.assert_nothing_leaked()
    first.assert_nothing_leaked()


def test_it_loads_as_far_as_the_blocks_reach(weed: Weed, engine: Callable[..., Worker]) -> None:
    keys = prefix(20)
    first = engine(weed)
    first.save(keys[:12])
    first.settle()
    assert fetch(engine(weed), keys) == 12


def test_a_changed_object_is_a_miss_and_is_deleted(
    weed: Weed, engine: Callable[..., Worker], request: pytest.FixtureRequest
) -> None:
    keys = prefix(4)
    first = engine(weed)
    first.save(keys)
    first.settle()
    behind = client(weed.endpoint)
    (name,) = [
        name for name in names_below(weed.endpoint, prefix_of(request)) if name.endswith(keys[2].hex())
    ]
    body = bytearray(behind.get_object(Bucket=BUCKET, Key=name)["Body"].read())
    body[-1] ^= 1
    behind.put_object(Bucket=BUCKET, Key=name, Body=bytes(body))
    second = engine(weed)
    assert fetch(second, keys) == 2
    second.settle()
    assert name not in names_below(weed.endpoint, prefix_of(request))


def test_while_the_store_is_frozen_requests_miss_in_time_and_hits_resume_by_themselves(
    own_weed: Weed, engine: Callable[..., Worker]
) -> None:
    keys = prefix(8)
    first = engine(own_weed)
    first.save(keys)
    first.settle()
    second = engine(own_weed)
    own_weed.freeze()
    started = time.monotonic()
    assert fetch(second, keys) == 0
    assert time.monotonic() - started < 10
    assert second.save(prefix(4, "meanwhile")) == 4
    own_weed.thaw()
    assert second.wait_until(lambda: fetch(second, keys) == 8, RESUME_S), "hits do not resume"


def test_a_service_starts_though_the_store_is_away_and_finds_its_blocks_later(
    own_weed: Weed, engine: Callable[..., Worker]
) -> None:
    keys = prefix(8)
    first = engine(own_weed)
    first.save(keys)
    first.settle()
    own_weed.kill()
    second = engine(own_weed)
    assert fetch(second, keys) == 0
    assert second.save(prefix(4, "meanwhile")) == 4
    assert second.service.lookup(prefix(4, "meanwhile")).ready == 4
    own_weed.start()
    assert second.wait_until(lambda: fetch(second, keys) == 8, RESUME_S), "hits do not resume"
