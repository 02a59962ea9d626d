"""Engines that share a tier find each other's blocks, and never each other's mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import common
import pytest
from test_embedded import LAYOUT, Worker, disk, prefix

from kvferry.connector.keys import BlockKey
from kvferry.connector.service import MissReason


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """A tier's configuration; whoever is given it shares one place."""
    yield {"type": "common", "place": request.node.nodeid}
    common.PLACES.pop(request.node.nodeid, None)


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def make(*tiers: dict[str, object], slots: int = 32, **settings: object) -> Worker:
        started.append(Worker(slots, plugins=["common"], tiers=list(tiers), **settings))
        return started[-1]

    yield make
    for worker in started:
        worker.close(1.0)


def common_tier(worker: Worker) -> common.CommonTier:
    tier = worker.service._tiers[-1].tier
    assert isinstance(tier, common.CommonTier)
    return tier


def fetch(worker: Worker, keys: Sequence[BlockKey]) -> int:
    """Wait like an engine: while a prefetch says that more is coming."""

    def is_through() -> bool:
        coming = worker.service.prefetch("load", keys).blocks
        return worker.service.lookup(keys).ready >= coming

    assert worker.wait_until(is_through)
    return worker.read(keys)


Start = Callable[..., Worker]
Place = dict[str, object]


def test_a_second_engine_finds_what_the_first_one_stored(start: Start, place: Place) -> None:
    first, second, keys = start(place), start(place), prefix(30)
    first.save(keys)
    first.settle()
    assert fetch(second, keys) == 30
    assert second.service.counters().tiers["common"].asked_blocks == 30
    second.assert_nothing_leaked()


def test_a_prompt_nobody_has_seen_costs_one_question(start: Start, place: Place) -> None:
    worker = start(place)
    assert fetch(worker, prefix(30)) == 0
    assert common_tier(worker).questions == [8]
    assert worker.service.lookup(prefix(30)).missing is MissReason.NEVER_STORED


def test_a_block_that_another_engine_deleted_is_a_miss(start: Start, place: Place) -> None:
    first, second, keys = start(place), start(place), prefix(4)
    first.save(keys)
    first.settle()
    assert fetch(second, keys[:1]) == 1
    second.service.prefetch("load", keys)  # asks for the others
    second.settle()
    second.service.release_owner("load")
    common_tier(first).delete(keys[2:])
    assert fetch(second, keys) in (2, 4)  # four, where they were loaded before they were deleted
    second.assert_nothing_leaked()


def test_a_dead_shared_tier_is_a_miss_and_comes_back(start: Start, place: Place) -> None:
    first, second, keys = start(place), start(place, speed=50.0), prefix(4)
    first.save(keys)
    first.settle()
    common_tier(second).is_dead = True
    assert fetch(second, keys) == 0
    assert second.service.lookup(keys).missing is MissReason.TIER_DOWN
    common_tier(second).is_dead = False
    assert second.wait_until(lambda: fetch(second, keys) == 4)


def test_a_hit_below_is_promoted_to_the_disk_and_found_there_after_a_restart(
    start: Start, place: Place, tmp_path: Path
) -> None:
    first, keys = start(place), prefix(10)
    first.save(keys)
    first.settle()
    second = start(disk(tmp_path), place)
    assert fetch(second, keys) == 10
    second.settle()
    second.close()
    third = start(disk(tmp_path), place)
    assert set(third.service.lookup(keys).tiers) == {"disk"}
    assert common_tier(third).questions == []


def test_deferred_writes_are_made_when_the_service_closes(start: Start, place: Place) -> None:
    first, keys = start(place | {"write": "back"}), prefix(4)
    first.save(keys)
    first.settle()
    assert first.service.counters().tiers["common"].stored_blocks == 0
    first.close()
    assert fetch(start(place), keys) == 4


def test_a_secret_keeps_out_what_others_wrote(start: Start, place: Place) -> None:
    stranger, owner, keys = start(place), start(place, secret="ours"), prefix(2)
    stranger.save(keys)
    stranger.settle()
    assert fetch(owner, keys) == 0
    assert owner.service.counters().tiers["common"].refused == {"mac": 2}
    assert fetch(start(place), keys) == 2, "they are still there for those who wrote them"


def test_a_damaged_block_is_deleted_for_everybody(start: Start, place: Place) -> None:
    first, second, keys = start(place), start(place), prefix(2)
    first.save(keys)
    first.settle()
    (held,) = common.PLACES.values()
    header, body = held._blocks[keys[1]]
    held._blocks[keys[1]] = header, b"x" + body[1:]
    assert fetch(second, keys) == 1
    assert second.service.counters().tiers["common"].refused == {"checksum": 1}
    assert common_tier(first).contains(keys) == [True, False]


def test_bytes_that_a_codec_saved_are_not_counted_as_moved(start: Start, place: Place) -> None:
    first, second, keys = start(place | {"codec": "lz4"}), start(place), prefix(4)
    first.save(keys)
    first.settle()
    assert fetch(second, keys) == 4
    stored = first.service.counters().tiers["common"].stored_bytes
    assert 0 < stored < 4 * LAYOUT.payload_bytes
    assert second.service.counters().tiers["common"].loaded_bytes == stored
