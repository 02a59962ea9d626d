"""Stores: blocks on their way from the arena into a tier.

``spill`` says which blocks wait for a tier; this module takes as many as the tier's queue has room for,
pins their slots while they are written, and takes in what became of them.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.connector.flights import Flights
from kvferry.connector.keys import BlockKey
from kvferry.connector.lower import LowerTier
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.pool import SlotPool
from kvferry.connector.residency import Residency
from kvferry.connector.spill import Spills
from kvferry.connector.tally import Counters
from kvferry.connector.tier import Outcome

__all__ = ["Stores"]

_ROOM_TO_KEEP = 8
"""Deferred writes begin when fewer than one slot in so many could be handed out without losing any."""


class Stores:
    """Plans stores and takes in what became of them.

    Args:
        pool: The slots.
        residency: Which tier holds what.
        spills: What waits to be stored, in all tiers.
        flights: Where transfers are planned.
        counters: Where blocks that are not stored are counted.
        retry_s: Time for which nothing is offered again to a tier that had no room.
    """

    def __init__(
        self,
        pool: SlotPool,
        residency: Residency,
        spills: Spills,
        flights: Flights,
        counters: Counters,
        retry_s: float,
    ) -> None:
        self._pool = pool
        self._residency = residency
        self._spills = spills
        self._flights = flights
        self._counters = counters
        self._retry_s = retry_s

    def arrived(self, tier: LowerTier, keys: Sequence[BlockKey]) -> list[Transfer]:
        """Offer blocks that are new in the arena to a tier; return the stores that are due at once."""
        wanted = self._not_below(tier, keys)
        if not tier.is_usable:
            self._counters.skipped[tier.name] += len(wanted)
            return []
        tier.spill.offer(wanted)
        if tier.spill.is_deferred:
            return []
        stores = self._plan(tier)
        self._counters.shed[tier.name] += len(tier.spill.take(len(tier.spill.waiting)))
        return stores

    def used(self, tier: LowerTier, keys: Sequence[BlockKey], now: float) -> None:
        """Offer blocks again that are used while the tier does not hold them; they are stored when due."""
        if tier.is_usable and now >= tier.full_until:
            tier.spill.offer(self._not_below(tier, keys))

    def due(self, tiers: Sequence[LowerTier]) -> list[Transfer]:
        """Return the stores whose time has come: deferred ones when the arena runs short of room."""
        is_short = self._is_short_of_room()
        return [
            store
            for tier in tiers
            if tier.spill.waiting and tier.is_usable and (is_short or not tier.spill.is_deferred)
            for store in self._plan(tier)
        ]

    def flush(self, tiers: Sequence[LowerTier]) -> list[Transfer]:
        """Return the stores of whatever waits, as far as the tiers' queues have room."""
        return [store for tier in tiers if tier.is_usable for store in self._plan(tier)]

    def demanded(self, tier: LowerTier, keys: Sequence[BlockKey]) -> list[Transfer]:
        """Return the stores of blocks that are to be there whatever the tier's admission policy says.

        The blocks are in the arena and not on their way to the tier. Those that its queue has no room for now are
        left out.
        """
        keys = keys[: tier.room_blocks]
        tier.spill.forget(keys)
        return self._write(tier, keys)

    def settle(self, tier: LowerTier, transfer: Transfer) -> None:
        """Note that a store is no longer under way."""
        tier.storing.difference_update(transfer.keys)
        for slot in transfer.slots:
            self._pool.unpin(slot)

    def ended(self, tier: LowerTier, transfer: Transfer, result: TransferResult, now: float) -> None:
        """Take in what became of a settled store."""
        outcomes = list(zip(transfer.keys, result.outcomes, strict=True))
        stored = [key for key, outcome in outcomes if outcome is Outcome.OK]
        tier.settle_doubts(stored)
        tier.doubt(key for key, outcome in outcomes if outcome is Outcome.FAILED)
        if Outcome.NO_ROOM in result.outcomes:
            tier.full_until = now + self._retry_s
        self._residency.stored_below(stored, tier.bit)

    def _plan(self, tier: LowerTier) -> list[Transfer]:
        """Plan to store what waits for a tier, as much as its queue has room for."""
        return self._write(tier, tier.spill.take(tier.room_blocks))

    def _write(self, tier: LowerTier, keys: Sequence[BlockKey]) -> list[Transfer]:
        blocks = [(key, self._residency.arena[key]) for key in keys]
        tier.storing.update(key for key, _ in blocks)
        for _, slot in blocks:
            self._pool.pin(slot)
        return self._flights.plan(Direction.STORE, tier.name, blocks)

    def _not_below(self, tier: LowerTier, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Return the blocks that a tier neither holds nor is being given."""
        is_held = self._residency.is_held
        return [key for key in keys if key not in tier.storing and not is_held(key, tier.bit)]

    def _is_short_of_room(self) -> bool:
        unwritten = self._spills.num_unwritten
        spare = self._pool.num_free + self._pool.num_evictable - unwritten
        return unwritten > 0 and spare * _ROOM_TO_KEEP < self._pool.num_slots
