"""A rank of TensorRT-LLM: each id is answered once, after everything it stands for, and never on a failed load."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvferry.connector.arena import Arena, ArenaHandle
from kvferry.connector.config import Config
from kvferry.connector.errors import KVFerryError, LayoutError, LoadFailed
from kvferry.connector.layout import BlockLayout
from kvferry.connector.staging import Bytes, PageIds, SlotIds
from kvferry.cuda.choice import Proof
from kvferry.engines.jobs import BlockCopy, LoadJob, SaveJob, StepJobs, WorkerReport
from kvferry.engines.trtllm import worker as worker_module
from kvferry.engines.trtllm.plan import StepPlan
from kvferry.engines.trtllm.reports import Mailbox
from kvferry.engines.trtllm.worker import WorkerSide

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=16, itemsize=2, dtype="bfloat16")
CONFIG = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 16, "torch_dtype": "bfloat16"}
DEADLINE_S = 10.0
GENERATION = 5
STREAM = object()


class Pages:
    """Copies whole slots to and from one block's pages while the gate is open; what it is told to refuse fails."""

    is_on_gpu = False
    layers: Sequence[Any] = ()
    pages_per_block = 2

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.content = np.zeros(LAYOUT.slot_bytes, np.uint8)
        self.error: Exception | None = None
        self.on_copy: Callable[[], None] = lambda: None
        self.gathers, self.scatters = Direction(self, self._gather), Direction(self, self._scatter)
        self.is_closed = False

    def staging(self, layout: object, shard: object, config: object, prove: Proof) -> Pages:
        prove(self)
        return self

    def mark(self) -> object:
        return None

    def _gather(self, slots: SlotIds, arena: Bytes) -> None:
        arena[slots] = self.content

    def _scatter(self, slots: SlotIds, arena: Bytes) -> None:
        self.content[:] = arena[slots[-1]]

    def detach(self, arena: Bytes) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


