"""Forecasts: when blocks would arrive from a tier, and whether that is before the engine has computed them.

A tier's blocks arrive after ``latency + blocks * per_block`` seconds, counting the blocks that are on
their way before them, and not before a call for one block would end. The figures are learned from loads
that ended. Each one tells how many blocks the tier delivered, to whomever, from the moment the load was
asked for until it ended. That is the figure somebody who waits is interested in: it contains the queue,
the threads that work beside each other and the bandwidth they share, without a model of any of them.

How the estimate behaves
  * The last dozen loads count most. A load that took longer than four times what was expected counts as
    four times, so that one that got stuck says little and a tier that became slow says it repeatedly.
  * Where all loads were of one size, half of their time is taken for latency.
  * While blocks are on their way and nothing arrives, the silence so far is the least to expect: a tier
    that hangs is not asked any more although none of its loads has ended.
  * Without loads a forecast goes stale. What the first load after a pause says restates everything that
    was learned before it: good news at once, bad news by half at most. So that there is such a load,
    a tier that is not asked because it is too slow is sent a *probe* every ``PROBE_S`` seconds: a few
    blocks that nobody waits for.

Pure state, owned by the manager's thread. ``now`` is monotonic seconds, as in ``manager``.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

__all__ = ["PROBE_BLOCKS", "PROBE_S", "Cut", "TierForecast", "worthwhile"]

PROBE_S = 15.0
"""Seconds without a load after which a tier that is held to be too slow is probed."""
PROBE_BLOCKS = 4
"""Blocks of a probe."""

_KEPT = 11 / 12
"""How much of the past's weight is left after another load."""
_OUTLIER = 4.0
"""A load counts as at most so many times longer than expected."""
_STALE_S = PROBE_S
"""Pause after which half of what was learned before it is in doubt."""
_PRIOR_SHARE = 0.5
"""Share of a load's time that is taken to grow with its blocks, until loads of several sizes tell."""
_PRIOR_SPREAD = 0.1
"""Relative spread of sizes at which what was measured counts as much as that."""
_SMALL_BLOCKS = 8
"""Loads of more blocks than this count by their relative error, smaller ones by their absolute one."""
_REMEMBERED_LOADS = 512


class _Line:
    """A line through what was measured lately, by weighted least squares."""

    __slots__ = ("_w", "_wx", "_wxx", "_wxy", "_wy")

    def __init__(self) -> None:
        self._w = self._wx = self._wy = self._wxx = self._wxy = 0.0

    @property
    def is_known(self) -> bool:
        return self._w > 0

    @property
    def mean(self) -> tuple[float, float]:
        """Blocks and seconds of the load in the middle."""
        return self._wx / self._w, self._wy / self._w

    def add(self, blocks: int, seconds: float) -> None:
        weight = (_SMALL_BLOCKS + blocks) ** -2
        self._w = self._w * _KEPT + weight
        self._wx = self._wx * _KEPT + weight * blocks
        self._wy = self._wy * _KEPT + weight * seconds
        self._wxx = self._wxx * _KEPT + weight * blocks * blocks
        self._wxy = self._wxy * _KEPT + weight * blocks * seconds

    def scale(self, factor: float) -> None:
        self._wy *= factor
        self._wxy *= factor

    def latency_s(self) -> float:
        """Return where the line begins, between nothing and the mean."""
        blocks, seconds = self.mean
        variance = max(0.0, self._wxx / self._w - blocks * blocks)
        covariance = self._wxy / self._w - blocks * seconds
        trust = (_PRIOR_SPREAD * blocks) ** 2
        slope = (covariance + trust * _PRIOR_SHARE * seconds / blocks) / (variance + trust)
        return min(max(0.0, seconds - slope * blocks), seconds)


