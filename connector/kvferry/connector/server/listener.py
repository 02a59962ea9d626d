"""Listeners: sockets that clients connect to, and the way from there to a client that is known.

Whoever connects gets a thread for as long as it takes to find out who it is: TLS, the handshake, the first message, all
within ``HANDSHAKE_S``. At most ``MOST_HANDSHAKES`` strangers are listened to at a time on each address, so that those
who connect and say nothing cost little, and on one address keep nobody out on another; more are closed at once. A
client that is let in counts towards ``max_connections`` until ``Client.release`` is called.

Who owns what
  * Each address has an accept thread ("kvferry-accept-<n>"), each stranger a handshake thread ("kvferry-handshake").
  * A connection belongs to its handshake thread until ``on_client`` takes it over, which is called on that thread and
    may take its time: the stranger's place is free by then.
  * ``start`` and ``close`` are called by one thread, once each.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar, cast

from kvferry.connector import wire
from kvferry.connector.address import Address
from kvferry.connector.channel import Channel
from kvferry.connector.dialing import PEER_CREDENTIALS
from kvferry.connector.errors import AccessRefused, WireError
from kvferry.connector.handshake import Busy, Peer, server_handshake
from kvferry.connector.server.access import Access
from kvferry.connector.server.binding import Bound, bind
from kvferry.connector.server.config import ServerConfig
from kvferry.connector.tls import server_context

__all__ = ["Client", "Listener", "read_hello"]

HANDSHAKE_S = 5.0
"""From the connection to the first message."""
MOST_HANDSHAKES = 64
_ACCEPT_AGAIN_S = 0.2
"""Pause after ``accept`` failed, as it does without free descriptors."""
_LOG_EVERY_S = 10.0
"""A reason for refusing somebody is logged once in this time: strangers must not fill the log."""
_Subject = tuple[tuple[tuple[str, str], ...], ...]
"""As ``ssl`` gives it."""
_CERTIFICATE_REASONS = ("CERTIFICATE", "UNKNOWN_CA")

_H = TypeVar("_H")


class Client(NamedTuple, Generic[_H]):
    """A connection whose other end is known."""

    channel: Channel
    """Belongs to whoever is given the client; to be closed before ``release``."""
    tenant: str
    hello: _H
    """Its first message."""
    peer: Peer
    address: Address
    """Where it came in."""
    release: Callable[[], None]
    """Says that the connection has ended. Idempotent, from any thread."""


class _Stranger(NamedTuple):
    """Somebody who has not said who it is."""

    sock: socket.socket
    address: Address


def read_hello(channel: Channel, deadline: float) -> wire.Hello:
    """Return the first message of a cache server's client.

    Raises:
        WireError: It sent another; it has been told so.
        TimeoutError, OSError: As of the channel.
    """
    try:
        hello = channel.receive_request(deadline)
        if not isinstance(hello, wire.Hello):
            raise WireError(f"a client began with {type(hello).__name__} instead of Hello")
    except WireError as error:
        channel.send(wire.Refused.because("protocol", str(error), is_mistake=True), deadline)
        raise
    return hello


class Listener(Generic[_H]):
    """Lets clients in.

    Args:
        config: The ``[server]`` table.
        access: Decides who is let in, and knows the addresses.
        on_client: Takes over a client, on the client's handshake thread. If it raises, the connection is closed.
        on_refused: Counts somebody who was not let in: ``credential``, ``protocol``, ``timeout`` or ``full``. Called
            on any thread.
        logger: Where it reports.
        read_first: Reads the first message, once the client is known to be one; may refuse it with ``WireError``.

    Raises:
        ConfigError: The server's certificate or key cannot be used.
    """

    def __init__(
        self,
        config: ServerConfig,
        access: Access,
        on_client: Callable[[Client[_H]], None],
        on_refused: Callable[[str], None],
        logger: logging.Logger,
        read_first: Callable[[Channel, float], _H] = read_hello,  # type: ignore[assignment]  # then _H is wire.Hello
    ) -> None:
        self._access = access
        self._on_client = on_client
        self._on_refused = on_refused
        self._logger = logger
        self._read_first = read_first
        self._max_connections = config.max_connections
        has_tls = any(address.scheme == "tls" for address in access.addresses)
        self._context = (
            server_context(config.tls.certificate, config.tls.private_key, config.tls.client_ca, "server.tls")
            if has_tls
            else None
        )
        self._lock = threading.Lock()
        self._bound: list[Bound] = []
        self._accepting: list[threading.Thread] = []
        self._strangers: dict[threading.Thread, _Stranger] = {}
        self._handing_over: set[threading.Thread] = set()
        self._live = 0
        self._is_closing = threading.Event()
        self._logged: dict[tuple[str, int], float] = {}

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens, once started, with the ports that the system chose."""
        return tuple(bound.address for bound in self._bound)

    @property
    def connections(self) -> int:
        """Clients that were let in and have not been released."""
        return self._live

    def start(self) -> None:
        """Begin to listen on all addresses.

        Raises:
            ConfigError: An address cannot be had by anybody.
            KVFerryError: An address cannot be had now; none is left bound.
        """
        try:
            for address in self._access.addresses:
                self._bound.append(bind(address))
        except BaseException:
            self._unbind()
            raise
        for warning in self._access.warnings:
            self._logger.warning("%s", warning)
        for number, bound in enumerate(self._bound):
            thread = threading.Thread(
                target=self._accept, args=(bound,), name=f"kvferry-accept-{number}", daemon=True
            )
            self._accepting.append(thread)
            thread.start()
            self._logger.info("listening on %s", bound.address)

    def close(self, deadline: float) -> None:
        """Listen no more, and turn away everybody who is not known yet. Clients stay connected.

        Args:
            deadline: ``time.monotonic`` until which it may wait for its threads.
        """
        self._is_closing.set()
        for bound in self._bound:
            with contextlib.suppress(OSError):
                bound.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._accepting:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._unbind()
        with self._lock:
            threads = [*self._strangers, *self._handing_over]
            for stranger in self._strangers.values():
                with contextlib.suppress(OSError):
                    # The plain one: TLS's own forgets its state, which another thread is using.
                    socket.socket.shutdown(stranger.sock, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _unbind(self) -> None:
        for bound in self._bound:
            bound.close()

    def _accept(self, bound: Bound) -> None:
        while not self._is_closing.is_set():
            try:
                sock, source = bound.sock.accept()
            except OSError as error:
                if not self._is_closing.is_set():
                    self._say("accept", f"cannot accept connections on {bound.address}: {error}")
                    self._is_closing.wait(_ACCEPT_AGAIN_S)
                continue
            thread = threading.Thread(
                target=self._meet, args=(bound.address, sock, source), name="kvferry-handshake", daemon=True
            )
            with self._lock:
                here = sum(stranger.address is bound.address for stranger in self._strangers.values())
                is_full = here >= MOST_HANDSHAKES or self._is_closing.is_set()
                if not is_full:
                    self._strangers[thread] = _Stranger(sock, bound.address)
            if is_full:
                self._refuse("full", f"more than {MOST_HANDSHAKES} connect at once on {bound.address}")
                sock.close()
                continue
            try:
                thread.start()
            except RuntimeError as error:
                with self._lock:
                    del self._strangers[thread]
                sock.close()
                self._refuse("full", f"no thread for a connection on {bound.address}: {error}")

    def _meet(self, address: Address, sock: socket.socket, source: object) -> None:
        """On the handshake thread: find out who it is, and hand it over."""
        release = _Release(self._release)
        client = None
        try:
            client = self._introduce(address, sock, source, release)
        except Busy:
            self._refuse(
                "full", f"all {self._max_connections} connections are in use (server.max_connections)"
            )
        except AccessRefused as error:
            self._refuse("credential", f"a client on {address} is refused: {error}")
        except TimeoutError:
            self._refuse("timeout", f"somebody on {address} did not say in time who it is")
        except ssl.SSLError as error:
            is_credential = any(word in (error.reason or "") for word in _CERTIFICATE_REASONS)
            self._refuse(
                "credential" if is_credential else "protocol",
                f"no TLS with somebody on {address}: {error.reason or error}",
            )
        except WireError as error:
            self._refuse("protocol", f"somebody on {address} is turned away: {error}")
        except OSError as error:
            self._refuse("protocol", f"somebody on {address} went before it was known: {error}", logging.INFO)
        except Exception:  # boundary: what a stranger sends must not end more than its own connection
            self._logger.exception("somebody on %s is turned away", address)
            self._refuse("protocol", f"somebody on {address} is turned away after an error of ours")
        finally:
            here = threading.current_thread()
            with self._lock:
                stranger = self._strangers.pop(here)
                if client is not None:
                    self._handing_over.add(here)
            if client is None:
                stranger.sock.close()
                release()
        if client is not None:
            self._hand_over(client)

    def _introduce(
        self, address: Address, sock: socket.socket, source: object, release: _Release
    ) -> Client[_H]:
        deadline = time.monotonic() + HANDSHAKE_S
        common_name = None
        if address.scheme == "tls":
            assert self._context is not None  # made for such an address
            sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._replace(sock)
            sock.settimeout(HANDSHAKE_S)
            sock.do_handshake()
            common_name = _common_name(sock)
        peer = _peer(address, sock, source, common_name)
        channel = Channel(sock)

        def has_room() -> bool:
            with self._lock:
                if self._live >= self._max_connections or self._is_closing.is_set():
                    return False
                self._live += 1
            release.is_due = True
            return True

        tenant = server_handshake(channel, self._access, peer, deadline, has_room)
        return Client(channel, tenant, self._read_first(channel, deadline), peer, address, release)

    def _replace(self, sock: socket.socket) -> None:
        """Another object has taken over the stranger's socket; it is what ``close`` has to end from now on."""
        here = threading.current_thread()
        with self._lock:
            self._strangers[here] = self._strangers[here]._replace(sock=sock)
        if self._is_closing.is_set():
            raise OSError("the server is about to stop")

    def _hand_over(self, client: Client[_H]) -> None:
        try:
            self._on_client(client)
        except Exception:  # boundary: one client must not end the server
            self._logger.exception("the client %s is disconnected", client.peer.name)
            client.channel.close()
            client.release()
        finally:
            with self._lock:
                self._handing_over.discard(threading.current_thread())

    def _release(self) -> None:
        with self._lock:
            self._live -= 1

    def _refuse(self, reason: str, why: str, level: int = logging.WARNING) -> None:
        if self._is_closing.is_set():
            return
        self._on_refused(reason)
        self._say(reason, why, level)

    def _say(self, reason: str, why: str, level: int = logging.WARNING) -> None:
        now = time.monotonic()
        with self._lock:
            if now < self._logged.get((reason, level), 0.0):
                return
            self._logged[reason, level] = now + _LOG_EVERY_S
        self._logger.log(level, "%s", why)


class _Release:
    """Gives a client's place back, once and only if it has one."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._lock = threading.Lock()
        self.is_due = False

    def __call__(self) -> None:
        with self._lock:
            is_due, self.is_due = self.is_due, False
        if is_due:
            self._give_back()


def _peer(address: Address, sock: socket.socket, source: object, common_name: str | None) -> Peer:
    if address.scheme == "unix":
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        pid, uid, _ = PEER_CREDENTIALS.unpack(raw)
        return Peer(f"process {pid} of user {uid}", is_loopback=True, uid=uid)
    name = f"{source[0]}:{source[1]}" if isinstance(source, tuple) else str(source)
    return Peer(name, address.is_loopback, common_name=common_name)


def _common_name(sock: ssl.SSLSocket) -> str | None:
    """Return the common name of a client's certificate, if it has exactly one."""
    subject = cast("_Subject", (sock.getpeercert() or {}).get("subject", ()))
    names = [value for part in subject for kind, value in part if kind == "commonName"]
    return names[0] if len(names) == 1 else None
