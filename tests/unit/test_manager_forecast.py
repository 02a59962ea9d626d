"""The manager asks a tier only for what is expected to arrive before the engine would have computed it."""

from __future__ import annotations

from collections.abc import Collection

from manager_kit import DISK, S3, A, finish, make, save

from kvferry.connector.keys import BlockKey
from kvferry.connector.manager import BlockManager, LowerTierSpec
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.service import MissReason
from kvferry.connector.tier import Outcome

FAST_S, SLOW_S = 0.001, 1.0


def took(manager: BlockManager, loads: list[Transfer], block_s: float, now: float) -> None:
    """End loads that took ``block_s`` for each of their blocks."""
    for load in loads:
        outcomes = (Outcome.OK,) * len(load.keys)
        manager.on_result(
            TransferResult(load, outcomes, True, duration_s=block_s * len(load.keys), queued_s=0.0), now
        )


def learned(speeds: dict[str, float], **options: bool) -> BlockManager:
    """A manager that has loaded from each tier at its speed; each then holds ``A[8:16]`` in turn."""
    manager = make(8, specs=[LowerTierSpec(name=name, **options) for name in speeds])
    for number, (name, block_s) in enumerate(speeds.items()):
        manager.on_tier_scanned(name, A[2 * number : 2 * number + 2], is_complete=True)
        loads = manager.prefetch("first", A[2 * number : 2 * number + 2], 0.0).transfers
        took(manager, loads, block_s, 4.0)
    manager.release_owner("first")
    return manager


def test_everything_is_asked_for_while_nothing_is_known() -> None:
    manager = make(8, (S3,))
    manager.on_tier_scanned(S3, A[:4], is_complete=True)
    coming, loads = manager.prefetch("r", A[:4], 0.0, block_s=0.000001)
    assert (coming.blocks, sum(len(load.keys) for load in loads)) == (4, 4)


def test_a_tier_slower_than_the_engine_is_not_asked() -> None:
    manager = learned({S3: SLOW_S})
    manager.on_tier_scanned(S3, A[8:12], is_complete=True)
    coming, loads = manager.prefetch("r", A[8:12], 5.0, block_s=0.1)
    assert (coming.blocks, coming.cut, loads) == (0, MissReason.SLOWER, [])
    assert coming.expected_s is not None
    assert coming.expected_s > 4 * 0.1


def test_it_is_asked_when_the_engine_is_slower_or_its_speed_is_not_known() -> None:
    for block_s in (10.0, None):
        manager = learned({S3: SLOW_S})
        manager.on_tier_scanned(S3, A[8:12], is_complete=True)
        assert manager.prefetch("r", A[8:12], 5.0, block_s=block_s).coming.blocks == 4


def test_a_tier_can_be_asked_always() -> None:
    manager = learned({S3: SLOW_S}, is_always_asked=True)
    manager.on_tier_scanned(S3, A[8:12], is_complete=True)
    assert manager.prefetch("r", A[8:12], 5.0, block_s=0.1).coming.blocks == 4


def test_a_prefix_is_cut_where_a_slow_tier_begins() -> None:
    manager = learned({DISK: FAST_S, S3: SLOW_S})
    manager.on_tier_scanned(DISK, A[8:10], is_complete=True)
    manager.on_tier_scanned(S3, A[10:12], is_complete=True)
    coming, loads = manager.prefetch("r", A[8:12], 5.0, block_s=0.1)
    assert (coming.blocks, coming.cut) == (2, MissReason.SLOWER)
    assert {load.tier for load in loads} == {DISK}


def test_blocks_in_the_arena_are_always_taken() -> None:
    manager = learned({S3: SLOW_S})
    finish(manager, save(manager, A[8:10]))
    manager.on_tier_scanned(S3, A[10:12], is_complete=True)
    assert manager.prefetch("r", A[8:12], 5.0, block_s=0.1).coming.blocks == 2


def test_what_an_owner_waits_for_already_is_not_given_up() -> None:
    manager = learned({S3: SLOW_S})
    manager.on_tier_scanned(S3, A[8:12], is_complete=True)
    assert manager.prefetch("r", A[8:12], 5.0, block_s=None).coming.blocks == 4
    assert manager.prefetch("r", A[8:12], 5.0, block_s=0.1).coming.blocks == 4


def test_a_slow_tier_is_probed_now_and_then_while_nobody_waits() -> None:
    manager = learned({S3: SLOW_S})
    manager.on_tier_scanned(S3, A[8:14], is_complete=True)
    coming, loads = manager.prefetch("r", A[8:14], 60.0, block_s=0.1)
    assert coming.blocks == 0
    assert sum(len(load.keys) for load in loads) == 4
    assert manager.prefetch("r", A[8:14], 60.05, block_s=0.1) == (coming, [])
    took(manager, loads, FAST_S, 60.1)
    assert manager.prefetch("other", A[8:14], 60.2, block_s=0.1).coming.blocks == 6


def shared(speed_s: float) -> BlockManager:
    """A manager that knows how fast its one tier is, but not what others put into it."""
    manager = make(16, specs=[LowerTierSpec(name=S3, is_shared=True)])
    answer(manager, manager.prefetch("first", A[:2], 0.0).transfers, 0.0, A[:2])
    took(manager, manager.prefetch("first", A[:2], 0.0).transfers, speed_s, 4.0)
    manager.release_owner("first")
    return manager


def answer(manager: BlockManager, asks: list[Transfer], now: float, held: Collection[BlockKey]) -> None:
    """Let a tier say which blocks it holds."""
    for ask in asks:
        outcomes = tuple(Outcome.OK if key in held else Outcome.MISSING for key in ask.keys)
        manager.on_result(TransferResult(ask, outcomes, True), now)


def test_an_answer_is_not_waited_for_when_it_could_not_matter() -> None:
    manager = shared(SLOW_S)
    coming, asks = manager.prefetch("r", A[8:16], 5.0, block_s=0.1)
    assert (coming.blocks, coming.cut) == (0, MissReason.SLOWER)
    assert [ask.direction for ask in asks] == [Direction.ASK], "others may need it"


def test_blocks_not_worth_loading_alone_are_not_cut_off_while_more_may_follow() -> None:
    manager = make(32, specs=[LowerTierSpec(name=S3, is_shared=True)])
    answer(manager, manager.prefetch("first", A[:2], 0.0).transfers, 0.0, A)
    for load in manager.prefetch("first", A[:2], 0.0).transfers:
        done = (Outcome.OK,) * len(load.keys)
        manager.on_result(TransferResult(load, done, True, duration_s=0.2), 0.2)
    rest, block_s = A[2:], 0.06
    coming, asks = manager.prefetch("r", rest, 1.0, block_s)
    assert coming.blocks == sum(len(ask.keys) for ask in asks) < len(rest)
    answer(manager, asks, 1.0, A)
    assert manager.prefetch("short", rest[: coming.blocks], 1.0, block_s).coming.blocks == 0
    while asks:
        before, (coming, transfers) = coming, manager.prefetch("r", rest, 1.0, block_s)
        asks = [transfer for transfer in transfers if transfer.direction is Direction.ASK]
        assert coming.blocks > before.blocks or not asks
        answer(manager, asks, 1.0, A)
    assert coming.blocks == len(rest)
