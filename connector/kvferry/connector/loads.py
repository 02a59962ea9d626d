"""Loads: blocks on their way from a tier into the arena.

However many owners wait for a block, it is loaded once. A block that a tier fails to deliver is asked
of the next tier that holds it, into the same slot. A load that passes its deadline is no longer waited
for, but its slot is the tier's until the final report; what arrives then was verified and is used.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from kvferry.connector.flights import Flights
from kvferry.connector.host import HostBlocks
from kvferry.connector.keys import BlockKey
from kvferry.connector.leases import Holds
from kvferry.connector.lower import LowerTier
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.pool import SlotPool
from kvferry.connector.residency import Residency
from kvferry.connector.service import MissReason
from kvferry.connector.tier import Outcome

__all__ = ["Loads"]


class _Awaited(msgspec.Struct, eq=False):
    """A load that somebody may be waiting for."""

    slot: int
    owners: set[str]


class Loads:
    """Plans loads and takes in what became of them.

    Args:
        pool: The slots.
        host: Where blocks are admitted.
        holds: Where loaded blocks are pinned for those who wait.
        residency: Which tier holds what.
        flights: Where transfers are planned.
        retry_s: Time for which a block is not asked again of a tier that failed to deliver it.
    """

    def __init__(
        self,
        pool: SlotPool,
        host: HostBlocks,
        holds: Holds,
        residency: Residency,
        flights: Flights,
        retry_s: float,
    ) -> None:
        self._pool = pool
        self._host = host
        self._holds = holds
        self._residency = residency
        self._flights = flights
        self._retry_s = retry_s
        self._awaited: dict[BlockKey, _Awaited] = {}

    def __contains__(self, key: BlockKey) -> bool:
        """Tell whether a block is on its way and still in time."""
        return key in self._awaited

    def __len__(self) -> int:
        """Return how many blocks are on their way and still in time."""
        return len(self._awaited)

    def join(self, key: BlockKey, owner: str) -> None:
        """Wait for a block that is on its way already."""
        self._awaited[key].owners.add(owner)

    def start(self, owner: str, blocks: Sequence[tuple[BlockKey, int, str]]) -> list[Transfer]:
        """Plan loads of blocks, given as key, reserved slot and tier."""
        by_tier: dict[str, list[tuple[BlockKey, int]]] = {}
        for key, slot, tier in blocks:
            self._awaited[key] = _Awaited(slot, {owner})
            by_tier.setdefault(tier, []).append((key, slot))
        return self._plan(by_tier)

    def give_up(self, keys: Sequence[BlockKey]) -> None:
        """Stop waiting for blocks; their slots come back with the final reports."""
        for key in keys:
            self._awaited.pop(key, None)

    def give_up_all(self) -> None:
        """Stop waiting for anything."""
        self._awaited.clear()

    def late(self, tier: LowerTier, transfer: Transfer, now: float) -> None:
        """Take in that a load passed its deadline."""
        for key, slot in zip(transfer.keys, transfer.slots, strict=True):
            if self._is_awaited(key, slot):
                del self._awaited[key]
                self._bar(tier, key, MissReason.DEADLINE, now)

    def discarded(self, transfer: Transfer) -> None:
        """Take in the final report of a load that nobody may use: the cache was cleared."""
        for slot in transfer.slots:
            self._pool.free(slot)

    def ended(
        self, tier: LowerTier, transfer: Transfer, result: TransferResult, now: float
    ) -> list[Transfer]:
        """Take in a load's final report, in time or late; return loads from the next tiers."""
        arrived: list[tuple[BlockKey, int]] = []
        waiting: dict[BlockKey, set[str]] = {}
        retries: dict[str, list[tuple[BlockKey, int]]] = {}
        refused = frozenset(result.refused_keys)
        for key, slot, outcome in zip(transfer.keys, transfer.slots, result.outcomes, strict=True):
            awaited = self._awaited.pop(key) if self._is_awaited(key, slot) else None
            if outcome is Outcome.OK and not self._residency.losses.is_barred(key, now):
                arrived.append((key, slot))
                waiting[key] = awaited.owners if awaited else set()
                continue
            if outcome is not Outcome.OK:
                self._failed(tier, key, outcome, key in refused, now)
            retry = self._residency.next_holder(key, now) if awaited else None
            if awaited and retry:
                self._awaited[key] = awaited
                retries.setdefault(retry, []).append((key, slot))
            else:
                self._pool.free(slot)
        self._host.admit(arrived)
        for key, owners in waiting.items():
            self._pin_for(owners, key, tier.name)
        return self._plan(retries)

    def _plan(self, by_tier: Mapping[str, Sequence[tuple[BlockKey, int]]]) -> list[Transfer]:
        return [
            load
            for tier, blocks in by_tier.items()
            for load in self._flights.plan(Direction.LOAD, tier, blocks)
        ]

    def _is_awaited(self, key: BlockKey, slot: int) -> bool:
        awaited = self._awaited.get(key)
        return awaited is not None and awaited.slot == slot

    def _failed(self, tier: LowerTier, key: BlockKey, outcome: Outcome, is_refused: bool, now: float) -> None:
        if is_refused or outcome is Outcome.MISSING:
            reason = MissReason.REFUSED if is_refused else MissReason.EVICTED
            self._residency.lost_below([key], tier.bit, reason)
            if is_refused:
                tier.doubt([key])
        else:
            self._bar(tier, key, MissReason.LOAD_FAILED, now)

    def _bar(self, tier: LowerTier, key: BlockKey, reason: MissReason, now: float) -> None:
        self._residency.losses.failed(key, tier.bit, reason, now, now + self._retry_s)

    def _pin_for(self, owners: Collection[str], key: BlockKey, tier: str) -> None:
        for owner in owners:
            hold = self._holds.get(owner)
            if hold is not None:
                self._holds.pin(hold, key, self._residency.arena[key])
                hold.sources[key] = tier
