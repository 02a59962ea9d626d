"""Checks over restarts, crashes, and several users of one place."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import process
from kvferry.connector.testing.case import FINGERPRINT, TierCase
from kvferry.connector.tier import Outcome, Tier

__all__ = ["RestartChecks"]

_CRASHES = (1, 6, 17)
_END_S = 60.0


class RestartChecks(TierCase):
    """What ``is_persistent`` and ``is_shared`` promise holds."""

    def test_blocks_survive_a_restart(self, tier: Tier) -> None:
        """A persistent tier still holds them, and in the same order, when it is opened again."""
        self.require(tier, is_persistent=True)
        keys = self.keys(6)
        self.store_all(tier, keys)
        tier.close()
        again = self.open()
        assert list(again.contains(keys)) == [True] * 6
        assert self.load(again, keys) == [Outcome.OK] * 6
        if not again.capabilities.is_shared:
            assert list(again.scan()) == keys

    def test_shorter_bodies_survive_a_restart(self, tier: Tier) -> None:
        """The length is kept with the block."""
        self.require(tier, is_persistent=True)
        keys = self.keys(3)
        self.store_all(tier, keys, 1234)
        tier.close()
        assert self.load(self.open(), keys, 1234) == [Outcome.OK] * 3

    def test_deleted_blocks_stay_deleted_over_a_restart(self, tier: Tier) -> None:
        """They do not come back from the dead."""
        self.require(tier, is_persistent=True)
        keys = self.keys(4)
        self.store_all(tier, keys)
        tier.delete(keys[:2])
        tier.close()
        assert self.load(self.open(), keys) == [Outcome.MISSING] * 2 + [Outcome.OK] * 2

    def test_a_restart_is_never_wrong(self, tier: Tier) -> None:
        """Persistent or not: what is there afterwards is right."""
        keys = self.keys(4)
        self.store_all(tier, keys)
        tier.close()
        again = self.open()
        assert set(self.load(again, keys)) <= {Outcome.OK, Outcome.MISSING}
        self.store_all(again, keys)
        assert self.load(again, keys) == [Outcome.OK] * 4

    def test_many_restarts_lose_nothing(self, tier: Tier) -> None:
        """A little is stored in each life."""
        self.require(tier, is_persistent=True)
        keys = self.keys(5)
        for key in keys:
            self.store_all(tier, [key])
            tier.close()
            tier = self.open()
        assert self.load(tier, keys) == [Outcome.OK] * 5

    @pytest.mark.parametrize("after", _CRASHES)
    def test_a_killed_process_leaves_whole_blocks(self, after: int) -> None:
        """SIGKILL after so many stores: what was reported is there, the rest is whole or absent."""
        with self.writing("crash", 64) as writer:
            reported = [int(self.line(writer)) for _ in range(after)]
            writer.kill()
            writer.wait(_END_S)
        tier = self.open()
        keys = self.keys(64, "crash")
        if tier.capabilities.is_persistent:
            assert [self.load(tier, [keys[number]])[0] for number in reported] == [Outcome.OK] * after
        assert set(self.load(tier, keys)) <= {Outcome.OK, Outcome.MISSING}
        self.store_all(tier, keys)
        assert self.load(tier, keys) == [Outcome.OK] * 64

    def test_another_process_stores_what_this_one_loads(self) -> None:
        """A persistent tier hands blocks from one process to the next; a shared one, at the same time."""
        keys = self.keys(5, "other")
        with self.writing("other", 5) as writer:
            while self.line(writer) != "done":
                pass
            other = self.open_beside(writer)
            assert list(other.contains(keys)) == [True] * 5
            assert self.load(other, keys) == [Outcome.OK] * 5

    def test_two_users_of_one_place_see_the_same(self, tier: Tier) -> None:
        """What one stores the other finds, and what one deletes neither does."""
        self.require(tier, is_shared=True)
        other = self.open()
        keys = self.keys(4)
        self.store_all(tier, keys[:2])
        self.store_all(other, keys[2:])
        for user in (tier, other):
            assert list(user.contains(keys)) == [True] * 4
            assert self.load(user, keys) == [Outcome.OK] * 4
        other.delete(keys[:1])
        for user in (tier, other):
            assert list(user.contains(keys)) == [False, True, True, True]
            assert self.load(user, keys) == [Outcome.MISSING] + [Outcome.OK] * 3

    def test_two_users_of_one_place_work_at_the_same_time(self, tier: Tier) -> None:
        """Stores of the same and of different blocks; nobody sees a wrong one."""
        self.require(tier, is_shared=True)
        other = self.open()

        def work(user: Tier, own: list[BlockKey]) -> None:
            for _ in range(4):
                assert self.store(user, own) == [Outcome.OK] * len(own)
                assert self.load(user, own) == [Outcome.OK] * len(own)

        common = self.keys(3, "common")
        self.together(
            lambda: work(tier, common + self.keys(3, "one")),
            lambda: work(other, common + self.keys(3, "other")),
        )
        everything = common + self.keys(3, "one") + self.keys(3, "other")
        assert self.load(tier, everything) == [Outcome.OK] * 9

    def test_closing_one_user_leaves_the_other_at_work(self, tier: Tier) -> None:
        """``close`` releases what is this tier's own."""
        self.require(tier, is_shared=True)
        other = self.open()
        keys = self.keys(2)
        self.store_all(tier, keys)
        tier.close()
        assert self.load(other, keys) == [Outcome.OK] * 2
        self.store_all(other, self.keys(1, "later"))

    # ---- what these tests use

    @contextlib.contextmanager
    def writing(self, salt: str, count: int) -> Iterator[subprocess.Popen[bytes]]:
        """Run a process that stores ``count`` blocks in ``self.place``; it is killed at the end."""
        task = process.Task(
            entry=self.configuration(self.place, self.capacity_bytes),
            plugins=list(self.plugins),
            layout=self.layout,
            fingerprint=FINGERPRINT,
            salt=salt,
            count=count,
        )
        with process.start(task) as writer:
            try:
                yield writer
            finally:
                writer.kill()

    def line(self, writer: subprocess.Popen[bytes]) -> str:
        """Return the next line that the other process wrote."""
        assert writer.stdout is not None
        line = writer.stdout.readline().decode().strip()
        assert line, f"the process that stores ended with {writer.wait(_END_S)}"
        return line

    def open_beside(self, writer: subprocess.Popen[bytes]) -> Tier:
        """Open the tier here: while the other process has it when it is shared, else when that ended."""
        place = self.make_place()
        probe = self.open(place)
        if not probe.capabilities.is_shared:
            self.require(probe, is_persistent=True)
            assert writer.stdin is not None
            writer.stdin.close()
            assert writer.wait(_END_S) == 0
        return self.open()
