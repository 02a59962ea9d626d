"""Which block lies in which record, and which records may be written.

A record is in exactly one state:

    free      may be reserved
    reserved  being written for a key that is not visible yet
    held      the index names it and loads may read it
    leaving   not visible any more; the index is being told, or a load still reads it
    aside     not to be used again until the tier is opened anew (the medium failed there)

    free -> reserved -> held -> leaving -> free

A block that is being read is never evicted, and a record whose block was deleted meanwhile is not
free before its last reader is done: so no load ever sees a record being overwritten.

Pure state: no I/O, no clock, no lock. ``DiskTier`` calls everything under its own lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvferry.connector.keys import BlockKey

if TYPE_CHECKING:
    from kvferry.connector.policy import EvictionPolicy

__all__ = ["Census", "Records"]


class Census(NamedTuple):
    """How many records are in which state."""

    free: int
    reserved: int
    held: int
    leaving: int
    aside: int


class Records:
    """The records of all slabs and the blocks in them.

    Args:
        policy: Decides who leaves; empty, and used by nobody else.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.evictions = 0
        self._policy = policy
        self._free: list[int] = []
        self._announced: dict[BlockKey, int | None] = {}
        self._held: dict[BlockKey, int] = {}
        self._readers: dict[int, int] = {}
        self._leaving: dict[int, bool] = {}
        self._aside: set[int] = set()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[BlockKey]:
        """Iterate over the keys held, least recently stored first."""
        return iter(self._held)

    def census(self) -> Census:
        """Count the records by state."""
        return Census(
            free=len(self._free),
            reserved=sum(record is not None for record in self._announced.values()),
            held=len(self._held),
            leaving=len(self._leaving),
            aside=len(self._aside),
        )

    def has_free(self) -> bool:
        """Tell whether a record is free."""
        return bool(self._free)

    def add_free(self, records: Sequence[int]) -> None:
        """Take in new records that hold nothing; the first of them is used first."""
        self._free.extend(reversed(records))

    def add_held(self, key: BlockKey, record: int) -> None:
        """Take in a record that the index names."""
        self._held[key] = record
        self._policy.insert(key)

    def announce(self, key: BlockKey) -> bool:
        """Claim the storing of ``key``; False when it is held or somebody else is storing it."""
        if key in self._held or key in self._announced:
            return False
        self._announced[key] = None
        return True

    def is_announced(self, key: BlockKey) -> bool:
        """Tell whether somebody is storing ``key``."""
        return key in self._announced

    def reserve(self, key: BlockKey) -> int | None:
        """Return a record to write the announced ``key`` to, or None when none is free."""
        record = self._announced[key]
        if record is None and self._free:
            record = self._announced[key] = self._free.pop()
        return record

    def publish(self, key: BlockKey) -> None:
        """Make an announced block visible; the index names it by now."""
        record = self._announced.pop(key)
        assert record is not None
        self.add_held(key, record)

    def withdraw(self, key: BlockKey, *, is_bad: bool = False) -> None:
        """Give up storing ``key``; its record is free again, or set aside when the medium failed."""
        record = self._announced.pop(key)
        if record is None:
            return
        if is_bad:
            self._aside.add(record)
        else:
            self._free.append(record)

    def pin(self, key: BlockKey) -> int | None:
        """Return the record that holds ``key``, kept as it is until ``unpin``; None when not held."""
        record = self._held.get(key)
        if record is not None:
            self._readers[record] = self._readers.get(record, 0) + 1
            self._policy.touch(key)
        return record

    def unpin(self, record: int) -> None:
        """End one ``pin``."""
        readers = self._readers[record] - 1
        if readers:
            self._readers[record] = readers
            return
        del self._readers[record]
        if self._leaving.get(record):
            self._free_leaving(record)

    def remove(self, key: BlockKey, only: int | None = None) -> int | None:
        """Make ``key`` invisible and return its record, to be settled.

        Returns None, and changes nothing, when the key is not held, or not in the record ``only``.
        """
        record = self._held.get(key)
        if record is None or only not in (None, record):
            return None
        del self._held[key]
        self._policy.remove(key)
        self._leaving[record] = False
        return record

    def evict(self, count: int) -> list[tuple[BlockKey, int]]:
        """Make up to ``count`` blocks invisible, as the policy proposes; their records are to be settled."""
        evicted = []
        for key in self._policy.victims(count, self._is_evictable):
            if self._is_evictable(key):
                record = self.remove(key)
                assert record is not None
                evicted.append((key, record))
        self.evictions += len(evicted)
        return evicted

    def settle(self, record: int, *, is_bad: bool = False) -> None:
        """Let go of a leaving record; the index does not name it any more."""
        if is_bad:
            del self._leaving[record]
            self._aside.add(record)
        elif record in self._readers:
            self._leaving[record] = True
        else:
            self._free_leaving(record)

    def reinstate(self, key: BlockKey, record: int) -> None:
        """Undo a removal that the index did not take; aside if ``key`` is being stored anew."""
        del self._leaving[record]
        if key in self._held or key in self._announced:
            self._aside.add(record)
        else:
            self.add_held(key, record)

    def _free_leaving(self, record: int) -> None:
        del self._leaving[record]
        self._free.append(record)

    def _is_evictable(self, key: BlockKey) -> bool:
        record = self._held.get(key)
        return record is not None and record not in self._readers
