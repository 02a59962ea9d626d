"""kvferry in the engine's hands: transcripts A to K of the contract, in every release line, cache manager and loop.

What is compared is what kvferry answers in which iteration, how often it copies, and that the answers of the model,
which hang on every byte, are those of an engine without a cache. Rules are the stand-in's to watch.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import pytest
from ferry import ASYNC, CONFIG, SYNC, Ferry, settle
from standin.executor import Engine
from standin.interface import Dialect
from standin.options import EngineOptions, llm_args
from standin.requests import Phase

PROMPT = list(range(100, 110))
TOKEN_BYTES = 256


class Line(NamedTuple):
    """A release line and one of its cache managers."""

    dialect: Dialect
    is_v2: bool


LINES = [Line("1.1", False), Line("1.2", False), Line("1.3", False), Line("v2", False), Line("v2", True)]
every_line = pytest.mark.parametrize(
    "line", LINES, ids=lambda line: f"{line.dialect}{'-V2' if line.is_v2 else ''}"
)
every_rank_count = pytest.mark.parametrize("ranks", [1, 2, 4])
every_loop = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
every_load = pytest.mark.parametrize("config", [SYNC, ASYNC], ids=["sync", "async"])


def options(line: Line, ranks: int = 1, overlap: bool = False, **changes: object) -> EngineOptions:
    return EngineOptions(ranks=ranks, is_v2=line.is_v2, overlap=overlap, **changes)  # type: ignore[arg-type]


def start(
    ferry: Ferry, line: Line, played: EngineOptions, config: str, prompt: list[int] | None = None
) -> Engine:
    """Start an engine; with a prompt, have it be in the cache and not in the engine's own pages."""
    engine = ferry.start(played, dialect=line.dialect, config=config)
    if prompt is not None:
        ferry.fill(engine, prompt)
    return engine


def polls(engine: Engine, rank: int = 0) -> list[tuple[list[int], list[int]]]:
    """Return what a rank answered, where it answered anything."""
    answers = [call.answer for call in engine.transcript.all("get_finished", rank)]
    return [answer for answer in answers if answer != ([], [])]


def offers(engine: Engine) -> list[tuple[int, bool]]:
    return [call.answer for call in engine.transcript.all("query")]


@every_line
@every_rank_count
@every_loop
def test_a_and_d_cold_and_pages_stay_until_saved(ferry: Ferry, line: Line, ranks: int, overlap: bool) -> None:
    engine = start(ferry, line, options(line, ranks, overlap), CONFIG)
    ferry.copies.hold("save", *range(ranks))
    request = engine.submit(PROMPT, 4)
    engine.run_until(lambda: request in engine.outcomes)
    assert engine.outcomes[request].tokens == engine.expected(request)
    assert offers(engine) == [(0, False)]
    assert [call.answer for call in engine.transcript.all("finished")] == [True]
    pages = engine.sequences[request].pages
    for _ in range(3):
        engine.step()
    assert all(engine.allocator.is_owned(page) for page in pages)
    for rank in reversed(range(1, ranks)):
        ferry.copies.release("save", rank)
    for _ in range(3):
        engine.step()
    assert polls(engine) == []
    assert all(engine.allocator.is_owned(page) for page in pages)
    ferry.copies.release("save")
    engine.run()
    for rank in range(ranks):
        assert polls(engine, rank) == [([request], [])]
    # Rank 0 has answered when everything was committed, not before: no iteration is made in between.
    engine.allocator.evict(99)
    assert engine.answer(PROMPT) == engine.expected(request + 1)
    assert offers(engine)[1][0] == 8


@every_line
@every_rank_count
def test_a_nothing_to_save(ferry: Ferry, line: Line, ranks: int) -> None:
    engine = start(ferry, line, options(line, ranks), CONFIG)
    assert engine.answer(PROMPT[:3], 1) == engine.expected(2)
    assert [call.answer for call in engine.transcript.all("finished")] == [False]
    assert engine.transcript.names(0)[-1] == "get_finished"
    assert ferry.copies.counts["load"] == 0


