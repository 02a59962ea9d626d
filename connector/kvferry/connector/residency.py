"""Residency: which block is in the arena, which tiers below hold it, and why a missing one is missing.

Every change of these is an event.

Two dictionaries rather than a record per block: ``arena`` maps a key to its slot, ``holders`` maps a
key to a bit mask of the tiers below. Small masks are shared integers, so a block that only lies below
costs one dictionary entry and its key.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

from kvferry.connector.admission import AdmissionPolicy
from kvferry.connector.asking import Asking
from kvferry.connector.keys import BlockKey
from kvferry.connector.service import HOST, Match, MissReason, ServiceEvent

__all__ = ["EVERY_TIER", "Losses", "Residency"]

_Note = TypeVar("_Note")

EVERY_TIER = -1
"""Mask of all tiers."""

_MAX_EVENTS = 65536


class _Failure(NamedTuple):
    """Tiers that shall not be asked for a block for a while."""

    tiers: int
    until: float
    reason: MissReason


class Losses:
    """Remembers, for a bounded number of blocks, why they can't be had.

    Args:
        limit: Blocks of each kind that are remembered; the oldest are forgotten first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._gone: OrderedDict[BlockKey, MissReason] = OrderedDict()
        self._failures: OrderedDict[BlockKey, _Failure] = OrderedDict()

    def gone(self, key: BlockKey, reason: MissReason) -> None:
        """Note why a block is no longer held anywhere, or never came to be."""
        _put(self._gone, key, reason, self._limit)

    def failed(self, key: BlockKey, tiers: int, reason: MissReason, now: float, until: float) -> None:
        """Bar a block from being asked of ``tiers`` (a mask) until ``until``."""
        tiers |= self.barred(key, now)
        _put(self._failures, key, _Failure(tiers, until, reason), self._limit)

    def found(self, key: BlockKey) -> None:
        """Forget everything about a block: there is a good copy."""
        self._gone.pop(key, None)
        self._failures.pop(key, None)

    def barred(self, key: BlockKey, now: float) -> int:
        """Return the mask of tiers that shall not be asked for a block now."""
        failure = self._failures.get(key)
        return failure.tiers if failure is not None and now < failure.until else 0

    def reason(self, key: BlockKey, now: float) -> MissReason:
        """Return why a block that no tier holds is missing, or why it is barred."""
        failure = self._failures.get(key)
        if failure is not None and now < failure.until:
            return failure.reason
        return self._gone.get(key, MissReason.NEVER_STORED)

    def is_barred(self, key: BlockKey, now: float) -> bool:
        """Tell whether a block shall be asked of no tier at all now."""
        return self.barred(key, now) == EVERY_TIER

    @property
    def has_failures(self) -> bool:
        """False when nothing is barred, without looking at keys."""
        return bool(self._failures)

    def __len__(self) -> int:
        """Return how many notes are kept."""
        return len(self._gone) + len(self._failures)

    def clear(self) -> None:
        """Forget everything."""
        self._gone.clear()
        self._failures.clear()


