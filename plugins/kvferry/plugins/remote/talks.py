"""Talks: one request to one server and everything that comes back, and how several are held at the same time.

A talk says what to ask and takes in what comes, a message at a time; whatever does not fit is a ``WireError``, before a
byte is written where it does not belong. ``converse`` asks every server first and then listens to whoever speaks, so
that one that hangs keeps none of the others' answers back.

Threading: a talk, and the links it is held on, belong to one call.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvferry.connector import wire
from kvferry.connector.channel import unexpected
from kvferry.connector.errors import KVFerryError, WireError
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Frame, Outcome
from kvferry.plugins.remote.links import DIAL_S, Link, Server, wait_for_any

__all__ = ["Asking", "Deleting", "Failure", "Loading", "Sizing", "Storing", "Talk", "converse"]

_OUTCOMES = {"ok": Outcome.OK, "no_room": Outcome.NO_ROOM, "failed": Outcome.FAILED}
_SHARE_OF_WAIT = 0.8
"""Of the time that is left, what the server may spend waiting for its own tiers."""
_MAX_WAIT_S = 3600.0

Failure = KVFerryError | OSError
"""What ends a talk before its end."""


class Talk(Protocol):
    """A request and its answer."""

    def request(self, id_: int, deadline: float) -> wire.Request:
        """Return what is asked, under this number."""

    def take(self, link: Link, reply: wire.Reply, deadline: float) -> bool:
        """Take in a message, and what follows it on the link; return whether the talk is over.

        Raises:
            WireError: It is no answer to what was asked.
            OSError: The connection failed, or the deadline passed.
        """


class Loading:
    """``Load``: blocks, straight into their frames.

    Args:
        frames: Where they go.
    """

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames = frames
        self._id = 0
        self._left = len(frames)
        self._is_decided = [False] * len(frames)
        self.outcomes = [Outcome.FAILED] * len(frames)
        """By frame."""

    def request(self, id_: int, deadline: float) -> wire.Request:
        """Return the ``Load``."""
        self._id = id_
        keys = wire.pack_keys([frame.key for frame in self._frames])
        return wire.Load(id=id_, keys=keys, wait_s=_wait_s(deadline))

    def take(self, link: Link, reply: wire.Reply, deadline: float) -> bool:
        """Take in a ``Block`` and its bytes."""
        if not isinstance(reply, wire.Block) or reply.id != self._id:
            raise unexpected(reply)
        if reply.index >= len(self._frames) or self._is_decided[reply.index]:
            raise WireError(f"the server sent block {reply.index} of a load, which nobody waits for")
        frame = self._frames[reply.index]
        if reply.length not in (0, frame.length):
            raise WireError(f"the server announced a block of {reply.length} bytes, they have {frame.length}")
        self._is_decided[reply.index] = True
        if reply.length:
            link.channel.receive_into(frame.header, deadline)
            link.channel.receive_into(frame.payload[: reply.length], deadline)
        self.outcomes[reply.index] = Outcome.OK if reply.length else Outcome.MISSING
        self._left -= 1
        return self._left == 0


class Storing:
    """``Store``: the blocks that the server wants, straight from their frames.

    Args:
        frames: Whole blocks, no key twice.
    """

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames = frames
        self._id = 0
        self._has_sent = False
        self.outcomes = [Outcome.FAILED] * len(frames)
        """By frame."""

    def request(self, id_: int, deadline: float) -> wire.Request:
        """Return the ``Store``."""
        self._id = id_
        return wire.Store(id=id_, keys=wire.pack_keys([frame.key for frame in self._frames]))

    def take(self, link: Link, reply: wire.Reply, deadline: float) -> bool:
        """Answer ``Wanted`` with the blocks, and take in ``Stored``."""
        match reply:
            case wire.Wanted(id=self._id, indices=indices) if not self._has_sent:
                self._send(link, indices, deadline)
                return False
            case wire.Stored(id=self._id, outcomes=words) if self._has_sent:
                if len(words) != len(self._frames):
                    raise WireError(
                        f"the server told of {len(words)} blocks, {len(self._frames)} were offered"
                    )
                self.outcomes = [_OUTCOMES[word] for word in words]
                return True
        raise unexpected(reply)

    def _send(self, link: Link, indices: list[int], deadline: float) -> None:
        count = len(self._frames)
        is_ascending = all(one < other for one, other in itertools.pairwise(indices))
        if not is_ascending or (indices and not (indices[0] >= 0 and indices[-1] < count)):
            raise WireError(f"the server wants blocks that are no ascending part of {count}")
        self._has_sent = True
        buffers = []
        for index in indices:
            frame = self._frames[index]
            buffers += [frame.header, frame.body]
        link.channel.send_bytes(buffers, deadline)


class Asking:
    """``Contains``: which blocks could be loaded.

    Args:
        keys: The blocks.
    """

    def __init__(self, keys: Sequence[BlockKey]) -> None:
        self._keys = keys
        self._id = 0
        self.held = [False] * len(keys)
        """By key."""

    def request(self, id_: int, deadline: float) -> wire.Request:
        """Return the ``Contains``."""
        self._id = id_
        return wire.Contains(id=id_, keys=wire.pack_keys(self._keys), wait_s=_wait_s(deadline))

    def take(self, link: Link, reply: wire.Reply, deadline: float) -> bool:
        """Take in ``Held``."""
        if not isinstance(reply, wire.Held) or reply.id != self._id:
            raise unexpected(reply)
        if len(reply.held) != len(self._keys) or not set(reply.held) <= {0, 1}:
            raise WireError(f"the server's answer is not one for {len(self._keys)} keys")
        self.held = [one == 1 for one in reply.held]
        return True


class Deleting:
    """``Delete``: blocks to be forgotten.

    Args:
        keys: The blocks.
    """

    def __init__(self, keys: Sequence[BlockKey]) -> None:
        self._keys = keys
        self._id = 0

    def request(self, id_: int, deadline: float) -> wire.Request:
        """Return the ``Delete``."""
        self._id = id_
        return wire.Delete(id=id_, keys=wire.pack_keys(self._keys))

    def take(self, link: Link, reply: wire.Reply, deadline: float) -> bool:
        """Take in ``Done``."""
        if not isinstance(reply, wire.Done) or reply.id != self._id:
            raise unexpected(reply)
        return True


class Sizing:
    """``Stats``: how full the server is."""

    def __init__(self) -> None:
        self._id = 0
        self.size: wire.Size | None = None
        """None until the server has told."""

    def request(self, id_: int, deadline: float) -> wire.Request:
        """Return the ``Stats``."""
        self._id = id_
        return wire.Stats(id=id_)

    def take(self, link: Link, reply: wire.Reply, deadline: float) -> bool:
        """Take in ``Size``."""
        if not isinstance(reply, wire.Size) or reply.id != self._id:
            raise unexpected(reply)
        if min(reply.blocks, reply.used_bytes, reply.evictions) < 0 or reply.capacity_bytes <= 0:
            raise WireError("the server's size is none")
        self.size = reply
        return True


def converse(talks: Mapping[Server, Talk], deadline: float) -> dict[Server, Failure]:
    """Hold talks with several servers at the same time; return those that failed, and why.

    Links of talks that came to their end are kept for later ones, all others are closed. Each server's circuit breaker
    is told, except where there was no time left to ask or to listen.

    Args:
        talks: What to ask whom.
        deadline: When to give up, in seconds of ``time.monotonic``.
    """
    failures: dict[Server, Failure] = {}
    links: dict[Link, Server] = {}
    try:
        for server, talk in talks.items():
            link = _begin(server, talk, deadline, failures)
            if link is not None:
                links[link] = server
        while links:
            readable = wait_for_any(list(links), deadline)
            if not readable:
                break
            for link in readable:
                server = links[link]
                is_over = _go_on(server, talks[server], link, deadline, failures)
                if is_over or server in failures:
                    del links[link]
        for link, server in links.items():
            failures[server] = TimeoutError("no answer within the deadline")
            if not link.is_readable:
                server.fail(str(failures[server]))
    finally:
        for link, server in links.items():
            server.drop(link)
    return failures


def _begin(server: Server, talk: Talk, deadline: float, failures: dict[Server, Failure]) -> Link | None:
    now = time.monotonic()
    if now >= deadline:
        failures[server] = TimeoutError("there was no time left to ask")
        return None
    link = None
    try:
        link = server.take(min(deadline, now + DIAL_S))
        link.channel.send(talk.request(link.next_id(), deadline), deadline)
    except (KVFerryError, OSError) as error:
        _fail(server, link, error, failures)
        return None
    return link


def _go_on(server: Server, talk: Talk, link: Link, deadline: float, failures: dict[Server, Failure]) -> bool:
    try:
        is_over = talk.take(link, link.receive(deadline), deadline)
    except (KVFerryError, OSError) as error:
        _fail(server, link, error, failures)
        return False
    if is_over:
        server.succeed()
        server.give_back(link)
    return is_over


def _fail(server: Server, link: Link | None, error: Failure, failures: dict[Server, Failure]) -> None:
    failures[server] = error
    server.fail(str(error))
    if link is not None:
        server.drop(link)


def _wait_s(deadline: float) -> float:
    return min(max(0.0, deadline - time.monotonic()) * _SHARE_OF_WAIT, _MAX_WAIT_S)
