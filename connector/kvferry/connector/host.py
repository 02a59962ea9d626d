"""The host tier's blocks: how they enter the arena, and how they leave it.

Joins the slots (``pool``), the index (``residency``) and the eviction policy so that the three always
agree: a block is visible exactly while its slot is committed and the policy knows it.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from kvferry.connector.keys import BlockKey
from kvferry.connector.policy import EvictionPolicy
from kvferry.connector.pool import SlotPool
from kvferry.connector.residency import Residency
from kvferry.connector.service import HOST, MissReason
from kvferry.connector.spill import Spills
from kvferry.connector.tally import Counters

__all__ = ["HostBlocks"]


class HostBlocks:
    """Admits and evicts.

    Args:
        pool: The slots.
        policy: Who is evicted first. What it proposes is checked.
        residency: The index.
        spills: What is still to be written to tiers below; evicted last.
        counters: Where evictions are counted.
    """

    def __init__(
        self,
        pool: SlotPool,
        policy: EvictionPolicy,
        residency: Residency,
        spills: Spills,
        counters: Counters,
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._residency = residency
        self._spills = spills
        self._counters = counters

    def take_slots(self, count: int, spared: Collection[BlockKey] = ()) -> list[int]:
        """Hand out up to ``count`` slots, evicting where allowed; ``spared`` blocks are not evicted."""
        self._make_room(count, spared)
        slots: list[int] = []
        while len(slots) < count:
            slot = self._pool.take()
            if slot is None:
                self._counters.no_room += count - len(slots)
                break
            slots.append(slot)
        return slots

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Note a use of a prefix: last to first, so that its end is evicted before its start."""
        for key in reversed(keys):
            self._policy.touch(key)

    def admit(self, blocks: Sequence[tuple[BlockKey, int]]) -> list[tuple[BlockKey, int]]:
        """Make filled slots visible, in order.

        Args:
            blocks: Keys and their reserved slots.

        Returns:
            Those that were not there already; the others' slots are freed.
        """
        new = []
        for key, slot in blocks:
            if key in self._residency.arena:
                self._counters.duplicates += 1
                self._pool.free(slot)
            else:
                self._pool.commit(slot)
                self._residency.arena[key] = slot
                self._residency.losses.found(key)
                new.append((key, slot))
        for key, _ in reversed(new):
            self._policy.insert(key)
        self._residency.emit("stored", HOST, [key for key, _ in new])
        return new

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Take visible blocks out of the arena; pinned slots come back with their last pin."""
        for key in keys:
            self._policy.remove(key)
            self._pool.retire(self._residency.arena.pop(key))
        self._counters.lost_writes += self._spills.left(keys)
        self._residency.emit("removed", HOST, keys)

    def _make_room(self, count: int, spared: Collection[BlockKey]) -> None:
        """Evict what is short, blocks that wait for a deferred write last."""
        arena, pool, spills = self._residency.arena, self._pool, self._spills

        def may_go(key: BlockKey) -> bool:
            slot = arena.get(key)
            return slot is not None and pool.is_evictable(slot) and key not in spared

        if spills.num_unwritten:
            self._evict(count, lambda key: may_go(key) and not spills.is_unwritten(key))
        self._evict(count, may_go)

    def _evict(self, count: int, is_evictable: Callable[[BlockKey], bool]) -> None:
        """Evict until ``count`` slots are free or nothing evictable is left."""
        needed = min(count - self._pool.num_free, self._pool.num_evictable)
        if needed <= 0:
            return
        proposed = dict.fromkeys(self._policy.victims(needed, is_evictable))
        victims = [key for key in proposed if is_evictable(key)]
        self._counters.bad_victims += len(proposed) - len(victims)
        self._counters.evictions += len(victims)
        self.drop(victims)
        self._residency.note_gone(victims, MissReason.EVICTED)
