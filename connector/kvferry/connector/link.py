"""A link: messages over a socket that never blocks, for a thread that has no time.

What the kernel does not take at once waits in a small buffer and goes with the next call. A server that lets that
buffer fill up is stuck, and the link fails. ``channel.Channel`` is the blocking counterpart.

Threading: one thread.
"""

from __future__ import annotations

import select
import socket
from typing import Protocol

from kvferry.connector import wire
from kvferry.connector.channel import Disconnected

__all__ = ["MAX_UNSENT_BYTES", "Link", "SocketLink"]

MAX_UNSENT_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_MOST_READS = 16
"""Reads in one ``receive``; a server that sends without end must not keep us."""
_FD_SETSIZE = 1024


class Link(Protocol):
    """What a client needs of its connection. Every call may raise ``OSError``: then it is of no more use."""

    def send(self, message: wire.Request) -> None:
        """Send a message, or what the kernel takes of it now."""

    def receive(self) -> list[wire.Reply]:
        """Return what has arrived, and send what could not be sent before. Never waits.

        Raises:
            WireError: What arrived is no message.
        """

    def wait(self, seconds: float) -> None:
        """Wait until there may be something to receive or send, at most for ``seconds``."""

    def close(self) -> None:
        """Close the connection. Idempotent."""


class SocketLink:
    """A ``Link`` over a connected stream socket, which is the link's from now on."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = wire.MessageReader()
        self._unsent = bytearray()

    def send(self, message: wire.Request) -> None:
        """Send a message, or what the kernel takes of it now."""
        self._unsent += wire.encode(message)
        self._flush()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise OSError(f"it does not take what it is sent: {len(self._unsent)} bytes wait")

    def receive(self) -> list[wire.Reply]:
        """Return what has arrived, and send what could not be sent before. Never waits."""
        if self._unsent:
            self._flush()
        replies: list[wire.Reply] = []
        for _ in range(_MOST_READS):
            try:
                data = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                if replies:
                    break  # they come first; the end is still there the next time
                raise Disconnected("it closed the connection")
            replies += [wire.decode_reply(body) for body in self._reader.feed(data)]
            if len(data) < _READ_BYTES:
                break
        return replies

    def wait(self, seconds: float) -> None:
        """Wait until there may be something to receive or send, at most for ``seconds``."""
        number = self._sock.fileno()
        if number < _FD_SETSIZE:  # select takes microseconds, poll whole milliseconds
            select.select([number], [number] if self._unsent else [], [], seconds)
            return
        poller = select.poll()
        poller.register(number, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poller.poll(seconds * 1e3)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._sock.close()

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return
