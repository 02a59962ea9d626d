"""KV events for routers: what became loadable, and what no longer is, in vLLM's form over ZeroMQ.

A batch is a multipart message: topic, sequence number (8 bytes, big-endian), msgpack of
``[time, events, rank]``, as vLLM's own publisher sends it, so its subscribers read ours. Numbers are handed out
where events happen and count up by one over all topics. Whatever is lost on the way, here or in a slow
subscriber's queue, is therefore a gap that the subscriber sees, and can ask to be sent again.

Who owns what
  * ``EventPublisher.publish`` and ``clear`` may be called by any thread and never wait for the network: they number
    batches and queue them. A full queue loses its oldest batch.
  * The thread ``kvferry-events`` owns both sockets, what is kept for replay, and the replays under way.

Docs: docs/how-to/follow-kv-events.md.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from kvferry.connector.address import is_loopback
from kvferry.connector.errors import ConfigError, KVFerryError
from kvferry.connector.server.config import ServerConfig
from kvferry.connector.server.kv_events import cut, encode_batch, topic_of
from kvferry.connector.service import ServiceEvent

if TYPE_CHECKING:
    import zmq

__all__ = ["MAX_QUEUED", "EventPublisher"]

MAX_QUEUED = 4096
"""Batches that wait to be sent."""
_MAX_KEPT_BYTES = 64 << 20
"""Bytes of batches that can be asked for again."""
_MAX_REPLAYS = 64
"""Subscribers that are sent what they missed at the same time."""
_REPLAY_S = 30.0
"""Longest time that one of them may take."""
_UNREAD = 1000
"""Batches that wait for one subscriber before it loses some."""
_REQUEST_BYTES = 64
_LOOK_MS = 1000
_CONGESTED_MS = 20
_LINGER_S = 1.0
_WARN_S = 60.0
_END = (-1).to_bytes(8, "big", signed=True)
"""Number of the message that ends a replay."""
_ENDPOINT = re.compile(r"tcp://(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d+)|ipc://.+")


class _Batch(NamedTuple):
    """What waits to be sent."""

    sequence: int
    topic: bytes
    happened: float
    """Unix time."""
    block_tokens: int
    events: Sequence[ServiceEvent] | None
    """None: everything of the topic is gone."""


class _Kept(NamedTuple):
    """What was sent."""

    sequence: int
    topic: bytes
    payload: bytes


class EventPublisher:
    """Publishes events where the configuration says so, and does nothing where it does not.

    Args:
        config: ``events``, ``events_replay`` and ``events_kept`` are used.
        logger: Where losses are reported.

    Raises:
        ConfigError: An address is none, or ZeroMQ is not installed.
    """

    def __init__(self, config: ServerConfig, logger: logging.Logger) -> None:
        if config.events_replay and not config.events:
            raise ConfigError("server.events_replay", "no events are published", "set server.events, too")
        self._logger = logger
        self._lock = threading.Lock()
        self._queue: deque[_Batch] = deque()
        self._numbers = itertools.count()
        self._lost = 0
        self._next_warning = 0.0
        self._sender = _Sender(config, self._take, logger) if config.events else None
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        """Where events are published, once started; empty for nowhere."""
        return self._sender.endpoint if self._sender else ""

    @property
    def replay_endpoint(self) -> str:
        """Where missed events can be asked for, once started; empty for nowhere."""
        return self._sender.replay_endpoint if self._sender else ""

    @property
    def lost(self) -> int:
        """Batches that were lost because the queue was full."""
        return self._lost

    def start(self) -> None:
        """Bind the addresses and begin to send.

        Raises:
            KVFerryError: An address cannot be had; nothing is left running.
        """
        if self._sender is None:
            return
        self._sender.bind()
        self._thread = threading.Thread(target=self._sender.run, name="kvferry-events", daemon=True)
        self._thread.start()
        self._logger.info(
            "KV events are published at %s, replayed at %s", self.endpoint, self.replay_endpoint or "nowhere"
        )

    def publish(
        self, tenant: str, fingerprint: bytes, block_tokens: int, events: Sequence[ServiceEvent]
    ) -> None:
        """Queue events. Any thread; does not block.

        Args:
            tenant: Whose model.
            fingerprint: The model's.
            block_tokens: Tokens of a block.
            events: In the order in which they happened.
        """
        if self._sender is None:
            return
        topic = topic_of(tenant, fingerprint).encode()
        now = time.time()
        for batch in cut(events):
            self._put(topic, now, block_tokens, batch)
        self._sender.wake()

    def clear(self, tenant: str, fingerprint: bytes) -> None:
        """Queue that nothing of a model can be loaded: its pool is new, or closed. Any thread; does not block."""
        if self._sender is None:
            return
        self._put(topic_of(tenant, fingerprint).encode(), time.time(), 0, None)
        self._sender.wake()

    def close(self, deadline: float) -> None:
        """Send what is queued and end the thread, waiting at most until ``deadline``. Idempotent."""
        if self._sender is None:
            return
        if self._thread is None:
            self._sender.release()
            return
        self._sender.stop(deadline)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._logger.warning("the last KV events were not sent within the deadline")

    def _put(
        self, topic: bytes, now: float, block_tokens: int, events: Sequence[ServiceEvent] | None
    ) -> None:
        with self._lock:
            if len(self._queue) >= MAX_QUEUED:
                self._queue.popleft()
                self._lost += 1
            self._queue.append(_Batch(next(self._numbers), topic, now, block_tokens, events))

    def _take(self) -> _Batch | None:
        """On the sender's thread: the next batch, None when there is none."""
        with self._lock:
            batch = self._queue.popleft() if self._queue else None
            lost = self._lost
        if lost and time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + _WARN_S
            self._logger.warning(
                "%d batches of KV events are lost so far: more happens than can be sent", lost
            )
        return batch


