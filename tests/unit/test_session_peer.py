"""A prompt that one played engine computed goes to another one: every byte is checked, and every page comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from handing_engine import BLOCK, HandingEngine, config
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from played_engine import DEADLINE_S, PAGE_TOKENS, Request

from kvferry.connector.keys import Extra, Scope
from kvferry.engines.handoff.digest import PageDigester

Make = Callable[..., HandingEngine]


@pytest.fixture
def engine() -> Iterator[Make]:
    with ExitStack() as made:

        def make(name: str, *arguments: object, **facts: object) -> HandingEngine:
            new = HandingEngine(name, *arguments, **facts)
            made.callback(new.close)
            return new

        yield make


@pytest.fixture
def prefill(engine: Make) -> HandingEngine:
    return engine("P")


@pytest.fixture
def decode(engine: Make) -> HandingEngine:
    return engine("D")


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 1000 + index) % 50000 for index in range(length)]


def rest(*engines: HandingEngine) -> None:
    """Step until nothing is under way and every page is free."""
    end = time.monotonic() + DEADLINE_S
    while not all(engine.is_at_rest() and not engine.sessions.has_pending() for engine in engines):
        assert time.monotonic() < end, "pages stay held"
        for engine in engines:
            engine.step()
        time.sleep(0.001)


def done(engine: HandingEngine, request: Request) -> None:
    engine.check(request)
    engine.finish(request)


@pytest.mark.parametrize("length", [1, PAGE_TOKENS, PAGE_TOKENS + 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_a_prompt_of_any_length_is_read_and_not_computed(
    prefill: HandingEngine, decode: HandingEngine, length: int
) -> None:
    params = prefill.prefill(prompt(length))
    request = decode.decode(prompt(length), params)
    done(decode, request)
    assert decode.records[-1].matched_tokens == {"peer": length}
    assert decode.records[-1].loaded_tokens == length
    rest(prefill, decode)


@pytest.mark.parametrize(("giving", "taking"), [(1, 2), (2, 1), (2, 2)])
def test_ranks_of_both_sides_need_not_be_as_many(engine: Make, giving: int, taking: int) -> None:
    prefill, decode = engine("P", world_size=giving), engine("D", world_size=taking)
    tokens = prompt(3 * BLOCK + 1)
    request = decode.decode(tokens, prefill.prefill(tokens))
    done(decode, request)
    assert decode.records[-1].matched_tokens == {"peer": len(tokens)}
    rest(prefill, decode)


def test_the_arena_gives_what_it_has_and_the_peer_the_rest(
    prefill: HandingEngine, decode: HandingEngine
) -> None:
    decode.run(prompt(2 * BLOCK))
    tokens = prompt(2 * BLOCK) + prompt(2 * BLOCK + 3, seed=7)
    done(decode, decode.decode(tokens, prefill.prefill(tokens)))
    assert decode.records[-1].matched_tokens == {"host": 2 * BLOCK, "peer": 2 * BLOCK + 3}
    rest(prefill, decode)


def test_where_the_arena_has_all_nothing_is_read_and_the_pages_come_back(
    prefill: HandingEngine, decode: HandingEngine
) -> None:
    decode.run(prompt(2 * BLOCK))
    done(decode, decode.decode(prompt(2 * BLOCK), prefill.prefill(prompt(2 * BLOCK))))
    assert decode.records[-1].matched_tokens == {"host": 2 * BLOCK}
    rest(prefill, decode)


def test_what_was_read_is_saved_and_found_again(prefill: HandingEngine, decode: HandingEngine) -> None:
    tokens = prompt(3 * BLOCK)
    done(decode, decode.decode(tokens, prefill.prefill(tokens)))
    rest(prefill, decode)
    assert decode.run(tokens).matched_tokens == {"host": 3 * BLOCK}


@pytest.mark.parametrize(
    "facts",
    [
        {"scope": Scope(cache_salt="salt")},
        {"scope": Scope(adapter="adapter")},
        {"extras": {0: [Extra("mm", 1, b"an image")]}},
        {"extras": {2: [Extra("mm", 1, b"in the tail")]}},
    ],
    ids=["salt", "adapter", "image", "image-in-the-tail"],
)
def test_pages_of_other_content_are_refused(
    prefill: HandingEngine, decode: HandingEngine, facts: dict[str, object]
) -> None:
    tokens = prompt(2 * BLOCK + 3)
    done(decode, decode.decode(tokens, prefill.prefill(tokens), **facts))
    assert decode.records[-1].peer_failed == "content"
    rest(prefill, decode)


def test_a_router_that_mixes_requests_up_costs_a_computation(
    prefill: HandingEngine, decode: HandingEngine
) -> None:
    params = prefill.prefill(prompt(2 * BLOCK + 3, seed=1))
    done(decode, decode.decode(prompt(2 * BLOCK + 3, seed=2), params))
    assert decode.records[-1].peer_failed == "content"
    rest(prefill, decode)


def test_a_longer_prompt_reads_what_there_is_and_computes_the_rest(
    prefill: HandingEngine, decode: HandingEngine
) -> None:
    params = prefill.prefill(prompt(BLOCK + 3))
    done(decode, decode.decode(prompt(3 * BLOCK), params))
    assert decode.records[-1].matched_tokens == {"peer": BLOCK + 3}
    rest(prefill, decode)


def test_a_byte_that_changes_on_the_way_is_noticed(
    prefill: HandingEngine, decode: HandingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt(2 * BLOCK)
    params = prefill.prefill(tokens)
    (name,) = prefill.held
    prefill.ranks[0].pages[1, prefill.held[name][2], 1, 3, 0] ^= 1
    done(decode, decode.decode(tokens, params))
    assert decode.records[-1].peer_failed == "checksum"
    rest(prefill, decode)


def test_without_digests_the_same_byte_is_believed(engine: Make) -> None:
    """The control of the test above: it is the digests that notice."""
    prefill, decode = engine("P", config(verify=False)), engine("D")
    tokens = prompt(2 * BLOCK)
    params = prefill.prefill(tokens)
    (name,) = prefill.held
    prefill.ranks[0].pages[1, prefill.held[name][2], 1, 3, 0] ^= 1
    with pytest.raises(AssertionError, match="wrong bytes"):
        decode.decode(tokens, params)


def test_pages_that_nobody_comes_for_are_freed(engine: Make) -> None:
    prefill = engine("P", config(lease_s=0.05))
    prefill.prefill(prompt(2 * BLOCK))
    assert prefill.held
    rest(prefill)
    assert prefill.handoffs.table.expired_count == 1


def test_a_lease_that_ran_out_is_computed(engine: Make, decode: HandingEngine) -> None:
    prefill = engine("P", config(lease_s=0.05))
    params = prefill.prefill(prompt(2 * BLOCK))
    rest(prefill)
    done(decode, decode.decode(prompt(2 * BLOCK), params))
    assert decode.records[-1].peer_failed in ("expired", "gone")
    rest(decode)


def test_a_lease_that_runs_out_during_the_read_spoils_it(
    engine: Make, decode: HandingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages are given to somebody else between the read and the check."""
    prefill = engine("P", config(lease_s=0.3))
    tokens = prompt(2 * BLOCK)
    params = prefill.prefill(tokens)
    digest = PageDigester.digest

    def late(self: PageDigester, pages: object) -> bytes:
        found = digest(self, pages)
        end = time.monotonic() + DEADLINE_S
        prefill.handoffs.table.release(params["remote_request_id"], "somebody", time.monotonic() + 60)
        while prefill.held:
            assert time.monotonic() < end
            prefill.step()
        return found

    monkeypatch.setattr(PageDigester, "digest", late)
    done(decode, decode.decode(tokens, params))
    assert decode.records[-1].peer_failed == "expired"
    rest(prefill, decode)


