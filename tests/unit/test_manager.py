from __future__ import annotations

from collections.abc import Callable

import pytest
from manager_kit import (
    DISK,
    OPTIONS,
    S3,
    A,
    B,
    assert_nothing_leaks,
    finish,
    late,
    make,
    on_disk,
    prefetch,
    save,
)

from kvferry.connector.errors import LeaseError, UsageError
from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import BlockManager
from kvferry.connector.plan import Direction, TransferResult
from kvferry.connector.policy import LRU
from kvferry.connector.service import HOST, MissReason, ServiceEvent
from kvferry.connector.tier import Outcome

# Lookup


def test_an_empty_cache_never_stored_anything() -> None:
    assert make().lookup(A[:3], 0.0) == (0, 0, (), MissReason.NEVER_STORED)
    assert make().lookup([], 0.0) == (0, 0, (), MissReason.NONE)


def test_lookup_tells_the_prefix_that_is_ready() -> None:
    manager = make()
    save(manager, A[:3])
    assert manager.lookup(A[:5], 0.0) == (3, 3, (HOST,) * 3, MissReason.NEVER_STORED)
    assert manager.lookup(A[:2], 0.0) == (2, 2, (HOST,) * 2, MissReason.NONE)


def test_a_hole_ends_the_prefix() -> None:
    manager = make()
    save(manager, [A[0], A[2]])
    assert manager.lookup(A[:3], 0.0).reachable == 1


def test_lookup_tells_the_first_tier_that_holds_each_block() -> None:
    manager = make(8, (DISK, S3))
    manager.on_tier_scanned(DISK, [A[1]], is_complete=True)
    manager.on_tier_scanned(S3, [A[1], A[2]], is_complete=True)
    save(manager, [A[0], A[3]])
    assert manager.lookup(A[:5], 0.0) == (1, 4, (HOST, DISK, S3, HOST), MissReason.NEVER_STORED)


def test_lookups_are_counted_by_what_they_asked_for_and_where_it_was_found() -> None:
    manager = make(8, (DISK,))
    manager.on_tier_scanned(DISK, [A[2]], is_complete=True)
    save(manager, A[:2])
    manager.lookup(A[:2], 0.0)
    manager.lookup(A[:5], 0.0)
    manager.lookup(B[:3], 0.0)
    counters = manager.counters
    assert (counters.saved, counters.lookup_blocks) == (2, 10)
    assert counters.found == {HOST: 4, DISK: 1}
    assert counters.misses == {"never_stored": 2}


def test_what_is_reserved_is_invisible() -> None:
    manager = make()
    manager.reserve("writer", A[:2], 0.0)
    assert manager.lookup(A[:2], 0.0).reachable == 0


# Reservations


def test_commit_shows_only_what_it_names_and_frees_the_rest() -> None:
    manager = make(4)
    reservation = manager.reserve("writer", A[:4], 0.0)
    manager.commit(reservation.id, A[:2], 0.0)
    assert manager.lookup(A[:4], 0.0).ready == 2
    assert manager.occupancy.slots.free == 2
    assert_nothing_leaks(manager)


def test_what_is_held_or_reserved_is_not_reserved_again() -> None:
    manager = make()
    save(manager, A[:1])
    manager.reserve("one", A[:2], 0.0)
    assert [place.key for place in manager.reserve("two", A[:3], 0.0).places] == [A[2]]


def test_a_block_that_only_a_lower_tier_holds_can_be_saved_again() -> None:
    """The engine has it at hand, so it comes back into the arena without a load, and is not stored twice."""
    manager = on_disk(blocks=1)
    assert save(manager, A[:1]) == []
    assert manager.lookup(A[:1], 0.0).ready == 1


def test_a_reservation_is_short_when_there_is_no_room() -> None:
    manager = make(4)
    reservation = manager.reserve("writer", A[:6], 0.0)
    assert [place.key for place in reservation.places] == A[:4]
    assert manager.counters.no_room == 2
    assert manager.lookup([A[4]], 0.0).missing is MissReason.NO_ROOM


def test_an_empty_reservation_needs_no_settlement() -> None:
    manager = make(4)
    save(manager, A[:2])
    empty = manager.reserve("writer", A[:2], 0.0)
    assert empty.places == ()
    assert manager.commit(empty.id, [], 0.0) == []
    manager.abort(empty.id)
    assert_nothing_leaks(manager)


