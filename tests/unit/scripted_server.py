"""A cache server as a client sees it, played: late, silent, dead, back with another arena, or lying, as a test says.

Time is the test's: waiting for an answer moves the clock to where the answer is, or by as long as is waited. What the
server is told is held against what it granted, so that a grant that gets lost, or crosses connections, is found.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable

from blake3 import blake3

from kvferry.connector import wire
from kvferry.connector.arena import ArenaHandle
from kvferry.connector.channel import Disconnected
from kvferry.connector.client import ClientService
from kvferry.connector.config import Config
from kvferry.connector.joining import Joined, JoinRefused
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.reconnecting import Reconnector
from kvferry.connector.service import MissReason

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=8, head_dim=16, itemsize=2)
BUDGET_S = 0.002
SLOTS = 64
FIRST_GRANT = 7


def chain(seed: int, length: int) -> list[BlockKey]:
    """Return keys as of a prompt: each stands for all before it."""
    return [BlockKey(blake3(f"{seed}/{index}".encode()).digest()) for index in range(length)]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ScriptedServer:
    """The server's whole life; ``links`` are the connections it has had."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.is_there = True
        self.refusal: wire.Refused | None = None
        self.delay_s: float | None = 0.0
        """From a request to its answer; None for never."""
        self.distort: Callable[[wire.Reply], wire.Reply] | None = None
        """Changes the next answer."""
        self.held: set[BlockKey] = set()
        self.links: list[ScriptedLink] = []
        self.waited_s = 0.0
        self.arenas = 0

    @property
    def link(self) -> ScriptedLink:
        return self.links[-1]

    def join(self) -> Joined:
        if not self.is_there:
            raise ConnectionRefusedError("nobody there")
        if self.refusal is not None:
            raise JoinRefused(self.refusal)
        self.links.append(ScriptedLink(self))
        self.arenas += 1
        handle = ArenaHandle(
            pid=os.getpid(),
            fd=os.open(os.devnull, os.O_RDONLY),
            lifeline_fd=os.open(os.devnull, os.O_RDONLY),
            arena_id=self.arenas.to_bytes(16, "little"),
            slot_bytes=LAYOUT.slot_bytes,
            num_slots=SLOTS,
            header_bytes=4096,
            total_bytes=4096 + SLOTS * LAYOUT.slot_bytes,
        )
        return Joined(self.link, handle, "0", ["disk"])

    def die(self) -> None:
        self.is_there = False
        if self.links:
            self.link.is_dead = True


