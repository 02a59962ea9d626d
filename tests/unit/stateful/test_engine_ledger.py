"""Engines of one pool against a model: their leases and reservations, their deaths, and what they leave behind.

hypothesis finds short counterexamples; the walks get further.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from ledger_world import OWNERS, PREFIXES, LedgerWorld, walk
from server_kit import ServerInside, prefix, soon

from kvferry.connector import wire
from kvferry.connector.keys import BlockKey
from kvferry.connector.pool import SlotPool
from kvferry.connector.server.fetching import Fetch
from kvferry.connector.server.mapping import EngineLedger
from kvferry.connector.service import Reservation

KEYS = st.sampled_from(PREFIXES)
OWNER = st.sampled_from(OWNERS)
PICK = st.integers(0, 3)


class LedgerMachine(LedgerWorld, RuleBasedStateMachine):
    """The world's actions as rules."""

    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)
        LedgerWorld.__init__(self)

    connects = rule()(LedgerWorld.connects)
    looks_up = rule(pick=PICK, keys=KEYS)(LedgerWorld.looks_up)
    prefetches = rule(pick=PICK, owner=OWNER, keys=KEYS)(LedgerWorld.prefetches)
    leases = rule(pick=PICK, owner=OWNER, keys=KEYS)(LedgerWorld.leases)
    releases = rule(pick=PICK, thief=PICK)(LedgerWorld.releases)
    releases_owner = rule(pick=PICK, owner=OWNER)(LedgerWorld.releases_owner)
    reserves = rule(pick=PICK, owner=OWNER, keys=KEYS)(LedgerWorld.reserves)
    commits = rule(pick=PICK, count=st.integers(0, 5))(LedgerWorld.commits)
    aborts = rule(pick=PICK)(LedgerWorld.aborts)
    settles_what_is_not_its_own = rule(pick=PICK, thief=PICK, keys=KEYS, does_commit=st.booleans())(
        LedgerWorld.settles_what_is_not_its_own
    )
    clears = rule(pick=PICK)(LedgerWorld.clears)
    could_not_load = rule(pick=PICK, keys=KEYS)(LedgerWorld.could_not_load)
    time_passes = rule()(LedgerWorld.time_passes)
    disconnects = rule(pick=PICK)(LedgerWorld.disconnects)
    last_process_ends = rule(pick=PICK)(LedgerWorld.last_process_ends)
    dies = rule(pick=PICK)(LedgerWorld.dies)

    check = invariant()(LedgerWorld.check)

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self.close()


SETTINGS = settings(
    max_examples=30,
    stateful_step_count=30,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
"""Deterministic; raise ``max_examples`` to hunt."""


def test_engines_keep_out_of_one_anothers_way() -> None:
    run_machine(LedgerMachine, settings=SETTINGS)


def test_engines_keep_out_of_one_anothers_way_on_long_walks() -> None:
    seen = sum((walk(seed, steps=150) for seed in range(30)), Counter())
    rare = {name: count for name, count in seen.items() if count < 10}
    assert not rare, "these happen too seldom for the walks to prove anything about them"
    assert len(seen) == 7


# The tests must be able to fail: each of these breaks one rule.


def dead_writers_give_back_at_once(patch: pytest.MonkeyPatch) -> None:
    end = EngineLedger.end

    def end_at_once(self: EngineLedger) -> list[Reservation]:
        for reservation in end(self):
            self._service.abort(reservation)
        return []

    patch.setattr(EngineLedger, "end", end_at_once)


def the_dead_keep_their_leases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EngineLedger, "end", lambda self: list(self._reservations.values()))


def reservations_survive_a_clear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EngineLedger, "_clear", lambda self: None)


def anybody_may_commit(patch: pytest.MonkeyPatch) -> None:
    def commit(self: EngineLedger, reservation: int, keys: list[BlockKey]) -> None:
        self._reservations.pop(reservation, None)
        self._service.commit(Reservation(reservation, ()), keys)

    patch.setattr(EngineLedger, "_commit", commit)


def anybody_may_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EngineLedger, "_release", lambda self, lease: self._service._manager.release(lease))


def owners_are_not_told_apart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EngineLedger, "_prefixed", lambda self, owner: owner)


def generations_stay(patch: pytest.MonkeyPatch) -> None:
    take = SlotPool.take

    def take_as_before(self: SlotPool) -> int | None:
        slot = take(self)
        if slot is not None:
            self._generations[slot] = 1
            self._on_generation(slot, 1)
        return slot

    patch.setattr(SlotPool, "take", take_as_before)


def blocks_are_visible_when_reserved(patch: pytest.MonkeyPatch) -> None:
    reserve = EngineLedger._reserve

    def reserve_and_show(self: EngineLedger, request: int, owner: str, keys: list[BlockKey]) -> wire.Reserved:
        granted = reserve(self, request, owner, keys)
        shown = {keys[index]: slot for index, slot in zip(granted.indices, granted.slots, strict=True)}
        self._service._manager._residency.arena.update(shown)
        return granted

    patch.setattr(EngineLedger, "_reserve", reserve_and_show)


def walk_often(times: int, steps: int) -> None:
    for seed in range(times):
        walk(seed, steps)


@pytest.mark.parametrize(
    "break_rule",
    [
        dead_writers_give_back_at_once,
        the_dead_keep_their_leases,
        reservations_survive_a_clear,
        anybody_may_commit,
        anybody_may_release,
        owners_are_not_told_apart,
        generations_stay,
        blocks_are_visible_when_reserved,
    ],
)
def test_a_broken_rule_is_found(
    break_rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch)
    with pytest.raises((AssertionError, OSError)):
        walk_often(100, steps=100)


def test_letting_go_of_much_does_not_take_long() -> None:
    """The index thread serves everybody; 60 000 owners with a lease each once took it a minute and a half."""
    with ServerInside() as inside:
        pool = inside.pool()
        inside.engine(pool).save(prefix(1))
        ledger = EngineLedger(pool, "greedy")

        def grab_and_let_go() -> float:
            for number in range(20_000):
                ledger.handle(wire.Lease(id=1, owner=f"{number}", keys=prefix(1)[0]))
            started = time.perf_counter()
            ledger.end()
            return time.perf_counter() - started

        assert inside.index.call(grab_and_let_go, soon()) < 1.0
        assert inside.index.call(pool.service.counters, soon()).leases == 0


def test_the_blocks_in_one_connections_leases_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is remembered with each of its blocks, and may name one block thousands of times."""
    monkeypatch.setattr("kvferry.connector.server.mapping.MAX_LEASED", 20)
    with ServerInside() as inside:
        engine = inside.engine()
        engine.save(prefix(1))
        first, second = engine.lease(prefix(1) * 10), engine.lease(prefix(1) * 10)
        engine.tell(wire.Release(lease=first.lease))
        assert len(engine.lease(prefix(1) * 10).slots) == len(second.slots) == 10, (
            "what was released does not count"
        )
        engine.tell(wire.Lease(id=99, owner="reader", keys=prefix(1)[0]))
        refusal = engine.channel.receive_reply(soon())
        assert isinstance(refusal, wire.Refused)
        assert "release" in refusal.why


def test_what_nobody_waits_for_any_more_is_not_leased() -> None:
    with ServerInside() as inside:
        pool = inside.pool()
        fetch = Fetch(pool, "stream", prefix(4), soon(), lambda decided: None)
        inside.engine(pool).save(prefix(4))
        fetch.give_up()
        assert inside.index.call(lambda: fetch.advance(time.monotonic()), soon())
        assert inside.index.call(pool.service.counters, soon()).leases == 0
