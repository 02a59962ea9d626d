"""What is fuzzed: the inside of a server in this process, or a real one in a process of its own.

Each has two caches: one that good and hostile clients share, and one of a good engine alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol, Self

from cache_server import CacheServer
from hostile import Forge
from server_kit import DEADLINE_S, FINGERPRINT, LAYOUT, Engine, ServerInside, soon, wait_until

from kvferry.connector import wire
from kvferry.connector.address import Address, parse_address
from kvferry.connector.arena import Arena, ArenaHandle
from kvferry.connector.channel import Channel
from kvferry.connector.config import TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.handshake import ANSWER_BYTES, GREETING_BYTES, VERDICT_BYTES, client_answer
from kvferry.connector.layout import BlockLayout

__all__ = ["DEADLINE_S", "Inside", "Line", "Served", "Target", "footprint"]

SLOTS = 24
TOKEN = "a token of the good engine"
OTHER_TOKEN = "a token of somebody else"
MOST_MODELS = 3
STRANGERS = 8
"""Connections that were opened and say nothing, at the same time."""


_LEFT_OUT = "is left out, it cannot be opened"


class Line:
    """A hostile client's connection, and the memory that came with it, if any."""

    def __init__(self, channel: Channel, arena: Arena | None, is_reliable: bool) -> None:
        self.channel = channel
        self.is_reliable = is_reliable
        """What the server says last arrives; over TCP it may not."""
        self._arena = arena

    def spoil(self, slots: Sequence[int]) -> None:
        """Write into what was reserved, as it may."""
        if self._arena is not None:
            for slot in slots:
                self._arena.slot(slot)[:64] = b"\xee" * 64


class Target(Protocol):
    """A server with two caches."""

    stranger_share: float
    """How many of the connections are of somebody who gets no further than the handshake."""

    def hostile_line(self, does_map: bool, random: Random) -> contextlib.AbstractContextManager[Line]:
        """Connect to the cache that is shared; at the end every process of the client is gone."""

    def stranger(self, random: Random, count: Callable[[str], None]) -> None:
        """Connect and misbehave before anything was agreed upon."""

    def good_line(self) -> Engine:
        """Connect an engine to a cache of its own. Called once."""

    def neighbour_line(self) -> Engine:
        """Connect an engine to the cache that is shared. Called once."""

    def wait_until_clean(self) -> None:
        """End the good ones, and wait until the server holds nothing for anybody."""

    def footprint(self) -> tuple[int, int, int]:
        """Return resident bytes, open descriptors and threads of the server's process."""

    def errors(self) -> list[str]:
        """Return what the server reported as its own mistakes."""


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class Inside:
    """Pools, the index thread and streams, in this process."""

    stranger_share = 0.0

    def __init__(self) -> None:
        self._errors = _Errors()
        self._inside = ServerInside(slots=SLOTS)
        self._inside.events = self._inside.ended = deque(maxlen=0)  # nobody looks at them
        self._engines: list[Engine] = []

    def __enter__(self) -> Self:
        logging.getLogger("kvferry").addHandler(self._errors)
        self._inside.__enter__()
        self._shared = self._inside.pool()
        self._apart = self._inside.pool("good")
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.__exit__()
        logging.getLogger("kvferry").removeHandler(self._errors)

    @contextlib.contextmanager
    def hostile_line(self, does_map: bool, random: Random) -> Iterator[Line]:
        if does_map:
            engine = self._inside.engine(self._acquired(), wants_events=random.random() < 0.2)
            try:
                yield Line(engine.channel, engine.arena, is_reliable=True)
            finally:
                self._end(engine)
            return
        client = self._inside.client(self._acquired())
        try:
            yield Line(client.channel, None, is_reliable=True)
        finally:
            client.channel.close()
            client.thread.join(DEADLINE_S)
            assert not client.thread.is_alive(), "a stream goes on after its client has gone"
            self._inside._clients.remove(client)

    def _acquired(self) -> Any:
        """A pool, with its users counted: whoever ends releases it."""
        return self._inside.pool()

    def stranger(self, random: Random, count: Callable[[str], None]) -> None:
        raise AssertionError("nobody is a stranger here")

    def good_line(self) -> Engine:
        self._engines.append(self._inside.engine(self._inside.pool("good")))
        return self._engines[-1]

    def neighbour_line(self) -> Engine:
        self._engines.append(self._inside.engine(self._acquired()))
        return self._engines[-1]

    def wait_until_clean(self) -> None:
        while self._engines:
            self._end(self._engines.pop())
        index = self._inside.index
        for pool in (self._shared, self._apart):
            wait_until("everybody has gone", lambda pool=pool: self._inside.pools.users(pool) == 1)
            counters = index.call(pool.service.counters, soon())
            assert counters.used_slots == counters.host_blocks, counters
            assert counters.leases == counters.reservations == 0, counters
            assert index.call(lambda pool=pool: pool.dead_writers, soon()) == 0
        assert not index.call(index.connections, soon())

    def footprint(self) -> tuple[int, int, int]:
        return footprint(os.getpid())

    def errors(self) -> list[str]:
        return self._errors.lines

    def _end(self, engine: Engine) -> None:
        engine.arena.close()
        engine.die()
        self._inside._engines.remove(engine)


