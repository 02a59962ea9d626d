"""Slow start: how many requests may be under way to a cache server that may be busy.

A server that was away is found by all its engines at once, and one that is late gets later with every request
that piles up. So the number of requests under way begins at one, doubles with every answer that came in time and
halves with every one that did not. What is over it is not sent; whoever wanted it asks again later.

Pure state, owned by the engine's scheduler thread.
"""

from __future__ import annotations

__all__ = ["MOST_UNDER_WAY", "Pace"]

MOST_UNDER_WAY = 128
"""More never are, however fast the server answers."""


class Pace:
    """The limit of one connection."""

    __slots__ = ("_limit",)

    def __init__(self) -> None:
        self._limit = 1

    @property
    def limit(self) -> int:
        """Requests that may be under way."""
        return self._limit

    def allows(self, under_way: int) -> bool:
        """Tell whether one more may be sent."""
        return under_way < self._limit

    def in_time(self) -> None:
        """An answer came within its budget."""
        self._limit = min(MOST_UNDER_WAY, self._limit * 2)

    def late(self) -> None:
        """The time to wait was spent and an answer had not come."""
        self._limit = max(1, self._limit // 2)

    def restart(self) -> None:
        """The connection is a new one."""
        self._limit = 1