class _Speed:
    """What is known of a tier's speed: of its calls, and of the blocks it delivers in them."""

    __slots__ = ("_calls", "_deliveries", "latency_s", "least_s", "per_block_s")

    def __init__(self) -> None:
        self._calls = _Line()
        self._deliveries = _Line()
        self.latency_s = 0.0
        self.per_block_s = 0.0
        self.least_s = 0.0
        """Seconds of a call for one block."""

    @property
    def is_known(self) -> bool:
        return self._deliveries.is_known

    def seconds(self, blocks: int) -> float:
        return max(self.least_s, self.latency_s + blocks * self.per_block_s)

    def learn(self, call: tuple[int, float], delivery: tuple[int, float], pause_s: float) -> None:
        """Take in the end of a load.

        Args:
            call: Blocks and seconds of the call.
            delivery: Blocks that came from when the load was asked for until it ended, and the
                seconds in between.
            pause_s: Seconds without a load before it.
        """
        blocks, seconds = delivery
        expected = self.seconds(blocks)
        if self.is_known and expected > 0:
            seconds = min(seconds, _OUTLIER * expected)
            self._restate(seconds / expected, pause_s)
        self._deliveries.add(blocks, seconds)
        self._calls.add(call[0], min(call[1], seconds))
        # Latency is a part of a call. Long queues of much the same length would let it seem more.
        mean_blocks, mean_s = self._deliveries.mean
        _, call_s = self._calls.mean
        self.latency_s = min(self._deliveries.latency_s(), call_s)
        self.per_block_s = max(0.0, mean_s - self.latency_s) / mean_blocks
        mean_blocks, mean_s = self._calls.mean
        latency_s = self._calls.latency_s()
        self.least_s = latency_s + (mean_s - latency_s) / mean_blocks

    def _restate(self, ratio: float, pause_s: float) -> None:
        """Scale the past by how the tier does now, as far as the past is stale."""
        doubt = 1 - 0.5 ** (pause_s / _STALE_S)
        scale = 1 - (1 - ratio) * (min(1.0, 2 * doubt) if ratio < 1 else doubt / 2)
        self._deliveries.scale(scale)
        self._calls.scale(scale)


class Arrival(NamedTuple):
    """When more blocks would arrive if they were asked for now."""

    base_s: float
    """Seconds until the blocks that are on their way have arrived, the first wait included."""
    per_block_s: float
    """Further seconds for each block that is asked for."""
    least_s: float
    """Seconds that even one block takes."""

    def seconds(self, blocks: int) -> float:
        """Return the seconds until ``blocks`` more have arrived."""
        return max(self.least_s, self.base_s + blocks * self.per_block_s)


class TierForecast:
    """Learns how fast one tier delivers, and foretells it.

    Every load is told twice, ``started`` and ``ended``, whatever becomes of it.

    Args:
        is_always_asked: Foretell nothing, so that the tier is asked whatever was measured.
    """

    def __init__(self, is_always_asked: bool = False) -> None:
        self._is_always_asked = is_always_asked
        self._speed = _Speed()
        self._blocks_in_flight = 0
        self._delivered = 0
        self._deliveries: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED_LOADS)
        self._heard = 0.0
        """When a load ended, or the first one of a busy time was sent."""
        self._learned: float | None = None
        self._last_started: float | None = None

    @property
    def blocks_in_flight(self) -> int:
        """Blocks that were asked for and have not come."""
        return self._blocks_in_flight

    def started(self, blocks: int, now: float) -> None:
        """Note that a load of ``blocks`` was sent to the tier."""
        if not self._blocks_in_flight:
            self._heard = now
        self._blocks_in_flight += blocks
        self._last_started = now

    def ended(self, blocks: int, duration_s: float, queued_s: float, ok_blocks: int, now: float) -> None:
        """Take in the end of a load, good or bad.

        Args:
            blocks: Blocks of the load, as they were started.
            duration_s: Seconds of the tier's call.
            queued_s: Seconds the load waited for a thread before it.
            ok_blocks: How many of them were delivered.
            now: The time; when ends are taken in together, all may have the same.
        """
        self._blocks_in_flight = max(0, self._blocks_in_flight - blocks)
        self._heard = now
        took_s = max(0.0, duration_s) + max(0.0, queued_s)
        if ok_blocks > 0:
            self._delivered += ok_blocks
            before = self._delivered_before(now - took_s)
            self._deliveries.append((now, self._delivered))
            self._learn((blocks, duration_s), (self._delivered - before, took_s), now)
        elif self._speed.is_known and took_s > self._speed.seconds(blocks):
            # A failure says nothing of how fast the tier delivers, unless it took its time to fail.
            self._learn((blocks, duration_s), (blocks, took_s), now)

    def arrival(self, now: float) -> Arrival | None:
        """Foretell when more blocks would arrive; None when nothing is known yet."""
        if self._is_always_asked:
            return None
        waiting = self._blocks_in_flight
        silence_s = now - self._heard if waiting else 0.0
        speed = self._speed
        if not speed.is_known:
            return Arrival(silence_s, 0.0, 0.0) if waiting else None
        base_s = max(speed.latency_s + waiting * speed.per_block_s, silence_s)
        return Arrival(base_s, speed.per_block_s, speed.least_s)

    def expected_s(self, blocks: int, now: float) -> float | None:
        """Return the seconds until ``blocks`` more would have arrived, asked for now, behind the others.

        Returns:
            None when nothing is known yet: ask then, that is how it becomes known.
        """
        arrival = self.arrival(now)
        return None if arrival is None else arrival.seconds(blocks)

    def wants_probe(self, now: float) -> bool:
        """Tell whether it is time to try the tier although it is expected to be too slow."""
        if self._blocks_in_flight:
            return False
        return self._last_started is None or now - self._last_started >= PROBE_S

    def _learn(self, call: tuple[int, float], delivery: tuple[int, float], now: float) -> None:
        pause_s = 0.0 if self._learned is None else max(0.0, now - delivery[1] - self._learned)
        self._learned = now
        self._speed.learn(call, delivery, pause_s)

    def _delivered_before(self, time: float) -> int:
        for when, delivered in reversed(self._deliveries):
            if when <= time:
                return delivered
        return self._deliveries[0][1] if len(self._deliveries) == _REMEMBERED_LOADS else 0