class ScriptedLink:
    """One connection: what came, what was granted and is held."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self.is_dead = False
        self.is_closed = False
        self.requests: list[wire.Request] = []
        self.leases: dict[int, str] = {}
        self.reservations: set[int] = set()
        self.granted: set[int] = set()
        self._next_grant = FIRST_GRANT
        self._next_slot = 0
        self._replies: deque[tuple[float, wire.Reply]] = deque()

    def send(self, message: wire.Request) -> None:
        assert not self.is_closed
        assert not isinstance(wire.decode_request(wire.encode(message)[wire.LENGTH.size :]), wire.Hello)
        if self.is_dead:
            raise BrokenPipeError("gone")
        self.requests.append(message)
        reply = self._handle(message)
        if reply is not None:
            server = self._server
            if server.distort is not None:
                reply, server.distort = server.distort(reply), None
            self.say(reply)

    def say(self, reply: wire.Reply, delay_s: float | None = None) -> None:
        delay = self._server.delay_s if delay_s is None else delay_s
        due = float("inf") if delay is None else self._server.clock.now + delay
        self._replies.append((max(due, self._replies[-1][0] if self._replies else 0.0), reply))

    def catch_up(self) -> None:
        """Send at once what was held back."""
        self._replies = deque((self._server.clock.now, reply) for _, reply in self._replies)

    def receive(self) -> list[wire.Reply]:
        assert not self.is_closed
        if self.is_dead:
            raise Disconnected("gone")
        due = []
        while self._replies and self._replies[0][0] <= self._server.clock.now:
            due.append(self._replies.popleft()[1])
        return due

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        clock = self._server.clock
        until = min(clock.now + max(seconds, 1e-6), self._replies[0][0] if self._replies else float("inf"))
        if not self.is_dead:
            self._server.waited_s += until - clock.now
            clock.now = max(clock.now, until)

    def close(self) -> None:
        self.is_closed = True

    def count(self, kind: type) -> int:
        return sum(isinstance(request, kind) for request in self.requests)

    def _handle(self, message: wire.Request) -> wire.Reply | None:
        match message:
            case wire.Lookup(id=number, keys=packed):
                ready = self._ready(packed)
                is_whole = ready * len(BlockKey(bytes(32))) == len(packed)
                missing = MissReason.NONE if is_whole else MissReason.NEVER_STORED
                runs = [("host", ready)] if ready else []
                return wire.Found(id=number, ready=ready, reachable=ready, runs=runs, missing=missing)
            case wire.Prefetch(id=number, keys=packed):
                return wire.Coming(id=number, blocks=self._ready(packed), cut=MissReason.NO_ROOM)
            case wire.Lease(id=number, owner=owner, keys=packed):
                slots = self._slots(self._ready(packed))
                lease = self._grant() if slots else 0
                if lease:
                    self.leases[lease] = owner
                return wire.Leased(id=number, lease=lease, slots=slots, generations=[lease for _ in slots])
            case wire.Reserve(id=number, keys=packed):
                keys = wire.unpack_keys(packed)
                indices = [index for index, key in enumerate(keys) if key not in self._server.held]
                reservation = self._grant() if indices else 0
                if reservation:
                    self.reservations.add(reservation)
                return wire.Reserved(
                    id=number,
                    reservation=reservation,
                    indices=indices,
                    slots=self._slots(len(indices)),
                    generations=[reservation for _ in indices],
                )
            case wire.Commit(reservation=reservation, keys=packed):
                self.reservations.remove(reservation)
                self._server.held.update(wire.unpack_keys(packed))
            case wire.Abort(reservation=reservation):
                self.reservations.remove(reservation)
            case wire.Release(lease=lease):
                assert lease in self.granted
                self.leases.pop(lease, None)
            case wire.ReleaseOwner(owner=owner):
                self.leases = {lease: other for lease, other in self.leases.items() if other != owner}
            case wire.Clear():
                self.leases.clear()
            case wire.Ping(id=number):
                return wire.Pong(id=number)
        return None

    def _ready(self, packed: bytes) -> int:
        keys = wire.unpack_keys(packed)
        return next((index for index, key in enumerate(keys) if key not in self._server.held), len(keys))

    def _grant(self) -> int:
        self._next_grant += 1
        self.granted.add(self._next_grant)
        return self._next_grant

    def _slots(self, count: int) -> list[int]:
        first, self._next_slot = self._next_slot, (self._next_slot + count) % SLOTS
        return [(first + index) % SLOTS for index in range(count)]


class Finder(Reconnector):
    """Looks for the scripted server whenever it is asked whether it has found it."""

    def __init__(self, server: ScriptedServer) -> None:
        super().__init__(lambda is_given_up: server.join(), logging.getLogger("kvferry.test"))
        self._server = server
        self._is_looking = False

    def begin(self) -> None:
        assert not self._is_looking
        self._is_looking = True

    def wait_for_first(self, seconds: float) -> Exception | None:
        try:
            self._found = self._server.join()
        except (OSError, JoinRefused) as error:
            return error
        return None

    def take(self) -> Joined | None:
        if not self._is_looking:
            return None
        found, self._found = self._found, None
        if found is None:
            try:
                found = self._server.join()
            except (OSError, JoinRefused):
                return None
        self._is_looking = False
        return found

    def close(self) -> None:
        self._is_looking = False


def connect(server: ScriptedServer, **config: object) -> ClientService:
    """Return a client of a scripted server."""
    return ClientService(
        Config(service="unix:///scripted", answer_budget_s=BUDGET_S, **config),
        LAYOUT,
        bytes(32),
        clock=server.clock,
        reconnector=Finder(server),
    )
