"""The stager and arenas that change: a copy touches the arena it was planned for, and no other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from kvferry.connector.arena import Arena, ArenaHandle
from kvferry.connector.layout import BlockLayout
from kvferry.connector.staging import Bytes, PageIds, SlotIds
from kvferry.engines import jobs as jobs_module
from kvferry.engines import stager as stager_module
from kvferry.engines.jobs import BlockCopy, LoadJob, PeerRead, PeerSource, SaveJob, StepJobs
from kvferry.engines.stager import Stager, StagerResults

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=8, head_dim=16, itemsize=2)
DEADLINE_S = 10.0
GENERATION = 5


class Pages:
    """Copies whole slots to and from one page, each direction only while its gate is open.

    Like a GPU's, copies are only complete when somebody waits for them.
    """

    pages_per_block = 1

    def __init__(self) -> None:
        self.page = np.zeros(LAYOUT.slot_bytes, np.uint8)
        self.batches: list[int] = []
        self.on_copy: Callable[[], None] = lambda: None
        self.gathers, self.scatters = Direction(self, self._gather), Direction(self, self._scatter)
        self.detached: list[int] = []
        self.is_closed = False

    @property
    def under_way(self) -> int:
        return self.gathers.under_way + self.scatters.under_way

    def open(self) -> None:
        """Let copies happen."""
        self.gathers.gate.set()
        self.scatters.gate.set()

    def mark(self) -> object:
        return None

    def _gather(self, slots: SlotIds, arena: Bytes) -> None:
        arena[slots] = self.page

    def _scatter(self, slots: SlotIds, arena: Bytes) -> None:
        self.page[:] = arena[slots[-1]]

    def detach(self, arena: Bytes) -> None:
        assert not self.under_way
        self.detached.append(int(arena[0, 0]))

    def close(self) -> None:
        self.is_closed = True


class Direction:
    def __init__(self, pages: Pages, move: Callable[[SlotIds, Bytes], None]) -> None:
        self.gate = threading.Event()
        self.under_way = 0
        self._pages = pages
        self._move = move

    def wait(self, mark: object) -> None:
        assert self.gate.wait(DEADLINE_S)

    def copy(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._pages.batches.append(len(slots))
        self.under_way += len(slots)
        self._pages.on_copy()
        self._move(slots, arena)

    def finish(self) -> None:
        self.under_way = 0


class Server:
    """An arena as a cache server exports it; the two slots hold ``fill``, at one generation."""

    def __init__(self, fill: int, connection: int) -> None:
        self.arena = Arena.create(2, LAYOUT.slot_bytes)
        self.arena.slots_array[:] = fill
        for slot in range(2):
            self.arena.set_generation(slot, GENERATION)
        self.connection = connection
        self.ends: list[tuple[int, int]] = []

    def handle(self) -> ArenaHandle:
        """As of a new connection, with a lifeline of its own."""
        ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.ends.append(ends)
        handle = msgspec.structs.replace(
            self.arena.handle, lifeline_fd=ends[1], connection=self.connection + len(self.ends)
        )
        return handle

    def hang_up(self, number: int = 0) -> None:
        """The scheduler lets go of its end of a connection's lifeline."""
        os.close(self.ends[number][1])

    def has_writers(self, number: int = 0) -> bool:
        try:
            return os.read(self.ends[number][0], 1) != b""
        except BlockingIOError:
            return True

    def close(self) -> None:
        for read_end, _ in self.ends:
            os.close(read_end)
        self.arena.close()


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def stager(pages: Pages) -> Iterator[Stager]:
    stager = Stager(pages, LAYOUT, LAYOUT.shard(0, 1))
    yield stager
    pages.open()
    stager.close()


@pytest.fixture
def servers() -> Iterator[Callable[[int], Server]]:
    made: list[Server] = []

    def make(fill: int) -> Server:
        made.append(Server(fill, 100 * len(made)))
        return made[-1]

    yield make
    for server in made:
        server.close()


COPY = (BlockCopy(0, GENERATION, 0, (0,)),)


def step(stager: Stager, handle: ArenaHandle | None, *jobs: LoadJob | SaveJob) -> None:
    loads = [job for job in jobs if isinstance(job, LoadJob)]
    saves = [job for job in jobs if isinstance(job, SaveJob)]
    planned = StepJobs(arena=handle, layout=LAYOUT, loads=loads, saves=saves)
    stager.submit_loads(planned)
    stager.submit_saves(planned)