class Cut(NamedTuple):
    """How much of a reachable prefix to ask for."""

    blocks: int
    """Leading blocks that are worth being waited for."""
    probe: int
    """Blocks after them to load as well, without waiting for them: a probe of their tier."""
    expected_s: float | None
    """Seconds until the whole prefix would have arrived; None when a tier's speed is not known."""


def worthwhile(
    tiers: Sequence[str],
    forecasts: Mapping[str, TierForecast],
    block_s: float | None,
    now: float,
    joined: Collection[int] = frozenset(),
) -> Cut:
    """Choose the cut of a prefix that is ready soonest, loads and computing the rest together.

    The tiers work beside each other, so a prefix has arrived when the last of its tiers has delivered.
    The best cut is the one with the largest difference between the time to compute the prefix and the
    time until it has arrived. Takes time in the order of the prefix's length.

    Args:
        tiers: For each reachable block, in order, the tier it would come from. Tiers without a forecast
            are free, as the arena is.
        forecasts: By tier.
        block_s: Seconds in which the engine computes a block; None when not known: ask for everything.
        now: The time.
        joined: Indices of blocks that are on their way; they come without being asked for again.
    """
    best, best_gain = 0, 0.0
    arrived_s, index = 0.0, 0
    is_known = True
    asked: dict[str, int] = dict.fromkeys(forecasts, 0)
    for tier, is_joined, count in _runs(tiers, joined):
        forecast = forecasts.get(tier)
        arrival = forecast.arrival(now) if forecast else None
        is_known = is_known and (arrival is not None or forecast is None)
        if arrival is not None:
            if not is_joined:
                arrived_s = max(arrived_s, arrival.least_s)
            per_block_s = 0.0 if is_joined else arrival.per_block_s
            start_s = arrival.base_s + asked[tier] * arrival.per_block_s
            if block_s is not None and per_block_s > block_s:
                # Each further block costs more than it saves: only those count that come no later
                # than what is awaited anyway.
                timely = int(min(float(count), max(0.0, (arrived_s - start_s) / per_block_s)))
                gain = (index + timely) * block_s - arrived_s
                if timely > 0 and gain >= best_gain:
                    best, best_gain = index + timely, gain
            arrived_s = max(arrived_s, start_s + count * per_block_s)
            asked[tier] += 0 if is_joined else count
        index += count
        if block_s is not None and index * block_s - arrived_s >= best_gain:
            best, best_gain = index, index * block_s - arrived_s
    cut = index if block_s is None else best
    return Cut(cut, _probe(tiers, forecasts, cut, now), arrived_s if is_known else None)


def _runs(tiers: Sequence[str], joined: Collection[int]) -> Iterator[tuple[str, bool, int]]:
    """Yield tier, whether the blocks are on their way, and count, of blocks that have both in common."""
    if not joined:
        for tier, same in itertools.groupby(tiers):
            yield tier, False, len(list(same))
        return
    marked = ((tier, index in joined) for index, tier in enumerate(tiers))
    for (tier, is_joined), run in itertools.groupby(marked):
        yield tier, is_joined, len(list(run))


def _probe(tiers: Sequence[str], forecasts: Mapping[str, TierForecast], cut: int, now: float) -> int:
    """Return how many blocks after the cut to load as a probe."""
    forecast = forecasts.get(tiers[cut]) if cut < len(tiers) else None
    if forecast is None or not forecast.wants_probe(now):
        return 0
    candidates = tiers[cut : cut + PROBE_BLOCKS]
    return sum(1 for _ in itertools.takewhile(lambda tier: tier == tiers[cut], candidates))
