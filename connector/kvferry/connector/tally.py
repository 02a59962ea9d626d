"""What the manager decided so far, and what it holds now. Values only."""

from __future__ import annotations

from collections import Counter

import msgspec

from kvferry.connector.pool import SlotCounts

__all__ = ["Counters", "Occupancy"]


class Counters(msgspec.Struct, kw_only=True):
    """Totals since the start, of decisions; what tiers did with transfers is counted by ``mover``.

    The manager's thread counts in one of these and hands out copies.
    """

    lookup_blocks: int = 0
    """Blocks that lookups asked for; repeated lookups count again."""
    found: Counter[str] = msgspec.field(default_factory=Counter)
    """Of these, blocks that could be delivered, by the tier they would come from."""
    hits: Counter[str] = msgspec.field(default_factory=Counter)
    """Blocks leased, by the tier they came from for this owner; ``host`` when they were there."""
    misses: Counter[str] = msgspec.field(default_factory=Counter)
    """Lookups that ended at a missing block, by ``MissReason``; repeated lookups count again."""
    shed: Counter[str] = msgspec.field(default_factory=Counter)
    """By tier: blocks not stored because too many were on their way to it."""
    skipped: Counter[str] = msgspec.field(default_factory=Counter)
    """By tier: blocks not stored because it was switched off or being cleared."""
    saved: int = 0
    """Blocks that became visible by a commit."""
    evictions: int = 0
    no_room: int = 0
    """Blocks that found no slot, to be saved or to be loaded."""
    duplicates: int = 0
    """Blocks that arrived when they were there already."""
    bad_victims: int = 0
    """Keys that the eviction policy proposed although they can't be evicted."""
    lost_writes: int = 0
    """Deferred writes that never happened because the block had to leave the arena first."""
    expired_leases: int = 0
    expired_holds: int = 0
    expired_reservations: int = 0
    void_commits: int = 0
    """Commits that came after their reservation's end; nothing of them became visible."""

    def snapshot(self) -> Counters:
        """Return a copy that no longer changes."""
        return msgspec.structs.replace(
            self,
            found=Counter(self.found),
            hits=Counter(self.hits),
            misses=Counter(self.misses),
            shed=Counter(self.shed),
            skipped=Counter(self.skipped),
        )


class Occupancy(msgspec.Struct, frozen=True, kw_only=True):
    """What is held now, for gauges and leak checks."""

    slots: SlotCounts
    leases: int
    holds: int
    reservations: int
    void_reservations: int
    """Expired or outdated reservations whose writers have not settled them."""
    loading: int
    """Blocks on their way into the arena for somebody."""
    transfers: int
    blocks_below: int
    """Blocks that at least one tier below holds."""
