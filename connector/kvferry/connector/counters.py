"""Running totals of what a service did, for metrics, ``explain`` and tests. Values only."""

from __future__ import annotations

import msgspec

from kvferry.connector.manager import Counters
from kvferry.connector.mover import TierCounters

__all__ = ["ServiceCounters", "TierCounters"]


class ServiceCounters(msgspec.Struct, kw_only=True):
    """A snapshot of everything."""

    decisions: Counters
    """What the manager decided."""
    slots: int
    used_slots: int
    """Slots that are not free."""
    capacity_bytes: int
    host_blocks: int
    host_evictions: int
    leases: int
    """Leases and what prefetching pins."""
    reservations: int
    """Reservations that were not settled, expired ones included."""
    pending_transfers: int
    tiers: dict[str, TierCounters]

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena's slots that are not free."""
        return self.capacity_bytes // max(1, self.slots) * self.used_slots
