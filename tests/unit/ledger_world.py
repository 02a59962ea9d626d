"""Engines of one pool against a model: what its tests drive.

The engines are real ones of ``server_kit``: sockets, the index thread, lifelines, a mapped arena. Writers spoil their
slots from the grant to the commit, and go on doing so after their death was noticed, for as long as one of their
processes lives. So whatever a reader sees that was not committed is seen to be wrong.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

import msgspec
from server_kit import LAYOUT, Engine, ServerInside, content, prefix, soon, wait_until

from kvferry.connector import wire
from kvferry.connector.counters import ServiceCounters
from kvferry.connector.keys import BlockKey

SLOTS = 6
LEASE_S = 60.0
PREFIXES = [prefix(5, salt)[:length] for salt in ("", "other") for length in range(1, 6)]
OWNERS = ("request-1", "request-2")
MOST_ENGINES = 4
SPOILT = b"\xee" * LAYOUT.payload_bytes

T = TypeVar("T")


class Peer(msgspec.Struct, eq=False):
    """An engine as the model knows it."""

    engine: Engine
    is_connected: bool = True


class Writing(msgspec.Struct, eq=False):
    """A reservation that was not settled: ``peer`` may write into its slots."""

    peer: Peer
    id: int
    slots: dict[BlockKey, int]
    is_void: bool = False


class Reading(msgspec.Struct, eq=False):
    """A lease, remembered for ever: the generation has to tell when it is of no use any more."""

    peer: Peer
    owner: str
    id: int
    places: list[tuple[BlockKey, int, int]]
    is_valid: bool = True


class LedgerWorld:
    """What engines do, and what must hold whatever they do."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        """How often something happened that the model has to be right about."""
        self.inside = ServerInside(slots=SLOTS, lease_s=LEASE_S)
        self.inside.__enter__()
        self.pool = self.inside.pool()
        self.later_s = 0.0
        self.pool.service._clock = lambda: time.monotonic() + self.later_s
        self.watcher = self.inside.engine(self.pool)
        self.peers = [Peer(self.inside.engine(self.pool))]
        self.writings: list[Writing] = []
        self.readings: list[Reading] = []
        self.holds: dict[tuple[int, str], set[BlockKey]] = {}
        self.committed: set[BlockKey] = set()
        self.generations = [0] * SLOTS

    def connected(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.is_connected]

    def dying(self) -> list[Peer]:
        return [peer for peer in self.peers if not peer.is_connected]

    # What engines do; numbers pick one of them, or one of what they have

    def connects(self) -> None:
        if len(self.peers) < MOST_ENGINES:
            self.peers.append(Peer(self.inside.engine(self.pool)))

    def looks_up(self, pick: int, keys: list[BlockKey]) -> None:
        for peer in one(self.connected(), pick):
            found = peer.engine.lookup(keys)
            assert found.ready == found.reachable
            assert self.committed.issuperset(keys[: found.ready]), "what was not committed is not there"

    def prefetches(self, pick: int, owner: str, keys: list[BlockKey]) -> None:
        for peer in one(self.connected(), pick):
            coming = peer.engine.ask(
                wire.Coming, lambda id_: wire.Prefetch(id=id_, owner=owner, keys=wire.pack_keys(keys))
            )
            self.holds.setdefault((id(peer), owner), set()).update(keys[: coming.blocks])

    def leases(self, pick: int, owner: str, keys: list[BlockKey]) -> None:
        for peer in one(self.connected(), pick):
            lease = peer.engine.lease(keys, owner)
            places = list(zip(keys, lease.slots, lease.generations, strict=False))
            assert self.committed.issuperset(key for key, *_ in places)
            if places:
                self.seen["leases"] += 1
                self.readings.append(Reading(peer, owner, lease.lease, places))

    def releases(self, pick: int, thief: int) -> None:
        """Whoever it is that asks for it: only one's own leases end."""
        for reading in one(self.readings, pick):
            for peer in one(self.connected(), thief):
                tell(peer, wire.Release(lease=reading.id))
                self.seen["stolen leases"] += reading.is_valid and peer is not reading.peer
                reading.is_valid = reading.is_valid and peer is not reading.peer

    def releases_owner(self, pick: int, owner: str) -> None:
        for peer in one(self.connected(), pick):
            tell(peer, wire.ReleaseOwner(owner=owner))
            self.forget(peer, owner)

    def reserves(self, pick: int, owner: str, keys: list[BlockKey]) -> None:
        for peer in one(self.connected(), pick):
            granted = peer.engine.reserve(keys, owner)
            self.take_in(peer, keys, granted)

    def take_in(self, peer: Peer, keys: list[BlockKey], granted: wire.Reserved) -> None:
        reserved = {slot for writing in self.writings for slot in writing.slots.values()}
        read = {slot for reading in self.readings if reading.is_valid for _, slot, _ in reading.places}
        for slot, generation in zip(granted.slots, granted.generations, strict=True):
            assert slot not in reserved, "somebody may still write into it"
            assert slot not in read, "somebody may still read it"
            assert generation > self.generations[slot], "it changed hands"
            assert peer.engine.arena.generation(slot) == generation
            self.generations[slot] = generation
        if granted.slots:
            slots = dict(zip((keys[index] for index in granted.indices), granted.slots, strict=True))
            self.committed -= slots.keys()
            self.seen["reservations"] += 1
            self.writings.append(Writing(peer, granted.reservation, slots))

    def commits(self, pick: int, count: int) -> None:
        for writing in one(self.with_living_writers(), pick):
            engine, keys = writing.peer.engine, list(writing.slots)[:count]
            for key in keys:
                engine.arena.slot(writing.slots[key])[: LAYOUT.payload_bytes] = content(key)
            self.writings.remove(writing)
            tell(writing.peer, wire.Commit(reservation=writing.id, keys=wire.pack_keys(keys)))
            if writing.is_void:
                self.seen["void commits"] += 1
                continue
            self.seen["commits"] += 1
            assert all(engine.lookup([key]).ready for key in keys)
            self.committed.update(keys)

    def aborts(self, pick: int) -> None:
        for writing in one(self.with_living_writers(), pick):
            self.writings.remove(writing)
            tell(writing.peer, wire.Abort(reservation=writing.id))

    def settles_what_is_not_its_own(
        self, pick: int, thief: int, keys: list[BlockKey], does_commit: bool
    ) -> None:
        """Or what is its own, with keys that it did not reserve; and is refused."""
        for writing in one(self.writings, pick):
            for peer in one(self.connected(), thief):
                is_own = peer is writing.peer
                if is_own and (not does_commit or writing.is_void or writing.slots.keys() >= set(keys)):
                    continue
                packed = wire.pack_keys(keys if is_own else list(writing.slots))
                commit = wire.Commit(reservation=writing.id, keys=packed)
                bad = commit if does_commit else wire.Abort(reservation=writing.id)
                peer.engine.channel.send_bytes([wire.encode(bad) + wire.encode(wire.Ping(id=1))], soon())
                assert isinstance(peer.engine.channel.receive_reply(soon()), wire.Refused)
                self.seen["refusals"] += 1
                self.end_connection(peer)

    def clears(self, pick: int) -> None:
        for peer in one(self.connected(), pick):
            tell(peer, wire.Clear())
            self.forget(peer)
            for writing in self.writings:
                writing.is_void = writing.is_void or writing.peer is peer

    def could_not_load(self, pick: int, keys: list[BlockKey]) -> None:
        for peer in one(self.connected(), pick):
            peer.engine.tell(wire.Failed(keys=wire.pack_keys(keys)))
            assert peer.engine.lookup(keys).reachable == 0
            self.committed -= set(keys)
            for held in self.holds.values():
                held -= set(keys)

    def time_passes(self) -> None:
        """Longer than leases and reservations live."""
        self.later_s += LEASE_S + 1
        self.inside.index.call(self.pool.service.poll, soon())
        self.holds.clear()
        for writing in self.writings:
            writing.is_void = True
        for reading in self.readings:
            reading.is_valid = False

    # How they end

    def disconnects(self, pick: int) -> None:
        """The scheduler's process is gone, a worker is not."""
        for peer in one(self.connected(), pick):
            self.end_connection(peer)

    def last_process_ends(self, pick: int) -> None:
        for peer in one(self.dying(), pick):
            self.bury(peer)

    def dies(self, pick: int) -> None:
        for peer in one(self.connected(), pick):
            self.end_connection(peer)
            self.bury(peer)

    def end_connection(self, peer: Peer) -> None:
        peer.is_connected = False
        peer.engine.disconnect()
        self.wait_for_dying()
        self.forget(peer)
        self.seen["dying writers"] += any(writing.peer is peer for writing in self.writings)

    def bury(self, peer: Peer) -> None:
        self.peers.remove(peer)
        peer.engine.die()
        self.wait_for_dying()
        self.writings = [writing for writing in self.writings if writing.peer is not peer]

    def wait_for_dying(self) -> None:
        index, count = self.inside.index, len(self.dying())
        wait_until("the server noticed", lambda: index.call(lambda: self.pool.dead_writers, soon()) == count)

    def forget(self, peer: Peer, *owners: str) -> None:
        """An engine, or owners of it, hold nothing any more."""
        for reading in self.readings:
            if reading.peer is peer and reading.owner in (owners or OWNERS):
                reading.is_valid = False
        for owner in owners or OWNERS:
            self.holds.pop((id(peer), owner), None)

    def with_living_writers(self) -> list[Writing]:
        return [writing for writing in self.writings if writing.peer.is_connected]

    # What must hold

    def check(self) -> None:
        self.check_bytes()
        self.check_account()

    def check_bytes(self) -> None:
        """Everybody who may write does so before anybody reads."""
        arena = self.watcher.arena
        for writing in self.writings:
            for slot in writing.slots.values():
                arena.slot(slot)[: LAYOUT.payload_bytes] = SPOILT
        for reading in self.readings:
            for key, slot, generation in reading.places:
                is_still_its = arena.generation(slot) == generation
                assert is_still_its or not reading.is_valid, "a leased slot changed hands"
                assert not is_still_its or bytes(arena.slot(slot)[: LAYOUT.payload_bytes]) == content(key)

    def check_account(self) -> None:
        held = {key for keys in self.holds.values() for key in keys}

        def look() -> tuple[ServiceCounters, bool]:
            service = self.pool.service
            return service.counters(), all(service.lookup([key]).ready for key in held)

        counters, is_held = self.inside.index.call(look, soon())
        assert is_held, "what was prefetched stays"
        # A slot whose block was dropped while somebody read it is in use, but no block's.
        pinned = {slot for reading in self.readings if reading.is_valid for _, slot, _ in reading.places}
        most_dropped = SLOTS if self.holds else len(pinned)
        written = sum(len(writing.slots) for writing in self.writings)
        assert 0 <= counters.used_slots - counters.host_blocks - written <= most_dropped
        assert counters.reservations == len(self.writings)

    def settle(self) -> None:
        """Everybody goes: every slot is free, or holds a block."""
        for peer in self.connected():
            self.end_connection(peer)
        for peer in self.dying():
            self.bury(peer)
        self.check()
        counters = self.inside.index.call(self.pool.service.counters, soon())
        assert counters.used_slots == counters.host_blocks
        assert counters.leases == counters.reservations == 0

    def close(self) -> None:
        self.inside.__exit__()


