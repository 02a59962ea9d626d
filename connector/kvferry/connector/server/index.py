"""The index thread: owns every pool and every connection of a local engine, and answers from memory.

One loop (``kvferry-index``): take in what engines sent and answer at once, run what other threads posted, poll the
pools, advance what streaming clients wait for. Nothing in it waits for a tier, a disk or a peer: sockets are
non-blocking, an engine that does not read its answers is disconnected.

Who owns what
  * This thread owns the pools' services, the engines' ledgers and sockets, and all fetches.
  * Other threads get in by ``post`` and ``call`` only. What they posted runs in order.
  * When an engine's connection ends, its pipe (the lifeline) is watched until no process holds the other end: only
    then do the slots it had reserved go to others.
"""

from __future__ import annotations

import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from kvferry.connector import wire
from kvferry.connector.errors import ClosedError, WireError
from kvferry.connector.keys import KEY_BYTES
from kvferry.connector.server.fetching import Waiting
from kvferry.connector.server.mapping import EngineLedger
from kvferry.connector.server.pools import Pool
from kvferry.connector.server.status import ConnectionStatus
from kvferry.connector.server.tracing import OFF, Tracer, Value
from kvferry.connector.service import Reservation, ServiceEvent

__all__ = ["LOOKUP_BOUNDS", "EngineConnection", "Index", "next_answer"]

_POLL_S = 0.05
"""How often a pool is looked after when nothing happens in it."""
_READ_BYTES = 1 << 18
_MAX_UNREAD_BYTES = 8 << 20
"""Answers that an engine may leave unread."""
LOOKUP_BOUNDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.5, float("inf"))
"""Upper bounds, in seconds, of the histogram of lookups."""

_T = TypeVar("_T")


def next_answer(answers: queue.SimpleQueue[_T], deadline: float) -> _T:
    """Return what the index thread answers next, for another thread.

    Raises:
        TimeoutError: It has not answered by ``deadline``.
    """
    try:
        return answers.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise TimeoutError("the index thread did not answer within the deadline") from None


