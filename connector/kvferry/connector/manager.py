"""The manager: which block is where, and what may happen to it.

``BlockManager`` owns the metadata of the arena's slots and of the tiers below. It does no I/O, starts
no thread and reads no clock: every method is a quick synchronous state change that returns the
transfers somebody (``mover``) has to carry out, and takes the time as an argument.

The arena includes what it can: a block that a tier below holds may be reserved and committed again,
which brings it back without a load. Parts: ``pool`` (slots), ``residency`` (which block is where),
``host`` (how blocks enter and leave the arena), ``policy`` (who is evicted), ``leases`` (who may touch
which slots, until when), ``lower`` (the tiers below), ``loads`` (blocks coming from them), ``flights``
(transfers under way).

Owned by one thread. ``now`` is monotonic time in seconds and never goes backwards between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from kvferry.connector.errors import LeaseError, short_key
from kvferry.connector.flights import Flights
from kvferry.connector.host import HostBlocks
from kvferry.connector.keys import BlockKey
from kvferry.connector.leases import Holds, Leases, OpenReservation, Reservations
from kvferry.connector.loads import Loads
from kvferry.connector.lower import LowerTier, LowerTiers, LowerTierSpec
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.policy import EvictionPolicy
from kvferry.connector.pool import SlotPool
from kvferry.connector.residency import EVERY_TIER, Residency
from kvferry.connector.service import HOST, Lease, Match, MissReason, Place, Reservation, ServiceEvent
from kvferry.connector.tally import Counters, Occupancy
from kvferry.connector.tier import Outcome

__all__ = ["BlockManager", "Counters", "LowerTierSpec", "ManagerOptions", "Occupancy", "Prefetch"]


class ManagerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and times."""

    lease_s: float = 60.0
    """Life of leases, holds and reservations."""
    retry_failed_s: float = 30.0
    """Time for which a block is not asked again of a tier that failed to deliver it."""
    batch_blocks: int = 8
    """Blocks per load or store."""
    remembered_blocks: int = 65536
    """Removed or failed blocks whose reason is remembered."""


class Prefetch(NamedTuple):
    """What a prefetch achieved."""

    coming: int
    """Leading blocks that are ready or on their way."""
    transfers: list[Transfer]
    """LOADs to carry out now."""


