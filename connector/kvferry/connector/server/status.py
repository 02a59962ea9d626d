"""What a cache server tells about itself: the one snapshot behind ``/status.json``, the status page,
``kvferry top`` and the metrics.

Values only; ``index`` makes them on its own thread.
"""

from __future__ import annotations

import msgspec

from kvferry.connector.counters import ServiceCounters

__all__ = ["ConnectionStatus", "PoolStatus", "ServerStatus"]


class ConnectionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One client."""

    engine: str
    """The name it gave."""
    tenant: str
    fingerprint: str
    """First 8 hex digits."""
    mode: str
    """``map`` or ``stream``."""
    connected_s: float
    requests: int
    """Requests since it connected."""


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The cache of one tenant's model."""

    tenant: str
    fingerprint: str
    """First 8 hex digits of the model's fingerprint."""
    block_tokens: int
    block_bytes: int
    connections: int
    dead_writers: int
    """Engines that are gone while one of their processes may still write: what they reserved waits for it."""
    counters: ServiceCounters
    problems: list[str] = []
    """A line for each configured tier that it goes on without."""


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, at one instant."""

    version: str
    server_id: str
    started: float
    """Unix time."""
    now: float
    """Unix time."""
    is_ready: bool
    """It listens and does not drain."""
    is_draining: bool
    pools: list[PoolStatus]
    connections: list[ConnectionStatus]
    requests: dict[str, int]
    """Requests since the start, by type of message."""
    refused_connections: dict[str, int]
    """By reason: ``credential``, ``protocol``, ``timeout``, ``full``, ``layout``, ``no_room`` and so on."""
    lookup_seconds: list[tuple[float, int]] = []
    """Cumulative histogram of the time from a lookup's arrival to its answer: (upper bound in seconds, count);
    the last bound is infinity."""
