"""The classes that TensorRT-LLM instantiates: errors of ours stop there, unless the output would be wrong."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from trtllm_kit import COVERED, OTHERS, PAGES, PROMPT, Request, Runtime, delta, make

from kvferry.connector.errors import ConfigError, LayoutError, LoadFailed
from kvferry.engines.trtllm.plan import StepPlan

__all__ = ["make"]


@pytest.fixture
def engine(make: Callable[..., Runtime]) -> Runtime:
    runtime = make(config="trtllm.sync_bytes = 1")
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    return runtime


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug")


def test_importing_the_package_does_not_import_tensorrt_llm() -> None:
    code = "import sys, kvferry.engines.trtllm; assert 'tensorrt_llm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_tensorrt_llm_asking_for_a_class_says_so() -> None:
    import kvferry.engines.trtllm as package

    with pytest.raises(ImportError, match="TensorRT-LLM"):
        _ = package.KVFerryScheduler
    with pytest.raises(AttributeError, match="Nothing"):
        _ = package.Nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("config", "llm_args", "reason"),
    [("enabled = false", {}, "enabled = false"), ("", {"pipeline_parallel_size": 2}, "pipeline")],
)
def test_what_cannot_be_served_runs_without_the_cache(
    make: Callable[..., Runtime],
    caplog: pytest.LogCaptureFixture,
    config: str,
    llm_args: dict[str, Any],
    reason: str,
) -> None:
    runtime = make(config=config, **llm_args)
    assert reason in caplog.text
    request = Request(1, PROMPT)
    runtime.cold(request, PAGES, seed=1)
    assert not runtime.leader.request_finished(request, PAGES)
    runtime.workers[0].register_kv_cache_layout(object())
    assert runtime.workers[0].get_finished([3], []) == ([3], [])


def test_a_wrong_configuration_stops_the_start(
    make: Callable[..., Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="no_such_thing"):
        make(config="no_such_thing = 1")
    assert "kvferry cannot start" in caplog.text


def test_cautions_are_logged(make: Callable[..., Runtime], caplog: pytest.LogCaptureFixture) -> None:
    make(kv_cache_config=SimpleNamespace(tokens_per_block=4, enable_partial_reuse=True))
    assert "enable_partial_reuse" in caplog.text


def test_before_anything_is_bound_hooks_do_nothing(engine: Runtime) -> None:
    worker = engine.workers[0]
    assert worker.register_forward_pass_callable() is None
    for metadata in (None, StepPlan(), b"somebody else's"):
        worker.bind_connector_meta(metadata)
        worker.start_load_kv(None)
        worker.wait_for_layer_load(0, None)
        worker.save_kv_layer(0, None)
        worker.wait_for_save(None)
        assert worker.get_finished([], []) == ([], [])


def test_one_layer_group_is_served_by_either_form(engine: Runtime) -> None:
    leader = engine.leader
    for number, groups in ((2, [OTHERS]), (3, {0: OTHERS})):
        request = Request(number, PROMPT)
        assert leader.get_num_new_matched_tokens(request, 0, None) == (COVERED, True)
        leader.update_state_after_alloc_by_layer_group(request, groups)
        engine.step()
        engine.poll_until(loading=[number])
        assert engine.holds(OTHERS[:6], 5)
        assert not leader.request_finished_by_layer_group(request, groups)


def test_several_layer_groups_stop_what_counts_on_an_offer_and_nothing_else(engine: Runtime) -> None:
    engine.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0)
    with pytest.raises(LayoutError, match="2 layer groups"):
        engine.leader.update_state_after_alloc_by_layer_group(Request(2, PROMPT), [OTHERS, OTHERS])
    assert engine.side.disabled
    engine.leader.update_state_after_alloc_by_layer_group(Request(3, PROMPT), [OTHERS, OTHERS])


def test_pages_that_do_not_hold_what_counts_as_computed_stop_the_engine(engine: Runtime) -> None:
    engine.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0)
    with pytest.raises(LayoutError, match="counts 24 tokens as computed in 5 pages of 4"):
        engine.leader.update_state_after_alloc(Request(2, PROMPT), OTHERS[:5])


def test_an_error_in_the_query_offers_nothing_and_switches_off(
    engine: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine.side._translator, "describe", broken)
    for _ in range(3):
        assert engine.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0) == (0, False)
    monkeypatch.undo()
    assert engine.leader.get_num_new_matched_tokens(Request(3, PROMPT), 0) == (0, False)
    assert "a bug" in engine.side.disabled
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    engine.leader.update_state_after_alloc(Request(2, PROMPT), OTHERS)
    engine.step(delta(Request(2, PROMPT), PROMPT, OTHERS, 0, len(PROMPT)))
    assert not engine.plan.jobs.loads + engine.plan.jobs.saves
    assert not engine.leader.request_finished(Request(2, PROMPT), OTHERS)


@pytest.mark.parametrize("is_offered", [True, False])
def test_an_error_when_pages_are_made_stops_what_counts_on_an_offer(
    engine: Runtime, monkeypatch: pytest.MonkeyPatch, is_offered: bool
) -> None:
    request = Request(2, PROMPT if is_offered else PROMPT[::-1])
    assert engine.leader.get_num_new_matched_tokens(request, 0)[1] is is_offered
    monkeypatch.setattr(engine.side, "_given_out", broken)
    if is_offered:
        with pytest.raises(RuntimeError, match="a bug"):
            engine.leader.update_state_after_alloc(request, OTHERS)
    else:
        engine.leader.update_state_after_alloc(request, OTHERS)
    assert "a bug" in engine.side.disabled


def test_an_error_in_planning_keeps_the_promises(engine: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(2, PROMPT)
    engine.leader.get_num_new_matched_tokens(request, 0)
    engine.leader.update_state_after_alloc(request, OTHERS)
    monkeypatch.setattr(engine.side, "_advance", broken)
    engine.step(delta(Request(3, PROMPT), [], [], 0, 1))
    assert [load.request_id for load in engine.plan.jobs.loads] == ["2"]
    engine.poll_until(loading=[2])
    assert engine.holds(OTHERS[:6], 5)
    assert "a bug" in engine.side.disabled


@pytest.mark.parametrize("is_promised", [True, False])
def test_a_plan_that_cannot_be_made_at_all_stops_only_what_counts_on_it(
    engine: Runtime, monkeypatch: pytest.MonkeyPatch, is_promised: bool
) -> None:
    if is_promised:
        engine.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0)
        engine.leader.update_state_after_alloc(Request(2, PROMPT), OTHERS)
    monkeypatch.setattr(engine.side._sessions, "take_jobs", broken)
    output = SimpleNamespace(new_requests=[], cached_requests=[])
    if is_promised:
        with pytest.raises(RuntimeError, match="a bug"):
            engine.leader.build_connector_meta(output)
    else:
        assert engine.leader.build_connector_meta(output) == StepPlan()


def test_an_error_at_the_end_of_a_request_holds_its_pages_until_the_ranks_are_through(
    engine: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(2, PROMPT)
    engine.leader.get_num_new_matched_tokens(request, 0)
    engine.leader.update_state_after_alloc(request, OTHERS)
    engine.step()
    monkeypatch.setattr(engine.side._sessions, "finish", broken)
    assert engine.leader.request_finished(request, OTHERS)
    engine.poll_until(saved=[2], loading=[2])
    assert "a bug" in engine.side.disabled


@pytest.mark.parametrize("hook", ["bind", "start_loads", "take_finished"])
@pytest.mark.parametrize("is_promised", [True, False])
def test_an_error_in_a_rank_stops_only_what_counts_on_a_load(
    engine: Runtime, monkeypatch: pytest.MonkeyPatch, hook: str, is_promised: bool
) -> None:
    worker = engine.workers[0]
    if is_promised:
        engine.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0)
        engine.leader.update_state_after_alloc(Request(2, PROMPT), OTHERS)
    monkeypatch.setattr(worker._side, hook, broken)
    monkeypatch.setattr(worker._side, "_collect", lambda: None)

    def run() -> None:
        engine.step()
        engine.poll()

    if is_promised:
        with pytest.raises(RuntimeError, match="a bug"):
            run()
        return
    engine.step()
    assert engine.poll() == [([], [])]
    monkeypatch.undo()
    engine.step()
    engine.poll()
    assert "a bug" in engine.side.disabled
    assert engine.leader.get_num_new_matched_tokens(Request(3, PROMPT), 0) == (0, False)


def test_an_error_when_saves_begin_gives_them_up(engine: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(2, PROMPT[::-1])
    engine.leader.get_num_new_matched_tokens(request, 0)
    engine.leader.update_state_after_alloc(request, OTHERS)
    monkeypatch.setattr(engine.workers[0]._side._stager, "submit_saves", broken)
    engine.step(delta(request, request.tokens, OTHERS, 0, len(PROMPT)))
    assert engine.plan.jobs.saves
    engine.end(request, OTHERS)
    assert "a bug" in engine.side.disabled


def test_an_error_of_the_leader_in_a_poll_stops_nothing(
    engine: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.side.mailbox, "take", broken)
    assert engine.poll(saved=[9]) == [([9], [])]
    assert "a bug" in engine.side.disabled


def test_a_load_that_fails_for_good_stops_the_engine(make: Callable[..., Runtime]) -> None:
    runtime = make(config="trtllm.sync_bytes = 1\nload_deadline_s = 0.1")
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    request = Request(2, PROMPT)
    runtime.leader.get_num_new_matched_tokens(request, 0)
    runtime.leader.update_state_after_alloc(request, OTHERS)
    arena = runtime.side._service._arena
    for slot in range(arena.handle.num_slots):
        arena.set_generation(slot, 999)
    runtime.step()
    with pytest.raises(LoadFailed, match="request 2"):
        runtime.poll_until(loading=[2])


def test_the_ends_of_the_objects_are_the_end_of_their_halves(make: Callable[..., Runtime]) -> None:
    runtime = make()
    leader_side, worker_side = runtime.side, runtime.workers[0]._side
    runtime.workers.clear()
    del runtime.leader
    gc.collect()
    assert leader_side._is_closed
    assert worker_side._is_closed