class _Sender:
    """The sockets, and what they are sent. Owned by the thread that calls ``run``; ``wake`` and ``stop`` by any.

    Args:
        config: The addresses.
        take: Returns the next batch, None when there is none.
        logger: Where problems are reported.
    """

    def __init__(
        self, config: ServerConfig, take: Callable[[], _Batch | None], logger: logging.Logger
    ) -> None:
        self._zmq = _import_zmq()
        self.endpoint = _checked(config.events, "server.events", logger)
        self.replay_endpoint = ""
        if config.events_replay:
            self.replay_endpoint = _checked(config.events_replay, "server.events_replay", logger)
        self._take = take
        self._logger = logger
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._publisher: zmq.Socket[bytes] | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._kept: deque[_Kept] = deque()
        self._most_kept = config.events_kept
        self._kept_bytes = 0
        self._replays: dict[bytes, tuple[Iterator[list[bytes]], float]] = {}
        self._unsent: dict[bytes, list[bytes]] = {}
        self._wake_lock = threading.Lock()
        self._wake_fd = -1
        self._stop_at: float | None = None

    def bind(self) -> None:
        """Open the sockets, before the thread starts.

        Raises:
            KVFerryError: An address cannot be had; everything is released.
        """
        zmq = self._zmq
        self._context = zmq.Context()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._publisher, self.endpoint = self._bound(zmq.PUB, self.endpoint, "server.events")
            if self.replay_endpoint:
                self._router, self.replay_endpoint = self._bound(
                    zmq.ROUTER, self.replay_endpoint, "server.events_replay"
                )
        except KVFerryError:
            self.release()
            raise

    def wake(self) -> None:
        """Have the thread look at the queue."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def stop(self, deadline: float) -> None:
        """Have the thread send what is queued and end."""
        self._stop_at = deadline
        self.wake()

    def run(self) -> None:
        """Send until told to stop."""
        try:
            self._loop()
        except Exception:  # boundary: whatever ZeroMQ raises must not end the server
            self._logger.exception("KV events are no longer published")
        finally:
            self.release()

    def release(self) -> None:
        """Close the sockets; what they still hold is sent for a moment. Idempotent."""
        left = _LINGER_S if self._stop_at is None else self._stop_at - time.monotonic()
        linger_ms = int(1000 * min(_LINGER_S, max(0.0, left / 2)))
        for one in (self._publisher, self._router):
            if one is not None:
                one.close(linger=linger_ms)
        self._publisher = self._router = None
        if self._context is not None:
            self._context.term()
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
            self._wake_fd = -1

    def _loop(self) -> None:
        zmq = self._zmq
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        if self._router is not None:
            poller.register(self._router, zmq.POLLIN)
        while True:
            is_last = self._stop_at is not None
            ready = dict(poller.poll(_CONGESTED_MS if self._replays else _LOOK_MS) if not is_last else ())
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            self._send_queued()
            if is_last:
                return
            if self._router in ready:
                self._take_requests()
            self._replay()

    def _bound(self, kind: int, endpoint: str, path: str) -> tuple[zmq.Socket[bytes], str]:
        library = self._zmq
        assert self._context is not None  # bind made it
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        try:
            socket.setsockopt(library.SNDHWM, _UNREAD)
            socket.setsockopt(library.IPV6, int("[" in endpoint))
            if kind == library.ROUTER:
                socket.setsockopt(library.ROUTER_MANDATORY, 1)
                socket.setsockopt(library.MAXMSGSIZE, _REQUEST_BYTES)
            socket.bind(endpoint)
            return socket, socket.getsockopt_string(library.LAST_ENDPOINT)
        except library.ZMQError as error:
            socket.close(linger=0)
            raise KVFerryError(
                f"{path}: cannot publish at {endpoint}: {error}; choose another address"
            ) from error

    def _send_queued(self) -> None:
        assert self._publisher is not None  # bound before the thread started
        while (batch := self._take()) is not None:
            payload = encode_batch(batch.happened, batch.block_tokens, batch.events)
            self._publisher.send_multipart([batch.topic, batch.sequence.to_bytes(8, "big"), payload])
            self._keep(_Kept(batch.sequence, batch.topic, payload))

    def _keep(self, sent: _Kept) -> None:
        self._kept.append(sent)
        self._kept_bytes += len(sent.payload)
        while len(self._kept) > self._most_kept or self._kept_bytes > _MAX_KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft().payload)

    def _take_requests(self) -> None:
        """Begin a replay for whoever asks: an empty frame, then the first number that is wanted."""
        zmq = self._zmq
        assert self._router is not None  # it had something to read
        for _ in range(_MAX_REPLAYS):
            try:
                client, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2 or frames[0] or len(frames[1]) != 8:
                self._logger.debug("somebody asked for KV events in a form that is none")
                continue
            if client not in self._replays and len(self._replays) >= _MAX_REPLAYS:
                self._logger.warning("too many subscribers ask for missed KV events at the same time")
                continue
            wanted = self._again(client, int.from_bytes(frames[1], "big"))
            self._replays[client] = (wanted, time.monotonic() + _REPLAY_S)
            self._unsent.pop(client, None)

    def _again(self, client: bytes, first: int) -> Iterator[list[bytes]]:
        kept = [one for one in self._kept if one.sequence >= first]
        for one in kept:
            yield [client, b"", one.topic, one.sequence.to_bytes(8, "big"), one.payload]
        yield [client, b"", b"", _END, b""]

    def _replay(self) -> None:
        """Send each subscriber as much of what it missed as it takes now."""
        for client, (wanted, deadline) in list(self._replays.items()):
            if time.monotonic() > deadline or not self._sent_some(client, wanted):
                del self._replays[client]
                self._unsent.pop(client, None)

    def _sent_some(self, client: bytes, wanted: Iterator[list[bytes]]) -> bool:
        """Return whether there is more to be sent, to somebody who is there."""
        zmq = self._zmq
        assert self._router is not None  # a request came through it
        for _ in range(_UNREAD):
            message = self._unsent.pop(client, None) or next(wanted, None)
            if message is None:
                return False
            try:
                self._router.send_multipart(message, zmq.NOBLOCK)
            except zmq.Again:
                self._unsent[client] = message
                return True
            except zmq.ZMQError:
                return False  # it has gone
        return True


def _checked(endpoint: str, path: str, logger: logging.Logger) -> str:
    """Return an address that can be bound, warning if others than this machine reach it.

    Raises:
        ConfigError: It is none.
    """
    parts = _ENDPOINT.fullmatch(endpoint)
    if parts is None:
        raise ConfigError(path, f"{endpoint!r} is no address", "write tcp://127.0.0.1:5557 or ipc:///path")
    host = parts["six"] or parts["host"]
    if host is not None and not is_loopback(host):
        logger.warning(
            "%s: whoever reaches %s can follow which blocks are cached, without a credential: ZeroMQ asks for none; "
            "let only routers reach it",
            path,
            endpoint,
        )
    return endpoint


def _import_zmq() -> ModuleType:
    try:
        import zmq
    except ImportError as error:
        raise ConfigError("server.events", "needs ZeroMQ", "pip install 'kvferry[server]'") from error
    return zmq
