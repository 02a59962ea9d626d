"""Which server holds which key, and connections to it: one server, a master behind sentinels, a cluster.

Nothing is connected before the first call needs it, so a server that is away when kvferry starts is used
once it is back. redis-py's own retries are off: how long a call may take is its caller's business.

Thread-safe. Each call takes a connection of its own from the pool, so there are as many connections to a
server as threads that call the tier; a connection that failed is closed, never put back.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from redis import exceptions
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import Connection as PlainConnection
from redis.connection import ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry
from redis.sentinel import Sentinel

from kvferry.plugins.redis.options import RedisOptions, Target
from kvferry.plugins.redis.wire import Deadline, Wire

__all__ = ["Connection", "Place", "Servers", "connect", "connection_to", "sentinel_places"]


class Connection(Protocol):
    """What is used of a redis-py connection."""

    def send_packed_command(self, command: Sequence[bytes | memoryview], check_health: bool) -> None:
        """Send what ``wire.pack`` made."""

    def disconnect(self) -> None:
        """Close the socket."""


class Lender:
    """Knows the sockets in use, so that closing ends the calls that wait on them.

    They are shut down, which wakes whoever waits; each is closed by the call that uses it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wires: set[socket.socket] = set()
        self._is_closed = False

    def lend(self, wire: socket.socket) -> None:
        """Take note of a socket that a call uses from now on."""
        with self._lock:
            if self._is_closed:
                raise exceptions.ConnectionError("the tier is closed")
            self._wires.add(wire)

    def take_back(self, wire: socket.socket) -> bool:
        """Take note that it is no longer used; True when it should be closed."""
        with self._lock:
            self._wires.discard(wire)
            return self._is_closed

    def close(self) -> None:
        """Shut down every socket in use, and lend no more."""
        with self._lock:
            self._is_closed = True
            for wire in self._wires:
                with contextlib.suppress(OSError):  # the other side was faster
                    socket.socket.shutdown(wire, socket.SHUT_RDWR)


class Place(NamedTuple):
    """One server that holds keys."""

    label: str
    pool: ConnectionPool
    lender: Lender


class Servers(Protocol):
    """Finds the server of a key."""

    def place_of(self, key: bytes) -> Place:
        """Return where ``key`` lives. May connect to find out."""

    def places(self) -> list[Place]:
        """Return every server that holds keys. May connect to find out."""

    def lost(self) -> None:
        """Learn that a server failed or that keys have moved: look anew before the next call."""

    def close(self) -> None:
        """Close every connection; calls under way fail."""


def connect(target: Target, options: RedisOptions, step_timeout_s: float) -> Servers:
    """Return the servers of ``target``; connects to none of them yet.

    Args:
        target: From ``parse_target``.
        options: The operator's, for TLS and the sentinels' credentials.
        step_timeout_s: Bound on each step of connecting: the TCP connection, each reply of the handshake.
    """
    common: dict[str, Any] = {
        "username": target.username or None,
        "password": target.password or None,
        "socket_timeout": step_timeout_s,
        "socket_connect_timeout": step_timeout_s,
        "protocol": 2,
    }
    if target.mode == "cluster":
        return _Cluster(target, common | _tls(target, options))
    if target.mode == "sentinel":
        return _behind_sentinels(target, options, common | _tls(target, options))
    common["db"] = target.db
    if target.socket_path:
        pool = ConnectionPool(connection_class=UnixDomainSocketConnection, path=target.socket_path, **common)
        return _One(target.label, pool)
    ((host, port),) = target.addresses
    if target.is_tls:
        common |= {"connection_class": SSLConnection, **_certificates(options)}
    return _One(target.label, ConnectionPool(host=host, port=port, **common))


def _certificates(options: RedisOptions) -> dict[str, Any]:
    def path(text: str) -> str | None:
        return str(Path(text).expanduser()) if text else None

    return {
        "ssl_ca_certs": path(options.tls_ca),
        "ssl_certfile": path(options.tls_cert),
        "ssl_keyfile": path(options.tls_key),
        "ssl_cert_reqs": "required" if options.tls_verify else "none",
        "ssl_check_hostname": options.tls_verify,
    }


