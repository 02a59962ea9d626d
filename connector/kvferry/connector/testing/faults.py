"""Checks of what goes wrong outside: damaged bytes, a medium that is full, a server that hangs or dies.

All of them need back doors, see ``case.TierCase``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from kvferry.connector.errors import BlockRefused, TierError
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing.case import Damage, TierCase
from kvferry.connector.tier import Outcome, Tier

__all__ = ["FaultChecks"]

_T = TypeVar("_T")
_CALLS = ("load", "store", "contains", "delete")
_NO_WORSE = (Outcome.OK, Outcome.MISSING, Outcome.FAILED)


class FaultChecks(TierCase):
    """Nothing that happens outside makes a tier hang, lie, or raise what is no ``TierError``."""

    # ---- damage

    @pytest.mark.parametrize("how", Damage)
    def test_damaged_bytes_never_pass_for_the_block(self, tier: Tier, how: Damage) -> None:
        """The load fails, or yields bytes that kvferry refuses."""
        keys = self.keys(3)
        self.store_all(tier, keys)
        self.damage(tier, self.place, keys[1], how)
        outcomes = self.load_damaged(tier, keys)
        assert outcomes[0] is outcomes[2] is Outcome.OK, "the blocks beside the damaged one are whole"

    @pytest.mark.parametrize("how", Damage)
    def test_damaged_bytes_are_seen_after_a_restart_too(self, tier: Tier, how: Damage) -> None:
        """A tier that opens on damaged bytes opens."""
        self.require(tier, is_persistent=True)
        keys = self.keys(3)
        self.store_all(tier, keys)
        self.damage(tier, self.place, keys[1], how)
        tier.close()
        again = self.open()
        outcomes = self.load_damaged(again, keys)
        assert outcomes[0] is outcomes[2] is Outcome.OK

    @pytest.mark.parametrize("how", Damage)
    def test_a_damaged_block_can_be_replaced(self, tier: Tier, how: Damage) -> None:
        """kvferry deletes what it refused and stores it anew."""
        keys = self.keys(2)
        self.store_all(tier, keys)
        self.damage(tier, self.place, keys[0], how)
        self.load_damaged(tier, keys)
        tier.delete(keys[:1])
        assert self.load(tier, keys) == [Outcome.MISSING, Outcome.OK]
        self.store_all(tier, keys[:1])
        assert self.load(tier, keys) == [Outcome.OK] * 2

    def test_damage_is_really_done(self, tier: Tier) -> None:
        """The back door itself: a flipped bit is noticed by somebody."""
        (key,) = self.keys(1)
        self.store_all(tier, [key])
        self.damage(tier, self.place, key, Damage.FLIP)
        batch = self.blocks.empty([key])
        if list(tier.load(batch.frames)) == [Outcome.OK]:
            with pytest.raises(BlockRefused):
                self.blocks.verify(batch.frames[0])

    # ---- a full medium

    def test_a_full_medium_is_an_outcome(self, tier: Tier) -> None:
        """``NO_ROOM``, or room made by evicting; never an exception, and what is held stays right."""
        keys = self.keys(4)
        self.store_all(tier, keys)
        self.exhaust(tier, self.place)
        try:
            fresh = self.keys(8, "no room")
            outcomes = self.store(tier, fresh)
            assert set(outcomes) <= {Outcome.OK, Outcome.NO_ROOM}
            for key, outcome in zip(fresh, outcomes, strict=True):
                if outcome is Outcome.NO_ROOM:
                    assert self.load(tier, [key]) == [Outcome.MISSING]
            assert set(self.load(tier, keys)) <= {Outcome.OK, Outcome.MISSING}
        finally:
            self.relieve(tier, self.place)
        self.wait_until(lambda: self.stores_again(tier, keys), "there is room again")
        assert self.load(tier, keys) == [Outcome.OK] * 4

    # ---- what the tier talks to hangs

    @pytest.mark.parametrize("call", _CALLS)
    def test_a_call_ends_though_nothing_answers(self, call: str) -> None:
        """Within ``deadline_s`` and a little, with a ``TierError``."""
        tier = self.open(deadline_s=self.outage_deadline_s)
        keys = self.keys(3)
        self.store_all(tier, keys)
        with self.suspended():
            self.check_gives_up(tier, call, keys)

    def test_threads_give_up_side_by_side(self) -> None:
        """Calls that wait for the same dead server do not wait for each other."""
        tier = self.open(deadline_s=self.outage_deadline_s)
        keys = self.keys(3)
        self.store_all(tier, keys)
        with self.suspended():
            self.together(*[lambda: self.check_gives_up(tier, "load", keys)] * 4)

    def test_stats_and_close_do_not_wait_for_an_answer(self) -> None:
        """They are called by whoever must not hang."""
        tier = self.open(deadline_s=self.outage_deadline_s)
        self.store_all(tier, self.keys(2))
        with self.suspended():
            self.within(tier.stats)
            self.within(tier.close)

    def test_it_works_again_when_answers_come_again(self) -> None:
        """Late answers to calls that were given up go to nobody."""
        tier = self.open(deadline_s=self.outage_deadline_s)
        keys = self.keys(3)
        self.store_all(tier, keys)
        with self.suspended():
            self.check_gives_up(tier, "load", keys)
            self.check_gives_up(tier, "store", self.keys(3, "meanwhile"))
        self.wait_until(lambda: self.loads_again(tier, keys), "blocks can be loaded again")
        others = self.keys(4, "afterwards")
        self.store_all(tier, others)
        assert self.load(tier, [*others, *keys]) == [Outcome.OK] * 7

    def test_a_buffer_is_left_alone_after_a_call_was_given_up(self) -> None:
        """An answer that comes late is written nowhere."""
        tier = self.open(deadline_s=self.outage_deadline_s)
        keys = self.keys(3)
        self.store_all(tier, keys)
        batch = self.blocks.empty(keys)
        with self.suspended():
            with pytest.raises(TierError):
                tier.load(batch.frames)
            batch.overwrite(0x77)
            image = batch.image()
        self.wait_until(lambda: self.loads_again(tier, keys), "blocks can be loaded again")
        assert batch.image() == image

    # ---- what the tier talks to dies

    @pytest.mark.parametrize("call", _CALLS)
    def test_a_call_fails_when_the_other_side_is_gone(self, call: str) -> None:
        """With a ``TierError``, and soon."""
        tier = self.open(deadline_s=self.outage_deadline_s)
        keys = self.keys(3)
        self.store_all(tier, keys)
        with self.killed():
            self.check_gives_up(tier, call, keys)

    def test_it_works_again_when_the_other_side_is_back(self) -> None:
        """Without being told; blocks may be gone, wrong ones there are none."""
        tier = self.open(deadline_s=self.outage_deadline_s)
        keys = self.keys(3)
        self.store_all(tier, keys)
        with self.killed():
            self.check_gives_up(tier, "load", keys)
        self.wait_until(lambda: self.stores_again(tier, keys), "blocks can be stored again")
        assert self.load(tier, keys) == [Outcome.OK] * 3

    def test_it_does_not_open_where_nothing_answers(self) -> None:
        """Or it does, and says ``TierError`` later; it does not hang."""
        with self.killed():
            try:
                tier = self.within(lambda: self.open(deadline_s=self.outage_deadline_s))
            except TierError:
                return
            self.check_gives_up(tier, "load", self.keys(1))

    # ---- what these tests use

    def load_damaged(self, tier: Tier, keys: list[BlockKey]) -> list[Outcome]:
        """Load blocks some of which are damaged; a block that kvferry would refuse counts as failed."""
        batch = self.blocks.empty(keys)
        outcomes = list(tier.load(batch.frames))
        batch.check_guards()
        assert set(outcomes) <= set(_NO_WORSE)
        for index, frame in enumerate(batch.frames):
            if outcomes[index] is Outcome.OK:
                try:
                    self.blocks.verify(frame)
                except BlockRefused:
                    outcomes[index] = Outcome.FAILED
        return outcomes

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Between ``suspend`` and ``resume``."""
        self.suspend()
        try:
            yield
        finally:
            self.resume()

    @contextlib.contextmanager
    def killed(self) -> Iterator[None]:
        """Between ``kill`` and ``revive``."""
        self.kill()
        try:
            yield
        finally:
            self.revive()

    def within(self, action: Callable[[], _T]) -> _T:
        """Return what ``action`` returns, which it must do within deadline and grace."""
        results: list[_T] = []
        limit_s = self.outage_deadline_s + self.grace_s
        self.together(lambda: results.append(action()), deadline_s=limit_s)
        return results[0]

    def check_gives_up(self, tier: Tier, call: str, keys: list[BlockKey]) -> None:
        """Make a call that cannot succeed; it must say so, in time."""
        calls: dict[str, Callable[[], object]] = {
            "load": lambda: tier.load(self.blocks.empty(keys).frames),
            "store": lambda: tier.store(self.blocks.sealed(self.keys(3, "unheard")).sources()),
            "contains": lambda: tier.contains(keys),
            "delete": lambda: tier.delete(keys),
        }
        with contextlib.suppress(TierError):
            self.within(calls[call])
            assert call == "contains", f"{call} reports success, though nothing can have answered"

    def loads_again(self, tier: Tier, keys: list[BlockKey]) -> bool:
        """Tell whether all of ``keys`` can be loaded."""
        try:
            return self.load(tier, keys) == [Outcome.OK] * len(keys)
        except TierError:
            return False

    def stores_again(self, tier: Tier, keys: list[BlockKey]) -> bool:
        """Tell whether all of ``keys`` can be stored."""
        try:
            return self.store(tier, keys) == [Outcome.OK] * len(keys)
        except TierError:
            return False
