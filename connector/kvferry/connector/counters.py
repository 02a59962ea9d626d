"""Running totals of what a service did, for metrics, ``explain`` and tests. Values only."""

from __future__ import annotations

import msgspec

from kvferry.connector.manager import Counters

__all__ = ["ServiceCounters", "TierCounters"]


class TierCounters(msgspec.Struct, kw_only=True):
    """Totals of one tier since the start. Owned by the service's thread."""

    loaded_blocks: int = 0
    loaded_bytes: int = 0
    load_batches: int = 0
    load_seconds: float = 0.0
    missing_loads: int = 0
    """Blocks the tier was thought to hold and did not."""
    failed_loads: int = 0
    """Blocks not delivered, refused ones included."""
    refused: dict[str, int] = {}
    """Blocks whose bytes were refused, by reason; part of ``failed_loads``."""
    stored_blocks: int = 0
    stored_bytes: int = 0
    store_batches: int = 0
    store_seconds: float = 0.0
    no_room_stores: int = 0
    """Blocks the tier itself had no room for."""
    failed_stores: int = 0
    shed_stores: int = 0
    """Blocks not stored because too many waited already, the breaker was open or the tier was being
    cleared."""
    deleted_blocks: int = 0
    removed_blocks: int = 0
    """Blocks the tier dropped on its own."""
    late_transfers: int = 0
    """Transfers that passed their deadline."""
    queued_blocks: int = 0
    breaker: str = "closed"
    blocks: int = 0
    used_bytes: int = 0
    capacity_bytes: int | None = None
    evictions: int = 0


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