class BlockManager:
    """Decides about blocks; see the module for what it is made of.

    Args:
        num_slots: Slots of the arena.
        policy: Eviction policy of the arena, empty.
        tiers: Tiers below the arena, in the order they are asked.
        options: Limits and times.
        on_generation: Called as ``on_generation(slot, generation)`` before a slot is handed out
            for a new block; publish it in the arena's header.

    Raises:
        UsageError: No slots, or tiers that can't be told apart.
    """

    def __init__(
        self,
        num_slots: int,
        policy: EvictionPolicy,
        tiers: Sequence[LowerTierSpec] = (),
        options: ManagerOptions = ManagerOptions(),
        on_generation: Callable[[int, int], None] = lambda slot, generation: None,
    ) -> None:
        self._options = options
        self._counters = Counters()
        self._pool = SlotPool(num_slots, on_generation)
        self._lower = LowerTiers(tiers)
        self._residency = Residency([spec.name for spec in tiers], options.remembered_blocks)
        self._host = HostBlocks(self._pool, policy, self._residency, self._counters)
        self._leases = Leases(self._pool)
        self._holds = Holds(self._pool)
        self._reservations = Reservations(self._pool)
        self._flights = Flights(options.batch_blocks)
        self._loads = Loads(
            self._pool, self._host, self._holds, self._residency, self._flights, options.retry_failed_s
        )

    # Lookups and leases

    def lookup(self, keys: Sequence[BlockKey], now: float) -> Match:
        """Tell how much of a prefix is there. Changes nothing but counters."""
        match = self._residency.match(keys, now)
        if match.missing is not MissReason.NONE:
            self._counters.misses[match.missing.value] += 1
        return match

    def prefetch(self, owner: str, keys: Sequence[BlockKey], now: float) -> Prefetch:
        """Pin the ready blocks of the reachable prefix for ``owner`` and plan loads of the others.

        Repeating it is cheap and renews the pins. Where slots run out the prefix is cut.
        """
        match = self._residency.match(keys, now)
        if not match.reachable:
            return Prefetch(0, [])
        hold = self._holds.renew(owner, now + self._options.lease_s)
        wanted: dict[BlockKey, int] = {}
        for index, key in enumerate(keys[: match.reachable]):
            slot = self._residency.arena.get(key)
            if slot is not None:
                self._holds.pin(hold, key, slot)
            elif key in self._loads:
                self._loads.join(key, owner)
            else:
                wanted.setdefault(key, index)
        slots = self._host.take_slots(len(wanted))
        indices = list(wanted.values())
        coming = indices[len(slots)] if len(slots) < len(indices) else match.reachable
        blocks = [
            (keys[index], slot, match.tiers[index]) for index, slot in zip(indices, slots, strict=False)
        ]
        return Prefetch(coming, self._loads.start(owner, blocks))

    def lease(self, owner: str, keys: Sequence[BlockKey], now: float) -> Lease:
        """Pin the ready prefix of ``keys`` until released or ``lease_s`` has passed.

        ``Lease(0, ())`` when not even the first block is ready; there is nothing to release then.
        """
        hold = self._holds.get(owner)
        places = []
        for key in keys:
            slot = self._residency.arena.get(key)
            if slot is None:
                break
            places.append(Place(key, slot, self._pool.generation(slot)))
            self._counters.hits[hold.sources.get(key, HOST) if hold else HOST] += 1
        if not places:
            return Lease(0, ())
        self._host.touch([place.key for place in places])
        lease_id = self._leases.add(owner, (place.slot for place in places), now + self._options.lease_s)
        return Lease(lease_id, tuple(places))

    def release(self, lease_id: int) -> None:
        """End a lease; unknown and expired ones are ignored."""
        self._leases.release(lease_id)

    def release_owner(self, owner: str) -> None:
        """Drop the owner's leases and hold; its reservations stay until settled."""
        self._leases.release_owner(owner)
        self._holds.release(owner)

    # Reservations

    def reserve(self, owner: str, keys: Sequence[BlockKey], now: float) -> Reservation:
        """Hand out slots for the blocks that are neither in the arena nor on their way there.

        Short, in prefix order, where there is no room. The blocks of ``keys`` are not evicted for one
        another. ``Reservation(0, ())`` when nothing is needed or nothing is free; there is nothing to
        settle then.
        """
        arena = self._residency.arena
        held = [key for key in keys if key in arena]
        self._host.touch(held)
        wanted = [
            key
            for key in dict.fromkeys(keys)
            if key not in arena and key not in self._loads and not self._reservations.is_reserved(key)
        ]
        slots = self._host.take_slots(len(wanted), frozenset(held))
        self._residency.note_gone(wanted[len(slots) :], MissReason.NO_ROOM)
        if not slots:
            return Reservation(0, ())
        taken = dict(zip(wanted, slots, strict=False))
        places = tuple(Place(key, slot, self._pool.generation(slot)) for key, slot in taken.items())
        return Reservation(self._reservations.add(owner, taken, now + self._options.lease_s), places)

    def commit(self, reservation_id: int, keys: Sequence[BlockKey], now: float) -> list[Transfer]:
        """Make blocks visible in the given order and plan their stores; the rest is aborted.

        A void reservation's slots come back, and nothing of it becomes visible.

        Raises:
            LeaseError: Unknown or settled reservation, or a key that is not part of it; nothing
                was changed.
        """
        if not reservation_id and not keys:
            return []
        reservation = self._unsettled(reservation_id, keys)
        if reservation.is_void:
            self._counters.void_commits += 1
            self._reservations.free(reservation)
            return []
        filled = [(key, reservation.slots[key]) for key in dict.fromkeys(keys)]
        self._reservations.settle(reservation)
        for key in reservation.slots.keys() - set(keys):
            self._pool.free(reservation.slots[key])
        admitted = self._host.admit(filled)
        return [store for tier in self._lower.all() for store in self._plan_stores(tier, admitted)]

    def abort(self, reservation_id: int) -> None:
        """Give back the slots of a reservation; unknown ones are ignored."""
        reservation = self._reservations.get(reservation_id)
        if reservation is not None:
            self._reservations.free(reservation)

    def drop_owner_dead(self, owner: str) -> None:
        """Drop everything of an owner that can no longer read or write, reservations included."""
        self.release_owner(owner)
        self._reservations.free_owner(owner)

    # What the tiers report

    def on_result(self, result: TransferResult, now: float) -> list[Transfer]:
        """Take in what became of a transfer.

        Args:
            result: A report about a transfer that a method of this manager returned.
            now: The time.

        Returns:
            Loads of failed blocks from the next tier that holds them, and deletes after a clear.

        Raises:
            UsageError: The transfer is unknown or was already reported as finished.
        """
        transfer = self._flights.find(result)
        tier = self._lower[transfer.tier]
        is_load = transfer.direction is Direction.LOAD
        if not result.is_finished:
            if is_load:
                self._loads.late(tier, transfer, now)
            return []
        is_stale = self._flights.finish(transfer)
        if is_load and not is_stale:
            return self._loads.ended(tier, transfer, result, now)
        if is_load:
            self._loads.discarded(transfer)
            return []
        if transfer.direction is Direction.DELETE:
            self._delete_ended(tier, transfer, result, now)
            return []
        return self._store_ended(tier, transfer, result, is_stale)

    def on_tier_removed(self, tier: str, keys: Sequence[BlockKey]) -> None:
        """Note that a tier dropped blocks on its own.

        To be called before the results of transfers that ended after the blocks were dropped, so that
        a block that was stored again is not taken for gone.
        """
        self._lower[tier].settle_doubts(keys)
        self._residency.lost_below(keys, self._lower[tier].bit, MissReason.EVICTED)

    def on_tier_scanned(self, tier: str, keys: Sequence[BlockKey], is_complete: bool) -> list[Transfer]:
        """Take in a part of a tier's start-up index; ``is_complete`` with the last part.

        Returns:
            Deletes, where the cache was cleared since the scan began.
        """
        state = self._lower[tier]
        deletes = []
        if state.is_purging_scan:
            deletes = self._plan_deletes(state, keys)
        else:
            self._residency.stored_below(keys, state.bit)
        if is_complete:
            state.scan_ended()
            self._refresh_usable()
        return deletes

    def set_tier_available(self, tier: str, is_available: bool) -> None:
        """Switch a tier off (breaker open) or on. Blocks only in switched-off tiers are not offered."""
        self._lower[tier].is_available = is_available
        self._refresh_usable()

    # Upkeep

    def report_load_failed(self, keys: Sequence[BlockKey], now: float) -> None:
        """Drop the arena's copies and offer these blocks from nowhere for ``retry_failed_s``."""
        until = now + self._options.retry_failed_s
        for key in keys:
            self._residency.losses.failed(key, EVERY_TIER, MissReason.LOAD_FAILED, now, until)
        self._loads.give_up(keys)
        self._host.drop([key for key in dict.fromkeys(keys) if key in self._residency.arena])
        self._residency.note_gone(keys, MissReason.LOAD_FAILED)

    def clear(self, now: float) -> list[Transfer]:
        """Forget every block in every tier. A tier is not used until its deletes are through.

        What is being written or loaded meanwhile never becomes visible; leased slots are freed when
        their leases end. Blocks that others put into a shared tier are not known here and stay: where
        weights change under such a tier, the model's fingerprint has to change.
        """
        self._holds.release_all()
        self._reservations.void_all()
        self._loads.give_up_all()
        self._host.drop(list(self._residency.arena))
        for store in self._flights.make_stale():
            self._lower[store.tier].await_end(store.id)
        deletes = []
        for tier in self._lower.all():
            keys = self._residency.held_by(tier.bit)
            self._residency.emit("removed", tier.name, keys)
            deletes += self._plan_deletes(tier, keys + tier.clear())
        self._residency.clear()
        self._refresh_usable()
        return deletes

    def expire(self, now: float) -> list[Transfer]:
        """End leases, holds and reservations whose time is over; repeat deletes that failed."""
        self._counters.expired_leases += self._leases.expire(now)
        self._counters.expired_holds += self._holds.expire(now)
        self._counters.expired_reservations += self._reservations.expire(now)
        return [
            delete
            for tier in self._lower.all()
            for delete in self._plan_deletes(tier, tier.take_undeleted(now))
        ]

    def take_events(self) -> list[ServiceEvent]:
        """Return and forget the events since the last call; the oldest go when nobody asks for long."""
        return self._residency.take_events()

    @property
    def uncleared_tiers(self) -> list[str]:
        """Tiers that may still hold blocks which ``clear`` forgot."""
        return [tier.name for tier in self._lower.all() if tier.is_cleansing]

    @property
    def counters(self) -> Counters:
        """A snapshot of the totals."""
        return self._counters.snapshot()

    @property
    def occupancy(self) -> Occupancy:
        """A snapshot of what is held now."""
        return Occupancy(
            slots=self._pool.counts(),
            leases=len(self._leases),
            holds=len(self._holds),
            reservations=len(self._reservations),
            void_reservations=self._reservations.num_void,
            loading=len(self._loads),
            transfers=len(self._flights),
            blocks_below=self._residency.blocks_below,
        )

    # Parts

    def _unsettled(self, reservation_id: int, keys: Sequence[BlockKey]) -> OpenReservation:
        reservation = self._reservations.get(reservation_id)
        if reservation is None:
            raise LeaseError(f"reservation {reservation_id} is unknown or was already settled: reserve again")
        for key in keys:
            if key not in reservation.slots:
                raise LeaseError(
                    f"block {short_key(key)} is not part of reservation {reservation_id}: "
                    "commit what was reserved"
                )
        return reservation

    def _refresh_usable(self) -> None:
        self._residency.usable = self._lower.usable_mask()

    def _plan_stores(self, tier: LowerTier, blocks: Sequence[tuple[BlockKey, int]]) -> list[Transfer]:
        wanted = [(key, slot) for key, slot in blocks if not self._residency.is_held(key, tier.bit)]
        if not tier.is_usable:
            self._counters.skipped[tier.name] += len(wanted)
            return []
        taken = wanted[: tier.room_blocks]
        self._counters.shed[tier.name] += len(wanted) - len(taken)
        tier.storing_blocks += len(taken)
        for _, slot in taken:
            self._pool.pin(slot)
        return self._flights.plan(Direction.STORE, tier.name, taken)

    def _store_ended(
        self, tier: LowerTier, transfer: Transfer, result: TransferResult, is_stale: bool
    ) -> list[Transfer]:
        tier.storing_blocks -= len(transfer.keys)
        for slot in transfer.slots:
            self._pool.unpin(slot)
        if is_stale:
            # Whatever the outcome says, the tier may hold some of the old blocks.
            deletes = self._plan_deletes(tier, transfer.keys)
            tier.ended(transfer.id)
            return deletes
        outcomes = list(zip(transfer.keys, result.outcomes, strict=True))
        stored = [key for key, outcome in outcomes if outcome is Outcome.OK]
        tier.settle_doubts(stored)
        tier.doubt(key for key, outcome in outcomes if outcome is Outcome.FAILED)
        self._residency.stored_below(stored, tier.bit)
        return []

    def _plan_deletes(self, tier: LowerTier, keys: Sequence[BlockKey]) -> list[Transfer]:
        """Plan deletes that must have worked before the tier is used again."""
        deletes = self._flights.plan_deletes(tier.name, keys)
        for delete in deletes:
            tier.await_end(delete.id)
        return deletes

    def _delete_ended(self, tier: LowerTier, transfer: Transfer, result: TransferResult, now: float) -> None:
        outcomes = zip(transfer.keys, result.outcomes, strict=True)
        left = [key for key, outcome in outcomes if outcome not in (Outcome.OK, Outcome.MISSING)]
        if left:
            tier.delete_failed(left, now + self._options.retry_failed_s)
        tier.ended(transfer.id)
        self._refresh_usable()