def _tls(target: Target, options: RedisOptions) -> dict[str, Any]:
    return {"ssl": True, **_certificates(options)} if target.is_tls else {}


class _One:
    """A single server, or whichever is master now."""

    def __init__(self, label: str, pool: ConnectionPool, on_close: Callable[[], None] = lambda: None) -> None:
        self._place = Place(label, pool, Lender())
        self._on_close = on_close

    def place_of(self, key: bytes) -> Place:
        return self._place

    def places(self) -> list[Place]:
        return [self._place]

    def lost(self) -> None:
        self._place.pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        self._place.lender.close()
        self._place.pool.disconnect(inuse_connections=False)
        self._on_close()


def _behind_sentinels(target: Target, options: RedisOptions, common: dict[str, Any]) -> Servers:
    own = {"username": options.sentinel_username or None, "password": options.sentinel_password or None}
    sentinels = Sentinel(list(target.addresses), sentinel_kwargs={**common, **own, "retry": _no_retry()})

    def close() -> None:
        for one in sentinels.sentinels:
            one.connection_pool.disconnect()

    master = sentinels.master_for(target.service, **common, db=target.db, retry=_no_retry())
    return _One(target.label, master.connection_pool, close)


def sentinel_places(target: Target, options: RedisOptions, step_timeout_s: float) -> Iterator[Place]:
    """Yield the sentinels themselves, each with a pool that the caller closes."""
    for host, port in target.addresses:
        pool = ConnectionPool(
            host=host,
            port=port,
            connection_class=SSLConnection if target.is_tls else PlainConnection,
            username=options.sentinel_username or None,
            password=options.sentinel_password or None,
            socket_timeout=step_timeout_s,
            socket_connect_timeout=step_timeout_s,
            protocol=2,
            **(_certificates(options) if target.is_tls else {}),
        )
        yield Place(f"{host}:{port}", pool, Lender())


class _Cluster:
    """A Redis Cluster: redis-py keeps the map of slots, kvferry talks to the nodes."""

    def __init__(self, target: Target, common: dict[str, Any]) -> None:
        self._addresses = target.addresses
        self._common = common
        self._lock = threading.Lock()
        self._client: RedisCluster | None = None
        self._is_stale = False
        self._lender = Lender()

    def place_of(self, key: bytes) -> Place:
        return self._place(self._current().get_node_from_key(key))

    def places(self) -> list[Place]:
        return [self._place(node) for node in self._current().get_primaries()]

    def lost(self) -> None:
        with self._lock:
            self._is_stale = True

    def close(self) -> None:
        self._lender.close()
        with self._lock:
            for node in self._client.get_nodes() if self._client is not None else ():
                if node.redis_connection is not None:
                    node.redis_connection.connection_pool.disconnect(inuse_connections=False)

    def _current(self) -> RedisCluster:
        """Return the client with a map of slots that nothing has contradicted yet."""
        with self._lock:
            if self._client is None:
                nodes = [ClusterNode(host, port) for host, port in self._addresses]
                self._client = RedisCluster(
                    startup_nodes=nodes, retry=_no_retry(), require_full_coverage=False, **self._common
                )
            elif self._is_stale:
                self._client.nodes_manager.initialize()
            self._is_stale = False
            return self._client

    def _place(self, node: ClusterNode | None) -> Place:
        if node is None or node.redis_connection is None:
            raise exceptions.ClusterDownError("no node of the cluster serves this key's slot")
        return Place(str(node.name), node.redis_connection.connection_pool, self._lender)


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


@contextlib.contextmanager
def connection_to(place: Place, deadline: Deadline) -> Iterator[tuple[Connection, Wire]]:
    """Lend a connection; whatever is raised inside closes it.

    Raises:
        redis.exceptions.RedisError: It can't be connected.
    """
    deadline.remaining_s()
    connection = place.pool.get_connection()
    # The only way to bound one operation, and to receive into a buffer.
    wire = cast(socket.socket, connection._sock)
    try:
        place.lender.lend(wire)
        wire.settimeout(deadline.remaining_s())
        yield cast(Connection, connection), wire
    except BaseException:
        connection.disconnect()
        raise
    finally:
        if place.lender.take_back(wire):
            connection.disconnect()
        place.pool.release(connection)
