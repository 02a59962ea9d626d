from __future__ import annotations

import pytest

from kvferry.connector.errors import UsageError
from kvferry.connector.pool import SlotPool, SlotState


@pytest.fixture
def handed_out() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def pool(handed_out: list[tuple[int, int]]) -> SlotPool:
    return SlotPool(3, lambda slot, generation: handed_out.append((slot, generation)))


def taken(pool: SlotPool) -> int:
    slot = pool.take()
    assert slot is not None
    return slot


def committed(pool: SlotPool) -> int:
    slot = taken(pool)
    pool.commit(slot)
    return slot


def test_slots_are_handed_out_once_each(pool: SlotPool) -> None:
    assert {taken(pool) for _ in range(3)} == {0, 1, 2}
    assert pool.take() is None
    assert pool.counts().reserved == 3


def test_each_hand_out_has_a_new_generation_that_is_published_first(
    pool: SlotPool, handed_out: list[tuple[int, int]]
) -> None:
    slot = taken(pool)
    pool.free(slot)
    assert taken(pool) == slot
    assert handed_out == [(slot, 1), (slot, 2)]
    assert pool.generation(slot) == 2


def test_the_generation_stays_while_the_block_does(pool: SlotPool) -> None:
    slot = taken(pool)
    pool.commit(slot)
    pool.pin(slot)
    pool.unpin(slot)
    pool.retire(slot)
    assert pool.generation(slot) == 1


def test_only_a_committed_slot_without_pins_is_evictable(pool: SlotPool) -> None:
    slot = taken(pool)
    assert not pool.is_evictable(slot)
    pool.commit(slot)
    assert pool.is_evictable(slot)
    assert pool.num_evictable == 1
    pool.pin(slot)
    pool.pin(slot)
    pool.unpin(slot)
    assert not pool.is_evictable(slot)
    assert pool.num_evictable == 0
    pool.unpin(slot)
    assert pool.is_evictable(slot)


def test_a_pinned_slot_that_is_retired_comes_back_with_its_last_pin(pool: SlotPool) -> None:
    slot = committed(pool)
    pool.pin(slot)
    pool.retire(slot)
    assert pool.state(slot) is SlotState.RETIRED
    assert pool.num_free == 2
    assert pool.num_evictable == 0
    pool.unpin(slot)
    assert pool.state(slot) is SlotState.FREE
    assert pool.num_free == 3


def test_a_quarantined_slot_is_not_reused_until_it_is_freed(pool: SlotPool) -> None:
    slot = taken(pool)
    pool.quarantine(slot)
    assert slot not in {taken(pool), taken(pool)}
    assert pool.take() is None
    pool.free(slot)
    assert taken(pool) == slot


def test_a_quarantined_slot_cannot_be_committed(pool: SlotPool) -> None:
    slot = taken(pool)
    pool.quarantine(slot)
    with pytest.raises(UsageError, match=r"slot \d is QUARANTINED, not RESERVED"):
        pool.commit(slot)


def test_wrong_transitions_are_refused_and_change_nothing(pool: SlotPool) -> None:
    slot = committed(pool)
    before = pool.counts()
    for wrong in (pool.commit, pool.free, pool.quarantine, pool.unpin):
        with pytest.raises(UsageError, match=f"slot {slot}"):
            wrong(slot)
    other = taken(pool)
    for wrong in (pool.retire, pool.pin, pool.unpin):
        with pytest.raises(UsageError, match=f"slot {other}"):
            wrong(other)
    pool.free(other)
    assert pool.counts() == before


def test_counts_add_up(pool: SlotPool) -> None:
    committed(pool)
    pinned = committed(pool)
    pool.pin(pinned)
    pool.quarantine(taken(pool))
    counts = pool.counts()
    assert (counts.free, counts.reserved, counts.committed, counts.quarantined) == (0, 0, 2, 1)
    assert counts.pinned == 1


def test_a_pool_without_slots_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one slot"):
        SlotPool(0, lambda slot, generation: None)
