"""Checks of what a tier says it holds: contains, delete and scan."""

from __future__ import annotations

import itertools
import random

import pytest

from kvferry.connector.keys import BlockKey
from kvferry.connector.testing.case import TierCase
from kvferry.connector.tier import Outcome, Tier

__all__ = ["ContentsChecks"]


class ContentsChecks(TierCase):
    """``contains``, ``load``, ``delete`` and ``scan`` tell the same story."""

    def test_an_empty_tier_holds_nothing(self, tier: Tier) -> None:
        """Before the first store everything is absent."""
        keys = self.keys(4)
        assert list(tier.contains(keys)) == [False] * 4
        assert self.load(tier, keys) == [Outcome.MISSING] * 4
        assert list(tier.scan()) == []

    def test_contains_answers_each_key_in_order(self, tier: Tier) -> None:
        """Every pattern of present and absent among four keys, and each question twice."""
        for number, pattern in enumerate(itertools.product([False, True], repeat=4)):
            keys = self.keys(4, f"pattern {number}")
            self.store_all(tier, [key for key, held in zip(keys, pattern, strict=True) if held])
            answer = tier.contains([*keys, *keys])
            assert list(answer) == [*pattern, *pattern]
            assert all(type(one) is bool for one in answer)

    def test_contains_has_no_side_effect(self, tier: Tier) -> None:
        """Asking creates nothing and removes nothing."""
        held, absent = self.keys(2)
        self.store_all(tier, [held])
        for _ in range(3):
            assert list(tier.contains([held, absent])) == [True, False]
        assert self.load(tier, [held, absent]) == [Outcome.OK, Outcome.MISSING]

    def test_contains_agrees_with_load(self, tier: Tier) -> None:
        """Undisturbed, what is contained can be loaded and what is not is missing."""
        keys = self.keys(10)
        self.store(tier, keys[::2])
        tier.delete(keys[:3])
        expected = [Outcome.OK if held else Outcome.MISSING for held in tier.contains(keys)]
        assert self.load(tier, keys) == expected

    def test_loading_takes_nothing_away(self, tier: Tier) -> None:
        """A block can be loaded as often as it is wanted."""
        keys = self.keys(2)
        self.store_all(tier, keys)
        for _ in range(5):
            assert self.load(tier, keys) == [Outcome.OK] * 2

    def test_a_deleted_block_is_missing(self, tier: Tier) -> None:
        """And only that one."""
        keys = self.keys(5)
        self.store_all(tier, keys)
        tier.delete([keys[1], keys[3]])
        expected = [True, False, True, False, True]
        assert list(tier.contains(keys)) == expected
        assert [outcome is Outcome.OK for outcome in self.load(tier, keys)] == expected
        assert self.load(tier, [keys[1]]) == [Outcome.MISSING]

    def test_deleting_what_is_not_there_is_nothing(self, tier: Tier) -> None:
        """Unknown keys are ignored, among known ones too."""
        known, unknown, other = self.keys(3)
        self.store_all(tier, [known])
        tier.delete([unknown])
        tier.delete([unknown, known, other])
        assert list(tier.contains([known, unknown, other])) == [False] * 3

    def test_a_block_may_be_deleted_twice(self, tier: Tier) -> None:
        """In one call and in two."""
        keys = self.keys(2)
        self.store_all(tier, keys)
        tier.delete([keys[0], keys[0]])
        tier.delete([keys[0]])
        assert list(tier.contains(keys)) == [False, True]

    def test_a_deleted_block_can_be_stored_again(self, tier: Tier) -> None:
        """With another length too: nothing of the old one shows."""
        (key,) = self.keys(1)
        self.store_all(tier, [key])
        for length in (100, 42273, 4096):
            tier.delete([key])
            assert self.store(tier, [key], length) == [Outcome.OK]
            assert self.load(tier, [key], length) == [Outcome.OK]

    def test_deleting_is_no_removal_of_its_own(self, tier: Tier) -> None:
        """``on_removed`` reports what the tier dropped by itself, not what it was told to drop."""
        keys = self.keys(4)
        self.store_all(tier, keys)
        tier.delete(keys)
        tier.close()
        assert self.removed == []

    @pytest.mark.parametrize("seed", range(4))
    def test_any_sequence_of_calls_agrees_with_a_model(self, tier: Tier, seed: int) -> None:
        """Random calls, and restarts where blocks survive them, beside a dict that says what has to be."""
        chance = random.Random(seed)
        keys = self.keys(8)
        model: dict[BlockKey, int] = {}
        for _ in range(60):
            some = chance.sample(keys, chance.randint(1, 4))
            call = chance.choice(["store", "store", "load", "delete", "contains", "reopen"])
            if call == "store":
                # A block that is held comes with the same bytes again: whether it is overwritten is the tier's choice.
                for key in some:
                    if key in model:
                        self.store_all(tier, [key], model[key])
                fresh = [key for key in some if key not in model]
                length = chance.choice([1, 4096, self.layout.payload_bytes])
                assert self.store(tier, fresh, length) == [Outcome.OK] * len(fresh)
                model |= dict.fromkeys(fresh, length)
            elif call == "load":
                for key in some:
                    held = [Outcome.OK if key in model else Outcome.MISSING]
                    assert self.load(tier, [key], model.get(key)) == held
            elif call == "delete":
                tier.delete(some)
                model = {key: length for key, length in model.items() if key not in some}
            elif call == "contains":
                assert list(tier.contains(some)) == [key in model for key in some]
            elif tier.capabilities.is_persistent:
                tier.close()
                tier = self.open()
        assert list(tier.contains(keys)) == [key in model for key in keys]

    def test_scan_yields_only_what_is_held(self, tier: Tier) -> None:
        """No key that was never stored, none that was deleted, none twice."""
        keys = self.keys(8)
        self.store_all(tier, keys)
        tier.delete(keys[::2])
        found = list(tier.scan())
        assert len(found) == len(set(found))
        assert set(found) <= set(keys[1::2])
        assert all(type(key) is bytes for key in found)

    def test_scan_yields_hostile_keys_as_they_are(self, tier: Tier) -> None:
        """What is used as a name or a row comes back as the same 32 bytes."""
        self.require(tier, is_persistent=True, is_shared=False)
        keys = [BlockKey(bytes(32)), BlockKey(b"\xff" * 32), BlockKey(b"/\0\n." * 8)]
        self.store_all(tier, keys)
        assert list(tier.scan()) == keys

    def test_scan_is_complete_where_kvferry_relies_on_it(self, tier: Tier) -> None:
        """A persistent tier that nobody else writes lists everything, least recently stored first."""
        self.require(tier, is_persistent=True, is_shared=False)
        keys = self.keys(7)[::-1]
        self.store_all(tier, keys)
        assert list(tier.scan()) == keys
        tier.delete(keys[2:3])
        assert list(tier.scan()) == keys[:2] + keys[3:]

    def test_scan_may_run_while_blocks_come_and_go(self, tier: Tier) -> None:
        """It never fails, and yields nothing that was never there."""
        keys = self.keys(12)

        def change() -> None:
            for _ in range(5):
                self.store(tier, keys)
                tier.delete(keys[::2])

        def scan() -> None:
            for _ in range(10):
                assert set(tier.scan()) <= set(keys)

        self.together(change, scan, scan)

    def test_a_scan_may_be_left_unfinished(self, tier: Tier) -> None:
        """Whoever stops half way blocks nobody."""
        keys = self.keys(6)
        self.store_all(tier, keys)
        scan = tier.scan()
        next(scan, None)
        tier.delete(keys[:3])
        self.store_all(tier, self.keys(2, "later"))
        assert self.load(tier, keys[3:]) == [Outcome.OK] * 3
        del scan
