"""A client against every server that can be thought of: whatever it does, nothing is raised into the engine, no step
waits beyond its budget, and nothing that the server granted is lost or given back twice.

hypothesis finds short counterexamples; the walks get further.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from scripted_server import BUDGET_S, SLOTS, Clock, ScriptedServer, chain, connect

from kvferry.connector import wire
from kvferry.connector.client import LEASE_BUDGET_S
from kvferry.connector.keys import BlockKey
from kvferry.connector.service import Lease, Place, Reservation

PREFIXES = [chain(seed, length) for seed in range(3) for length in (1, 2, 4)]
OWNERS = ("a", "b", "c")
PAUSES_S = (0.0, 0.005, 0.03, 0.3, 1.5)
DELAYS_S = (0.0, 0.0001, 0.0015, 0.01, 0.1, 2.0, None)
DEADLINES_S = (0.0, 0.005, 0.5)
FIELDS = ("id", "slots", "ready", "blocks", "indices")
UNASKED = (wire.Goodbye(), wire.Pong(id=1), wire.Refused(code="internal", why="so", is_mistake=False))
ROUNDING_S = 1e-4


class ClientWorld:
    """An engine's side and a server's, and what must be true of the two."""

    def __init__(self) -> None:
        self.server = ScriptedServer(Clock())
        self.server.held.update(PREFIXES[2])
        self.client = connect(self.server)
        self.leases: list[tuple[str, Lease]] = []
        self.reservations: list[Reservation] = []
        self.allowed_s = 0.0
        """What the step may wait beyond its budgets, because it settled."""

    def close(self) -> None:
        """Let everything become well again; then the server must hold what the engine does, and no more."""
        self.heal()
        for _ in range(6):
            self.step(0.5)
        link = self.server.link
        assert set(link.leases) <= self._current([lease.id for _, lease in self.leases]), "a lease was lost"
        held = self._current([reservation.id for reservation in self.reservations])
        assert link.reservations == held, "a reservation was lost"
        self.client.close(1.0)

    def check(self) -> None:
        assert self.server.waited_s <= BUDGET_S + LEASE_BUDGET_S + self.allowed_s + ROUNDING_S
        assert (self.client.arena is None) == all(link.is_closed for link in self.server.links)

    # The engine

    def step(self, seconds: float) -> None:
        self.server.clock.now += seconds
        self.server.waited_s = self.allowed_s = 0.0
        self.client.poll()
        assert self.server.waited_s == 0, "taking in does not wait"

    def lookup(self, keys: list[BlockKey]) -> None:
        match = self.client.lookup(keys)
        assert 0 <= match.ready <= match.reachable == len(match.tiers) <= len(keys)

    def prefetch(self, owner: str, keys: list[BlockKey]) -> None:
        assert 0 <= self.client.prefetch(owner, keys).blocks <= len(keys)

    def lease(self, owner: str, keys: list[BlockKey]) -> None:
        lease = self.client.lease(owner, keys)
        assert [place.key for place in lease.places] == keys[: len(lease.places)]
        if lease.id:
            self._check_grant(lease.id, lease.places)
            self.leases.append((owner, lease))

    def load_finished(self, pick: int, is_good: bool) -> None:
        if self.leases:
            _, lease = self.leases.pop(pick % len(self.leases))
            self.client.release(lease)
            if not is_good:
                self.client.report_load_failed([place.key for place in lease.places])

    def release_owner(self, owner: str) -> None:
        self.client.release_owner(owner)
        self.leases = [(other, lease) for other, lease in self.leases if other != owner]

    def reserve(self, owner: str, keys: list[BlockKey]) -> None:
        reservation = self.client.reserve(owner, keys)
        if reservation is not None and reservation.id:
            self._check_grant(reservation.id, reservation.places)
            self.reservations.append(reservation)

    def settle(self, pick: int, is_good: bool) -> None:
        if self.reservations:
            reservation = self.reservations.pop(pick % len(self.reservations))
            if is_good:
                self.client.commit(reservation, [place.key for place in reservation.places])
            else:
                self.client.abort(reservation)

    def show(self, keys: list[BlockKey], deadline_s: float) -> None:
        """Settle in the sense of the service: others are to find what was committed."""
        self.allowed_s += deadline_s
        is_honest = self.server.distort is None
        if self.client.settle(keys, deadline_s) and is_honest:
            assert set(keys) <= self.server.held, "others are told of what is not there"

    def clear(self) -> None:
        self.client.clear()

    # The server

    def become_slow(self, delay_s: float | None) -> None:
        self.server.delay_s = delay_s

    def heal(self) -> None:
        self.server.is_there, self.server.delay_s, self.server.distort = True, 0.0, None
        if not self.server.link.is_dead and not self.server.link.is_closed:
            self.server.link.catch_up()

    def evict(self, keys: list[BlockKey]) -> None:
        self.server.held.difference_update(keys)

    def die(self, is_back: bool) -> None:
        self.server.die()
        self.server.is_there = is_back

    def lie(self, field: str, number: int) -> None:
        """In the next answer."""

        def distort(reply: wire.Reply) -> wire.Reply:
            if field not in reply.__struct_fields__:
                return wire.Done(id=1)
            old = getattr(reply, field)
            return msgspec.structs.replace(
                reply, **{field: [number] * 3 if isinstance(old, list) else number}
            )

        self.server.distort = distort

    def say(self, message: wire.Reply) -> None:
        self.server.link.say(message)

    def _current(self, grants: list[int]) -> set[int]:
        """Return the server's ids of those that are of the present connection."""
        arena = self.client.arena
        return {
            grant % (1 << 53) for grant in grants if arena is not None and grant >> 53 == arena.connection
        }

    def _check_grant(self, grant: int, places: Sequence[Place]) -> None:
        assert self._current([grant]) <= self.server.link.granted
        assert self._current([grant])
        assert all(0 <= place.slot < SLOTS for place in places)


class ClientMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = ClientWorld()

    def teardown(self) -> None:
        self.world.close()

    @invariant()
    def holds(self) -> None:
        self.world.check()

    @rule(seconds=st.sampled_from(PAUSES_S))
    def step(self, seconds: float) -> None:
        self.world.step(seconds)

    @rule(
        what=st.sampled_from(["prefetch", "lease", "reserve"]),
        owner=st.sampled_from(OWNERS),
        keys=st.sampled_from(PREFIXES),
    )
    def ask(self, what: str, owner: str, keys: list[BlockKey]) -> None:
        getattr(self.world, what)(owner, keys)

    @rule(keys=st.sampled_from(PREFIXES))
    def lookup(self, keys: list[BlockKey]) -> None:
        self.world.lookup(keys)

    @rule(what=st.sampled_from(["load_finished", "settle"]), pick=st.integers(0, 3), is_good=st.booleans())
    def end(self, what: str, pick: int, is_good: bool) -> None:
        getattr(self.world, what)(pick, is_good)

    @rule(owner=st.sampled_from(OWNERS))
    def release_owner(self, owner: str) -> None:
        self.world.release_owner(owner)

    @rule(keys=st.sampled_from(PREFIXES), deadline_s=st.sampled_from(DEADLINES_S))
    def show(self, keys: list[BlockKey], deadline_s: float) -> None:
        self.world.show(keys, deadline_s)

    @rule()
    def clear(self) -> None:
        self.world.clear()

    @rule(delay_s=st.sampled_from(DELAYS_S))
    def become_slow(self, delay_s: float | None) -> None:
        self.world.become_slow(delay_s)

    @rule()
    def heal(self) -> None:
        self.world.heal()

    @rule(is_back=st.booleans())
    def die(self, is_back: bool) -> None:
        self.world.die(is_back)

    @rule(field=st.sampled_from(FIELDS), number=st.integers(-1, SLOTS + 1))
    def lie(self, field: str, number: int) -> None:
        self.world.lie(field, number)

    @rule(message=st.sampled_from(UNASKED))
    def say(self, message: wire.Reply) -> None:
        self.world.say(message)


ClientMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestClient = ClientMachine.TestCase


def move(world: ClientWorld, chance: random.Random) -> None:
    owner, keys = chance.choice(OWNERS), chance.choice(PREFIXES)
    pick, is_good = chance.randrange(4), chance.random() < 0.7
    weighted = {
        lambda: world.step(chance.choice(PAUSES_S)): 20,
        lambda: world.lookup(keys): 10,
        lambda: world.prefetch(owner, keys): 5,
        lambda: world.lease(owner, keys): 10,
        lambda: world.reserve(owner, keys): 10,
        lambda: world.load_finished(pick, is_good): 6,
        lambda: world.settle(pick, is_good): 6,
        lambda: world.show(keys, chance.choice(DEADLINES_S)): 6,
        lambda: world.release_owner(owner): 3,
        lambda: world.evict(keys): 4,
        world.heal: 4,
        lambda: world.become_slow(chance.choice(DELAYS_S)): 6,
        world.clear: 1,
        lambda: world.die(is_good): 1,
        lambda: world.lie(chance.choice(FIELDS), chance.randint(-1, SLOTS + 1)): 1,
        lambda: world.say(chance.choice(UNASKED)): 1,
    }
    chance.choices(list(weighted), list(weighted.values()))[0]()


@pytest.mark.parametrize("seed", range(20))
def test_long_walks(seed: int) -> None:
    world, chance = ClientWorld(), random.Random(seed)
    for _ in range(400):
        move(world, chance)
        world.check()
    world.close()
