"""Leases, holds and reservations: who may read or write which slots, and until when.

A *lease* pins blocks for a copy. A *hold* is what prefetching pins for an owner: it grows while loads
come in and is renewed by each prefetch. A *reservation* gives an owner the right to fill slots. Each
has an owner and an expiry. A reservation that expires becomes void: its slots stay in quarantine until
its writer settles it or is known to be dead.

Every kind lives equally long, so creation (or renewal) order is expiry order and ending the overdue
looks at nothing else. Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import msgspec

from kvferry.connector.keys import BlockKey
from kvferry.connector.pool import SlotPool

__all__ = ["Hold", "Holds", "Leases", "OpenReservation", "Reservations"]


class _Lease(msgspec.Struct, frozen=True):
    owner: str
    slots: tuple[int, ...]
    expires_at: float


class Leases:
    """Leases by id. ``pool`` is where their slots are pinned."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._leases: OrderedDict[int, _Lease] = OrderedDict()
        self._by_owner: dict[str, set[int]] = {}
        self._last_id = 0

    def add(self, owner: str, slots: Iterable[int], expires_at: float) -> int:
        """Pin slots and return the new lease's id, which is never 0."""
        lease = _Lease(owner, tuple(slots), expires_at)
        for slot in lease.slots:
            self._pool.pin(slot)
        self._last_id += 1
        self._leases[self._last_id] = lease
        self._by_owner.setdefault(owner, set()).add(self._last_id)
        return self._last_id

    def release(self, lease_id: int) -> None:
        """End a lease; unknown ones are ignored."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        ids = self._by_owner[lease.owner]
        ids.discard(lease_id)
        if not ids:
            del self._by_owner[lease.owner]
        for slot in lease.slots:
            self._pool.unpin(slot)

    def release_owner(self, owner: str) -> None:
        """End all leases of an owner."""
        for lease_id in list(self._by_owner.get(owner, ())):
            self.release(lease_id)

    def expire(self, now: float) -> int:
        """End the leases that are overdue and return how many."""
        expired = 0
        while self._leases:
            lease_id, lease = next(iter(self._leases.items()))
            if now < lease.expires_at:
                break
            self.release(lease_id)
            expired += 1
        return expired

    def __len__(self) -> int:
        """Return how many leases are held."""
        return len(self._leases)


class Hold(msgspec.Struct, eq=False):
    """What is pinned for one owner by prefetching."""

    expires_at: float
    slots: dict[BlockKey, int] = {}
    sources: dict[BlockKey, str] = {}
    """For blocks that were loaded on this owner's behalf: the tier they came from."""


class Holds:
    """Holds by owner. ``pool`` is where their slots are pinned."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._holds: OrderedDict[str, Hold] = OrderedDict()

    def renew(self, owner: str, expires_at: float) -> Hold:
        """Return the owner's hold, a new one if need be, living until ``expires_at``."""
        hold = self._holds.setdefault(owner, Hold(expires_at))
        hold.expires_at = expires_at
        self._holds.move_to_end(owner)
        return hold

    def get(self, owner: str) -> Hold | None:
        """Return the owner's hold, if there is one."""
        return self._holds.get(owner)

    def pin(self, hold: Hold, key: BlockKey, slot: int) -> None:
        """Keep a block for a hold; once is enough, and a newer slot replaces an older one."""
        held = hold.slots.get(key)
        if held == slot:
            return
        self._pool.pin(slot)
        hold.slots[key] = slot
        if held is not None:
            self._pool.unpin(held)

    def release(self, owner: str) -> None:
        """Drop an owner's hold; unknown owners are ignored."""
        hold = self._holds.pop(owner, None)
        if hold is not None:
            for slot in hold.slots.values():
                self._pool.unpin(slot)

    def release_all(self) -> None:
        """Drop every hold."""
        for owner in list(self._holds):
            self.release(owner)

    def expire(self, now: float) -> int:
        """Drop the holds that are overdue and return how many."""
        expired = 0
        while self._holds:
            owner, hold = next(iter(self._holds.items()))
            if now < hold.expires_at:
                break
            self.release(owner)
            expired += 1
        return expired

    def __len__(self) -> int:
        """Return how many owners have a hold."""
        return len(self._holds)


class OpenReservation(msgspec.Struct, eq=False):
    """A reservation that was not settled yet."""

    id: int
    owner: str
    slots: dict[BlockKey, int]
    expires_at: float
    is_void: bool = False
    """Its time is over or its blocks were forgotten: nothing of it can be committed any more."""


class Reservations:
    """Reservations by id. ``pool`` is where their slots are quarantined and freed."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._valid: OrderedDict[int, OpenReservation] = OrderedDict()
        self._void: dict[int, OpenReservation] = {}
        self._keys: set[BlockKey] = set()
        self._last_id = 0

    def add(self, owner: str, slots: Mapping[BlockKey, int], expires_at: float) -> int:
        """Take in slots that were handed out to ``owner`` and return the new id, which is never 0."""
        self._last_id += 1
        self._valid[self._last_id] = OpenReservation(self._last_id, owner, dict(slots), expires_at)
        self._keys.update(slots)
        return self._last_id

    def get(self, reservation_id: int) -> OpenReservation | None:
        """Return a reservation that was not settled, valid or void."""
        return self._valid.get(reservation_id) or self._void.get(reservation_id)

    def is_reserved(self, key: BlockKey) -> bool:
        """Tell whether a valid reservation covers a block."""
        return key in self._keys

    def settle(self, reservation: OpenReservation) -> None:
        """Forget a reservation; what becomes of its slots is the caller's business."""
        if self._valid.pop(reservation.id, None) is not None:
            self._keys.difference_update(reservation.slots)
        self._void.pop(reservation.id, None)

    def free(self, reservation: OpenReservation) -> None:
        """Settle a reservation whose writer has stopped, freeing its slots."""
        self.settle(reservation)
        for slot in reservation.slots.values():
            self._pool.free(slot)

    def free_owner(self, owner: str) -> None:
        """Free everything of an owner that is dead and writes no more."""
        for reservation in [*self._valid.values(), *self._void.values()]:
            if reservation.owner == owner:
                self.free(reservation)

    def expire(self, now: float) -> int:
        """Void the reservations that are overdue and return how many."""
        expired = 0
        while self._valid:
            reservation = next(iter(self._valid.values()))
            if now < reservation.expires_at:
                break
            self._void_one(reservation)
            expired += 1
        return expired

    def void_all(self) -> None:
        """Void every reservation: what is being written must not become visible."""
        for reservation in list(self._valid.values()):
            self._void_one(reservation)

    def _void_one(self, reservation: OpenReservation) -> None:
        self.settle(reservation)
        reservation.is_void = True
        self._void[reservation.id] = reservation
        for slot in reservation.slots.values():
            self._pool.quarantine(slot)

    @property
    def num_void(self) -> int:
        """How many void reservations still wait for their writers."""
        return len(self._void)

    def __len__(self) -> int:
        """Return how many valid reservations there are."""
        return len(self._valid)
