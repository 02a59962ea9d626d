"""Clients of the soak: engines with a scheduler's and a worker's process, and streaming clients.

What a block holds is a function of its key, its tenant and its model, so that every byte that is read can be checked,
and a block of somebody else is noticed as well as a torn one. Clients are forked, are killed at any moment, and tell
what they did in a row of shared memory, which outlives them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from random import Random

import msgspec

from kvferry.connector import wire
from kvferry.connector.address import parse_address
from kvferry.connector.arena import Arena, ArenaHandle
from kvferry.connector.channel import Channel
from kvferry.connector.client import ClientService
from kvferry.connector.config import Config, TlsConfig
from kvferry.connector.dialing import dial
from kvferry.connector.errors import ArenaError, KVFerryError
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey, KeyChain, Scope, root_key
from kvferry.connector.layout import BlockLayout
from kvferry.connector.service import MissReason, Place, Reservation

__all__ = ["CHAINS", "CHAIN_BLOCKS", "COLUMNS", "MODELS", "Identity", "Rows", "run_engine", "run_stream"]

LAYOUTS = (
    BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=16, head_dim=64, itemsize=2),
    BlockLayout(num_layers=3, num_kv_heads=2, block_tokens=16, head_dim=64, itemsize=2),
)
MODELS = tuple((bytes([0x61 + number]) * 32, layout) for number, layout in enumerate(LAYOUTS))
"""Fingerprint and layout of each model."""
CHAINS = 20
CHAIN_BLOCKS = 8
NEW_CHAIN_S = 0.7
"""As often something is asked for that nobody has."""
COLUMNS = ("life", "saved", "read", "given_up", "wrong", "worker", "steps", "problems")
_COLUMN_BYTES = 8
_WAIT_S = 5.0
_PAUSE_S = 0.004
"""A step of an engine."""


class Rows:
    """Counters that all processes see: one row for each client, and one for the server's life."""

    def __init__(self, memory: memoryview) -> None:
        self._numbers = memory.cast("q")

    @staticmethod
    def bytes_for(clients: int) -> int:
        return _COLUMN_BYTES * len(COLUMNS) * (clients + 1)

    def get(self, row: int, column: str) -> int:
        return self._numbers[row * len(COLUMNS) + COLUMNS.index(column)]

    def set(self, row: int, column: str, value: int) -> None:
        self._numbers[row * len(COLUMNS) + COLUMNS.index(column)] = value

    def add(self, row: int, column: str, value: int = 1) -> None:
        self.set(row, column, self.get(row, column) + value)

    def total(self, column: str) -> int:
        return sum(self._numbers[COLUMNS.index(column) + len(COLUMNS) :: len(COLUMNS)])

    @property
    def life(self) -> int:
        """Which start of the server this is; negative when the clients are to end."""
        return self.get(0, "life")


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who a client is."""

    row: int
    seed: str
    address: str
    tenant: str
    token: str
    model: int
    log: str
    """Where what is wrong is written down."""

    @property
    def layout(self) -> BlockLayout:
        return LAYOUTS[self.model]

    def draw(self, random: Random) -> list[BlockKey]:
        """Return a prefix of what is asked for these days, the newest most of all; it is new for all tenants at the
        same time, and the same keys for all, but what lies under them differs."""
        newest = int(time.time() / NEW_CHAIN_S)
        back = min(int(random.expovariate(0.2)), CHAINS - 1)
        root = root_key(MODELS[self.model][0], Scope(cache_salt=str(newest - back)))
        return list(KeyChain(root, 1).extend(range(random.randint(1, CHAIN_BLOCKS))))

    def content(self, key: BlockKey) -> bytes:
        seed = hashlib.blake2b(key + self.tenant.encode() + bytes([self.model]), digest_size=64).digest()
        return seed * (self.layout.payload_bytes // len(seed))

    def complain(self, what: str) -> None:
        with open(self.log, "a") as log:
            log.write(f"client {self.row} ({self.tenant or 'nameless'}, model {self.model}): {what}\n")


# An engine


class Job(msgspec.Struct):
    """What a worker is to do."""

    handle: ArenaHandle
    writes: list[Place] = []
    reads: list[Place] = []
    linger_s: float = 0.0
    """Pause in the middle of each block."""


class Report(msgspec.Struct):
    """What became of it."""

    is_done: bool
    read: int = 0
    given_up: int = 0
    """Blocks whose slot changed hands while they were read."""
    wrong: int = 0


def run_engine(identity: Identity, rows: Rows) -> None:
    """An engine: this process is its scheduler's, the worker's is forked. Returns when it is told to end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker = os.fork()
    if not worker:
        ours.close()
        try:
            _work(theirs, identity, rows)
        except BaseException:  # noqa: BLE001  # boundary: the child must not go on as its parent
            rows.add(identity.row, "problems")
            identity.complain(traceback.format_exc())
        os._exit(0)
    theirs.close()
    rows.set(identity.row, "worker", worker)
    engine = _Engine(identity, rows, ours)
    try:
        while rows.life >= 0:
            engine.step()
    finally:
        engine.service.close(_WAIT_S)
        ours.close()
        os.waitpid(worker, 0)


