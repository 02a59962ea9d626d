"""How things are timed: sides of a comparison take turns, and medians are compared.

Whatever else the machine does then hits every side alike, and one slow moment moves no figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved", "percentile"]


def interleaved(
    sides: Mapping[str, Callable[[int], None]],
    repetitions: int,
    progress: Callable[[float], None],
) -> dict[str, float]:
    """Time every side ``repetitions`` times in turn, changing who goes first.

    Args:
        sides: By name, what to time; called with the number of the repetition. One call before the
            first is not counted.
        repetitions: Timed calls of each side.
        progress: Told the part that is done.

    Returns:
        Median seconds of one call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for repetition in range(-1, repetitions):
        for name in order:
            started = time.perf_counter()
            sides[name](repetition)
            elapsed = time.perf_counter() - started
            if repetition >= 0:
                times[name].append(elapsed)
        order.reverse()
        progress((repetition + 2) / (repetitions + 1))
    return {name: statistics.median(taken) for name, taken in times.items()}


def percentile(values: list[float], percent: float) -> float:
    """Return the smallest value that at least ``percent`` of the values do not exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
