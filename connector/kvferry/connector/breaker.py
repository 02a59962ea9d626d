"""A circuit breaker: when to stop calling a tier that fails, and when to try it again.

Closed: calls go through. After ``failures_to_open`` failures in a row it opens: no call goes through
for a pause. Then it is half open: exactly one call, the probe, goes through; its success closes the
breaker, its failure opens it for twice as long, up to ``max_pause_s``. A probe that is never answered
counts as failed after ``probe_s``.

Pure: the caller passes the time. Owned by one thread.
"""

from __future__ import annotations

import enum

__all__ = ["BreakerState", "CircuitBreaker"]


class BreakerState(enum.Enum):
    """Whether calls go through."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class CircuitBreaker:
    """Decides whether a call may be made.

    Args:
        failures_to_open: Failures in a row that open a closed breaker.
        first_pause_s: Pause after the first opening; each failed probe doubles it.
        max_pause_s: Longest pause.
        probe_s: Seconds after which an unanswered probe counts as failed.
    """

    __slots__ = (
        "_failures",
        "_failures_to_open",
        "_first_pause_s",
        "_max_pause_s",
        "_next_pause_s",
        "_probe_s",
        "_state",
        "_until",
    )

    def __init__(
        self,
        failures_to_open: int = 3,
        first_pause_s: float = 1.0,
        max_pause_s: float = 60.0,
        probe_s: float = 30.0,
    ) -> None:
        self._failures_to_open = failures_to_open
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s
        self._probe_s = probe_s
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._next_pause_s = first_pause_s
        self._until = 0.0

    @property
    def state(self) -> BreakerState:
        """The state as of the last call; an open breaker whose pause is over is still open."""
        return self._state

    def would_allow(self, now: float) -> bool:
        """Tell whether a call made now would go through, without making it the probe."""
        return self._state is BreakerState.CLOSED or now >= self._until

    def allow(self, now: float) -> bool:
        """Tell whether to make a call now; in the half-open state the caller becomes the probe."""
        if self._state is BreakerState.HALF_OPEN and now >= self._until:
            self._open(now)
        if self._state is BreakerState.CLOSED:
            return True
        if self._state is BreakerState.OPEN and now >= self._until:
            self._state = BreakerState.HALF_OPEN
            self._until = now + self._probe_s
            return True
        return False

    def succeed(self) -> None:
        """Report that a call was answered; closes the breaker."""
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._next_pause_s = self._first_pause_s

    def fail(self, now: float) -> bool:
        """Report that a call failed; return True when this opened the breaker."""
        self._failures += 1
        is_probe = self._state is BreakerState.HALF_OPEN
        if is_probe or (self._state is BreakerState.CLOSED and self._failures >= self._failures_to_open):
            self._open(now)
            return True
        return False

    def _open(self, now: float) -> None:
        self._state = BreakerState.OPEN
        self._until = now + self._next_pause_s
        self._next_pause_s = min(self._next_pause_s * 2, self._max_pause_s)
