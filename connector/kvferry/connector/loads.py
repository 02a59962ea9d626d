"""Loads: blocks on their way from a tier into the arena.

However many owners wait for a block, it is loaded once. A block that a tier fails to deliver is asked
of the next tier that holds it, into the same slot. A load that passes its deadline is no longer waited
for, but its slot is the tier's until the final report; what arrives then was verified and is used.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from kvferry.connector.flights import Flights
from kvferry.connector.forecast import Cut, worthwhile
from kvferry.connector.host import HostBlocks
from kvferry.connector.keys import BlockKey
from kvferry.connector.leases import Holds
from kvferry.connector.lower import LowerTier, LowerTiers
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.pool import SlotPool
from kvferry.connector.residency import Residency
from kvferry.connector.service import Match, MissReason
from kvferry.connector.tier import Outcome

__all__ = ["LoadEnd", "Loads"]


class LoadEnd(NamedTuple):
    """What came of a load."""

    arrived: list[BlockKey]
    """Blocks that are in the arena now and were not before."""
    retries: list[Transfer]
    """Loads of the others from the next tiers that hold them."""


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
        lower: The tiers; their forecasts are told of every load.
        flights: Where transfers are planned.
        retry_s: Time for which a block is not asked again of a tier that failed to deliver it.
    """

    def __init__(
        self,
        pool: SlotPool,
        host: HostBlocks,
        holds: Holds,
        residency: Residency,
        lower: LowerTiers,
        flights: Flights,
        retry_s: float,
    ) -> None:
        self._pool = pool
        self._host = host
        self._holds = holds
        self._residency = residency
        self._forecasts = {tier.name: tier.forecast for tier in lower.all()}
        self._flights = flights
        self._retry_s = retry_s
        self._awaited: dict[BlockKey, _Awaited] = {}

    def __contains__(self, key: BlockKey) -> bool:
        """Tell whether a block is on its way and still in time."""
        return key in self._awaited

    def __len__(self) -> int:
        """Return how many blocks are on their way and still in time."""
        return len(self._awaited)

    def worthwhile(
        self, owner: str, keys: Sequence[BlockKey], match: Match, block_s: float | None, now: float
    ) -> Cut:
        """Choose how much of a reachable prefix to ask for; all of it where ``block_s`` is not known.

        What was asked for is not given up again: how long to wait for it is the owner's affair.
        """
        if block_s is None or match.ready == match.reachable:
            return Cut(match.reachable, 0, None)
        on_their_way, asked = set(), 0
        for index in range(match.ready, match.reachable):
            awaited = self._awaited.get(keys[index])
            if awaited is not None:
                on_their_way.add(index)
                asked = index + 1 if owner in awaited.owners else asked
        cut = worthwhile(match.tiers, self._forecasts, block_s, now, on_their_way)
        return cut if cut.blocks >= asked else Cut(asked, 0, cut.expected_s)

    def is_answer_worthwhile(
        self, owner: str, keys: Sequence[BlockKey], match: Match, tier: str, block_s: float | None, now: float
    ) -> bool:
        """Tell whether more would be asked for if ``tier`` held all blocks after the reachable ones."""
        rest = len(keys) - match.reachable
        hoped = match._replace(reachable=len(keys), tiers=(*match.tiers, *[tier] * rest))
        return self.worthwhile(owner, keys, hoped, block_s, now).blocks > match.reachable

    def join(self, key: BlockKey, owner: str) -> None:
        """Wait for a block that is on its way already."""
        self._awaited[key].owners.add(owner)

    def start(
        self, owner: str | None, blocks: Sequence[tuple[BlockKey, int, str]], now: float
    ) -> list[Transfer]:
        """Plan loads of blocks, given as key, reserved slot and tier; for no ``owner`` nobody waits."""
        by_tier: dict[str, list[tuple[BlockKey, int]]] = {}
        for key, slot, tier in blocks:
            self._awaited[key] = _Awaited(slot, set() if owner is None else {owner})
            by_tier.setdefault(tier, []).append((key, slot))
        return self._plan(by_tier, now)

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

    def discarded(self, tier: LowerTier, transfer: Transfer, result: TransferResult, now: float) -> None:
        """Take in the final report of a load that nobody may use: the cache was cleared."""
        _learn(tier, result, now)
        for slot in transfer.slots:
            self._pool.free(slot)

    def ended(self, tier: LowerTier, transfer: Transfer, result: TransferResult, now: float) -> LoadEnd:
        """Take in a load's final report, in time or late."""
        _learn(tier, result, now)
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
        admitted = self._host.admit(arrived)
        for key, owners in waiting.items():
            self._pin_for(owners, key, tier.name)
        return LoadEnd([key for key, _ in admitted], self._plan(retries, now))

    def _plan(self, by_tier: Mapping[str, Sequence[tuple[BlockKey, int]]], now: float) -> list[Transfer]:
        loads = [
            load
            for tier, blocks in by_tier.items()
            for load in self._flights.plan(Direction.LOAD, tier, blocks)
        ]
        for load in loads:
            self._forecasts[load.tier].started(len(load.keys), now)
        return loads

    def _is_awaited(self, key: BlockKey, slot: int) -> bool:
        awaited = self._awaited.get(key)
        return awaited is not None and awaited.slot == slot

    def _failed(self, tier: LowerTier, key: BlockKey, outcome: Outcome, is_refused: bool, now: float) -> None:
        if is_refused or outcome is Outcome.MISSING:
            reason = MissReason.REFUSED if is_refused else MissReason.EVICTED
            self._residency.lost_below([key], tier.bit, reason)
            self._residency.asking.absent([key], tier.bit, now)
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


def _learn(tier: LowerTier, result: TransferResult, now: float) -> None:
    delivered = result.outcomes.count(Outcome.OK)
    blocks = len(result.transfer.keys)
    tier.forecast.ended(blocks, result.duration_s, result.queued_s, delivered, now)