def test_a_request_that_is_aborted_before_it_reads_frees_the_pages(
    prefill: HandingEngine, decode: HandingEngine
) -> None:
    params = prefill.prefill(prompt(2 * BLOCK))
    decode.abort(decode.arrive(prompt(2 * BLOCK), params))
    rest(prefill, decode)
    assert prefill.handoffs.table.expired_count == 0


def test_too_many_held_pages_are_not_held(engine: Make, decode: HandingEngine) -> None:
    prefill = engine("P", config(held_share=0.2))
    tokens = prompt(2 * BLOCK)
    assert prefill.prefill(tokens) is not None
    assert prefill.prefill(prompt(2 * BLOCK, seed=5)) is None


def test_an_engine_that_is_away_costs_a_computation(engine: Make, decode: HandingEngine) -> None:
    prefill = HandingEngine("P")
    params = prefill.prefill(prompt(2 * BLOCK))
    prefill.close()
    done(decode, decode.decode(prompt(2 * BLOCK), params))
    assert decode.records[-1].peer_failed == "unreachable"
    rest(decode)


def test_an_engine_that_came_back_is_asked_anew(engine: Make, decode: HandingEngine) -> None:
    """Connections to its former life are dead, and what was promised then is not there."""
    tokens = prompt(2 * BLOCK)
    first = HandingEngine("P")
    stale = first.prefill(tokens)
    done(decode, decode.decode(tokens, stale))
    decode.service.clear()
    port = first.handoffs.address[1]
    first.close()
    second = engine("P2", config(listen=f"tcp://127.0.0.1:{port}"))
    fresh = second.prefill(prompt(3 * BLOCK, seed=2))
    done(decode, decode.decode(prompt(3 * BLOCK, seed=2), fresh))
    assert decode.records[-1].matched_tokens == {"peer": 3 * BLOCK}
    done(decode, decode.decode(prompt(2 * BLOCK, seed=1), stale))
    assert decode.records[-1].peer_failed == "gone"
    rest(second, decode)


