"""Asking: what is known of the blocks that others may have put into shared tiers.

A tier that only this process writes to is known from its scan and its stores. What a shared tier holds has
to be asked: before a request counts on a block, ``contains`` is called in the background, and the answer
is remembered. A block that is there counts as held until a load finds it gone; one that is not there is
not asked for again for a while. Both memories are bounded, and forgetting costs one more question.

Masks stand for tiers as in ``residency``. Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import NamedTuple

from kvferry.connector.keys import BlockKey

__all__ = ["Asking"]


class _Absence(NamedTuple):
    """Tiers that do not hold a block, as far as is known until a time."""

    tiers: int
    until: float


class Asking:
    """Questions to shared tiers and their answers.

    Args:
        shared: Mask of the tiers that have to be asked.
        limit: Blocks per tier that are remembered as held, and blocks that are remembered as absent.
        absent_s: Seconds for which an absent block is not asked for again.
    """

    def __init__(self, shared: int, limit: int, absent_s: float) -> None:
        self._shared = shared
        self._limit = limit
        self._absent_s = absent_s
        self._absent: OrderedDict[BlockKey, _Absence] = OrderedDict()
        self._under_way: dict[BlockKey, int] = {}
        self._held: dict[int, deque[BlockKey]] = {}

    @property
    def is_needed(self) -> bool:
        """False when no tier is shared: there is nothing to ask then."""
        return bool(self._shared)

    def open(self, key: BlockKey, now: float) -> int:
        """Return the mask of shared tiers that may hold a block for all that was heard from them."""
        absence = self._absent.get(key)
        if absence is None or now >= absence.until:
            return self._shared
        return self._shared & ~absence.tiers

    def is_under_way(self, key: BlockKey, tier: int) -> bool:
        """Tell whether the tier with bit ``tier`` is being asked for a block."""
        return bool(self._under_way.get(key, 0) & tier)

    def begin(self, keys: Iterable[BlockKey], tier: int) -> None:
        """Note that a tier is being asked."""
        for key in keys:
            self._under_way[key] = self._under_way.get(key, 0) | tier

    def end(self, keys: Iterable[BlockKey], tier: int) -> None:
        """Note that a question is no longer under way, answered or not."""
        for key in keys:
            left = self._under_way.pop(key, 0) & ~tier
            if left:
                self._under_way[key] = left

    def absent(self, keys: Iterable[BlockKey], tier: int, now: float) -> None:
        """Note that a tier said that it does not hold blocks; one that is not shared needs no memory."""
        for key in keys if tier & self._shared else ():
            known = self._shared & ~self.open(key, now)
            self._absent[key] = _Absence(known | tier, now + self._absent_s)
            self._absent.move_to_end(key)
        while len(self._absent) > self._limit:
            self._absent.popitem(last=False)

    def held(self, keys: Iterable[BlockKey], tier: int) -> list[BlockKey]:
        """Note that a tier holds blocks.

        Returns:
            Blocks to forget instead, the ones that were noted longest ago.
        """
        if not tier & self._shared:
            return []
        noted = self._held.setdefault(tier, deque())
        for key in keys:
            self._absent.pop(key, None)
            noted.append(key)
        return [noted.popleft() for _ in range(len(noted) - self._limit)]

    def clear(self) -> None:
        """Forget every question and every answer."""
        self._absent.clear()
        self._under_way.clear()
        self._held.clear()
