"""Sessions over a cache server: arenas that change within a step, and answers that are not there yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from played_engine import FINGERPRINT, LAYOUT, PAGE_TOKENS
from scripted_server import Clock

from kvferry.connector.arena import ArenaHandle
from kvferry.connector.config import Config
from kvferry.connector.keys import BlockKey
from kvferry.connector.service import Coming, Lease, Match, MissReason, Place, Reservation, ServiceEvent
from kvferry.engines.jobs import WorkerReport
from kvferry.engines.request import RequestInfo
from kvferry.engines.session import EngineSessions

BLOCK = LAYOUT.block_tokens
TOKENS = list(range(4 * BLOCK))
PAGES = list(range(len(TOKENS) // PAGE_TOKENS))


def handle(connection: int) -> ArenaHandle:
    return ArenaHandle(
        pid=1,
        fd=3,
        arena_id=bytes(16),
        slot_bytes=4096,
        num_slots=8,
        header_bytes=4096,
        total_bytes=1 << 16,
        lifeline_fd=4,
        connection=connection,
    )


class Service:
    """Answers as a test says; everything is ready, and every answer about slots is the next of ``answers``."""

    layout = LAYOUT
    description = "a test's"

    def __init__(self) -> None:
        self.arena: ArenaHandle | None = handle(1)
        self.answers: list[bool] = []
        self.is_down = False
        self.reserved: list[list[BlockKey]] = []
        self.committed: list[int] = []

    def lookup(self, keys: Sequence[BlockKey]) -> Match:
        if self.is_down:
            return Match(0, 0, (), MissReason.NOT_ASKED)
        return Match(len(keys), len(keys), ("host",) * len(keys), MissReason.NONE)

    def prefetch(self, owner: str, keys: Sequence[BlockKey], block_s: float | None = None) -> Coming:
        return Coming(0, MissReason.TIER_DOWN)

    def lease(self, owner: str, keys: Sequence[BlockKey]) -> Lease:
        return Lease(1, tuple(Place(key, slot, 1) for slot, key in enumerate(keys)))

    def reserve(self, owner: str, keys: Sequence[BlockKey], wait_s: float = 0.0) -> Reservation | None:
        self.reserved.append(list(keys))
        if self.answers and not self.answers.pop(0):
            return None
        return Reservation(len(self.reserved), tuple(Place(key, slot, 1) for slot, key in enumerate(keys)))

    def commit(self, reservation: Reservation, keys: Sequence[BlockKey]) -> None:
        self.committed.append(len(keys))

    def release(self, lease: Lease) -> None: ...
    def abort(self, reservation: Reservation) -> None: ...
    def report_load_failed(self, keys: Sequence[BlockKey]) -> None: ...
    def release_owner(self, owner: str) -> None: ...
    def poll(self) -> None: ...
    def has_pending(self) -> bool:
        return False

    def take_events(self) -> Sequence[ServiceEvent]:
        return ()

    def report(self, counts: object) -> None: ...
    def clear(self) -> None: ...
    def close(self, deadline_s: float) -> None: ...


def sessions(service: Service, on_record: Callable[[object], None] = lambda record: None) -> EngineSessions:
    made = EngineSessions(service, Config(), FINGERPRINT, PAGE_TOKENS, 1, on_record, Clock())
    made.open(RequestInfo(id="r", prompt_tokens=len(TOKENS)))
    return made


def test_a_load_planned_for_an_arena_that_changed_meanwhile_fails() -> None:
    service = Service()
    engine = sessions(service)
    offered = engine.offer("r", TOKENS, 0)
    assert offered
    engine.accept("r", PAGES, 0, offered)
    service.arena = handle(2)
    jobs = engine.take_jobs()
    assert jobs.arena == service.arena
    assert [load.copies for load in jobs.loads] == [()], "it is reported, and touches nothing"


def test_a_save_planned_for_an_arena_that_went_meanwhile_fails() -> None:
    service = Service()
    engine = sessions(service)
    engine.computed("r", TOKENS, len(TOKENS), PAGES)
    service.arena = None
    jobs = engine.take_jobs()
    assert [save.copies for save in jobs.saves] == [()]
    engine.report(WorkerReport(saved={jobs.saves[0].id: 1}, failed_saves={jobs.saves[0].id}))
    assert not engine.has_pending()


def test_copies_for_the_arena_that_is_there_stay_when_another_went_before() -> None:
    service = Service()
    engine = sessions(service)
    engine.computed("r", TOKENS, BLOCK, PAGES)
    service.arena = handle(2)
    engine.computed("r", TOKENS, 2 * BLOCK, PAGES)
    assert [bool(save.copies) for save in engine.take_jobs().saves] == [False, True]


def test_slots_that_are_not_known_yet_are_asked_for_again_and_cost_no_block() -> None:
    service = Service()
    engine = sessions(service)
    service.answers = [False, False, True, True]
    engine.computed("r", TOKENS, BLOCK, PAGES)
    engine.computed("r", TOKENS, 2 * BLOCK, PAGES)
    assert engine.take_jobs().saves == []
    engine.computed("r", TOKENS, 4 * BLOCK, PAGES)
    first, second = engine.take_jobs().saves
    assert service.reserved[0] == service.reserved[1] == service.reserved[2], "the same question"
    assert [copy.pages for copy in first.copies + second.copies] == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ]


def test_a_request_that_lost_its_pages_asks_anew() -> None:
    service = Service()
    engine = sessions(service)
    service.answers = [False]
    engine.computed("r", TOKENS, 2 * BLOCK, PAGES)
    service.is_down = True
    engine.offer("r", TOKENS, 0)
    engine.computed("r", TOKENS, BLOCK, [20, 21])
    (save,) = engine.take_jobs().saves
    assert [copy.pages for copy in save.copies] == [(20, 21)]


def test_a_server_that_goes_down_while_it_is_asked_is_the_reason() -> None:
    service = Service()
    records: list[object] = []
    engine = sessions(service, records.append)
    service.is_down = True
    assert engine.offer("r", TOKENS, 0) == 0
    engine.finish("r")
    assert records[0].missing_reason == "tier_down"
