"""What goes from the arena to the tiers below, and when: admission, write-through, write-back, promotion."""

from __future__ import annotations

from collections.abc import Sequence

from manager_kit import DISK, S3, A, B, assert_nothing_leaks, finish, make, prefetch, save

from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import BlockManager, LowerTierSpec
from kvferry.connector.plan import Direction, Transfer
from kvferry.connector.tier import Outcome


class Second:
    """Admits what is offered the second time, and keeps what it was told."""

    def __init__(self) -> None:
        self.offers: dict[BlockKey, int] = {}
        self.hits: list[BlockKey] = []
        self.held: list[BlockKey] = []
        self.gone: list[BlockKey] = []

    def admits(self, key: BlockKey) -> bool:
        self.offers[key] = self.offers.get(key, 0) + 1
        return self.offers[key] >= 2

    def hit(self, key: BlockKey) -> None:
        self.hits.append(key)

    def stored(self, key: BlockKey) -> None:
        self.held.append(key)

    def removed(self, key: BlockKey) -> None:
        self.gone.append(key)


def deferred(slots: int = 16) -> BlockManager:
    return make(slots, specs=[LowerTierSpec(name=DISK, is_deferred=True)])


def use(manager: BlockManager, keys: Sequence[BlockKey], now: float = 0.0) -> None:
    manager.release(manager.lease("reader", keys, now).id)


def stored(transfers: Sequence[Transfer]) -> list[BlockKey]:
    assert all(one.direction is Direction.STORE for one in transfers)
    return [key for one in transfers for key in one.keys]


# Admission


def test_a_block_is_offered_when_it_is_saved_and_when_it_is_used_again() -> None:
    policy = Second()
    manager = make(8, specs=[LowerTierSpec(name=DISK, admission=policy)])
    assert save(manager, A[:2]) == []
    use(manager, A[:1])
    stores = manager.expire(0.0)
    assert stored(stores) == [A[0]]
    use(manager, A[:1])  # it is on its way
    finish(manager, stores)
    use(manager, A[:1])  # it is there
    assert policy.offers == {A[0]: 2, A[1]: 1}
    assert manager.expire(0.0) == []
    assert_nothing_leaks(manager)


def test_a_policy_hears_of_hits_and_of_what_the_tier_holds_and_dropped() -> None:
    policy = Second()
    manager = make(8, specs=[LowerTierSpec(name=DISK, admission=policy)])
    manager.on_tier_scanned(DISK, A[:3], is_complete=True)
    finish(manager, prefetch(manager, "reader", A[:2], 0.0).transfers)
    manager.on_tier_removed(DISK, [A[2], B[0]])
    assert (policy.hits, policy.held, policy.gone) == (A[:2], A[:3], [A[2]])
    manager.clear(0.0)
    assert policy.gone == [A[2], *A[:2]]


def test_a_policy_hears_of_what_was_stored_and_of_what_a_load_found_missing() -> None:
    policy = Second()
    manager = make(8, specs=[LowerTierSpec(name=DISK, admission=policy)])
    save(manager, A[:1])
    use(manager, A[:1])
    finish(manager, manager.expire(0.0))
    assert (policy.held, policy.gone) == (A[:1], [])
    manager.on_tier_scanned(DISK, B[:1], is_complete=True)
    finish(manager, prefetch(manager, "reader", B[:1], 0.0).transfers, Outcome.MISSING)
    assert policy.gone == B[:1]


def test_what_waits_for_a_tier_and_leaves_the_arena_is_not_stored() -> None:
    manager = make(2, specs=[LowerTierSpec(name=DISK, admission=Second())])
    save(manager, A[:2])
    use(manager, A[:2])
    save(manager, B[:2])
    assert stored(manager.expire(0.0)) == []


def test_a_tier_that_is_full_is_not_offered_used_blocks_for_a_while() -> None:
    manager = make(8, (DISK,))
    finish(manager, save(manager, A[:1]), Outcome.NO_ROOM)
    use(manager, A[:1], now=1.0)
    assert manager.expire(1.0) == []
    use(manager, A[:1], now=31.0)
    assert stored(manager.expire(31.0)) == A[:1]


def test_a_block_that_was_shed_is_stored_when_it_is_used_again() -> None:
    manager = make(8, (DISK,), queue_blocks=1)
    stores = save(manager, A[:2])
    assert stored(stores) == A[:1]
    assert manager.counters.shed[DISK] == 1
    finish(manager, stores)
    use(manager, A[:2])
    assert stored(manager.expire(0.0)) == A[1:2]


# Write-back


def test_a_deferred_write_waits_until_the_arena_runs_short_of_room() -> None:
    manager = deferred()
    assert save(manager, A[:12]) == []
    assert manager.expire(0.0) == []
    save(manager, B[:3])
    stores = manager.expire(0.0)
    assert stored(stores) == [*A[:12], *B[:3]]
    finish(manager, stores)
    assert manager.counters.lost_writes == 0
    assert_nothing_leaks(manager)


def test_a_block_with_a_deferred_write_goes_last() -> None:
    manager = deferred(slots=8)
    for stores in (save(manager, A[:8]), manager.expire(0.0)):
        finish(manager, stores)  # all eight are written now
    save(manager, B[:4])
    assert manager.lookup(B[:4], 0.0).ready == 4
    save(manager, B[4:8])
    assert manager.lookup(B[:8], 0.0).ready == 8
    assert manager.counters.lost_writes == 0


def test_a_deferred_write_is_lost_rather_than_a_save_refused() -> None:
    manager = deferred(slots=4)
    save(manager, A[:4])
    assert len(manager.reserve("writer", B[:2], 0.0).places) == 2
    assert manager.counters.lost_writes == 2


def test_flush_writes_what_waits() -> None:
    manager = deferred()
    save(manager, A[:3])
    stores = manager.flush()
    assert stored(stores) == A[:3]
    assert manager.flush() == []
    finish(manager, stores)
    assert manager.occupancy.blocks_below == 3


def test_a_block_that_is_cleared_is_not_written() -> None:
    manager = deferred()
    save(manager, A[:3])
    manager.clear(0.0)
    assert manager.flush() == []


# Promotion


def below(promote: bool) -> BlockManager:
    specs = [LowerTierSpec(name=DISK, is_promoted_to=promote), LowerTierSpec(name=S3)]
    manager = make(8, specs=specs)
    manager.on_tier_scanned(S3, A[:3], is_complete=True)
    return manager


def test_a_block_loaded_from_a_slow_tier_is_stored_in_the_faster_ones() -> None:
    manager = below(promote=True)
    stores = finish(manager, prefetch(manager, "reader", A[:2], 0.0).transfers)
    assert {one.tier for one in stores} == {DISK}
    assert stored(stores) == A[:2]
    finish(manager, stores)
    manager.release_owner("reader")
    save(manager, B[:8])  # everything else leaves the arena
    assert manager.lookup(A[:2], 0.0).tiers == (DISK, DISK)


def test_promotion_can_be_switched_off() -> None:
    manager = below(promote=False)
    assert finish(manager, prefetch(manager, "reader", A[:2], 0.0).transfers) == []


def test_a_block_that_failed_to_load_is_not_promoted() -> None:
    manager = below(promote=True)
    assert finish(manager, prefetch(manager, "reader", A[:2], 0.0).transfers, Outcome.FAILED) == []
