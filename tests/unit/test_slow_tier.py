"""An engine above a tier that is slower than computing, then fast: real service, real copies, every byte checked."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from played_engine import LAYOUT, PlayedEngine
from test_session import config, prompt

from kvferry.connector.forecast import PROBE_S
from kvferry.connector.testing.faulty import SlowTier
from kvferry.engines.prefill import MIN_STEPS

BLOCK = LAYOUT.block_tokens
BLOCKS = 3
BLOCK_S = 0.1
"""Seconds in which the engine is said to compute a block; far more than a load takes on a busy machine."""
DELAY_S = 2.0
"""Far more than a request waits."""


class Played(PlayedEngine):
    """An engine whose arena holds one prompt and a bit; six prompts lie in its tier."""

    def __init__(self, **tier: object) -> None:
        self.later_s = 0.0
        tiers = ({"type": "slow", **tier},)
        super().__init__(
            config(slots=4, plugins=("slow",), tiers=tiers), clock=lambda: time.monotonic() + self.later_s
        )
        for seed in range(6):
            self.run(prompt(BLOCKS * BLOCK, seed))
        for _ in range(MIN_STEPS):
            self.sessions.prefill.step_planned(100 * BLOCK, self.clock())
            self.later_s += 100 * BLOCK_S
            self.sessions.prefill.step_ended(self.clock())

    @property
    def tier(self) -> SlowTier:
        tier = self.service._tiers[0].tier
        assert isinstance(tier, SlowTier)
        return tier


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Played]:
    engine = Played(**getattr(request, "param", {}))
    engine.tier.delay_s = DELAY_S
    yield engine
    engine.close()


def test_a_slow_tier_costs_one_bounded_wait_and_is_used_again_when_it_is_fast(engine: Played) -> None:
    first = engine.run(prompt(BLOCKS * BLOCK, 0))
    assert first.missing_reason == "deadline"
    assert first.wait_ms < DELAY_S * 1e3
    assert first.regret_ms == pytest.approx(first.wait_ms)
    assert first.regret_tier == "slow"

    second = engine.run(prompt(BLOCKS * BLOCK, 1))
    assert second.missing_reason == "slower_than_recompute"
    assert second.declined_blocks == {"slow": BLOCKS}
    assert second.wait_ms == second.regret_ms == 0
    assert second.expected_ms is not None
    assert second.recompute_ms is not None
    assert second.expected_ms > second.recompute_ms == pytest.approx(BLOCKS * BLOCK_S * 1e3, rel=0.01)

    engine.tier.delay_s = 0.0
    engine.later_s += PROBE_S
    probing = engine.run(prompt(BLOCKS * BLOCK, 2))
    assert (probing.wait_ms, probing.declined_blocks) == (0, {"slow": BLOCKS})

    last = engine.run(prompt(BLOCKS * BLOCK, 3))
    assert last.matched_tokens == {"slow": BLOCKS * BLOCK}
    assert last.loaded_tokens == BLOCKS * BLOCK


@pytest.mark.parametrize("engine", [{"ask": "always"}], indirect=True)
def test_a_tier_that_is_always_asked_is_waited_for(engine: Played) -> None:
    record = engine.run(prompt(BLOCKS * BLOCK, 0))
    assert record.matched_tokens == {"slow": BLOCKS * BLOCK}
    assert record.wait_ms >= DELAY_S * 1e3
    assert record.regret_ms >= (DELAY_S - BLOCKS * BLOCK_S) * 1e3
