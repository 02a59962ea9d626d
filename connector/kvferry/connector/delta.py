"""What happened, counted as plain data that crosses any process boundary.

What happens is counted in a ``Counts`` (cheap, plain dicts); its ``take`` yields a *delta* that travels wherever
JSON does, such as vLLM's connector-stats channel, and is merged on the way.

A delta is ``{metric name: {label values joined by "|": value}}``; the value is a number to add (counter), a
number to show (gauge) or a list of observations (histogram). Label values never contain ``|``.

Threading: a ``Counts`` is owned by one thread.
"""

from __future__ import annotations

from kvferry.connector.metric import Metric, is_counter

__all__ = ["MAX_OBSERVATIONS", "SEPARATOR", "Counts", "Delta", "merge"]

Delta = dict[str, dict[str, float | list[float]]]
"""What was counted since the last delta, as plain data."""

MAX_OBSERVATIONS = 4096
"""Observations one delta keeps per metric and label; more are left out of the histogram."""
SEPARATOR = "|"
"""Between the values of a series' labels."""


class Counts:
    """Counts what happens, cheaply, until somebody takes the delta."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: Delta = {}

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        """Add ``amount`` to a counter."""
        series = self._values.setdefault(metric.name, {})
        label = SEPARATOR.join(labels)
        series[label] = series.get(label, 0.0) + amount  # type: ignore[operator]

    def show(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge to ``value``."""
        self._values.setdefault(metric.name, {})[SEPARATOR.join(labels)] = value

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add one observation to a histogram."""
        series = self._values.setdefault(metric.name, {})
        seen = series.setdefault(SEPARATOR.join(labels), [])
        if isinstance(seen, list) and len(seen) < MAX_OBSERVATIONS:
            seen.append(value)

    def take(self) -> Delta:
        """Return what was counted since the last call and start again from nothing."""
        delta, self._values = self._values, {}
        return delta


def merge(first: Delta, second: Delta) -> Delta:
    """Return the delta of both periods: counters add up, the later gauge counts, observations join."""
    merged: Delta = {name: dict(series) for name, series in first.items()}
    for name, series in second.items():
        into = merged.setdefault(name, {})
        for label, value in series.items():
            into[label] = _merged(name, into.get(label), value)
    return merged


def _merged(name: str, old: float | list[float] | None, new: float | list[float]) -> float | list[float]:
    if isinstance(old, list) and isinstance(new, list):
        return (old + new)[:MAX_OBSERVATIONS]
    if is_counter(name) and isinstance(old, int | float) and isinstance(new, int | float):
        return old + new
    return new