@every_line
@every_rank_count
@every_loop
def test_b_warm_sync_behind_a_device_match(ferry: Ferry, line: Line, ranks: int, overlap: bool) -> None:
    engine = start(ferry, line, options(line, ranks, overlap), SYNC, PROMPT)
    engine.answer(PROMPT[:6], 1)
    request = engine.submit(PROMPT)
    engine.run()
    assert engine.outcomes[request].tokens == engine.expected(request)
    assert [(call.arguments[1], call.answer) for call in engine.transcript.all("query")] == [
        (0, (4, False)),
        (4, (4, False)),
    ]
    assert ferry.copies.counts["load"] == 2 * ranks
    assert all(loaded == [] for rank in range(ranks) for _, loaded in polls(engine, rank))


@every_line
@every_rank_count
@every_loop
def test_c_warm_async(ferry: Ferry, line: Line, ranks: int, overlap: bool) -> None:
    engine = start(ferry, line, options(line, ranks, overlap), ASYNC, PROMPT)
    ferry.copies.hold("load", ranks - 1)
    request = engine.submit(PROMPT)
    for _ in range(5):
        engine.step()
    assert offers(engine) == [(8, True)]
    assert engine.transcript.names(0) == ["query", "alloc", "meta", "bind", "start", "get_finished"]
    assert {tuple(engine.transcript.names(iteration)) for iteration in range(1, 5)} == {("get_finished",)}
    assert polls(engine, ranks - 1) == []
    ferry.copies.release("load")
    engine.run()
    assert engine.outcomes[request].tokens == engine.expected(request)
    assert polls(engine, ranks - 1)[0] == ([], [request])
    assert (len(offers(engine)), len(engine.transcript.all("alloc"))) == (1, 1)
    assert ferry.copies.counts["load"] == ranks
    reports = [one for call in engine.transcript.all("meta") for one in call.arguments[0]]
    assert [(one.tokens, one.position) for one in reports] == [(10, 8)]


@every_line
@every_rank_count
@pytest.mark.parametrize("is_batched", [False, True], ids=["interleaved", "batched"])
@every_loop
def test_e_a_batch_of_cold_sync_and_async(
    ferry: Ferry, line: Line, ranks: int, is_batched: bool, overlap: bool
) -> None:
    config = CONFIG.replace("[trtllm.", f"[trtllm]\nsync_bytes = {8 * TOKEN_BYTES}\n[trtllm.")
    short, long = list(range(200, 210)), list(range(300, 314))
    engine = start(ferry, line, options(line, ranks, overlap, is_batched=is_batched), config, short)
    ferry.fill(engine, long)
    requests = [engine.submit(prompt) for prompt in (PROMPT[:6], short, long)]
    engine.step()
    begun = engine.transcript.iteration
    assert offers(engine) == [(0, False), (8, False), (12, True)]
    (meta,) = engine.transcript.all("meta")
    assert [report.id for report in meta.arguments[0]] == requests[:2]
    handed = next(call for call in engine.transcript.of(begun) if call.name == "get_finished")
    assert handed.arguments[1] == (requests[2],)
    engine.run()
    assert [engine.outcomes[one].tokens for one in requests] == [engine.expected(one) for one in requests]


@every_line
@every_rank_count
@every_loop
@every_load
def test_f_chunked_prefill(ferry: Ferry, line: Line, ranks: int, overlap: bool, config: str) -> None:
    prompt = list(range(18))
    engine = start(ferry, line, options(line, ranks, overlap, chunk_tokens=4), config, prompt[:8])
    engine.answer(prompt, 3)
    settle(engine)
    engine.allocator.evict(99)
    request = engine.submit(prompt)
    engine.run()
    assert [tokens for tokens, _ in offers(engine)] == [8, 16]
    assert all(engine.outcomes[one].tokens == engine.expected(one) for one in engine.outcomes)
    assert request in engine.outcomes


@every_line
@every_rank_count
@every_loop
def test_g_cancel(ferry: Ferry, line: Line, ranks: int, overlap: bool) -> None:
    engine = start(ferry, line, options(line, ranks, overlap, max_batch=1), CONFIG)
    running, queued = engine.submit(PROMPT, 9), engine.submit(PROMPT[:5], 9)
    for _ in range(4):
        engine.step()
    engine.cancel(running)
    engine.cancel(queued)
    engine.run()
    settle(engine)
    engine.allocator.evict(99)
    assert [call.arguments[0] for call in engine.transcript.all("finished")] == [running]
    assert engine.answer(PROMPT) == engine.expected(queued + 1)
    assert offers(engine)[-1][0] == 8


