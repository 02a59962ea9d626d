"""The inside of a cache server without its listeners: pools, the index thread, and engines over socket pairs."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from kvferry.connector import wire
from kvferry.connector.arena import Arena
from kvferry.connector.channel import Channel
from kvferry.connector.config import Config, HostConfig
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey, KeyChain, Scope, root_key
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.server.config import ServerConfig, ServerSettings, TenantConfig
from kvferry.connector.server.index import EngineConnection, Index
from kvferry.connector.server.mapping import EngineLedger
from kvferry.connector.server.pools import Pool, Pools
from kvferry.connector.server.status import ConnectionStatus
from kvferry.connector.server.stream import Stream
from kvferry.connector.server.tracing import OFF, Tracer
from kvferry.connector.service import ServiceEvent

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=16, head_dim=32, itemsize=2)
FINGERPRINT = b"f" * 32
DEADLINE_S = 20.0
"""How long a test waits for what must happen; far more than it takes."""

R = TypeVar("R", bound=wire.Reply)


def prefix(length: int, salt: str = "") -> list[BlockKey]:
    chain = KeyChain(root_key(FINGERPRINT, Scope(cache_salt=salt)), 1)
    return list(chain.extend(range(length)))


def content(key: BlockKey) -> bytes:
    return (key * (LAYOUT.payload_bytes // len(key) + 1))[: LAYOUT.payload_bytes]


def soon() -> float:
    return time.monotonic() + DEADLINE_S


def wait_until(what: str, holds: Callable[[], bool]) -> None:
    deadline = soon()
    while not holds():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.002)


class Engine:
    """A local engine: speaks the map mode over its end of a socket pair, and copies through the arena."""

    def __init__(self, sock: socket.socket, arena: Arena, lifeline: int) -> None:
        self.channel = Channel(sock)
        self.arena = arena
        self._lifeline: int | None = lifeline
        self._last_id = 0

    def ask(self, kind: type[R], message: Callable[[int], wire.Request]) -> R:
        self._last_id += 1
        self.channel.send(message(self._last_id), soon())
        reply = self.channel.receive_reply(soon())
        assert isinstance(reply, kind), reply
        return reply

    def tell(self, message: wire.Request) -> None:
        self.channel.send(message, soon())

    def lookup(self, keys: Sequence[BlockKey]) -> wire.Found:
        return self.ask(wire.Found, lambda id_: wire.Lookup(id=id_, keys=wire.pack_keys(keys)))

    def lease(self, keys: Sequence[BlockKey], owner: str = "reader") -> wire.Leased:
        return self.ask(wire.Leased, lambda id_: wire.Lease(id=id_, owner=owner, keys=wire.pack_keys(keys)))

    def reserve(self, keys: Sequence[BlockKey], owner: str = "writer") -> wire.Reserved:
        return self.ask(
            wire.Reserved, lambda id_: wire.Reserve(id=id_, owner=owner, keys=wire.pack_keys(keys))
        )

    def save(self, keys: Sequence[BlockKey]) -> wire.Reserved:
        granted = self.reserve(keys)
        filled = [keys[index] for index in granted.indices]
        for key, slot in zip(filled, granted.slots, strict=True):
            self.arena.slot(slot)[: LAYOUT.payload_bytes] = content(key)
        self.tell(wire.Commit(reservation=granted.reservation, keys=wire.pack_keys(filled)))
        self.ask(wire.Pong, lambda id_: wire.Ping(id=id_))  # others are answered after the commit
        return granted

    def read(self, keys: Sequence[BlockKey]) -> int:
        """Lease, compare every byte, release; return how many blocks were there."""
        lease = self.lease(keys)
        for key, slot, generation in zip(keys, lease.slots, lease.generations, strict=False):
            assert self.arena.generation(slot) == generation
            assert bytes(self.arena.slot(slot)[: LAYOUT.payload_bytes]) == content(key)
        self.tell(wire.Release(lease=lease.lease))
        return len(lease.slots)

    def disconnect(self) -> None:
        """The scheduler process is gone; workers may still write."""
        self.channel.close()

    def die(self) -> None:
        """Every process is gone."""
        self.disconnect()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


class Client:
    """A streaming client over its end of a socket pair."""

    def __init__(self, sock: socket.socket, stream: Stream, thread: threading.Thread) -> None:
        self.channel = Channel(sock)
        self.stream = stream
        self.thread = thread
        self.seal = FrameSeal(FINGERPRINT, LAYOUT.payload_bytes)

    def ask(self, message: wire.Request) -> wire.Reply:
        self.channel.send(message, soon())
        return self.channel.receive_reply(soon())

    def frame(self, key: BlockKey) -> list[bytes]:
        header = bytearray(HEADER_BYTES)
        payload = content(key)
        self.seal.seal(key, memoryview(header), memoryview(payload))
        return [bytes(header), payload]

    def store(
        self, keys: Sequence[BlockKey], frame: Callable[[BlockKey], list[bytes]] | None = None
    ) -> list[str]:
        wanted = self.ask(wire.Store(id=1, keys=wire.pack_keys(keys)))
        assert isinstance(wanted, wire.Wanted)
        for index in wanted.indices:
            self.channel.send_bytes((frame or self.frame)(keys[index]), soon())
        stored = self.channel.receive_reply(soon())
        assert isinstance(stored, wire.Stored)
        return list(stored.outcomes)

    def load(self, keys: Sequence[BlockKey], wait_s: float = DEADLINE_S) -> list[bool]:
        """Load, verify and compare; return which blocks were there."""
        self.channel.send(wire.Load(id=2, keys=wire.pack_keys(keys), wait_s=wait_s), soon())
        found = [False] * len(keys)
        for _ in keys:
            block = self.channel.receive_reply(soon())
            assert isinstance(block, wire.Block)
            if block.length:
                header, body = bytearray(HEADER_BYTES), bytearray(block.length)
                self.channel.receive_into(header, soon())
                self.channel.receive_into(body, soon())
                self.seal.verify(keys[block.index], memoryview(header), memoryview(body))
                assert body == content(keys[block.index])
                found[block.index] = True
        return found

    def contains(self, keys: Sequence[BlockKey], wait_s: float = DEADLINE_S) -> list[bool]:
        held = self.ask(wire.Contains(id=3, keys=wire.pack_keys(keys), wait_s=wait_s))
        assert isinstance(held, wire.Held)
        return [bool(one) for one in held.held]


class ServerInside:
    """Pools and an index thread, as ``running`` puts them together."""

    def __init__(
        self,
        slots: int = 16,
        tiers: Sequence[dict[str, Any]] = (),
        tenants: Sequence[TenantConfig] = (),
        tracer: Tracer = OFF,
        **server: Any,
    ) -> None:
        self.events: list[ServiceEvent] = []
        self.logger = logging.getLogger("kvferry.server")
        self.index = Index(lambda pool, events: self.events.extend(events), self.logger, tracer)
        self._tracer = tracer
        host = HostConfig(capacity=(slots + 1) * LAYOUT.slot_bytes, eviction="lru")
        cache = Config(
            host=host, tiers=tuple(tiers), plugins=("common",), lease_s=server.pop("lease_s", 60.0)
        )
        self.settings = ServerSettings(server=ServerConfig(**server), tenants=tuple(tenants), cache=cache)
        self.pools = Pools(
            self.settings,
            PluginRegistry(cache.plugins),
            on_opened=lambda pool: self.index.post(lambda: self.index.add_pool(pool)),
            withdraw=lambda pool: self.index.call(lambda: self.index.remove_pool(pool), soon()),
            on_report=self.index.wake,
            logger=self.logger,
        )
        self._engines: list[Engine] = []
        self._clients: list[Client] = []
        self._names = iter(range(1 << 20))
        self.ended: list[str] = []

    def __enter__(self) -> Self:
        self.index.start()
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines:
            engine.arena.close()
            engine.die()
        for client in self._clients:
            client.channel.close()
            client.thread.join(DEADLINE_S)
            assert not client.thread.is_alive()
        pools = self.pools.drain()
        assert self.index.stop(soon())
        for pool in pools:
            pool.service.close(DEADLINE_S)

    def pool(self, tenant: str = "", fingerprint: bytes = FINGERPRINT, layout: BlockLayout = LAYOUT) -> Pool:
        return self.pools.acquire(tenant, fingerprint, layout, soon())

    def engine(self, pool: Pool | None = None, wants_events: bool = False) -> Engine:
        pool = pool or self.pool()
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        name = f"engine-{next(self._names)}"
        connection = EngineConnection(
            ours,
            read_end,
            EngineLedger(pool, name),
            pool,
            _status(name, "map"),
            wants_events,
            on_end=lambda: self._gone(pool, name),
        )
        self.index.call(lambda: self.index.connect(connection), soon())
        engine = Engine(theirs, Arena.attach(pool.service.arena), write_end)
        self._engines.append(engine)
        return engine

    def client(self, pool: Pool | None = None) -> Client:
        pool = pool or self.pool()
        ours, theirs = socket.socketpair()
        name = f"stream-{next(self._names)}"
        seal = FrameSeal(pool.fingerprint, LAYOUT.payload_bytes)
        stream = Stream(Channel(ours), pool, self.index, name, seal, self.logger, self._tracer)

        def run() -> None:
            stream.run()
            self._gone(pool, name)

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        client = Client(theirs, stream, thread)
        self._clients.append(client)
        return client

    def used_slots(self, pool: Pool) -> int:
        return self.index.call(lambda: pool.service.counters().used_slots, soon())

    def _gone(self, pool: Pool, name: str) -> None:
        self.pools.release(pool)
        self.ended.append(name)


def _status(name: str, mode: str) -> ConnectionStatus:
    return ConnectionStatus(
        engine=name, tenant="", fingerprint="66666666", mode=mode, connected_s=0.0, requests=0
    )


def disk(path: Path, **options: Any) -> dict[str, Any]:
    return {"type": "disk", "path": str(path), "capacity": "16MiB", "admission": "always", **options}
