"""How long a request waits for slower tiers, what it goes on with, and what its record says of it.

The service is played: it answers what the test scripts, on the test's clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from played_engine import FINGERPRINT, LAYOUT, PAGE_TOKENS

from kvferry.connector.arena import ArenaHandle
from kvferry.connector.config import Config
from kvferry.connector.explain import RequestRecord
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.service import Coming, Lease, Match, MissReason, Place
from kvferry.engines.prefill import MIN_STEPS
from kvferry.engines.request import RequestInfo
from kvferry.engines.session import EngineSessions
from kvferry.engines.waiting import HOPE_FACTOR, MIN_WAIT_S, WAIT_FACTOR, Waiting, wait_limit

BLOCK = LAYOUT.block_tokens
BLOCKS = 10
TOKENS = list(range(BLOCKS * BLOCK))
BLOCK_S = 0.1
"""Seconds in which the engine computes a block."""


class PlayedService:
    """Blocks ``0..ready`` are in the arena, those up to ``reachable`` come from ``tiers``."""

    layout: BlockLayout = LAYOUT
    arena: ArenaHandle | None = None

    def __init__(self) -> None:
        self.ready = 0
        self.reachable = BLOCKS
        self.tiers = ["s3"] * BLOCKS
        self.missing = MissReason.NONE
        self.coming = Coming(BLOCKS)
        self.asked: list[float | None] = []
        self.failed: list[BlockKey] = []

    def lookup(self, keys: Sequence[BlockKey]) -> Match:
        tiers = ["host"] * self.ready + self.tiers[self.ready : self.reachable]
        return Match(self.ready, self.reachable, tuple(tiers), self.missing)

    def prefetch(self, owner: str, keys: Sequence[BlockKey], block_s: float | None = None) -> Coming:
        self.asked.append(block_s)
        return self.coming

    def lease(self, owner: str, keys: Sequence[BlockKey]) -> Lease:
        return Lease(1, tuple(Place(key, index, 0) for index, key in enumerate(keys)))

    def release(self, lease: Lease) -> None: ...

    def release_owner(self, owner: str) -> None: ...

    def report_load_failed(self, keys: Sequence[BlockKey]) -> None:
        self.failed += keys


class Engine:
    def __init__(self, is_measured: bool = True, **config: object) -> None:
        self.now = 1000.0
        self.service = PlayedService()
        self.records: list[RequestRecord] = []
        self.sessions = EngineSessions(
            self.service,  # type: ignore[arg-type]
            Config(save="none", **config),  # type: ignore[arg-type]
            FINGERPRINT,
            PAGE_TOKENS,
            1,
            self.records.append,
            lambda: self.now,
        )
        if is_measured:
            for _ in range(MIN_STEPS):
                self.compute(100 * BLOCK)
        self.sessions.open(RequestInfo(id="r", prompt_tokens=len(TOKENS)))

    def compute(self, tokens: int) -> None:
        """Run a step of a prefill."""
        self.sessions.prefill.step_planned(tokens, self.now)
        self.now += tokens / BLOCK * BLOCK_S
        self.sessions.prefill.step_ended(self.now)

    def offer(self) -> int | None:
        return self.sessions.offer("r", TOKENS, 0)

    def waits(self, step_s: float = 0.01) -> float:
        """Ask again and again until there is an offer; return how long that took."""
        start = self.now
        while self.offer() is None:
            self.now += step_s
            assert self.now < start + 3600, "waits for ever"
        return self.now - start

    def run(self, load_s: float = 0.0) -> RequestRecord:
        """Take the offer as it is, load it, compute the rest and finish."""
        offered = self.offer()
        assert offered is not None
        if offered:
            self.sessions.accept("r", list(range(2 * BLOCKS)), 0, offered)
            self.now += load_s
            self.sessions.load_finished("r", ok=True)
        self.sessions.computed("r", TOKENS, len(TOKENS), list(range(2 * BLOCKS)))
        self.sessions.finish("r")
        return self.records[-1]


# --- the limit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("awaited", "block_s", "limit_s"),
    [
        (10, None, 5.0),
        (10, 0.1, WAIT_FACTOR * 1.0),
        (10, 0.0001, MIN_WAIT_S),
        (1000, 1.0, 5.0),
        (0, 1.0, MIN_WAIT_S),
    ],
)
def test_the_limit_of_a_wait(awaited: int, block_s: float | None, limit_s: float) -> None:
    assert wait_limit(awaited, block_s, deadline_s=5.0) == pytest.approx(limit_s)


def test_the_configured_deadline_is_never_exceeded() -> None:
    assert wait_limit(10, 0.0001, deadline_s=0.001) == 0.001


# --- requests -----------------------------------------------------------------------------------------


def test_the_engines_speed_goes_with_every_prefetch() -> None:
    engine = Engine()
    engine.offer()
    assert engine.service.asked == [pytest.approx(BLOCK_S)]


def test_until_the_speed_is_known_none_is_told_and_the_configured_deadline_holds() -> None:
    engine = Engine(is_measured=False, load_deadline_s=7.0)
    assert engine.waits() == pytest.approx(7.0, abs=0.02)
    assert set(engine.service.asked) == {None}


def test_a_request_waits_no_longer_than_twice_the_recompute_of_what_it_awaits() -> None:
    engine = Engine(load_deadline_s=60.0)
    assert engine.waits() == pytest.approx(WAIT_FACTOR * BLOCKS * BLOCK_S, abs=0.02)
    assert engine.run().missing_reason == "deadline"


def test_blocks_that_were_ready_are_not_awaited() -> None:
    engine = Engine(load_deadline_s=60.0)
    engine.service.ready = 7
    assert engine.waits() == pytest.approx(WAIT_FACTOR * 3 * BLOCK_S, abs=0.02)


def test_what_came_by_then_is_used() -> None:
    engine = Engine()
    assert engine.offer() is None
    engine.service.ready = 4
    engine.waits()
    record = engine.run()
    assert record.loaded_tokens == 4 * BLOCK
    assert (record.missing_block, record.missing_reason) == (4, "deadline")


def test_a_tier_that_is_always_asked_is_waited_for_until_the_configured_deadline() -> None:
    engine = Engine(tiers=({"type": "s3", "ask": "always"},), load_deadline_s=60.0)
    assert engine.waits() == pytest.approx(60.0, abs=0.02)


@pytest.mark.parametrize(
    ("asked", "limit_s"), [(1, HOPE_FACTOR * BLOCKS * BLOCK_S), (8, WAIT_FACTOR * 8 * BLOCK_S)]
)
def test_an_answer_is_waited_for_as_long_as_the_whole_prompt_makes_it_worth(
    asked: int, limit_s: float
) -> None:
    engine = Engine()
    engine.service.reachable = 0
    engine.service.missing = MissReason.NOT_ASKED
    engine.service.coming = Coming(asked)
    assert engine.waits() == pytest.approx(limit_s, abs=0.02)


def test_the_answer_of_a_tier_that_is_always_asked_is_waited_for_until_the_configured_deadline() -> None:
    engine = Engine(tiers=({"type": "s3", "ask": "always"},), load_deadline_s=60.0)
    engine.service.reachable = 0
    engine.service.missing = MissReason.NOT_ASKED
    assert engine.waits() == pytest.approx(60.0, abs=0.02)


def test_once_the_answer_is_there_only_what_comes_is_waited_for() -> None:
    engine = Engine()
    engine.service.reachable = 0
    engine.service.missing = MissReason.NOT_ASKED
    engine.service.coming = Coming(1)
    assert engine.offer() is None
    engine.service.reachable, engine.service.missing = 1, MissReason.NEVER_STORED
    assert engine.waits() == pytest.approx(WAIT_FACTOR * BLOCK_S, abs=0.02)


def test_a_tier_that_is_too_slow_whatever_it_holds_is_not_waited_for() -> None:
    engine = Engine()
    engine.service.reachable = 0
    engine.service.missing = MissReason.NOT_ASKED
    engine.service.coming = Coming(0, MissReason.SLOWER)
    assert engine.offer() == 0
    record = engine.run()
    assert (record.missing_block, record.missing_reason) == (0, "slower_than_recompute")


def test_a_preempted_request_may_wait_again() -> None:
    engine = Engine()
    first = engine.waits()
    engine.sessions.computed("r", TOKENS, 1, [0])
    assert engine.waits() == pytest.approx(first, abs=0.02)


def test_a_request_that_gave_up_does_not_wait_again_for_want_of_pages() -> None:
    engine = Engine()
    engine.waits()
    for _ in range(5):
        engine.now += 1.0
        assert engine.offer() == 0


# --- declining ----------------------------------------------------------------------------------------


def test_blocks_that_are_computed_sooner_are_not_waited_for_and_the_record_says_so() -> None:
    engine = Engine()
    engine.service.ready = 2
    engine.service.tiers = ["s3"] * 6 + ["host"] + ["disk"] * 3
    engine.service.coming = Coming(2, MissReason.SLOWER, 4.5)
    assert engine.offer() == 2 * BLOCK
    record = engine.run()
    assert (record.missing_block, record.missing_reason) == (2, "slower_than_recompute")
    assert record.declined_blocks == {"s3": 4, "disk": 3}
    assert record.expected_ms == pytest.approx(4500)
    assert record.recompute_ms == pytest.approx(8 * BLOCK_S * 1e3)
    assert record.wait_ms == record.regret_ms == 0


def test_a_part_is_waited_for_when_the_rest_is_declined() -> None:
    engine = Engine()
    engine.service.coming = Coming(6, MissReason.SLOWER, 4.5)
    assert engine.offer() is None
    engine.service.ready = 6
    assert engine.offer() == 6 * BLOCK
    record = engine.run()
    assert (record.missing_block, record.missing_reason) == (6, "slower_than_recompute")
    assert record.declined_blocks == {"s3": 4}


def test_the_record_holds_what_was_expected_at_first_not_what_is_left_of_it() -> None:
    engine = Engine()
    engine.service.coming = Coming(10, expected_s=0.5)
    assert engine.offer() is None
    engine.service.coming = Coming(10, expected_s=0.0)
    assert engine.offer() is None
    engine.waits()
    assert engine.run().expected_ms == pytest.approx(500)


def test_what_was_not_known_at_first_is_not_made_up_later() -> None:
    engine = Engine()
    assert engine.offer() is None
    engine.service.coming = Coming(10, expected_s=0.0)
    engine.waits()
    record = engine.run()
    assert record.expected_ms is record.recompute_ms is None


def test_for_a_shared_tier_the_expectation_is_that_after_its_answer() -> None:
    engine = Engine()
    engine.service.reachable = 0
    engine.service.missing = MissReason.NOT_ASKED
    assert engine.offer() is None
    engine.service.reachable = 10
    engine.service.missing = MissReason.NONE
    engine.service.coming = Coming(10, expected_s=0.5)
    engine.waits()
    assert engine.run().expected_ms == pytest.approx(500)


def test_an_arena_without_room_is_not_taken_for_a_slow_tier() -> None:
    engine = Engine()
    engine.service.coming = Coming(0)
    assert engine.offer() == 0
    record = engine.run()
    assert (record.missing_reason, record.declined_blocks) == ("no_room", {})


# --- regret -------------------------------------------------------------------------------------------


def waited(seconds: float, came: int, engine: Engine) -> None:
    """Let a request wait and then find so many blocks."""
    assert engine.offer() is None
    engine.now += seconds
    engine.service.ready = engine.service.reachable = came


@pytest.mark.parametrize(
    ("wait_s", "load_s", "came", "regret_s"),
    [
        (0.3, 0.1, 10, 0.0),
        (0.9, 0.1, 10, 0.0),
        (1.5, 0.2, 10, 0.7),
        (0.3, 0.0, 1, 0.2),
        (1.5, 0.0, 0, 1.5),
    ],
)
def test_regret_is_what_was_lost_against_computing(
    wait_s: float, load_s: float, came: int, regret_s: float
) -> None:
    engine = Engine()
    waited(wait_s, came, engine)
    record = engine.run(load_s)
    assert record.wait_ms == pytest.approx(wait_s * 1e3)
    assert record.regret_ms == pytest.approx(regret_s * 1e3, abs=1e-6)
    assert record.regret_tier == ("s3" if record.regret_ms else "")


def test_regret_of_two_tiers_is_not_put_on_one() -> None:
    engine = Engine()
    engine.service.tiers = ["s3"] * 5 + ["disk"] * 5
    waited(1.5, 1, engine)
    assert engine.run().regret_tier == "several"


def test_blocks_that_came_and_could_not_be_used_were_for_nothing() -> None:
    engine = Engine()
    waited(0.5, 10, engine)
    offered = engine.offer()
    assert offered
    engine.sessions.accept("r", list(range(2 * BLOCKS)), 0, offered)
    engine.sessions.load_finished("r", ok=False)
    engine.sessions.finish("r")
    assert engine.records[-1].regret_ms == pytest.approx(500)


def test_who_did_not_wait_regrets_nothing() -> None:
    engine = Engine()
    engine.service.ready = BLOCKS
    assert engine.run(load_s=30.0).regret_ms == 0


def test_without_a_measured_speed_there_is_no_regret() -> None:
    engine = Engine(is_measured=False)
    waited(1.5, 0, engine)
    assert engine.run().regret_ms == 0


def test_a_request_that_was_aborted_while_it_waited_regrets_nothing() -> None:
    engine = Engine()
    assert engine.offer() is None
    engine.now += 1.0
    engine.sessions.finish("r")
    assert engine.records[-1].regret_ms == 0


def test_waiting_for_pages_is_not_the_tiers_fault() -> None:
    engine = Engine()
    waited(0.5, 10, engine)
    assert engine.offer() == len(TOKENS)
    engine.now += 30.0
    record = engine.run()
    assert record.wait_ms == pytest.approx(500)
    assert record.regret_ms == 0


def test_a_wait_that_never_began_ends_without_effect() -> None:
    waiting = Waiting()
    waiting.offered(3, 5.0)
    waiting.end()
    assert (waiting.seconds(9.0), waiting.regret_s(1.0, 0.1)) == (0.0, 0.0)
