"""What is known of the servers' sizes, so that ``stats`` need not ask them.

With a capacity, every change of a partition's index brings its sums along. Without one, the servers are
asked for their own figures now and then, by a call that they have just answered.

Thread-safe: ``_lock`` guards the figures and is never held across I/O.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import msgspec

from kvferry.connector.tier import TierStats
from kvferry.plugins.redis.keyspace import Usage
from kvferry.plugins.redis.servers import Place, connection_to
from kvferry.plugins.redis.wire import Argument, Deadline, Reader, pack

__all__ = ["INFO", "KEYS", "Census", "ServerFacts", "ask_facts", "facts_of"]

INFO: tuple[Argument, ...] = (b"INFO",)
KEYS: tuple[Argument, ...] = (b"DBSIZE",)
"""The commands that ask a server for its figures, and for its number of keys."""

_LOOK_EVERY_S = 10.0
_REFUSED_S = 600.0


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What one server says about itself."""

    version: str = ""
    maxmemory: int = 0
    """0 when nothing bounds it."""
    policy: str = ""
    used_memory: int = 0
    evicted_keys: int = 0
    keys: int = 0
    is_cluster: bool = False
    is_aof: bool = False
    """Every store is also written to an append-only file."""


def ask_facts(place: Place, deadline: Deadline) -> ServerFacts:
    """Ask a server for its figures.

    Raises:
        redis.exceptions.RedisError: It does not answer, or does not allow ``INFO``.
    """
    with connection_to(place, deadline) as (connection, wire):
        connection.send_packed_command(pack([INFO, KEYS]), check_health=False)
        reader = Reader(wire, deadline)
        return facts_of(reader.reply(), reader.reply())


def facts_of(info: object, keys: object) -> ServerFacts:
    """Return what the replies to ``INFO`` and ``KEYS`` say."""
    text = info.decode(errors="replace") if isinstance(info, bytes) else ""
    said = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return ServerFacts(
        version=said.get("valkey_version") or said.get("redis_version", ""),
        maxmemory=_number(said.get("maxmemory")),
        policy=said.get("maxmemory_policy", ""),
        used_memory=_number(said.get("used_memory")),
        evicted_keys=_number(said.get("evicted_keys")),
        keys=keys if isinstance(keys, int) else 0,
        is_cluster=said.get("cluster_enabled") == "1",
        is_aof=said.get("aof_enabled") == "1",
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdecimal() else 0


class Census:
    """The latest figures.

    Args:
        capacity: The operator's capacity; None where the servers' own memory is the bound.
    """

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._partitions: dict[int, Usage] = {}
        self._evictions = 0
        self._servers: dict[str, ServerFacts] = {}
        self._first: dict[str, int] = {}
        self._due_at: dict[str, float] = {}

    def count(self, partition: int, usage: Usage) -> None:
        """Take note of what a script said."""
        with self._lock:
            self._partitions[partition] = usage
            self._evictions += len(usage.evicted)

    def note(self, place: str, facts: ServerFacts) -> None:
        """Take note of what a server said."""
        with self._lock:
            self._servers[place] = facts
            self._first.setdefault(place, facts.evicted_keys)

    def is_due(self, place: str) -> bool:
        """Tell whether this server should be asked again; True for one caller at a time."""
        now = time.monotonic()
        with self._lock:
            if self._capacity is not None or now < self._due_at.get(place, 0.0):
                return False
            self._due_at[place] = now + _LOOK_EVERY_S
            return True

    def refused(self, places: Iterable[str]) -> None:
        """Learn that servers did not answer; they may not allow it, so they are left alone for long."""
        later = time.monotonic() + _REFUSED_S
        with self._lock:
            self._due_at.update(dict.fromkeys(places, later))

    def stats(self) -> TierStats:
        """Return the figures."""
        with self._lock:
            if self._capacity is not None:
                return TierStats(
                    blocks=sum(usage.blocks for usage in self._partitions.values()),
                    used_bytes=sum(usage.used_bytes for usage in self._partitions.values()),
                    capacity_bytes=self._capacity,
                    evictions=self._evictions,
                )
            known = self._servers.values()
            bounds = [facts.maxmemory for facts in known]
            return TierStats(
                blocks=sum(facts.keys for facts in known),
                used_bytes=sum(facts.used_memory for facts in known),
                capacity_bytes=sum(bounds) if bounds and all(bounds) else None,
                evictions=sum(
                    max(0, facts.evicted_keys - self._first[place]) for place, facts in self._servers.items()
                ),
            )