class Direction:
    def __init__(self, pages: Pages, move: Callable[[SlotIds, Bytes], None]) -> None:
        self._pages = pages
        self._move = move

    def wait(self, mark: object) -> None:
        assert self._pages.gate.wait(DEADLINE_S)

    def copy(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._pages.on_copy()
        if self._pages.error is not None:
            raise self._pages.error
        self._move(slots, arena)

    def finish(self) -> None:
        pass


class Rank:
    """A worker, its leader's mailbox and arena, and the engine that calls it."""

    def __init__(self, folder: Path, pages: Pages, deadline_s: float, self_test: bool = False) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        self.pages = pages
        self.mailbox = Mailbox()
        self.arena = Arena.create(4, LAYOUT.slot_bytes)
        self.arena.slots_array[:] = 0x77
        for slot in range(4):
            self.arena.set_generation(slot, GENERATION)
        config = Config(self_test=self_test, load_deadline_s=deadline_s)
        self.worker = WorkerSide(SimpleNamespace(model=str(folder)), config, 0, 1)
        self.loaded: list[str] = []
        self.failed: list[str] = []
        self.report = WorkerReport()
        self.settled = True

    def plan(self, *jobs: LoadJob | SaveJob, arena: ArenaHandle | None = None, **fields: Any) -> StepPlan:
        loads = [job for job in jobs if isinstance(job, LoadJob)]
        saves = [job for job in jobs if isinstance(job, SaveJob)]
        fences = fields.pop("fences", [])
        step = StepJobs(
            arena=arena or self.arena.handle, layout=LAYOUT, loads=loads, saves=saves, fences=fences
        )
        return StepPlan(step, self.mailbox.name, **fields)

    def step(self, *jobs: LoadJob | SaveJob, forward: bool = True, **fields: Any) -> None:
        self.worker.bind(self.plan(*jobs, **fields))
        self.worker.start_loads(STREAM)
        if forward:
            self.worker.save(STREAM)

    def poll(self, saved: Sequence[int] = (), loading: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        answer = self.worker.take_finished(saved, loading, lambda _: self.settled)
        self.take()
        return answer

    def take(self) -> None:
        for report in self.mailbox.take():
            self.loaded += report.loaded
            self.failed += report.failed
            self.report.merge(report.report)

    def poll_until(self, saved: int = 0, loaded: int = 0) -> tuple[list[int], list[int]]:
        """Poll until so many ids were answered."""
        end = time.monotonic() + DEADLINE_S
        of_all: tuple[list[int], list[int]] = ([], [])
        while len(of_all[0]) < saved or len(of_all[1]) < loaded:
            assert time.monotonic() < end
            for so_far, more in zip(of_all, self.poll(), strict=True):
                so_far += more
        return of_all

    def poll_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end
            assert self.poll() == ([], [])

    def close(self) -> None:
        self.pages.gate.set()
        self.worker.close()
        self.mailbox.close()
        self.arena.close()


COPIES = (BlockCopy(1, GENERATION, 0, (0, 1)),)


def load(request_id: str = "7", generation: int = GENERATION) -> LoadJob:
    return LoadJob(request_id, (BlockCopy(1, generation, 0, (0, 1)),))


def save(job_id: int = 1, request_id: str = "7") -> SaveJob:
    return SaveJob(job_id, request_id, COPIES)


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def make(tmp_path: Path, pages: Pages, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rank]]:
    made: list[Rank] = []
    monkeypatch.setattr(worker_module, "pool_pages", lambda *_: pages)

    def make(deadline_s: float = 0.2) -> Rank:
        made.append(Rank(tmp_path, pages, deadline_s))
        made[-1].worker.register(None)  # type: ignore[arg-type]
        return made[-1]

    yield make
    for rank in made:
        rank.close()


@pytest.fixture
def rank(make: Callable[..., Rank]) -> Rank:
    return make()


def test_before_the_first_plan_every_hook_does_nothing(rank: Rank) -> None:
    rank.worker.start_loads(STREAM)
    rank.worker.save(STREAM)
    assert rank.poll() == ([], [])
    assert not rank.worker.has_loads()


def test_the_first_report_says_that_the_rank_is_there(rank: Rank) -> None:
    rank.step()
    assert rank.worker.take_finished([], [], lambda _: True) == ([], [])
    assert [report.rank for report in rank.mailbox.take()] == [0]


def test_a_load_is_answered_once_and_reported_before(rank: Rank) -> None:
    rank.pages.gate.clear()
    rank.step(load(), forward=False)
    assert rank.worker.has_loads()
    assert rank.poll(loading=[7]) == ([], [])
    assert rank.loaded == []
    rank.pages.gate.set()
    assert rank.poll_until(loaded=1) == ([], [7])
    assert rank.loaded == ["7"]
    assert (rank.pages.content == 0x77).all()
    assert not rank.worker.has_loads()
    assert rank.poll() == ([], [])


def test_a_load_that_is_through_is_not_answered_before_its_id_is_handed_out(rank: Rank) -> None:
    rank.step(load(), forward=False)
    rank.poll_for(lambda: rank.loaded == ["7"])
    assert rank.poll() == ([], [])
    assert rank.poll(loading=[7]) == ([], [7])


def test_an_id_that_is_handed_out_before_its_load_waits_for_it(rank: Rank) -> None:
    rank.step()
    assert rank.poll(loading=[7]) == ([], [])
    rank.step(load())
    assert rank.poll_until(loaded=1) == ([], [7])


def test_an_earlier_load_of_a_request_does_not_answer_for_a_later_one(rank: Rank) -> None:
    rank.step(load())
    rank.poll_for(lambda: rank.loaded == ["7"])
    rank.pages.gate.clear()
    rank.step(load())
    assert rank.poll(loading=[7]) == ([], [])
    rank.pages.gate.set()
    assert rank.poll_until(loaded=1) == ([], [7])


def test_a_load_of_nothing_is_answered_once_it_is_asked_for(rank: Rank) -> None:
    rank.step(empty_loads=("7",))
    assert rank.poll() == ([], [])
    assert rank.poll(loading=[7]) == ([], [7])
    assert rank.poll() == ([], [])
    assert rank.loaded == []


def test_a_load_that_the_forward_pass_needs_is_there_before_it(rank: Rank) -> None:
    opener = threading.Timer(0.05, rank.pages.gate.set)
    rank.pages.gate.clear()
    opener.start()
    rank.step(load(), sync_loads=("7",))
    assert (rank.pages.content == 0x77).all()
    assert rank.poll(loading=[]) == ([], [])
    assert rank.loaded == ["7"]
    assert not rank.worker.has_loads()
    assert rank.poll(saved=[7]) == ([7], [])


@pytest.mark.parametrize("sync_loads", [(), ("7",)])
def test_a_load_whose_slot_is_not_what_it_was_is_tried_again_and_then_stops_the_engine(
    rank: Rank, sync_loads: tuple[str, ...]
) -> None:
    def run() -> None:
        rank.step(load(generation=4), sync_loads=sync_loads)
        assert rank.poll(loading=[7]) == ([], [])
        rank.poll_until(loaded=1)

    started = time.monotonic()
    with pytest.raises(LoadFailed, match=r"rank 0 .* request 7 .*could not be copied for 0\.2 s.*wrong"):
        run()
    assert time.monotonic() - started >= 0.2
    assert rank.worker.has_loads()
    rank.take()
    assert (rank.loaded, rank.failed) == (["7"], ["7"])


def test_a_load_that_succeeds_after_all_is_answered(make: Callable[..., Rank]) -> None:
    rank = make(deadline_s=DEADLINE_S)
    rank.step(load(generation=4))
    assert rank.poll(loading=[7]) == ([], [])
    rank.arena.set_generation(1, 4)
    assert rank.poll_until(loaded=1) == ([], [7])
    assert (rank.loaded, rank.failed) == (["7"], [])


@pytest.mark.parametrize("sync_loads", [(), ("7",)])
def test_a_load_that_is_known_to_fail_stops_the_engine_at_once(
    make: Callable[..., Rank], sync_loads: tuple[str, ...]
) -> None:
    rank = make(deadline_s=60.0)
    with pytest.raises(LoadFailed, match="request 7"):
        rank.step(LoadJob("7", ()), load("8"), sync_loads=sync_loads)
    rank.take()
    assert rank.failed == ["7"]


def test_a_rank_that_cannot_copy_any_more_stops_the_engine_at_once(make: Callable[..., Rank]) -> None:
    rank = make(deadline_s=60.0)
    rank.pages.error = KVFerryError("the GPU has fallen off the bus")
    rank.step(load())
    with pytest.raises(LoadFailed, match="fallen off the bus"):
        rank.poll_until(loaded=1)
    rank.worker.close()
    rank.take()
    assert "fallen off the bus" in rank.report.problem
    assert (rank.loaded, rank.failed) == (["7"], ["7"])


def test_a_load_that_never_ends_stops_the_engine_and_keeps_its_lease(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_STUCK_S", 0.05)
    rank.pages.gate.clear()
    with pytest.raises(LoadFailed, match=r"not over after 0\.05 s"):
        rank.step(load(), sync_loads=("7",))
    rank.take()
    assert rank.loaded == []


def test_a_failed_load_is_not_tried_again_in_another_arena(make: Callable[..., Rank]) -> None:
    rank = make(deadline_s=60.0)
    other = Arena.create(4, LAYOUT.slot_bytes)
    rank.step(load(generation=4))
    rank.worker.bind(rank.plan(arena=other.handle))
    rank.worker.start_loads(STREAM)
    with pytest.raises(LoadFailed, match="an arena that is gone"):
        rank.poll_until(loaded=1)
    other.close()


def test_a_load_that_was_under_way_when_the_arena_changed_is_good(rank: Rank) -> None:
    other = Arena.create(4, LAYOUT.slot_bytes)
    rank.pages.gate.clear()
    rank.step(load())
    rank.step(arena=other.handle)
    assert rank.poll(loading=[7]) == ([], [])
    rank.pages.gate.set()
    assert rank.poll_until(loaded=1) == ([], [7])
    assert (rank.pages.content == 0x77).all()
    other.close()


def test_pages_are_held_until_the_saves_are_through_and_settled(rank: Rank) -> None:
    rank.settled = False
    rank.pages.gate.clear()
    rank.step(save(1), save(2))
    rank.step(save(3))
    assert rank.poll(saved=[7]) == ([], [])
    rank.pages.gate.set()
    rank.poll_for(lambda: rank.report.saved == {1: 1, 2: 1, 3: 1})
    assert rank.poll() == ([], [])
    rank.settled = True
    assert rank.poll() == ([7], [])
    assert rank.poll() == ([], [])
    assert not rank.report.failed_saves


def test_other_requests_saves_hold_nobody_up(rank: Rank) -> None:
    rank.pages.gate.clear()
    rank.step(save(1, "8"))
    assert rank.poll(saved=[7]) == ([7], [])


def test_a_cancel_while_a_load_writes_holds_the_pages_until_it_is_through(rank: Rank) -> None:
    rank.pages.gate.clear()
    rank.step(load(), forward=False)
    assert rank.poll(saved=[7], loading=[7]) == ([], [])
    rank.pages.gate.set()
    assert rank.poll_until(saved=1, loaded=1) == ([7], [7])


def test_pages_that_are_given_to_others_are_written_to_the_end_before(rank: Rank) -> None:
    rank.pages.gate.clear()
    rank.step(load())
    threading.Timer(0.05, rank.pages.gate.set).start()
    rank.step(awaited_loads=("7", "unknown"))
    assert (rank.pages.content == 0x77).all()
    assert rank.poll(loading=[7]) == ([], [7])


def test_a_load_that_is_tried_again_is_through_before_others_write_its_pages(
    make: Callable[..., Rank],
) -> None:
    rank = make(deadline_s=DEADLINE_S)
    rank.arena.slots_array[2] = 0x22
    rank.step(load("7", generation=4))
    rank.poll_for(lambda: rank.worker._loads["7"].retry_at is not None)
    rank.arena.set_generation(1, 4)
    after = LoadJob("8", (BlockCopy(2, GENERATION, 0, (0, 1)),))
    rank.step(after, awaited_loads=("7",))
    rank.poll_for(lambda: sorted(rank.loaded) == ["7", "8"])
    assert (rank.pages.content == 0x22).all()


def test_a_rank_that_failed_gives_up_its_saves_and_keeps_its_loads(rank: Rank) -> None:
    rank.step(load(), save(1), forward=False)
    rank.worker.fail("an internal error")
    rank.poll_for(lambda: rank.loaded == ["7"])
    assert rank.poll(loading=[7]) == ([], [7])
    assert rank.failed == []
    assert rank.report.failed_saves == {1}
    assert "an internal error" in rank.report.problem


def test_saves_that_cannot_be_submitted_are_reported_as_failed(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no more descriptors")

    rank.worker.bind(rank.plan(save(1)))
    monkeypatch.setattr(worker_module.Stager, "submit_saves", refuse)
    with pytest.raises(OSError, match="descriptors"):
        rank.worker.save(STREAM)
    assert rank.poll(saved=[7]) == ([7], [])
    assert (rank.report.saved, rank.report.failed_saves) == ({1: 1}, {1})


@pytest.mark.parametrize("ends_by", ["bind", "get_finished", "close"])
def test_saves_of_a_step_that_raised_are_given_up(rank: Rank, ends_by: str) -> None:
    rank.step(save(1), forward=False)
    if ends_by == "bind":
        rank.worker.bind(rank.plan())
        rank.worker.save(STREAM)
    if ends_by == "close":
        rank.worker.close()
        rank.take()
    else:
        assert rank.poll(saved=[7]) == ([7], [])
    assert (rank.report.saved, rank.report.failed_saves) == ({1: 1}, {1})
    rank.worker.save(STREAM)
    assert rank.poll() == ([], [])
    assert rank.report.saved == {1: 1}


def test_pages_that_are_given_to_others_are_read_to_the_end_before(rank: Rank) -> None:
    seen: list[int] = []
    rank.pages.content[:] = 0x11
    rank.pages.gate.clear()
    rank.step(save(1))
    rank.pages.on_copy = lambda: seen.append(int(rank.pages.content[0]))
    threading.Timer(0.05, rank.pages.gate.set).start()
    rank.step(fences=[1])
    assert seen == [0x11]


def test_a_failed_save_is_reported_and_its_pages_are_let_go_of(rank: Rank) -> None:
    rank.step(SaveJob(1, "7", (BlockCopy(1, 4, 0, (0, 1)),)))
    rank.poll_for(lambda: bool(rank.report.saved))
    assert rank.report.failed_saves == {1}
    assert rank.poll(saved=[7]) == ([7], [])


def test_nothing_is_answered_that_could_not_be_reported_yet(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.step(load(), save(1, "8"))
    send = worker_module.Reporter.send
    monkeypatch.setattr(worker_module.Reporter, "send", lambda *_: False)
    end = time.monotonic() + DEADLINE_S
    while rank.worker.has_loads() or rank.worker._saves:
        assert rank.poll(saved=[8], loading=[7]) == ([], [])
        assert time.monotonic() < end
    assert rank.poll() == ([], [])
    monkeypatch.setattr(worker_module.Reporter, "send", send)
    assert rank.poll() == ([8], [7])
    assert rank.loaded == ["7"]
    assert rank.report.saved == {1: 1}


def test_pages_that_fail_the_self_test_switch_the_cache_off(
    rank: Rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("torch says no")

    monkeypatch.setattr(worker_module, "cache_pages", refuse)
    broken = Rank(tmp_path, Pages(), 60.0)
    broken.worker.register_layout(object())
    assert "torch says no" in caplog.text
    broken.step(save(1))
    assert broken.poll(saved=[7]) == ([7], [])
    assert "torch says no" in broken.report.problem
    assert (broken.report.saved, broken.report.failed_saves) == ({1: 1}, {1})
    with pytest.raises(LoadFailed, match="torch says no"):
        broken.step(load())
    broken.close()


@pytest.mark.parametrize("self_test", [True, False])
def test_pages_are_proved_where_the_self_test_is_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pages: Pages,
    self_test: bool,
) -> None:
    def prove(staging: object) -> None:
        assert staging is pages
        raise LayoutError("other bytes")

    monkeypatch.setattr(worker_module, "pool_pages", lambda *_: pages)
    monkeypatch.setattr(worker_module, "RoundTrip", lambda *_: prove)
    rank = Rank(tmp_path, pages, 60.0, self_test)
    rank.worker.register(None)  # type: ignore[arg-type]
    told = ["kvferry is off on rank 0: the start-up self-test failed: other bytes"] if self_test else []
    assert caplog.messages == told
    assert (rank.worker._stager is None) == self_test
    rank.close()


def test_a_rank_that_got_no_pages_says_so(tmp_path: Path) -> None:
    rank = Rank(tmp_path, Pages(), 60.0)
    rank.step()
    assert rank.poll() == ([], [])
    assert "never registered" in rank.report.problem
    rank.close()


def test_a_plan_of_a_leader_that_is_off_changes_no_mailbox(rank: Rank) -> None:
    rank.pages.gate.clear()
    rank.step(load(), save(1))
    rank.worker.bind(StepPlan())
    rank.worker.start_loads(STREAM)
    rank.pages.gate.set()
    saved, loaded = rank.poll(saved=[7], loading=[7])
    more = rank.poll_until(1 - len(saved), 1 - len(loaded))
    assert (saved + more[0], loaded + more[1]) == ([7], [7])
    assert rank.loaded == ["7"]
    assert rank.report.saved == {1: 1}


def test_marks_are_on_the_stream_that_the_engine_names(
    make: Callable[..., Rank], pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[object] = [None]
    marked: list[object] = []

    @contextlib.contextmanager
    def following(stream: object) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    torch = ModuleType("torch")
    torch.cuda = SimpleNamespace(stream=following)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(pages, "is_on_gpu", True)
    monkeypatch.setattr(pages, "mark", lambda: marked.append(current[-1]))
    rank = make()
    rank.step(load(), save(1))
    assert marked == [STREAM, STREAM]
    assert rank.poll_until(loaded=0) == ([], [])


def test_close_reports_what_was_under_way(rank: Rank) -> None:
    rank.pages.gate.clear()
    rank.step(load("8"), save(1))
    threading.Timer(0.05, rank.pages.gate.set).start()
    rank.worker.close()
    rank.worker.close()
    rank.take()
    assert rank.loaded == ["8"]
    assert rank.report.saved == {1: 1}
    assert rank.pages.is_closed
