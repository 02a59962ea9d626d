"""Visibility: blocks that others are about to look for, until a shared tier holds them.

Where an engine prefills for others, what it computed is certain to be looked for once, and soon. So admission
policies and deferred writes do not apply to it: a block that no shared tier holds or is being given is written to
the first one that takes it, and to the next one where that fails. One copy is enough, whatever else is written follows
the tiers' own rules.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvferry.connector.keys import BlockKey
from kvferry.connector.lower import LowerTier, LowerTiers
from kvferry.connector.plan import Transfer
from kvferry.connector.residency import Residency
from kvferry.connector.stores import Stores

__all__ = ["Settling", "Visibility"]


class Settling:
    """A wait for blocks to become visible to others.

    Args:
        keys: The blocks, in the order in which they are wanted.
    """

    def __init__(self, keys: Iterable[BlockKey]) -> None:
        self.waiting: dict[BlockKey, int] = dict.fromkeys(keys, 0)
        """Blocks that are not visible yet, and the tiers (a mask) that were given each of them meanwhile."""
        self.lost: list[BlockKey] = []
        """Blocks that will not become visible: not in the arena any more, or taken by no shared tier."""


class Visibility:
    """Advances such waits.

    Args:
        lower: The tiers.
        residency: Which tier holds what.
        stores: Where stores are planned.
    """

    def __init__(self, lower: LowerTiers, residency: Residency, stores: Stores) -> None:
        self._shared = [tier for tier in lower.all() if tier.is_shared]
        self._residency = residency
        self._stores = stores

    def advance(self, settling: Settling, now: float) -> list[Transfer]:
        """Note what has become visible, and what cannot any more; plan the stores that are still needed.

        Where no tier is shared there is nobody to see anything, and nothing to wait for.
        """
        missing: dict[str, list[BlockKey]] = {}
        for key, tried in list(settling.waiting.items()):
            if self._is_visible(key):
                del settling.waiting[key]
                continue
            given = sum(tier.bit for tier in self._shared if key in tier.storing)
            if given:
                settling.waiting[key] = tried | given
                continue
            tier = self._next(key, tried, now)
            if tier is None:
                del settling.waiting[key]
                settling.lost.append(key)
            else:
                missing.setdefault(tier.name, []).append(key)
        transfers: list[Transfer] = []
        for tier in self._shared:
            stores = self._stores.demanded(tier, missing.get(tier.name, []))
            for key in (key for store in stores for key in store.keys):
                settling.waiting[key] |= tier.bit
            transfers += stores
        return transfers

    def _is_visible(self, key: BlockKey) -> bool:
        return not self._shared or any(self._residency.is_held(key, tier.bit) for tier in self._shared)

    def _next(self, key: BlockKey, tried: int, now: float) -> LowerTier | None:
        """Return the first shared tier that a block could be given."""
        if key not in self._residency.arena:
            return None
        for tier in self._shared:
            if not tier.bit & tried and tier.is_usable and now >= tier.full_until:
                return tier
        return None
