"""One line of the table of metrics: what a metric is called, how it behaves and where it appears. Values only."""

from __future__ import annotations

import enum

import msgspec

__all__ = ["Kind", "Metric", "Scope", "is_counter"]


class Kind(enum.Enum):
    """How a metric behaves."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Scope(enum.Enum):
    """What a metric is about, and so where it appears."""

    ENGINE = "engine"
    """An engine's use of the cache: on the engine's page."""
    CACHE = "cache"
    """One cache: on the page of the engine that it is embedded in, or the cache server's, once a pool."""
    POOL = "pool"
    """One cache of a server: on the server's page, once a pool."""
    SERVER = "server"
    """A cache server as a whole: on its page."""


class Metric(msgspec.Struct, frozen=True):
    """One line of the table."""

    name: str
    help: str
    unit: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    scope: Scope = Scope.CACHE

    @property
    def kind(self) -> Kind:
        """Counter when the name ends in ``_total``, histogram when there are buckets, else gauge."""
        if is_counter(self.name):
            return Kind.COUNTER
        return Kind.HISTOGRAM if self.buckets else Kind.GAUGE


def is_counter(name: str) -> bool:
    """Tell whether the metric of this name is a counter, also of one that this version does not know."""
    return name.endswith("_total")
