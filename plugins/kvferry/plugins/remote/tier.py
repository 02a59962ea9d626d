"""The remote tier at work: blocks spread over cache servers, each call on links of its own.

Which server holds a block is the ring's business (``ring``), connections and their health the servers' (``links``),
what is said on them the talks' (``talks``). Here a call's blocks are divided among the servers that can be used, and
what comes of it is put together again.

While a server is down its keys go to the next on the ring, and come home when it is back; a thread of its own
looks for it meanwhile, so that no call waits for a machine that is gone. When all of them are down, all of them
are asked: whether that is worth a try is for kvferry to decide, which has a circuit breaker for the whole tier.

Who owns what
  * ``_lock`` guards the servers' last sizes; it is never held across I/O.
  * A call's links are its own. It runs on its caller's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from kvferry.connector import wire
from kvferry.connector.errors import ClosedError, TierError, TierTimeout, TierUnavailable
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Capabilities, Frame, Outcome, TierContext, TierStats
from kvferry.plugins.remote.links import Server
from kvferry.plugins.remote.ring import Ring
from kvferry.plugins.remote.talks import Asking, Deleting, Failure, Loading, Sizing, Storing, Talk, converse

__all__ = ["RemoteTier"]

_SIZE_EVERY_S = 5.0
"""How old a server's figures may be before the next call asks for new ones."""

_T = TypeVar("_T", bound=Talk)


