"""The stager and arenas that change: a copy touches the arena it was planned for, and no other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import pytest

from kvferry.connector.arena import Arena, ArenaHandle
from kvferry.connector.layout import BlockLayout
from kvferry.engines.jobs import BlockCopy, LoadJob, SaveJob, StepJobs
from kvferry.engines.stager import Bytes, Stager, StagerResults

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=8, head_dim=16, itemsize=2)
DEADLINE_S = 10.0
GENERATION = 5


class Pages:
    """Copies whole slots to and from one page, and only while the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.page = np.zeros(LAYOUT.slot_bytes, np.uint8)

    def mark(self) -> object:
        return None

    def wait(self, mark: object) -> None:
        assert self.gate.wait(DEADLINE_S)

    def gather(self, page_ids: Sequence[int], slot: Bytes) -> None:
        slot[:] = self.page

    def scatter(self, slot: Bytes, page_ids: Sequence[int], first_page: int = 0) -> None:
        self.page[:] = slot

    def finish(self) -> None:
        pass


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
    pages.gate.set()
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


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_load_that_was_queued_before_the_arena_changed_reads_the_old_one(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    old, new = servers(1), servers(2)
    step(stager, old.handle(), LoadJob("a", COPY))
    step(stager, new.handle())
    pages.gate.set()
    assert results(stager, 1).failed_loads == set()
    assert pages.page[0] == 1, "the same slot and generation of the new arena hold another block"


def test_a_save_that_was_queued_before_the_arena_changed_does_not_write_into_the_new_one(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    old, new = servers(1), servers(2)
    pages.page[:] = 9
    step(stager, old.handle(), SaveJob(1, "a", COPY))
    step(stager, new.handle())
    pages.gate.set()
    results(stager, 1)
    assert (new.arena.slots_array == 2).all()
    assert (old.arena.slots_array[0] == 9).all()


def test_what_is_planned_for_the_new_arena_goes_there(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    old, new = servers(1), servers(2)
    pages.gate.set()
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
    pages.gate.set()
    wait_until(lambda: not old.has_writers())
    assert new.has_writers()
    new.hang_up()


def test_a_new_connection_to_the_same_arena_is_held_in_place_of_the_old_one(
    stager: Stager, pages: Pages, servers: Callable[[int], Server]
) -> None:
    server = servers(1)
    pages.gate.set()
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
    pages.gate.set()
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
    pages.gate.set()
    step(stager, msgspec.structs.replace(gone.handle(), arena_id=bytes(16)), LoadJob("a", COPY))
    gone.hang_up()
    through = results(stager, 1)
    assert (through.failed_loads, through.report.problem) == ({"a"}, "")
    step(stager, later.handle(), LoadJob("b", COPY))
    assert results(stager, 1).failed_loads == set()
    later.hang_up()


def test_an_embedded_arena_that_cannot_be_mapped_switches_the_rank_off(stager: Stager, pages: Pages) -> None:
    pages.gate.set()
    with_nothing = Arena.create(2, LAYOUT.slot_bytes)
    handle = msgspec.structs.replace(with_nothing.handle, arena_id=bytes(16))
    step(stager, handle, LoadJob("a", COPY))
    assert "cannot map the arena" in results(stager, 1).report.problem
    with_nothing.close()
