"""CacheService: the one interface through which engines use kvferry.

``embedded.EmbeddedService`` implements it inside the engine's scheduler process; a client of the
cache server will implement it too. The engine side (``kvferry.engines.session``) sees nothing else.

Threading: one thread, the engine's scheduler, calls every method. None of them blocks on I/O; what
tiers do meanwhile becomes visible at the next ``poll``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from kvferry.connector.arena import ArenaHandle
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout

__all__ = ["HOST", "CacheService", "Lease", "Match", "MissReason", "Place", "Reservation", "ServiceEvent"]

HOST = "host"
"""Name of the host tier, the arena, in every report."""


class MissReason(enum.Enum):
    """Why the first missing block of a prefix is missing."""

    NONE = "none"
    """Nothing is missing."""
    NEVER_STORED = "never_stored"
    EVICTED = "evicted"
    REFUSED = "refused"
    LOAD_FAILED = "load_failed"
    DEADLINE = "deadline"
    TIER_DOWN = "tier_down"
    NO_ROOM = "no_room"
    DISABLED = "disabled"


class Match(NamedTuple):
    """What a lookup found for a prefix of keys."""

    ready: int
    """Leading blocks that are in the arena now."""
    reachable: int
    """Leading blocks that are in the arena or in a tier that could bring them; at least ``ready``."""
    tiers: tuple[str, ...]
    """For each reachable block the tier it would come from (``host`` when ready)."""
    missing: MissReason
    """Why block ``reachable`` is not there."""


class Place(NamedTuple):
    """Where a block lies in the arena.

    The arena's generation of ``slot`` equals ``generation`` for as long as the slot belongs to
    ``key``; a reader checks it before and after copying.
    """

    key: BlockKey
    slot: int
    generation: int


class Lease(msgspec.Struct, frozen=True):
    """A bounded-time promise that blocks stay readable."""

    id: int
    places: tuple[Place, ...]


class Reservation(msgspec.Struct, frozen=True):
    """Slots handed out to be filled; invisible until committed."""

    id: int
    places: tuple[Place, ...]
    """Only blocks that are not held yet and found a slot; may be empty."""


class ServiceEvent(NamedTuple):
    """A block became loadable from a tier, or stopped being so."""

    kind: str
    """``stored`` or ``removed``."""
    tier: str
    keys: tuple[BlockKey, ...]


class CacheService(Protocol):
    """Lookup, lease, reserve and commit over the arena and the tiers below it."""

    @property
    def layout(self) -> BlockLayout:
        """Geometry of the blocks."""

    @property
    def arena(self) -> ArenaHandle:
        """How worker processes map the arena."""

    def lookup(self, keys: Sequence[BlockKey]) -> Match:
        """Tell how much of a prefix is there. No side effect."""

    def prefetch(self, owner: str, keys: Sequence[BlockKey]) -> int:
        """Start bringing the reachable prefix of ``keys`` into the arena and keep it there for ``owner``.

        Idempotent; concurrent prefetches of one block are one load. The blocks are pinned until
        ``release_owner`` or until the lease time has passed.

        Returns:
            How many leading blocks are ready or on their way now; fewer than reachable when the
            arena has no room for all. Waiting for more than these is in vain.
        """

    def lease(self, owner: str, keys: Sequence[BlockKey]) -> Lease:
        """Pin the ready prefix of ``keys``; the lease may cover fewer blocks than asked, even none."""

    def release(self, lease: Lease) -> None:
        """End a lease. Unknown or expired ones are ignored."""

    def reserve(self, owner: str, keys: Sequence[BlockKey]) -> Reservation:
        """Hand out slots for the blocks of ``keys`` that are not held, evicting where allowed."""

    def commit(self, reservation: Reservation, keys: Sequence[BlockKey]) -> None:
        """Make filled blocks visible and start spilling them; the reservation's others are aborted.

        A reservation that has expired is ignored: its slots come back only through this call or
        ``abort``, never to a second owner before it.
        """

    def abort(self, reservation: Reservation) -> None:
        """Give back all slots of a reservation, nothing of it becoming visible."""

    def report_load_failed(self, keys: Sequence[BlockKey]) -> None:
        """Remember for a while that these blocks could not be delivered, and stop offering them."""

    def release_owner(self, owner: str) -> None:
        """Drop everything prefetched and leased for ``owner``; reservations stay until settled."""

    def poll(self) -> None:
        """Take in what the tiers finished, expire leases, start waiting transfers. Call every step."""

    def has_pending(self) -> bool:
        """Tell whether transfers are under way that a later ``poll`` will report."""

    def take_events(self) -> Sequence[ServiceEvent]:
        """Return and forget the events since the last call."""

    def clear(self) -> None:
        """Forget every block in every tier (weights changed). Leased blocks go when released."""

    def close(self, deadline_s: float) -> None:
        """Finish transfers under way for at most ``deadline_s`` seconds and release everything."""
