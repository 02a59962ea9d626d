"""The manager against a model with real slot contents: by hypothesis, and by many long random walks.

hypothesis finds short counterexamples and shrinks them; the walks get further into the manager's states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from manager_world import FAULTS, KEYS, OWNERS, SPEEDS, TIERS, TIMES_S, World, prefix, walk

from kvferry.connector.asking import Asking
from kvferry.connector.errors import KVFerryError
from kvferry.connector.keys import BlockKey
from kvferry.connector.leases import OpenReservation, Reservations
from kvferry.connector.loads import Loads
from kvferry.connector.lower import LowerTier
from kvferry.connector.manager import BlockManager
from kvferry.connector.plan import Transfer
from kvferry.connector.policy import POLICIES
from kvferry.connector.pool import SlotPool
from kvferry.connector.service import Reservation
from kvferry.connector.visibility import Visibility

PREFIXES = st.builds(prefix, st.integers(0, 1), st.sampled_from([0, 0, 0, 1, 2, 4]), st.integers(1, 5))
PICK = st.integers(0, 1 << 16)
OWNER = st.sampled_from(OWNERS)
TIER = st.sampled_from(TIERS)

with_writers = precondition(lambda self: self.writers)
with_readers = precondition(lambda self: self.readers)
with_flights = precondition(lambda self: self.flights)
with_scan = precondition(lambda self: self.unscanned is not None)


class ManagerMachine(World, RuleBasedStateMachine):
    """The world's actions as rules."""

    begin = initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        stored=st.sampled_from([0, 3, len(KEYS)]),
        is_scanned=st.booleans(),
    )(World.begin)

    lookup = rule(keys=PREFIXES)(World.lookup)
    prefetch = rule(owner=OWNER, keys=PREFIXES, block_s=st.sampled_from(SPEEDS))(World.prefetch)
    fetch = rule(owner=OWNER, keys=PREFIXES)(World.fetch)
    lease = rule(owner=OWNER, keys=PREFIXES)(World.lease)
    release = with_readers(rule(pick=PICK)(World.release))
    release_owner = rule(owner=OWNER)(World.release_owner)
    owner_dies = rule(owner=OWNER)(World.owner_dies)
    save = rule(owner=OWNER, keys=PREFIXES)(World.save)
    reserve = rule(owner=OWNER, keys=PREFIXES)(World.reserve)
    writer_is_half_way = with_writers(rule(pick=PICK, which=PICK)(World.writer_is_half_way))
    commit = with_writers(rule(pick=PICK, count=st.integers(0, 5))(World.commit))
    abort = with_writers(rule(pick=PICK)(World.abort))
    report_load_failed = rule(keys=PREFIXES)(World.report_load_failed)
    show = rule(keys=PREFIXES)(World.show)
    clear = rule()(World.clear)
    time_passes = rule(seconds=st.sampled_from(TIMES_S))(World.time_passes)
    tier_is_half_way = with_flights(rule(pick=PICK)(World.tier_is_half_way))
    transfer_is_late = with_flights(rule(pick=PICK)(World.transfer_is_late))
    transfer_ends = with_flights(
        rule(pick=PICK, faults=st.lists(st.sampled_from(FAULTS), max_size=4))(World.transfer_ends)
    )
    transfers_end_well = with_flights(rule(picks=st.lists(PICK, max_size=6))(World.transfers_end_well))
    tier_evicts = rule(tier=TIER, pick=PICK)(World.tier_evicts)
    others_store = rule(keys=PREFIXES)(World.others_store)
    tier_reports_eviction = rule()(World.tier_reports_eviction)
    tier_scans = with_scan(rule(count=st.integers(1, 5))(World.tier_scans))
    tier_is_switched = rule(tier=TIER, is_available=st.booleans())(World.tier_is_switched)

    check = invariant()(World.check)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.settle()


SETTINGS = settings(
    max_examples=100,
    stateful_step_count=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
"""Deterministic, so that a red suite is red for everybody; raise ``max_examples`` to hunt."""


def test_the_manager_keeps_its_promises() -> None:
    run_machine(ManagerMachine, settings=SETTINGS)


def test_the_manager_keeps_its_promises_on_long_walks() -> None:
    totals: Counter[str] = Counter()
    for seed in range(300):
        world = walk(seed, steps=150)
        counters = world.manager.counters
        totals.update(counters.hits)
        totals.update(evictions=counters.evictions, void=counters.void_commits, clears=world.epoch)
        totals.update(duplicates=counters.duplicates, leases=counters.expired_leases)
        totals.update(promoted=world.promoted, asked=world.found_by_asking, lost=counters.lost_writes)
        totals.update(declined=world.declined, shown=world.shown)
        totals.update(shed=sum(counters.shed.values()), skipped=sum(counters.skipped.values()))
    rare = {name: count for name, count in totals.items() if count < 10}
    assert not rare, "these happen too seldom for the walks to prove anything about them"


# The tests must be able to fail: each of these breaks one rule of the manager.


def leased_slots_look_evictable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotPool, "pin", lambda self, slot: None)
    patch.setattr(SlotPool, "unpin", lambda self, slot: None)


