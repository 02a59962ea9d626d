"""Streaming: a client that cannot map the arena, served by a thread of its own.

Blocks travel between the socket and the arena's slots with nothing in between. What must be known about blocks is
asked of the index thread; what is sent was sealed once, here or by the client that stored it, and what is received
is verified in its reserved slot before it becomes visible.

Threading: one thread, ``kvferry-stream-<n>``, per connection; its ``_Ledger`` belongs to the index thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from kvferry.connector import wire
from kvferry.connector.channel import Channel
from kvferry.connector.errors import BlockRefused, KVFerryError, WireError
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.server.fetching import Arrival, Fetch, Inquiry
from kvferry.connector.server.index import Index, next_answer
from kvferry.connector.server.pools import Pool
from kvferry.connector.server.tracing import OFF, Span, Tracer
from kvferry.connector.service import Place, Reservation
from kvferry.connector.tier import Outcome

__all__ = ["Stream"]

_IDLE_S = 600.0
"""A connection that asks nothing for so long is closed."""
_INDEX_S = 10.0
"""Longest wait for the index thread."""
_AT_ONCE = 256
"""Blocks of a request that the index thread looks after at the same time."""
_MOVE_S = 60.0
"""Longest time for the bytes of one request."""
_OTHERS_S = 1.0
"""Longest wait for a block that somebody else is storing."""

_WORDS: dict[Outcome, Literal["ok", "no_room", "failed"]] = {
    Outcome.OK: "ok",
    Outcome.NO_ROOM: "no_room",
    Outcome.FAILED: "failed",
}


class _Ledger:
    """What a streaming client holds in its pool. Owned by the index thread."""

    def __init__(self, pool: Pool, name: str) -> None:
        self._service = pool.service
        self._name = name
        self._reservations: dict[int, Reservation] = {}

    def reserve(self, keys: Sequence[BlockKey]) -> tuple[Reservation, list[Outcome], list[BlockKey]]:
        """Reserve what is not held; return also what each key is, and the keys that somebody else is storing."""
        reservation = self._service.reserve(self._name, keys)
        if reservation.id:
            self._reservations[reservation.id] = reservation
        taken = {place.key for place in reservation.places}
        absent = [key for key in keys if key not in taken and not self._service.lookup([key]).reachable]
        others = [key for key in absent if self._service.is_expected(key)]
        no_room = set(absent) - set(others)
        return reservation, [Outcome.NO_ROOM if key in no_room else Outcome.OK for key in keys], others

    def commit(self, reservation: Reservation, keys: Sequence[BlockKey]) -> None:
        """Make what was received visible."""
        if self._reservations.pop(reservation.id, None) is not None:
            self._service.commit(reservation, keys)

    def release(self) -> None:
        """End what was leased and fetched."""
        self._service.release_owner(self._name)

    def end(self) -> None:
        """The connection is gone, and so is its thread: nobody reads or writes its slots any more."""
        self.release()
        for reservation in self._reservations.values():
            self._service.abort(reservation)
        self._reservations.clear()


class Stream:
    """One streaming connection. ``run`` on a thread of its own.

    Args:
        channel: Connected, authenticated and welcomed.
        pool: The client's pool.
        index: Where the pool lives.
        name: Unique among all connections.
        seal: Composes and verifies frames as the client knows them.
        logger: Where problems are reported.
        tracer: Where its requests are told.
    """

    def __init__(
        self,
        channel: Channel,
        pool: Pool,
        index: Index,
        name: str,
        seal: FrameSeal,
        logger: logging.Logger,
        tracer: Tracer = OFF,
    ) -> None:
        self._channel = channel
        self._pool = pool
        self._index = index
        self._name = name
        self._seal = seal
        self._logger = logger
        self._tracer = tracer
        self._ledger = _Ledger(pool, name)
        self.requests: Counter[str] = Counter()
        """By type of message. This connection's thread counts; others may copy it."""

    def run(self) -> None:
        """Serve until the client goes, breaks the protocol or asks nothing for long."""
        try:
            while True:
                request = self._channel.receive_request(time.monotonic() + _IDLE_S)
                name = type(request).__name__
                self.requests[name] += 1
                with self._tracer.request(name.lower(), client=self._name, **self._pool.about) as span:
                    self._serve(request, span)
        except WireError as error:
            self._refuse(str(error))
        except (OSError, KVFerryError) as error:
            self._logger.debug("streaming client %s has gone: %s", self._name, error)
        finally:
            self._channel.close()
            self._index.post(self._ledger.end)

    def close(self) -> None:
        """Disconnect the client; ``run`` returns soon after. Any thread."""
        self._channel.interrupt()

    def _serve(self, request: wire.Request, span: Span) -> None:
        match request:
            case wire.Load(id=id_, keys=packed, wait_s=wait_s):
                self._load(id_, wire.unpack_keys(packed), wait_s, span)
            case wire.Store(id=id_, keys=packed):
                self._store(id_, wire.unpack_keys(packed), span)
            case wire.Contains(id=id_, keys=packed, wait_s=wait_s):
                self._contains(id_, wire.unpack_keys(packed), wait_s)
            case wire.Delete(id=id_, keys=packed):
                keys = wire.unpack_keys(packed)
                self._index.call(lambda: self._pool.service.report_load_failed(keys), _soon(_INDEX_S))
                self._send(wire.Done(id=id_))
            case wire.Stats(id=id_):
                self._send(self._index.call(lambda: self._size(id_), _soon(_INDEX_S)))
            case wire.Ping(id=id_):
                self._send(wire.Pong(id=id_))
            case _:
                raise WireError(f"a {type(request).__name__} has no place on a streaming connection")

    def _load(self, request: int, keys: list[BlockKey], wait_s: float, span: Span) -> None:
        deadline, end, sent = time.monotonic() + wait_s, _soon(_MOVE_S), 0
        try:
            for first in range(0, len(keys), _AT_ONCE):
                sent += self._load_some(request, first, keys[first : first + _AT_ONCE], deadline, end)
        finally:
            span.set(keys=len(keys), blocks=sent, bytes=sent * self._seal.payload_bytes)

    def _load_some(self, request: int, first: int, keys: list[BlockKey], deadline: float, end: float) -> int:
        """Send some blocks of a load, the first of which has the index ``first``; return how many were there."""
        decided: queue.SimpleQueue[list[tuple[int, Place | None]]] = queue.SimpleQueue()
        fetch = Fetch(self._pool, self._name, keys, deadline, decided.put)
        self._index.post(lambda: self._index.wait_for(fetch))
        left, sent = len(keys), 0
        try:
            while left:
                blocks = next_answer(decided, max(deadline, time.monotonic()) + _INDEX_S)
                left -= len(blocks)
                for index, place in blocks:
                    self._send_block(request, first + index, place, end)
                    sent += place is not None
        finally:
            self._index.post(lambda: self._load_ended(fetch))
        return sent

    def _load_ended(self, fetch: Fetch) -> None:
        """On the index thread."""
        fetch.give_up()
        self._ledger.release()

    def _send_block(self, request: int, index: int, place: Place | None, deadline: float) -> None:
        if place is None:
            self._channel.send(wire.Block(id=request, index=index, length=0), deadline)
            return
        payload = self._pool.service.slot(place.slot)[: self._seal.payload_bytes]
        message = wire.Block(id=request, index=index, length=len(payload))
        self._channel.send(message, deadline, [self._header(place, payload), payload])

    def _header(self, place: Place, payload: memoryview) -> bytes:
        """Return a leased block's frame header, made once for as long as the slot has this generation."""
        generation, header = self._pool.headers.get(place.slot, (0, b""))
        if generation != place.generation:
            fresh = bytearray(HEADER_BYTES)
            self._seal.seal(place.key, memoryview(fresh), payload)
            header = bytes(fresh)
            self._pool.headers[place.slot] = (place.generation, header)
        return header

    def _store(self, request: int, keys: list[BlockKey], span: Span) -> None:
        reservation, outcomes, others = self._index.call(lambda: self._ledger.reserve(keys), _soon(_INDEX_S))
        index_of = {key: index for index, key in enumerate(keys)}
        places = sorted(reservation.places, key=lambda place: index_of[place.key])
        self._send(wire.Wanted(id=request, indices=[index_of[place.key] for place in places]))
        good = []
        refused: list[BlockRefused] = []
        header = bytearray(HEADER_BYTES)
        end = _soon(_MOVE_S)
        for place in places:
            slot = self._pool.service.slot(place.slot)[: self._seal.payload_bytes]
            self._channel.receive_into(header, end)
            self._channel.receive_into(slot, end)
            try:
                self._seal.verify(place.key, memoryview(header), slot)
                self._pool.headers[place.slot] = (place.generation, bytes(header))
                good.append(place.key)
            except BlockRefused as error:
                outcomes[index_of[place.key]] = Outcome.FAILED
                refused.append(error)
        if refused:
            self._logger.warning(
                "%d blocks that client %s stored are refused, such as: %s",
                len(refused),
                self._name,
                refused[0],
                extra={**self._pool.about, "connection": self._name},
            )
        self._index.call(lambda: self._ledger.commit(reservation, good), _soon(_INDEX_S))
        for key in self._lost(others):
            outcomes[index_of[key]] = Outcome.FAILED
        span.set(
            keys=len(keys), blocks=len(good), bytes=len(good) * self._seal.payload_bytes, refused=len(refused)
        )
        self._send(wire.Stored(id=request, outcomes=[_WORDS[outcome] for outcome in outcomes]))

    def _lost(self, keys: list[BlockKey]) -> list[BlockKey]:
        """Wait for blocks that somebody else is storing; return those that do not come."""
        if not keys:
            return []
        answered: queue.SimpleQueue[list[BlockKey]] = queue.SimpleQueue()
        deadline = _soon(_OTHERS_S)
        arrival = Arrival(self._pool, keys, deadline, answered.put)
        self._index.post(lambda: self._index.wait_for(arrival))
        return next_answer(answered, deadline + _INDEX_S)

    def _contains(self, request: int, keys: list[BlockKey], wait_s: float) -> None:
        deadline, held = time.monotonic() + wait_s, b""
        for first in range(0, len(keys), _AT_ONCE):
            held += self._held(keys[first : first + _AT_ONCE], deadline)
        self._send(wire.Held(id=request, held=held))

    def _held(self, keys: list[BlockKey], deadline: float) -> bytes:
        answered: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        inquiry = Inquiry(self._pool, self._name, keys, deadline, answered.put)
        self._index.post(lambda: self._index.wait_for(inquiry))
        return next_answer(answered, max(deadline, time.monotonic()) + _INDEX_S)

    def _size(self, request: int) -> wire.Size:
        counters = self._pool.service.counters()
        return wire.Size(
            id=request,
            blocks=counters.host_blocks,
            used_bytes=counters.used_bytes,
            capacity_bytes=counters.capacity_bytes,
            evictions=counters.host_evictions,
        )

    def _send(self, reply: wire.Reply) -> None:
        self._channel.send(reply, _soon(_INDEX_S))

    def _refuse(self, why: str) -> None:
        with contextlib.suppress(OSError):
            self._send(wire.Refused.because("protocol", why))


def _soon(seconds: float) -> float:
    return time.monotonic() + seconds