class Served:
    """A real server, with a disk below its arenas."""

    stranger_share = 0.3

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kvf-"))
        disk = {
            "type": "disk", "path": str(self._directory / "disk"), "capacity": "16MiB", "admission": "always",
        }  # fmt: skip
        self._server = CacheServer(
            self._directory,
            {
                "server": {"token": OTHER_TOKEN, "max_models": MOST_MODELS},
                "tenants": [{"name": "good", "token": TOKEN}],
                "host": {"capacity": (SLOTS + 1) * LAYOUT.slot_bytes},
                "tiers": [disk],
            },
        )
        self._unix = parse_address(self._server.unix, "")
        self._tcp = parse_address(self._server.tcp, "")
        self._engines: list[Engine] = []
        self._silent: list[socket.socket] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._hold = [self._engine(token) for token in ("", TOKEN)]
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._hold:
            _bury(engine)
        self._server.kill()
        shutil.rmtree(self._directory)

    @contextlib.contextmanager
    def hostile_line(self, does_map: bool, random: Random) -> Iterator[Line]:
        if does_map:
            engine = self._engine("", wants_events=random.random() < 0.2)
            try:
                yield Line(engine.channel, engine.arena, is_reliable=True)
            finally:
                _bury(engine)
            return
        address, token = random.choice(((self._unix, ""), (self._tcp, OTHER_TOKEN)))
        channel = dial(address, token, TlsConfig(), soon())
        try:
            channel.send(wire.Hello(mode="stream", fingerprint=FINGERPRINT, layout=LAYOUT), soon())
            assert isinstance(channel.receive_reply(soon()), wire.Welcome)
            yield Line(channel, None, is_reliable=address is self._unix)
        finally:
            channel.close()

    def stranger(self, random: Random, count: Callable[[str], None]) -> None:
        """Whatever comes: within the deadline the server has closed the connection, or welcomed us."""
        address = random.choice((self._unix, self._tcp))
        kind = random.choice(
            ("silent", "garbage", "spoilt answer", "wrong token", "spoilt hello", "odd hello")
        )
        count(f"handshake, {kind}")
        if kind == "silent":
            self._stay_silent(address)
            return
        with contextlib.closing(_connected(address)) as sock, contextlib.suppress(BrokenPipeError):
            channel = Channel(sock)
            token = "" if address is self._unix else OTHER_TOKEN
            if kind == "garbage":
                channel.send_bytes([random.randbytes(random.choice((1, 7, ANSWER_BYTES, 4096)))], soon())
            else:
                self._introduce(channel, kind, token, random)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while sock.recv(1 << 16):
                    pass

    def _introduce(self, channel: Channel, kind: str, token: str, random: Random) -> None:
        greeting = channel.receive(GREETING_BYTES, soon())
        token = random.choice((TOKEN[:-1], "x" * 32)) if kind == "wrong token" else token
        answer = bytearray(client_answer(greeting, token, random.randbytes(32)))
        if kind == "spoilt answer":
            answer[random.randrange(len(answer))] ^= 1 << random.randrange(8)
            channel.send_bytes(
                [answer[: random.choice((len(answer), random.randrange(len(answer))))]], soon()
            )
            return
        channel.send_bytes([answer], soon())
        if kind == "wrong token":
            assert channel.receive(VERDICT_BYTES, soon())[0] != 0, "let in with a wrong token"
            return
        channel.receive(VERDICT_BYTES, soon())
        forge = Forge(random)
        if kind == "spoilt hello":
            hello = wire.Hello(mode="stream", fingerprint=FINGERPRINT, layout=LAYOUT)
            channel.send_bytes([forge.spoilt(random.choice((hello, forge.map_request())))], soon())
        else:
            channel.send(_odd_hello(random), soon())

    def _stay_silent(self, address: Address) -> None:
        with self._lock:
            self._silent.append(_connected(address))
            if len(self._silent) > STRANGERS:
                self._silent.pop(0).close()

    def good_line(self) -> Engine:
        self._engines.append(self._engine(TOKEN))
        return self._engines[-1]

    def neighbour_line(self) -> Engine:
        self._engines.append(self._engine(""))
        return self._engines[-1]

    def wait_until_clean(self) -> None:
        for sock in self._silent:
            sock.close()
        self._silent.clear()
        while self._engines:
            _bury(self._engines.pop())
        wait_until("everybody has gone", self._is_clean)
        for number in range(1, MOST_MODELS):  # the same caches each time, in place of those of strange models
            _bury(self._engine("", fingerprint=bytes([number]) * 32))
        wait_until("everybody has gone again", self._is_clean)

    def _is_clean(self) -> bool:
        """Nobody but those who keep the caches open is there, and no slot is anybody's but a block's."""
        status = self._server.status()
        pools = [pool for pool in status["pools"] if pool["connections"]]
        return len(status["connections"]) == len(self._hold) == len(pools) and all(
            pool["counters"]["used_slots"] == pool["counters"]["host_blocks"]
            and pool["counters"]["leases"] == pool["counters"]["reservations"] == pool["dead_writers"] == 0
            for pool in pools
        )

    def footprint(self) -> tuple[int, int, int]:
        """The files of the disk, whose capacity bounds their number, do not count."""
        return footprint(self._server.pid, f"{self._directory}/disk/")

    def errors(self) -> list[str]:
        """A strange model whose directory is another's has to do without a disk: that is no mistake of the server."""
        lines = self._server.log.splitlines()
        return [
            line for line in lines if "Traceback" in line or (" ERROR " in line and _LEFT_OUT not in line)
        ]

    def _engine(self, token: str, wants_events: bool = False, fingerprint: bytes = FINGERPRINT) -> Engine:
        channel = dial(self._unix, token, TlsConfig(), soon())
        channel.send(
            wire.Hello(mode="map", fingerprint=fingerprint, layout=LAYOUT, wants_events=wants_events), soon()
        )
        channel.socket.settimeout(DEADLINE_S)
        start, fds, _, _ = socket.recv_fds(channel.socket, wire.LENGTH.size, 2)
        welcome = wire.decode_reply(channel.receive(wire.message_length(start), soon()))
        assert isinstance(welcome, wire.Welcome), welcome
        assert welcome.arena is not None
        fd, lifeline = fds
        shape = {name: getattr(welcome.arena, name) for name in wire.ArenaShape.__struct_fields__}
        arena = Arena.attach(ArenaHandle(pid=os.getpid(), fd=fd, **shape))
        os.close(fd)
        return Engine(channel.socket, arena, lifeline)


