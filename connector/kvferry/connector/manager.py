"""The manager: which block is where, and what may happen to it.

``BlockManager`` owns the metadata of the arena's slots and of the tiers below. It does no I/O, starts
no thread and reads no clock: every method is a quick synchronous state change that returns the
transfers somebody (``mover``) has to carry out, and takes the time as an argument.

The arena includes what it can: a block that a tier below holds may be reserved and committed again,
which brings it back without a load. Parts: ``pool`` (slots), ``residency`` (which block is where),
``host`` (how blocks enter and leave the arena), ``policy`` (who is evicted), ``leases`` (who may touch
which slots, until when), ``lower`` (the tiers below), ``loads`` (blocks coming
from them), ``stores`` (blocks going to them), ``questions`` (what others put into them), ``flights``
(transfers under way), ``visibility`` (blocks that others are to find).

Owned by one thread. ``now`` is monotonic time in seconds and never goes backwards between calls.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from kvferry.connector.asking import Asking
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
from kvferry.connector.questions import Questions
from kvferry.connector.residency import EVERY_TIER, Residency
from kvferry.connector.service import HOST, Coming, Lease, Match, MissReason, Place, Reservation, ServiceEvent
from kvferry.connector.spill import Spills
from kvferry.connector.stores import Stores
from kvferry.connector.tally import Counters, Occupancy
from kvferry.connector.tier import Outcome
from kvferry.connector.visibility import Settling, Visibility

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
    answered_blocks: int = 1 << 18
    """Answers of each shared tier that are remembered."""
    absent_s: float = 2.0
    """Time for which a shared tier is not asked again for a block that it did not hold."""


class Prefetch(NamedTuple):
    """What a prefetch achieved."""

    coming: Coming
    """What is ready or on its way."""
    transfers: list[Transfer]
    """LOADs and ASKs to carry out now."""


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
        shared = sum(tier.bit for tier in self._lower.all() if tier.is_shared)
        self._residency = Residency(
            [spec.name for spec in tiers],
            options.remembered_blocks,
            Asking(shared, options.answered_blocks, options.absent_s),
            [spec.admission for spec in tiers],
        )
        spills = Spills([tier.spill for tier in self._lower.all()])
        self._host = HostBlocks(self._pool, policy, self._residency, spills, self._counters)
        self._leases = Leases(self._pool)
        self._holds = Holds(self._pool)
        self._reservations = Reservations(self._pool)
        self._flights = Flights(options.batch_blocks)
        self._loads = Loads(
            self._pool,
            self._host,
            self._holds,
            self._residency,
            self._lower,
            self._flights,
            options.retry_failed_s,
        )
        self._stores = Stores(
            self._pool, self._residency, spills, self._flights, self._counters, options.retry_failed_s
        )
        self._questions = Questions(self._lower, self._residency, self._flights, options.absent_s)
        self._visibility = Visibility(self._lower, self._residency, self._stores)

    # Lookups and leases

    def lookup(self, keys: Sequence[BlockKey], now: float) -> Match:
        """Tell how much of a prefix is there. Changes nothing but counters."""
        match = self._residency.match(keys, now)
        counters = self._counters
        counters.lookup_blocks += len(keys)
        if match.reachable > match.ready:
            counters.found.update(match.tiers)
        elif match.ready:
            counters.found[HOST] += match.ready
        if match.missing is not MissReason.NONE:
            counters.misses[match.missing.value] += 1
        return match

    def prefetch(
        self, owner: str, keys: Sequence[BlockKey], now: float, block_s: float | None = None
    ) -> Prefetch:
        """Pin the ready blocks of the reachable prefix for ``owner`` and plan loads of the others.

        Where a shared tier may hold what comes next, plan to ask it. Repeating it is cheap and renews the
        pins. The prefix is cut where slots run out, and where computing its rest is expected to be faster
        (``block_s`` seconds a block). A tier's answer is waited for if its blocks could be worth loading.
        """
        match = self._residency.match(keys, now)
        cut = self._loads.worthwhile(owner, keys, match, block_s, now)
        asked = self._questions.plan(keys, match.reachable, now)
        is_open = asked.blocks > 0 and self._loads.is_answer_worthwhile(
            owner, keys, match, asked.tier, block_s, now
        )
        wanted_blocks = match.reachable + asked.blocks if is_open else cut.blocks
        is_cut = wanted_blocks < match.reachable + asked.blocks
        if not match.reachable:
            why = MissReason.SLOWER if is_cut else MissReason.NO_ROOM
            return Prefetch(Coming(wanted_blocks, why), asked.transfers)
        hold = self._holds.renew(owner, now + self._options.lease_s)
        wanted: dict[BlockKey, int] = {}
        for index, key in enumerate(keys[: cut.blocks + cut.probe]):
            slot = self._residency.arena.get(key)
            if slot is not None:
                self._holds.pin(hold, key, slot)
            elif key in self._loads:
                self._loads.join(key, owner)
            else:
                wanted.setdefault(key, index)
        slots = self._host.take_slots(len(wanted))
        indices = list(wanted.values())
        room = indices[len(slots)] if len(slots) < len(indices) else len(keys)
        coming = Coming(
            blocks=min(room, wanted_blocks),
            cut=MissReason.SLOWER if is_cut and cut.blocks <= room else MissReason.NO_ROOM,
            expected_s=cut.expected_s,
        )
        blocks = [
            (keys[index], slot, match.tiers[index]) for index, slot in zip(indices, slots, strict=False)
        ]
        awaited = bisect.bisect_left(indices, cut.blocks)
        loads = self._loads.start(owner, blocks[:awaited], now)
        probe = self._loads.start(None, blocks[awaited:], now)
        return Prefetch(coming, [*loads, *probe, *asked.transfers])

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
        leased = [place.key for place in places]
        self._host.touch(leased)
        for tier in self._lower.all():
            self._stores.used(tier, leased, now)
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

    def is_expected(self, key: BlockKey) -> bool:
        """Tell whether a block is in the arena or on its way there, from a tier or from who reserved it."""
        return key in self._residency.arena or key in self._loads or self._reservations.is_reserved(key)

    def reserve(self, owner: str, keys: Sequence[BlockKey], now: float) -> Reservation:
        """Hand out slots for the blocks that are neither in the arena nor on their way there.

        Short, in prefix order, where there is no room. The blocks of ``keys`` are not evicted for one
        another. ``Reservation(0, ())`` when nothing is needed or nothing is free; there is nothing to
        settle then.
        """
        arena = self._residency.arena
        held = [key for key in keys if key in arena]
        self._host.touch(held)
        wanted = [key for key in dict.fromkeys(keys) if not self.is_expected(key)]
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
        admitted = [key for key, _ in self._host.admit(filled)]
        self._counters.saved += len(admitted)
        return [store for tier in self._lower.all() for store in self._stores.arrived(tier, admitted)]

    def settle(self, settling: Settling, now: float) -> list[Transfer]:
        """Go on with a wait for blocks to become visible to others; plan the stores that this takes."""
        return self._visibility.advance(settling, now)

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
            Loads of failed blocks from the next tier that holds them, stores of loaded blocks in the tiers
            above, and deletes after a clear.

        Raises:
            UsageError: The transfer is unknown or was already reported as finished.
        """
        transfer = self._flights.find(result)
        tier = self._lower[transfer.tier]
        is_load = transfer.direction is Direction.LOAD
        if not result.is_finished:
            if is_load:
                self._loads.late(tier, transfer, now)
            elif transfer.direction is Direction.ASK:
                self._questions.unanswered(tier, transfer.keys, MissReason.DEADLINE, now)
            return []
        is_stale = self._flights.finish(transfer)
        if is_load and not is_stale:
            return self._load_ended(tier, transfer, result, now)
        if is_load:
            self._loads.discarded(tier, transfer, result, now)
            return []
        if transfer.direction is Direction.ASK:
            if not is_stale:
                self._questions.ended(tier, transfer, result, now)
            return []
        if transfer.direction is Direction.DELETE:
            self._delete_ended(tier, transfer, result, now)
            return []
        return self._store_ended(tier, transfer, result, is_stale, now)

    def on_tier_removed(self, tier: str, keys: Sequence[BlockKey]) -> None:
        """Note that a tier dropped blocks on its own.

        To be called before the results of transfers that ended after the blocks were dropped, so that
        a block that was stored again is not taken for gone.
        """
        state = self._lower[tier]
        state.settle_doubts(keys)
        self._residency.lost_below(keys, state.bit, MissReason.EVICTED)

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
        their leases end. Blocks stay in shared tiers, where others use them and where not all are known:
        whoever clears must use other keys from now on.
        """
        self._holds.release_all()
        self._reservations.void_all()
        self._loads.give_up_all()
        self._host.drop(list(self._residency.arena))
        for store in self._flights.make_stale():
            if not self._lower[store.tier].is_shared:
                self._lower[store.tier].await_end(store.id)
        deletes = []
        for tier in self._lower.all():
            keys = self._residency.held_by(tier.bit)
            self._residency.emit("removed", tier.name, keys)
            doubtful = tier.clear()
            if not tier.is_shared:
                deletes += self._plan_deletes(tier, keys + doubtful)
        self._residency.clear()
        self._refresh_usable()
        return deletes

    def expire(self, now: float) -> list[Transfer]:
        """End leases, holds and reservations whose time is over; plan stores and deletes that are due."""
        self._counters.expired_leases += self._leases.expire(now)
        self._counters.expired_holds += self._holds.expire(now)
        self._counters.expired_reservations += self._reservations.expire(now)
        deletes = [
            delete
            for tier in self._lower.all()
            for delete in self._plan_deletes(tier, tier.take_undeleted(now))
        ]
        return deletes + self._stores.due(self._lower.all())

    def flush(self) -> list[Transfer]:
        """Plan the deferred writes, as many as the tiers' queues have room for; none are left when empty."""
        return self._stores.flush(self._lower.all())

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

    def _load_ended(
        self, tier: LowerTier, transfer: Transfer, result: TransferResult, now: float
    ) -> list[Transfer]:
        end = self._loads.ended(tier, transfer, result, now)
        for key, outcome in zip(transfer.keys, result.outcomes, strict=True):
            if outcome is Outcome.OK:
                tier.spill.admission.hit(key)
        above = [other for other in self._lower.all() if other.bit < tier.bit and other.is_promoted_to]
        return [
            *end.retries,
            *(store for other in above for store in self._stores.arrived(other, end.arrived)),
        ]

    def _store_ended(
        self, tier: LowerTier, transfer: Transfer, result: TransferResult, is_stale: bool, now: float
    ) -> list[Transfer]:
        self._stores.settle(tier, transfer)
        if is_stale and tier.is_shared:
            return []
        if is_stale:
            # Whatever the outcome says, the tier may hold some of the old blocks.
            deletes = self._plan_deletes(tier, transfer.keys)
            tier.ended(transfer.id)
            return deletes
        self._stores.ended(tier, transfer, result, now)
        return []

    def _plan_deletes(self, tier: LowerTier, keys: Sequence[BlockKey]) -> list[Transfer]:
        """Plan deletes that must have worked before the tier is used again."""
        deletes = self._flights.plan_slotless(Direction.DELETE, tier.name, keys)
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
