"""Blocks that others are about to look for: written at once, whatever the tier's rules, and the wait for it ends."""

from __future__ import annotations

from collections.abc import Sequence

from manager_kit import DISK, S3, A, assert_nothing_leaks, finish, make, save

from kvferry.connector.admission import SecondTouch
from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import BlockManager, LowerTierSpec
from kvferry.connector.plan import Direction, Transfer
from kvferry.connector.tier import Outcome
from kvferry.connector.visibility import Settling

REDIS = "redis"


def shared(*names: str, queue_blocks: int = 100, **spec: object) -> BlockManager:
    tiers = [
        LowerTierSpec(name=name, is_shared=True, queue_blocks=queue_blocks, **spec)  # type: ignore[arg-type]
        for name in names or (REDIS,)
    ]
    return make(16, specs=tiers)


def stores(manager: BlockManager, settling: Settling, now: float = 0.0) -> list[Transfer]:
    planned = manager.settle(settling, now)
    assert all(one.direction is Direction.STORE for one in planned)
    return planned


def keys_of(transfers: Sequence[Transfer], tier: str = REDIS) -> list[BlockKey]:
    return [key for one in transfers if one.tier == tier for key in one.keys]


def is_over(settling: Settling) -> bool:
    return not settling.waiting


def test_a_store_under_way_is_waited_for_and_not_made_twice() -> None:
    manager = shared()
    under_way = save(manager, A[:3])
    settling = Settling(A[:3])
    assert stores(manager, settling) == []
    assert not is_over(settling)
    finish(manager, under_way[:1])
    assert stores(manager, settling) == []
    assert list(settling.waiting) == A[2:3]
    finish(manager, under_way[1:])
    assert stores(manager, settling) == []
    assert is_over(settling)
    assert settling.lost == []
    assert_nothing_leaks(manager)


def test_without_a_shared_tier_there_is_nothing_to_wait_for() -> None:
    manager = make(8, [DISK])
    save(manager, A[:2])
    settling = Settling([*A[:2], A[7]])
    assert stores(manager, settling) == []
    assert is_over(settling)
    assert settling.lost == []


def test_what_admission_kept_back_is_written() -> None:
    manager = shared(admission=SecondTouch())
    assert save(manager, A[:3]) == []
    settling = Settling(A[:3])
    forced = stores(manager, settling)
    assert keys_of(forced) == A[:3]
    finish(manager, forced)
    assert stores(manager, settling) == []
    assert is_over(settling)
    assert settling.lost == []
    assert_nothing_leaks(manager)


def test_what_was_to_be_written_later_is_written_now_and_not_again() -> None:
    manager = shared(is_deferred=True)
    assert save(manager, A[:3]) == []
    forced = stores(manager, Settling(A[:2]))
    assert keys_of(forced) == A[:2]
    assert keys_of(manager.flush()) == A[2:3], "the others are deferred as before"


def test_the_queue_keeps_its_bound_and_nothing_is_shed() -> None:
    manager = shared(queue_blocks=2)
    under_way = save(manager, A[:5])
    assert keys_of(under_way) == A[:2]
    settling = Settling(A[:5])
    written = []
    while under_way:
        assert stores(manager, settling) == [], "there is no room yet"
        written += keys_of(under_way)
        finish(manager, under_way)
        under_way = stores(manager, settling)
        assert len(keys_of(under_way)) <= 2
    assert written == A[:5]
    assert is_over(settling)
    assert settling.lost == []


def test_a_block_that_no_shared_tier_takes_is_lost_and_the_others_are_waited_for() -> None:
    manager = shared()
    first, second = save(manager, A[:4])
    settling = Settling(A[:4])
    stores(manager, settling)
    finish(manager, [first], Outcome.FAILED)
    assert stores(manager, settling) == [], "it was tried"
    assert settling.lost == A[:2]
    assert list(settling.waiting) == A[2:4]
    finish(manager, [second])
    assert stores(manager, settling) == []
    assert is_over(settling)
    assert settling.lost == A[:2]


def test_a_store_that_failed_before_is_tried_once_more() -> None:
    manager = shared()
    finish(manager, save(manager, A[:1]), Outcome.FAILED)
    settling = Settling(A[:1])
    finish(manager, stores(manager, settling))
    assert stores(manager, settling) == []
    assert settling.lost == []


def test_a_store_that_was_forced_and_failed_is_not_tried_for_ever() -> None:
    manager = shared(admission=SecondTouch())
    save(manager, A[:1])
    settling = Settling(A[:1])
    finish(manager, stores(manager, settling), Outcome.FAILED)
    assert stores(manager, settling) == []
    assert settling.lost == A[:1]


def test_a_tier_that_is_full_or_switched_off_is_not_tried() -> None:
    manager = shared()
    finish(manager, save(manager, A[:1]), Outcome.NO_ROOM)
    settling = Settling(A[:1])
    assert stores(manager, settling) == []
    assert settling.lost == A[:1]
    assert keys_of(stores(manager, Settling(A[:1]), now=30.0)) == A[:1], (
        "after a while it may have room again"
    )
    manager.set_tier_available(REDIS, False)
    save(manager, A[1:2], 30.0)
    settling = Settling(A[1:2])
    assert stores(manager, settling, 30.0) == []
    assert settling.lost == A[1:2]


def test_where_one_shared_tier_fails_the_next_is_given_the_block() -> None:
    manager = shared(REDIS, S3, is_deferred=True)
    assert save(manager, A[:2]) == []
    settling = Settling(A[:2])
    forced = stores(manager, settling)
    assert keys_of(forced) == A[:2]
    assert keys_of(forced, S3) == [], "one copy is enough, the rest is up to the tier's rules"
    finish(manager, forced, Outcome.NO_ROOM)
    forced = stores(manager, settling)
    assert keys_of(forced, S3) == A[:2]
    finish(manager, forced)
    assert stores(manager, settling) == []
    assert settling.lost == []


def test_the_first_copy_ends_the_wait() -> None:
    manager = shared(REDIS, S3)
    under_way = save(manager, A[:2])
    settling = Settling(A[:2])
    finish(manager, [one for one in under_way if one.tier == S3])
    assert stores(manager, settling) == []
    assert is_over(settling)
    assert settling.lost == []


def test_a_tier_of_ones_own_shows_nothing_to_others() -> None:
    manager = make(16, [DISK], specs=[LowerTierSpec(name=REDIS, is_shared=True, admission=SecondTouch())])
    finish(manager, save(manager, A[:2]))
    settling = Settling(A[:2])
    forced = stores(manager, settling)
    assert keys_of(forced) == A[:2]
    assert keys_of(forced, DISK) == []


def test_what_a_shared_tier_holds_is_visible_also_where_the_arena_has_it_no_more() -> None:
    manager = make(2, specs=[LowerTierSpec(name=REDIS, is_shared=True)])
    finish(manager, save(manager, A[:2]))
    finish(manager, save(manager, A[2:4]))
    settling = Settling(A[:4])
    assert stores(manager, settling) == []
    assert is_over(settling)
    assert settling.lost == []


def test_a_block_that_is_nowhere_is_lost() -> None:
    settling = Settling([A[0], A[0]])
    assert stores(shared(), settling) == []
    assert is_over(settling)
    assert settling.lost == A[:1]


def test_a_clear_ends_the_wait() -> None:
    manager = shared()
    under_way = save(manager, A[:2])
    settling = Settling(A[:2])
    stores(manager, settling)
    manager.clear(0.0)
    finish(manager, under_way)
    assert stores(manager, settling) == []
    assert settling.lost == A[:2]
    assert_nothing_leaks(manager)