def test_a_foreign_key_is_refused_and_nothing_is_lost() -> None:
    manager = make()
    reservation = manager.reserve("writer", A[:2], 0.0)
    with pytest.raises(LeaseError, match="block 64646464 is not part of reservation 1"):
        manager.commit(reservation.id, [A[0], B[0]], 0.0)
    manager.commit(reservation.id, A[:2], 0.0)
    assert manager.lookup(A[:2], 0.0).ready == 2


def test_settling_twice_is_refused() -> None:
    manager = make()
    reservation = manager.reserve("writer", A[:1], 0.0)
    manager.commit(reservation.id, A[:1], 0.0)
    with pytest.raises(LeaseError, match="already settled"):
        manager.commit(reservation.id, A[:1], 0.0)
    manager.abort(reservation.id)
    assert manager.lookup(A[:1], 0.0).ready == 1


def test_an_expired_reservation_keeps_its_slots_until_its_writer_settles() -> None:
    manager = make(4)
    slow = manager.reserve("slow", A[:4], 0.0)
    manager.expire(60.0)
    assert manager.occupancy.slots.quarantined == 4
    assert manager.reserve("other", A[:4], 60.0).places == ()
    assert manager.commit(slow.id, A[:4], 61.0) == []
    assert manager.lookup(A[:4], 61.0).reachable == 0
    assert len(manager.reserve("other", A[:4], 61.0).places) == 4
    assert manager.counters.void_commits == 1


def test_an_expired_reservation_can_be_aborted() -> None:
    manager = make(4)
    slow = manager.reserve("slow", A[:4], 0.0)
    manager.expire(60.0)
    manager.abort(slow.id)
    assert_nothing_leaks(manager)
    assert manager.occupancy.slots.free == 4


def test_a_dead_owner_leaves_nothing() -> None:
    manager = make(6)
    save(manager, A[:2])
    manager.lease("dead", A[:2], 0.0)
    prefetch(manager, "dead", A[:2], 0.0)
    manager.reserve("dead", A[2:4], 0.0)
    manager.expire(0.0)
    manager.reserve("dead", A[4:6], 50.0)
    manager.expire(60.0)
    manager.drop_owner_dead("dead")
    assert_nothing_leaks(manager)


def test_the_same_block_from_two_writers_is_kept_once() -> None:
    manager = make(4)
    slow = manager.reserve("slow", A[:1], 0.0)
    manager.expire(60.0)
    save(manager, A[:1], 60.0)
    manager.abort(slow.id)
    assert manager.occupancy.slots.committed == 1
    assert_nothing_leaks(manager)


# Leases


def test_a_lease_covers_the_ready_prefix() -> None:
    manager = make()
    save(manager, [A[0], A[1], A[3]])
    lease = manager.lease("reader", A[:4], 0.0)
    assert [place.key for place in lease.places] == A[:2]
    manager.release(lease.id)
    assert_nothing_leaks(manager)


def test_a_lease_on_nothing_is_empty_and_held_by_nobody() -> None:
    manager = make()
    lease = manager.lease("reader", A[:4], 0.0)
    assert (lease.id, lease.places) == (0, ())
    manager.release(lease.id)
    assert_nothing_leaks(manager)


def test_what_is_leased_is_not_evicted() -> None:
    manager = make(4)
    save(manager, A[:4])
    lease = manager.lease("reader", A[:3], 0.0)
    assert len(manager.reserve("writer", B[:4], 0.0).places) == 1
    assert manager.lookup(A[:4], 0.0).ready == 3
    manager.release(lease.id)
    assert len(manager.reserve("writer", B[1:4], 0.0).places) == 3


def test_a_lease_ends_when_its_time_is_over() -> None:
    manager = make(4)
    save(manager, A[:4])
    manager.lease("reader", A[:4], 0.0)
    manager.expire(59.9)
    assert manager.reserve("writer", B[:4], 59.9).places == ()
    manager.expire(60.0)
    places = manager.reserve("writer", B[:4], 60.0).places
    assert [place.generation for place in places] == [2] * 4
    assert manager.counters.expired_leases == 1


def test_releasing_an_owner_ends_all_its_leases_but_not_its_reservations() -> None:
    manager = make(6)
    save(manager, A[:2])
    manager.lease("r1", A[:2], 0.0)
    manager.lease("r1", A[:1], 0.0)
    other = manager.lease("r2", A[:1], 0.0)
    manager.reserve("r1", A[2:3], 0.0)
    manager.release_owner("r1")
    held = manager.occupancy
    assert (held.leases, held.reservations) == (1, 1)
    manager.release(other.id)


