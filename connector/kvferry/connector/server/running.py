"""The server put together: listeners, pools, the index thread, streams, and what tells about them.

Threading: ``CacheServer``'s methods may be called from any thread; ``_welcome`` runs on the listener's handshake
threads. Start order: index thread, operation page, listeners; the other way round at the end, so that nobody
is let in before everything answers, and everything is told about until the last moment.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from kvferry.connector import __version__, wire
from kvferry.connector.errors import KVFerryError
from kvferry.connector.frame import FrameSeal
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.server.access import Access
from kvferry.connector.server.config import ServerSettings
from kvferry.connector.server.http import OperationServer
from kvferry.connector.server.index import LOOKUP_BOUNDS, EngineConnection, Index
from kvferry.connector.server.listener import Client, Listener
from kvferry.connector.server.logs import configure
from kvferry.connector.server.mapping import EngineLedger
from kvferry.connector.server.pools import Pool, PoolRefused, Pools, check_tiers
from kvferry.connector.server.publishing import EventPublisher
from kvferry.connector.server.status import ConnectionStatus, PoolStatus, ServerStatus
from kvferry.connector.server.stream import Stream
from kvferry.connector.server.tracing import open_tracer
from kvferry.connector.service import ServiceEvent

__all__ = ["CacheServer", "run"]

_POOL_S = 300.0
"""Longest wait for a pool that somebody else is opening: memory is cleared, and an index read, meanwhile."""
_INDEX_S = 5.0
_SEND_S = 5.0
_STOP_GRACE_S = 5.0


class CacheServer:
    """A cache server in this process.

    Args:
        settings: What it serves, to whom, and where.
        logger: Where it reports.

    Raises:
        ConfigError: Something in the configuration is wrong, or would open the server to strangers.
        KVFerryError: An address or port cannot be had.
    """

    def __init__(self, settings: ServerSettings, logger: logging.Logger | None = None) -> None:
        self._settings = settings
        self._logger = logger or logging.getLogger("kvferry.server")
        self._id = os.urandom(16)
        self._started = time.time()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._streams: dict[Stream, tuple[ConnectionStatus, float]] = {}
        self._past_requests: Counter[str] = Counter()
        """Of streaming clients that have gone."""
        self._refused: Counter[str] = Counter()
        self._is_ready = False
        self._is_draining = False
        registry = PluginRegistry(settings.cache.plugins)
        check_tiers(settings, registry)
        access = Access(settings.server, settings.tenants)
        self._events = EventPublisher(settings.server, self._logger)
        self._tracer = open_tracer(settings.server, self._logger)
        self._index = Index(self._publish, self._logger, self._tracer)
        self._pools = Pools(
            settings,
            registry,
            on_opened=self._opened,
            withdraw=self._withdraw,
            on_report=self._index.wake,
            logger=self._logger,
        )
        self._listener = Listener(settings.server, access, self._welcome, self._count_refused, self._logger)
        self._operation = (
            OperationServer(settings.server.http, self.status, self._logger) if settings.server.http else None
        )

    @property
    def events(self) -> EventPublisher:
        """Where KV events go out."""
        return self._events

    @property
    def http_port(self) -> int | None:
        """Port of the status page, once started; None without one."""
        return self._operation.port if self._operation else None

    def start(self) -> None:
        """Begin to serve.

        Raises:
            KVFerryError: An address or port cannot be had; nothing is left running.
        """
        self._index.start()
        try:
            self._events.start()
            if self._operation is not None:
                self._operation.start()
                self._logger.info("metrics and status page on %s", self._operation.url)
            self._listener.start()
        except BaseException:
            self.close(_STOP_GRACE_S)
            raise
        self._is_ready = True

    def close(self, drain_s: float) -> None:
        """Let nobody in any more, finish stores under way for at most ``drain_s`` seconds, release everything."""
        deadline = time.monotonic() + drain_s
        self._is_draining, self._is_ready = True, False
        self._listener.close(time.monotonic() + _STOP_GRACE_S)
        pools = self._pools.drain()
        try:
            self._index.call(self._index.say_goodbye, time.monotonic() + _INDEX_S)
        except (KVFerryError, TimeoutError) as error:
            self._logger.warning("could not say goodbye to the engines: %s", error)
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        if not self._index.stop(time.monotonic() + _STOP_GRACE_S):
            self._logger.error("the index thread did not end; what tiers have not stored yet is lost")
            return
        for pool in pools:
            pool.service.close(max(0.0, deadline - time.monotonic()))
            self._events.clear(pool.tenant, pool.fingerprint)
        if self._operation is not None:
            self._operation.close(time.monotonic() + _STOP_GRACE_S)
        self._events.close(time.monotonic() + _STOP_GRACE_S)
        self._tracer.close(time.monotonic() + _STOP_GRACE_S)

    def status(self) -> ServerStatus:
        """Return a snapshot of everything.

        Raises:
            TimeoutError: The index thread does not answer.
            ClosedError: It has ended.
        """
        pools, engines, requests, lookups = self._index.call(self._look, time.monotonic() + _INDEX_S)
        now = time.monotonic()
        with self._lock:
            clients = [
                msgspec.structs.replace(status, connected_s=now - since, requests=stream.requests.total())
                for stream, (status, since) in self._streams.items()
            ]
            streamed = sum((stream.requests.copy() for stream in self._streams), self._past_requests)
            refused = dict(self._refused)
        return ServerStatus(
            version=__version__,
            server_id=self._id.hex(),
            started=self._started,
            now=time.time(),
            is_ready=self._is_ready,
            is_draining=self._is_draining,
            pools=pools,
            connections=[*engines, *clients],
            requests=dict(requests + streamed),
            refused_connections=refused,
            lookup_seconds=list(zip(LOOKUP_BOUNDS, itertools.accumulate(lookups), strict=True)),
        )

    def _look(self) -> tuple[list[PoolStatus], list[ConnectionStatus], Counter[str], list[int]]:
        """On the index thread: what only it may look at."""
        pools = [
            PoolStatus(
                tenant=pool.tenant,
                fingerprint=pool.fingerprint[:4].hex(),
                block_tokens=pool.layout.block_tokens,
                block_bytes=pool.layout.payload_bytes,
                connections=self._pools.users(pool),
                dead_writers=pool.dead_writers,
                counters=pool.service.counters(),
                problems=pool.service.problems(),
            )
            for pool in self._index.pools
        ]
        return pools, self._index.connections(), self._index.requests.copy(), list(self._index.lookups)

    def _opened(self, pool: Pool) -> None:
        self._index.post(lambda: self._add(pool))

    def _withdraw(self, pool: Pool) -> None:
        self._index.call(lambda: self._remove(pool), time.monotonic() + _INDEX_S)

    def _add(self, pool: Pool) -> None:
        """On the index thread. What routers believe of an earlier pool is not true of this one."""
        self._events.clear(pool.tenant, pool.fingerprint)
        self._index.add_pool(pool)

    def _remove(self, pool: Pool) -> None:
        """On the index thread."""
        self._index.remove_pool(pool)
        self._events.clear(pool.tenant, pool.fingerprint)

    def _publish(self, pool: Pool, events: Sequence[ServiceEvent]) -> None:
        self._events.publish(pool.tenant, pool.fingerprint, pool.layout.block_tokens, events)

    def _count_refused(self, reason: str) -> None:
        with self._lock:
            self._refused[reason] += 1

    def _welcome(self, client: Client[wire.Hello]) -> None:
        """Give an authenticated client its pool. Runs, and with streaming clients stays, on a thread of its own."""
        hello, channel = client.hello, client.channel
        try:
            if hello.mode == "map" and channel.socket.family != socket.AF_UNIX:
                raise PoolRefused(
                    "mode", "only clients on a unix:// address can map the arena", is_mistake=True
                )
            pool = self._pools.acquire(
                client.tenant, hello.fingerprint, hello.layout, time.monotonic() + _POOL_S
            )
        except PoolRefused as error:
            self._refuse(client, error)
            return
        status = ConnectionStatus(
            engine=hello.engine,
            tenant=client.tenant,
            fingerprint=hello.fingerprint[:4].hex(),
            mode=hello.mode,
            connected_s=0.0,
            requests=0,
        )
        try:
            if hello.mode == "map":
                self._map(client, pool, status)
            else:
                self._stream(client, pool, status)
        except OSError as error:
            self._logger.info("engine %r went before it was served: %s", hello.engine, error)
            channel.close()
            self._gone(client, pool)

    def _map(self, client: Client[wire.Hello], pool: Pool, status: ConnectionStatus) -> None:
        arena = pool.service.arena
        shape = wire.ArenaShape(
            arena_id=arena.arena_id,
            slot_bytes=arena.slot_bytes,
            num_slots=arena.num_slots,
            header_bytes=arena.header_bytes,
            total_bytes=arena.total_bytes,
        )
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            welcome = wire.encode(self._greeting(pool, shape))
            client.channel.socket.settimeout(_SEND_S)
            sent = socket.send_fds(client.channel.socket, [welcome], [arena.fd, write_end])
            client.channel.send_bytes([memoryview(welcome)[sent:]], time.monotonic() + _SEND_S)
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        connection = EngineConnection(
            client.channel.socket,
            read_end,
            EngineLedger(pool, f"engine-{next(self._numbers)}"),
            pool,
            status,
            client.hello.wants_events,
            on_end=lambda: self._gone(client, pool),
        )
        self._logger.info(
            "engine %r maps the cache %s", client.hello.engine, pool.name, extra=connection.about
        )
        self._index.post(lambda: self._index.connect(connection))

    def _stream(self, client: Client[wire.Hello], pool: Pool, status: ConnectionStatus) -> None:
        client.channel.send(self._greeting(pool, None), time.monotonic() + _SEND_S)
        number = next(self._numbers)
        seal = FrameSeal(
            client.hello.fingerprint, pool.layout.payload_bytes, self._settings.cache.secret or None
        )
        stream = Stream(
            client.channel, pool, self._index, f"stream-{number}", seal, self._logger, self._tracer
        )
        with self._lock:
            self._streams[stream] = (status, time.monotonic())
        threading.Thread(
            target=self._run_stream, args=(stream, client, pool), name=f"kvferry-stream-{number}", daemon=True
        ).start()

    def _run_stream(self, stream: Stream, client: Client[wire.Hello], pool: Pool) -> None:
        try:
            stream.run()
        except Exception:  # boundary: one client's request must not end the server
            self._logger.exception("a streaming client of %s is disconnected", pool.name)
        finally:
            with self._lock:
                del self._streams[stream]
                self._past_requests += stream.requests
            self._gone(client, pool)

    def _greeting(self, pool: Pool, shape: wire.ArenaShape | None) -> wire.Welcome:
        return wire.Welcome(server_id=self._id, version=__version__, arena=shape, tiers=list(pool.tiers))

    def _refuse(self, client: Client[wire.Hello], error: PoolRefused) -> None:
        self._count_refused(error.code)
        about = {
            "tenant": client.tenant,
            "model": client.hello.fingerprint[:4].hex(),
            "engine": client.hello.engine,
        }
        self._logger.warning("engine %r is refused: %s", client.hello.engine, error, extra=about)
        refusal = wire.Refused.because(error.code, str(error), error.is_mistake)
        try:
            client.channel.send(refusal, time.monotonic() + _SEND_S)
        except OSError:
            self._logger.debug("engine %r did not wait to be refused", client.hello.engine)
        client.channel.close()
        client.release()

    def _gone(self, client: Client[wire.Hello], pool: Pool) -> None:
        self._pools.release(pool)
        client.release()


def run(settings: ServerSettings, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Called on the main thread.

    Args:
        settings: The whole configuration.
        on_ready: Called once everything answers.

    Raises:
        ConfigError: Something in the configuration is wrong.
        KVFerryError: An address or port cannot be had.
    """
    configure(settings.server.log_format)
    server = CacheServer(settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    on_ready()
    while not stop.wait(3600.0):
        pass
    logging.getLogger("kvferry.server").info("stopping: draining for at most %g s", settings.server.drain_s)
    server.close(settings.server.drain_s)
