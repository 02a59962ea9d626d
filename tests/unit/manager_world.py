"""A world around the manager, with real slot contents: what its tests drive.

Writers fill slots at any moment between reserve and settlement, and go on when their reservation has
expired. Tiers' threads fill slots at any moment until the final report; tiers keep bytes, lose them,
fail, answer late, and hold old bytes until a delete has run. Bytes tell which block they belong to and
which weights (epoch; ``clear`` begins a new one) they were computed with, so any mix-up is seen by
looking at what a lease covers.

Three tiers: ``near`` is this process's own and scanned at the start, ``far`` is written to only when the
arena runs short of room, ``common`` is shared: others put blocks in and take them out without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import BlockManager, LowerTierSpec, ManagerOptions
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.policy import POLICIES
from kvferry.connector.service import HOST, Lease, Match, MissReason, Reservation
from kvferry.connector.tier import Outcome
from kvferry.connector.visibility import Settling

NUM_SLOTS = 5
LEASE_S = 10.0
RETRY_S = 20.0
ABSENT_S = 3.0
LOAD_S = 1.0
SPEEDS = (None, None, 0.01, 100.0)
"""Seconds in which an engine computes a block, where it knows: less than a tier needs, or more."""
QUEUE_BLOCKS = 3
TIERS = ("near", "far", "common")
OWNERS = ("r1", "r2", "r3")
FAULTS = ("", "", "", "fail", "refuse", "odd")
TIMES_S = (1.0, 4.0, 4.0, 11.0)
TORN = b"torn"

KEYS = [BlockKey(bytes([number]) * 32) for number in range(10)]
CHAINS = (KEYS[:8], [KEYS[0], KEYS[1], KEYS[8], KEYS[9]])


def prefix(chain: int, first: int, count: int) -> list[BlockKey]:
    return CHAINS[chain][first : first + count]


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


class World:
    """A manager and everybody around it.

    ``begin``, then any actions in any order with ``check`` after each, then ``settle``. An action that
    finds nothing to act on does nothing.
    """

    def begin(self, policy: str, stored: int, is_scanned: bool) -> None:
        self.now = 0.0
        self.epoch = 0
        self.generations = [0] * NUM_SLOTS
        self.contents = [bytearray(16) for _ in range(NUM_SLOTS)]
        self.stored: dict[str, dict[BlockKey, bytes]] = {name: {} for name in TIERS}
        self.stored["near"] = {key: block_bytes(key, 0) for key in KEYS[:stored]}
        self.unscanned: list[BlockKey] | None = KEYS[:stored]
        self.switched_off: set[str] = set()
        self.unreported: list[tuple[str, BlockKey]] = []
        self.good: set[BlockKey] = set()
        self.writers: list[Writer] = []
        self.readers: list[Reader] = []
        self.flights: list[Flight] = []
        self.held: dict[str, set[BlockKey]] = {}
        self.held_until: dict[str, float] = {}
        self.waiting: dict[BlockKey, set[str]] = {}
        self.promoted = 0
        self.declined = 0
        self.found_by_asking = 0
        self.shown = 0
        self.was_common: set[BlockKey] = set()
        """Blocks that others could find in the shared tier since the last clear; it may have dropped them."""
        self.manager = BlockManager(
            NUM_SLOTS,
            POLICIES[policy](),
            [
                LowerTierSpec(name="near", queue_blocks=QUEUE_BLOCKS, has_scan=True),
                LowerTierSpec(name="far", queue_blocks=QUEUE_BLOCKS, is_deferred=True),
                LowerTierSpec(name="common", queue_blocks=QUEUE_BLOCKS, is_shared=True),
            ],
            ManagerOptions(
                lease_s=LEASE_S,
                retry_failed_s=RETRY_S,
                batch_blocks=2,
                remembered_blocks=16,
                answered_blocks=6,
                absent_s=ABSENT_S,
            ),
            on_generation=self.handed_out,
        )
        if is_scanned:
            self.tier_scans(len(KEYS))

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

    def lookup(self, keys: list[BlockKey]) -> None:
        match = self.manager.lookup(keys, self.now)
        assert 0 <= match.ready <= match.reachable == len(match.tiers) <= len(keys)
        assert (match.missing is MissReason.NONE) == (match.reachable == len(keys))
        assert not self.switched_off & set(match.tiers)
        assert all(name == HOST for name in match.tiers[: match.ready])
        assert match == self.manager.lookup(keys, self.now)

    def prefetch(self, owner: str, keys: list[BlockKey], block_s: float | None = None) -> None:
        match = self.manager.lookup(keys, self.now)
        found, transfers = self.manager.prefetch(owner, keys, self.now, block_s)
        coming = found.blocks
        assert match.ready <= coming <= len(keys)
        assert coming <= match.reachable or match.missing is MissReason.NOT_ASKED
        asked = [
            key for transfer in transfers if transfer.direction is Direction.ASK for key in transfer.keys
        ]
        assert not set(asked) & self.asked(), "a block is asked for twice at once"
        loaded = [
            key for transfer in transfers if transfer.direction is Direction.LOAD for key in transfer.keys
        ]
        assert not set(loaded) & set(self.waiting), "a block is loaded twice at once"
        self.submit(transfers)
        if not match.reachable:
            return
        self.held_until[owner] = self.now + LEASE_S
        held = self.held.setdefault(owner, set())
        for index, (key, tier) in enumerate(zip(keys[: match.reachable], match.tiers, strict=True)):
            if tier == HOST and index < coming:
                held.add(key)
            elif key in loaded or (key in self.waiting and index < coming):
                owners = self.waiting.setdefault(key, set())
                if index < coming:  # the rest is a probe of a tier, and nobody's
                    owners.add(owner)
        self.declined += found.cut is MissReason.SLOWER
        assert all(key in self.waiting or self.is_ready(key) for key in keys[: min(coming, match.reachable)])

    def asked(self) -> set[BlockKey]:
        """Return the blocks of which a tier is being asked and has time left to answer."""
        return {
            key
            for flight in self.flights
            if flight.transfer.direction is Direction.ASK
            and not flight.is_late
            and flight.epoch == self.epoch
            for key in flight.transfer.keys
        }

    def fetch(self, owner: str, keys: list[BlockKey]) -> None:
        """The common case of a hit at one go: ask, load, lease."""
        for direction in (Direction.ASK, Direction.LOAD):
            self.prefetch(owner, keys)
            for flight in [one for one in self.flights if one.transfer.direction is direction]:
                self.transfer_ends(self.flights.index(flight), [])
        self.lease(owner, keys)
        self.release_owner(owner)

    def lease(self, owner: str, keys: list[BlockKey]) -> None:
        match = self.manager.lookup(keys, self.now)
        lease = self.manager.lease(owner, keys, self.now)
        assert [place.key for place in lease.places] == keys[: match.ready]
        for place in lease.places:
            assert place.generation == self.generations[place.slot]
            assert self.contents[place.slot] == block_bytes(place.key, self.epoch)
        if lease.places:
            self.readers.append(Reader(owner, lease, self.epoch, self.now + LEASE_S))

    def release(self, pick: int) -> None:
        if not self.readers:
            return
        reader = self.readers.pop(pick % len(self.readers))
        self.manager.release(reader.lease.id)

    def release_owner(self, owner: str) -> None:
        self.manager.release_owner(owner)
        self.forget_readers(owner)

    def owner_dies(self, owner: str) -> None:
        self.forget_readers(owner)
        self.writers = [writer for writer in self.writers if writer.owner != owner]
        self.manager.drop_owner_dead(owner)

    def forget_readers(self, owner: str) -> None:
        self.readers = [reader for reader in self.readers if reader.owner != owner]
        self.held.pop(owner, None)

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

    def writer_is_half_way(self, pick: int, which: int) -> None:
        if not self.writers:
            return
        places = self.writers[pick % len(self.writers)].reservation.places
        self.contents[places[which % len(places)].slot][:] = TORN * 4

    def commit(self, pick: int, count: int) -> None:
        if not self.writers:
            return
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

    def save(self, owner: str, keys: list[BlockKey]) -> None:
        """The common case at one go, so that the world gets far."""
        writers = len(self.writers)
        self.reserve(owner, keys)
        if len(self.writers) > writers:
            self.commit(writers, len(keys))

    def abort(self, pick: int) -> None:
        if not self.writers:
            return
        writer = self.writers.pop(pick % len(self.writers))
        self.manager.abort(writer.reservation.id)

    def report_load_failed(self, keys: list[BlockKey]) -> None:
        self.manager.report_load_failed(keys, self.now)
        for key in keys:
            assert self.manager.lookup([key], self.now) == Match(0, 0, (), MissReason.LOAD_FAILED)
            self.waiting.pop(key, None)
            for held in self.held.values():
                held.discard(key)

    def show(self, keys: list[BlockKey]) -> None:
        """An engine waits until others find blocks; meanwhile the shared tier works well."""
        settling = Settling(keys)
        while True:
            transfers = self.manager.settle(settling, self.now)
            assert {(one.tier, one.direction) for one in transfers} <= {("common", Direction.STORE)}
            self.submit(transfers)
            if not settling.waiting:
                break
            stores = [
                flight
                for flight in self.flights
                if (flight.transfer.tier, flight.transfer.direction) == ("common", Direction.STORE)
            ]
            assert stores, "it waits for nothing"
            self.transfer_ends(self.flights.index(stores[0]), [])
        visible = set(keys) - set(settling.lost)
        assert visible <= self.was_common, "others are told of what they cannot find"
        self.shown += len(visible)

    def clear(self) -> None:
        self.epoch += 1
        self.was_common.clear()
        self.good.clear()
        self.held.clear()
        self.waiting.clear()
        for writer in self.writers:
            writer.is_void = True
        self.stored["common"].clear()  # what others put there has other keys from now on
        self.submit(self.manager.clear(self.now))
        assert not any(self.manager.lookup([key], self.now).reachable for key in KEYS)

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

    def tier_is_half_way(self, pick: int) -> None:
        if not self.flights:
            return
        transfer = self.flights[pick % len(self.flights)].transfer
        if transfer.direction is Direction.LOAD:
            for slot in transfer.slots:
                self.contents[slot][:] = TORN * 4

    def transfer_is_late(self, pick: int) -> None:
        if not self.flights:
            return
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

    def transfer_ends(self, pick: int, faults: list[str]) -> None:
        if not self.flights:
            return
        while self.unreported:
            self.tier_reports_eviction()
        flight = self.flights.pop(pick % len(self.flights))
        transfer = flight.transfer
        by_direction = {
            Direction.LOAD: self.tier_loads,
            Direction.STORE: self.tier_stores,
            Direction.DELETE: self.tier_deletes,
            Direction.ASK: self.tier_answers,
        }
        faults = (faults + [""] * len(transfer.keys))[: len(transfer.keys)]
        outcomes = tuple(by_direction[transfer.direction](flight, faults))
        refused = tuple(key for key, fault in zip(transfer.keys, faults, strict=True) if fault == "refuse")
        if transfer.direction is not Direction.LOAD:
            refused = ()
        result = TransferResult(
            transfer, outcomes, True, ("checksum",) * len(refused), refused, duration_s=LOAD_S
        )
        if transfer.direction is Direction.LOAD and flight.epoch == self.epoch:
            self.good.update(
                key for key, found in zip(transfer.keys, outcomes, strict=True) if found is Outcome.OK
            )
        followers = self.manager.on_result(result, self.now)
        if transfer.direction is Direction.LOAD:
            loads = [follower for follower in followers if follower.direction is Direction.LOAD]
            self.promoted += sum(len(one.keys) for one in followers if one.direction is Direction.STORE)
            retried = {key for follower in loads for key in follower.keys}
            for key, outcome in zip(transfer.keys, outcomes, strict=True):
                if key in retried or flight.is_late:
                    continue
                owners = self.stop_waiting(flight, key)
                if outcome is Outcome.OK:
                    for owner in owners & self.held.keys():
                        self.held[owner].add(key)
        self.submit(followers)

    def transfers_end_well(self, picks: list[int]) -> None:
        for pick in picks:
            self.transfer_ends(pick, [])

    def tier_loads(self, flight: Flight, faults: list[str]) -> Iterator[Outcome]:
        transfer = flight.transfer
        for key, slot, fault in zip(transfer.keys, transfer.slots, faults, strict=True):
            found = self.stored[transfer.tier].get(key)
            if fault or found is None:
                self.contents[slot][:] = TORN * 4
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
            if (
                transfer.tier != "common" or flight.epoch == self.epoch
            ):  # else it goes there under another key
                self.stored[transfer.tier].setdefault(key, bytes(self.contents[slot]))
                self.was_common.update([key] if transfer.tier == "common" else [])
            yield Outcome.FAILED if fault else Outcome.OK

    def tier_deletes(self, flight: Flight, faults: list[str]) -> Iterator[Outcome]:
        for key, fault in zip(flight.transfer.keys, faults, strict=True):
            if fault != "fail":
                self.stored[flight.transfer.tier].pop(key, None)
            yield Outcome.FAILED if fault else Outcome.OK

    def tier_answers(self, flight: Flight, faults: list[str]) -> Iterator[Outcome]:
        for key, fault in zip(flight.transfer.keys, faults, strict=True):
            is_held = key in self.stored[flight.transfer.tier]
            self.found_by_asking += is_held and not fault
            yield Outcome.FAILED if fault else Outcome.OK if is_held else Outcome.MISSING

    def tier_evicts(self, tier: str, pick: int) -> None:
        if self.stored[tier]:
            key = sorted(self.stored[tier])[pick % len(self.stored[tier])]
            del self.stored[tier][key]
            if tier != "common":
                self.unreported.append((tier, key))

    def others_store(self, keys: list[BlockKey]) -> None:
        """Another engine computes blocks and puts them into the shared tier."""
        for key in keys:
            self.stored["common"].setdefault(key, block_bytes(key, self.epoch))
            self.was_common.add(key)

    def tier_reports_eviction(self) -> None:
        if not self.unreported:
            return
        tier, key = self.unreported.pop(0)
        self.manager.on_tier_removed(tier, [key])

    def tier_scans(self, count: int) -> None:
        if self.unscanned is None:
            return
        keys, rest = self.unscanned[:count], self.unscanned[count:]
        self.unscanned = rest or None
        there = [key for key in keys if key in self.stored["near"]]
        self.submit(self.manager.on_tier_scanned("near", there, is_complete=not rest))

    def tier_is_switched(self, tier: str, is_available: bool) -> None:
        (self.switched_off.discard if is_available else self.switched_off.add)(tier)
        self.manager.set_tier_available(tier, is_available)

    # What must hold

    def check(self) -> None:
        """Raise AssertionError when a promise is broken."""
        self.leased_bytes_are_right()
        self.only_good_blocks_are_offered()
        self.slots_add_up()
        self.queues_are_bounded()

    def leased_bytes_are_right(self) -> None:
        for reader in self.readers:
            for place in reader.lease.places:
                is_same = self.generations[place.slot] == place.generation
                assert is_same or reader.is_expired, "a leased slot was reused"
                if is_same:
                    assert self.contents[place.slot] == block_bytes(place.key, reader.epoch)

    def only_good_blocks_are_offered(self) -> None:
        found = {key: self.manager.lookup([key], self.now).tiers for key in KEYS}
        visible = {key for key, tiers in found.items() if tiers == (HOST,)}
        assert visible <= self.good
        assert len(visible) <= NUM_SLOTS
        for held in self.held.values():
            assert held <= visible
        for key, tiers in found.items():
            for name in tiers:
                assert name == HOST or self.stored[name].get(key) in (None, block_bytes(key, self.epoch))

    def slots_add_up(self) -> None:
        slots = self.manager.occupancy.slots
        assert slots.free + slots.reserved + slots.committed + slots.quarantined + slots.retired == NUM_SLOTS

    def queues_are_bounded(self) -> None:
        for name in TIERS:
            stores = [
                len(flight.transfer.keys)
                for flight in self.flights
                if flight.transfer.tier == name and flight.transfer.direction is Direction.STORE
            ]
            assert sum(stores) <= QUEUE_BLOCKS

    def settle(self) -> None:
        """Settle everything: nothing may be left, and every slot must be usable again."""
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
        self.lease("last", [key for key in KEYS if self.is_ready(key)])
        self.release_owner("last")
        others = [BlockKey(bytes([100 + number]) * 32) for number in range(NUM_SLOTS)]
        assert len(self.manager.reserve("last", others, self.now).places) == NUM_SLOTS


def _some_prefix(random: Random) -> list[BlockKey]:
    return prefix(random.randrange(2), random.choice((0, 0, 0, 1, 2, 4)), random.randint(1, 5))


def _pick(random: Random) -> int:
    return random.randrange(1 << 16)


def _some_faults(random: Random) -> list[str]:
    return random.choices(FAULTS, k=random.randrange(4))


ACTIONS: tuple[tuple[int, Callable[[World, Random], None]], ...] = (
    (4, lambda w, r: w.lookup(_some_prefix(r))),
    (6, lambda w, r: w.prefetch(r.choice(OWNERS), _some_prefix(r), r.choice(SPEEDS))),
    (6, lambda w, r: w.fetch(r.choice(OWNERS), _some_prefix(r))),
    (4, lambda w, r: w.lease(r.choice(OWNERS), _some_prefix(r))),
    (5, lambda w, r: w.release(_pick(r))),
    (3, lambda w, r: w.release_owner(r.choice(OWNERS))),
    (1, lambda w, r: w.owner_dies(r.choice(OWNERS))),
    (6, lambda w, r: w.save(r.choice(OWNERS), _some_prefix(r))),
    (4, lambda w, r: w.reserve(r.choice(OWNERS), _some_prefix(r))),
    (2, lambda w, r: w.writer_is_half_way(_pick(r), _pick(r))),
    (4, lambda w, r: w.commit(_pick(r), r.randrange(6))),
    (1, lambda w, r: w.abort(_pick(r))),
    (1, lambda w, r: w.report_load_failed(_some_prefix(r)[:1])),
    (2, lambda w, r: w.show(_some_prefix(r))),
    (1, lambda w, r: w.clear()),
    (3, lambda w, r: w.time_passes(r.choice(TIMES_S))),
    (2, lambda w, r: w.tier_is_half_way(_pick(r))),
    (2, lambda w, r: w.transfer_is_late(_pick(r))),
    (6, lambda w, r: w.transfer_ends(_pick(r), _some_faults(r))),
    (6, lambda w, r: w.transfers_end_well([_pick(r) for _ in range(r.randrange(6))])),
    (2, lambda w, r: w.tier_evicts(r.choice(TIERS), _pick(r))),
    (2, lambda w, r: w.others_store(_some_prefix(r))),
    (2, lambda w, r: w.tier_reports_eviction()),
    (2, lambda w, r: w.tier_scans(r.randrange(1, 6))),
    (1, lambda w, r: w.tier_is_switched(r.choice(TIERS), r.random() < 0.7)),
)
"""What can happen, and how often."""


def walk(seed: int, steps: int) -> World:
    """Let a world live at random and settle it; raises AssertionError when a promise is broken."""
    random = Random(seed)
    world = World()
    world.begin(random.choice(sorted(POLICIES)), random.choice((0, 3, len(KEYS))), random.random() < 0.5)
    weights = [weight for weight, _ in ACTIONS]
    for _, action in random.choices(ACTIONS, weights, k=steps):
        action(world, random)
        world.check()
    world.settle()
    return world