class Handoffs(RuleBasedStateMachine):
    """Two engines that hand over both ways, while requests end, are aborted or preempted and leases run out."""

    @initialize(ranks=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])))
    def start(self, ranks: tuple[int, int]) -> None:
        self.engines = [
            HandingEngine(f"E{index}", config(slots=12), world_size=ranks[index], num_pages=32)
            for index in range(2)
        ]
        self.offers: list[tuple[int, list[int], object]] = []

    @rule(which=st.integers(0, 1), blocks=st.integers(0, 3), tail=st.integers(1, 9), seed=st.integers(0, 2))
    def hand_over(self, which: int, blocks: int, tail: int, seed: int) -> None:
        engine = self.engines[which]
        tokens = prompt(blocks * BLOCK, seed) + prompt(tail, seed + 3)
        if len(engine.free) < -(-len(tokens) // PAGE_TOKENS):
            return
        self.offers.append((which, tokens, engine.prefill(tokens)))

    @precondition(lambda self: self.offers)
    @rule(data=st.data(), fate=st.sampled_from(["decode", "abort", "twice", "elsewhere"]))
    def take(self, data: st.DataObject, fate: str) -> None:
        which, tokens, params = self.offers.pop(data.draw(st.integers(0, len(self.offers) - 1)))
        other = self.engines[1 - which]
        if len(other.free) < -(-len(tokens) // PAGE_TOKENS):
            return
        if fate == "abort":
            request = other.arrive(tokens, params)
            if data.draw(st.booleans()):
                other.step(collect=False)
            other.abort(request)
        else:
            wanted = tokens if fate != "elsewhere" else [*tokens[:-1], tokens[-1] + 1]
            for _ in range(2 if fate == "twice" else 1):
                done(other, other.decode(wanted, params))
        self._rest_loads(other)

    @rule(which=st.integers(0, 1))
    def lose_a_lease(self, which: int) -> None:
        table = self.engines[which].handoffs.table
        for _, _, params in self.offers:
            if params is not None:
                table.release(str(params["remote_request_id"]), "nobody", time.monotonic() + 1e6)
                break

    @rule(which=st.integers(0, 1))
    def step(self, which: int) -> None:
        self.engines[which].step()

    @invariant()
    def no_page_is_free_twice(self) -> None:
        for engine in getattr(self, "engines", ()):
            assert len(set(engine.free)) == len(engine.free)

    def teardown(self) -> None:
        if not hasattr(self, "engines"):
            return
        try:
            for which, _, params in self.offers:
                if params is not None:
                    name = str(params["remote_request_id"])
                    self.engines[which].handoffs.table.release(name, "nobody", time.monotonic() + 1e6)
            rest(*self.engines)
        finally:
            for engine in self.engines:
                engine.close()

    def _rest_loads(self, engine: HandingEngine) -> None:
        engine.work_until(lambda: not engine.sessions.has_pending())


TestHandoffs = Handoffs.TestCase
TestHandoffs.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