def results(stager: Stager, jobs: int) -> StagerResults:
    """Wait until so many loads and saves are through."""
    end = time.monotonic() + DEADLINE_S
    total = stager.take_results()
    while len(total.loaded) + len(total.report.saved) < jobs:
        assert time.monotonic() < end, "the stager does not report all jobs"
        more = stager.take_results()
        total.loaded.update(more.loaded)
        total.failed_loads.update(more.failed_loads)
        total.report.merge(more.report)
    return total


def until_reported(stager: Stager, request_id: str, seconds: float) -> None:
    """Wait until a load was good; raise TimeoutError if that takes longer."""
    end = time.monotonic() + seconds
    while request_id not in (found := stager.take_results()).loaded:
        if time.monotonic() > end:
            raise TimeoutError
    assert not found.failed_loads


class Peers:
    """Notes that it was asked to read, and reads nothing."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()

    def submit(self, read: PeerRead, on_done: object) -> None:
        self.is_asked.set()

    def close(self) -> None:
        pass


PEER_READ = PeerRead(
    source=PeerSource("127.0.0.1", 1, "e", "r", 8),
    reader="b",
    num_tokens=8,
    fingerprint=b"",
    content=b"",
    first_page=0,
    pages=(0,),
)


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_rank_whose_pages_make_other_blocks_copies_nothing(
    pages: Pages, servers: Callable[[int], Server]
) -> None:
    pages.open()
    stager = Stager(pages, LAYOUT, LAYOUT.shard(0, 1), page_encoding="of another order")
    step(stager, servers(1).handle(), LoadJob("a", COPY), SaveJob(1, "a", COPY))
    found = results(stager, 2)
    assert (found.failed_loads, found.report.failed_saves) == ({"a"}, {1})
    assert "makes 'of another order' blocks of its pages, the scheduler's are 'plain'" in found.report.problem
    assert not pages.batches
    stager.close()


def test_a_load_that_was_queued_before_the_arena_changed_reads_the_old_one(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    old, new = servers(1), servers(2)
    step(stager, old.handle(), LoadJob("a", COPY))
    step(stager, new.handle())
    pages.open()
    assert results(stager, 1).failed_loads == set()
    assert pages.page[0] == 1, "the same slot and generation of the new arena hold another block"


def test_a_save_that_was_queued_before_the_arena_changed_does_not_write_into_the_new_one(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    old, new = servers(1), servers(2)
    pages.page[:] = 9
    step(stager, old.handle(), SaveJob(1, "a", COPY))
    step(stager, new.handle())
    pages.open()
    results(stager, 1)
    assert (new.arena.slots_array == 2).all()
    assert (old.arena.slots_array[0] == 9).all()


def test_what_is_planned_for_the_new_arena_goes_there(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    old, new = servers(1), servers(2)
    pages.open()
    step(stager, old.handle(), LoadJob("a", COPY))
    step(stager, new.handle(), LoadJob("b", COPY))
    assert results(stager, 2).failed_loads == set()
    assert pages.page[0] == 2


def test_the_old_lifeline_is_held_until_the_old_copies_are_through(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    old, new = servers(1), servers(2)
    step(stager, old.handle(), SaveJob(1, "a", COPY))
    old.hang_up()
    step(stager, new.handle())
    assert old.has_writers(), "a copy into the old arena has not begun yet"
    pages.open()
    wait_until(lambda: not old.has_writers())
    assert new.has_writers()
    new.hang_up()


def test_a_new_connection_to_the_same_arena_is_held_in_place_of_the_old_one(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    server = servers(1)
    pages.open()
    step(stager, server.handle())
    server.hang_up(0)
    step(stager, server.handle(), LoadJob("a", COPY))
    wait_until(lambda: not server.has_writers(0))
    assert results(stager, 1).failed_loads == set()
    server.hang_up(1)
    assert server.has_writers(1)


def test_without_an_arena_everything_fails_and_the_lifeline_is_let_go(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    server = servers(1)
    pages.open()
    step(stager, server.handle())
    server.hang_up()
    step(stager, None, LoadJob("a", COPY), SaveJob(1, "a", COPY))
    through = results(stager, 2)
    assert through.failed_loads == {"a"}
    assert through.report.failed_saves == {1}
    assert through.report.problem == "", "the rank works; there is nothing to map"
    wait_until(lambda: not server.has_writers())


def test_an_arena_that_cannot_be_mapped_fails_its_jobs_and_not_the_rank(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    gone, later = servers(1), servers(2)
    pages.open()
    step(stager, msgspec.structs.replace(gone.handle(), arena_id=bytes(16)), LoadJob("a", COPY))
    gone.hang_up()
    through = results(stager, 1)
    assert (through.failed_loads, through.report.problem) == ({"a"}, "")
    step(stager, later.handle(), LoadJob("b", COPY))
    assert results(stager, 1).failed_loads == set()
    later.hang_up()


def test_an_embedded_arena_that_cannot_be_mapped_switches_the_rank_off(stager: Stager, pages: Pages) -> None:
    pages.open()
    with_nothing = Arena.create(2, LAYOUT.slot_bytes)
    handle = msgspec.structs.replace(with_nothing.handle, arena_id=bytes(16))
    step(stager, handle, LoadJob("a", COPY))
    assert "cannot map the arena" in results(stager, 1).report.problem
    with_nothing.close()


# Two directions

OTHER_PAGE = (BlockCopy(1, GENERATION, 0, (1,)),)


def test_a_load_does_not_wait_for_saves_of_other_pages(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    server = servers(1)
    step(stager, server.handle(), SaveJob(1, "a", COPY))
    step(stager, server.handle(), LoadJob("b", OTHER_PAGE))
    pages.scatters.gate.set()
    found = results(stager, 1)
    assert (found.loaded, found.failed_loads, found.report.saved) == ({"b"}, set(), {})


def test_a_save_does_not_wait_for_loads(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    server = servers(1)
    step(stager, server.handle(), LoadJob("a", COPY))
    step(stager, server.handle(), SaveJob(1, "b", OTHER_PAGE))
    pages.gathers.gate.set()
    found = results(stager, 1)
    assert (found.loaded, found.report.saved, found.report.failed_saves) == (set(), {1: 1}, set())


def test_a_load_comes_behind_earlier_saves_of_its_pages(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    """They were given to another request while the save still reads them."""
    old = servers(1)
    pages.page[:] = 9
    step(stager, old.handle(), SaveJob(1, "a", COPY))
    pages.scatters.gate.set()
    step(stager, old.handle(), LoadJob("b", (BlockCopy(1, GENERATION, 0, (0,)),)))
    with pytest.raises(TimeoutError):
        until_reported(stager, "b", 0.05)
    pages.gathers.gate.set()
    until_reported(stager, "b", DEADLINE_S)
    assert (old.arena.slots_array[0] == 9).all()
    assert pages.page[0] == 1


def test_what_is_read_from_a_peer_comes_behind_earlier_saves_of_its_pages(
    pages: Pages, servers: Callable[[int], Server]
) -> None:
    peers = Peers()
    stager = Stager(pages, LAYOUT, LAYOUT.shard(0, 1), peers)  # type: ignore[arg-type]
    step(stager, servers(1).handle(), SaveJob(1, "a", COPY))
    step(stager, None, LoadJob("b", (), PEER_READ))
    assert not peers.is_asked.wait(0.05)
    pages.open()
    assert peers.is_asked.wait(DEADLINE_S)
    stager.close()


def test_a_load_goes_on_when_a_save_of_its_pages_does_not_end(
    stager: Stager, pages: Pages, servers: Callable[[int], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the engine does: the save is not committed, whatever it has read."""
    monkeypatch.setattr(stager_module, "_FENCE_DEADLINE_S", 0.05)
    server = servers(1)
    pages.scatters.gate.set()
    step(stager, server.handle(), SaveJob(1, "a", COPY))
    step(stager, server.handle(), LoadJob("b", COPY))
    assert results(stager, 1).loaded == {"b"}
    pages.gathers.gate.set()
    assert results(stager, 1).report.failed_saves == {1}


