"""What deciding between loading and computing is worth, on simulated tiers with the real forecast.

    python benchmarks/load_or_recompute.py

An hour of requests, each with a prefix of 1 to 128 blocks in one tier; the engine computes a block in 10 ms.
The tier serves calls of 8 blocks on 4 threads and alone delivers a block in ``speed`` times less than that,
after a latency. ``changing`` is fast and slow in turn, ten minutes each. Printed is the mean time until a
prefix is there, loaded or computed, and in brackets the regret: the time by which waits were longer than
computing would have been. Computing doesn't queue here; on a busy engine it does, which favours loading.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import click

from kvferry.connector.forecast import Cut, TierForecast, worthwhile
from kvferry.engines.waiting import wait_limit

HOUR_S = 3600.0
BLOCK_S = 0.01
BATCH = 8
THREADS = 4
DEADLINE_S = 5.0
TIER = "tier"


class Tier:
    """Threads that serve calls in the order in which they are made, with noise."""

    def __init__(self, latency_s: float, speed: Callable[[float], float], seed: int) -> None:
        self._latency_s, self._speed = latency_s, speed
        self._random = random.Random(seed)
        self._free = [0.0] * THREADS
        self._ends: list[tuple[float, int, int, float, float]] = []
        self._numbers = itertools.count()
        self.forecast = TierForecast()

    def load(self, blocks: int, now: float) -> list[float]:
        """Return when each block will have arrived."""
        arrivals: list[float] = []
        for first in range(0, blocks, BATCH):
            batch = min(BATCH, blocks - first)
            began = max(now, heapq.heappop(self._free))
            seconds = self._latency_s + batch * THREADS * BLOCK_S / self._speed(now)
            seconds *= self._random.lognormvariate(0.0, 0.3)
            heapq.heappush(self._free, began + seconds)
            heapq.heappush(self._ends, (began + seconds, next(self._numbers), batch, seconds, began - now))
            self.forecast.started(batch, now)
            arrivals += [began + seconds] * batch
        return arrivals

    def advance(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            end, _, batch, seconds, queued = heapq.heappop(self._ends)
            self.forecast.ended(batch, seconds, queued, batch, end)


class Policy(NamedTuple):
    """How much to ask for, and how long to wait for it."""

    cut: Callable[[int, TierForecast, float], Cut]
    limit_s: Callable[[int], float]


POLICIES = {
    "compute": Policy(lambda blocks, forecast, now: Cut(0, 0, None), lambda blocks: 0.0),
    "load": Policy(lambda blocks, forecast, now: Cut(blocks, 0, None), lambda blocks: DEADLINE_S),
    "load, bounded": Policy(
        lambda blocks, forecast, now: Cut(blocks, 0, None),
        lambda blocks: wait_limit(blocks, BLOCK_S, DEADLINE_S),
    ),
    "forecast, bounded": Policy(
        lambda blocks, forecast, now: worthwhile([TIER] * blocks, {TIER: forecast}, BLOCK_S, now),
        lambda blocks: wait_limit(blocks, BLOCK_S, DEADLINE_S),
    ),
}


def hour(tier: Tier, policy: Policy, pause_s: float) -> tuple[float, float]:
    """Serve an hour of requests; return the mean time to have a prefix and the mean regret, in seconds."""
    draw = random.Random(7)
    now = spent = regret = 0.0
    requests = 0
    while now < HOUR_S:
        now += draw.expovariate(1 / pause_s)
        tier.advance(now)
        blocks = draw.choice([1, 4, 16, 32, 64, 128])
        cut = policy.cut(blocks, tier.forecast, now)
        arrivals = tier.load(cut.blocks + cut.probe, now)[: cut.blocks]
        end = min(max(arrivals, default=now), now + policy.limit_s(cut.blocks))
        came = next((index for index, arrival in enumerate(arrivals) if arrival > end), len(arrivals))
        spent += end - now + (blocks - came) * BLOCK_S
        regret += max(0.0, end - now - came * BLOCK_S)
        requests += 1
    return spent / requests, regret / requests


def changing(now: float) -> float:
    return 10.0 if int(now / 600) % 2 == 0 else 0.1


TIERS: dict[str, tuple[float, Callable[[float], float]]] = {
    "speed 30, 1 ms": (0.001, lambda now: 30.0),
    "speed 3, 30 ms": (0.03, lambda now: 3.0),
    "speed 1, 30 ms": (0.03, lambda now: 1.0),
    "speed 0.3, 30 ms": (0.03, lambda now: 0.3),
    "speed 0.1, 100 ms": (0.1, lambda now: 0.1),
    "changing 10 / 0.1, 10 ms": (0.01, changing),
}


@click.command(help=__doc__)
@click.option("--pause", "pause_s", default=2.0, show_default=True, help="Mean seconds between requests.")
def main(pause_s: float) -> None:
    click.echo(f"{'mean ms (regret)':26}" + "".join(f"{name:>22}" for name in POLICIES))
    for name, (latency_s, speed) in TIERS.items():
        cells = []
        for policy in POLICIES.values():
            spent_s, regret_s = hour(Tier(latency_s, speed, seed=3), policy, pause_s)
            cells.append(f"{f'{spent_s * 1e3:,.0f} ({regret_s * 1e3:,.1f})':>22}")
        click.echo(f"{name:26}" + "".join(cells))


if __name__ == "__main__":
    main()
