"""The client: a cache server on this machine, used as if the cache were in this process.

The server owns the blocks and decides about them; this side asks. It has little time for that: an engine's step waits
for answers at most ``answer_budget_s`` in all. What is not answered by then is *not known yet*, which sessions
understand: they ask again in the next step, where the answer that came meanwhile is ready. A server that does not
answer at all, or is gone, is a tier that is down: nothing is offered, nothing waits, requests are computed.

Every lease, reservation and arena handle belongs to one connection. When that ends they are worth nothing: the arena
handle changes, so that workers leave the old mapping, and settling an old grant sends nothing.

Threading: the engine's scheduler thread calls every method; none connects, see ``conversation``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from blake3 import blake3

from kvferry.connector import wire
from kvferry.connector.address import parse_address
from kvferry.connector.arena import ArenaHandle
from kvferry.connector.config import Config
from kvferry.connector.conversation import Conversation
from kvferry.connector.errors import ClosedError
from kvferry.connector.inquiries import Answer, Question
from kvferry.connector.joining import join
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.metrics import Counts
from kvferry.connector.reconnecting import Reconnector
from kvferry.connector.service import HOST, Coming, Lease, Match, MissReason, Reservation, ServiceEvent

__all__ = ["LEASE_BUDGET_S", "ClientService"]

LEASE_BUDGET_S = 0.02
"""Longest wait of a step for its leases: without one, what was offered must be computed after all."""
_MAX_EXCUSED = 1024
_MAX_BLOCK_S = 3600.0
_MAX_NAME = 200
_SETTLING = "settling"
"""Keeps the question apart from one that was sent before the commit, whose answer is of no use."""
_DOWN = Match(0, 0, (), MissReason.TIER_DOWN)
_NOTHING_COMES = Coming(0, MissReason.TIER_DOWN)
_NO_LEASE = Lease(0, ())
_NOT_KNOWN = Match(0, 0, (), MissReason.NOT_ASKED)


class ClientService:
    """Implements ``service.CacheService`` on top of a server's pool.

    Args:
        config: The effective configuration; ``service`` is a ``unix://`` address.
        layout: Geometry of the model's blocks.
        fingerprint: What blocks are keyed under, 32 bytes.
        engine: A name for the server's reports.
        wants_events: Whether ``take_events`` is to return anything.
        clock: Seconds, monotonic.
        logger: Where problems are reported.
        reconnector: Looks for the server, in place of one that does so by ``config.service``.

    Raises:
        KVFerryError: The server refuses this engine, and will until a configuration changes. One that is away is
            waited for in the background.
    """

    def __init__(
        self,
        config: Config,
        layout: BlockLayout,
        fingerprint: bytes,
        engine: str = "",
        wants_events: bool = False,
        clock: Callable[[], float] = time.monotonic,
        logger: logging.Logger | None = None,
        reconnector: Reconnector | None = None,
    ) -> None:
        self._layout = layout
        self._where = config.service
        self._budget_s = config.answer_budget_s
        self._left_s = self._budget_s
        self._lease_left_s = LEASE_BUDGET_S
        self._is_closed = False
        self._reservations: set[int] = set()
        self._excused: dict[tuple[BlockKey, BlockKey], None] = {}
        """First and last block of loads that failed for no fault of the blocks."""
        logger = logger or logging.getLogger(__name__)
        if reconnector is None:
            hello = wire.Hello(
                mode="map",
                fingerprint=fingerprint,
                layout=layout,
                engine=engine[:256],
                wants_events=wants_events,
            )
            address = parse_address(config.service, "service")
            joining = partial(join, address, config.token, config.tls, hello)
            reconnector = Reconnector(joining, logger)
        self._talk = Conversation(self._where, self._budget_s, reconnector, clock, logger)

    @property
    def layout(self) -> BlockLayout:
        """Geometry of the blocks."""
        return self._layout

    @property
    def arena(self) -> ArenaHandle | None:
        """How worker processes map the arena; None while there is no connection."""
        return self._talk.joined.handle if self._talk.joined is not None else None

    @property
    def is_shared(self) -> bool:
        """True: every engine of the server finds what is committed."""
        return True

    @property
    def description(self) -> str:
        """Where blocks are kept, in a few words for a log."""
        if self._talk.joined is None:
            return f"cache server {self._where} (not connected)"
        slots = self._talk.joined.handle.num_slots
        return (
            f"cache server {self._where}: {slots} slots, tiers {', '.join((HOST, *self._talk.joined.tiers))}"
        )

    def lookup(self, keys: Sequence[BlockKey]) -> Match:
        """Tell how much of a prefix is there; ``NOT_ASKED`` when it is not known yet."""
        self._require_open()
        if not self._talk.is_up:
            return _DOWN
        if not keys:
            return Match(0, 0, (), MissReason.NONE)
        keys = keys[: wire.MAX_KEYS]
        answer = self._ask(
            Question.about(wire.Lookup, keys),
            keys,
            lambda number: wire.Lookup(id=number, keys=wire.pack_keys(keys)),
        )
        if isinstance(answer, Match):
            return answer
        return _NOT_KNOWN if self._talk.is_up else _DOWN

    def prefetch(self, owner: str, keys: Sequence[BlockKey], block_s: float | None = None) -> Coming:
        """Have the server bring the prefix; while it has not answered, all of it is coming."""
        self._require_open()
        if not self._talk.is_up or not keys:
            return _NOTHING_COMES
        keys = keys[: wire.MAX_KEYS]
        answer = self._ask(
            Question.about(wire.Prefetch, keys, owner),
            keys,
            lambda number: wire.Prefetch(
                id=number,
                owner=_named(owner),
                keys=wire.pack_keys(keys),
                block_s=None if block_s is None else min(block_s, _MAX_BLOCK_S),
            ),
        )
        if isinstance(answer, Coming):
            return answer
        return Coming(len(keys)) if self._talk.is_up else _NOTHING_COMES

    def lease(self, owner: str, keys: Sequence[BlockKey]) -> Lease:
        """Pin the ready prefix of ``keys``. An answer that does not come within 20 ms is no lease."""
        self._require_open()
        keys = keys[: wire.MAX_KEYS]
        if not keys or not self._talk.is_up:
            self._excuse(keys)
            return _NO_LEASE
        answer, waited_s = self._talk.ask(
            Question.about(wire.Lease, keys, owner),
            keys,
            lambda number: wire.Lease(id=number, owner=_named(owner), keys=wire.pack_keys(keys)),
            self._lease_left_s,
            is_urgent=True,
        )
        self._lease_left_s -= waited_s
        if isinstance(answer, Lease):
            return answer
        self._excuse(keys)
        return _NO_LEASE

    def release(self, lease: Lease) -> None:
        """End a lease. One of an earlier connection ended with it."""
        self._require_open()
        grant = self._talk.grants.untagged(lease.id)
        if grant is not None:
            self._talk.send(wire.Release(lease=grant))
        elif lease.id:
            self._excuse([place.key for place in lease.places])

    def reserve(self, owner: str, keys: Sequence[BlockKey], wait_s: float = 0.0) -> Reservation | None:
        """Hand out slots; None when it is not known yet, also because the server is away."""
        self._require_open()
        if not keys:
            return Reservation(0, ())
        if not self._talk.is_up:
            return None
        answer = self._ask(
            Question.about(wire.Reserve, keys, owner),
            keys,
            lambda number: wire.Reserve(id=number, owner=_named(owner), keys=wire.pack_keys(keys)),
            wait_s,
        )
        if not isinstance(answer, Reservation):
            return None
        if answer.id:
            self._reservations.add(answer.id)
        return answer

    def commit(self, reservation: Reservation, keys: Sequence[BlockKey]) -> None:
        """Make filled blocks visible; of a reservation from an earlier connection nothing becomes visible."""
        self._require_open()
        grant = self._settled(reservation)
        if grant is not None:
            self._talk.inquiries.forget_hints()
            self._talk.send(wire.Commit(reservation=grant, keys=wire.pack_keys(keys)))

    def settle(self, keys: Sequence[BlockKey], deadline_s: float) -> bool:
        """Ask whether the server can find these blocks; it answers after it has taken in what was sent before.

        Other engines of the server find them from then on; what its tiers share with other servers is its own
        affair.
        """
        self._require_open()
        left_s = deadline_s
        for first in range(0, len(keys), wire.MAX_KEYS):
            some = keys[first : first + wire.MAX_KEYS]
            answer, waited_s = self._ask_anew(some, left_s)
            left_s -= waited_s
            if answer is None or answer.reachable < len(some):
                return False
        return True

    def abort(self, reservation: Reservation) -> None:
        """Give back all slots of a reservation, nothing of it becoming visible."""
        self._require_open()
        grant = self._settled(reservation)
        if grant is not None:
            self._talk.send(wire.Abort(reservation=grant))

    def report_load_failed(self, keys: Sequence[BlockKey]) -> None:
        """Have the server not offer these blocks for a while, unless it was the connection that failed."""
        self._require_open()
        if not keys or self._is_excused(keys):
            return
        self._talk.inquiries.forget_hints()
        self._talk.send(wire.Failed(keys=wire.pack_keys(keys[: wire.MAX_KEYS])))

    def release_owner(self, owner: str) -> None:
        """Drop everything prefetched and leased for ``owner``."""
        self._require_open()
        self._talk.send(wire.ReleaseOwner(owner=_named(owner)))

    def poll(self) -> None:
        """Begin a step: take in what has arrived, give back what nobody wanted, watch the connection."""
        self._require_open()
        self._left_s, self._lease_left_s = self._budget_s, LEASE_BUDGET_S
        self._talk.begin_step()

    def has_pending(self) -> bool:
        """Tell whether answers are under way."""
        return bool(self._talk.inquiries.under_way)

    def take_events(self) -> Sequence[ServiceEvent]:
        """Return and forget the events since the last call; the oldest go when nobody asks for long."""
        events = tuple(self._talk.events)
        self._talk.events.clear()
        return events

    def report(self, counts: Counts) -> None:
        """Count how the conversation goes; the server itself tells about blocks and tiers."""
        self._talk.report(counts)

    def clear(self) -> None:
        """Drop what this engine holds. Others' blocks stay: keys of a new epoch keep this engine from them."""
        self._require_open()
        self._talk.inquiries.forget_all()
        self._talk.give_back()
        self._talk.send(wire.Clear())

    def close(self, deadline_s: float) -> None:
        """Leave the server; what this engine had reserved comes back when its workers have ended. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._talk.close()

    def _ask(
        self,
        question: Question,
        keys: Sequence[BlockKey],
        make: Callable[[int], wire.Request],
        wait_s: float = 0.0,
    ) -> Answer | None:
        """Return the answer if it is there or comes before the step's time is spent; None is not known yet.

        Args:
            question: What is asked.
            keys: About which blocks.
            make: Returns the request with a given id.
            wait_s: More than the step's time, where the answer is of no use later.
        """
        most_s = max(self._left_s, wait_s)
        answer, waited_s = self._talk.ask(question, keys, make, most_s, is_urgent=wait_s > 0)
        self._left_s = max(0.0, self._left_s - waited_s)
        return answer

    def _ask_anew(self, keys: Sequence[BlockKey], most_s: float) -> tuple[Match | None, float]:
        """Look blocks up, not satisfied with what was asked before; return also for how long it was waited."""
        if not self._talk.is_up:
            return None, 0.0
        answer, waited_s = self._talk.ask(
            Question.about(wire.Lookup, keys, _SETTLING),
            keys,
            lambda number: wire.Lookup(id=number, keys=wire.pack_keys(keys)),
            most_s,
            is_urgent=True,
        )
        return (answer if isinstance(answer, Match) else None), waited_s

    def _settled(self, reservation: Reservation) -> int | None:
        """Return the server's id of a reservation that is settled now; None when there is nothing to settle."""
        if reservation.id not in self._reservations:
            return None
        self._reservations.discard(reservation.id)
        return self._talk.grants.untagged(reservation.id)

    def _excuse(self, keys: Sequence[BlockKey]) -> None:
        """Remember that the load of these blocks fails, and that it is not for want of the blocks."""
        if keys:
            while len(self._excused) >= _MAX_EXCUSED:
                del self._excused[next(iter(self._excused))]
            self._excused[keys[0], keys[-1]] = None

    def _is_excused(self, keys: Sequence[BlockKey]) -> bool:
        ends = (keys[0], keys[-1])
        is_excused = ends in self._excused
        self._excused.pop(ends, None)
        return is_excused

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the cache service is closed")


def _named(owner: str) -> str:
    """Return how an owner is called on the wire, where names are short; request ids may be anything."""
    if owner.isascii() and len(owner) <= _MAX_NAME:
        return owner
    return blake3(owner.encode(errors="surrogatepass")).hexdigest()
