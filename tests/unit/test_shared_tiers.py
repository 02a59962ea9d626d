"""Tiers that others write to: they are asked, the answers are remembered, and forgetting costs a question."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from manager_kit import A, assert_nothing_leaks, finish, late, make, prefetch, save

from kvferry.connector.asking import Asking
from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import BlockManager, LowerTierSpec, ManagerOptions
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.policy import LRU
from kvferry.connector.service import MissReason
from kvferry.connector.tier import Outcome

REDIS, S3 = "redis", "s3"
MANY = [BlockKey(number.to_bytes(32, "big")) for number in range(200)]


def shared(slots: int = 16, tiers: Sequence[str] = (REDIS,), **options: object) -> BlockManager:
    specs = [LowerTierSpec(name=name, is_shared=True) for name in tiers]
    if not options:
        return make(slots, specs=specs)
    return BlockManager(slots, LRU(), specs, ManagerOptions(**options))  # type: ignore[arg-type]


def ask(manager: BlockManager, keys: Sequence[BlockKey], now: float = 0.0) -> list[Transfer]:
    """Let a request want ``keys``; return the questions that this plans."""
    transfers = prefetch(manager, "reader", keys, now).transfers
    assert all(one.direction in (Direction.ASK, Direction.LOAD) for one in transfers)
    return [one for one in transfers if one.direction is Direction.ASK]


def answer(
    manager: BlockManager, questions: Sequence[Transfer], held: Sequence[BlockKey], now: float = 0.0
) -> None:
    for question in questions:
        outcomes = tuple(Outcome.OK if key in held else Outcome.MISSING for key in question.keys)
        assert manager.on_result(TransferResult(question, outcomes, True), now) == []


def test_a_block_nobody_was_asked_for_may_be_there() -> None:
    assert shared().lookup(A[:3], 0.0) == (0, 0, (), MissReason.NOT_ASKED)


def test_a_prefetch_asks_and_the_answers_make_blocks_reachable() -> None:
    manager = shared()
    coming, questions = prefetch(manager, "reader", A[:3], 0.0)
    assert coming == 3  # worth waiting for: the tier may have all three
    assert [(one.direction, one.keys) for one in questions] == [(Direction.ASK, tuple(A[:3]))]
    answer(manager, questions, held=A[:2])
    assert manager.lookup(A[:3], 0.0) == (0, 2, (REDIS, REDIS), MissReason.NEVER_STORED)
    coming, loads = prefetch(manager, "reader", A[:3], 0.0)
    assert (coming, [one.direction for one in loads]) == (2, [Direction.LOAD])
    finish(manager, loads)
    assert manager.lookup(A[:2], 0.0).ready == 2
    manager.release_owner("reader")
    assert_nothing_leaks(manager)


def test_a_prompt_nobody_has_seen_costs_one_small_question() -> None:
    manager = shared()
    questions = ask(manager, MANY)
    assert [len(one.keys) for one in questions] == [8]
    answer(manager, questions, held=[])
    assert ask(manager, MANY) == []
    assert prefetch(manager, "reader", MANY, 0.0).coming == 0


def test_each_good_answer_doubles_the_next_question() -> None:
    manager = shared(slots=256)
    sizes = []
    while questions := ask(manager, MANY):
        sizes.append(sum(len(one.keys) for one in questions))
        answer(manager, questions, held=MANY)
    assert sizes == [8, 8, 16, 32, 64, 72]
    assert manager.lookup(MANY, 0.0).reachable == 200


def test_requests_share_a_question() -> None:
    manager = shared()
    questions = ask(manager, A[:3])
    coming, transfers = prefetch(manager, "another reader", A[:3], 0.0)
    assert (coming, transfers) == (3, [])
    answer(manager, questions, held=A[:3])
    assert manager.lookup(A[:3], 0.0).reachable == 3


def test_tiers_are_asked_one_after_the_other() -> None:
    manager = shared(tiers=(REDIS, S3))
    first = ask(manager, A[:2])
    assert {one.tier for one in first} == {REDIS}
    answer(manager, first, held=[A[0]])
    second = ask(manager, A[:2])
    assert [(one.tier, one.keys) for one in second] == [(S3, (A[1],))]
    answer(manager, second, held=A)
    assert manager.lookup(A[:2], 0.0).tiers == (REDIS, S3)


def test_an_absent_block_is_asked_for_again_after_a_while() -> None:
    manager = shared()
    answer(manager, ask(manager, A[:1]), held=[])
    assert ask(manager, A[:1], now=1.9) == []
    assert manager.lookup(A[:1], 1.9).missing is MissReason.NEVER_STORED
    assert manager.lookup(A[:1], 2.0).missing is MissReason.NOT_ASKED
    assert len(ask(manager, A[:1], now=2.0)) == 1


def test_what_this_engine_stored_need_not_be_asked_for() -> None:
    manager = shared(slots=2)
    finish(manager, save(manager, A[:2]))
    finish(manager, save(manager, A[2:4]))  # evicts the first two
    assert ask(manager, A[:2]) == []
    assert manager.lookup(A[:2], 0.0).tiers == (REDIS, REDIS)


def test_a_block_that_others_removed_is_a_miss_and_not_asked_for_at_once() -> None:
    manager = shared()
    answer(manager, ask(manager, A[:1]), held=A)
    finish(manager, prefetch(manager, "reader", A[:1], 0.0).transfers, Outcome.MISSING)
    assert manager.lookup(A[:1], 0.0) == (0, 0, (), MissReason.EVICTED)
    assert ask(manager, A[:1]) == []
    assert len(ask(manager, A[:1], now=2.0)) == 1


def test_a_tier_that_fails_to_answer_is_a_miss_for_a_while() -> None:
    manager = shared()
    finish(manager, ask(manager, A[:2]), Outcome.FAILED)
    assert manager.lookup(A[:2], 0.0) == (0, 0, (), MissReason.TIER_DOWN)
    assert prefetch(manager, "reader", A[:2], 0.0) == (0, [])
    assert len(ask(manager, A[:2], now=2.0)) == 1


def test_nobody_waits_for_a_late_answer_but_it_counts() -> None:
    manager = shared()
    questions = ask(manager, A[:2])
    late(manager, questions)
    assert manager.lookup(A[:2], 0.0).missing is MissReason.DEADLINE
    assert prefetch(manager, "reader", A[:2], 0.0) == (0, [])
    answer(manager, questions, held=A[:2])
    assert manager.lookup(A[:2], 2.0).reachable == 2


def test_a_tier_that_is_switched_off_is_not_asked() -> None:
    manager = shared()
    manager.set_tier_available(REDIS, False)
    assert manager.lookup(A[:2], 0.0) == (0, 0, (), MissReason.TIER_DOWN)
    assert prefetch(manager, "reader", A[:2], 0.0) == (0, [])
    manager.set_tier_available(REDIS, True)
    assert len(ask(manager, A[:2])) == 1


def test_a_block_in_the_arena_behind_a_question_counts() -> None:
    manager = shared()
    finish(manager, save(manager, [A[1]]))
    questions = ask(manager, A[:3])
    assert [one.keys for one in questions] == [(A[0], A[2])]
    answer(manager, questions, held=[A[0]])
    assert manager.lookup(A[:3], 0.0).reachable == 2


def test_what_is_known_of_a_shared_tier_is_bounded_and_forgetting_costs_a_question() -> None:
    manager = shared(answered_blocks=10)
    for first in range(0, 40, 8):
        answer(manager, ask(manager, MANY[first : first + 8]), held=MANY)
        manager.release_owner("reader")
    assert manager.occupancy.blocks_below <= 10
    assert manager.lookup(MANY[:1], 0.0).missing is MissReason.NOT_ASKED
    assert manager.lookup(MANY[39:40], 0.0).reachable == 1


def test_a_clear_forgets_what_was_answered_and_what_is_being_asked_but_deletes_nothing_of_others() -> None:
    manager = shared()
    answer(manager, ask(manager, A[:1]), held=A)
    loads = prefetch(manager, "reader", A[:1], 0.0).transfers
    questions = ask(manager, A[1:3])
    assert manager.clear(0.0) == []
    finish(manager, loads)
    answer(manager, questions, held=A)
    assert manager.lookup(A[:3], 0.0) == (0, 0, (), MissReason.NOT_ASKED)
    assert_nothing_leaks(manager)


@pytest.mark.parametrize("count", [1, 7, 150])
def test_memories_of_answers_are_bounded(count: int) -> None:
    asking = Asking(shared=1, limit=7, absent_s=1.0)
    asking.absent(MANY[:count], 1, 0.0)
    remembered = [key for key in MANY[:count] if not asking.open(key, 0.0)]
    assert remembered == MANY[max(0, count - 7) : count]
    assert len(asking.held(MANY[:count], 1)) == max(0, count - 7)


def test_a_tier_of_this_process_alone_is_never_asked() -> None:
    asking = Asking(shared=0b10, limit=7, absent_s=1.0)
    asking.absent(A, 0b01, 0.0)
    assert asking.held(A, 0b01) == []
    assert asking.open(A[0], 0.0) == 0b10