# Eviction


def test_the_end_of_a_prefix_goes_first() -> None:
    manager = make(4)
    save(manager, A[:4])
    save(manager, B[:2])
    assert manager.lookup(A[:4], 0.0) == (2, 2, (HOST,) * 2, MissReason.EVICTED)


def test_a_prefix_that_was_used_outlives_one_that_was_not() -> None:
    manager = make(6)
    save(manager, A[:3])
    save(manager, B[:3])
    manager.release(manager.lease("reader", A[:3], 0.0).id)
    save(manager, B[3:6])
    assert manager.lookup(A[:3], 0.0).ready == 3


def test_a_long_prompt_does_not_evict_its_own_beginning() -> None:
    manager = make(4)
    save(manager, A[:3])
    save(manager, A[:8])
    assert manager.lookup(A[:8], 0.0).ready == 4


class _Liar(LRU):
    """A policy that proposes what is in use, what it does not hold, and everything twice."""

    def victims(self, count: int, is_evictable: Callable[[BlockKey], bool]) -> list[BlockKey]:
        return [B[7], *self._order, *self._order]


def test_a_policy_that_proposes_nonsense_does_no_harm() -> None:
    manager = BlockManager(4, _Liar(), (), OPTIONS)
    save(manager, A[:4])
    lease = manager.lease("reader", A[:2], 0.0)
    assert len(manager.reserve("writer", B[:4], 0.0).places) == 2
    assert manager.lookup(A[:4], 0.0).ready == 2
    assert manager.counters.bad_victims == 3
    manager.release(lease.id)


# Stores


def test_a_commit_is_stored_in_every_tier_in_batches() -> None:
    manager = make(8, (DISK, S3))
    transfers = save(manager, A[:3])
    assert [(one.direction, one.tier, one.keys) for one in transfers] == [
        (Direction.STORE, DISK, tuple(A[:2])),
        (Direction.STORE, DISK, tuple(A[2:3])),
        (Direction.STORE, S3, tuple(A[:2])),
        (Direction.STORE, S3, tuple(A[2:3])),
    ]


def test_what_is_being_stored_is_not_evicted() -> None:
    manager = make(4, (DISK,))
    transfers = save(manager, A[:4])
    assert manager.reserve("writer", B[:4], 0.0).places == ()
    finish(manager, transfers)
    assert len(manager.reserve("writer", B[:4], 0.0).places) == 4
    assert manager.lookup(A[:4], 0.0) == (0, 4, (DISK,) * 4, MissReason.NONE)


def test_a_failed_store_is_no_place_to_load_from() -> None:
    manager = make(4, (DISK,))
    finish(manager, save(manager, A[:4]), Outcome.NO_ROOM)
    save(manager, B[:4])
    assert manager.lookup(A[:4], 0.0) == (0, 0, (), MissReason.EVICTED)


def test_stores_beyond_the_queue_are_shed_and_counted() -> None:
    manager = make(8, (DISK,), queue_blocks=3)
    transfers = save(manager, A[:5])
    assert sum(len(one.keys) for one in transfers) == 3
    assert manager.counters.shed[DISK] == 2
    finish(manager, transfers)
    assert len(save(manager, B[:1])) == 1


def test_a_tier_that_is_switched_off_gets_no_stores() -> None:
    manager = make(8, (DISK, S3))
    manager.set_tier_available(DISK, False)
    assert {one.tier for one in save(manager, A[:2])} == {S3}
    assert manager.counters.skipped[DISK] == 2


# Loads


def test_prefetch_loads_the_reachable_prefix_in_batches() -> None:
    manager = on_disk(blocks=3)
    coming, transfers = prefetch(manager, "r", A[:5], 0.0)
    assert coming == 3
    assert [(one.direction, one.tier, one.keys) for one in transfers] == [
        (Direction.LOAD, DISK, tuple(A[:2])),
        (Direction.LOAD, DISK, tuple(A[2:3])),
    ]
    assert manager.lookup(A[:3], 0.0).ready == 0
    finish(manager, transfers)
    assert manager.lookup(A[:3], 0.0).ready == 3


