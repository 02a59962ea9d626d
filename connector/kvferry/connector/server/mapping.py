"""A local engine's side of the server: what its messages do to its pool.

Without I/O: a message in, at most one message out. Everything an engine holds is kept here by connection, so that
nothing outlives it: leases and holds end with the connection, reservations when no process of the engine can write
any more (``index`` finds that out).

Owned by the index thread.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from kvferry.connector import wire
from kvferry.connector.errors import LeaseError, WireError
from kvferry.connector.keys import BlockKey
from kvferry.connector.server.pools import Pool
from kvferry.connector.service import Lease, Reservation

__all__ = ["MAX_GRANTS", "MAX_LEASED", "EngineLedger"]

MAX_GRANTS = 1 << 16
"""Leases, reservations and owners, each, that one connection may hold."""
MAX_LEASED = 1 << 22
"""Blocks in all leases of one connection; a block in several leases counts several times."""


class _Leased(NamedTuple):
    """A lease that was not released."""

    owner: str
    blocks: int


class EngineLedger:
    """Answers one engine and keeps account of what it holds.

    Args:
        pool: The cache of the engine's model.
        name: Unique among all connections; owners in the pool begin with it.
    """

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool = pool
        self._service = pool.service
        self._name = name
        self._owners: dict[str, set[int]] = {}
        """Who may hold something, and its leases."""
        self._leases: dict[int, _Leased] = {}
        self._leased_blocks = 0
        self._reservations: dict[int, Reservation] = {}
        self._void: dict[int, Reservation] = {}
        """Reservations from before a ``Clear``: nothing of them may become visible."""

    def handle(self, message: wire.Request) -> wire.Reply | None:
        """Do what a message asks for.

        Raises:
            WireError: The message does not belong here, or names what this engine does not hold.
        """
        match message:
            case wire.Lookup(id=request, keys=packed):
                return self._lookup(request, wire.unpack_keys(packed))
            case wire.Prefetch(id=request, owner=owner, keys=packed, block_s=block_s):
                coming = self._service.prefetch(self._owner(owner), wire.unpack_keys(packed), block_s)
                return wire.Coming(
                    id=request, blocks=coming.blocks, cut=coming.cut, expected_s=coming.expected_s
                )
            case wire.Lease(id=request, owner=owner, keys=packed):
                return self._lease(request, self._owner(owner), wire.unpack_keys(packed))
            case wire.Reserve(id=request, owner=owner, keys=packed):
                return self._reserve(request, self._prefixed(owner), wire.unpack_keys(packed))
            case wire.Commit(reservation=reservation, keys=packed):
                self._commit(reservation, wire.unpack_keys(packed))
            case wire.Abort(reservation=reservation):
                self._service.abort(self._settle(reservation))
            case wire.Release(lease=lease):
                self._release(lease)
            case wire.ReleaseOwner(owner=owner):
                self._release_owner(self._prefixed(owner))
            case wire.Failed(keys=packed):
                self._service.report_load_failed(wire.unpack_keys(packed))
            case wire.Clear():
                self._clear()
            case wire.Ping(id=request):
                return wire.Pong(id=request)
            case _:
                raise WireError(
                    f"a {type(message).__name__} has no place on a connection that maps the arena"
                )
        return None

    def end(self) -> list[Reservation]:
        """The connection is gone: end its leases and holds; return what its processes may still be writing."""
        for owner in list(self._owners):
            self._release_owner(owner)
        left = [*self._reservations.values(), *self._void.values()]
        self._reservations, self._void = {}, {}
        return left

    def _lookup(self, request: int, keys: list[BlockKey]) -> wire.Found:
        match = self._service.lookup(keys)
        runs = [(tier, len(list(run))) for tier, run in itertools.groupby(match.tiers)]
        return wire.Found(
            id=request, ready=match.ready, reachable=match.reachable, runs=runs, missing=match.missing
        )

    def _lease(self, request: int, owner: str, keys: list[BlockKey]) -> wire.Leased:
        _bound(len(self._leases), MAX_GRANTS, "leases")
        _bound(self._leased_blocks, MAX_LEASED, "leased blocks")
        lease = self._service.lease(owner, keys)
        if lease.id:
            self._leases[lease.id] = _Leased(owner, len(lease.places))
            self._leased_blocks += len(lease.places)
            self._owners[owner].add(lease.id)
        return wire.Leased(
            id=request,
            lease=lease.id,
            slots=[place.slot for place in lease.places],
            generations=[place.generation for place in lease.places],
        )

    def _release(self, lease: int) -> None:
        """End a lease of this connection; one that ended by itself or never was is ignored."""
        leased = self._leases.pop(lease, None)
        if leased is not None:
            self._leased_blocks -= leased.blocks
            self._owners[leased.owner].discard(lease)
            self._service.release(Lease(lease, ()))

    def _reserve(self, request: int, owner: str, keys: list[BlockKey]) -> wire.Reserved:
        _bound(len(self._reservations) + len(self._void), MAX_GRANTS, "reservations")
        reservation = self._service.reserve(owner, keys)
        index_of = {key: index for index, key in enumerate(keys)}
        if reservation.id:
            self._reservations[reservation.id] = reservation
        return wire.Reserved(
            id=request,
            reservation=reservation.id,
            indices=[index_of[place.key] for place in reservation.places],
            slots=[place.slot for place in reservation.places],
            generations=[place.generation for place in reservation.places],
        )

    def _commit(self, reservation_id: int, keys: list[BlockKey]) -> None:
        if reservation_id in self._void:
            self._service.abort(self._settle(reservation_id))
            return
        held = self._reservations.get(reservation_id)
        if held is None:
            raise _unknown(reservation_id)
        try:
            self._service.commit(held, keys)
        except LeaseError as error:
            raise WireError(str(error)) from error
        del self._reservations[reservation_id]

    def _settle(self, reservation_id: int) -> Reservation:
        for held in (self._reservations, self._void):
            if reservation_id in held:
                return held.pop(reservation_id)
        raise _unknown(reservation_id)

    def _clear(self) -> None:
        for owner in list(self._owners):
            self._release_owner(owner)
        self._void.update(self._reservations)
        self._reservations.clear()

    def _release_owner(self, owner: str) -> None:
        for lease in self._owners.pop(owner, ()):
            self._leased_blocks -= self._leases.pop(lease).blocks
        self._service.release_owner(owner)

    def _owner(self, owner: str) -> str:
        prefixed = self._prefixed(owner)
        if prefixed not in self._owners:
            _bound(len(self._owners), MAX_GRANTS, "owners")
            self._owners[prefixed] = set()
        return prefixed

    def _prefixed(self, owner: str) -> str:
        return f"{self._name}/{owner}"


def _bound(held: int, most: int, what: str) -> None:
    if held >= most:
        raise WireError(f"{held} {what} on one connection: release what is no longer needed")


def _unknown(reservation_id: int) -> WireError:
    return WireError(f"reservation {reservation_id} is not this connection's, or was settled before")