def _odd_hello(random: Random) -> wire.Hello:
    layout = random.choice(
        (
            LAYOUT,
            BlockLayout(num_layers=0, num_kv_heads=1, block_tokens=1, head_dim=1, itemsize=1),
            BlockLayout(num_layers=-1, num_kv_heads=-1, block_tokens=16, head_dim=8, itemsize=2),
            BlockLayout(num_layers=1 << 20, num_kv_heads=1 << 20, block_tokens=1, head_dim=1, itemsize=1),
            BlockLayout(num_layers=1 << 62, num_kv_heads=1, block_tokens=1, head_dim=1, itemsize=1),
            BlockLayout(
                num_layers=1, num_kv_heads=1, block_tokens=1, head_dim=1, itemsize=1, dtype="x" * 999
            ),
        )
    )
    strange = random.randbytes(32) if random.random() < 0.02 else FINGERPRINT
    return wire.Hello(
        mode=random.choice(("map", "stream")),
        fingerprint=strange,
        layout=layout,
        engine=random.choice(("", "x" * 256, "</script>\0\x1b[31m")),
        wants_events=random.random() < 0.5,
    )


def _connected(address: Address) -> socket.socket:
    is_unix = address.scheme == "unix"
    sock = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(DEADLINE_S)
    sock.connect(address.path if is_unix else (address.host, address.port))
    return sock


def _bury(engine: Engine) -> None:
    engine.arena.close()
    engine.die()


def footprint(pid: int, apart_from: str = "/nowhere/") -> tuple[int, int, int]:
    """Return resident bytes, open descriptors (of files below ``apart_from`` none) and threads of a process."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            files.append(os.readlink(fd))
    own = [file for file in files if not file.startswith(apart_from)]
    return resident, len(own), len(os.listdir(f"/proc/{pid}/task"))
