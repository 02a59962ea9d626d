"""Eviction policies: which block gives its slot to the next one.

A policy orders keys and knows nothing of slots, leases or bytes. For prefix caches a parent block is
worth more than its children (without it they can't be used), so whoever drives a policy inserts and
touches the blocks of a prefix last to first; equal treatment then evicts the tail before the head.

Not thread-safe; owned by the manager's (or a tier's) thread. All operations are O(1) amortised.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from kvferry.connector.keys import BlockKey

__all__ = ["LRU", "POLICIES", "S3FIFO", "EvictionPolicy"]


class EvictionPolicy(Protocol):
    """Orders keys by how soon they should go."""

    def insert(self, key: BlockKey) -> None:
        """Take in a key; one that is already there counts as touched."""

    def touch(self, key: BlockKey) -> None:
        """Note a use; unknown keys are ignored."""

    def remove(self, key: BlockKey) -> None:
        """Forget a key, evicted or not; unknown keys are ignored."""

    def victims(self, count: int, is_evictable: Callable[[BlockKey], bool]) -> list[BlockKey]:
        """Propose up to ``count`` distinct evictable keys, the one to go first first.

        Proposed keys stay until the caller removes them. Always terminates; returns fewer only when
        fewer keys are evictable. Keys that are passed over may be treated as used.
        """

    def __len__(self) -> int:
        """Return how many keys are held."""


class LRU:
    """Least recently used first.

    Keys that are passed over because they are in use count as used, so that they don't stand in the
    way of the next search.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[BlockKey, None] = OrderedDict()

    def insert(self, key: BlockKey) -> None:
        """Take in a key as the most recently used."""
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: BlockKey) -> None:
        """Make a key the most recently used."""
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: BlockKey) -> None:
        """Forget a key."""
        self._order.pop(key, None)

    def victims(self, count: int, is_evictable: Callable[[BlockKey], bool]) -> list[BlockKey]:
        """Propose the least recently used evictable keys."""
        chosen: list[BlockKey] = []
        passed: list[BlockKey] = []
        if count > 0:
            for key in self._order:
                if not is_evictable(key):
                    passed.append(key)
                    continue
                chosen.append(key)
                if len(chosen) == count:
                    break
        for key in passed:
            self._order.move_to_end(key)
        return chosen

    def __len__(self) -> int:
        """Return how many keys are held."""
        return len(self._order)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU}
