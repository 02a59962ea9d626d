"""Waiting: how long a request waits for slower tiers, and whether that was worth it.

A request waits no longer than ``load_deadline_s``, and where the engine's speed is known no longer than
about twice what computing the awaited blocks would take, with a floor that a busy machine needs. While it
waits for a shared tier to say what it holds, half of what computing all of the prompt takes will do,
too: much may be gained by an answer, but nothing is promised. What is in the arena by then is used; the
rest is computed.

*Regret* is what the wait cost in the end: the time from the first wait until the blocks were in the
engine's pages, less the time in which the engine would have computed the blocks that came.

Pure state, owned by the engine's scheduler thread. ``now`` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["HOPE_FACTOR", "MIN_WAIT_S", "SEVERAL", "WAIT_FACTOR", "Waiting", "wait_limit"]

WAIT_FACTOR = 2.0
"""A request waits at most so many times as long as computing the awaited blocks takes."""
HOPE_FACTOR = 0.5
"""Or so many times as long as computing what a shared tier may hold."""
MIN_WAIT_S = 0.05
"""It may always wait so long, if ``load_deadline_s`` allows it."""
SEVERAL = "several"
"""In place of a tier's name: not one tier alone."""


def wait_limit(awaited: int, block_s: float | None, deadline_s: float, hoped: int = 0) -> float:
    """Return for how many seconds ``awaited`` blocks may be waited for.

    Args:
        awaited: Blocks that are on their way.
        block_s: Seconds in which the engine computes a block; None when not known.
        deadline_s: The longest wait that is configured.
        hoped: Blocks that a shared tier may turn out to hold; 0 when no answer is awaited.
    """
    if block_s is None:
        return deadline_s
    return min(deadline_s, max(MIN_WAIT_S, WAIT_FACTOR * awaited * block_s, HOPE_FACTOR * hoped * block_s))


class Waiting:
    """One request's waits. A wait begins when an offer is put off and ends when pages are given to the request."""

    __slots__ = (
        "_awaited",
        "_came",
        "_hoped",
        "_offered",
        "_offered_at",
        "_ready",
        "_since",
        "_tiers",
        "_waited_s",
    )

    def __init__(self) -> None:
        self._since: float | None = None
        self._offered_at: float | None = None
        """When the present wait had an outcome; the request may still be waiting for pages."""
        self._ready = 0
        self._awaited = 0
        self._hoped = 0
        self._offered = 0
        self._waited_s = 0.0
        self._came = 0
        self._tiers: set[str] = set()

    @property
    def tiers(self) -> frozenset[str]:
        """The tiers that were waited for."""
        return frozenset(self._tiers)

    @property
    def tier(self) -> str:
        """The tier that was waited for; ``several`` if it was not one alone."""
        return next(iter(self._tiers)) if len(self._tiers) == 1 else SEVERAL

    def seconds(self, now: float) -> float:
        """Return for how long the request has waited in all."""
        if self._since is None:
            return self._waited_s
        until = now if self._offered_at is None else self._offered_at
        return self._waited_s + until - self._since

    def is_over(self, block_s: float | None, deadline_s: float, now: float) -> bool:
        """Tell whether the present wait has reached its limit; see :func:`wait_limit`."""
        if self._since is None:
            return False
        return now - self._since >= wait_limit(self._awaited, block_s, deadline_s, self._hoped)

    def go_on(self, ready: int, coming: int, tiers: Iterable[str], now: float, hoped: int = 0) -> None:
        """Note that the request waits.

        Args:
            ready: Blocks of its prompt that need no load.
            coming: Blocks that it will have when everything on its way has come.
            tiers: Where blocks ``ready`` to ``coming`` come from, as far as known.
            now: The time.
            hoped: Blocks that a shared tier may turn out to hold; 0 when no answer is awaited.
        """
        self._hoped = hoped
        if self._since is None:
            self._since, self._ready, self._awaited = now, ready, 0
        self._offered_at = None
        self._awaited = max(self._awaited, coming - self._ready)
        self._tiers.update(tiers)

    def offered(self, ready: int, now: float) -> None:
        """Note with how many blocks the request goes on."""
        if self._since is not None:
            self._offered = max(0, ready - self._ready)
            if self._offered_at is None:
                self._offered_at = now

    def end(self) -> None:
        """Note that the request got pages; if it loses them it may wait again."""
        if self._since is None:
            return
        if self._offered_at is not None:
            self._waited_s += self._offered_at - self._since
            self._came += self._offered
        self._since = self._offered_at = None
        self._offered = 0

    def lost(self) -> None:
        """Note that what came could not be used."""
        self._came = 0

    def regret_s(self, load_s: float, block_s: float | None) -> float:
        """Return how much sooner the request would have been ready if it had never waited.

        Args:
            load_s: How long the copy into the engine's pages took.
            block_s: Seconds in which the engine computes a block; None when not known: no regret.

        Returns:
            Seconds; 0 if the waits were worth it.
        """
        if block_s is None or not self._waited_s:
            return 0.0
        return max(0.0, self._waited_s + load_s - self._came * block_s)
