"""Fetches: what a streaming client waits for while the server's own tiers bring it.

A ``Fetch`` leases the blocks of a ``Load`` as they come into the arena; an ``Inquiry`` finds out for a
``Contains`` what could be loaded, shared tiers included; an ``Arrival`` waits for what somebody else is storing. All
are advanced whenever something may have changed and are over when every block is decided or their time is.

Owned by the index thread. ``now`` is seconds of ``time.monotonic``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvferry.connector.keys import BlockKey
from kvferry.connector.server.pools import Pool
from kvferry.connector.service import CacheService, MissReason, Place

__all__ = ["Arrival", "Fetch", "Inquiry", "Waiting"]


class Waiting(Protocol):
    """Something that a streaming connection waits for."""

    @property
    def pool(self) -> Pool:
        """Where it may change."""

    def advance(self, now: float) -> bool:
        """Take in what has changed; return whether it is over."""


class Fetch:
    """Blocks on their way to a streaming client.

    Args:
        pool: Where they are.
        owner: Holds the leases; whoever made it releases the owner after the last block was sent.
        keys: The blocks.
        deadline: When what has not come is missing.
        deliver: Called with (index, place) pairs as they are decided; place None: the block is not there.
    """

    def __init__(
        self,
        pool: Pool,
        owner: str,
        keys: Sequence[BlockKey],
        deadline: float,
        deliver: Callable[[list[tuple[int, Place | None]]], None],
    ) -> None:
        self.pool = pool
        self._service: CacheService = pool.service
        self._owner = owner
        self._deadline = deadline
        self._deliver = deliver
        self._pending = list(enumerate(keys))
        self._has_begun = False

    def advance(self, now: float) -> bool:
        """Lease what has come, give up what will not; return whether every block is decided."""
        if not self._has_begun:
            # Most loads are of consecutive blocks: as one prefix they are brought in batches.
            self._has_begun = True
            self._service.prefetch(self._owner, [key for _, key in self._pending])
        decided: list[tuple[int, Place | None]] = []
        pending = []
        for index, key in self._pending:
            places = self._service.lease(self._owner, [key]).places
            if places:
                decided.append((index, places[0]))
            elif now < self._deadline and self._is_coming(key):
                pending.append((index, key))
            else:
                decided.append((index, None))
        self._pending = pending
        if decided:
            self._deliver(decided)
        return not pending

    def give_up(self) -> None:
        """Nobody waits any more: lease nothing from now on."""
        self._pending = []

    def _is_coming(self, key: BlockKey) -> bool:
        match = self._service.lookup([key])
        if not match.reachable and match.missing is not MissReason.NOT_ASKED:
            return False
        return self._service.prefetch(self._owner, [key]).blocks > 0


class Inquiry:
    """A question which blocks could be loaded.

    Args:
        pool: Where they may be.
        owner: Asks; whoever made it releases the owner when it is over.
        keys: The blocks.
        deadline: When what is not known counts as not there.
        answer: Called once, with a byte for each key: 1 where it could be loaded.
    """

    def __init__(
        self,
        pool: Pool,
        owner: str,
        keys: Sequence[BlockKey],
        deadline: float,
        answer: Callable[[bytes], None],
    ) -> None:
        self.pool = pool
        self._service: CacheService = pool.service
        self._owner = owner
        self._deadline = deadline
        self._answer = answer
        self._held = bytearray(len(keys))
        self._pending = list(enumerate(keys))

    def advance(self, now: float) -> bool:
        """Take in what is known now; return whether everything is, and was answered."""
        pending = []
        for index, key in self._pending:
            match = self._service.lookup([key])
            if match.reachable:
                self._held[index] = 1
            elif match.missing is MissReason.NOT_ASKED and now < self._deadline:
                pending.append((index, key))
        self._pending = pending
        if pending:
            # A prefix question would stop at the first hole; these blocks need not follow one another.
            for _, key in pending:
                self._service.prefetch(self._owner, [key])
            return False
        self._answer(bytes(self._held))
        return True


class Arrival:
    """Blocks that somebody else is storing, until they are there or will not be.

    Args:
        pool: Where they are stored.
        keys: The blocks.
        deadline: When what is still being stored is taken for stored.
        answer: Called once, with those that did not arrive.
    """

    def __init__(
        self,
        pool: Pool,
        keys: Sequence[BlockKey],
        deadline: float,
        answer: Callable[[list[BlockKey]], None],
    ) -> None:
        self.pool = pool
        self._service = pool.service
        self._keys = keys
        self._deadline = deadline
        self._answer = answer

    def advance(self, now: float) -> bool:
        """Return whether nothing more is waited for, and was answered."""
        absent = [key for key in self._keys if not self._service.lookup([key]).reachable]
        lost = [key for key in absent if not self._service.is_expected(key)]
        if len(lost) < len(absent) and now < self._deadline:
            return False
        self._answer(lost)
        return True
