from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.connector.keys import BlockKey
from kvferry.connector.policy import LRU, POLICIES, S3FIFO, EvictionPolicy

ALWAYS: Callable[[BlockKey], bool] = lambda key: True  # noqa: E731


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


def keys(*numbers: int) -> list[BlockKey]:
    return [key(number) for number in numbers]


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return POLICIES[request.param]()


def insert(policy: EvictionPolicy, *numbers: int) -> None:
    for number in numbers:
        policy.insert(key(number))


def evict(policy: EvictionPolicy, count: int) -> list[int]:
    victims = policy.victims(count, ALWAYS)
    for victim in victims:
        policy.remove(victim)
    return [int.from_bytes(victim, "big") for victim in victims]


def test_victims_are_proposed_and_stay_until_they_are_removed(policy: EvictionPolicy) -> None:
    insert(policy, *range(20))
    proposed = policy.victims(5, ALWAYS)
    assert len(proposed) == 5
    assert len(policy) == 20
    assert policy.victims(5, ALWAYS) == proposed


def test_unknown_keys_are_ignored(policy: EvictionPolicy) -> None:
    policy.touch(key(1))
    policy.remove(key(1))
    assert len(policy) == 0
    assert policy.victims(3, ALWAYS) == []


def test_no_victims_are_proposed_when_none_are_asked_for(policy: EvictionPolicy) -> None:
    insert(policy, 1, 2)
    assert policy.victims(0, ALWAYS) == []
    assert policy.victims(-1, ALWAYS) == []


def test_a_prefix_inserted_last_to_first_is_evicted_from_its_end(policy: EvictionPolicy) -> None:
    insert(policy, *reversed(range(10)))
    assert [evict(policy, 1)[0] for _ in range(10)] == list(reversed(range(10)))


def test_a_prefix_touched_last_to_first_is_evicted_from_its_end(policy: EvictionPolicy) -> None:
    insert(policy, *reversed(range(10)))
    for _ in range(3):
        for number in reversed(range(10)):
            policy.touch(key(number))
    assert evict(policy, 10) == list(reversed(range(10)))


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = LRU()
    insert(policy, 1, 2, 3)
    policy.touch(key(1))
    insert(policy, 2)
    assert evict(policy, 3) == [3, 1, 2]


def test_s3fifo_keeps_what_is_used_twice_through_a_scan() -> None:
    policy = S3FIFO()
    hot = range(10)
    insert(policy, *hot)
    for _ in range(2):
        for number in hot:
            policy.touch(key(number))
    for number in range(1000, 2000):
        policy.insert(key(number))
        if len(policy) > 50:
            evict(policy, 1)
    assert {evict(policy, 1)[0] for _ in range(30)}.isdisjoint(hot)


def test_lru_loses_what_is_used_twice_to_a_scan() -> None:
    """The reason for having another policy."""
    policy = LRU()
    insert(policy, *range(10))
    for number in range(10):
        policy.touch(key(number))
    for number in range(1000, 1100):
        policy.insert(key(number))
        if len(policy) > 50:
            evict(policy, 1)
    assert all(number >= 1000 for number in evict(policy, 50))


def test_s3fifo_takes_a_key_that_comes_back_into_the_main_queue() -> None:
    policy = S3FIFO()
    insert(policy, *range(20))
    (lost,) = evict(policy, 1)
    insert(policy, lost)
    assert evict(policy, 19) == [number for number in range(20) if number != lost]


def test_s3fifo_remembers_no_more_ghosts_than_keys() -> None:
    policy = S3FIFO()
    for number in range(10_000):
        policy.insert(key(number))
        if len(policy) > 30:
            evict(policy, 1)
    assert len(policy._ghosts) <= 31
    while len(policy):
        evict(policy, 1)
    assert not policy._ghosts


def test_what_is_in_use_is_never_proposed(policy: EvictionPolicy) -> None:
    insert(policy, *range(100))
    leased = set(keys(*range(0, 100, 2)))
    victims = policy.victims(100, lambda one: one not in leased)
    assert sorted(victims) == keys(*range(1, 100, 2))


def test_the_search_ends_when_everything_is_in_use(policy: EvictionPolicy) -> None:
    insert(policy, *range(100))
    for number in range(100):
        for _ in range(3):
            policy.touch(key(number))
    assert policy.victims(5, lambda one: False) == []
    assert len(policy) == 100


def test_leased_keys_do_not_slow_every_search(policy: EvictionPolicy) -> None:
    """Passed-over keys are not met again by the next search, so a long lease costs its length once."""
    insert(policy, *range(2000))
    leased = set(keys(*range(1000)))
    looks = 0

    def is_evictable(one: BlockKey) -> bool:
        nonlocal looks
        looks += 1
        return one not in leased

    for _ in range(500):
        (victim,) = policy.victims(1, is_evictable)
        policy.remove(victim)
    assert looks <= 1000 + 2 * 500


@given(data=st.data(), name=st.sampled_from(sorted(POLICIES)))
def test_a_policy_holds_exactly_what_was_inserted_and_not_removed(data: st.DataObject, name: str) -> None:
    policy, held = POLICIES[name](), set[BlockKey]()
    random = Random(data.draw(st.integers(0, 1 << 32)))
    for action in data.draw(st.lists(st.sampled_from("iitrv"), max_size=80)):
        one = key(random.randrange(12))
        if action == "i":
            policy.insert(one)
            held.add(one)
        elif action == "t":
            policy.touch(one)
        elif action == "r":
            policy.remove(one)
            held.discard(one)
        else:
            leased = {key(random.randrange(12)) for _ in range(4)}
            count = random.randrange(14)
            victims = policy.victims(count, lambda one, leased=leased: one not in leased)
            assert len(victims) == len(set(victims)) == min(count, len(held - leased))
            assert set(victims) <= held - leased
        assert len(policy) == len(held)
