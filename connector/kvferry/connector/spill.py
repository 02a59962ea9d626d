"""Spilling: which blocks of the arena go to a tier below, and when.

A block is *offered* to a tier when it becomes visible (saved, or loaded from a tier below) and whenever it
is used again while the tier does not hold it; the tier's admission policy says whether to store it. With
``write = "through"`` it is stored at once. With ``write = "back"`` it waits until the arena runs short of
room, oldest first, and eviction spares it meanwhile for as long as anything else can go.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from kvferry.connector.admission import AdmissionPolicy
from kvferry.connector.keys import BlockKey

__all__ = ["Spill", "Spills"]


class Spill:
    """What waits to be stored in one tier.

    Args:
        admission: Says which blocks are worth a write.
        is_deferred: True for ``write = "back"``.
    """

    def __init__(self, admission: AdmissionPolicy, is_deferred: bool) -> None:
        self.admission = admission
        self.is_deferred = is_deferred
        self.waiting: dict[BlockKey, None] = {}
        """Blocks in the arena that are to be stored, the one that waits longest first."""

    def offer(self, keys: Iterable[BlockKey]) -> None:
        """Let the admission policy decide about blocks that the tier does not hold."""
        for key in keys:
            if key not in self.waiting and self.admission.admits(key):
                self.waiting[key] = None

    def take(self, count: int) -> list[BlockKey]:
        """Return up to ``count`` blocks that waited longest; they no longer wait."""
        keys = list(itertools.islice(self.waiting, count))
        for key in keys:
            del self.waiting[key]
        return keys

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Note that blocks no longer wait, if they did."""
        for key in keys:
            self.waiting.pop(key, None)


class Spills:
    """The tiers' spills together, as the arena's eviction sees them.

    Args:
        spills: One for each tier below the arena.
    """

    def __init__(self, spills: Sequence[Spill]) -> None:
        self._spills = spills
        self._deferred = [spill for spill in spills if spill.is_deferred]

    @property
    def num_unwritten(self) -> int:
        """Blocks that wait for a deferred write; one that waits for two tiers counts twice."""
        return sum(len(spill.waiting) for spill in self._deferred)

    def is_unwritten(self, key: BlockKey) -> bool:
        """Tell whether a deferred write of a block is still to come."""
        return any(key in spill.waiting for spill in self._deferred)

    def left(self, keys: Iterable[BlockKey]) -> int:
        """Note that blocks left the arena; return how many deferred writes are lost with them."""
        lost = 0
        for key in keys:
            for spill in self._spills:
                if key in spill.waiting:
                    del spill.waiting[key]
                    lost += spill.is_deferred
        return lost
