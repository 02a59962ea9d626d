"""Load or recompute: what is learned of a tier, and the cut that follows, against tiers of known speed."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.connector.forecast import PROBE_BLOCKS, PROBE_S, Cut, TierForecast, worthwhile

BATCH = 8


class SimulatedTier:
    """Batches of 8 blocks on several threads; a call takes ``latency_s + blocks * block_s``, with noise."""

    def __init__(
        self, latency_s: float, block_s: float, threads: int = 4, noise: float = 0.0, seed: int = 1
    ) -> None:
        self.latency_s, self.block_s = latency_s, block_s
        self.forecast = TierForecast()
        self.slowdown = 1.0
        self._noise = noise
        self._random = random.Random(seed)
        self._free = [0.0] * threads
        self._ends: list[tuple[float, int, int, float, float]] = []
        self._numbers = itertools.count()

    def load(self, blocks: int, now: float) -> float:
        """Ask for blocks and return when the last one will be there."""
        end = now
        for first in range(0, blocks, BATCH):
            batch = min(BATCH, blocks - first)
            began = max(now, heapq.heappop(self._free))
            seconds = self.slowdown * (self.latency_s + batch * self.block_s)
            seconds *= self._random.lognormvariate(0.0, self._noise)
            heapq.heappush(self._free, began + seconds)
            heapq.heappush(self._ends, (began + seconds, next(self._numbers), batch, seconds, began - now))
            self.forecast.started(batch, now)
            end = max(end, began + seconds)
        return end

    def advance(self, now: float) -> None:
        """Report the loads that have ended."""
        while self._ends and self._ends[0][0] <= now:
            end, _, batch, seconds, queued = heapq.heappop(self._ends)
            self.forecast.ended(batch, seconds, queued, batch, end)

    def would_take(self, blocks: int) -> float:
        """Return how long an idle tier takes, without noise."""
        threads = len(self._free)
        free = [0.0] * threads
        for first in range(0, blocks, BATCH):
            seconds = self.latency_s + min(BATCH, blocks - first) * self.block_s
            heapq.heappush(free, heapq.heappop(free) + self.slowdown * seconds)
        return max(free) if blocks else 0.0


def trained(tier: SimulatedTier, loads: int = 60, seed: int = 3) -> float:
    """Let the tier serve loads of several sizes, one after the other; return the time after them."""
    sizes, now = random.Random(seed), 0.0
    for _ in range(loads):
        now = tier.load(sizes.choice([4, 8, 16, 32, 64]), now)
        tier.advance(now)
        now += 0.01
    return now


SPEEDS = [(0.0002, 0.0003), (0.002, 0.0005), (0.03, 0.002), (0.1, 0.0001), (0.0001, 0.02)]


# --- what is learned ----------------------------------------------------------------------------------


def test_of_a_tier_that_was_never_asked_nothing_is_known() -> None:
    assert TierForecast().expected_s(1, 0.0) is None


@pytest.mark.parametrize(("latency_s", "block_s"), SPEEDS)
@pytest.mark.parametrize("threads", [1, 4, 16])
def test_an_idle_tiers_time_is_foretold(latency_s: float, block_s: float, threads: int) -> None:
    tier = SimulatedTier(latency_s, block_s, threads, noise=0.15)
    now = trained(tier)
    for blocks in (8, 32, 64):
        expected = tier.forecast.expected_s(blocks, now)
        assert expected == pytest.approx(tier.would_take(blocks), rel=0.6)


@pytest.mark.parametrize(("latency_s", "block_s"), SPEEDS)
def test_the_queue_is_part_of_what_is_foretold(latency_s: float, block_s: float) -> None:
    tier = SimulatedTier(latency_s, block_s, noise=0.15)
    now = trained(tier)
    tier.load(160, now)
    expected = tier.forecast.expected_s(32, now)
    took = tier.load(32, now) - now
    assert expected == pytest.approx(took, rel=0.5)


def test_a_long_queue_is_not_taken_for_latency() -> None:
    tier = SimulatedTier(0.01, 0.001, noise=0.1)
    now = 0.0
    for _ in range(100):  # a load every 10 ms, of what takes 36 ms
        tier.advance(now)
        tier.load(64, now)
        now += 0.01
    now += 60.0
    tier.advance(now)
    assert tier.forecast.blocks_in_flight == 0
    expected = tier.forecast.expected_s(8, now)
    assert expected is not None
    assert expected < 3 * tier.would_take(8)


def test_one_load_that_got_stuck_changes_little() -> None:
    tier = SimulatedTier(0.005, 0.001, noise=0.1)
    now = trained(tier)
    before = tier.forecast.expected_s(32, now)
    tier.forecast.started(8, now)
    tier.forecast.ended(8, 9.0, 0.0, 8, now + 9.0)
    after = tier.forecast.expected_s(32, now + 9.0)
    assert before is not None
    assert after is not None
    assert after < 2 * before


def test_a_tier_that_became_slow_is_found_out_within_a_few_loads() -> None:
    tier = SimulatedTier(0.005, 0.001, noise=0.1)
    now = trained(tier)
    tier.slowdown = 10.0
    for _ in range(6):
        now = tier.load(32, now)
        tier.advance(now)
    assert tier.forecast.expected_s(32, now) == pytest.approx(tier.would_take(32), rel=0.5)


def test_silence_is_foretold_to_last() -> None:
    tier = SimulatedTier(0.005, 0.001)
    now = trained(tier)
    tier.forecast.started(8, now)
    expected = tier.forecast.expected_s(1, now + 30.0)
    assert expected is not None
    assert expected >= 30.0


def test_a_tier_that_never_answered_is_not_asked_for_ever() -> None:
    forecast = TierForecast()
    forecast.started(8, 0.0)
    assert worthwhile(["s3"] * 8, {"s3": forecast}, 0.01, 0.0).blocks == 8
    assert worthwhile(["s3"] * 8, {"s3": forecast}, 0.01, 1.0).blocks == 0


def test_quick_failures_are_no_speed() -> None:
    forecast = TierForecast()
    for number in range(5):
        forecast.started(8, number)
        forecast.ended(8, 0.0001, 0.0, 0, number + 0.0001)
    assert forecast.expected_s(8, 10.0) is None


def test_slow_failures_are_slowness() -> None:
    tier = SimulatedTier(0.005, 0.001)
    now = trained(tier)
    before = tier.forecast.expected_s(8, now)
    for _ in range(8):
        tier.forecast.started(8, now)
        now += 5.0
        tier.forecast.ended(8, 5.0, 0.0, 0, now)
    after = tier.forecast.expected_s(8, now)
    assert before is not None
    assert after is not None
    assert after > 5 * before


def test_good_news_after_a_pause_is_believed_at_once() -> None:
    tier = SimulatedTier(0.05, 0.01)
    now = trained(tier)
    tier.slowdown = 0.1
    now = tier.load(PROBE_BLOCKS, now + PROBE_S)
    tier.advance(now)
    expected = tier.forecast.expected_s(64, now)
    assert expected is not None
    assert expected < 2 * tier.would_take(64)


# --- the cut ------------------------------------------------------------------------------------------


def flat(latency_s: float, block_s: float) -> TierForecast:
    """Return the forecast of a tier that was always exactly this fast, until time 0."""
    sizes = [1 + number % 64 for number in range(200)]
    forecast, now = TierForecast(), -sum(latency_s + blocks * block_s for blocks in sizes)
    for blocks in sizes:
        forecast.started(blocks, now)
        now += latency_s + blocks * block_s
        forecast.ended(blocks, latency_s + blocks * block_s, 0.0, blocks, now)
    return forecast


def test_flat_is_what_it_says() -> None:
    arrival = flat(0.1, 0.01).arrival(300.0)
    assert arrival is not None
    assert arrival[:2] == pytest.approx((0.1, 0.01), rel=0.05)


CASES = {
    "a fast tier is asked for all": (["disk"] * 50, {"disk": (0.001, 0.001)}, 0.01, 50),
    "a slow tier is not asked": (["s3"] * 50, {"s3": (0.1, 0.1)}, 0.01, 0),
    "latency that a long prefix outweighs": (["s3"] * 50, {"s3": (0.1, 0.001)}, 0.01, 50),
    "latency that a short one does not": (["s3"] * 5, {"s3": (0.1, 0.001)}, 0.01, 0),
    "what is in the arena is free": (["host"] * 5 + ["s3"] * 5, {"s3": (9.0, 9.0)}, 0.01, 5),
    "a hole is worth what lies behind it": (["s3"] + ["host"] * 50, {"s3": (0.1, 0.1)}, 0.01, 51),
    "a hole with little behind it": (["s3"] + ["host"] * 5, {"s3": (0.1, 0.1)}, 0.01, 0),
    "the fast part only": (["disk"] * 20 + ["s3"] * 20, {"disk": (0, 0.001), "s3": (1, 0.1)}, 0.01, 20),
    "in the shadow of another tier": (
        ["s3"] * 20 + ["slow"] * 20,
        {"s3": (0.1, 0.0), "slow": (0.0, 0.02)},
        0.01,
        25,
    ),
    "nothing reachable": ([], {"s3": (0.1, 0.1)}, 0.01, 0),
}


@pytest.mark.parametrize(("tiers", "speeds", "block_s", "blocks"), CASES.values(), ids=CASES.keys())
def test_cuts(
    tiers: list[str], speeds: Mapping[str, tuple[float, float]], block_s: float, blocks: int
) -> None:
    forecasts = {tier: flat(*speed) for tier, speed in speeds.items()}
    assert worthwhile(tiers, forecasts, block_s, 1.0).blocks == pytest.approx(blocks, abs=1)


def test_everything_is_asked_for_while_the_engines_speed_is_not_known() -> None:
    assert worthwhile(["s3"] * 50, {"s3": flat(9.0, 9.0)}, None, 201.0).blocks == 50


def test_everything_is_asked_of_a_tier_of_unknown_speed() -> None:
    assert worthwhile(["s3"] * 50, {"s3": TierForecast()}, 1e-9, 0.0) == Cut(50, 0, None)


def test_a_tier_that_is_always_asked_is_always_asked() -> None:
    forecast = TierForecast(is_always_asked=True)
    forecast.started(8, 0.0)
    forecast.ended(8, 100.0, 0.0, 8, 100.0)
    assert worthwhile(["s3"] * 50, {"s3": forecast}, 1e-9, 101.0).blocks == 50


def test_blocks_that_are_on_their_way_for_another_are_not_counted_twice() -> None:
    forecast = flat(0.0, 0.01)
    forecast.started(40, 300.0)
    assert worthwhile(["s3"] * 40, {"s3": forecast}, 0.015, 300.0).blocks == 0
    assert worthwhile(["s3"] * 40, {"s3": forecast}, 0.015, 300.0, joined=range(40)).blocks == 40


def test_the_cut_tells_when_the_whole_prefix_would_have_come() -> None:
    cut = worthwhile(["disk"] * 20 + ["s3"] * 20, {"disk": flat(0, 0.001), "s3": flat(1, 0.1)}, 0.01, 300.0)
    assert cut.expected_s == pytest.approx(3.0, rel=0.05)


def gain(cut: int, tiers: Sequence[str], simulated: Mapping[str, SimulatedTier], block_s: float) -> float:
    """Return what a cut is worth in truth: time to compute it less time to have it."""
    counts = {name: list(tiers[:cut]).count(name) for name in simulated}
    return cut * block_s - max((simulated[name].would_take(counts[name]) for name in counts), default=0.0)


@pytest.mark.parametrize("seed", range(25))
def test_the_cut_is_nearly_as_good_as_that_of_somebody_who_knows_the_tiers(seed: int) -> None:
    draw = random.Random(seed)
    simulated = {
        name: SimulatedTier(
            10 ** draw.uniform(-4, -1), 10 ** draw.uniform(-4, -1.5), draw.choice([1, 4, 8]), 0.15, seed
        )
        for name in ("disk", "s3")
    }
    now = max(trained(tier) for tier in simulated.values())
    forecasts = {name: tier.forecast for name, tier in simulated.items()}
    block_s = 10 ** draw.uniform(-3.5, -1.5)
    runs = [[draw.choice(["host", "disk", "s3"])] * draw.randint(1, 40) for _ in range(6)]
    tiers = list(itertools.chain.from_iterable(runs))
    best = max(gain(cut, tiers, simulated, block_s) for cut in range(len(tiers) + 1))
    ours = gain(worthwhile(tiers, forecasts, block_s, now).blocks, tiers, simulated, block_s)
    assert ours >= best - 0.15 * len(tiers) * block_s


# --- over an hour -------------------------------------------------------------------------------------


class Hour:
    """An hour of requests for 32 blocks each, one every ``pause_s``, against one tier."""

    def __init__(self, tier: SimulatedTier, block_s: float, pause_s: float = 2.0) -> None:
        self.tier, self.block_s, self._pause_s = tier, block_s, pause_s
        self.now = 0.0
        self.regret_s = 0.0
        self.asked_blocks = 0
        self.requests = 0

    def run(self, until: float) -> None:
        while self.now < until:
            self.tier.advance(self.now)
            cut = worthwhile(["s3"] * 32, {"s3": self.tier.forecast}, self.block_s, self.now)
            self.requests += 1
            self.asked_blocks += cut.blocks
            if cut.blocks + cut.probe:
                end = self.tier.load(cut.blocks + cut.probe, self.now)
                if cut.blocks:
                    self.regret_s += max(0.0, end - self.now - cut.blocks * self.block_s)
            self.now += self._pause_s


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_tier_ten_times_slower_than_computing_costs_next_to_nothing_in_an_hour(noise: float) -> None:
    hour = Hour(SimulatedTier(0.02, 0.4, noise=noise), block_s=0.01)
    hour.run(3600.0)
    always = hour.requests * (hour.tier.would_take(32) - 32 * hour.block_s)
    assert hour.regret_s < 0.005 * always
    assert hour.asked_blocks < 0.01 * 32 * hour.requests


def test_a_tier_that_is_faster_than_computing_is_asked_for_the_hour() -> None:
    hour = Hour(SimulatedTier(0.005, 0.002, noise=0.3), block_s=0.01)
    hour.run(3600.0)
    assert hour.asked_blocks > 0.99 * 32 * hour.requests


def test_a_tier_that_is_fast_again_is_used_again_within_two_probes() -> None:
    hour = Hour(SimulatedTier(0.005, 0.002, noise=0.1), block_s=0.01)
    hour.run(600.0)
    hour.tier.slowdown = 50.0
    hour.run(1800.0)
    before = hour.asked_blocks
    hour.run(1860.0)
    assert hour.asked_blocks == before
    hour.tier.slowdown = 1.0
    hour.run(1860.0 + 2 * PROBE_S + 4.0)
    before, requests = hour.asked_blocks, hour.requests
    hour.run(2400.0)
    assert hour.asked_blocks - before > 0.95 * 32 * (hour.requests - requests)


def test_probes_are_small_rare_and_not_waited_for() -> None:
    tier = SimulatedTier(0.02, 0.4)
    now = trained(tier)
    assert worthwhile(["s3"] * 32, {"s3": tier.forecast}, 0.01, now)[:2] == (0, 0)
    assert worthwhile(["s3"] * 32, {"s3": tier.forecast}, 0.01, now + PROBE_S)[:2] == (0, PROBE_BLOCKS)
    tier.load(PROBE_BLOCKS, now + PROBE_S)
    assert worthwhile(["s3"] * 32, {"s3": tier.forecast}, 0.01, now + 3 * PROBE_S).probe == 0


def test_a_probe_asks_no_other_tier() -> None:
    slow = flat(9.0, 9.0)
    cut = worthwhile(["host", "s3", "disk", "s3"], {"s3": slow, "disk": flat(9.0, 9.0)}, 0.01, 300.0)
    assert cut[:2] == (1, 1)


# --- whatever happens ---------------------------------------------------------------------------------

SECONDS = st.floats(0.0, 1e4, allow_nan=False)
EVENTS = st.lists(
    st.tuples(st.booleans(), st.integers(1, 64), SECONDS, SECONDS, st.integers(0, 64), SECONDS), max_size=30
)


def told(events: Sequence[tuple[bool, int, float, float, int, float]]) -> tuple[TierForecast, float]:
    forecast, now = TierForecast(), 0.0
    for is_start, blocks, duration, queued, ok_blocks, later in events:
        now += later
        if is_start:
            forecast.started(blocks, now)
        else:
            forecast.ended(blocks, duration, queued, min(ok_blocks, blocks), now)
    return forecast, now


@given(events=EVENTS, later=SECONDS)
def test_more_blocks_never_come_sooner(events: list[tuple], later: float) -> None:  # type: ignore[type-arg]
    forecast, now = told(events)
    times = [forecast.expected_s(blocks, now + later) for blocks in range(0, 65, 8)]
    if times[0] is None:
        assert not any(times)
        return
    for sooner, later_s in itertools.pairwise(times):
        assert sooner is not None
        assert later_s is not None
        assert 0 <= sooner <= later_s


@given(
    events=st.tuples(EVENTS, EVENTS),
    tiers=st.lists(st.sampled_from(["host", "disk", "s3"]), max_size=60),
    block_s=st.one_of(st.none(), st.just(0.0), st.floats(1e-6, 10.0)),
    joined=st.sets(st.integers(0, 60)),
    later=SECONDS,
)
def test_any_cut_is_sound(
    events: tuple[list, list],  # type: ignore[type-arg]
    tiers: list[str],
    block_s: float | None,
    joined: set[int],
    later: float,
) -> None:
    (disk, disk_now), (s3, s3_now) = map(told, events)
    now = max(disk_now, s3_now) + later
    cut, probe, _ = worthwhile(tiers, {"disk": disk, "s3": s3}, block_s, now, joined)
    assert 0 <= cut <= cut + probe <= len(tiers)
    assert tiers[cut : cut + 1] != ["host"], "what is in the arena was cut off"
    if block_s is None:
        assert cut == len(tiers)


@given(
    speeds=st.tuples(SECONDS, SECONDS, SECONDS, SECONDS),
    tiers=st.lists(st.sampled_from(["host", "disk", "s3"]), max_size=40),
    block_s=st.floats(1e-3, 10.0),
)
def test_no_other_cut_is_better_by_the_forecasts(
    speeds: tuple[float, float, float, float], tiers: list[str], block_s: float
) -> None:
    forecasts = {"disk": flat(*speeds[:2]), "s3": flat(*speeds[2:])}

    def foretold(cut: int) -> float:
        asked = {name: tiers[:cut].count(name) for name in forecasts}
        waits = [forecasts[name].expected_s(count, 1e6) or 0.0 for name, count in asked.items() if count]
        return cut * block_s - max(waits, default=0.0)

    best = max(foretold(cut) for cut in range(len(tiers) + 1))
    ours = foretold(worthwhile(tiers, forecasts, block_s, 1e6).blocks)
    assert ours == pytest.approx(best, rel=1e-6, abs=1e-6)
