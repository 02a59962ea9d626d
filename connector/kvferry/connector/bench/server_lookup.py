"""Lookups of many engines at once on one cache server, against pipelines of ``EXISTS`` on a Redis server.

Every client is a process. On both sides it asks for the blocks of a prefix, waits for the answer and asks for the
next, as fast as it can, over a UNIX socket on this machine. For Redis that is redis-py's pipeline with one ``EXISTS``
for each key, with hiredis where that is installed. Both servers hold all of the blocks. Sides take turns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import msgspec

from kvferry.connector import wire
from kvferry.connector.address import parse_address
from kvferry.connector.bench.case import BenchCase, BenchContext, BenchSkipped, Figure
from kvferry.connector.bench.host import MIB
from kvferry.connector.bench.measure import percentile
from kvferry.connector.bench.serving import Serving, serving
from kvferry.connector.bench.tier_side import FINGERPRINT
from kvferry.connector.config import TlsConfig
from kvferry.connector.joining import Joined, join
from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.link import Link

__all__ = ["SERVER_LOOKUP", "clients"]

CLIENTS = 32
KEYS_ASKED = (8, 32, 128)
HELD = 4096
SAVED_AT_ONCE = 512
SERVER, REDIS = "server", "redis"
RAW = "redis-py EXISTS pipeline"
LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=16, head_dim=32, itemsize=2)
STRIDE = 7
"""Prefixes between one question and the next, so that clients don't ask for the same at the same time."""
_WAIT_S = 60.0
_GO = b">"
_LENGTH = struct.Struct("<Q")
_MAIN = "from kvferry.connector.bench.server_lookup import clients; clients()"

_Ask = Callable[[int], int]
"""Asks for the blocks of a prefix by its number; returns how many are there."""


class _Plan(msgspec.Struct, frozen=True):
    """What every client does."""

    server: str
    token: str
    redis: str
    """URL; empty without one."""
    keys_asked: tuple[int, ...]
    rounds: int
    seconds: float
    """Of each phase."""
    sockets: tuple[int, ...] = ()
    """Descriptors over which the clients are told to begin, and tell what they saw."""

    def phases(self) -> Iterator[tuple[str, int]]:
        """Yield whom to ask for how many keys, one after the other."""
        sides = [SERVER, REDIS] if self.redis else [SERVER]
        for _ in range(self.rounds):
            for count in self.keys_asked:
                for side in sides:
                    yield side, count
            sides.reverse()


class _Phase(msgspec.Struct):
    """What all clients together saw in one phase, or in several alike."""

    rates: list[float]
    """Answers a second, of each phase."""
    times_s: list[float]
    """Of every question."""


def _measure(context: BenchContext) -> Sequence[Figure]:
    count, keys_asked = (3, KEYS_ASKED[:1]) if context.quick else (CLIENTS, KEYS_ASKED)
    with ExitStack() as stack:
        server = stack.enter_context(serving((HELD + 2) * LAYOUT.slot_bytes + MIB))
        stack.callback(_fill(server).close)
        redis, why = _start_redis(server, stack)
        plan = _Plan(
            server=server.unix,
            token=server.token,
            redis=redis,
            keys_asked=keys_asked,
            rounds=1 if context.quick else 5,
            seconds=0.05 if context.quick else 1.0,
        )
        seen = _run(plan, count, context.progress)
    return [figure for asked in keys_asked for figure in _figures(seen, asked, count, why)]


def _figures(seen: dict[tuple[str, int], _Phase], asked: int, count: int, why: str) -> Iterator[Figure]:
    ours, theirs = seen[SERVER, asked], seen.get((REDIS, asked))
    what = f"{asked} keys each, {count} clients"
    yield Figure(
        name=f"lookups a second, {what}",
        value=percentile(ours.rates, 50),
        unit="/s",
        raw=percentile(theirs.rates, 50) if theirs else None,
        raw_name=RAW if theirs else "",
        note=why,
    )
    for percent in (50, 99):
        yield Figure(
            name=f"p{percent} of a lookup, {what}",
            value=percentile(ours.times_s, percent) * 1e3,
            unit="ms",
            raw=percentile(theirs.times_s, percent) * 1e3 if theirs else None,
            raw_name=RAW if theirs else "",
            note=why,
        )


def _run(plan: _Plan, count: int, progress: Callable[[float], None]) -> dict[tuple[str, int], _Phase]:
    """Have ``count`` clients go through the plan together; return what they saw by side and keys asked."""
    seen: dict[tuple[str, int], _Phase] = {}
    with ExitStack() as stack:
        sockets = stack.enter_context(_processes(plan, count))
        phases = list(plan.phases())
        for number, phase in enumerate(phases):
            for sock in sockets:
                sock.sendall(_GO)
            results = [_received(sock) for sock in sockets]
            whole = seen.setdefault(phase, _Phase([], []))
            whole.rates.append(sum(len(times) / sum(times) for times in results))
            whole.times_s.extend(seconds for times in results for seconds in times)
            progress((number + 1) / len(phases))
    return seen


@contextlib.contextmanager
def _processes(plan: _Plan, count: int) -> Iterator[list[socket.socket]]:
    """Start the clients, and yield this side of their sockets; without it they end."""
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(count)]
        for ours, theirs in pairs:
            ours.settimeout(_WAIT_S)
            stack.callback(ours.close)
            stack.callback(theirs.close)
        numbers = tuple(theirs.fileno() for _, theirs in pairs)
        process = subprocess.Popen([sys.executable, "-c", _MAIN], stdin=subprocess.PIPE, pass_fds=numbers)
        try:
            assert process.stdin is not None
            with process.stdin as pipe:
                pipe.write(msgspec.json.encode(msgspec.structs.replace(plan, sockets=numbers)))
            for _, theirs in pairs:
                theirs.close()
            yield [ours for ours, _ in pairs]
        finally:
            stack.close()
            process.wait(_WAIT_S)


