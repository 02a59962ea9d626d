"""The leader of TensorRT-LLM: what it offers is certain, and pages are let go of only when no copy touches them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import pytest
from trtllm_kit import BLOCK, COVERED, OTHERS, PAGE, PAGES, PROMPT, Request, Runtime, delta, make

__all__ = ["make"]


@pytest.fixture
def engine(make: Callable[..., Runtime]) -> Runtime:
    runtime = make()
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    return runtime


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_one_request_computed_the_next_loads_within_its_step(
    make: Callable[..., Runtime], ranks: int
) -> None:
    runtime = make(ranks, "trtllm.sync_bytes = 1_000_000")
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    request = Request(2, PROMPT)
    assert runtime.leader.get_num_new_matched_tokens(request, 0) == (COVERED, False)
    runtime.leader.update_state_after_alloc(request, OTHERS)
    seen: list[bool] = []
    runtime.step(
        delta(request, PROMPT, OTHERS, 0, 2), forward=lambda: seen.append(runtime.holds(OTHERS[:6], 5))
    )
    assert seen == [True]
    assert runtime.plan.sync_loads == ("2",)
    runtime.poll()
    assert not runtime.leader.request_finished(request, OTHERS)
    assert not runtime.side.has_promised()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_large_load_goes_on_beside_the_steps(make: Callable[..., Runtime], ranks: int) -> None:
    runtime = make(ranks, "trtllm.sync_bytes = 1")
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    request = Request(2, PROMPT)
    assert runtime.leader.get_num_new_matched_tokens(request, 0) == (COVERED, True)
    runtime.leader.update_state_after_alloc(request, OTHERS)
    runtime.step()
    assert runtime.plan.sync_loads == ()
    runtime.poll_until(loading=[2])
    assert runtime.holds(OTHERS[:6], 5)
    runtime.step(delta(request, PROMPT, OTHERS, COVERED, 2))
    assert not runtime.plan.jobs.loads
    runtime.end(request, OTHERS)


def test_several_ranks_load_beside_the_steps_unless_told_otherwise(make: Callable[..., Runtime]) -> None:
    runtime = make(2)
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    assert runtime.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0) == (COVERED, True)


def test_the_engine_computes_the_last_token_itself(engine: Runtime) -> None:
    query = engine.leader.get_num_new_matched_tokens
    assert query(Request(2, PROMPT[:COVERED]), 0)[0] == COVERED - PAGE
    assert query(Request(3, PROMPT[: COVERED + 1]), 0)[0] == COVERED
    assert query(Request(4, PROMPT[:1]), 0) == (0, False)
    assert query(Request(5, PROMPT), COVERED) == (0, False)


def test_behind_a_part_of_a_page_nothing_is_offered(engine: Runtime) -> None:
    assert engine.leader.get_num_new_matched_tokens(Request(2, PROMPT), 6) == (0, False)
    assert engine.leader.get_num_new_matched_tokens(Request(3, PROMPT), PAGE)[0] == COVERED - PAGE


def test_what_the_engine_has_is_not_written(engine: Runtime) -> None:
    request = Request(2, PROMPT)
    engine.write(OTHERS, seed=9)
    assert engine.leader.get_num_new_matched_tokens(request, 3 * PAGE)[0] == COVERED - 3 * PAGE
    engine.leader.update_state_after_alloc(request, OTHERS)
    engine.step(delta(request, PROMPT, OTHERS, 3 * PAGE, 2))
    assert engine.holds(OTHERS[:3], 9)
    assert (engine.pages[0].content[OTHERS[3:6]] == engine.pages[0].content[PAGES[3:6]]).all()


@pytest.mark.parametrize("facts", [{"cache_salt": "mine"}, {"lora_task_id": 3}, {"multimodal_hashes": [[1]]}])
def test_what_is_keyed_otherwise_or_not_at_all_finds_nothing(engine: Runtime, facts: dict[str, Any]) -> None:
    assert engine.leader.get_num_new_matched_tokens(Request(2, PROMPT, **facts), 0) == (0, False)


def test_nothing_is_offered_or_saved_before_every_rank_is_there(make: Callable[..., Runtime]) -> None:
    runtime = make(2)
    request = Request(1, PROMPT)
    assert runtime.leader.get_num_new_matched_tokens(request, 0) == (0, False)
    runtime.leader.update_state_after_alloc(request, PAGES)
    runtime.step(delta(request, PROMPT, PAGES, 0, len(PROMPT)))
    assert not runtime.plan.jobs.saves
    runtime.workers[0].get_finished([], [])
    runtime.step(cached=[delta(request, [1], [], len(PROMPT), 1)])
    assert not runtime.plan.jobs.saves
    runtime.poll()
    runtime.step(cached=[delta(request, [2], [], len(PROMPT) + 1, 1)])
    assert [len(save.copies) for save in runtime.plan.jobs.saves] == [3]


def test_a_rank_that_cannot_copy_switches_the_cache_off(make: Callable[..., Runtime]) -> None:
    runtime = make(2)
    runtime.workers[1]._side.fail("no GPU")
    runtime.warm_up()
    assert "no GPU" in runtime.side.disabled
    assert runtime.leader.get_num_new_matched_tokens(Request(1, PROMPT), 0) == (0, False)
    assert not runtime.leader.request_finished(Request(1, PROMPT), PAGES)


def test_blocks_are_saved_as_they_fill_and_pages_stay_meanwhile(engine: Runtime) -> None:
    prompt = list(range(500, 500 + 12))
    request = Request(2, prompt)
    assert engine.leader.get_num_new_matched_tokens(request, 0) == (0, False)
    engine.leader.update_state_after_alloc(request, OTHERS[:3])
    engine.step(delta(request, prompt, OTHERS[:3], 0, 4))
    assert not engine.plan.jobs.saves
    engine.step(cached=[delta(request, [], [], 4, 8)])
    assert [save.copies[0].pages for save in engine.plan.jobs.saves] == [tuple(OTHERS[:2])]
    saved = []
    for position in range(12, 16):
        pages = [OTHERS[3]] if position == 12 else []
        engine.step(cached=[delta(request, [position], pages, position, 1)])
        saved += [copy.pages for save in engine.plan.jobs.saves for copy in save.copies]
    assert saved == [tuple(OTHERS[2:4])]
    engine.end(request, OTHERS[:4])
    longer = [*prompt, *range(12, 16), 1, 2]
    assert engine.leader.get_num_new_matched_tokens(Request(3, longer), 0)[0] == 16


def test_positions_that_lag_or_that_count_the_load_save_the_same(engine: Runtime) -> None:
    for number, computed in ((2, 0), (3, COVERED)):
        prompt = PROMPT[:COVERED] + list(range(900 * number, 900 * number + BLOCK))
        request = Request(number, prompt)
        assert engine.leader.get_num_new_matched_tokens(request, 0)[0] == COVERED
        engine.leader.update_state_after_alloc(request, list(range(20, 28)))
        engine.step(delta(request, prompt, list(range(20, 28)), computed, BLOCK))
        assert [copy.pages for save in engine.plan.jobs.saves for copy in save.copies] == [(26, 27)]
        engine.end(request, list(range(20, 28)))


@pytest.mark.parametrize(
    ("is_sync", "honoured"), [(True, 2 * PAGE), (True, 0), (False, 2 * PAGE), (False, 0)]
)
def test_no_more_is_loaded_than_the_engine_took(
    make: Callable[..., Runtime], is_sync: bool, honoured: int
) -> None:
    runtime = make(config=f"trtllm.sync_bytes = {1 << 20 if is_sync else 1}")
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    request = Request(2, PROMPT, py_num_connector_matched_tokens=honoured)
    assert runtime.leader.get_num_new_matched_tokens(request, 0) == (COVERED, not is_sync)
    runtime.leader.update_state_after_alloc(request, OTHERS)
    runtime.step()
    assert runtime.plan.empty_loads == (() if honoured or is_sync else ("2",))
    runtime.poll() if is_sync else runtime.poll_until(loading=[2])
    assert runtime.holds(OTHERS[: honoured // PAGE], 5)
    assert not runtime.pages[0].content[OTHERS[honoured // PAGE :]].any()
    assert not runtime.side.has_promised()
    runtime.step(delta(request, PROMPT, OTHERS, 0 if is_sync else honoured, len(PROMPT) - honoured))
    runtime.end(request, OTHERS)


def test_a_request_that_lost_its_pages_begins_anew(engine: Runtime) -> None:
    request = Request(2, PROMPT)
    query = engine.leader.get_num_new_matched_tokens
    assert query(request, 0) == (COVERED, False)
    engine.leader.update_state_after_alloc(request, OTHERS)
    # Lost before a rank heard of the load.
    assert query(request, 0) == (COVERED, False)
    engine.leader.update_state_after_alloc(request, list(range(20, 27)))
    engine.step(delta(request, PROMPT, list(range(20, 27)), 0, 2))
    assert len(engine.plan.jobs.loads) == 1
    assert engine.holds(range(20, 26), 5)
    assert not engine.pages[0].content[OTHERS].any()
    # Lost while it ran.
    engine.poll()
    assert query(request, PAGE) == (COVERED - PAGE, False)
    engine.leader.update_state_after_alloc(request, OTHERS)
    engine.step(delta(request, PROMPT, OTHERS, PAGE, 2))
    assert engine.side._requests["2"].pages == OTHERS
    engine.end(request, OTHERS)


def test_a_load_beside_the_steps_that_is_taken_back_is_still_answered(make: Callable[..., Runtime]) -> None:
    runtime = make(config="trtllm.sync_bytes = 1")
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    request = Request(2, PROMPT)
    runtime.leader.get_num_new_matched_tokens(request, 0)
    runtime.leader.update_state_after_alloc(request, OTHERS)
    assert runtime.leader.get_num_new_matched_tokens(request, 6) == (0, False)
    runtime.leader.update_state_after_alloc(request, OTHERS)
    runtime.step()
    assert runtime.plan.empty_loads == ("2",)
    runtime.poll_until(loading=[2])
    assert not runtime.pages[0].content[OTHERS].any()


def test_a_cancel_while_the_load_writes_holds_the_pages(make: Callable[..., Runtime]) -> None:
    runtime = make(2, "trtllm.sync_bytes = 1")
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    request = Request(2, PROMPT)
    runtime.leader.get_num_new_matched_tokens(request, 0)
    runtime.leader.update_state_after_alloc(request, OTHERS)
    runtime.step()
    assert runtime.leader.request_finished(request, OTHERS)
    runtime.poll_until(saved=[2], loading=[2])
    assert runtime.holds(OTHERS[:6], 5)
    assert not runtime.side.has_promised()


def test_pages_that_a_forgotten_load_still_writes_are_waited_for(make: Callable[..., Runtime]) -> None:
    runtime = make(config="trtllm.sync_bytes = 1")
    runtime.warm_up()
    runtime.cold(Request(1, PROMPT), PAGES, seed=5)
    runtime.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0)
    runtime.leader.update_state_after_alloc(Request(2, PROMPT), OTHERS)
    # The engine forgets request 2 and gives its pages away, one as computed and one to be written.
    for number, local, pages in ((3, PAGE, [OTHERS[0], 30]), (4, 0, [OTHERS[1]]), (5, 0, [28])):
        request = Request(number, list(range(number * 1000, number * 1000 + 2 * PAGE)))
        assert runtime.leader.get_num_new_matched_tokens(request, local) == (0, False)
        runtime.leader.update_state_after_alloc(request, pages)
        runtime.step(delta(request, request.tokens, pages, local, PAGE))
        assert runtime.plan.awaited_loads == (("2",) if number == 3 else ())
        assert runtime.holds(OTHERS[:1], 5)
        runtime.poll()


def test_saves_of_a_forgotten_request_are_fenced(engine: Runtime) -> None:
    request = Request(2, list(range(300, 300 + BLOCK)))
    engine.leader.get_num_new_matched_tokens(request, 0)
    engine.leader.update_state_after_alloc(request, OTHERS[:2])
    engine.step(delta(request, request.tokens, OTHERS[:2], 0, BLOCK))
    saves = [save.id for save in engine.plan.jobs.saves]
    other = Request(3, list(range(400, 400 + BLOCK)))
    engine.leader.get_num_new_matched_tokens(other, 0)
    engine.leader.update_state_after_alloc(other, OTHERS[1:3])
    engine.step(delta(other, other.tokens, OTHERS[1:3], 0, BLOCK))
    assert engine.plan.jobs.fences == saves
    engine.end(other, OTHERS[1:3])


def test_requests_that_are_never_finished_are_forgotten(
    engine: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.engines.trtllm.scheduler._MOST_REQUESTS", 3)
    for number in range(2, 12):
        engine.leader.get_num_new_matched_tokens(Request(number, PROMPT), 0)
    assert list(engine.side._requests) == ["9", "10", "11"]
    assert len(engine.side._sessions._sessions) == 3
    assert not engine.leader.request_finished(Request(2, PROMPT), PAGES)


def test_a_page_that_is_none_ends_what_is_saved(engine: Runtime) -> None:
    prompt = list(range(500, 500 + 2 * BLOCK))
    request = Request(2, prompt)
    engine.leader.get_num_new_matched_tokens(request, 0)
    engine.leader.update_state_after_alloc(request, [10, 11, -1, 12])
    engine.step(delta(request, prompt, [10, 11, -1, 12], 0, 2 * BLOCK))
    assert [copy.pages for save in engine.plan.jobs.saves for copy in save.copies] == [(10, 11)]
    engine.step(cached=[delta(request, [1], [13], 2 * BLOCK, 1)])
    assert engine.side._requests["2"].pages == [10, 11]
    engine.end(request, [])


def test_unknown_requests_and_layouts_of_output_are_let_be(engine: Runtime) -> None:
    engine.leader.update_state_after_alloc(Request(7, PROMPT), PAGES)
    engine.step(delta(Request(7, PROMPT), PROMPT, PAGES, 0, len(PROMPT)))
    assert not engine.plan.jobs.saves
    assert not engine.leader.request_finished(Request(8, PROMPT), PAGES)
    old = SimpleNamespace(request_id=9, new_tokens=[1], new_block_ids=[2], computed_position=0)
    engine.step(old)


def test_slower_tiers_are_waited_for_within_the_step_and_go_on_behind_it(
    make: Callable[..., Runtime], tmp_path: Path
) -> None:
    tier = f"[[tiers]]\ntype = 'disk'\npath = '{tmp_path}/blocks'\ncapacity = '64MiB'\n"
    first = make(config=f"lease_s = 30.0\ntrtllm.query_wait_s = 1.0\n{tier}")
    first.warm_up()
    first.cold(Request(1, PROMPT), PAGES, seed=5)
    first.poll_for(lambda: not first.side._service.has_pending())
    first.close()
    second = make(config=f"trtllm.query_wait_s = 1.0\n{tier}")
    second.warm_up()
    request = Request(2, PROMPT)
    assert second.leader.get_num_new_matched_tokens(request, 0) == (COVERED, False)
    second.leader.update_state_after_alloc(request, OTHERS)
    second.step(delta(request, PROMPT, OTHERS, 0, 2))
    assert second.holds(OTHERS[:6], 5)
    second.end(request, OTHERS)
    second.close()
    third = make(config=f"trtllm.query_wait_s = 0\n{tier}")
    third.warm_up()
    assert third.leader.get_num_new_matched_tokens(Request(1, PROMPT), 0) == (0, False)
    third.poll_for(lambda: not third.side._service.has_pending())
    assert third.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0) == (COVERED, False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_another_engine_goes_on_with_is_visible_before_the_answer(
    make: Callable[..., Runtime], tmp_path: Path, ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    shared = f"[[tiers]]\ntype = 'common'\nplace = '{tmp_path}'\n"
    config = f"plugins = ['common']\npeer.commit_wait_s = {5.0 if ranks == 1 else 0.05}\n"
    prefill, decode = (
        make(ranks, config + shared),
        make(ranks, f"{config}trtllm.query_wait_s = 1.0\n{shared}"),
    )
    prefill.warm_up()
    decode.warm_up()
    request = Request(1, PROMPT, max_new_tokens=1)
    prefill.leader.get_num_new_matched_tokens(request, 0)
    prefill.leader.update_state_after_alloc(request, PAGES)
    prefill.step(delta(request, PROMPT, PAGES, 0, len(PROMPT)), forward=lambda: prefill.write(PAGES, 5))
    assert prefill.plan.jobs.is_awaited
    if ranks == 1:
        assert "may not be visible" not in caplog.text
        assert decode.leader.get_num_new_matched_tokens(Request(2, PROMPT), 0) == (COVERED, False)
    else:
        # The ranks of this engine act in turn, so that the leader waits in vain.
        assert "may not be visible" in caplog.text
    prefill.end(request, PAGES)
    common.PLACES.pop(str(tmp_path), None)
