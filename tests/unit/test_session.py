"""Sessions, stager and service together, driven as an engine drives them; every byte is checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from played_engine import LAYOUT, PlayedEngine, Request

from kvferry.connector.config import Config, HostConfig
from kvferry.connector.keys import Extra, Scope
from kvferry.engines.jobs import BlockCopy, LoadJob, StepJobs, WorkerReport

BLOCK = LAYOUT.block_tokens


def config(slots: int = 64, **changes: object) -> Config:
    return Config(host=HostConfig(capacity=(slots + 2) * LAYOUT.slot_bytes), **changes)


@pytest.fixture
def engine() -> Iterator[PlayedEngine]:
    engine = PlayedEngine(config())
    yield engine
    engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 1000 + index) % 50000 for index in range(length)]


def test_a_second_request_loads_what_the_first_computed(engine: PlayedEngine) -> None:
    engine.run(prompt(3 * BLOCK + 3))
    record = engine.run(prompt(3 * BLOCK + 3))
    assert record.loaded_tokens == 3 * BLOCK
    assert record.matched_tokens == {"host": 3 * BLOCK}
    assert (record.missing_block, record.missing_reason) == (None, "none")


def test_a_prompt_of_whole_blocks_is_offered_whole(engine: PlayedEngine) -> None:
    engine.run(prompt(2 * BLOCK))
    assert engine.run(prompt(2 * BLOCK)).loaded_tokens == 2 * BLOCK


def test_only_the_common_prefix_is_loaded(engine: PlayedEngine) -> None:
    engine.run(prompt(4 * BLOCK))
    record = engine.run(prompt(2 * BLOCK) + prompt(2 * BLOCK, seed=9))
    assert record.loaded_tokens == 2 * BLOCK
    assert (record.missing_block, record.missing_reason) == (2, "never_stored")


def test_generated_tokens_are_saved_as_blocks_fill(engine: PlayedEngine) -> None:
    request = engine.arrive(prompt(BLOCK))
    engine.step()
    for token in range(BLOCK):
        request.tokens.append(token)
        engine.step()
    engine.finish(request)
    engine.settle()
    assert engine.run([*request.tokens, 7]).loaded_tokens == 2 * BLOCK


def test_save_prompt_leaves_generated_blocks_out() -> None:
    engine = PlayedEngine(config(save="prompt"))
    request = engine.arrive(prompt(BLOCK))
    engine.step()
    request.tokens += prompt(BLOCK, seed=3)
    engine.step()
    engine.finish(request)
    engine.settle()
    assert engine.run([*request.tokens, 7]).loaded_tokens == BLOCK
    engine.close()


@pytest.mark.parametrize(
    "scope", [Scope(cache_salt="s"), Scope(tenant="t"), Scope(adapter="a")], ids=["salt", "tenant", "adapter"]
)
def test_scopes_do_not_see_each_other(engine: PlayedEngine, scope: Scope) -> None:
    engine.run(prompt(2 * BLOCK))
    request = engine.arrive(prompt(2 * BLOCK), scope=scope)
    assert engine.sessions.offer(request.name, request.tokens, 0) == 0


def test_another_image_under_the_same_tokens_is_another_block(engine: PlayedEngine) -> None:
    extras = {1: [Extra("mm", -2, b"image one")]}
    first = engine.arrive(prompt(3 * BLOCK), extras=extras)
    engine.step()
    engine.finish(first)
    engine.settle()
    same = engine.arrive(prompt(3 * BLOCK), extras=extras)
    other = engine.arrive(prompt(3 * BLOCK), extras={1: [Extra("mm", -2, b"image two")]})
    assert engine.sessions.offer(same.name, same.tokens, 0) == 3 * BLOCK
    assert engine.sessions.offer(other.name, other.tokens, 0) == BLOCK


def test_an_uncacheable_request_passes_with_its_reason(engine: PlayedEngine) -> None:
    request = engine.arrive(prompt(2 * BLOCK), uncacheable="prompt embeddings")
    engine.step()
    engine.finish(request)
    engine.settle()
    assert engine.records[-1].passed == "prompt embeddings"
    assert engine.run(prompt(2 * BLOCK)).loaded_tokens == 0


def test_pages_the_engine_holds_itself_are_not_loaded_again(engine: PlayedEngine) -> None:
    engine.run(prompt(3 * BLOCK))
    request = engine.arrive(prompt(3 * BLOCK))
    local_tokens = BLOCK + 4  # one block and the first of the two pages of the next
    offered = engine.sessions.offer(request.name, request.tokens, local_tokens)
    assert offered == 3 * BLOCK - local_tokens
    engine.sessions.accept(request.name, list(range(6)), local_tokens, offered)
    (load,) = engine.sessions.take_jobs().loads
    assert [(copy.first_page, copy.pages) for copy in load.copies] == [(1, (3,)), (0, (4, 5))]
    engine.sessions.load_finished(request.name, ok=True)
    engine.abort(request)


def test_a_failed_load_is_not_offered_again_at_once(engine: PlayedEngine) -> None:
    engine.run(prompt(2 * BLOCK))
    request = engine.arrive(prompt(2 * BLOCK))
    offered = engine.sessions.offer(request.name, request.tokens, 0)
    engine.sessions.accept(request.name, [0, 1, 2, 3], 0, offered)
    engine.sessions.take_jobs()
    engine.sessions.load_finished(request.name, ok=False)
    assert engine.sessions.offer(request.name, request.tokens, 0) == 0
    engine.abort(request)
    assert engine.records[-1].failed


def test_a_save_becomes_visible_only_when_every_rank_made_it() -> None:
    engine = PlayedEngine(config(), world_size=2)
    request = engine.arrive(prompt(BLOCK))
    engine.sessions.computed(request.name, request.tokens, BLOCK, [0, 1])
    (save,) = engine.sessions.take_jobs().saves
    engine.sessions.report(WorkerReport(saved={save.id: 1}))
    probe = engine.arrive(prompt(BLOCK))
    assert engine.sessions.offer(probe.name, probe.tokens, 0) == 0
    engine.sessions.report(WorkerReport(saved={save.id: 1}))
    assert engine.sessions.offer(probe.name, probe.tokens, 0) == BLOCK
    engine.close()


def test_a_save_that_failed_on_one_rank_keeps_its_slot_until_the_other_is_through() -> None:
    engine = PlayedEngine(config(), world_size=2)
    request = engine.arrive(prompt(BLOCK))
    engine.sessions.computed(request.name, request.tokens, BLOCK, [0, 1])
    (save,) = engine.sessions.take_jobs().saves
    engine.sessions.report(WorkerReport(saved={save.id: 1}, failed_saves={save.id}))
    assert engine.service.counters().reservations == 1
    engine.sessions.report(WorkerReport(saved={save.id: 1}))
    assert engine.service.counters().reservations == 0
    assert engine.sessions.offer(request.name, request.tokens, 0) == 0
    engine.close()


def test_a_finished_request_holds_its_pages_until_saved(engine: PlayedEngine) -> None:
    request = engine.arrive(prompt(BLOCK))
    engine.sessions.computed(request.name, request.tokens, BLOCK, [0, 1])
    (save,) = engine.sessions.take_jobs().saves
    assert engine.sessions.finish(request.name) is True
    assert engine.sessions.take_jobs().releases == [request.name]
    engine.sessions.report(WorkerReport(saved={save.id: 1}))


def test_reused_pages_fence_the_save_that_reads_them(engine: PlayedEngine) -> None:
    request = engine.arrive(prompt(BLOCK))
    engine.sessions.computed(request.name, request.tokens, BLOCK, [4, 5])
    (save,) = engine.sessions.take_jobs().saves
    engine.sessions.pages_assigned([5, 6])
    assert engine.sessions.take_jobs().fences == [save.id]
    engine.sessions.report(WorkerReport(saved={save.id: 1}))


def test_a_slot_that_changed_hands_is_never_loaded(engine: PlayedEngine) -> None:
    stale = BlockCopy(slot=0, generation=12345, first_page=0, pages=(0, 1))
    load = LoadJob("r", (stale,))
    engine.ranks[0].submit(StepJobs(arena=engine.service.arena, layout=LAYOUT, loads=[load]))
    assert engine.ranks[0].collect().failed_loads == {"r"}
    assert not engine.ranks[0].pages.any()


def test_a_problem_on_a_rank_switches_the_cache_off(engine: PlayedEngine) -> None:
    engine.run(prompt(BLOCK))
    engine.sessions.report(WorkerReport(problem="cannot map the arena"))
    assert engine.run(prompt(BLOCK)).passed == "cannot map the arena"


def test_clear_forgets_everything_even_what_is_being_saved(engine: PlayedEngine) -> None:
    engine.run(prompt(BLOCK, seed=1))
    request = engine.arrive(prompt(BLOCK, seed=2))
    engine.sessions.computed(request.name, request.tokens, BLOCK, [0, 1])
    (save,) = engine.sessions.take_jobs().saves
    engine.sessions.clear()
    engine.sessions.report(WorkerReport(saved={save.id: 1}))
    for seed in (1, 2):
        probe = engine.arrive(prompt(BLOCK, seed))
        assert engine.sessions.offer(probe.name, probe.tokens, 0) == 0


class AnyEngine(RuleBasedStateMachine):
    """Random requests on a tiny engine with a tiny arena: never a wrong byte, nothing leaked."""

    @initialize(world_size=st.sampled_from([1, 2]), slots=st.integers(2, 12))
    def start(self, world_size: int, slots: int) -> None:
        self.engine = PlayedEngine(config(slots), world_size, num_pages=24)

    @rule(shared=st.integers(0, 3), own=st.integers(1, 17), seed=st.integers(0, 3))
    def arrive(self, shared: int, own: int, seed: int) -> None:
        if len(self.engine.waiting) + len(self.engine.running) < 4:
            self.engine.arrive(prompt(shared * BLOCK) + prompt(own, seed + 1))

    @rule(chunk=st.sampled_from([3, 8, 64]), collect=st.booleans())
    def step(self, chunk: int, collect: bool) -> None:
        self.engine.step(chunk, collect)

    def done(self) -> list[Request]:
        return [request for request in self.engine.running if request.computed == len(request.tokens)]

    @precondition(lambda self: self.done())
    @rule(pick=st.randoms(use_true_random=False))
    def generate(self, pick) -> None:  # type: ignore[no-untyped-def]
        pick.choice(self.done()).tokens.append(pick.randrange(4))

    @precondition(lambda self: self.done())
    @rule(pick=st.randoms(use_true_random=False))
    def finish(self, pick) -> None:  # type: ignore[no-untyped-def]
        self.engine.finish(pick.choice(self.done()))

    @precondition(lambda self: self.engine.running)
    @rule(pick=st.randoms(use_true_random=False))
    def preempt(self, pick) -> None:  # type: ignore[no-untyped-def]
        self.engine.preempt(pick.choice(self.engine.running))

    @precondition(lambda self: self.engine.running or self.engine.waiting)
    @rule(pick=st.randoms(use_true_random=False))
    def abort(self, pick) -> None:  # type: ignore[no-untyped-def]
        self.engine.abort(pick.choice(self.engine.running + self.engine.waiting))

    @rule()
    def clear(self) -> None:
        self.engine.sessions.clear()

    @invariant()
    def every_byte_is_right(self) -> None:
        if hasattr(self, "engine"):
            for request in self.engine.running:
                self.engine.check(request)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for request in [*self.engine.running, *self.engine.waiting]:
            self.engine.abort(request)
        self.engine.settle()
        counters = self.engine.service.counters()
        assert (counters.leases, counters.reservations) == (0, 0)
        assert len(self.engine.free) == 24
        self.engine.close()


TestAnyEngine = AnyEngine.TestCase
TestAnyEngine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