def test_a_block_is_loaded_once_for_all_who_want_it() -> None:
    manager = on_disk(slots=2, blocks=2)
    _, transfers = prefetch(manager, "one", A[:2], 0.0)
    assert prefetch(manager, "two", A[:2], 0.0) == (2, [])
    assert prefetch(manager, "one", A[:2], 0.0) == (2, [])
    finish(manager, transfers)
    manager.release_owner("one")
    assert manager.reserve("writer", B[:1], 0.0).places == ()
    manager.release_owner("two")
    assert len(manager.reserve("writer", B[:1], 0.0).places) == 1


def test_prefetched_blocks_stay_until_the_time_is_over() -> None:
    manager = on_disk(slots=2, blocks=2)
    finish(manager, prefetch(manager, "r", A[:2], 0.0).transfers)
    prefetch(manager, "r", A[:2], 30.0)
    manager.expire(60.0)
    assert manager.reserve("writer", B[:2], 60.0).places == ()
    manager.expire(90.0)
    assert len(manager.reserve("writer", B[:2], 90.0).places) == 2
    assert manager.counters.expired_holds == 1


def test_prefetch_is_cut_where_slots_run_out() -> None:
    manager = on_disk(slots=4, blocks=4)
    save(manager, B[:2])
    lease = manager.lease("other", B[:2], 0.0)
    coming, transfers = prefetch(manager, "r", A[:4], 0.0)
    assert coming == 2
    assert [key for one in transfers for key in one.keys] == A[:2]
    manager.release(lease.id)


def test_prefetch_does_not_evict_the_prefix_it_is_for() -> None:
    manager = on_disk(slots=4, blocks=1)
    finish(manager, save(manager, A[1:4]) + save(manager, B[:1]))
    coming, transfers = prefetch(manager, "r", A[:4], 0.0)
    assert (coming, [one.keys for one in transfers]) == (4, [(A[0],)])
    finish(manager, transfers)
    assert manager.lookup(A[:4], 0.0).ready == 4


def test_a_block_nobody_waits_for_any_more_still_arrives() -> None:
    manager = on_disk(blocks=1)
    transfers = prefetch(manager, "r", A[:1], 0.0).transfers
    manager.release_owner("r")
    finish(manager, transfers)
    assert manager.lookup(A[:1], 0.0).ready == 1
    assert_nothing_leaks(manager)


def test_hits_are_counted_by_the_tier_they_came_from() -> None:
    manager = on_disk(blocks=1)
    finish(manager, prefetch(manager, "r", A[:1], 0.0).transfers)
    manager.lease("r", A[:1], 0.0)
    manager.lease("other", A[:1], 0.0)
    assert manager.counters.hits == {DISK: 1, HOST: 1}


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.NO_ROOM])
def test_a_failed_load_is_a_miss_that_is_remembered_for_a_while(outcome: Outcome) -> None:
    manager = on_disk(blocks=1)
    finish(manager, prefetch(manager, "r", A[:1], 0.0).transfers, outcome, now=1.0)
    assert manager.lookup(A[:1], 30.9) == (0, 0, (), MissReason.LOAD_FAILED)
    assert prefetch(manager, "r", A[:1], 30.9) == (0, [])
    assert manager.lookup(A[:1], 31.0).reachable == 1
    manager.release_owner("r")
    assert_nothing_leaks(manager)


def test_a_block_that_a_tier_lost_is_forgotten() -> None:
    manager = on_disk(blocks=1)
    finish(manager, prefetch(manager, "r", A[:1], 0.0).transfers, Outcome.MISSING)
    assert manager.lookup(A[:1], 100.0) == (0, 0, (), MissReason.EVICTED)


def test_a_refused_block_is_forgotten_and_the_reason_kept() -> None:
    manager = on_disk(blocks=1)
    finish(manager, prefetch(manager, "r", A[:1], 0.0).transfers, Outcome.FAILED, refused=True)
    assert manager.lookup(A[:1], 100.0) == (0, 0, (), MissReason.REFUSED)


def test_a_block_that_one_tier_fails_to_deliver_comes_from_the_next() -> None:
    manager = on_disk(blocks=2, tiers=(DISK, S3))
    followers = finish(manager, prefetch(manager, "r", A[:2], 0.0).transfers, Outcome.FAILED)
    assert [(one.tier, one.keys) for one in followers] == [(S3, tuple(A[:2]))]
    assert manager.lookup(A[:2], 0.0).tiers == (S3, S3)
    assert finish(manager, followers) == []
    assert manager.lookup(A[:2], 0.0).ready == 2
    assert len(manager.lease("r", A[:2], 0.0).places) == 2
    assert manager.counters.hits == {S3: 2}


