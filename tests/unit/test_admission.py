"""Admission policies: which blocks are worth a write, how much they remember, and what it costs or saves.

Hit rates come from the simulation that ``kvferry bench admission`` uses.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manager_kit import DISK, finish, make, save

from kvferry.connector.admission import (
    ADMISSION_POLICIES,
    Adaptive,
    AdmissionPolicy,
    Always,
    SecondTouch,
)
from kvferry.connector.bench.admission import Served, serve
from kvferry.connector.bench.loads import Load
from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import LowerTierSpec
from kvferry.connector.policy import POLICIES

DOCUMENT_BLOCKS = 4


def key(number: int) -> BlockKey:
    return BlockKey(random.Random(number).randbytes(32))


def keys(first: int, count: int) -> list[BlockKey]:
    return [key(number) for number in range(first, first + count)]


class Tier:
    """A tier of so many blocks, first in first out, before which a policy stands."""

    def __init__(self, policy: AdmissionPolicy, capacity: int) -> None:
        self.policy = policy
        self.held: dict[BlockKey, None] = {}
        self.written = 0
        self._capacity = capacity

    def use(self, *used: BlockKey) -> int:
        """Use blocks in turn; return how many of them were hits."""
        hits = 0
        for one in used:
            if one in self.held:
                hits += 1
                self.policy.hit(one)
            elif self.policy.admits(one):
                self._store(one)
        return hits

    def drop(self, dropped: Iterable[BlockKey]) -> None:
        for one in list(dropped):
            del self.held[one]
            self.policy.removed(one)

    def _store(self, one: BlockKey) -> None:
        if len(self.held) == self._capacity:
            self.drop([next(iter(self.held))])
        self.held[one] = None
        self.written += 1
        self.policy.stored(one)


# Each policy


def test_always_admits_everything() -> None:
    tier = Tier(Always(), 4)
    tier.use(*keys(0, 10))
    assert tier.written == 10


def test_second_touch_admits_what_is_offered_again() -> None:
    policy = SecondTouch()
    assert [policy.admits(key(number)) for number in (1, 2, 1, 3, 2)] == [False, False, True, False, True]


def test_a_block_whose_store_failed_is_admitted_when_it_is_offered_again() -> None:
    policy = SecondTouch()
    assert [policy.admits(key(1)) for _ in range(3)] == [False, True, True]


def test_what_the_tier_evicted_comes_back_at_its_first_offer() -> None:
    tier = Tier(SecondTouch(), 1)
    tier.use(key(1), key(1), key(2), key(2))
    assert list(tier.held) == [key(2)]
    assert tier.policy.admits(key(1))


def test_second_touch_forgets_offers_that_are_long_ago() -> None:
    policy = SecondTouch()
    policy.admits(key(0))
    for number in range(1, 8192):
        policy.admits(key(number))
    assert policy.admits(key(0))
    for number in range(10_000, 10_000 + 2 * 8192):
        policy.admits(key(number))
    assert not policy.admits(key(0))


def test_adaptive_admits_everything_while_there_is_room() -> None:
    tier = Tier(Adaptive(), 1000)
    tier.use(*keys(0, 1000))
    assert tier.written == 1000


def test_adaptive_spares_the_writes_of_what_never_comes_back() -> None:
    tier = Tier(Adaptive(), 100)
    tier.use(*keys(0, 10_000))
    assert tier.written < 150


def test_adaptive_keeps_a_scan_from_washing_out_what_is_used_again() -> None:
    hits = {}
    for name in ("always", "adaptive"):
        tier = Tier(ADMISSION_POLICIES[name](), 100)
        fresh = itertools.count(1000)
        hits[name] = sum(tier.use(*keys(0, 80), *(key(next(fresh)) for _ in range(300))) for _ in range(60))
    assert hits["always"] == 0
    assert hits["adaptive"] > 60 * 80 / 2


def test_adaptive_admits_at_the_first_offer_where_each_block_is_used_twice() -> None:
    """Second-touch would miss the only use that counts."""
    tier = Tier(Adaptive(), 200)
    hits = 0
    for first in range(0, 20_000, 50):
        hits += tier.use(*keys(first, 50), *keys(first, 50))
    assert hits > 0.9 * 20_000


def test_adaptive_changes_its_mind_when_the_load_changes() -> None:
    tier = Tier(Adaptive(), 100)
    tier.use(*keys(0, 5_000))
    spared = 5_000 - tier.written
    hits = 0
    for first in range(10_000, 40_000, 25):
        hits += tier.use(*keys(first, 25), *keys(first, 25))
    assert spared > 4_500
    assert hits > 0.8 * 30_000


def test_after_a_clear_there_is_room_again() -> None:
    tier = Tier(Adaptive(), 100)
    tier.use(*keys(0, 5_000))
    tier.drop(tier.held)
    written = tier.written
    tier.use(*keys(10_000, 100))
    assert tier.written - written == 100


def test_a_tier_that_evicts_many_at_once_is_full_all_the_same() -> None:
    tier = Tier(Adaptive(), 2000)
    for number in range(20_000):
        if len(tier.held) == 2000:
            tier.drop(list(tier.held)[:64])
        tier.use(key(number))
    assert tier.written < 2500


def test_losing_single_blocks_does_not_count_as_being_full() -> None:
    tier = Tier(Adaptive(), 1000)
    tier.use(*keys(0, 500))
    tier.drop(keys(0, 3))
    tier.use(*keys(1000, 503))
    assert len(tier.held) == 1000


# In the manager


def test_the_manager_writes_a_block_when_it_is_used_the_second_time() -> None:
    manager = make(8, specs=[LowerTierSpec(name=DISK, admission=SecondTouch())])
    assert save(manager, keys(0, 3)) == []
    manager.release(manager.lease("reader", keys(0, 2), 0.0).id)
    stores = manager.expire(0.0)
    assert [one for transfer in stores for one in transfer.keys] == keys(0, 2)
    finish(manager, stores)


# Bounds

OPERATIONS = st.lists(st.tuples(st.sampled_from(["use", "drop"]), st.integers(0, 400)), max_size=400)


@pytest.mark.parametrize("name", ["second-touch", "adaptive"])
@settings(max_examples=20, deadline=None)
@given(operations=OPERATIONS, capacity=st.integers(1, 200), flood=st.integers(0, 60_000))
def test_memory_is_bounded_by_what_the_tier_holds(
    name: str, operations: list[tuple[str, int]], capacity: int, flood: int
) -> None:
    """The bounds that the policies' docstrings state."""
    policy = {"second-touch": SecondTouch, "adaptive": Adaptive}[name]()
    tier = Tier(policy, capacity)
    most_held = 0
    for operation, number in operations:
        if operation == "use":
            tier.use(key(number))
        else:
            tier.drop(list(tier.held)[: number % 7])
        most_held = max(most_held, len(tier.held))
    for number in range(flood):
        policy.admits(BlockKey((number + 1000).to_bytes(32, "big")))
    bound = 2 * max(8192, 2 * most_held) if name == "second-touch" else 2 * max(1024, 2 * most_held) + 12_288
    assert len(policy) <= bound