@every_line
@every_rank_count
@every_loop
def test_h_cancel_during_an_async_load(ferry: Ferry, line: Line, ranks: int, overlap: bool) -> None:
    engine = start(ferry, line, options(line, ranks, overlap), ASYNC, PROMPT)
    ferry.copies.hold("load", *range(ranks))
    request = engine.submit(PROMPT)
    engine.step()
    assert engine.sequences[request].phase is Phase.LOADING
    engine.cancel(request)
    for _ in range(3):
        engine.step()
    assert [call.answer for call in engine.transcript.all("finished")] == [True]
    assert polls(engine, ranks - 1) == []
    ferry.copies.release("load")
    engine.run()
    engine.run_until(lambda: [one for _, loaded in polls(engine) for one in loaded] == [request])
    for rank in range(ranks):
        answered = polls(engine, rank)
        assert [one for saved, _ in answered for one in saved] == [request]
        assert [one for _, loaded in answered for one in loaded] == [request]
    assert engine.answer(PROMPT) == engine.expected(request + 1)


@every_load
@every_rank_count
@every_loop
@pytest.mark.parametrize("honoured", [0, 4])
def test_i_short_honour(ferry: Ferry, ranks: int, overlap: bool, config: str, honoured: int) -> None:
    line = Line("v2", True)
    engine = start(ferry, line, options(line, ranks, overlap, honour=lambda *_: honoured), config, PROMPT)
    request = engine.submit(PROMPT)
    engine.run()
    assert engine.outcomes[request].tokens == engine.expected(request)
    assert offers(engine) == [(8, config == ASYNC)]
    assert ferry.copies.counts["load"] == (ranks if honoured else 0)
    for rank in range(ranks):
        loaded = [one for _, loaded in polls(engine, rank) for one in loaded]
        assert loaded == ([request] if config == ASYNC else [])


@every_load
@every_rank_count
@every_loop
@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_j_replay(ferry: Ferry, ranks: int, overlap: bool, config: str, is_warm: bool) -> None:
    line = Line("v2", True)
    # Pages that the engine takes are anybody's at once; what it says of itself is as usual.
    played = options(line, ranks, overlap, reuse=False)
    told = llm_args(options(line)).kv_cache_config
    engine = ferry.start(played, dialect=line.dialect, config=config, kv_cache_config=told)
    if is_warm:
        ferry.fill(engine, PROMPT)
    ferry.copies.hold("save", *range(ranks))
    first, second = engine.submit(PROMPT, 6), engine.submit(PROMPT[::-1], 6)
    engine.run_until(lambda: engine.sequences[first].sampled >= 2)
    engine.replay(first)
    engine.replay(second)
    # Their pages go to others under the saves, which the step has to wait for.
    timer = threading.Timer(0.05, ferry.copies.release, ("save",))
    timer.start()
    engine.run()
    timer.join()
    assert [call.arguments[0] for call in engine.transcript.all("query")].count(first) == 2
    for request in (first, second):
        assert engine.outcomes[request].tokens == engine.expected(request)
    settle(engine)
    engine.allocator.evict(99)
    assert engine.answer(PROMPT[::-1]) == engine.expected(second + 1)
    assert offers(engine)[-1][0] == 8


@every_line
@every_rank_count
def test_k_before_anything_is_bound(ferry: Ferry, line: Line, ranks: int) -> None:
    engine = ferry.start(options(line, ranks), dialect=line.dialect, is_ready=False)
    assert engine.transcript.calls == []
    assert ferry.copies.counts == {"load": ranks, "save": ranks}, "only the self-test copies"
    engine.step()
    assert engine.answer(PROMPT) == engine.expected(1)


@every_line
def test_what_is_saved_is_committed_when_the_engine_is_idle(ferry: Ferry, line: Line) -> None:
    """An idle engine polls no more: the leader's rank answers last."""
    engine = start(ferry, line, options(line, 2), CONFIG)
    ferry.copies.hold("save", 1)
    request = engine.submit(PROMPT, 4)
    engine.run_until(lambda: request in engine.outcomes)
    for _ in range(3):
        engine.step()
    ferry.copies.release("save")
    engine.run()
    assert not engine.leader._side.is_touched(str(request))
