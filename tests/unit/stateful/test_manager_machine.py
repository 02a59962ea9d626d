"""The manager against a model with real slot contents, driven at random.

Writers fill slots at any moment between reserve and settlement, and go on when their reservation has
expired. Tiers' threads fill slots at any moment until the final report; tiers keep bytes, lose them,
fail, answer late, and hold old bytes until a delete has run. Bytes tell which block they belong to and
which weights (epoch; ``clear`` begins a new one) they were computed with, so any mix-up is seen by
looking at what a lease covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from kvferry.connector.errors import KVFerryError
from kvferry.connector.keys import BlockKey
from kvferry.connector.leases import OpenReservation, Reservations
from kvferry.connector.loads import Loads
from kvferry.connector.lower import LowerTier
from kvferry.connector.manager import BlockManager, LowerTierSpec, ManagerOptions
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.policy import POLICIES
from kvferry.connector.pool import SlotPool
from kvferry.connector.service import HOST, Lease, Match, MissReason, Reservation
from kvferry.connector.tier import Outcome

NUM_SLOTS = 6
LEASE_S = 10.0
RETRY_S = 20.0
QUEUE_BLOCKS = 3
TIERS = ("near", "far")
OWNERS = ("r1", "r2", "r3")
TORN = b"torn"

KEYS = [BlockKey(bytes([number]) * 32) for number in range(10)]
CHAINS = [KEYS[:8], [KEYS[0], KEYS[1], KEYS[8], KEYS[9]]]

PREFIXES = st.builds(
    lambda chain, first, last: CHAINS[chain][first : first + last],
    st.integers(0, 1),
    st.sampled_from([0, 0, 0, 1, 3]),
    st.integers(1, 8),
)
ANY = st.integers(0, 1 << 16)
OWNER = st.sampled_from(OWNERS)
TIER = st.sampled_from(TIERS)


def block_bytes(key: BlockKey, epoch: int) -> bytes:
    return key[:12] + epoch.to_bytes(4, "little")


class Writer:
    """Someone who got a reservation and fills its slots."""

    def __init__(self, owner: str, reservation: Reservation, epoch: int, expires_at: float) -> None:
        self.owner = owner
        self.reservation = reservation
        self.epoch = epoch
        self.expires_at = expires_at
        self.is_void = False


class Reader:
    """Someone who got a lease, and the bytes it must see."""

    def __init__(self, owner: str, lease: Lease, epoch: int, expires_at: float) -> None:
        self.owner = owner
        self.lease = lease
        self.epoch = epoch
        self.expires_at = expires_at
        self.is_expired = False


class Flight:
    """A transfer that a tier works on."""

    def __init__(self, transfer: Transfer, epoch: int) -> None:
        self.transfer = transfer
        self.epoch = epoch
        self.is_late = False


class ManagerMachine(RuleBasedStateMachine):
    """Rules are what callers and tiers may do; invariants are what must hold after each step."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), scanned=st.integers(0, len(KEYS)))
    def start(self, policy: str, scanned: int) -> None:
        self.now = 0.0
        self.epoch = 0
        self.generations = [0] * NUM_SLOTS
        self.contents = [bytearray(16) for _ in range(NUM_SLOTS)]
        self.stored: dict[str, dict[BlockKey, bytes]] = {name: {} for name in TIERS}
        self.stored["near"] = {key: block_bytes(key, 0) for key in KEYS[:scanned]}
        self.unscanned: list[BlockKey] | None = KEYS[:scanned]
        self.switched_off: set[str] = set()
        self.unreported: list[tuple[str, BlockKey]] = []
        self.good: set[BlockKey] = set()
        self.writers: list[Writer] = []
        self.readers: list[Reader] = []
        self.flights: list[Flight] = []
        self.held: dict[str, set[BlockKey]] = {}
        self.held_until: dict[str, float] = {}
        self.waiting: dict[BlockKey, set[str]] = {}
        self.manager = BlockManager(
            NUM_SLOTS,
            POLICIES[policy](),
            [LowerTierSpec("near", QUEUE_BLOCKS, has_scan=True), LowerTierSpec("far", QUEUE_BLOCKS)],
            ManagerOptions(lease_s=LEASE_S, retry_failed_s=RETRY_S, batch_blocks=2, remembered_blocks=16),
            on_generation=self.handed_out,
        )

    # What the world knows

    def handed_out(self, slot: int, generation: int) -> None:
        """A slot changes hands: nobody else may be reading or writing it."""
        assert slot not in self.slots_in_use(), f"slot {slot} is in use and was handed out again"
        assert generation > self.generations[slot]
        self.generations[slot] = generation

    def slots_in_use(self) -> set[int]:
        writing = {place.slot for writer in self.writers for place in writer.reservation.places}
        reading = {
            place.slot for reader in self.readers if not reader.is_expired for place in reader.lease.places
        }
        moving = {slot for flight in self.flights for slot in flight.transfer.slots}
        return writing | reading | moving

    def submit(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            if transfer.direction is Direction.STORE:
                assert transfer.tier not in self.switched_off
                for key, slot in zip(transfer.keys, transfer.slots, strict=True):
                    assert self.contents[slot] == block_bytes(key, self.epoch)
            if transfer.direction is Direction.LOAD:
                assert transfer.tier not in self.switched_off
                writers = [slot for flight in self.flights for slot in flight.transfer.slots]
                assert not set(transfer.slots) & set(writers), "a slot has two writers"
            self.flights.append(Flight(transfer, self.epoch))

    def is_ready(self, key: BlockKey) -> bool:
        return self.manager.lookup([key], self.now).ready == 1

    # Engines

    @rule(keys=PREFIXES)
    def lookup(self, keys: list[BlockKey]) -> None:
        match = self.manager.lookup(keys, self.now)
        assert 0 <= match.ready <= match.reachable == len(match.tiers) <= len(keys)
        assert (match.missing is MissReason.NONE) == (match.reachable == len(keys))
        assert not self.switched_off & set(match.tiers)
        assert all(name == HOST for name in match.tiers[: match.ready])
        assert match == self.manager.lookup(keys, self.now)

    @rule(owner=OWNER, keys=PREFIXES)
    def prefetch(self, owner: str, keys: list[BlockKey]) -> None:
        match = self.manager.lookup(keys, self.now)
        coming, transfers = self.manager.prefetch(owner, keys, self.now)
        assert match.ready <= coming <= match.reachable
        loaded = [key for transfer in transfers for key in transfer.keys]
        assert not set(loaded) & set(self.waiting), "a block is loaded twice at once"
        self.submit(transfers)
        if not match.reachable:
            return
        self.held_until[owner] = self.now + LEASE_S
        held = self.held.setdefault(owner, set())
        for key, tier in zip(keys[: match.reachable], match.tiers, strict=True):
            if tier == HOST:
                held.add(key)
            elif key in loaded or key in self.waiting:
                self.waiting.setdefault(key, set()).add(owner)
        assert all(key in self.waiting or self.is_ready(key) for key in keys[:coming])

    @rule(owner=OWNER, keys=PREFIXES)
    def lease(self, owner: str, keys: list[BlockKey]) -> None:
        match = self.manager.lookup(keys, self.now)
        lease = self.manager.lease(owner, keys, self.now)
        assert [place.key for place in lease.places] == keys[: match.ready]
        for place in lease.places:
            assert place.generation == self.generations[place.slot]
            assert self.contents[place.slot] == block_bytes(place.key, self.epoch)
        if lease.places:
            self.readers.append(Reader(owner, lease, self.epoch, self.now + LEASE_S))

    @precondition(lambda self: self.readers)
    @rule(pick=ANY)
    def release(self, pick: int) -> None:
        reader = self.readers.pop(pick % len(self.readers))
        self.manager.release(reader.lease.id)

    @rule(owner=OWNER)
    def release_owner(self, owner: str) -> None:
        self.manager.release_owner(owner)
        self.forget_readers(owner)

    @rule(owner=OWNER)
    def owner_dies(self, owner: str) -> None:
        self.forget_readers(owner)
        self.writers = [writer for writer in self.writers if writer.owner != owner]
        self.manager.drop_owner_dead(owner)

    def forget_readers(self, owner: str) -> None:
        self.readers = [reader for reader in self.readers if reader.owner != owner]
        self.held.pop(owner, None)

    @rule(owner=OWNER, keys=PREFIXES)
    def reserve(self, owner: str, keys: list[BlockKey]) -> None:
        reservation = self.manager.reserve(owner, keys, self.now)
        places = reservation.places
        assert [place.key for place in places] == [
            key for key in keys if key in {place.key for place in places}
        ]
        for place in places:
            assert place.generation == self.generations[place.slot]
            assert not self.is_ready(place.key)
        if places:
            self.writers.append(Writer(owner, reservation, self.epoch, self.now + LEASE_S))

    @precondition(lambda self: self.writers)
    @rule(pick=ANY, which=ANY)
    def writer_is_half_way(self, pick: int, which: int) -> None:
        places = self.writers[pick % len(self.writers)].reservation.places
        self.contents[places[which % len(places)].slot][:] = TORN * 4

    @precondition(lambda self: self.writers)
    @rule(pick=ANY, count=st.integers(0, 8))
    def commit(self, pick: int, count: int) -> None:
        writer = self.writers.pop(pick % len(self.writers))
        for place in writer.reservation.places:
            self.contents[place.slot][:] = block_bytes(place.key, writer.epoch)
        keys = [place.key for place in writer.reservation.places][:count]
        before = {key for key in keys if self.is_ready(key)}
        transfers = self.manager.commit(writer.reservation.id, keys, self.now)
        if writer.is_void:
            assert not transfers
            assert before == {key for key in keys if self.is_ready(key)}
        else:
            assert all(self.is_ready(key) for key in keys)
            self.good.update(keys)
        self.submit(transfers)

    @precondition(lambda self: self.writers)
    @rule(pick=ANY)
    def abort(self, pick: int) -> None:
        writer = self.writers.pop(pick % len(self.writers))
        self.manager.abort(writer.reservation.id)

    @rule(keys=PREFIXES)
    def report_load_failed(self, keys: list[BlockKey]) -> None:
        self.manager.report_load_failed(keys, self.now)
        for key in keys:
            assert self.manager.lookup([key], self.now) == Match(0, 0, (), MissReason.LOAD_FAILED)
            self.waiting.pop(key, None)
            for held in self.held.values():
                held.discard(key)

    @rule()
    def clear(self) -> None:
        self.epoch += 1
        self.good.clear()
        self.held.clear()
        self.waiting.clear()
        for writer in self.writers:
            writer.is_void = True
        self.submit(self.manager.clear(self.now))
        assert not any(self.manager.lookup([key], self.now).reachable for key in KEYS)

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for reader in self.readers:
            reader.is_expired = reader.is_expired or self.now >= reader.expires_at
        for writer in self.writers:
            writer.is_void = writer.is_void or self.now >= writer.expires_at
        for owner in [owner for owner in self.held if self.now >= self.held_until[owner]]:
            del self.held[owner]
        self.submit(self.manager.expire(self.now))

    # Tiers

    @precondition(lambda self: self.flights)
    @rule(pick=ANY)
    def tier_is_half_way(self, pick: int) -> None:
        transfer = self.flights[pick % len(self.flights)].transfer
        if transfer.direction is Direction.LOAD:
            for slot in transfer.slots:
                self.contents[slot][:] = TORN * 4

    @precondition(lambda self: self.flights)
    @rule(pick=ANY)
    def transfer_is_late(self, pick: int) -> None:
        flight = self.flights[pick % len(self.flights)]
        if flight.is_late:
            return
        flight.is_late = True
        outcomes = (Outcome.FAILED,) * len(flight.transfer.keys)
        assert self.manager.on_result(TransferResult(flight.transfer, outcomes, False), self.now) == []
        if flight.transfer.direction is Direction.LOAD:
            for key in flight.transfer.keys:
                self.stop_waiting(flight, key)

    def stop_waiting(self, flight: Flight, key: BlockKey) -> set[str]:
        """Return who waited for a block of this very load."""
        others = [other for other in self.flights if other is not flight and not other.is_late]
        is_loaded_again = any(
            other.transfer.direction is Direction.LOAD and key in other.transfer.keys for other in others
        )
        if flight.epoch != self.epoch or is_loaded_again:
            return set()
        return self.waiting.pop(key, set())

    @precondition(lambda self: self.flights)
    @rule(pick=ANY, faults=st.lists(st.sampled_from(["", "", "", "fail", "refuse", "odd"]), max_size=8))
    def transfer_ends(self, pick: int, faults: list[str]) -> None:
        flight = self.flights.pop(pick % len(self.flights))
        transfer = flight.transfer
        by_direction = {
            Direction.LOAD: self.tier_loads,
            Direction.STORE: self.tier_stores,
            Direction.DELETE: self.tier_deletes,
        }
        faults = (faults + [""] * len(transfer.keys))[: len(transfer.keys)]
        outcomes = tuple(by_direction[transfer.direction](flight, faults))
        refused = tuple(key for key, fault in zip(transfer.keys, faults, strict=True) if fault == "refuse")
        if transfer.direction is not Direction.LOAD:
            refused = ()
        result = TransferResult(transfer, outcomes, True, ("checksum",) * len(refused), refused)
        if transfer.direction is Direction.LOAD and flight.epoch == self.epoch:
            self.good.update(
                key for key, found in zip(transfer.keys, outcomes, strict=True) if found is Outcome.OK
            )
        followers = self.manager.on_result(result, self.now)
        if transfer.direction is Direction.LOAD:
            retried = {key for follower in followers for key in follower.keys}
            for key, outcome in zip(transfer.keys, outcomes, strict=True):
                if key in retried or flight.is_late:
                    continue
                owners = self.stop_waiting(flight, key)
                if outcome is Outcome.OK:
                    for owner in owners & self.held.keys():
                        self.held[owner].add(key)
        self.submit(followers)

    def tier_loads(self, flight: Flight, faults: list[str]) -> Iterator[Outcome]:
        transfer = flight.transfer
        for key, slot, fault in zip(transfer.keys, transfer.slots, faults, strict=True):
            found = self.stored[transfer.tier].get(key)
            if fault or found is None:
                self.contents[slot][:] = TORN * 4
            if fault == "refuse":
                self.stored[transfer.tier].pop(key, None)
            if fault:
                yield Outcome.FAILED
            elif found is None:
                yield Outcome.MISSING
            else:
                self.contents[slot][:] = found
                yield Outcome.OK

    def tier_stores(self, flight: Flight, faults: list[str]) -> Iterator[Outcome]:
        transfer = flight.transfer
        for key, slot, fault in zip(transfer.keys, transfer.slots, faults, strict=True):
            assert self.contents[slot] == block_bytes(key, flight.epoch), "a slot changed while it was stored"
            if fault == "fail":
                yield Outcome.NO_ROOM
                continue
            self.stored[transfer.tier].setdefault(key, bytes(self.contents[slot]))
            yield Outcome.FAILED if fault else Outcome.OK

    def tier_deletes(self, flight: Flight, faults: list[str]) -> Iterator[Outcome]:
        for key, fault in zip(flight.transfer.keys, faults, strict=True):
            if fault != "fail":
                self.stored[flight.transfer.tier].pop(key, None)
            yield Outcome.FAILED if fault else Outcome.OK

    @rule(tier=TIER, pick=ANY)
    def tier_evicts(self, tier: str, pick: int) -> None:
        if self.stored[tier]:
            key = sorted(self.stored[tier])[pick % len(self.stored[tier])]
            del self.stored[tier][key]
            self.unreported.append((tier, key))

    @precondition(lambda self: self.unreported)
    @rule()
    def tier_reports_eviction(self) -> None:
        tier, key = self.unreported.pop(0)
        self.manager.on_tier_removed(tier, [key])

    @precondition(lambda self: self.unscanned is not None)
    @rule(count=st.integers(0, 4))
    def tier_scans(self, count: int) -> None:
        assert self.unscanned is not None
        keys, rest = self.unscanned[:count], self.unscanned[count:]
        self.unscanned = rest or None
        there = [key for key in keys if key in self.stored["near"]]
        self.submit(self.manager.on_tier_scanned("near", there, is_complete=not rest))

    @rule(tier=TIER, is_available=st.booleans())
    def tier_is_switched(self, tier: str, is_available: bool) -> None:
        (self.switched_off.discard if is_available else self.switched_off.add)(tier)
        self.manager.set_tier_available(tier, is_available)

    # What must hold

    @invariant()
    def leased_bytes_are_right(self) -> None:
        for reader in self.readers:
            for place in reader.lease.places:
                is_same = self.generations[place.slot] == place.generation
                assert is_same or reader.is_expired, "a leased slot was reused"
                if is_same:
                    assert self.contents[place.slot] == block_bytes(place.key, reader.epoch)

    @invariant()
    def only_good_blocks_are_visible(self) -> None:
        visible = [key for key in KEYS if self.is_ready(key)]
        assert set(visible) <= self.good
        assert len(visible) <= NUM_SLOTS

    @invariant()
    def held_blocks_stay(self) -> None:
        for keys in self.held.values():
            assert all(self.is_ready(key) for key in keys)

    @invariant()
    def slots_add_up(self) -> None:
        slots = self.manager.occupancy.slots
        assert slots.free + slots.reserved + slots.committed + slots.quarantined + slots.retired == NUM_SLOTS

    @invariant()
    def queues_are_bounded(self) -> None:
        for name in TIERS:
            stores = [
                len(flight.transfer.keys)
                for flight in self.flights
                if flight.transfer.tier == name and flight.transfer.direction is Direction.STORE
            ]
            assert sum(stores) <= QUEUE_BLOCKS

    def teardown(self) -> None:
        """Settle everything: nothing may be left, and every slot must be usable again."""
        if not hasattr(self, "manager"):
            return
        while self.writers:
            self.abort(0)
        for owner in OWNERS:
            self.release_owner(owner)
        while self.unscanned is not None:
            self.tier_scans(4)
        while self.flights:
            self.transfer_ends(0, [])
            self.time_passes(25.0)
        for name in TIERS:
            self.tier_is_switched(name, True)
        self.time_passes(25.0)
        while self.flights:
            self.transfer_ends(0, [])
        left = self.manager.occupancy
        assert (left.leases, left.holds, left.reservations, left.void_reservations) == (0, 0, 0, 0)
        assert (left.loading, left.transfers, left.slots.pinned) == (0, 0, 0)
        assert left.slots.free + left.slots.committed == NUM_SLOTS
        assert all(content == block_bytes(key, self.epoch) for key, content in self.current_blocks())
        others = [BlockKey(bytes([100 + number]) * 32) for number in range(NUM_SLOTS)]
        assert len(self.manager.reserve("last", others, self.now).places) == NUM_SLOTS

    def current_blocks(self) -> Iterator[tuple[BlockKey, bytes]]:
        """What the manager would offer now, wherever it lies."""
        for key in KEYS:
            match = self.manager.lookup([key], self.now)
            if match.ready:
                (place,) = self.manager.lease("last", [key], self.now).places
                yield key, bytes(self.contents[place.slot])
                self.manager.release_owner("last")
            elif match.reachable and key in self.stored[match.tiers[0]]:
                yield key, self.stored[match.tiers[0]][key]


SETTINGS = settings(
    max_examples=200,
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


# The machine must be able to fail: each of these breaks one rule of the manager.


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
    patch.setattr(Loads, "discarded", lambda self, transfer: self._host.admit(_pairs(transfer)))


def _pairs(transfer: Transfer) -> list[tuple[BlockKey, int]]:
    return list(zip(transfer.keys, transfer.slots, strict=True))


def what_is_scanned_survives_a_clear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LowerTier, "cleared", lambda self: None)


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
        waiting_owners_are_forgotten,
        one_block_is_loaded_twice,
        queues_have_no_bound,
        generations_stand_still,
    ],
)
def test_a_broken_rule_is_found(
    break_rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch)
    without_shrinking = settings(SETTINGS, max_examples=1000, phases=[Phase.generate])
    with pytest.raises((AssertionError, KVFerryError)):
        run_machine(ManagerMachine, settings=without_shrinking)