def expired_reservations_free_their_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotPool, "quarantine", SlotPool.free)


def expired_reservations_can_be_committed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotPool, "quarantine", lambda self, slot: None)
    patch.setattr(OpenReservation, "__setattr__", lambda self, name, value: None)


def reserved_blocks_are_visible(patch: pytest.MonkeyPatch) -> None:
    reserve = BlockManager.reserve

    def reserve_and_show(self: BlockManager, owner: str, keys: list[BlockKey], now: float) -> Reservation:
        reservation = reserve(self, owner, keys, now)
        self._residency.arena.update((place.key, place.slot) for place in reservation.places)
        return reservation

    patch.setattr(BlockManager, "reserve", reserve_and_show)


def cleared_tiers_are_used_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LowerTier, "await_end", lambda self, transfer_id: None)


def what_was_loading_survives_a_clear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Loads, "discarded", lambda self, tier, transfer, *rest: self._host.admit(_pairs(transfer)))


def _pairs(transfer: Transfer) -> list[tuple[BlockKey, int]]:
    return list(zip(transfer.keys, transfer.slots, strict=True))


def what_is_scanned_survives_a_clear(patch: pytest.MonkeyPatch) -> None:
    clear = LowerTier.clear

    def clear_all_but_the_scan(self: LowerTier) -> list[BlockKey]:
        doubtful = clear(self)
        self.is_purging_scan = False
        return doubtful

    patch.setattr(LowerTier, "clear", clear_all_but_the_scan)


def late_loads_lose_their_slots(patch: pytest.MonkeyPatch) -> None:
    late = Loads.late

    def late_and_free(self: Loads, tier: LowerTier, transfer: Transfer, now: float) -> None:
        late(self, tier, transfer, now)
        for slot in transfer.slots:
            self._pool.free(slot)

    patch.setattr(Loads, "late", late_and_free)


def aborted_slots_leak(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reservations, "free", Reservations.settle)


def waiting_owners_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Loads, "join", lambda self, key, owner: None)


def one_block_is_loaded_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Loads, "__contains__", lambda self, key: False)


def one_block_is_asked_for_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Asking, "is_under_way", lambda self, key, tier: False)


def queues_have_no_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LowerTier, "room_blocks", 1000)


def generations_stand_still(patch: pytest.MonkeyPatch) -> None:
    init = SlotPool.__init__

    def init_fixed(self: SlotPool, num_slots: int, on_generation: Callable[[int, int], None]) -> None:
        init(self, num_slots, on_generation)
        self._generations = FixedList([1] * num_slots)

    patch.setattr(SlotPool, "__init__", init_fixed)


class FixedList(list[int]):
    def __setitem__(self, index: Any, value: Any) -> None:
        pass


def failed_stores_are_taken_for_absent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LowerTier, "doubt", lambda self, keys: None)


def what_is_on_its_way_is_taken_for_visible(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Visibility, "_is_visible", lambda self, key: key in self._shared[0].storing)


def walk_often(times: int, steps: int) -> None:
    for seed in range(times):
        walk(seed, steps)


@pytest.mark.parametrize(
    "break_rule",
    [
        leased_slots_look_evictable,
        expired_reservations_free_their_slots,
        expired_reservations_can_be_committed,
        reserved_blocks_are_visible,
        cleared_tiers_are_used_at_once,
        what_was_loading_survives_a_clear,
        what_is_scanned_survives_a_clear,
        late_loads_lose_their_slots,
        aborted_slots_leak,
        one_block_is_loaded_twice,
        one_block_is_asked_for_twice,
        queues_have_no_bound,
        generations_stand_still,
        failed_stores_are_taken_for_absent,
        waiting_owners_are_forgotten,
        what_is_on_its_way_is_taken_for_visible,
    ],
)
def test_a_broken_rule_is_found(
    break_rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch)
    with pytest.raises((AssertionError, KVFerryError)):
        walk_often(2000, steps=100)
