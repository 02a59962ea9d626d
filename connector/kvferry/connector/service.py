"""CacheService: the one interface through which engines use kvferry.

``embedded.EmbeddedService`` implements it inside the engine's scheduler process, ``client.ClientService`` on top
of a cache server. The engine side (``kvferry.engines.session``) sees nothing else.

Threading: one thread, the engine's scheduler, calls every method. None of them waits for a tier, but ``settle``
and ``close``; a client waits for its server at most ``answer_budget_s`` between two calls of ``poll``. What happens
meanwhile becomes visible at the next ``poll``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import msgspec

from kvferry.connector.arena import ArenaHandle
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout

if TYPE_CHECKING:
    from kvferry.connector.metrics import Counts

__all__ = [
    "HOST",
    "CacheService",
    "Coming",
    "Lease",
    "Match",
    "MissReason",
    "Place",
    "Reservation",
    "ServiceEvent",
]

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
    NOT_ASKED = "not_asked"
    """A shared tier has yet to say whether it holds the block; ``prefetch`` asks it."""
    SLOWER = "slower_than_recompute"
    """A tier holds it, but the engine is expected to have computed it sooner."""


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


class Coming(NamedTuple):
    """What a prefetch set going."""

    blocks: int
    """Leading blocks that are ready, on their way or asked for now. Waiting for more is in vain."""
    cut: MissReason = MissReason.NO_ROOM
    """Why no further reachable block is: ``NO_ROOM``, ``SLOWER`` or ``TIER_DOWN``. Without meaning when all are."""
    expected_s: float | None = None
    """Seconds until the whole reachable prefix would have arrived, asked for or not; None when unknown."""


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

    kind: Literal["stored", "removed"]
    tier: str
    keys: tuple[BlockKey, ...]


class CacheService(Protocol):
    """Lookup, lease, reserve and commit over the arena and the tiers below it."""

    @property
    def layout(self) -> BlockLayout:
        """Geometry of the blocks."""

    @property
    def arena(self) -> ArenaHandle | None:
        """How worker processes map the arena; None while there is none to map."""

    @property
    def description(self) -> str:
        """Where blocks are kept, in a few words for a log."""

    @property
    def is_shared(self) -> bool:
        """Whether others find what is committed here."""

    def lookup(self, keys: Sequence[BlockKey]) -> Match:
        """Tell how much of a prefix is there. No side effect."""

    def prefetch(self, owner: str, keys: Sequence[BlockKey], block_s: float | None = None) -> Coming:
        """Start bringing the reachable prefix of ``keys`` into the arena and keep it there for ``owner``.

        Idempotent; concurrent prefetches of one block are one load. The blocks are pinned until
        ``release_owner`` or until the lease time has passed.

        Args:
            owner: Who wants the blocks.
            keys: The prefix.
            block_s: Seconds in which the engine computes a block. Blocks that are expected to take
                longer to arrive are not asked for. None when not known: everything is asked for.

        Returns:
            What is ready or on its way now; less than reachable where the arena has no room for all or
            computing is faster.
        """

    def lease(self, owner: str, keys: Sequence[BlockKey]) -> Lease:
        """Pin the ready prefix of ``keys``; the lease may cover fewer blocks than asked, even none."""

    def release(self, lease: Lease) -> None:
        """End a lease. Unknown or expired ones are ignored."""

    def reserve(self, owner: str, keys: Sequence[BlockKey], wait_s: float = 0.0) -> Reservation | None:
        """Hand out slots for the blocks of ``keys`` that are not held, evicting where allowed.

        Args:
            owner: Who will fill them.
            keys: The blocks.
            wait_s: Seconds that an answer may be waited for even if the step's budget is spent.

        Returns:
            None when it is not known yet: ask again, for the same keys, after the next ``poll``.
        """

    def commit(self, reservation: Reservation, keys: Sequence[BlockKey]) -> None:
        """Make filled blocks visible and start spilling them; the reservation's others are aborted.

        A reservation that has expired is ignored: its slots come back only through this call or
        ``abort``, never to a second owner before it.
        """

    def settle(self, keys: Sequence[BlockKey], deadline_s: float) -> bool:
        """Wait until these committed blocks can be found by whoever shares this cache.

        For an engine that prefills for others, after ``commit`` and before they are told; at most once a step,
        which waits for it.

        Args:
            keys: Blocks, in any order; those of several prompts may be asked for together.
            deadline_s: Longest wait.

        Returns:
            False if some of them cannot be found, for whatever reason; they may still become visible later.
        """

    def abort(self, reservation: Reservation) -> None:
        """Give back all slots of a reservation, nothing of it becoming visible."""

    def report_load_failed(self, keys: Sequence[BlockKey]) -> None:
        """Remember for a while that these blocks could not be delivered, and stop offering them."""

    def release_owner(self, owner: str) -> None:
        """Drop everything prefetched and leased for ``owner``; reservations stay until settled."""

    def poll(self) -> None:
        """Take in what happened meanwhile, expire leases, start waiting transfers. Begins an engine step: call
        it once in each, first."""

    def has_pending(self) -> bool:
        """Tell whether transfers are under way that a later ``poll`` will report."""

    def take_events(self) -> Sequence[ServiceEvent]:
        """Return and forget the events since the last call."""

    def report(self, counts: Counts) -> None:
        """Count what happened since the last call."""

    def clear(self) -> None:
        """Forget every block in every tier (weights changed). Leased blocks go when released.

        Blocks that others share stay, so use keys of a new epoch from now on.
        """

    def close(self, deadline_s: float) -> None:
        """Finish transfers under way for at most ``deadline_s`` seconds and release everything."""
