"""kvferry and the contract's error matrix: the engine lives, unless its output would be wrong.

Where TensorRT-LLM catches nothing, an error of kvferry's own must not get out; with one exception, a promised load
that cannot be kept. Where it does, in the forward pass, all requests fail, their pages are up for reuse, and kvferry
goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from ferry import ASYNC, CONFIG, SYNC, Ferry, settle
from standin.executor import Engine
from standin.failures import EngineDied
from standin.options import EngineOptions
from standin.requests import Phase

from kvferry.connector.errors import LoadFailed
from kvferry.engines.trtllm.scheduler import SchedulerSide
from kvferry.engines.trtllm.worker import WorkerSide

PROMPT = list(range(100, 110))
IMPATIENT = "load_deadline_s = 0.3\n"
every_cache = pytest.mark.parametrize("is_v2", [False, True], ids=["V1", "V2"])
every_rank_count = pytest.mark.parametrize("ranks", [1, 2, 4])
every_load = pytest.mark.parametrize("config", [SYNC, ASYNC], ids=["sync", "async"])


def raise_once(monkeypatch: pytest.MonkeyPatch, side: type[Any], name: str) -> Callable[[], bool]:
    """Have a method of one half raise in its next call; return what tells whether it did.

    Binding takes the plan before anything can go wrong, so it is done first.
    """
    method = getattr(side, name)
    raised: list[bool] = []

    def raising(*arguments: Any, **named: Any) -> Any:
        if not raised:
            raised.append(True)
            if name == "bind":
                method(*arguments, **named)
            raise RuntimeError("an internal error")
        return method(*arguments, **named)

    monkeypatch.setattr(side, name, raising)
    return lambda: bool(raised)


def works(engine: Engine, prompt: list[int]) -> bool:
    """Tell whether the engine answers as one without a cache."""
    return engine.answer(prompt) == engine.expected(len(engine.sequences))


HOOKS = [
    (SchedulerSide, "query"),
    (SchedulerSide, "allocated"),
    (SchedulerSide, "plan_step"),
    (SchedulerSide, "finished"),
    (SchedulerSide, "is_settled"),
    (SchedulerSide, "iteration_ended"),
    (WorkerSide, "bind"),
    (WorkerSide, "start_loads"),
    (WorkerSide, "save"),
    (WorkerSide, "take_finished"),
]


@pytest.mark.parametrize(("side", "name"), HOOKS, ids=[name for _, name in HOOKS])
@every_cache
@every_rank_count
def test_an_internal_error_switches_the_cache_off_and_the_engine_goes_on(
    ferry: Ferry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    side: type[Any],
    name: str,
    is_v2: bool,
    ranks: int,
) -> None:
    engine = ferry.start(EngineOptions(ranks=ranks, is_v2=is_v2))
    has_raised = raise_once(monkeypatch, side, name)
    assert works(engine, PROMPT)
    assert works(engine, [*PROMPT, 1])
    assert has_raised()
    lines = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert any("the engine goes on without it" in record.getMessage() for record in lines)
    settle(engine)
    engine.allocator.evict(99)
    assert works(engine, PROMPT)
    assert engine.transcript.all("query")[-1].answer == (0, False)
    assert engine.allocator.available == engine.options.num_pages


@every_load
@every_rank_count
@pytest.mark.parametrize(
    ("side", "name"), [HOOKS[1], HOOKS[6], HOOKS[7]], ids=["allocated", "bind", "start_loads"]
)
def test_an_error_over_a_promised_load_stops_the_engine(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, side: type[Any], name: str, ranks: int, config: str
) -> None:
    engine = ferry.start(EngineOptions(ranks=ranks), config=config)
    ferry.fill(engine, PROMPT)
    raise_once(monkeypatch, side, name)
    with pytest.raises(EngineDied, match="an internal error"):
        engine.answer(PROMPT)


@every_load
@every_rank_count
@pytest.mark.parametrize(("side", "name"), [HOOKS[2], HOOKS[3]], ids=["plan_step", "finished"])
def test_promised_loads_are_kept_although_the_cache_is_switched_off(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, side: type[Any], name: str, ranks: int, config: str
) -> None:
    engine = ferry.start(EngineOptions(ranks=ranks), config=config)
    ferry.fill(engine, PROMPT)
    raise_once(monkeypatch, side, name)
    assert works(engine, PROMPT)
    assert ferry.copies.counts["load"] == ranks


@every_load
@every_rank_count
@every_cache
def test_a_load_that_fails_is_tried_again(ferry: Ferry, ranks: int, is_v2: bool, config: str) -> None:
    engine = ferry.start(EngineOptions(ranks=ranks, is_v2=is_v2), config=config)
    ferry.fill(engine, PROMPT)
    ferry.copies.spoil("load", 3)
    assert works(engine, PROMPT)
    assert engine.transcript.all("query")[-1].answer == (8, config == ASYNC)
    assert ferry.copies.counts["load"] == ranks + 3


@every_load
@every_rank_count
@every_cache
@pytest.mark.parametrize("broken", ["fail", "spoil"])
def test_a_load_that_cannot_be_kept_stops_the_engine(
    ferry: Ferry, ranks: int, is_v2: bool, config: str, broken: str
) -> None:
    engine = ferry.start(EngineOptions(ranks=ranks, is_v2=is_v2), config=IMPATIENT + config)
    ferry.fill(engine, PROMPT)
    getattr(ferry.copies, broken)("load", 10**6)
    with pytest.raises(EngineDied, match="request 3") as died:
        engine.answer(PROMPT)
    assert isinstance(died.value.__cause__, LoadFailed)
    loaded = [one for call in engine.transcript.all("get_finished") for one in call.answer[1]]
    assert loaded == []


@every_rank_count
@every_cache
def test_a_load_that_cannot_be_kept_stops_the_engine_after_a_cancel_too(
    ferry: Ferry, ranks: int, is_v2: bool
) -> None:
    """Its tokens count as computed: the first cache manager would serve its pages to others."""
    engine = ferry.start(EngineOptions(ranks=ranks, is_v2=is_v2), config=IMPATIENT + ASYNC)
    ferry.fill(engine, PROMPT)
    ferry.copies.spoil("load", 10**6)
    request = engine.submit(PROMPT)
    engine.step()
    engine.cancel(request)
    with pytest.raises(EngineDied):
        engine.run()


@every_rank_count
@every_cache
@pytest.mark.parametrize("broken", ["fail", "spoil"])
def test_saves_that_fail_are_forgotten_and_their_pages_freed(
    ferry: Ferry, ranks: int, is_v2: bool, broken: str
) -> None:
    engine = ferry.start(EngineOptions(ranks=ranks, is_v2=is_v2))
    getattr(ferry.copies, broken)("save", 1)
    assert works(engine, PROMPT)
    settle(engine)
    engine.allocator.evict(99)
    assert engine.allocator.available == engine.options.num_pages
    assert works(engine, PROMPT)
    assert engine.transcript.all("query")[-1].answer[0] < 8
    assert works(engine, PROMPT[::-1])
    settle(engine)
    engine.allocator.evict(99)
    assert works(engine, PROMPT)
    assert engine.transcript.all("query")[-1].answer[0] == (8 if broken == "spoil" else 0)


def fail_next_pass(engine: Engine, hook: str) -> None:
    """Have the engine's next forward pass raise at a hook, as its own code may."""
    worker = engine.workers[-1]

    def raising(*arguments: Any) -> None:
        delattr(worker, hook)
        raise RuntimeError("of the forward pass")

    setattr(worker, hook, raising)