def test_the_shadows_of_a_large_tier_stay_small() -> None:
    policy = Adaptive()
    tier = Tier(policy, 50_000)
    for number in range(120_000):
        tier.use(BlockKey(number.to_bytes(32, "big")))
    assert len(tier.held) == 50_000
    assert len(policy) - 4 * 50_000 <= 12_288


# Against the fixed rules


def mixed(seed: int, requests: int, scans: float, loops: float, looped: int, popular: int) -> Load:
    """Documents that never come back, a loop over some, and some of Zipf popularity."""
    chance = random.Random(seed)
    fresh, turn = itertools.count(1_000_000), itertools.count()
    ranks = range(1, popular + 1)
    favourites = chance.choices(ranks, [1 / rank for rank in ranks], k=requests)
    documents = []
    for favourite in favourites:
        kind = chance.random()
        if kind < scans:
            documents.append(next(fresh))
        elif kind < scans + loops:
            documents.append(500_000 + next(turn) % looped)
        else:
            documents.append(favourite)
    return [keys(DOCUMENT_BLOCKS * document, DOCUMENT_BLOCKS) for document in documents]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    scans = draw(st.floats(0, 1))
    return mixed(
        seed=draw(st.integers(0, 1000)),
        requests=draw(st.sampled_from([1000, 2000, 3000])),
        scans=scans,
        loops=draw(st.floats(0, 1)) * (1 - scans),
        looped=draw(st.integers(5, 300)),
        popular=draw(st.integers(10, 1500)),
    )


def served(load: Load, capacity: int, eviction: str, make_policy: Callable[[], AdmissionPolicy]) -> Served:
    return serve(load, capacity, POLICIES[eviction], make_policy())


@settings(max_examples=15, deadline=None)
@given(load=loads(), capacity=st.sampled_from([40, 100, 200]), eviction=st.sampled_from(sorted(POLICIES)))
def test_adaptive_is_close_to_the_better_fixed_rule_and_never_below_both(
    load: Load, capacity: int, eviction: str
) -> None:
    """Within 5 points of hit rate of the better rule, within 1 of the worse one; no more writes than always."""
    always, second, adaptive = (
        served(load, capacity, eviction, policy) for policy in (Always, SecondTouch, Adaptive)
    )
    assert adaptive.hit_rate >= max(always.hit_rate, second.hit_rate) - 0.05
    assert adaptive.hit_rate >= min(always.hit_rate, second.hit_rate) - 0.01
    assert adaptive.written <= always.written * 1.01 + 10


def test_the_loads_tell_the_fixed_rules_apart() -> None:
    """Else closeness to the better one would mean nothing."""
    scans = mixed(1, 3000, 0.5, 0.4, 20, 100)
    always, second = (served(scans, 100, "lru", policy) for policy in (Always, SecondTouch))
    assert second.hit_rate > always.hit_rate + 0.1
    fitting = mixed(1, 1000, 0.0, 0.0, 5, 1000)
    always, second = (served(fitting, 4000, "lru", policy) for policy in (Always, SecondTouch))
    assert always.hit_rate > second.hit_rate + 0.05


@settings(max_examples=3, deadline=None)
@given(load=loads())
@pytest.mark.parametrize("name", sorted(ADMISSION_POLICIES))
def test_the_same_load_is_always_served_alike(name: str, load: Load) -> None:
    results = {served(load, 40, "lru", ADMISSION_POLICIES[name]) for _ in range(2)}
    assert len(results) == 1
