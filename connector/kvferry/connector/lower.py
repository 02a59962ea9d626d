"""The tiers below the arena, as the manager sees them: may they be asked, and how much is under way.

After ``clear`` a tier may still hold old bytes under keys that will be used again. It is asked for
nothing and given nothing until every store that was under way has ended and every delete has worked.
Blocks whose store failed may be there nevertheless, so they are deleted, too.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kvferry.connector.admission import AdmissionPolicy, Always
from kvferry.connector.errors import UsageError
from kvferry.connector.forecast import TierForecast
from kvferry.connector.keys import BlockKey
from kvferry.connector.spill import Spill

__all__ = ["LowerTier", "LowerTierSpec", "LowerTiers"]

MAX_TIERS = 16
MAX_DOUBTFUL = 65536
"""Failed stores that are remembered per tier. Beyond them a clear can't be relied on any more, and the
tier stays out of use after one."""


class LowerTierSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the manager must know about a tier below the arena."""

    name: str
    queue_blocks: int = 256
    """Blocks that may be on their way to it; further stores are shed and counted."""
    has_scan: bool = False
    """True when ``on_tier_scanned`` will be called until ``is_complete``; ``clear`` then also deletes
    what is scanned later."""
    is_shared: bool = False
    """Others may add blocks, so it has to be asked."""
    admission: AdmissionPolicy = msgspec.field(default_factory=Always)
    """Which blocks are worth a write; for this tier alone."""
    is_deferred: bool = False
    """Blocks are written when the arena runs short of room, not at once."""
    is_promoted_to: bool = True
    """Blocks that were loaded from a tier below are stored here."""
    is_always_asked: bool = False
    """Blocks are loaded from it also where the engine is expected to compute them sooner."""


class LowerTier:
    """State of one tier.

    Args:
        spec: What is known about it.
        bit: The mask bit that stands for it.
    """

    def __init__(self, spec: LowerTierSpec, bit: int) -> None:
        self.name = spec.name
        self.bit = bit
        self.is_shared = spec.is_shared
        self.is_promoted_to = spec.is_promoted_to
        self.spill = Spill(spec.admission, spec.is_deferred)
        self.forecast = TierForecast(spec.is_always_asked)
        self.is_available = True
        self.storing: set[BlockKey] = set()
        """Blocks on their way to the tier."""
        self.full_until = 0.0
        """When to offer blocks again after the tier had no room for one."""
        self.is_purging_scan = False
        """What the start-up scan still finds is to be deleted, not indexed."""
        self._queue_blocks = spec.queue_blocks
        self._is_scanned = not spec.has_scan
        self._cleansing: set[int] = set()
        self._undeleted: list[BlockKey] = []
        self._doubtful: set[BlockKey] = set()
        self._is_out_of_use = False
        self._retry_at = 0.0

    @property
    def is_usable(self) -> bool:
        """Whether the tier may be asked and given blocks now."""
        return self.is_available and not self.is_cleansing

    @property
    def is_cleansing(self) -> bool:
        """Whether the tier may still hold blocks that were cleared."""
        return bool(self._cleansing or self._undeleted or self.is_purging_scan or self._is_out_of_use)

    @property
    def room_blocks(self) -> int:
        """How many more blocks may be sent on their way to the tier."""
        return max(0, self._queue_blocks - len(self.storing))

    def await_end(self, transfer_id: int) -> None:
        """Keep the tier from use until a transfer has ended."""
        self._cleansing.add(transfer_id)

    def ended(self, transfer_id: int) -> None:
        """Note that a transfer has ended."""
        self._cleansing.discard(transfer_id)

    def doubt(self, keys: Iterable[BlockKey]) -> None:
        """Note blocks that may be in the tier although it failed to store or to delete them."""
        if len(self._doubtful) <= MAX_DOUBTFUL:
            self._doubtful.update(keys)

    def settle_doubts(self, keys: Iterable[BlockKey]) -> None:
        """Note that it is known again whether the tier holds blocks."""
        self._doubtful.difference_update(keys)

    def clear(self) -> list[BlockKey]:
        """Note that all blocks are forgotten, those not scanned yet included.

        Returns:
            Blocks to delete beside those that the tier is known to hold.
        """
        self.is_purging_scan = not self._is_scanned
        self._is_out_of_use = len(self._doubtful) > MAX_DOUBTFUL
        doubtful, self._doubtful = self._doubtful, set()
        return list(doubtful)

    def scan_ended(self) -> None:
        """Note that the start-up scan is through."""
        self._is_scanned = True
        self.is_purging_scan = False

    def delete_failed(self, keys: Iterable[BlockKey], retry_at: float) -> None:
        """Note blocks that were cleared and could not be deleted."""
        self._undeleted.extend(keys)
        self._retry_at = retry_at

    def take_undeleted(self, now: float) -> list[BlockKey]:
        """Return the blocks whose delete is to be tried again now; the caller awaits the transfers."""
        if not self._undeleted or not self.is_available or now < self._retry_at:
            return []
        keys, self._undeleted = self._undeleted, []
        return keys


class LowerTiers:
    """All tiers below the arena, in the order they are asked.

    Raises:
        UsageError: Two tiers share a name, or there are more than 16.
    """

    def __init__(self, specs: Sequence[LowerTierSpec]) -> None:
        if len({spec.name for spec in specs}) < len(specs) or len(specs) > MAX_TIERS:
            raise UsageError(
                f"tiers need distinct names and there may be {MAX_TIERS}: {[s.name for s in specs]}"
            )
        self._tiers = {spec.name: LowerTier(spec, 1 << index) for index, spec in enumerate(specs)}

    def __getitem__(self, name: str) -> LowerTier:
        """Return a tier by name.

        Raises:
            UsageError: There is no such tier.
        """
        tier = self._tiers.get(name)
        if tier is None:
            raise UsageError(f"there is no tier {name!r} below the arena, only {sorted(self._tiers)}")
        return tier

    def all(self) -> list[LowerTier]:
        """Return the tiers in the order they are asked."""
        return list(self._tiers.values())

    def usable_mask(self) -> int:
        """Return the mask of the tiers that may be used now."""
        return sum(tier.bit for tier in self._tiers.values() if tier.is_usable)
