"""How long calls took, counted in buckets: small enough to be copied, and kept for as long as a tier lives.

Values only.
"""

from __future__ import annotations

import bisect

__all__ = ["BATCH_BOUNDS_S", "cumulated", "empty_buckets", "note"]

BATCH_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds, in seconds, of the buckets for one call of a tier; a last bucket holds what took longer."""


def empty_buckets() -> list[int]:
    """Return a count of nothing for each bucket."""
    return [0] * (len(BATCH_BOUNDS_S) + 1)


def note(buckets: list[int], seconds: float) -> None:
    """Count one call that took ``seconds``."""
    buckets[bisect.bisect_left(BATCH_BOUNDS_S, seconds)] += 1


def cumulated(buckets: list[int]) -> list[tuple[float, int]]:
    """Return (upper bound in seconds, calls within it) for each bucket; the last bound is infinity."""
    total = 0
    cumulative = []
    for bound, count in zip((*BATCH_BOUNDS_S, float("inf")), buckets, strict=True):
        total += count
        cumulative.append((bound, total))
    return cumulative
