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


class S3FIFO:
    """Three FIFO queues: a small one for newcomers, a main one, and a ghost list of the evicted.

    A key that is used only once leaves through the small queue and never reaches the main one, so a
    scan does not wash out what is used again and again.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Deviations: the
    policy is not told a capacity, so the small queue's share and the ghost list's bound follow the
    number of keys held; a key taken out of the small queue for any reason leaves a ghost; keys in use
    go back to the end of their queue.
    """

    _SMALL_SHARE = 10
    """The small queue is aimed at one part in so many."""
    _MAX_USES = 3

    def __init__(self) -> None:
        self._small: OrderedDict[BlockKey, int] = OrderedDict()
        self._main: OrderedDict[BlockKey, int] = OrderedDict()
        self._ghosts: OrderedDict[BlockKey, None] = OrderedDict()

    def insert(self, key: BlockKey) -> None:
        """Take in a key: into the main queue when it was evicted not long ago."""
        if key in self._small or key in self._main:
            self.touch(key)
        elif key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: BlockKey) -> None:
        """Count a use, up to three."""
        queue = self._small if key in self._small else self._main
        uses = queue.get(key)
        if uses is not None and uses < self._MAX_USES:
            queue[key] = uses + 1

    def remove(self, key: BlockKey) -> None:
        """Forget a key; one from the small queue is remembered as a ghost."""
        if self._small.pop(key, None) is not None:
            self._ghosts[key] = None
        else:
            self._main.pop(key, None)
        held = len(self._small) + len(self._main)
        while len(self._ghosts) > held:
            self._ghosts.popitem(last=False)

    def victims(self, count: int, is_evictable: Callable[[BlockKey], bool]) -> list[BlockKey]:
        """Propose keys from the small queue while it is above its share, else from the main one."""
        small, main = self._small, self._main
        proposed: list[tuple[OrderedDict[BlockKey, int], BlockKey, int]] = []
        small_left = len(small)
        # Each pass over the main queue takes one use from every key it holds, so these suffice.
        main_left = (self._MAX_USES + 1) * len(self)
        while len(proposed) < count:
            is_small_due = len(small) * self._SMALL_SHARE >= len(small) + len(main) or not main_left
            if small_left and small and (is_small_due or not main):
                small_left -= 1
                queue, (key, uses) = small, small.popitem(last=False)
                if uses > 1:
                    main[key] = 0
                    continue
            elif main_left and main:
                main_left -= 1
                queue, (key, uses) = main, main.popitem(last=False)
                if uses > 0:
                    main[key] = uses - 1
                    continue
            else:
                break
            if is_evictable(key):
                proposed.append((queue, key, uses))
            else:
                queue[key] = uses
        for queue, key, uses in reversed(proposed):
            queue[key] = uses
            queue.move_to_end(key, last=False)
        return [key for _, key, _ in proposed]

    def __len__(self) -> int:
        """Return how many keys are held, ghosts not counted."""
        return len(self._small) + len(self._main)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "s3fifo": S3FIFO}
"""The policies that kvferry ships, by the name that configuration uses."""