def test_a_late_load_counts_as_missed_and_its_slot_is_not_reused() -> None:
    manager = on_disk(slots=2, blocks=2)
    transfers = prefetch(manager, "r", A[:2], 0.0).transfers
    late(manager, transfers, now=5.0)
    assert manager.lookup(A[:2], 5.0) == (0, 0, (), MissReason.DEADLINE)
    assert manager.reserve("writer", B[:2], 5.0).places == ()
    finish(manager, transfers, Outcome.FAILED, now=6.0)
    assert len(manager.reserve("writer", B[:2], 6.0).places) == 2


def test_what_arrives_late_and_whole_is_used() -> None:
    manager = on_disk(slots=2, blocks=2)
    transfers = prefetch(manager, "r", A[:2], 0.0).transfers
    late(manager, transfers, now=5.0)
    finish(manager, transfers, now=6.0)
    assert manager.lookup(A[:2], 6.0).ready == 2
    manager.release_owner("r")
    assert_nothing_leaks(manager)


def test_a_block_recomputed_while_its_load_was_late_is_kept_once() -> None:
    manager = on_disk(slots=4, blocks=1)
    transfers = prefetch(manager, "r", A[:1], 0.0).transfers
    late(manager, transfers)
    save(manager, A[:1])
    finish(manager, transfers)
    manager.release_owner("r")
    assert manager.counters.duplicates == 1
    assert manager.occupancy.slots.committed == 1
    assert_nothing_leaks(manager)


def test_a_result_that_nobody_waits_for_is_refused() -> None:
    manager = on_disk(blocks=1)
    transfers = prefetch(manager, "r", A[:1], 0.0).transfers
    with pytest.raises(UsageError, match="has 1 blocks, its result 0"):
        manager.on_result(TransferResult(transfers[0], (), True), 0.0)
    finish(manager, transfers)
    with pytest.raises(UsageError, match="already reported as finished"):
        finish(manager, transfers)


# Tiers that come, go and forget


def test_blocks_only_in_a_tier_that_is_off_are_not_offered() -> None:
    manager = on_disk(blocks=2, tiers=(DISK, S3))
    manager.set_tier_available(DISK, False)
    assert manager.lookup(A[:2], 0.0).tiers == (S3, S3)
    manager.set_tier_available(S3, False)
    assert manager.lookup(A[:2], 0.0) == (0, 0, (), MissReason.TIER_DOWN)
    manager.set_tier_available(DISK, True)
    assert manager.lookup(A[:2], 0.0).tiers == (DISK, DISK)


def test_what_a_tier_evicts_is_forgotten() -> None:
    manager = on_disk(blocks=2)
    manager.on_tier_removed(DISK, [A[1], B[0]])
    assert manager.lookup(A[:2], 0.0) == (0, 1, (DISK,), MissReason.EVICTED)
    assert manager.take_events() == [ServiceEvent("removed", DISK, (A[1],))]


def test_unknown_tiers_are_refused() -> None:
    with pytest.raises(UsageError, match="no tier 'tape'"):
        make(4, (DISK,)).on_tier_removed("tape", A[:1])
    with pytest.raises(UsageError, match="distinct names"):
        make(4, (DISK, DISK))


def test_a_reported_failure_stops_offers_from_everywhere() -> None:
    manager = on_disk(blocks=2)
    finish(manager, prefetch(manager, "r", A[:2], 0.0).transfers)
    manager.release_owner("r")
    manager.report_load_failed([A[1], B[0]], 0.0)
    assert manager.lookup(A[:2], 29.0) == (1, 1, (HOST,), MissReason.LOAD_FAILED)
    assert manager.lookup(A[:2], 30.0).tiers == (HOST, DISK)
    assert manager.lookup(B[:1], 30.0).missing is MissReason.LOAD_FAILED


def test_a_recomputed_block_is_offered_again_at_once() -> None:
    manager = on_disk(blocks=1)
    manager.report_load_failed(A[:1], 0.0)
    save(manager, A[:1])
    assert manager.lookup(A[:1], 0.0).ready == 1


def test_what_was_on_its_way_when_its_failure_was_reported_is_dropped() -> None:
    manager = on_disk(blocks=1)
    transfers = prefetch(manager, "r", A[:1], 0.0).transfers
    manager.report_load_failed(A[:1], 0.0)
    finish(manager, transfers)
    assert manager.lookup(A[:1], 0.0).reachable == 0
    manager.release_owner("r")
    assert_nothing_leaks(manager)


