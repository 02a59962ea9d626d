"""The table of leases against an engine that gives freed pages to others at once: whatever readers do, a check that
says yes means that nobody else had the pages; every lease ends; what is held is counted right."""

from __future__ import annotations

from dataclasses import dataclass, field

from handoff_kit import content
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.engines.handoff.table import LONGEST_LEASES, Claimed, Handed, HandoffTable

LEASE_S = 8.0
NUM_PAGES = 6
IDS = st.sampled_from(["a", "b"])
READERS = st.sampled_from(["one", "two"])
MOMENTS = st.sampled_from([0.0, 0.1, 1.0, 3.0, 7.0, 8.0, 20.0])


@dataclass
class Model:
    """A lease as the rules say it should be."""

    request_id: str
    seq: int
    pages: tuple[int, ...]
    began: float
    ends_at: float
    readers: dict[str, float] = field(default_factory=dict)
    is_released: bool = False

    def lives(self, now: float) -> bool:
        return not self.is_released and now < self.ends_at

    def renew(self, reader: str, now: float) -> None:
        self.readers[reader] = min(now + LEASE_S, self.began + LONGEST_LEASES * LEASE_S)
        self.ends_at = max(self.ends_at, self.readers[reader])


class HandoffMachine(RuleBasedStateMachine):
    """An engine with few pages."""

    def __init__(self) -> None:
        super().__init__()
        self.table = HandoffTable(LEASE_S, first_seq=5)
        self.now = 0.0
        self.free = list(range(NUM_PAGES))
        self.owner: dict[int, int] = {}
        """Page -> the last lease that it was handed over under, or was until it was freed."""
        self.held: dict[str, Model] = {}
        self.seqs: list[tuple[str, int, tuple[int, ...]]] = []
        self.expired = 0

    @rule(seconds=MOMENTS)
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.free)
    @rule(request_id=IDS, count=st.integers(1, 4))
    def hand_over(self, request_id: str, count: int) -> None:
        if request_id in self.held:
            return
        pages, self.free = tuple(self.free[:count]), self.free[count:]
        handed = Handed(request_id, pages, len(pages) * 16, lambda tokens: content(tokens, request_id))
        seq = self.table.hand_over(handed, self.now)
        assert seq not in [other for _, other, _ in self.seqs]
        self.seqs.append((request_id, seq, pages))
        self.owner.update(dict.fromkeys(pages, seq))
        self.held[request_id] = Model(request_id, seq, pages, self.now, self.now + LEASE_S)

    @rule(request_id=IDS, reader=READERS, num_tokens=st.sampled_from([1, 16, 33, 64]), is_same=st.booleans())
    def claim(self, request_id: str, reader: str, num_tokens: int, is_same: bool) -> None:
        digest = content(num_tokens, request_id if is_same else "another prompt")
        answer = self.table.claim(request_id, reader, num_tokens, digest, self.now)
        lease = self.held.get(request_id)
        if lease is None or not lease.lives(self.now):
            assert answer in ("gone", "expired")
        elif not is_same or num_tokens > len(lease.pages) * 16:
            assert answer == "content"
        else:
            assert answer == Claimed(lease.seq, len(lease.pages) * 16, lease.pages)
            lease.renew(reader, self.now)

    @rule(request_id=IDS, reader=READERS)
    def renew(self, request_id: str, reader: str) -> None:
        lease = self.held.get(request_id)
        is_alive = lease is not None and lease.lives(self.now)
        assert self.table.renew(request_id, reader, self.now) == is_alive
        if lease is not None and is_alive:
            lease.renew(reader, self.now)

    @rule(request_id=IDS, reader=READERS)
    def release(self, request_id: str, reader: str) -> None:
        self.table.release(request_id, reader, self.now)
        lease = self.held.get(request_id)
        if lease is not None and not lease.is_released:
            lease.readers.pop(reader, None)
            lease.is_released = not any(self.now < until for until in lease.readers.values())

    @rule()
    def free_what_ended(self) -> None:
        """An engine's step."""
        ended = self.table.take_ended(self.now)
        assert sorted(ended) == sorted(name for name, lease in self.held.items() if not lease.lives(self.now))
        for request_id in ended:
            lease = self.held.pop(request_id)
            self.expired += not lease.is_released
            self.free += lease.pages
            for page in lease.pages:
                del self.owner[page]

    @invariant()
    def a_check_that_says_yes_is_right(self) -> None:
        for request_id, seq, pages in self.seqs:
            if self.table.check(request_id, seq, self.now):
                assert all(self.owner.get(page) == seq for page in pages)
                assert self.held[request_id].lives(self.now)

    @invariant()
    def a_lease_that_lives_is_confirmed(self) -> None:
        for lease in self.held.values():
            assert self.table.check(lease.request_id, lease.seq, self.now) == lease.lives(self.now)

    @invariant()
    def what_is_held_is_counted(self) -> None:
        assert len(self.table) == len(self.held)
        assert self.table.held_pages == sum(len(lease.pages) for lease in self.held.values())
        assert self.table.held_pages + len(self.free) == NUM_PAGES
        assert self.table.expired_count == self.expired

    def teardown(self) -> None:
        """Every lease ends, however eagerly it is renewed."""
        until = self.now + LONGEST_LEASES * LEASE_S
        while self.now < until:
            for request_id in self.held:
                self.table.renew(request_id, "eager", self.now)
            self.now += LEASE_S / 2
        self.table.take_ended(self.now)
        assert len(self.table) == self.table.held_pages == 0


TestHandoffMachine = HandoffMachine.TestCase
TestHandoffMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
