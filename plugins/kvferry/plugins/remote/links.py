"""Links: connections to one cache server, kept for the next call, and what is known of the server.

Who owns what
  * A ``Link`` belongs to the call that took it, from ``Server.take`` until ``Server.give_back`` or ``Server.drop``.
  * A ``Server``'s ``_lock`` guards its idle links, the links in use and its circuit breaker; it is never held across
    I/O. ``close`` ends what calls under way wait for; they close their links themselves.
  * A server that failed while there are others is looked for by a thread of its own ("kvferry-<tier>-<n>"), so that no
    call waits for a machine that is gone. It ends when the server is back or the tier is closed.
"""

from __future__ import annotations

import select
import ssl
import threading
import time
from collections.abc import Callable

from kvferry.connector import wire
from kvferry.connector.address import Address
from kvferry.connector.breaker import CircuitBreaker
from kvferry.connector.channel import Channel, unexpected
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import KVFerryError, WireError
from kvferry.connector.joining import JoinRefused

__all__ = ["DIAL_S", "Link", "Server", "connect"]

DIAL_S = 3.0
"""Longest that anybody spends on connecting to one server."""
_FAILURES_TO_OPEN = 1
_FIRST_PAUSE_S = 0.25
_MAX_PAUSE_S = 15.0


class Link:
    """A connection on which one request at a time is asked.

    Args:
        channel: Welcomed; owned by the link from now on.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._last_id = 0

    def next_id(self) -> int:
        """Return a number for a request that no other of this connection has."""
        self._last_id += 1
        return self._last_id

    def receive(self, deadline: float) -> wire.Reply:
        """Return the server's next message.

        Raises:
            JoinRefused: The server refuses to go on.
            WireError: It is none.
            OSError: The connection failed, or the server says that it stops; ``TimeoutError`` at the deadline.
        """
        reply = self.channel.receive_reply(deadline)
        if isinstance(reply, wire.Refused):
            raise JoinRefused(reply)
        if isinstance(reply, wire.Goodbye):
            raise ConnectionError("the cache server is stopping")
        return reply

    @property
    def is_readable(self) -> bool:
        """Whether something came that was not read yet, or the connection has ended. Never blocks."""
        return self.has_rest or bool(_poll([self], 0.0))

    @property
    def has_rest(self) -> bool:
        """Whether the TLS layer holds bytes that the socket no longer shows."""
        sock = self.channel.socket
        return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0

    def interrupt(self) -> None:
        """End what another thread waits for; the descriptor stays that thread's to close."""
        self.channel.interrupt()


def connect(address: Address, token: str, tls: TlsConfig, hello: wire.Hello, deadline: float) -> Link:
    """Connect to a server and introduce the engine.

    Raises:
        KVFerryError: The server, or this engine's configuration, is not as it should be; see ``joining.is_mistake``.
        OSError: The server is away; ``TimeoutError`` when it does not answer.
    """
    channel = dial(address, token, tls, deadline)
    try:
        link = Link(channel)
        channel.send(hello, deadline)
        reply = link.receive(deadline)
        if not isinstance(reply, wire.Welcome):
            raise unexpected(reply)
        if reply.arena is not None:
            raise WireError("the server offers an arena to a client that cannot map it")
    except BaseException:
        channel.close()
        raise
    return link