class Residency:
    """The index. ``arena`` is written by ``host``, ``usable`` by the manager, the rest through methods.

    Args:
        tiers: Names of the tiers below the arena, in the order they are asked; bit i of a mask
            stands for tier i.
        remembered_blocks: See :class:`Losses`.
        asking: What is known of shared tiers.
        admissions: Each tier's admission policy, which is told what the tier is counted to hold.
    """

    def __init__(
        self,
        tiers: Sequence[str],
        remembered_blocks: int,
        asking: Asking,
        admissions: Sequence[AdmissionPolicy],
    ) -> None:
        self.arena: dict[BlockKey, int] = {}
        """Slot of every block that is visible in the arena."""
        self.usable = (1 << len(tiers)) - 1
        """Mask of the tiers that may be asked now."""
        self.losses = Losses(remembered_blocks)
        self.asking = asking
        self._holders: dict[BlockKey, int] = {}
        self._names = {1 << index: name for index, name in enumerate(tiers)}
        self._admissions = {1 << index: policy for index, policy in enumerate(admissions)}
        self._events: deque[ServiceEvent] = deque(maxlen=_MAX_EVENTS)

    def match(self, keys: Sequence[BlockKey], now: float) -> Match:
        """Return how much of a prefix is there; see ``service.Match``."""
        arena = self.arena
        ready = 0
        for key in keys:
            if key not in arena:
                break
            ready += 1
        if ready == len(keys):
            return Match(ready, ready, (HOST,) * ready, MissReason.NONE)
        return self._match_below(keys, ready, now)

    def _match_below(self, keys: Sequence[BlockKey], ready: int, now: float) -> Match:
        arena, held, usable, names = self.arena, self._holders.get, self.usable, self._names
        losses = self.losses if self.losses.has_failures else None
        tiers = [HOST] * ready
        for key in keys[ready:]:
            if key in arena:
                tiers.append(HOST)
                continue
            mask = held(key, 0) & usable
            if mask and losses is not None:
                mask &= ~losses.barred(key, now)
            if not mask:
                return Match(ready, len(tiers), tuple(tiers), self._why_missing(key, now))
            tiers.append(names[mask & -mask])
        return Match(ready, len(tiers), tuple(tiers), MissReason.NONE)

    def next_holder(self, key: BlockKey, now: float) -> str | None:
        """Return the first tier that can be asked for a block, None when there is none."""
        mask = self._holders.get(key, 0) & self.usable & ~self.losses.barred(key, now)
        return self._names[mask & -mask] if mask else None

    def is_reachable(self, key: BlockKey, now: float) -> bool:
        """Tell whether a block is in the arena or in a tier that can be asked for it."""
        return key in self.arena or self.next_holder(key, now) is not None

    def tier_to_ask(self, key: BlockKey, now: float) -> int:
        """Return the bit of the first usable shared tier that has yet to say whether it holds a block."""
        mask = self._open(key, now) & self.usable
        return mask & -mask

    def is_held(self, key: BlockKey, tier: int) -> bool:
        """Tell whether the tier with bit ``tier`` holds a block."""
        return bool(self._holders.get(key, 0) & tier)

    def stored_below(self, keys: Iterable[BlockKey], tier: int) -> None:
        """Note that the tier with bit ``tier`` holds blocks."""
        new = []
        for key in keys:
            mask = self._holders.get(key, 0)
            if not mask & tier:
                self._holders[key] = mask | tier
                new.append(key)
                self._admissions[tier].stored(key)
        self.emit("stored", self._names[tier], new)
        forgotten = self.asking.held(new, tier)
        if forgotten:
            self._remove_holder(forgotten, tier)

    def lost_below(self, keys: Iterable[BlockKey], tier: int, reason: MissReason) -> None:
        """Note that the tier with bit ``tier`` no longer holds blocks, and why."""
        self.note_gone(self._remove_holder(keys, tier), reason)

    def note_gone(self, keys: Iterable[BlockKey], reason: MissReason) -> None:
        """Remember why blocks are missing, those that are not held anywhere."""
        for key in keys:
            if key not in self._holders and key not in self.arena:
                self.losses.gone(key, reason)

    def emit(self, kind: Literal["stored", "removed"], tier: str, keys: Sequence[BlockKey]) -> None:
        """Add an event, unless it is about nothing."""
        if keys:
            self._events.append(ServiceEvent(kind, tier, tuple(keys)))

    def take_events(self) -> list[ServiceEvent]:
        """Return and forget the events since the last call; the oldest go when nobody asks for long."""
        events = list(self._events)
        self._events.clear()
        return events

    def held_by(self, tier: int) -> list[BlockKey]:
        """Return every block that the tier with bit ``tier`` holds. Slow: looks at all blocks."""
        return [key for key, mask in self._holders.items() if mask & tier]

    @property
    def blocks_below(self) -> int:
        """How many blocks lie in at least one tier below."""
        return len(self._holders)

    def clear(self) -> None:
        """Forget every block below, every loss and every answer."""
        for tier, admission in self._admissions.items():
            for key in self.held_by(tier):
                admission.removed(key)
        self._holders.clear()
        self.asking.clear()
        self.losses.clear()

    def _why_missing(self, key: BlockKey, now: float) -> MissReason:
        unheard = self._open(key, now)
        if unheard & self.usable:
            return MissReason.NOT_ASKED
        held = self._holders.get(key, 0)
        if unheard or held & ~self.losses.barred(key, now):
            return MissReason.TIER_DOWN
        return self.losses.reason(key, now)

    def _open(self, key: BlockKey, now: float) -> int:
        """Return the shared tiers, usable or not, of which it is not known whether they hold a block."""
        if not self.asking.is_needed:
            return 0
        return self.asking.open(key, now) & ~self._holders.get(key, 0) & ~self.losses.barred(key, now)

    def _remove_holder(self, keys: Iterable[BlockKey], tier: int) -> list[BlockKey]:
        """Take a tier from the holders of blocks; return those that it was counted to hold."""
        lost = []
        for key in keys:
            mask = self._holders.get(key, 0)
            if mask & tier:
                lost.append(key)
                self._admissions[tier].removed(key)
                if mask == tier:
                    del self._holders[key]
                else:
                    self._holders[key] = mask & ~tier
        self.emit("removed", self._names[tier], lost)
        return lost


def _put(notes: OrderedDict[BlockKey, _Note], key: BlockKey, value: _Note, limit: int) -> None:
    notes[key] = value
    notes.move_to_end(key)
    while len(notes) > limit:
        notes.popitem(last=False)