def _received(sock: socket.socket) -> array[float]:
    try:
        (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
        times = array("d")
        times.frombytes(_exactly(sock, length))
    except TimeoutError:
        raise BenchSkipped("a client did not come to the end of its questions") from None
    except ConnectionError:
        raise BenchSkipped("a client ended early; it says why on stderr") from None
    return times


def _exactly(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise ConnectionError("the other end closed the connection")
        data += part
    return bytes(data)


def clients() -> None:
    """In a process of its own, with the plan on standard input: become all clients, and wait for them."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=_Plan)
    for number in plan.sockets:
        if os.fork() == 0:
            for other in plan.sockets:
                if other != number:
                    os.close(other)
            with socket.socket(fileno=number) as sock:
                _client(plan, sock)
            return
    for number in plan.sockets:
        os.close(number)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _client(plan: _Plan, sock: socket.socket) -> None:
    """Go through the plan, and send how long every question took."""
    with ExitStack() as stack:
        sides: dict[str, Callable[[int], _Ask]] = {SERVER: _server_side(plan, stack)}
        if plan.redis:
            sides[REDIS] = _redis_side(plan, stack)
        for side, count in plan.phases():
            ask = sides[side](count)
            ask(0)
            if not sock.recv(1):
                return
            times = _asked(ask, count, plan.seconds).tobytes()
            sock.sendall(_LENGTH.pack(len(times)) + times)


def _asked(ask: _Ask, count: int, seconds: float) -> array[float]:
    times = array("d")
    last = time.perf_counter()
    end, number = last + seconds, 0
    while last < end:
        number += STRIDE
        found = ask(number % (HELD // count))
        now = time.perf_counter()
        times.append(now - last)
        last = now
        assert found == count, f"only {found} of {count} blocks were found"
    return times


def _server_side(plan: _Plan, stack: ExitStack) -> Callable[[int], _Ask]:
    joined = _join(plan.server, plan.token)
    stack.callback(joined.close)
    keys = _keys()

    def asking(count: int) -> _Ask:
        def ask(number: int) -> int:
            packed = wire.pack_keys(keys[number * count : (number + 1) * count])
            found = _answer(joined.link, wire.Lookup(id=number + 1, keys=packed))
            return found.ready if isinstance(found, wire.Found) else 0

        return ask

    return asking


def _redis_side(plan: _Plan, stack: ExitStack) -> Callable[[int], _Ask]:
    from redis import Redis

    client = Redis.from_url(plan.redis)
    stack.callback(client.close)
    keys = _keys()

    def asking(count: int) -> _Ask:
        def ask(number: int) -> int:
            with client.pipeline(transaction=False) as pipeline:
                for key in keys[number * count : (number + 1) * count]:
                    pipeline.exists(key)
                return sum(pipeline.execute())

        return ask

    return asking


def _start_redis(server: Serving, stack: ExitStack) -> tuple[str, str]:
    """Return the URL of a private server that holds the keys; else an empty one, and why."""
    if importlib.util.find_spec("redis") is None:
        return "", "no redis-py to compare with"
    from redis import Redis

    from kvferry.connector.bench.local_redis import find_server, private_server

    program = find_server()
    if program is None:
        return "", "no valkey-server or redis-server to compare with"
    url = stack.enter_context(private_server(program, server.directory, f"{server.directory}/redis.sock"))
    with Redis.from_url(url) as client, client.pipeline(transaction=False) as pipeline:
        for key in _keys():
            pipeline.set(key, b"")
        pipeline.execute()
    return url, ""


def _fill(server: Serving) -> Joined:
    """Save all blocks, whatever is in them; return the connection that did."""
    joined, keys = _join(server.unix, server.token), _keys()
    for first in range(0, HELD, SAVED_AT_ONCE):
        packed = wire.pack_keys(keys[first : first + SAVED_AT_ONCE])
        reserved = _answer(joined.link, wire.Reserve(id=1, owner="bench", keys=packed))
        if not isinstance(reserved, wire.Reserved) or len(reserved.slots) != SAVED_AT_ONCE:
            raise BenchSkipped("the server did not let us save")
        joined.link.send(wire.Commit(reservation=reserved.reservation, keys=packed))
    return joined


def _answer(link: Link, message: wire.Request) -> wire.Reply:
    link.send(message)
    end = time.monotonic() + _WAIT_S
    while True:
        link.wait(_WAIT_S)
        for reply in link.receive():
            return reply
        if time.monotonic() > end:
            raise BenchSkipped("the server does not answer")


def _join(address: str, token: str) -> Joined:
    hello = wire.Hello(mode="map", fingerprint=FINGERPRINT, layout=LAYOUT, engine="bench")
    return join(parse_address(address, "service"), token, TlsConfig(), hello, lambda: False)


def _keys() -> list[BlockKey]:
    return [BlockKey(number.to_bytes(KEY_BYTES, "big")) for number in range(HELD)]


SERVER_LOOKUP = BenchCase(
    "server-lookup", "lookups of many engines on one cache server, against EXISTS on Redis", _measure
)