class Server:
    """One cache server: its idle links, and whether calls go to it.

    Args:
        address: Where it is.
        dialer: Makes a link until a deadline; see ``connect``.
        most_idle: How many links are kept.
        tell: Called with a sentence when the server is given up for a while, and when it is back. Any thread.
        seeker: Name of the thread that looks for the server while it is down; empty for none: where there is no
            other server, calls go to this one whether it is down or not.
    """

    def __init__(
        self,
        address: Address,
        dialer: Callable[[float], Link],
        most_idle: int,
        tell: Callable[[str], None],
        seeker: str = "",
    ) -> None:
        self.name = str(address)
        """For messages and the ring."""
        self._dialer = dialer
        self._most_idle = most_idle
        self._tell = tell
        self._seeker = seeker
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._busy: set[Link] = set()
        self._is_closed = threading.Event()
        self._breaker = CircuitBreaker(_FAILURES_TO_OPEN, _FIRST_PAUSE_S, _MAX_PAUSE_S)
        self._is_down = False
        self._is_sought = False

    @property
    def is_up(self) -> bool:
        """Whether calls go to this server, as far as there are others."""
        return not self._is_down

    def succeed(self) -> None:
        """Note that it answered."""
        with self._lock:
            self._breaker.succeed()
            was_down, self._is_down = self._is_down, False
        if was_down:
            self._tell(f"{self.name} answers again")

    def fail(self, why: str) -> None:
        """Note that a call failed. Its other links are not believed in any more, and it is looked for."""
        with self._lock:
            self._breaker.fail(time.monotonic())
            was_down, self._is_down = self._is_down, True
            idle, self._idle = self._idle, []
            is_closed = self._is_closed.is_set()
            has_to_start = bool(self._seeker) and not self._is_sought and not is_closed
            self._is_sought = self._is_sought or has_to_start
        for link in idle:
            link.channel.close()
        if not was_down and not is_closed:
            text = why if why.startswith(self.name) else f"{self.name}: {why}"
            self._tell(f"{text}; the others stand in for it until it answers")
        if has_to_start:
            threading.Thread(target=self._seek, name=self._seeker, daemon=True).start()

    def _seek(self) -> None:
        """On the seeking thread: connect, again and again, until the server is up."""
        while not self._is_closed.wait(_FIRST_PAUSE_S):
            now = time.monotonic()
            with self._lock:
                if not self._is_down:
                    self._is_sought = False
                    return
                is_time = self._breaker.allow(now)
            if is_time:
                self._try(now + DIAL_S)

    def _try(self, deadline: float) -> None:
        try:
            link = self._adopt(self._dialer(deadline))
        except (KVFerryError, OSError):
            with self._lock:
                self._breaker.fail(time.monotonic())
            return
        self.give_back(link)
        self.succeed()

    def take(self, deadline: float) -> Link:
        """Return a link for one request, a kept one or a new one.

        Raises:
            KVFerryError, OSError: As ``connect``.
        """
        while (link := self._take_idle()) is not None:
            if not link.is_readable:
                return link
            self.drop(link)  # nothing was asked on it: it has ended, or says what nobody waits for
        return self._adopt(self._dialer(deadline))

    def give_back(self, link: Link) -> None:
        """Keep a link whose request was answered to its end."""
        with self._lock:
            self._busy.discard(link)
            if not self._is_closed.is_set() and len(self._idle) < self._most_idle:
                self._idle.append(link)
                return
        link.channel.close()

    def drop(self, link: Link) -> None:
        """Close a link that is of no use any more."""
        with self._lock:
            self._busy.discard(link)
        link.channel.close()

    def close(self) -> None:
        """Close the idle links and end what calls under way wait for. Idempotent."""
        with self._lock:
            self._is_closed.set()
            idle, self._idle = self._idle, []
            for link in self._busy:
                link.interrupt()
        for link in idle:
            link.channel.close()

    def _take_idle(self) -> Link | None:
        with self._lock:
            if self._is_closed.is_set() or not self._idle:
                return None
            link = self._idle.pop()
            self._busy.add(link)
            return link

    def _adopt(self, link: Link) -> Link:
        with self._lock:
            if not self._is_closed.is_set():
                self._busy.add(link)
                return link
        link.channel.close()
        raise ConnectionError("the tier is closed")


def _poll(links: list[Link], timeout_s: float) -> list[Link]:
    poller = select.poll()
    by_number = {link.channel.socket.fileno(): link for link in links}
    for number in by_number:
        poller.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poller.poll(timeout_s * 1e3)]


def wait_for_any(links: list[Link], deadline: float) -> list[Link]:
    """Return the links that have something to read, at least one, or none once the deadline has passed."""
    with_rest = [link for link in links if link.has_rest]
    return with_rest or _poll(links, max(0.0, deadline - time.monotonic()))