@pytest.mark.parametrize("is_load_last", [True, False])
def test_an_arena_is_let_go_of_when_both_directions_are_through(
    stager: Stager, pages: Pages, servers: Callable[[int], Server], is_load_last: bool
) -> None:
    old, new = servers(1), servers(2)
    step(stager, old.handle(), LoadJob("a", COPY), SaveJob(1, "b", OTHER_PAGE))
    step(stager, new.handle())
    first, last = (pages.gathers, pages.scatters) if is_load_last else (pages.scatters, pages.gathers)
    first.gate.set()
    results(stager, 1)
    assert pages.detached == []
    last.gate.set()
    wait_until(lambda: pages.detached != [])
    assert pages.detached == [1]


def test_a_release_comes_behind_its_saves_and_no_load_holds_it_up(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    server = servers(1)
    step(stager, server.handle(), LoadJob("a", COPY), SaveJob(1, "b", OTHER_PAGE))
    stager.submit_saves(StepJobs(arena=server.arena.handle, layout=LAYOUT, releases=["b"]))
    assert stager.take_results().released == set()
    pages.gathers.gate.set()
    end = time.monotonic() + DEADLINE_S
    while not (found := stager.take_results()).released:
        assert time.monotonic() < end
    assert found.released == {"b"}


# Batches


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "MOST_BLOCKS", 2)


