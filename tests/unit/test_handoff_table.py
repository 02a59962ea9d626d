"""Leases: who may read which pages, until when, and when they may be freed."""

from __future__ import annotations

import sys
import threading

import pytest
from handoff_kit import content, handed

from kvferry.connector.errors import LeaseError, UsageError
from kvferry.engines.handoff.table import LONGEST_LEASES, Claimed, HandoffTable

LEASE_S = 10.0


@pytest.fixture
def table() -> HandoffTable:
    return HandoffTable(LEASE_S)


def test_what_is_handed_over_can_be_claimed_and_checked(table: HandoffTable) -> None:
    seq = table.hand_over(handed(), 0.0)
    assert table.claim("r", "d", 33, content(33), 1.0) == Claimed(seq, 40, (7, 8, 9))
    assert table.check("r", seq, 2.0)
    assert table.take_ended(2.0) == []
    assert (len(table), table.held_pages) == (1, 3)


def test_numbers_are_never_used_twice_and_mean_nothing_to_another_table(table: HandoffTable) -> None:
    first, second = table.hand_over(handed("a"), 0.0), table.hand_over(handed("b"), 0.0)
    assert second == first + 1
    assert not table.check("a", second, 0.0)
    assert abs(HandoffTable(LEASE_S).hand_over(handed("a"), 0.0) - first) > 1000


def test_a_request_that_was_handed_over_again_is_another_lease(table: HandoffTable) -> None:
    seq = table.hand_over(handed(), 0.0)
    with pytest.raises(UsageError, match="already"):
        table.hand_over(handed(), 0.0)
    table.release("r", "d", 1.0)
    with pytest.raises(UsageError, match="already"):
        table.hand_over(handed(), 1.0)
    assert table.take_ended(1.0) == ["r"]
    again = table.hand_over(handed(), 1.0)
    assert table.check("r", again, 1.0)
    assert not table.check("r", seq, 1.0)


@pytest.mark.parametrize(
    ("num_tokens", "digest"), [(33, content(32)), (41, content(41)), (0, content(0)), (-1, content(-1))]
)
def test_who_asks_for_something_else_than_is_held_is_refused(
    table: HandoffTable, num_tokens: int, digest: bytes
) -> None:
    table.hand_over(handed(), 0.0)
    assert table.claim("r", "d", num_tokens, digest, 0.0) == "content"
    table.release("r", "other", 0.0)
    assert table.take_ended(0.0) == ["r"], "who was refused is no reader"


def test_without_renewal_a_lease_ends(table: HandoffTable) -> None:
    seq = table.hand_over(handed(), 0.0)
    assert table.check("r", seq, 9.9)
    assert not table.check("r", seq, 10.0)
    assert not table.renew("r", "d", 10.0)
    assert table.claim("r", "d", 40, content(40), 10.0) == "expired"
    assert table.held_pages == 3, "until the engine is told"
    assert table.take_ended(10.0) == ["r"]
    assert (len(table), table.held_pages, table.expired_count) == (0, 0, 1)
    assert table.claim("r", "d", 40, content(40), 11.0) == "expired"
    assert table.claim("x", "d", 40, content(40), 11.0) == "gone"


def test_claims_and_renewals_prolong_a_lease_but_not_for_ever(table: HandoffTable) -> None:
    seq = table.hand_over(handed(), 0.0)
    assert isinstance(table.claim("r", "d", 40, content(40), 8.0), Claimed)
    assert table.check("r", seq, 17.9)
    now = 8.0
    while now < LONGEST_LEASES * LEASE_S - 4.0:
        assert table.renew("r", "d", now)
        assert table.take_ended(now) == []
        now += 4.0
    table.renew("r", "d", LONGEST_LEASES * LEASE_S - 0.1)
    assert not table.check("r", seq, LONGEST_LEASES * LEASE_S)
    assert table.take_ended(LONGEST_LEASES * LEASE_S) == ["r"]


def test_a_lease_ends_with_its_last_reader(table: HandoffTable) -> None:
    seq = table.hand_over(handed(), 0.0)
    table.claim("r", "one", 40, content(40), 1.0)
    table.renew("r", "two", 2.0)
    table.release("r", "one", 3.0)
    assert table.check("r", seq, 3.0)
    assert table.take_ended(3.0) == []
    table.release("r", "two", 4.0)
    assert not table.check("r", seq, 4.0)
    assert (len(table), table.held_pages) == (1, 3)
    assert table.take_ended(4.0) == ["r"]
    assert table.take_ended(4.0) == []
    assert (len(table), table.held_pages, table.expired_count) == (0, 0, 0)


def test_a_reader_that_has_fallen_silent_does_not_keep_a_lease(table: HandoffTable) -> None:
    table.hand_over(handed(), 0.0)
    table.renew("r", "silent", 1.0)
    table.renew("r", "two", 8.0)
    table.release("r", "two", 11.5)
    assert table.take_ended(11.5) == ["r"]


def test_who_never_asked_may_still_say_that_it_never_will(table: HandoffTable) -> None:
    table.hand_over(handed(), 0.0)
    table.release("r", "aborted before it came", 1.0)
    assert table.take_ended(1.0) == ["r"]
    table.release("r", "late", 2.0)
    table.release("unknown", "late", 2.0)
    assert table.take_ended(2.0) == []


def test_readers_of_one_request_are_bounded(table: HandoffTable) -> None:
    table.hand_over(handed(), 0.0)
    assert all(table.renew("r", f"{number}", 0.0) for number in range(64))
    assert not table.renew("r", "one more", 1.0)
    assert table.claim("r", "one more", 40, content(40), 1.0) == "refused"
    assert table.renew("r", "5", 5.0)
    assert table.renew("r", "one more", 11.0), "silent ones make room"


def test_digests_are_kept_for_as_long_as_the_lease(table: HandoffTable) -> None:
    seq = table.hand_over(handed(), 0.0)
    assert table.digests(seq, 0, 0, 3) is None
    table.set_digests(seq, 0, b"aabbcc")
    table.set_digests(seq, 1, b"")
    assert table.digests(seq, 0, 0, 3) == b"aabbcc"
    assert table.digests(seq, 0, 1, 2) == b"bbcc"
    assert table.digests(seq, 1, 1, 2) == b""
    assert table.digests(seq, 2, 0, 1) is None
    with pytest.raises(LeaseError, match="3 pages"):
        table.digests(seq, 0, 2, 2)
    table.release("r", "d", 1.0)
    table.set_digests(seq, 0, b"aabbcc")
    with pytest.raises(LeaseError, match="over"):
        table.digests(seq, 0, 0, 3)


def test_a_check_that_said_yes_means_that_the_pages_were_not_freed(table: HandoffTable) -> None:
    """Readers check while the engine frees: whoever freed first must be seen."""
    freed: set[int] = set()
    seqs = {number: table.hand_over(handed(str(number)), 0.0) for number in range(300)}
    wrong: list[int] = []
    started = threading.Barrier(3)

    def free() -> None:
        started.wait()
        for number in seqs:
            table.release(str(number), "d", 1.0)
            for request_id in table.take_ended(1.0):
                freed.add(int(request_id))

    def check() -> None:
        started.wait()
        for number, seq in seqs.items():
            while True:
                was_freed = number in freed
                if not table.check(str(number), seq, 1.0):
                    break
                if was_freed:
                    wrong.append(number)

    threads = [threading.Thread(target=work) for work in (free, check, check)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10.0)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert len(freed) == 300