def one(items: Sequence[T], pick: int) -> Sequence[T]:
    """Return the one that ``pick`` stands for, or none where there is none."""
    return [items[pick % len(items)]] if items else []


def tell(peer: Peer, message: wire.Request) -> None:
    """Send it, and wait until it was done."""
    peer.engine.tell(message)
    peer.engine.lookup([])


def walk(seed: int, steps: int) -> Counter[str]:
    """Let engines live at random and bury them; raises AssertionError when a promise is broken."""
    random = Random(seed)
    world = LedgerWorld()
    try:
        for action in random.choices(list(ACTIONS), list(ACTIONS.values()), k=steps):
            if len(world.connected()) < 2:
                world.connects()  # else most of the time nobody is there to do anything
            action(world, random)
            world.check()
        world.settle()
    finally:
        world.close()
    return world.seen


def _pick(random: Random) -> int:
    return random.randrange(1 << 16)


def _keys(random: Random) -> list[BlockKey]:
    return random.choice(PREFIXES)


ACTIONS: dict[Callable[[LedgerWorld, Random], None], int] = {
    lambda world, random: world.connects(): 4,
    lambda world, random: world.looks_up(_pick(random), _keys(random)): 4,
    lambda world, random: world.prefetches(_pick(random), random.choice(OWNERS), _keys(random)): 4,
    lambda world, random: world.leases(_pick(random), random.choice(OWNERS), _keys(random)): 12,
    lambda world, random: world.releases(_pick(random), _pick(random)): 6,
    lambda world, random: world.releases_owner(_pick(random), random.choice(OWNERS)): 2,
    lambda world, random: world.reserves(_pick(random), random.choice(OWNERS), _keys(random)): 24,
    lambda world, random: world.commits(_pick(random), random.randint(0, 5)): 20,
    lambda world, random: world.aborts(_pick(random)): 3,
    lambda world, random: world.settles_what_is_not_its_own(
        _pick(random), _pick(random), _keys(random), random.random() < 0.5
    ): 2,
    lambda world, random: world.clears(_pick(random)): 2,
    lambda world, random: world.could_not_load(_pick(random), _keys(random)): 2,
    lambda world, random: world.time_passes(): 1,
    lambda world, random: world.disconnects(_pick(random)): 3,
    lambda world, random: world.last_process_ends(_pick(random)): 3,
    lambda world, random: world.dies(_pick(random)): 1,
}
"""What engines do, and how often."""