MANY = COPY * 5


def test_many_blocks_are_copied_in_bounded_batches(
    small_batches: None, stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    pages.open()
    step(stager, servers(1).handle(), LoadJob("a", MANY))
    assert results(stager, 1).failed_loads == set()
    assert pages.batches == [2, 2, 1]


def test_a_slot_that_changes_hands_between_two_batches_ends_the_load(
    small_batches: None, stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    server = servers(1)
    pages.open()
    pages.on_copy = lambda: server.arena.set_generation(0, GENERATION + 1)
    step(stager, server.handle(), LoadJob("a", MANY))
    assert results(stager, 1).failed_loads == {"a"}
    assert pages.batches == [2]


def test_a_slot_that_changes_hands_under_the_last_batch_fails_the_load(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    server = servers(1)
    pages.open()
    pages.on_copy = lambda: server.arena.set_generation(0, GENERATION + 1)
    step(stager, server.handle(), LoadJob("a", COPY))
    assert results(stager, 1).failed_loads == {"a"}


def test_a_save_that_was_given_up_stops_after_the_batch(
    small_batches: None,
    stager: Stager,
    pages: Pages,
    servers: Callable[[int], Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stager_module, "_FENCE_DEADLINE_S", 0.0)
    pages.open()
    pages.on_copy = lambda: stager.fence([7])
    step(stager, servers(1).handle(), SaveJob(7, "a", MANY))
    assert results(stager, 1).report.failed_saves == {7}
    assert pages.batches == [2]


def test_a_rank_that_is_switched_off_stops_after_the_batch(
    small_batches: None, stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    pages.open()
    pages.on_copy = lambda: stager.disable("switched off")
    step(stager, servers(1).handle(), LoadJob("a", MANY))
    assert results(stager, 1).failed_loads == {"a"}
    assert pages.batches == [2]


def test_a_job_is_not_reported_while_its_copies_are_under_way(
    small_batches: None, stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    """Also where a later batch fails: its pages are given to others as soon as the job is reported."""
    pages.open()

    def fail_at_the_second() -> None:
        if len(pages.batches) == 2:
            raise RuntimeError("no more")

    pages.on_copy = fail_at_the_second
    step(stager, servers(1).handle(), LoadJob("a", MANY))
    through = results(stager, 1)
    assert through.failed_loads == {"a"}
    assert "no more" in through.report.problem
    assert pages.under_way == 0


@pytest.mark.parametrize(
    "copy",
    [
        BlockCopy(0, GENERATION, 1, (0,)),
        BlockCopy(0, GENERATION, -1, (0,)),
        BlockCopy(0, GENERATION, 0, (0, 1)),
        BlockCopy(0, GENERATION, 0, (-1,)),
    ],
)
def test_pages_that_do_not_exist_are_not_left_out_in_silence(
    stager: Stager, pages: Pages, servers: Callable[[int], Server], copy: BlockCopy
) -> None:
    pages.open()
    step(stager, servers(1).handle(), LoadJob("a", (copy,)))
    assert results(stager, 1).failed_loads == {"a"}
    assert pages.batches == []


def test_staging_lets_go_of_an_arena_before_it_is_unmapped(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    old, new = servers(1), servers(2)
    pages.open()
    step(stager, old.handle(), LoadJob("a", COPY))
    step(stager, new.handle(), LoadJob("b", COPY))
    results(stager, 2)
    wait_until(lambda: pages.detached != [])
    assert pages.detached == [1]
    stager.close()
    assert pages.is_closed


def test_first_pages_and_short_tails_become_rows_with_gaps() -> None:
    copies = [BlockCopy(4, 1, 0, (7, 8, 9)), BlockCopy(2, 1, 2, (5,)), BlockCopy(0, 1, 0, (3,))]
    (batch,) = jobs_module.copy_batches(copies, 3)
    assert batch.page_ids.tolist() == [[7, 8, 9], [-1, -1, 5], [3, -1, -1]]
    assert batch.slots.tolist() == [4, 2, 0]
    assert (batch.page_ids.dtype, batch.slots.dtype) == (np.int32, np.int64)