class _Engine:
    """The scheduler's side."""

    def __init__(self, identity: Identity, rows: Rows, worker: socket.socket) -> None:
        self._identity = identity
        self._rows = rows
        self._worker = worker
        self._random = Random(identity.seed)
        self._requests = 0
        fingerprint, layout = MODELS[identity.model]
        config = Config(service=identity.address, token=identity.token)
        self.service = ClientService(config, layout, fingerprint, engine=f"engine-{identity.row}")

    def step(self) -> None:
        """One request: load what is there, compute and save the rest."""
        random, row = self._random, self._identity.row
        life = self._rows.life
        self._rows.add(row, "steps")
        time.sleep(random.uniform(0.0, 0.15))
        self._requests += 1
        owner = f"request-{self._requests}"
        keys = self._identity.draw(random)
        self.service.poll()
        loaded = self._load(owner, keys)
        saved = self._save(owner, keys) if random.random() < 0.8 else 0
        self.service.release_owner(owner)
        if random.random() < 0.002:
            self.service.clear()
        if loaded or saved:
            self._rows.set(row, "life", life)

    def _load(self, owner: str, keys: list[BlockKey]) -> int:
        ready = self._wait_for_blocks(owner, keys)
        if not ready:
            return 0
        lease = self.service.lease(owner, keys[:ready])
        handle = self.service.arena
        if not lease.places or handle is None:
            self.service.report_load_failed(keys[:ready])
            return 0
        report = self._have_done(Job(handle, reads=list(lease.places), linger_s=self._linger_s()))
        self.service.release(lease)
        if not report.is_done or report.given_up:
            self.service.report_load_failed([place.key for place in lease.places])
        return report.read

    def _wait_for_blocks(self, owner: str, keys: list[BlockKey]) -> int:
        """Return how many blocks are ready, once nothing more is on its way."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            match = self.service.lookup(keys)
            if match.missing is MissReason.TIER_DOWN:
                return 0
            if match.missing is not MissReason.NOT_ASKED:
                coming = self.service.prefetch(owner, keys[: match.reachable]) if match.reachable else None
                if coming is None or match.ready >= coming.blocks:
                    return match.ready
            time.sleep(_PAUSE_S)
            self.service.poll()
        return 0

    def _save(self, owner: str, keys: list[BlockKey]) -> int:
        reservation = None
        for _ in range(20):
            reservation = self.service.reserve(owner, keys)
            if reservation is not None:
                break
            time.sleep(_PAUSE_S)
            self.service.poll()
        handle = self.service.arena
        if reservation is None or not reservation.places or handle is None:
            if reservation is not None and reservation.places:
                self.service.abort(reservation)
            return 0
        return self._fill(reservation, handle)

    def _fill(self, reservation: Reservation, handle: ArenaHandle) -> int:
        random = self._random
        report = self._have_done(Job(handle, writes=list(reservation.places), linger_s=self._linger_s()))
        self.service.poll()
        if not report.is_done or random.random() < 0.05:
            self.service.abort(reservation)
            return 0
        kept = [place.key for place in reservation.places if random.random() < 0.95]
        self.service.commit(reservation, kept)
        self._rows.add(self._identity.row, "saved", len(kept))
        return len(kept)

    def _linger_s(self) -> float:
        return self._random.choice((0.0, 0.0, 0.0, 0.001, 0.02, 0.2))

    def _have_done(self, job: Job) -> Report:
        """Have the worker do it, while the scheduler goes on with its steps. Without a worker the engine ends."""
        self._worker.settimeout(0.05)
        try:
            self._worker.send(msgspec.msgpack.encode(job))
            while True:
                with contextlib.suppress(TimeoutError):
                    return msgspec.msgpack.decode(self._worker.recv(1 << 16), type=Report)
                self.service.poll()
        except (ConnectionError, msgspec.DecodeError) as error:
            raise EOFError("the worker has ended") from error


def _work(jobs: socket.socket, identity: Identity, rows: Rows) -> None:
    """The worker's process: copies until its scheduler is gone, and ends what it had begun even then.

    It counts what it read itself, because then nobody may be there to be told.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    handle: ArenaHandle | None = None
    arena: Arena | None = None
    while data := _next(jobs):
        job = msgspec.msgpack.decode(data, type=Job)
        report = Report(is_done=False)
        with contextlib.suppress(ArenaError):
            if job.handle != handle or arena is None:
                if arena is not None:
                    arena.close()
                arena = handle = None
                arena, handle = Arena.attach(job.handle), job.handle
            report = _copy(job, arena, identity)
            for column in ("read", "given_up", "wrong"):
                rows.add(identity.row, column, getattr(report, column))
        with contextlib.suppress(ConnectionError):  # the scheduler was killed meanwhile
            jobs.send(msgspec.msgpack.encode(report))


