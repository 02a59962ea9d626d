"""Checks with several threads: every method may be called by all of them at once."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable

from kvferry.connector.errors import KVFerryError
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing.case import TierCase
from kvferry.connector.tier import Outcome, Tier

__all__ = ["ConcurrencyChecks"]

_SEEN = (Outcome.OK, Outcome.MISSING)


class ConcurrencyChecks(TierCase):
    """A block is whole or absent, whoever else is at work."""

    def test_a_reader_never_sees_half_a_block(self, tier: Tier) -> None:
        """While a block is being stored, a load finds all of it or nothing."""
        rounds = [self.keys(2, f"round {number}") for number in range(12)]
        current = [rounds[0]]
        is_done = threading.Event()

        def write() -> None:
            try:
                for keys in rounds:
                    current[0] = keys
                    assert self.store(tier, keys) == [Outcome.OK] * 2
            finally:
                is_done.set()

        def read() -> None:
            while not is_done.is_set():
                assert set(self.load(tier, current[0])) <= set(_SEEN)

        self.together(write, read, read)
        for keys in rounds:
            assert self.load(tier, keys) == [Outcome.OK] * 2

    def test_a_reader_never_sees_half_a_block_that_comes_and_goes(self, tier: Tier) -> None:
        """Deleted and stored again under the reader's eyes."""
        keys = self.keys(3)
        is_done = threading.Event()

        def change() -> None:
            try:
                for _ in range(15):
                    self.store(tier, keys)
                    tier.delete(keys)
            finally:
                is_done.set()

        def read() -> None:
            while not is_done.is_set():
                assert set(self.load(tier, keys)) <= set(_SEEN)

        self.together(change, read, read)
        assert self.load(tier, keys) == [Outcome.MISSING] * 3

    def test_the_same_block_may_be_stored_by_all_at_once(self, tier: Tier) -> None:
        """All are ``OK``, and it is one whole block."""

        def store(keys: list[BlockKey]) -> None:
            assert self.store(tier, keys) == [Outcome.OK] * 2

        for number in range(5):
            keys = self.keys(2, f"round {number}")
            self.together(*[functools.partial(store, keys)] * 6)
            assert self.load(tier, keys) == [Outcome.OK] * 2

    def test_a_store_that_is_ok_can_be_loaded_at_once(self, tier: Tier) -> None:
        """By any thread, also when another thread stored the same block first."""

        def store_and_load(salt: str) -> Callable[[], None]:
            def run() -> None:
                for number in range(6):
                    keys = self.keys(2, f"{salt} {number}") + self.keys(1, f"common {number}")
                    assert self.store(tier, keys) == [Outcome.OK] * 3
                    assert list(tier.contains(keys)) == [True] * 3
                    assert self.load(tier, keys) == [Outcome.OK] * 3

            return run

        self.together(*[store_and_load(f"thread {number}") for number in range(4)])

    def test_more_threads_than_it_was_told_of_are_served(self, tier: Tier) -> None:
        """``TierContext.threads`` is a hint; the calls of a few more wait for each other, no more."""
        keys = self.keys(8)
        self.store_all(tier, keys)

        def load() -> None:
            for _ in range(3):
                assert self.load(tier, keys) == [Outcome.OK] * 8

        self.together(*[load] * 12)

    def test_everything_at_once_stays_right(self, tier: Tier) -> None:
        """A seeded mix of all calls on few keys; every block that comes back is checked."""
        keys = self.keys(16)

        def mix(seed: int) -> Callable[[], None]:
            chance = random.Random(seed)

            def run() -> None:
                for _ in range(40):
                    some = chance.sample(keys, chance.randint(1, 5))
                    call = chance.choices(["load", "store", "delete", "contains", "stats"], [5, 4, 1, 2, 1])
                    if call == ["load"]:
                        assert set(self.load(tier, some)) <= set(_SEEN)
                    elif call == ["store"]:  # FAILED is fair where another thread deletes the block
                        assert set(self.store(tier, some)) <= {Outcome.OK, Outcome.FAILED}
                    elif call == ["delete"]:
                        tier.delete(some)
                    elif call == ["contains"]:
                        assert len(tier.contains(some)) == len(some)
                    else:
                        assert tier.stats().blocks >= 0

            return run

        self.together(*[mix(seed) for seed in range(5)])
        held = [Outcome.OK if is_held else Outcome.MISSING for is_held in tier.contains(keys)]
        assert self.load(tier, keys) == held

    def test_threads_that_come_and_go_leave_nothing_behind(self, tier: Tier) -> None:
        """A tier may keep something for each thread, but not for ever: many short-lived ones are fine."""
        keys = self.keys(2)
        self.store_all(tier, keys)
        for _ in range(10):
            self.together(*[lambda: self.load(tier, keys)] * 8)
        started = time.monotonic()
        assert self.load(tier, keys) == [Outcome.OK] * 2
        tier.close()
        assert time.monotonic() - started < self.deadline_s

    def test_two_tiers_in_two_places_know_nothing_of_each_other(self) -> None:
        """Also when both have the same name, or work at the same time."""
        one, other = self.open(), self.open(self.make_place())
        keys = self.keys(4)
        self.store_all(one, keys[:2])
        self.store_all(other, keys[2:])
        assert list(one.contains(keys)) == [True, True, False, False]
        assert list(other.contains(keys)) == [False, False, True, True]
        other.delete(keys)
        assert self.load(one, keys) == [Outcome.OK] * 2 + [Outcome.MISSING] * 2

    def test_two_models_in_one_place_never_mix(self, tier: Tier) -> None:
        """Another fingerprint in the same place is refused when it opens, or is kept apart by its keys."""
        ours, theirs = self.keys(2, "our model"), self.keys(2, "their model")
        self.store_all(tier, ours)
        tier.close()
        try:
            other = self.open(fingerprint=b"another model's fingerprint, 32.")
        except KVFerryError:
            other = None
        if other is not None:
            self.store_all(other, theirs)
            assert self.load(other, theirs) == [Outcome.OK] * 2
            other.close()
        again = self.open()
        assert set(self.load(again, [*ours, *theirs])) <= set(_SEEN)
        self.store_all(again, ours)
        assert self.load(again, ours) == [Outcome.OK] * 2