@pytest.mark.parametrize("hook", ["wait_for_layer_load", "save_kv_layer", "wait_for_save"])
@pytest.mark.parametrize("tells", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@every_rank_count
@every_cache
def test_a_forward_pass_that_fails_ends_all_requests_and_nothing_else(
    ferry: Ferry, hook: str, tells: bool, overlap: bool, ranks: int, is_v2: bool
) -> None:
    options = EngineOptions(ranks=ranks, is_v2=is_v2, overlap=overlap, tells_finish_of_failed=tells)
    engine = ferry.start(options)
    prompts = [PROMPT, PROMPT[::-1], list(range(30))]
    running = [engine.submit(prompt, 6) for prompt in prompts[:2]]
    engine.step()
    engine.step()
    failing = [*running, engine.submit(prompts[2], 6)]
    fail_next_pass(engine, hook)
    engine.run()
    assert [str(error) for error in engine.failures] == ["of the forward pass"]
    assert {engine.outcomes[one].status for one in failing} == {"failed"}
    settle(engine)
    engine.allocator.evict(99)
    assert engine.allocator.available == options.num_pages
    assert all(works(engine, prompt) for prompt in prompts)


@pytest.mark.parametrize("tells", [True, False], ids=["told", "not told"])
@every_rank_count
@every_cache
def test_a_forward_pass_fails_beside_an_async_load(
    ferry: Ferry, tells: bool, ranks: int, is_v2: bool
) -> None:
    options = EngineOptions(ranks=ranks, is_v2=is_v2, tells_finish_of_failed=tells)
    engine = ferry.start(options, config=ASYNC)
    ferry.fill(engine, PROMPT)
    ferry.copies.hold("load", *range(ranks))
    loading = engine.submit(PROMPT)
    engine.submit(PROMPT[::-1])
    fail_next_pass(engine, "wait_for_save")
    engine.step()
    assert engine.outcomes[loading].status == "failed"
    assert engine.sequences[loading].phase is (Phase.SAVING if tells else Phase.OVER)
    # Where nobody was told, the pages are others' by now, and a step has to wait for the load.
    others = [engine.submit(prompt, 3) for prompt in (PROMPT, PROMPT[::-1], list(range(200)))]
    timer = threading.Timer(0.05, ferry.copies.release, ("load",))
    timer.start()
    engine.run()
    timer.join()
    assert all(engine.outcomes[one].tokens == engine.expected(one) for one in others)
    engine.run_until(lambda: engine.allocator.available == options.num_pages)
    settle(engine)
    engine.allocator.evict(options.num_pages)
    assert all(works(engine, prompt) for prompt in (PROMPT, PROMPT[::-1], list(range(200))))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_beam_width": 2}, "beam"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"enable_attention_dp": True}, "attention data parallelism"),
        ({"speculative_config": object()}, "speculative"),
    ],
)
@every_cache
def test_an_engine_that_cannot_be_served_runs_without_a_cache(
    ferry: Ferry, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any], said: str, is_v2: bool
) -> None:
    engine = ferry.start(EngineOptions(ranks=2, is_v2=is_v2), **arguments)
    assert said in caplog.text
    assert works(engine, PROMPT)
    engine.allocator.evict(99)
    assert works(engine, PROMPT)
    assert {call.answer for call in engine.transcript.all("query")} == {(0, False)}
    assert ferry.copies.counts == {"load": 0, "save": 0}


def test_a_rank_that_cannot_copy_keeps_the_cache_off(ferry: Ferry, caplog: pytest.LogCaptureFixture) -> None:
    ferry.copies.fail("save", 1)
    engine = ferry.start(EngineOptions(ranks=4), config=CONFIG)
    assert "self-test failed" in caplog.text
    for _ in range(2):
        assert works(engine, PROMPT)
        settle(engine)
        engine.allocator.evict(99)
    assert {call.answer for call in engine.transcript.all("query")} == {(0, False)}