def _next(jobs: socket.socket) -> bytes:
    """Return the next job; nothing when the scheduler is gone, in whatever way."""
    try:
        return jobs.recv(1 << 16)
    except ConnectionError:
        return b""


def _copy(job: Job, arena: Arena, identity: Identity) -> Report:
    report = Report(is_done=True)
    size = identity.layout.payload_bytes
    half = size // 2
    for place in job.writes:
        slot, content = arena.slot(place.slot), identity.content(place.key)
        slot[:half] = content[:half]
        time.sleep(job.linger_s)
        slot[half:size] = content[half:]
    for place in job.reads:
        slot = arena.slot(place.slot)
        is_same = arena.generation(place.slot) == place.generation
        found = bytes(slot[:half])
        time.sleep(job.linger_s)
        found += bytes(slot[half:size])
        if not is_same or arena.generation(place.slot) != place.generation:
            report.given_up += 1
        elif found != identity.content(place.key):
            report.wrong += 1
            identity.complain(
                f"block {place.key.hex()[:8]} in slot {place.slot} is wrong: {found[:16].hex()}"
            )
        else:
            report.read += 1
    return report


# A streaming client


def run_stream(identity: Identity, rows: Rows) -> None:
    """A client elsewhere. Returns when it is told to end."""
    random = Random(identity.seed)
    while rows.life >= 0:
        try:
            client = _Stream(identity)
        except (OSError, KVFerryError):
            time.sleep(random.uniform(0.05, 0.3))
            continue
        with contextlib.closing(client.channel), contextlib.suppress(OSError):
            while (life := rows.life) >= 0:
                rows.add(identity.row, "steps")
                time.sleep(random.uniform(0.0, 0.2))
                keys = identity.draw(random)
                read, wrong = client.load(keys)
                saved = client.store([key for key in keys if key not in read])
                rows.add(identity.row, "read", len(read))
                rows.add(identity.row, "wrong", wrong)
                rows.add(identity.row, "saved", saved)
                if read or saved:
                    rows.set(identity.row, "life", life)


class _Stream:
    """A connection. Everything may raise ``OSError``: then it is of no more use."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        fingerprint, layout = MODELS[identity.model]
        self._seal = FrameSeal(fingerprint, layout.payload_bytes)
        address = parse_address(identity.address, "")
        self.channel: Channel = dial(address, identity.token, TlsConfig(), _soon())
        try:
            hello = wire.Hello(
                mode="stream", fingerprint=fingerprint, layout=layout, engine=f"stream-{identity.row}"
            )
            self.channel.send(hello, _soon())
            self._expect(wire.Welcome)
        except BaseException:
            self.channel.close()
            raise

    def load(self, keys: Sequence[BlockKey]) -> tuple[list[BlockKey], int]:
        """Return the blocks that were there, and how many were wrong."""
        self.channel.send(wire.Load(id=1, keys=wire.pack_keys(keys), wait_s=1.0), _soon())
        read, wrong = [], 0
        for _ in keys:
            block = self._expect(wire.Block)
            if not block.length:
                continue
            key = keys[block.index]
            header, body = bytearray(HEADER_BYTES), bytearray(block.length)
            self.channel.receive_into(header, _soon())
            self.channel.receive_into(body, _soon())
            self._seal.verify(key, memoryview(header), memoryview(body))
            if body == self._identity.content(key):
                read.append(key)
            else:
                wrong += 1
                self._identity.complain(f"block {key.hex()[:8]} came wrong: {bytes(body[:16]).hex()}")
        return read, wrong

    def store(self, keys: Sequence[BlockKey]) -> int:
        """Return how many blocks were taken."""
        self.channel.send(wire.Store(id=2, keys=wire.pack_keys(keys)), _soon())
        indices = self._expect(wire.Wanted).indices
        for index in indices:
            header, payload = bytearray(HEADER_BYTES), bytearray(self._identity.content(keys[index]))
            self._seal.seal(keys[index], memoryview(header), memoryview(payload))
            self.channel.send_bytes([header, payload], _soon())
        outcomes = self._expect(wire.Stored).outcomes
        return sum(outcomes[index] == "ok" for index in indices)

    def _expect(self, kind: type[wire.Reply]) -> wire.Reply:
        reply = self.channel.receive_reply(_soon())
        if not isinstance(reply, kind):
            raise ConnectionError(f"{reply} instead of {kind.__name__}")
        return reply


def _soon() -> float:
    return time.monotonic() + 20.0
