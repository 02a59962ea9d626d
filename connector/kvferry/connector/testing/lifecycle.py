"""Checks of a tier's life: opening, closing, what it says about itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from kvferry.connector.errors import ClosedError
from kvferry.connector.testing.case import TierCase
from kvferry.connector.tier import Capabilities, Outcome, Tier, TierStats

__all__ = ["LifecycleChecks"]

_STATS_S = 0.25
"""Most that one call of ``stats`` may take; it serves metrics, and must not wait for I/O."""


class LifecycleChecks(TierCase):
    """A tier opens, closes, and says what it is."""

    def test_it_has_everything_that_a_tier_has(self, tier: Tier) -> None:
        """The object has the methods of ``Tier``."""
        assert isinstance(tier, Tier)

    def test_capabilities_are_plain_booleans(self, tier: Tier) -> None:
        """``capabilities`` is a ``Capabilities`` of booleans."""
        assert isinstance(tier.capabilities, Capabilities)
        claims = (
            tier.capabilities.is_persistent,
            tier.capabilities.is_shared,
            tier.capabilities.is_bounded,
        )
        assert all(type(claim) is bool for claim in claims)

    def test_capabilities_never_change(self, tier: Tier) -> None:
        """They are the same before, during and after work, and when the tier is closed."""
        before = tier.capabilities
        keys = self.keys(3)
        self.store(tier, keys)
        self.load(tier, keys)
        tier.delete(keys)
        assert tier.capabilities == before
        tier.close()
        assert tier.capabilities == before

    def test_close_may_be_called_twice(self, tier: Tier) -> None:
        """``close`` is idempotent."""
        self.store(tier, self.keys(1))
        tier.close()
        tier.close()

    def test_close_may_be_called_by_several_threads_at_once(self, tier: Tier) -> None:
        """One of them closes, none of them fails."""
        self.store(tier, self.keys(1))
        self.together(*[tier.close] * 4)

    def test_an_unused_tier_closes(self, tier: Tier) -> None:
        """Opening and closing is enough of a life."""
        tier.close()

    def test_it_opens_again_after_it_was_closed(self, tier: Tier) -> None:
        """What ``close`` left allows a second life in the same place."""
        self.store(tier, self.keys(2))
        tier.close()
        again = self.open()
        fresh = self.keys(2, "second life")
        self.store_all(again, fresh)
        assert self.load(again, fresh) == [Outcome.OK] * 2

    @pytest.mark.parametrize("call", ["contains", "load", "store", "delete", "scan", "stats"])
    def test_a_closed_tier_raises_closed_error(self, tier: Tier, call: str) -> None:
        """Every method but ``close`` says that the tier is closed, rather than anything else."""
        keys = self.keys(2)
        self.store(tier, keys)
        tier.close()
        calls: dict[str, Callable[[], object]] = {
            "contains": lambda: tier.contains(keys),
            "load": lambda: tier.load(self.blocks.empty(keys).frames),
            "store": lambda: tier.store(self.blocks.sealed(keys).sources()),
            "delete": lambda: tier.delete(keys),
            "scan": lambda: list(tier.scan()),
            "stats": tier.stats,
        }
        with pytest.raises(ClosedError):
            calls[call]()

    def test_closing_lets_calls_under_way_end_whole(self, tier: Tier) -> None:
        """A call that meets ``close`` either works or says that the tier is closed."""
        keys = self.keys(8)
        self.store(tier, keys)
        is_busy = threading.Event()

        def work() -> None:
            end = time.monotonic() + self.deadline_s
            while time.monotonic() < end:
                try:
                    self.load(tier, keys)
                    self.store(tier, keys)
                except ClosedError:
                    return
                is_busy.set()
            raise AssertionError("the tier still works long after it was closed")

        def close() -> None:
            assert is_busy.wait(self.deadline_s)
            tier.close()

        self.together(work, work, close)

    def test_no_thread_is_left_when_it_is_closed(self) -> None:
        """Threads of the tier's own end with it."""
        before = set(threading.enumerate())
        tier = self.open()
        self.store(tier, self.keys(4))
        tier.close()
        self.wait_until(
            lambda: not [thread for thread in threading.enumerate() if thread not in before],
            "the tier's threads end with it",
        )

    def test_stats_say_what_is_held(self, tier: Tier) -> None:
        """Blocks and bytes grow with what is stored, and shrink with what is deleted."""
        empty = tier.stats()
        assert isinstance(empty, TierStats)
        keys = self.keys(5)
        self.store(tier, keys)
        full = tier.stats()
        self.require(tier, is_shared=False)
        assert (empty.blocks, full.blocks) == (0, 5)
        assert full.used_bytes >= empty.used_bytes + 5 * self.layout.payload_bytes
        tier.delete(keys)
        assert tier.stats().blocks == 0
        assert tier.stats().used_bytes < full.used_bytes

    def test_stats_are_sensible_numbers(self, tier: Tier) -> None:
        """Nothing is negative, and a tier is bounded exactly when it says how much it may hold."""
        self.store(tier, self.keys(3))
        stats = tier.stats()
        numbers = (stats.blocks, stats.used_bytes, stats.evictions)
        assert all(type(number) is int and number >= 0 for number in numbers), stats
        if tier.capabilities.is_bounded:
            assert type(stats.capacity_bytes) is int
            assert stats.capacity_bytes > 0
        else:
            assert stats.capacity_bytes is None

    def test_stats_are_cheap(self, tier: Tier) -> None:
        """Metrics ask often: the fastest of some calls is far below anything that waits."""
        self.store(tier, self.keys(16))
        times = []
        for _ in range(5):
            started = time.perf_counter()
            tier.stats()
            times.append(time.perf_counter() - started)
        assert min(times) < _STATS_S, f"stats takes {min(times):.3f} s"
