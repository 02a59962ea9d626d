"""Checks of bounded tiers: what they hold to, what they drop, and how they say so."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Sequence

from kvferry.connector.keys import BlockKey
from kvferry.connector.testing.case import TierCase
from kvferry.connector.tier import Outcome, Tier

__all__ = ["CapacityChecks"]

_OVERFILL = 3
_RACE_LOADS, _RACE_S = 60, 3.0
"""How many loads race with evictions, and the longest that they may take together."""


class CapacityChecks(TierCase):
    """A tier that claims ``is_bounded`` keeps within its capacity, by evicting."""

    def test_it_says_the_capacity_it_was_given(self) -> None:
        """Bounds mean what the operator wrote."""
        tier = self.open_small()
        capacity = tier.stats().capacity_bytes
        assert capacity is not None
        assert self.layout.payload_bytes <= capacity <= self.small_capacity_bytes

    def test_it_never_exceeds_its_capacity(self) -> None:
        """Filled three times over, one block at a time, and looked at after each."""
        tier = self.open_small()
        for key in self.overfill():
            assert self.store(tier, [key]) == [Outcome.OK]
            self.check_capacity(tier)

    def test_it_never_exceeds_its_capacity_with_batches(self) -> None:
        """Filled in batches, some of them larger than the whole capacity."""
        tier = self.open_small()
        keys = self.overfill()
        for start in range(0, len(keys), 40):
            outcomes = self.store(tier, keys[start : start + 40])
            assert set(outcomes) <= {Outcome.OK, Outcome.NO_ROOM}
            assert Outcome.OK in outcomes
            self.check_capacity(tier)

    def test_it_never_exceeds_its_capacity_with_many_threads(self) -> None:
        """Several threads store, another looks."""
        tier = self.open_small()
        keys = self.overfill()
        left = threading.Semaphore(0)

        def fill(mine: Sequence[BlockKey]) -> Callable[[], None]:
            def run() -> None:
                try:
                    for key in mine:
                        assert set(self.store(tier, [key])) <= {Outcome.OK, Outcome.NO_ROOM}
                finally:
                    left.release()

            return run

        def look() -> None:
            done = 0
            while done < 3:
                self.check_capacity(tier)
                done += left.acquire(timeout=0.002)

        self.together(look, *[fill(keys[start::3]) for start in range(3)])

    def test_evicted_blocks_are_missing_and_the_others_are_right(self) -> None:
        """Every block that was stored is one or the other."""
        tier = self.open_small()
        keys = self.overfill()
        self.store_all(tier, keys)
        held = list(tier.contains(keys))
        assert True in held
        assert False in held
        expected = [Outcome.OK if is_held else Outcome.MISSING for is_held in held]
        assert [self.load(tier, [key])[0] for key in keys] == expected

    def test_the_block_stored_last_is_held(self) -> None:
        """A full tier takes new blocks; something else goes."""
        tier = self.open_small()
        for key in self.overfill():
            self.store_all(tier, [key])
            assert self.load(tier, [key]) == [Outcome.OK]

    def test_evictions_are_reported(self) -> None:
        """``on_removed`` gets each key that went, and none that stayed."""
        tier = self.open_small(is_shared=False)
        keys = self.overfill()
        self.store_all(tier, keys)
        gone = {key for key, held in zip(keys, tier.contains(keys), strict=True) if not held}
        assert gone
        self.wait_until(lambda: set(self.removed) == gone, "on_removed reports exactly the evicted blocks")
        assert len(self.removed) == len(gone), "a block was reported twice"

    def test_stats_count_evictions(self) -> None:
        """Stored is held plus evicted."""
        tier = self.open_small(is_shared=False)
        keys = self.overfill()
        self.store_all(tier, keys)
        held = sum(tier.contains(keys))
        assert tier.stats().blocks == held
        assert tier.stats().evictions == len(keys) - held

    def test_deleting_makes_room(self) -> None:
        """Nothing is evicted as long as deleted blocks' room suffices."""
        tier = self.open_small()
        for number in range(12):
            keys = self.keys(3, f"round {number}")
            self.store_all(tier, keys)
            assert self.load(tier, keys) == [Outcome.OK] * 3
            tier.delete(keys)
        assert tier.stats().evictions == 0
        assert self.removed == []

    def test_storing_what_is_held_takes_no_room(self) -> None:
        """The same block over and over evicts nobody."""
        tier = self.open_small()
        keys = self.keys(3)
        for _ in range(30):
            assert self.store(tier, keys) == [Outcome.OK] * 3
        assert self.load(tier, keys) == [Outcome.OK] * 3
        assert tier.stats().evictions == 0

    def test_a_block_evicted_while_it_is_loaded_is_never_wrong(self) -> None:
        """Readers ask for what goes next, while a writer pushes it out: right, or missing."""
        tier = self.open_small()
        fresh = (key for number in itertools.count() for key in self.keys(64, f"round {number}"))
        recent = collections.deque([next(fresh)], maxlen=64)
        loaded = itertools.count(1)
        is_done = threading.Event()

        def write() -> None:
            end = time.monotonic() + _RACE_S
            while not is_done.is_set() and time.monotonic() < end:
                recent.append(next(fresh))
                self.store(tier, [recent[-1]])
            is_done.set()

        def read() -> None:
            try:
                while not is_done.is_set():
                    asked = list(recent)
                    held = [key for key, is_held in zip(asked, tier.contains(asked), strict=True) if is_held]
                    outcomes = self.load(tier, held[:1] + held[-2:])
                    assert set(outcomes) <= {Outcome.OK, Outcome.MISSING}
                    if Outcome.OK in outcomes and next(loaded) >= _RACE_LOADS:
                        return
            finally:
                is_done.set()

        self.together(write, read, read)
        self.check_capacity(tier)

    def test_the_capacity_holds_over_a_restart(self) -> None:
        """A tier that opens full counts what it finds."""
        tier = self.open_small(is_persistent=True)
        keys = self.overfill()
        self.store_all(tier, keys)
        tier.close()
        again = self.open(capacity_bytes=self.small_capacity_bytes)
        self.check_capacity(again)
        for key in self.keys(10, "after the restart"):
            self.store_all(again, [key])
            self.check_capacity(again)

    # ---- what these tests use

    def open_small(self, **claims: bool) -> Tier:
        """Open a tier of ``small_capacity_bytes``; skip the test unless it is bounded."""
        tier = self.open(capacity_bytes=self.small_capacity_bytes)
        self.require(tier, is_bounded=True, **claims)
        return tier

    def overfill(self) -> list[BlockKey]:
        """Return keys of several times as many blocks as can fit."""
        return self.keys(_OVERFILL * self.small_capacity_bytes // self.layout.payload_bytes)

    def check_capacity(self, tier: Tier) -> None:
        """Fail when the tier uses more than it may."""
        stats = tier.stats()
        assert stats.capacity_bytes is not None
        assert stats.used_bytes <= stats.capacity_bytes
        assert stats.blocks * self.layout.payload_bytes <= self.small_capacity_bytes
