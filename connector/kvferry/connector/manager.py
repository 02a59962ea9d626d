"""The manager: which block is where, and what may happen to it.

``BlockManager`` owns the metadata of the arena's slots and of the tiers below. It does no I/O, starts
no thread and reads no clock: every method is a quick synchronous state change that returns the
transfers somebody (``mover``) has to carry out, and takes the time as an argument.

Owned by one thread. ``now`` is monotonic time in seconds and never goes backwards between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from kvferry.connector.keys import BlockKey
from kvferry.connector.plan import Transfer, TransferResult
from kvferry.connector.policy import EvictionPolicy
from kvferry.connector.service import Lease, Match, Reservation, ServiceEvent

__all__ = ["BlockManager", "Counters", "LowerTierSpec", "ManagerOptions", "Occupancy", "Prefetch"]


class LowerTierSpec(msgspec.Struct, frozen=True):
    """What the manager must know about a tier below the arena."""

    name: str
    queue_blocks: int = 256
    """Blocks that may be on their way to it; further stores are shed and counted."""
    has_scan: bool = False
    """True when ``on_tier_scanned`` will be called until ``is_complete``; ``clear`` then also deletes
    what is scanned later."""


class ManagerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and times."""

    lease_s: float = 60.0
    """Life of leases, prefetch pins and reservations."""
    retry_failed_s: float = 30.0
    """Time for which a block is not asked again of a tier that failed to deliver it."""
    batch_blocks: int = 8
    """Blocks per transfer."""
    remembered_blocks: int = 65536
    """Removed or failed blocks whose reason is remembered."""


class Prefetch(NamedTuple):
    """What a prefetch achieved."""

    coming: int
    """Leading blocks that are ready or on their way."""
    transfers: list[Transfer]
    """LOADs to carry out now."""


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """Totals since the start. Tiers by name, ``host`` among them."""


class Occupancy(msgspec.Struct, frozen=True, kw_only=True):
    """What is held now, for gauges and leak checks."""


class BlockManager:
    """See the module.

    Args:
        num_slots: Slots of the arena.
        policy: Eviction policy of the arena, empty.
        tiers: Tiers below the arena, in the order they are asked.
        options: Limits and times.
        on_generation: Called as ``on_generation(slot, generation)`` before a slot is handed out
            for a new block; publish it in the arena's header.
    """

    def __init__(
        self,
        num_slots: int,
        policy: EvictionPolicy,
        tiers: Sequence[LowerTierSpec] = (),
        options: ManagerOptions = ManagerOptions(),
        on_generation: Callable[[int, int], None] = lambda slot, generation: None,
    ) -> None:
        raise NotImplementedError

    # Lookups and leases

    def lookup(self, keys: Sequence[BlockKey], now: float) -> Match:
        """Tell how much of a prefix is there. Changes nothing but counters."""
        raise NotImplementedError

    def prefetch(self, owner: str, keys: Sequence[BlockKey], now: float) -> Prefetch:
        """Pin the ready blocks of the reachable prefix for ``owner`` and plan loads of the others."""
        raise NotImplementedError

    def lease(self, owner: str, keys: Sequence[BlockKey], now: float) -> Lease:
        """Pin the ready prefix of ``keys`` until released or ``lease_s`` has passed."""
        raise NotImplementedError

    def release(self, lease_id: int) -> None:
        """End a lease; unknown and expired ones are ignored."""
        raise NotImplementedError

    def release_owner(self, owner: str) -> None:
        """Drop the owner's leases and prefetch pins; its reservations stay until settled."""
        raise NotImplementedError

    # Reservations

    def reserve(self, owner: str, keys: Sequence[BlockKey], now: float) -> Reservation:
        """Hand out slots for the blocks that are neither in the arena nor on their way there."""
        raise NotImplementedError

    def commit(self, reservation_id: int, keys: Sequence[BlockKey], now: float) -> list[Transfer]:
        """Make blocks visible in the given order and plan their stores; the rest is aborted.

        Raises:
            LeaseError: Unknown or settled reservation, or a key that is not part of it.
        """
        raise NotImplementedError

    def abort(self, reservation_id: int) -> None:
        """Give back the slots of a reservation; unknown ones are ignored."""
        raise NotImplementedError

    def drop_owner_dead(self, owner: str) -> None:
        """Drop everything of an owner that can no longer read or write, reservations included."""
        raise NotImplementedError

    # What the tiers report

    def on_result(self, result: TransferResult, now: float) -> list[Transfer]:
        """Take in what became of a transfer; may ask for a load from the next tier, or a delete.

        Raises:
            UsageError: The transfer is unknown or was already reported as finished.
        """
        raise NotImplementedError

    def on_tier_removed(self, tier: str, keys: Sequence[BlockKey]) -> None:
        """Note that a tier dropped blocks on its own."""
        raise NotImplementedError

    def on_tier_scanned(self, tier: str, keys: Sequence[BlockKey], is_complete: bool) -> list[Transfer]:
        """Take in a part of a tier's start-up index; ``is_complete`` with the last part."""
        raise NotImplementedError

    def set_tier_available(self, tier: str, is_available: bool) -> None:
        """Switch a tier off (breaker open) or on. Blocks only in switched-off tiers are not offered."""
        raise NotImplementedError

    # Upkeep

    def report_load_failed(self, keys: Sequence[BlockKey], now: float) -> None:
        """Drop the arena's copies and offer these blocks from nowhere for ``retry_failed_s``."""
        raise NotImplementedError

    def clear(self, now: float) -> list[Transfer]:
        """Forget every block in every tier. A tier is not used until its deletes are through."""
        raise NotImplementedError

    def expire(self, now: float) -> list[Transfer]:
        """End leases, pins and reservations whose time is over; repeat deletes that failed."""
        raise NotImplementedError

    def take_events(self) -> list[ServiceEvent]:
        """Return and forget the events since the last call."""
        raise NotImplementedError

    @property
    def counters(self) -> Counters:
        """A snapshot of the totals."""
        raise NotImplementedError

    @property
    def occupancy(self) -> Occupancy:
        """A snapshot of what is held now."""
        raise NotImplementedError