class _Call(Generic[_T]):
    """Work that another thread waits for."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._outcome: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            self._outcome.put((self._work(), None))
        except BaseException as error:  # noqa: BLE001  # boundary: raised again in the thread that asked
            self._outcome.put((None, error))

    def result(self, deadline: float) -> _T:
        value, error = next_answer(self._outcome, deadline)
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # without an error there is a value


class EngineConnection:
    """A local engine's connection.

    Args:
        sock: Connected and authenticated; the index thread's from now on.
        lifeline: Read end of the pipe whose other end the engine's processes hold.
        ledger: What the engine holds.
        pool: Its pool.
        status: What is told about it; ``requests`` and ``connected_s`` are filled in.
        wants_events: Whether it is sent the pool's events.
        on_end: Called when the connection is gone and nothing of it is left.
    """

    def __init__(
        self,
        sock: socket.socket,
        lifeline: int,
        ledger: EngineLedger,
        pool: Pool,
        status: ConnectionStatus,
        wants_events: bool,
        on_end: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.lifeline = lifeline
        self.ledger = ledger
        self.pool = pool
        self.status = status
        self.wants_events = wants_events
        self.on_end = on_end
        self.reader = wire.MessageReader()
        self.unsent = bytearray()
        self.since = time.monotonic()
        self.requests = 0

    @property
    def about(self) -> dict[str, str]:
        """For structured logs."""
        return {**self.pool.about, "engine": self.status.engine}


class _DeadWriter(NamedTuple):
    """An engine whose connection is gone while its processes may still write into what it reserved."""

    connection: EngineConnection
    reservations: list[Reservation]


class Index:
    """The loop and its state.

    Args:
        on_events: Called with a pool and its events, on the index thread; must not block.
        logger: Where problems are reported.
        tracer: Where requests of engines are told.
    """

    def __init__(
        self,
        on_events: Callable[[Pool, Sequence[ServiceEvent]], None],
        logger: logging.Logger,
        tracer: Tracer = OFF,
    ) -> None:
        self._on_events = on_events
        self._logger = logger
        self._tracer = tracer
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._woken)
        self._posted: deque[Callable[[], object]] = deque()
        self._pools: list[Pool] = []
        self._connections: set[EngineConnection] = set()
        self._waiting: list[Waiting] = []
        self._is_stopping = False
        self._has_news = False
        self.requests: Counter[str] = Counter()
        """Requests by type of message; the index thread's."""
        self.lookups = [0] * len(LOOKUP_BOUNDS)
        """Lookups by the first bound their time is within; the index thread's."""
        self._thread = threading.Thread(target=self._run, name="kvferry-index", daemon=True)

    # From other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, work: Callable[[], object]) -> None:
        """Have ``work`` run on the index thread, after everything posted before. What it raises is logged."""
        self._posted.append(work)
        self._ring()

    def call(self, work: Callable[[], _T], deadline: float) -> _T:
        """Run ``work`` on the index thread and return what it returns, or raise what it raises.

        Raises:
            TimeoutError: It has not run by ``deadline``; it still will.
            ClosedError: The thread has ended.
        """
        if not self._thread.is_alive():
            raise ClosedError("the server's index thread has ended")
        call = _Call(work)
        self.post(call.run)
        return call.result(deadline)

    def wake(self) -> None:
        """Have the loop look after all pools now: a tier has something to report."""
        self._has_news = True
        self._ring()

    def _ring(self) -> None:
        try:
            os.eventfd_write(self._wake_fd, 1)
        except OSError:
            return  # it ends; nothing is left to be looked after

    def stop(self, deadline: float) -> bool:
        """End the thread, disconnecting every engine; return whether it ended in time."""
        self.post(self._stop)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    # On the index thread

    def add_pool(self, pool: Pool) -> None:
        """Look after a pool from now on."""
        self._pools.append(pool)

    def remove_pool(self, pool: Pool) -> None:
        """Touch a pool no more."""
        self._pools.remove(pool)

    def connect(self, connection: EngineConnection) -> None:
        """Serve an engine from now on."""
        self._connections.add(connection)
        self._selector.register(
            connection.sock, selectors.EVENT_READ, lambda mask: self._ready(connection, mask)
        )

    def wait_for(self, waiting: Waiting) -> None:
        """Advance something now, and whenever it may have changed, until it is over."""
        if not waiting.advance(time.monotonic()):
            self._waiting.append(waiting)

    def say_goodbye(self) -> None:
        """Tell the engines that the server stops."""
        for connection in list(self._connections):
            self._send(connection, wire.encode(wire.Goodbye()))

    def connections(self) -> list[ConnectionStatus]:
        """Return what is told about each engine."""
        now = time.monotonic()
        return [
            msgspec.structs.replace(
                connection.status, connected_s=now - connection.since, requests=connection.requests
            )
            for connection in self._connections
        ]

    @property
    def pools(self) -> Sequence[Pool]:
        """The pools that are looked after."""
        return self._pools

    def _run(self) -> None:
        while not self._is_stopping:
            for key, mask in self._selector.select(_POLL_S):
                key.data(mask)
            self._run_posted()
            self._look_after_pools(time.monotonic())
        for connection in list(self._connections):
            self._disconnect(connection, "")
        self._selector.close()
        os.close(self._wake_fd)

    def _stop(self) -> None:
        self._is_stopping = True

    def _woken(self, mask: int) -> None:
        os.eventfd_read(self._wake_fd)

    def _run_posted(self) -> None:
        if self._posted and self._waiting:
            self._has_news = True  # what runs now may give back the room that somebody waits for
        while self._posted:
            work = self._posted.popleft()
            try:
                work()
            except Exception:  # boundary: another thread's work must not end this one
                self._logger.exception("what another thread wanted of the index thread failed")

    def _look_after_pools(self, now: float) -> None:
        has_news = self._has_news
        if has_news:
            self._has_news = False  # before the pools are asked: whatever comes after that rings again
        polled = [pool for pool in self._pools if has_news or now >= pool.next_poll]
        for pool in polled:
            pool.next_poll = now + _POLL_S
            pool.service.poll()
            self._tell_events(pool)
        if self._waiting and polled:
            self._waiting = [
                waiting
                for waiting in self._waiting
                if waiting.pool not in polled or not self._advance(waiting, now)
            ]

    def _advance(self, waiting: Waiting, now: float) -> bool:
        try:
            return waiting.advance(now)
        except Exception:  # boundary: one client's fetch must not end the thread
            self._logger.exception("a fetch of %s failed", waiting.pool.name)
            return True

    def _tell_events(self, pool: Pool) -> None:
        events = pool.service.take_events()
        if not events:
            return
        self._on_events(pool, events)
        listeners = [one for one in self._connections if one.pool is pool and one.wants_events]
        if not listeners:
            return
        for event in events:
            for start in range(0, len(event.keys), wire.MAX_KEYS):
                keys = wire.pack_keys(event.keys[start : start + wire.MAX_KEYS])
                message = wire.encode(wire.Events(kind=event.kind, tier=event.tier, keys=keys))
                for listener in listeners:
                    self._send(listener, message)

    def _ready(self, connection: EngineConnection, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._send(connection, b"")
        if not mask & selectors.EVENT_READ or connection not in self._connections:
            return
        arrived = time.perf_counter()
        try:
            data = connection.sock.recv(_READ_BYTES)
            if not data:
                self._disconnect(connection, "")
                return
            answers = [self._answer(connection, body, arrived) for body in connection.reader.feed(data)]
        except BlockingIOError:
            return
        except OSError as error:
            self._disconnect(connection, str(error))
        except WireError as error:
            self._refuse(connection, "protocol", str(error))
        except Exception as error:  # boundary: one engine's message must not end the thread
            self._logger.exception("a request of engine %r failed", connection.status.engine)
            self._refuse(connection, "internal", f"{type(error).__name__}: see the server's log")
        else:
            self._send(connection, b"".join(answers))

    def _answer(self, connection: EngineConnection, body: bytes, arrived: float) -> bytes:
        message = wire.decode_request(body)
        reply = connection.ledger.handle(message)
        connection.requests += 1
        self.requests[type(message).__name__] += 1
        seconds = time.perf_counter() - arrived
        if isinstance(message, wire.Lookup):
            self._count_lookup(seconds)
        if self._tracer.is_on:
            self._tell(connection, message, reply, seconds)
        return wire.encode(reply) if reply is not None else b""

    def _tell(
        self,
        connection: EngineConnection,
        message: wire.Request,
        reply: wire.Reply | None,
        seconds: float,
    ) -> None:
        """Add a span for what is worth one: the requests that are about blocks."""
        keys = getattr(message, "keys", None)
        if keys is None:
            return
        told: dict[str, Value] = {
            **connection.pool.about,
            "client": connection.status.engine,
            "keys": len(keys) // KEY_BYTES,
        }
        match reply:
            case wire.Found(ready=ready, reachable=reachable, missing=missing):
                told |= {"ready": ready, "reachable": reachable, "missing": missing.value}
            case wire.Coming(blocks=blocks, cut=cut):
                told |= {"blocks": blocks, "cut": cut.value}
            case wire.Leased(slots=slots) | wire.Reserved(slots=slots):
                told["blocks"] = len(slots)
        end_ns = time.time_ns()
        self._tracer.record(type(message).__name__.lower(), end_ns - int(seconds * 1e9), end_ns, told)

    def _count_lookup(self, seconds: float) -> None:
        for index, bound in enumerate(LOOKUP_BOUNDS):
            if seconds <= bound:
                self.lookups[index] += 1
                return

    def _send(self, connection: EngineConnection, data: bytes) -> None:
        if connection not in self._connections:
            return
        unsent = connection.unsent
        unsent += data
        try:
            while unsent:
                del unsent[: connection.sock.send(unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._disconnect(connection, str(error))
            return
        if len(unsent) > _MAX_UNREAD_BYTES:
            self._disconnect(connection, f"it left {len(unsent)} bytes of answers unread")
            return
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
        if self._selector.get_key(connection.sock).events != mask:
            self._selector.modify(connection.sock, mask, lambda ready: self._ready(connection, ready))

    def _refuse(self, connection: EngineConnection, code: wire.RefusalCode, why: str) -> None:
        refusal = wire.Refused.because(code, why)
        self._send(connection, wire.encode(refusal))
        self._disconnect(connection, why)

    def _disconnect(self, connection: EngineConnection, why: str) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        reservations = connection.ledger.end()
        if why:
            self._logger.warning(
                "engine %r is disconnected: %s", connection.status.engine, why, extra=connection.about
            )
        else:
            self._logger.info("engine %r has gone", connection.status.engine, extra=connection.about)
        connection.pool.dead_writers += 1
        dead = _DeadWriter(connection, reservations)
        self._selector.register(connection.lifeline, selectors.EVENT_READ, lambda mask: self._settle(dead))

    def _settle(self, dead: _DeadWriter) -> None:
        """The lifeline can be read: at its end nobody can write any more, what was reserved is free again."""
        connection = dead.connection
        try:
            if os.read(connection.lifeline, 4096):
                return
        except BlockingIOError:
            return
        except OSError as error:
            self._logger.warning("the lifeline of engine %r failed: %s", connection.status.engine, error)
        self._selector.unregister(connection.lifeline)
        os.close(connection.lifeline)
        for reservation in dead.reservations:
            connection.pool.service.abort(reservation)
        connection.pool.dead_writers -= 1
        if dead.reservations:
            self._logger.info(
                "took back %d blocks that engine %r had not finished",
                sum(len(reservation.places) for reservation in dead.reservations),
                connection.status.engine,
                extra=connection.about,
            )
        connection.on_end()
