"""Offers that must be certain: leased when they are made, and given back when the engine does not take them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from played_engine import LAYOUT, PlayedEngine

from kvferry.connector.config import Config, HostConfig
from kvferry.engines.request import RequestInfo

BLOCK = LAYOUT.block_tokens
TOKENS = list(range(4 * BLOCK))
PAGES = list(range(8))


@pytest.fixture
def engine() -> Iterator[PlayedEngine]:
    made = PlayedEngine(Config(host=HostConfig(capacity=6 * LAYOUT.slot_bytes)))
    made.run(TOKENS)
    yield made
    made.close()


def offer(engine: PlayedEngine, name: str = "r") -> int:
    engine.sessions.open(RequestInfo(id=name, prompt_tokens=len(TOKENS)))
    offered = engine.sessions.offer(name, TOKENS, 0, may_wait=False)
    assert offered is not None
    return offered


def test_what_is_secured_stays_though_others_need_the_room(engine: PlayedEngine) -> None:
    offered = offer(engine)
    assert engine.sessions.secure("r", 0, offered) == offered == len(TOKENS)
    engine.run(list(range(1000, 1000 + 6 * BLOCK)))
    engine.sessions.accept("r", PAGES, 0, offered)
    jobs = engine.sessions.take_jobs()
    assert [len(load.copies) for load in jobs.loads] == [4]


def test_without_the_lease_others_take_the_room(engine: PlayedEngine) -> None:
    offered = offer(engine)
    engine.sessions.secure("r", 0, offered)
    assert not engine.sessions.decline("r")
    engine.run(list(range(1000, 1000 + 6 * BLOCK)))
    assert engine.sessions.secure("r", 0, offered) == 0


def test_no_more_is_secured_than_is_there(engine: PlayedEngine) -> None:
    offered = offer(engine)
    engine.run(list(range(1000, 1000 + 2 * BLOCK)))
    secured = engine.sessions.secure("r", BLOCK // 2, offered - BLOCK // 2)
    assert secured in {BLOCK // 2 * half for half in (0, 1, 3, 5)}


def test_a_load_that_no_worker_knows_is_taken_back(engine: PlayedEngine) -> None:
    offered = offer(engine)
    engine.sessions.secure("r", 0, offered)
    engine.sessions.accept("r", PAGES, 0, offered)
    assert engine.sessions.is_loading("r")
    assert engine.sessions.decline("r")
    assert not engine.sessions.is_loading("r")
    assert not engine.sessions.take_jobs().loads
    assert offer(engine) == offered


def test_a_load_that_workers_know_is_not(engine: PlayedEngine) -> None:
    offered = offer(engine)
    engine.sessions.accept("r", PAGES, 0, offered)
    engine.sessions.take_jobs()
    assert not engine.sessions.decline("r")
    assert engine.sessions.is_loading("r")
    assert offer(engine) == 0
    engine.sessions.load_finished("r", ok=True)
    assert offer(engine) == offered


@pytest.mark.parametrize("ends_by", ["finish", "clear", "offer"])
def test_a_secured_lease_ends_with_what_it_was_for(engine: PlayedEngine, ends_by: str) -> None:
    engine.sessions.secure("r", 0, offer(engine))
    if ends_by == "finish":
        engine.sessions.finish("r")
    elif ends_by == "clear":
        engine.sessions.clear()
    else:
        offer(engine)
    assert engine.sessions._loads._secured == {}