class RemoteTier:
    """Blocks on cache servers; see the module docstring. Made by ``opening.open_remote_tier``.

    Args:
        context: What kvferry gave the tier.
        servers: At least one; owned by the tier from now on.
        sizes: What the servers that answered when it was opened said of themselves, by name.
    """

    def __init__(
        self, context: TierContext, servers: Sequence[Server], sizes: Mapping[str, wire.Size]
    ) -> None:
        self._context = context
        self._servers = {server.name: server for server in servers}
        self._ring = Ring(list(self._servers))
        is_bounded = len(sizes) == len(self._servers)
        self._capabilities = Capabilities(is_persistent=True, is_shared=True, is_bounded=is_bounded)
        self._is_closed = False
        self._lock = threading.Lock()
        self._sizes = dict(sizes)
        now = time.monotonic()
        self._size_due = {name: now + _SIZE_EVERY_S if name in sizes else now for name in self._servers}

    @property
    def capabilities(self) -> Capabilities:
        """Persistent, as the servers outlive this process, and shared; bounded where all servers have told by what."""
        return self._capabilities

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Ask the servers for each key. Blocks until they answer or the deadline has passed.

        Raises:
            TierError: No server answers.
        """
        held = [False] * len(keys)
        for positions, talk in self._hold(keys, lambda some: Asking([keys[at] for at in some])):
            for at, is_held in zip(positions, talk.held, strict=True):
                held[at] = is_held
        return held

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Read blocks straight into the frames' buffers. Blocks until done or the deadline has passed.

        Raises:
            TierError: No server answers.
        """
        outcomes = [Outcome.FAILED] * len(into)
        keys = [frame.key for frame in into]
        for positions, talk in self._hold(keys, lambda some: Loading([into[at] for at in some])):
            for at, outcome in zip(positions, talk.outcomes, strict=True):
                outcomes[at] = outcome
        return outcomes

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Store the frames; what a server holds already is not sent. Blocks until done or too late.

        Raises:
            TierError: No server answers.
        """
        whole = self._context.layout.payload_bytes
        first: dict[BlockKey, int] = {}  # in order: where room is short, a prefix's beginning is what counts
        for at, frame in enumerate(frames):
            if frame.length == whole:
                first.setdefault(frame.key, at)
        places = list(first.values())
        outcomes: dict[BlockKey, Outcome] = {}
        for positions, talk in self._hold(
            list(first), lambda some: Storing([frames[places[at]] for at in some])
        ):
            for at, outcome in zip(positions, talk.outcomes, strict=True):
                outcomes[frames[places[at]].key] = outcome
        return [outcomes[frame.key] if frame.length == whole else Outcome.FAILED for frame in frames]

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Have the blocks forgotten, for every engine.

        Raises:
            TierError: A server did not answer, so some may still be there.
        """
        self._hold(keys, lambda some: Deleting([keys[at] for at in some]), is_every_one_needed=True)

    def scan(self) -> Iterator[BlockKey]:
        """Yield nothing: what is shared can change at any time, so kvferry asks ``contains`` instead."""
        self._require_open()
        return iter(())

    def stats(self) -> TierStats:
        """Return what the servers said last: their arenas for this model, whoever stored the blocks."""
        self._require_open()
        with self._lock:
            sizes = list(self._sizes.values())
        return TierStats(
            blocks=sum(size.blocks for size in sizes),
            used_bytes=sum(size.used_bytes for size in sizes),
            capacity_bytes=sum(size.capacity_bytes for size in sizes)
            if self._capabilities.is_bounded
            else None,
            evictions=sum(size.evictions for size in sizes),
        )

    def close(self) -> None:
        """Close every connection; calls under way fail."""
        self._is_closed = True
        for server in self._servers.values():
            server.close()

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"tier {self._context.name!r} is closed")

    def _hold(
        self,
        keys: Sequence[BlockKey],
        make: Callable[[Sequence[int]], _T],
        is_every_one_needed: bool = False,
    ) -> list[tuple[Sequence[int], _T]]:
        """Hold one talk with each server about its keys; return them with the positions of their keys.

        Args:
            keys: The blocks; more than a message can hold are asked for in several rounds.
            make: Makes the talk about the keys at some positions.
            is_every_one_needed: Raise when one talk failed, not only when all did.
        """
        self._require_open()
        deadline = time.monotonic() + self._context.deadline_s
        held: list[tuple[Sequence[int], _T]] = []
        for start in range(0, len(keys), wire.MAX_KEYS):
            groups = self._groups(keys[start : start + wire.MAX_KEYS])
            parts = {server: [start + at for at in positions] for server, positions in groups.items()}
            talks = {server: make(positions) for server, positions in parts.items()}
            failures = converse(talks, deadline)
            self._judge(failures, talks, is_every_one_needed)
            held += [(parts[server], talk) for server, talk in talks.items()]
            self._look_around([server for server in talks if server not in failures], deadline)
        return held

    def _groups(self, keys: Sequence[BlockKey]) -> dict[Server, list[int]]:
        """Divide keys among the servers that are up, or among all of them when none is."""
        usable = {name for name, server in self._servers.items() if server.is_up} or self._servers.keys()
        assigned = self._ring.assign(keys, usable)
        return {self._servers[name]: positions for name, positions in assigned.items()}

    def _judge(
        self, failures: Mapping[Server, Failure], talks: Mapping[Server, Talk], is_every_one_needed: bool
    ) -> None:
        """Raise what the failures mean to the tier as a whole, if they do."""
        if not failures:
            return
        self._require_open()  # a call that met ``close``
        has_answer = any(server not in failures or _has_answer(talk) for server, talk in talks.items())
        if has_answer and not is_every_one_needed:
            return
        server, error = next(iter(failures.items()))
        raise tier_error(self._context.name, server.name, error) from error

    def _look_around(self, servers: Sequence[Server], deadline: float) -> None:
        """Ask servers that have just answered how full they are, now and then."""
        now = time.monotonic()
        with self._lock:
            due = [server for server in servers if self._size_due[server.name] <= now]
            self._size_due |= {server.name: now + _SIZE_EVERY_S for server in due}
        talks = {server: Sizing() for server in due}
        converse(talks, deadline)  # figures only; no call fails for want of them
        with self._lock:
            self._sizes |= {server.name: talk.size for server, talk in talks.items() if talk.size is not None}


def tier_error(tier: str, server: str, error: Failure) -> TierError:
    """Return the error that says what ``error``, which a server caused, means to the tier."""
    if isinstance(error, TimeoutError):
        return TierTimeout(tier, f"{server}: {error}")
    text = " ".join(str(error).split()) or type(error).__name__
    return TierUnavailable(tier, text if text.startswith(server) else f"{server}: {text}")


def _has_answer(talk: Talk) -> bool:
    return isinstance(talk, Loading) and any(outcome is not Outcome.FAILED for outcome in talk.outcomes)