def test_only_so_many_reasons_are_remembered() -> None:
    manager = make(2)
    many = [BlockKey(number.to_bytes(32, "big")) for number in range(10_000, 10_500)]
    for key in many:
        save(manager, [key])
        manager.report_load_failed([key], 0.0)
    assert len(manager._residency.losses) == 200
    assert manager.lookup(many[:1], 0.0).missing is MissReason.NEVER_STORED
    assert manager.lookup(many[-1:], 0.0).missing is MissReason.LOAD_FAILED


# Clear


def test_clear_forgets_every_block_and_deletes_below() -> None:
    manager = make(8, (DISK,))
    finish(manager, save(manager, A[:3]))
    (delete,) = manager.clear(0.0)
    assert (delete.direction, delete.tier, set(delete.keys), delete.slots) == (
        Direction.DELETE,
        DISK,
        set(A[:3]),
        (),
    )
    assert manager.lookup(A[:3], 0.0).reachable == 0
    finish(manager, [delete])
    assert_nothing_leaks(manager)


def test_what_is_leased_during_a_clear_goes_when_released() -> None:
    manager = make(2)
    save(manager, A[:2])
    lease = manager.lease("reader", A[:2], 0.0)
    manager.clear(0.0)
    assert manager.reserve("writer", B[:2], 0.0).places == ()
    manager.release(lease.id)
    assert len(manager.reserve("writer", B[:2], 0.0).places) == 2


def test_what_was_being_written_or_loaded_during_a_clear_never_shows() -> None:
    manager = on_disk(blocks=1)
    reservation = manager.reserve("writer", B[:1], 0.0)
    transfers = prefetch(manager, "r", A[:1], 0.0).transfers
    finish(manager, manager.clear(0.0))
    finish(manager, transfers)
    assert manager.commit(reservation.id, B[:1], 0.0) == []
    assert manager.lookup(A[:1], 0.0).reachable == manager.lookup(B[:1], 0.0).reachable == 0
    assert_nothing_leaks(manager)


def test_a_tier_is_not_used_until_its_old_blocks_are_gone() -> None:
    manager = make(8, (DISK,))
    finish(manager, save(manager, A[:1]))
    under_way = save(manager, A[1:2])
    deletes = manager.clear(0.0)
    assert save(manager, A[:1]) == []
    second = finish(manager, under_way)
    assert [(one.direction, one.keys) for one in second] == [(Direction.DELETE, (A[1],))]
    finish(manager, deletes, Outcome.FAILED)
    finish(manager, second)
    assert save(manager, A[2:3]) == []
    assert manager.expire(29.0) == []
    finish(manager, manager.expire(30.0))
    assert [one.direction for one in save(manager, A[3:4])] == [Direction.STORE]


def test_a_store_that_failed_is_deleted_by_a_clear_nevertheless() -> None:
    """Who failed may have failed after the block was written."""
    manager = make(8, (DISK,))
    finish(manager, save(manager, A[:1]), Outcome.FAILED)
    assert [one.keys for one in manager.clear(0.0)] == [(A[0],)]


def test_what_a_scan_finds_after_a_clear_is_deleted() -> None:
    manager = make(8, (DISK,), scan=True)
    manager.on_tier_scanned(DISK, A[:1], is_complete=False)
    deletes = manager.clear(0.0)
    deletes += manager.on_tier_scanned(DISK, A[1:2], is_complete=True)
    assert [one.keys for one in deletes] == [(A[0],), (A[1],)]
    assert manager.lookup(A[1:2], 0.0).reachable == 0
    assert save(manager, B[:1]) == []
    finish(manager, deletes)
    assert len(save(manager, B[1:2])) == 1


# Events


def test_events_tell_where_blocks_became_loadable_and_where_not() -> None:
    manager = make(2, (DISK,))
    finish(manager, save(manager, A[:2]))
    save(manager, B[:1])
    assert manager.take_events() == [
        ServiceEvent("stored", HOST, tuple(A[:2])),
        ServiceEvent("stored", DISK, tuple(A[:2])),
        ServiceEvent("removed", HOST, (A[1],)),
        ServiceEvent("stored", HOST, (B[0],)),
    ]
    assert manager.take_events() == []
