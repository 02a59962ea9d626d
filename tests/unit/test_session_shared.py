"""Two engines over one shared tier: what one computed the other loads, until its weights change."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import common
import pytest
from played_engine import LAYOUT, PlayedEngine
from test_session import config, prompt

BLOCK = LAYOUT.block_tokens


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Callable[[], PlayedEngine]]:
    started: list[PlayedEngine] = []
    tier: dict[str, object] = {"type": "common", "place": request.node.nodeid}

    def make() -> PlayedEngine:
        started.append(PlayedEngine(config(plugins=("common",), tiers=(tier,))))
        return started[-1]

    yield make
    for engine in started:
        engine.close()
    common.PLACES.pop(request.node.nodeid, None)


def test_one_engine_loads_what_another_computed(start: Callable[[], PlayedEngine]) -> None:
    first, second = start(), start()
    first.run(prompt(3 * BLOCK))
    first.settle()
    record = second.run(prompt(3 * BLOCK))
    assert record.matched_tokens == {"common": 3 * BLOCK}
    assert record.loaded_tokens == 3 * BLOCK


def test_a_prompt_that_nobody_has_computed_is_a_miss_with_its_reason(
    start: Callable[[], PlayedEngine],
) -> None:
    record = start().run(prompt(3 * BLOCK))
    assert (record.loaded_tokens, record.missing_block, record.missing_reason) == (0, 0, "never_stored")


def test_new_weights_find_no_old_block_and_take_none_from_others(start: Callable[[], PlayedEngine]) -> None:
    first, second = start(), start()
    first.run(prompt(3 * BLOCK))
    first.settle()
    first.sessions.clear()
    assert first.run(prompt(3 * BLOCK)).loaded_tokens == 0
    first.settle()
    assert second.run(prompt(3 * BLOCK)).loaded_tokens == 3 * BLOCK, "the old weights' blocks are still there"
    assert first.run(prompt(3 * BLOCK)).loaded_tokens == 3 * BLOCK, "the new ones are found by their engine"
    assert start().run(prompt(3 * BLOCK)).loaded_tokens == 3 * BLOCK


def test_a_request_that_saw_both_weights_is_not_saved(start: Callable[[], PlayedEngine]) -> None:
    engine = start()
    request = engine.arrive(prompt(3 * BLOCK))
    pages = list(range(3 * BLOCK))
    engine.sessions.computed(request.name, request.tokens, BLOCK, pages)
    assert engine.sessions.take_jobs().saves
    engine.sessions.clear()
    engine.sessions.computed(request.name, request.tokens, 3 * BLOCK, pages)
    assert not engine.sessions.take_jobs().saves
    assert engine.sessions.offer(request.name, request.tokens, 0) == 0
