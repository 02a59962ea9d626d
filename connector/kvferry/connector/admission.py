"""Admission policies: which blocks are worth a write to a tier.

A block is offered to a tier when it is saved, whenever it is used again while the tier does not hold it,
and when it was loaded from a tier below. The policy says whether to store it then. Each tier has a policy
of its own. A policy is not told the tier's capacity: it counts what the tier holds, and takes that for the
capacity once the tier evicts.

What a policy remembers of a block is its *digest*, 8 bytes of the key: two blocks that share one are
taken for one, which costs a needless write at worst.

Pure state without a clock, deterministic; owned by the manager's thread. All operations are O(1) amortised.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from kvferry.connector.keys import BlockKey

__all__ = ["ADMISSION_POLICIES", "Adaptive", "AdmissionPolicy", "Always", "SecondTouch"]


class AdmissionPolicy(Protocol):
    """Decides about the blocks that are offered to one tier."""

    def admits(self, key: BlockKey) -> bool:
        """Tell whether to store a block that is offered now, and remember the offer.

        Called once per offer; a block is offered again whenever it is used and the tier does not
        hold it. What is admitted may still fail to be stored.
        """

    def hit(self, key: BlockKey) -> None:
        """Note that a block was loaded from the tier."""

    def stored(self, key: BlockKey) -> None:
        """Note that the tier holds a block that it did not hold: stored, or found there."""

    def removed(self, key: BlockKey) -> None:
        """Note that the tier no longer holds a block that it held."""


class Always:
    """Every block is worth a write."""

    def admits(self, key: BlockKey) -> bool:
        """Return True."""
        return True

    def hit(self, key: BlockKey) -> None:
        """Do nothing."""

    def stored(self, key: BlockKey) -> None:
        """Do nothing."""

    def removed(self, key: BlockKey) -> None:
        """Do nothing."""


class SecondTouch:
    """A block is worth a write when it is offered the second time.

    Most blocks are never used again, so most writes are saved. The price is one miss for each block that
    would have been used twice, and all of them where a block's second use comes after its first is
    forgotten: a small tier gains, a large one loses.

    Remembers between ``max(8192, 2 * held)`` and twice as many first offers, at about 90 bytes each.

    Source: the doorkeeper of TinyLFU (Einziger, Friedman, Manes: "TinyLFU: a highly efficient cache
    admission policy", ACM TOS 2017), here two generations of exact digests instead of a Bloom filter; the
    same rule, for the same purpose of sparing flash, is CacheLib's "reject first" (Berg et al., OSDI 2020).
    """

    _LEAST_OFFERS = 8192

    def __init__(self) -> None:
        self._offers = _FirstOffers()
        self._held = 0

    def admits(self, key: BlockKey) -> bool:
        """Tell whether the block was offered before."""
        return self._offers.is_repeated(_digest(key), max(self._LEAST_OFFERS, 2 * self._held))

    def hit(self, key: BlockKey) -> None:
        """Do nothing."""

    def stored(self, key: BlockKey) -> None:
        """Forget the block's offers: the memory is for blocks that the tier does not hold."""
        self._held += 1
        self._offers.forget(_digest(key))

    def removed(self, key: BlockKey) -> None:
        """Remember the block as one that was offered."""
        self._held -= 1
        self._offers.is_repeated(_digest(key), max(self._LEAST_OFFERS, 2 * self._held))

    def __len__(self) -> int:
        """Return how many digests are remembered."""
        return len(self._offers)


class Adaptive:
    """Every block, or only at the second touch: whichever has served this tier's load better of late.

    While the tier grows by what is stored there is room, and everything is admitted. Otherwise it evicts; two
    *shadows* see every use that reaches the tier: LRU lists of digests, without blocks, of the tier's
    capacity. One takes in every block, the other a block's second touch. The rule whose shadow had more
    hits, with the older ones counting less, is followed; it has to be better by a tenth to be changed to, so
    that chance does not make the policy swing, for a tier filled by both rules in turn serves worse than
    by either.

    Of a large tier the shadows see a sample, all uses of one digest in 2, 4, 8 and so on, and are as much
    smaller: the hit rate of a small cache on a sample is about that of the large one on the whole.

    Remembers at most ``max(2048, 4 * held)`` first offers, at about 90 bytes each, and 12,288 digests in
    the shadows, 1.5 MB, whatever the tier's size.

    Sources: admission by evidence from what a cache does not hold is S3-FIFO's and ARC's ghost list (Yang
    et al., SOSP 2023; Megiddo and Modha, FAST 2003); that writes are to be spared where they bring no
    hits is the aim of Flashield (Eisenman et al., NSDI 2019); simulation on a sample of the keys is from
    SHARDS (Waldspurger et al., FAST 2015). The combination is our own.
    """

    _LEAST_OFFERS = 1024
    _SHADOW_BLOCKS = 2048
    """The shadows' largest size; before one would need more, the sample is halved."""
    _MEMORY = 16
    """A hit counts for about so many times as many uses as the shadow has blocks."""
    _MARGIN = 1.1

    def __init__(self) -> None:
        self._offers = _FirstOffers()
        self._held = 0
        self._capacity = 0
        """Blocks held when the tier last evicted one."""
        self._growth = 1.0
        """By how many blocks the tier has grown for each that was stored of late: 1 fills it, 0 is full."""
        self._mask = 0
        """Digests without any of these bits are sampled."""
        self._all = _Shadow()
        self._repeated = _Shadow(_FirstOffers())
        self._admits_all = True

    def admits(self, key: BlockKey) -> bool:
        """Tell whether there is room, the rule is to admit everything, or the block was offered before."""
        digest = _digest(key)
        self._observe(digest)
        is_repeated = self._offers.is_repeated(digest, self._offers_room)
        return is_repeated or self._admits_all or self._growth > 0.5

    def hit(self, key: BlockKey) -> None:
        """Show the use to the shadows."""
        self._observe(_digest(key))

    def stored(self, key: BlockKey) -> None:
        """Count one block more."""
        self._held += 1
        self._offers.forget(_digest(key))
        self._growth += (1 - self._growth) * self._pace

    def removed(self, key: BlockKey) -> None:
        """Learn the tier's capacity, and remember the block as one that was offered."""
        self._capacity = self._held
        self._held -= 1
        self._growth = max(0.0, self._growth - self._pace) if self._held > 0 else 1.0
        self._offers.is_repeated(_digest(key), self._offers_room)

    def __len__(self) -> int:
        """Return how many digests are remembered."""
        return len(self._offers) + len(self._all) + len(self._repeated)

    @property
    def _pace(self) -> float:
        """How much one store or eviction tells: a tier may evict a few dozen blocks at once."""
        return 1 / max(32, self._held // 16)

    @property
    def _offers_room(self) -> int:
        return max(self._LEAST_OFFERS, 2 * max(self._capacity, self._held))

    def _observe(self, digest: int) -> None:
        """Show a use to both shadows, if it is sampled, and see which of them does better."""
        if digest & self._mask:
            return
        capacity = max(1, self._capacity, self._held) // (self._mask + 1)
        if capacity > self._SHADOW_BLOCKS:
            self._mask = 2 * self._mask + 1
            for shadow in (self._all, self._repeated):
                shadow.thin_out(self._mask)
            return
        capacity = max(1, capacity)
        decay = 1 - 1 / (self._MEMORY * capacity)
        for shadow in (self._all, self._repeated):
            shadow.use(digest, capacity, self._offers_room // (self._mask + 1), decay)
        if self._admits_all:
            # With no hits either way the writes are spared.
            self._admits_all = self._repeated.score < self._all.score * self._MARGIN
        else:
            self._admits_all = self._all.score > self._repeated.score * self._MARGIN


class _FirstOffers:
    """A bounded memory of digests in two generations; the older one is dropped when the younger is full."""

    def __init__(self) -> None:
        self._young: set[int] = set()
        self._old: set[int] = set()

    def is_repeated(self, digest: int, room: int) -> bool:
        """Tell whether a digest is remembered, and remember it; a generation has ``room``."""
        if digest in self._young or digest in self._old:
            return True
        if len(self._young) >= room:
            self._old, self._young = self._young, set()
        self._young.add(digest)
        return False

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def forget(self, digest: int) -> None:
        self._young.discard(digest)
        self._old.discard(digest)

    def thin_out(self, mask: int) -> None:
        """Keep the digests without any of the bits of ``mask``."""
        self._young = {digest for digest in self._young if not digest & mask}
        self._old = {digest for digest in self._old if not digest & mask}


class _Shadow:
    """An LRU cache of digests that counts its hits.

    Args:
        offers: Where first touches are remembered; None takes in a block at its first.
    """

    def __init__(self, offers: _FirstOffers | None = None) -> None:
        self.score = 0.0
        self._offers = offers
        self._held: OrderedDict[int, None] = OrderedDict()

    def use(self, digest: int, capacity: int, offers_room: int, decay: float) -> None:
        """Count a hit or take in the block; ``decay`` ages the hits so far."""
        self.score *= decay
        if digest in self._held:
            self.score += 1
            self._held.move_to_end(digest)
            return
        if self._offers is not None:
            if not self._offers.is_repeated(digest, offers_room):
                return
            self._offers.forget(digest)
        self._held[digest] = None
        while len(self._held) > capacity:
            self._held.popitem(last=False)

    def __len__(self) -> int:
        return len(self._held) + (len(self._offers) if self._offers is not None else 0)

    def thin_out(self, mask: int) -> None:
        """Keep the digests without any of the bits of ``mask``."""
        self._held = OrderedDict((digest, None) for digest in self._held if not digest & mask)
        if self._offers is not None:
            self._offers.thin_out(mask)


def _digest(key: BlockKey) -> int:
    return int.from_bytes(key[-8:], "big")


ADMISSION_POLICIES: dict[str, Callable[[], AdmissionPolicy]] = {
    "always": Always,
    "second-touch": SecondTouch,
    "adaptive": Adaptive,
}
"""The policies that kvferry ships, by the name that configuration uses."""
