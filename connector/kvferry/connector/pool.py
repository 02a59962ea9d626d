r"""The pool: who may do what with each slot of the arena.

             take              commit
    FREE ----------> RESERVED ----------> COMMITTED --- retire (unpinned) ---> FREE
      ^                 |   \                  |
      |------ free -----|    \ quarantine      | retire (pinned)
      |                       v                v
      |------ free ----- QUARANTINED        RETIRED --- last unpin ---> FREE

A slot in RESERVED has exactly one writer. QUARANTINED means that the writer lost its right but may
still write: the slot is nobody's until the writer is known to have stopped. RETIRED means that the
block was forgotten while somebody still reads it. Only a COMMITTED slot without pins may be evicted.

Each slot has a generation, which changes whenever the slot is handed out, before anyone can write to
it: who remembers the generation under which it found a block can tell whether it is still that block.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import msgspec

from kvferry.connector.errors import UsageError

__all__ = ["SlotCounts", "SlotPool", "SlotState"]


class SlotState(enum.IntEnum):
    """What a slot is in; the module draws the transitions."""

    FREE = 0
    RESERVED = 1
    COMMITTED = 2
    QUARANTINED = 3
    RETIRED = 4


_FREE, _RESERVED, _COMMITTED, _QUARANTINED, _RETIRED = SlotState
"""By short names: on the scheduler's path an enum's attribute lookup is most of a transition's cost."""


class SlotCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Slots by state. The five states add up to the arena."""

    free: int
    reserved: int
    committed: int
    quarantined: int
    retired: int
    pinned: int
    """Slots with at least one pin, committed or retired."""


class SlotPool:
    """Slot states, generations and pins.

    Args:
        num_slots: Slots of the arena, at least 1.
        on_generation: Called as ``on_generation(slot, generation)`` while a slot is handed out.
    """

    def __init__(self, num_slots: int, on_generation: Callable[[int, int], None]) -> None:
        if num_slots < 1:
            raise UsageError(f"a pool needs at least one slot, not {num_slots}")
        self._states = bytearray(num_slots)
        self._pins = [0] * num_slots
        self._generations = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._by_state = [num_slots, 0, 0, 0, 0]
        self._pinned = 0
        self._pinned_committed = 0
        self._on_generation = on_generation

    def take(self) -> int | None:
        """Hand out a free slot for a new block (FREE to RESERVED) under a new generation; None when full."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._generations[slot] += 1
        self._on_generation(slot, self._generations[slot])
        self._move(slot, _RESERVED, _FREE)
        return slot

    def commit(self, slot: int) -> None:
        """Declare a slot's content whole (RESERVED to COMMITTED)."""
        self._move(slot, _COMMITTED, _RESERVED)

    def quarantine(self, slot: int) -> None:
        """Take the right to write from a slot's writer, who may not know yet (RESERVED to QUARANTINED)."""
        self._move(slot, _QUARANTINED, _RESERVED)

    def free(self, slot: int) -> None:
        """Take back a slot whose writer has stopped (RESERVED or QUARANTINED to FREE)."""
        self._move(slot, _FREE, _RESERVED, _QUARANTINED)
        self._free.append(slot)

    def retire(self, slot: int) -> None:
        """Take back a committed slot: at once when unpinned, else when the last pin goes."""
        if self._pins[slot]:
            self._move(slot, _RETIRED, _COMMITTED)
            self._pinned_committed -= 1
        else:
            self._move(slot, _FREE, _COMMITTED)
            self._free.append(slot)

    def pin(self, slot: int) -> None:
        """Keep a committed slot from being evicted; pins nest."""
        if self._states[slot] != _COMMITTED:
            raise UsageError(f"slot {slot} is {self.state(slot).name}: only committed slots can be pinned")
        if not self._pins[slot]:
            self._pinned += 1
            self._pinned_committed += 1
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        """Undo one ``pin``; the last one frees a retired slot."""
        if not self._pins[slot]:
            raise UsageError(f"slot {slot} has no pin to undo")
        self._pins[slot] -= 1
        if self._pins[slot]:
            return
        self._pinned -= 1
        if self._states[slot] == _RETIRED:
            self._move(slot, _FREE, _RETIRED)
            self._free.append(slot)
        else:
            self._pinned_committed -= 1

    def is_evictable(self, slot: int) -> bool:
        """Tell whether a slot holds a block that nobody reads."""
        return self._states[slot] == _COMMITTED and not self._pins[slot]

    @property
    def num_slots(self) -> int:
        """How many slots there are."""
        return len(self._states)

    @property
    def num_evictable(self) -> int:
        """How many slots are evictable."""
        return self._by_state[_COMMITTED] - self._pinned_committed

    @property
    def num_free(self) -> int:
        """How many slots can be taken without evicting."""
        return len(self._free)

    def generation(self, slot: int) -> int:
        """Return the slot's generation; 0 before it was first handed out."""
        return self._generations[slot]

    def state(self, slot: int) -> SlotState:
        """Return the slot's state."""
        return SlotState(self._states[slot])

    def counts(self) -> SlotCounts:
        """Return how many slots are in which state."""
        free, reserved, committed, quarantined, retired = self._by_state
        return SlotCounts(
            free=free,
            reserved=reserved,
            committed=committed,
            quarantined=quarantined,
            retired=retired,
            pinned=self._pinned,
        )

    def _move(self, slot: int, to: SlotState, *allowed: SlotState) -> None:
        state = self._states[slot]
        if state not in allowed:
            expected = " or ".join(one.name for one in allowed)
            raise UsageError(
                f"slot {slot} is {SlotState(state).name}, not {expected}: it can't become {to.name}"
            )
        self._states[slot] = to
        self._by_state[state] -= 1
        self._by_state[to] += 1
