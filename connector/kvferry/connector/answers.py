"""A cache server's answers as the values that sessions understand, each checked against what was asked.

A slot number that is out of the arena, or a count that does not add up, must not get any further: it is a
``WireError``, after which the connection is closed.

Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvferry.connector import wire
from kvferry.connector.errors import WireError
from kvferry.connector.keys import BlockKey
from kvferry.connector.service import Coming, Lease, Match, Place, Reservation

__all__ = ["Grants", "read_coming", "read_lease", "read_match", "read_reservation"]

_GRANT_BITS = 53
_GENERATION_LIMIT = 1 << 64


class Grants(NamedTuple):
    """Leases and reservations of one connection: their ids say which, because the server's repeat."""

    connection: int
    """From 1 on."""
    num_slots: int
    """Of the arena that came with the connection."""

    def tagged(self, grant: int) -> int:
        """Return the id by which this process knows a grant; 0 for none."""
        return self.connection << _GRANT_BITS | grant if grant else 0

    def untagged(self, tagged: int) -> int | None:
        """Return the server's id of a grant; None when it is not of this connection."""
        connection, grant = divmod(tagged, 1 << _GRANT_BITS)
        return grant if connection == self.connection and grant else None


def read_match(reply: wire.Found, keys: Sequence[BlockKey]) -> Match:
    """Return what a lookup found.

    Raises:
        WireError: It cannot be so.
    """
    lengths = [length for _, length in reply.runs]
    _require(0 <= reply.ready <= reply.reachable <= len(keys), reply)
    _require(all(0 < length <= len(keys) for length in lengths) and sum(lengths) == reply.reachable, reply)
    tiers = tuple(name for name, length in reply.runs for _ in range(length))
    return Match(reply.ready, reply.reachable, tiers, reply.missing)


def read_coming(reply: wire.Coming, keys: Sequence[BlockKey]) -> Coming:
    """Return what a prefetch set going.

    Raises:
        WireError: It cannot be so.
    """
    _require(0 <= reply.blocks <= len(keys), reply)
    _require(reply.expected_s is None or 0 <= reply.expected_s < math.inf, reply)
    return Coming(reply.blocks, reply.cut, reply.expected_s)


def read_lease(reply: wire.Leased, keys: Sequence[BlockKey], grants: Grants) -> Lease:
    """Return a lease.

    Raises:
        WireError: It cannot be so.
    """
    _require(len(reply.slots) <= len(keys), reply)
    return Lease(
        grants.tagged(reply.lease),
        _places(reply, reply.lease, keys[: len(reply.slots)], grants),
    )


def read_reservation(reply: wire.Reserved, keys: Sequence[BlockKey], grants: Grants) -> Reservation:
    """Return a reservation.

    Raises:
        WireError: It cannot be so.
    """
    indices = reply.indices
    _require(all(0 <= index < len(keys) for index in indices), reply)
    _require(len(set(indices)) == len(indices) == len(reply.slots), reply)
    own = [keys[index] for index in indices]
    return Reservation(grants.tagged(reply.reservation), _places(reply, reply.reservation, own, grants))


def _places(
    reply: wire.Leased | wire.Reserved, grant: int, keys: Sequence[BlockKey], grants: Grants
) -> tuple[Place, ...]:
    slots, generations = reply.slots, reply.generations
    _require(len(slots) == len(generations) and (bool(grant) or not slots), reply)
    _require(all(0 <= slot < grants.num_slots for slot in slots) and len(set(slots)) == len(slots), reply)
    _require(all(0 <= generation < _GENERATION_LIMIT for generation in generations), reply)
    return tuple(map(Place, keys, slots, generations))


def _require(is_so: bool, reply: wire.Reply) -> None:
    if not is_so:
        raise WireError(f"its {type(reply).__name__} does not fit what was asked")
