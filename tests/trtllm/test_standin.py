"""The stand-in plays what the contract says the engine does: transcripts A to K, the oracle's counts, right answers.

The connector is a small one that keeps to the rules. Letters are those of the contract's transcripts.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import pytest
from small_connector import StartSmall, Store
from standin.executor import Engine
from standin.interface import DIALECTS, Dialect
from standin.model import HashModel, Scope
from standin.options import EngineOptions
from standin.requests import Phase
from standin.transcript import Call, Report

BOTH_LOOPS = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
RANKS = pytest.mark.parametrize("ranks", [1, 2, 4])
BOTH_CACHES = pytest.mark.parametrize("is_v2", [False, True], ids=["V1", "V2"])
PROMPT = list(range(100, 110))


def meta(engine: Engine, iteration: int) -> tuple[tuple[Report, ...], tuple[Report, ...]]:
    """Return the one report of new and of running requests in an iteration."""
    (call,) = (call for call in engine.transcript.of(iteration) if call.name == "meta")
    new, cached = call.arguments
    return new, cached


def answers(engine: Engine, iteration: int, rank: int = 0) -> tuple[Any, Any]:
    """Return what get_finished was given and answered."""
    (call,) = (
        one for one in engine.transcript.of(iteration) if one.name == "get_finished" and one.rank == rank
    )
    return call.arguments, call.answer


def queries(engine: Engine) -> list[Call]:
    return engine.transcript.all("query")


def stored(
    start: StartSmall, options: EngineOptions, prompt: list[int], **behaviour: object
) -> tuple[Engine, Store]:
    """Return an engine that has nothing of a prompt, with a store that has all of it."""
    store = Store(options.ranks, options.page_tokens, **behaviour)  # type: ignore[arg-type]
    start(options, store=store).answer(prompt)
    return start(options, store=store), store


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_cold(start_small: StartSmall, dialect: Dialect) -> None:
    engine = start_small(EngineOptions(reuse=False), dialect=dialect)
    assert engine.answer(PROMPT) == HashModel().output(Scope(), PROMPT, 2)
    scheduled = None if dialect == "1.1" else 10
    assert queries(engine)[0].arguments == (1, 0)
    assert meta(engine, 0) == ((Report(1, 10, (0, 1, 2), 0, scheduled),), ())
    assert engine.transcript.names(0) == [
        *("query", "alloc", "meta", "bind", "start"),
        *("wait_for_layer_load", "save_kv_layer") * 2,
        *("wait_for_save", "get_finished"),
    ]
    assert meta(engine, 1) == ((), (Report(1, 1, (), 10, scheduled and 1),))
    assert engine.transcript.names(1)[-3:] == ["wait_for_save", "finished", "get_finished"]
    (finished,) = engine.transcript.all("finished")
    assert finished.arguments == (1, (0, 1, 2))


@BOTH_CACHES
def test_b_warm_sync_behind_a_device_match(start_small: StartSmall, is_v2: bool) -> None:
    engine, store = stored(start_small, EngineOptions(is_v2=is_v2), PROMPT)
    engine.answer(PROMPT[:5])
    engine.answer(PROMPT)
    query = queries(engine)[-1]
    assert (query.arguments, query.answer) == ((2, 4), (4, False))
    (new,), cached = meta(engine, query.iteration)
    assert (new.tokens, len(new.pages), new.position, new.scheduled, cached) == (10, 3, 4, 2, ())
    assert engine.outcomes[2].tokens == engine.expected(2)
    assert len(store.pages) == 2


@BOTH_LOOPS
@BOTH_CACHES
@RANKS
def test_c_warm_async(start_small: StartSmall, overlap: bool, is_v2: bool, ranks: int) -> None:
    options = EngineOptions(overlap=overlap, is_v2=is_v2, ranks=ranks)
    engine, _ = stored(start_small, options, PROMPT, is_async=True)
    assert engine.answer(PROMPT) == engine.expected(1)
    assert engine.transcript.names(0) == ["query", "alloc", "meta", "bind", "start", "get_finished"]
    assert meta(engine, 0) == ((), ())
    assert [answers(engine, iteration) for iteration in range(3)] == [
        (((), (1,)), ([], [])),
        (((), ()), ([], [])),
        (((), ()), ([], [1])),
    ]
    assert engine.transcript.names(1) == engine.transcript.names(2) == ["get_finished"]
    assert meta(engine, 3) == ((Report(1, 10, (0, 1, 2), 8, 2),), ())
    assert len(queries(engine)) == len(engine.transcript.all("alloc")) == 1


def test_c_an_async_load_is_over_when_it_is_on_all_ranks(start_small: StartSmall) -> None:
    options = EngineOptions(ranks=2)
    engine, _ = stored(start_small, options, PROMPT, is_async=True, load_polls=(0, 3))
    engine.answer(PROMPT)
    assert [answers(engine, 0, rank)[1] for rank in (0, 1)] == [([], [1]), ([], [])]
    assert answers(engine, 3, 1)[1] == ([], [1])
    assert "meta" not in engine.transcript.names(3)
    assert meta(engine, 4)[0][0].position == 8


def test_d_pages_are_held_until_all_ranks_have_saved(start_small: StartSmall) -> None:
    options = EngineOptions(ranks=2)
    engine = start_small(options, store=Store(2, 4, save_polls=(2, 4)))
    engine.submit(PROMPT)
    held = []
    while not engine.is_idle():
        engine.step()
        held.append(engine.options.num_pages - engine.allocator.available)
    assert answers(engine, 1, 0)[0] == ((1,), ())
    assert answers(engine, 2, 0)[1] == ([1], [])
    assert answers(engine, 4, 1)[1] == ([1], [])
    assert held == [3, 3, 3, 3, 0]
    assert engine.outcomes[1].tokens == engine.expected(1)


@pytest.mark.parametrize("is_batched", [False, True], ids=["interleaved", "batched"])
def test_e_a_batch_of_cold_and_loaded(start_small: StartSmall, is_batched: bool) -> None:
    store = Store(1, 4, load_polls=(1,))
    second, third = list(range(200, 210)), list(range(300, 310))
    filling = start_small(store=store)
    filling.answer(second)
    filling.answer(third)

    def change(leader: type, rank: type) -> tuple[type, type]:
        class Leader(leader):  # type: ignore[misc]
            def get_num_new_matched_tokens(self, request: object, computed: int) -> tuple[int, bool]:
                tokens, _ = super().get_num_new_matched_tokens(request, computed)
                self.requests[request.request_id].is_async = request.request_id == 3  # type: ignore[attr-defined]
                return tokens, request.request_id == 3  # type: ignore[attr-defined]

        return Leader, rank

    engine = start_small(EngineOptions(is_batched=is_batched), store=store, change=change)
    for prompt in (PROMPT[:6], second, third):
        engine.submit(prompt)
    engine.run()
    names = [call.name for call in engine.transcript.of(0) if call.name in ("query", "alloc")]
    assert names == (["query"] * 3 + ["alloc"] * 3 if is_batched else ["query", "alloc"] * 3)
    assert [call.answer for call in queries(engine)] == [(0, False), (8, False), (8, True)]
    new, cached = meta(engine, 0)
    assert [(one.id, one.position, one.scheduled) for one in new] == [(1, 0, 6), (2, 0, 2)]
    assert cached == ()
    assert [one.id for one in meta(engine, 1)[1]] == [1, 2]
    assert answers(engine, 1) == (((1,), ()), ([], [3]))
    assert [(one.id, one.position, one.scheduled) for one in meta(engine, 2)[0]] == [(3, 8, 2)]
    assert all(engine.outcomes[one].tokens == engine.expected(one) for one in (1, 2, 3))


def test_f_chunked_prefill(start_small: StartSmall) -> None:
    prompt = list(range(14))
    options = EngineOptions(chunk_tokens=4)
    engine, _ = stored(start_small, options, prompt[:5])
    engine.answer(prompt)
    assert [meta(engine, iteration) for iteration in range(4)] == [
        ((Report(1, 14, (0, 1, 2, 3), 0, 4),), ()),
        ((), (Report(1, 0, (), 8, 4),)),
        ((), (Report(1, 0, (), 12, 2),)),
        ((), (Report(1, 1, (), 14, 1),)),
    ]


def test_f_the_second_manager_gives_pages_by_the_chunk(start_small: StartSmall) -> None:
    options = EngineOptions(chunk_tokens=4, is_v2=True)
    engine, _ = stored(start_small, options, list(range(5)))
    engine.answer(list(range(14)))
    assert engine.transcript.all("alloc")[0].arguments == (1, (0, 1))
    assert [report.pages for half in range(3) for group in meta(engine, half) for report in group] == [
        (0, 1),
        (2,),
        (3,),
    ]


def test_g_cancel(start_small: StartSmall) -> None:
    engine = start_small(EngineOptions(max_batch=1))
    running, queued = engine.submit(PROMPT, 9), engine.submit(PROMPT[:3], 9)
    engine.step()
    engine.step()
    engine.cancel(running)
    engine.cancel(queued)
    engine.run()
    assert [call.arguments[0] for call in engine.transcript.all("finished")] == [running]
    assert [call.arguments[0] for call in queries(engine)] == [running]
    assert engine.outcomes[running].status == engine.outcomes[queued].status == "cancelled"
    assert engine.outcomes[running].tokens == engine.expected(running)[:3]


@RANKS
@BOTH_CACHES
def test_h_cancel_during_an_async_load(start_small: StartSmall, ranks: int, is_v2: bool) -> None:
    options = EngineOptions(ranks=ranks, is_v2=is_v2)
    engine, _ = stored(start_small, options, PROMPT, is_async=True, load_polls=(3, 4, 5, 6))
    cancelled = engine.submit(PROMPT)
    engine.step()
    assert engine.sequences[cancelled].phase is Phase.LOADING
    engine.cancel(cancelled)
    engine.run()
    (finished,) = engine.transcript.all("finished")
    assert finished.answer is True
    last = engine.transcript.all("get_finished", ranks - 1)[-1]
    assert last.answer == ([cancelled], [cancelled])
    assert engine.answer(PROMPT) == engine.expected(2)
    assert queries(engine)[-1].arguments[1] == (0 if is_v2 else 4)


@BOTH_LOOPS
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("honoured", [0, 4])
def test_i_short_honour(start_small: StartSmall, overlap: bool, is_async: bool, honoured: int) -> None:
    options = EngineOptions(overlap=overlap, is_v2=True, honour=lambda *_: honoured)
    engine, _ = stored(start_small, options, PROMPT, is_async=is_async)
    assert engine.answer(PROMPT) == engine.expected(1)
    assert queries(engine)[0].answer == (8, is_async)
    new = next(report for call in engine.transcript.all("meta") for report in call.arguments[0])
    assert (new.position, new.scheduled) == (honoured if is_async else 0, 10 - honoured)


@BOTH_LOOPS
def test_j_replay(start_small: StartSmall, overlap: bool) -> None:
    options = EngineOptions(is_v2=True, overlap=overlap, chunk_tokens=8)
    engine = start_small(options)
    first, second = engine.submit(PROMPT, 6), engine.submit(PROMPT[::-1], 6)
    for _ in range(4):
        engine.step()
    engine.replay(first)
    engine.step()
    engine.replay(second)
    engine.run()
    assert [call.arguments[0] for call in queries(engine)] == [first, second, first, second]
    for request_id in (first, second):
        assert engine.outcomes[request_id].tokens == engine.expected(request_id)
        reports = [one for call in engine.transcript.all("meta") for one in call.arguments[0]]
        assert [one.id for one in reports].count(request_id) == 2


def test_k_the_hooks_run_before_anything_is_bound(start_small: StartSmall) -> None:
    seen = []

    def change(leader: type, rank: type) -> tuple[type, type]:
        class Rank(rank):  # type: ignore[misc]
            def start_load_kv(self, stream: object) -> None:
                seen.append(self.get_connector_meta())
                super().start_load_kv(stream)

        return leader, Rank

    engine = start_small(change=change)
    assert seen == [None]
    assert engine.transcript.calls == []


@BOTH_LOOPS
@BOTH_CACHES
@pytest.mark.parametrize("count", [1, 4, 7])
def test_the_oracles_counts(start_small: StartSmall, overlap: bool, is_v2: bool, count: int) -> None:
    engine = start_small(EngineOptions(overlap=overlap, is_v2=is_v2), store=Store(1, 4, save_polls=(0,)))
    prompt = list(range(12))
    engine.answer(prompt, count)
    layers = engine.options.model.layers
    expected = dict.fromkeys(("query", "alloc", "finished"), 1)
    expected |= dict.fromkeys(("meta", "bind", "start", "wait_for_save"), count)
    expected |= dict.fromkeys(("wait_for_layer_load", "save_kv_layer"), count * layers)
    assert engine.transcript.counts() == {**expected, "get_finished": count + overlap}
    assert [call.arguments[0] for call in engine.transcript.all("save_kv_layer")] == [0, 1] * count
    assert len(engine.transcript.all("alloc")[0].arguments[1]) == 3
    assert len(engine.transcript.all("finished")[0].arguments[1]) == ceil((12 + count - 1) / 4)
    for call in engine.transcript.all("meta")[1:]:
        (report,) = call.arguments[1]
        assert bool(report.pages) == ((report.position + overlap) % 4 == 0)


def test_with_overlap_the_second_report_has_no_token(start_small: StartSmall) -> None:
    engine = start_small(EngineOptions(overlap=True))
    engine.answer(PROMPT, 4)
    reports = [call.arguments[1][0] for call in engine.transcript.all("meta")[1:]]
    assert [(one.tokens, one.position) for one in reports] == [(0, 9), (1, 10), (1, 11)]


def test_chunks_of_the_oracle(start_small: StartSmall) -> None:
    engine = start_small(EngineOptions(page_tokens=32, chunk_tokens=128))
    engine.answer(list(range(256)), 1)
    assert meta(engine, 0) == ((Report(1, 256, tuple(range(8)), 0, 128),), ())
    assert meta(engine, 1) == ((), (Report(1, 0, (), 128, 128),))


@BOTH_LOOPS
@RANKS
def test_one_wrong_byte_changes_the_answer(start_small: StartSmall, overlap: bool, ranks: int) -> None:
    options = EngineOptions(overlap=overlap, ranks=ranks, checks_bytes=False)
    engine, store = stored(start_small, options, PROMPT)
    assert engine.answer(PROMPT) == engine.expected(1)
    key, rank = max(store.pages, key=lambda one: (len(one[0][1]), one[1]))  # type: ignore[index]
    (page,) = store.pages[key, rank]
    changed = np.frombuffer(page, np.uint8).copy()
    changed[-1] ^= 1
    store.pages[key, rank] = [changed.tobytes()]
    engine = start_small(options, store=store)
    assert engine.answer(PROMPT) != engine.expected(1)


def test_requests_wait_for_pages_and_old_ones_are_evicted(start_small: StartSmall) -> None:
    engine = start_small(EngineOptions(num_pages=9))
    for seed in range(12):
        engine.submit(list(range(seed * 50, seed * 50 + 11)), 5)
    engine.run()
    assert all(engine.outcomes[one].tokens == engine.expected(one) for one in engine.sequences)
    assert engine.allocator.available == 9


def test_everybody_has_their_own_kv(start_small: StartSmall) -> None:
    scopes = [
        Scope(),
        Scope(salt="a"),
        Scope(lora=1),
        Scope(images=((2, 3, bytes(32)),)),
        Scope(images=((2, 3, bytes(31) + b"1"),)),
    ]
    engine = start_small()
    outputs = [engine.answer(PROMPT, 2, scope) for scope in scopes]
    assert len({tuple(output) for output in outputs}) == len(scopes)
    assert {call.answer for call in queries(engine)} == {(0, False)}


def test_a_partial_device_match_ends_inside_a_page(start_small: StartSmall) -> None:
    engine = start_small(EngineOptions(partial_reuse=True))
    assert engine.answer(PROMPT) == engine.expected(1)
    assert engine.answer(PROMPT) == engine.expected(2)
    assert [call.arguments[1] for call in queries(engine)] == [1, 9]


@pytest.mark.parametrize(
    "model",
    [
        HashModel(layers=3, kv_heads=2, head_dim=16, dtype="float32", itemsize=4),
        HashModel(kv_heads=1, kv_factor=1, head_dim=24, dtype="float16"),
        HashModel(dtype="float8_e4m3fn", itemsize=1),
    ],
    ids=["float32", "one head for K and V", "fp8"],
)
@BOTH_CACHES
def test_geometry_is_the_models(start_small: StartSmall, model: HashModel, is_v2: bool) -> None:
    options = EngineOptions(model=model, is_v2=is_v2, ranks=4, page_tokens=8)
    engine, store = stored(start_small, options, list(range(20)))
    assert engine.answer(list(range(20))) == engine.expected(1)
    assert queries(engine)[0].answer == (16, False)
    part = model.layers * model.kv_factor * max(1, model.kv_heads // 4) * 8 * model.head_dim * model.itemsize
    assert {sum(map(len, parts)) for parts in store.pages.values()} == {part}
