"""Tiers with one fault each, and the checks of the conformance kit that have to find it."""

from __future__ import annotations

import ctypes
import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from world_tier import World, WorldKit, WorldTier

from kvferry.connector.errors import TierError
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.testing import Damage, content_of
from kvferry.connector.tier import Capabilities, Frame, Outcome, Tier, TierContext, TierStats

BROKEN: list[tuple[type[WorldKit], tuple[str, ...]]] = []
"""A kit on a broken tier, and the checks that must fail on it (without ``test_``)."""

Kind = TypeVar("Kind", bound=type)


def fails(*checks: str, kit: type[WorldKit] = WorldKit) -> Callable[[Kind], Kind]:
    """Register a broken tier (or a kit with a broken back door) and what finds it."""

    def register(kind: Kind) -> Kind:
        is_kit = issubclass(kind, WorldKit)
        BROKEN.append((kind if is_kit else type(kind.__name__, (kit,), {"kind": kind}), checks))
        return kind

    return register


# ---- life


@fails("it_has_everything_that_a_tier_has")
class WithoutDelete(WorldTier):
    delete = property()  # type: ignore[assignment]


@fails("capabilities_are_plain_booleans")
class NumbersForClaims(WorldTier):
    claims = Capabilities(is_persistent=1, is_shared=0, is_bounded=1)  # type: ignore[arg-type]


@fails("capabilities_never_change")
class ForgetsItsClaims(WorldTier):
    def close(self) -> None:
        super().close()
        self.claims = Capabilities(is_persistent=False, is_shared=False, is_bounded=True)


@fails("close_may_be_called_twice", "close_may_be_called_by_several_threads_at_once")
class ClosesOnce(WorldTier):
    def close(self) -> None:
        self.require_open()
        super().close()


@fails("an_unused_tier_closes")
class ClosesOnlyWhatWasUsed(WorldTier):
    def close(self) -> None:
        assert self.world.blocks
        super().close()


@fails("it_opens_again_after_it_was_closed")
class LeavesItsLock(WorldTier):
    def __init__(self, context: TierContext, world: World, capacity_bytes: int) -> None:
        assert not world.owner, "locked"
        world.owner = b"me"
        super().__init__(context, world, capacity_bytes)


@fails("a_closed_tier_raises_closed_error", "closing_lets_calls_under_way_end_whole")
class WorksWhenClosed(WorldTier):
    def require_open(self) -> None:
        pass


@fails("no_thread_is_left_when_it_is_closed")
class LeavesAThread(WorldTier):
    def __init__(self, context: TierContext, world: World, capacity_bytes: int) -> None:
        super().__init__(context, world, capacity_bytes)
        threading.Thread(target=time.sleep, args=(2.0,), daemon=True).start()


@fails("stats_say_what_is_held", "stats_count_evictions")
class CountsNothing(WorldTier):
    def stats(self) -> TierStats:
        self.require_open()
        return TierStats(blocks=0, used_bytes=0, capacity_bytes=self.capacity_bytes)


@fails("stats_are_sensible_numbers", "it_says_the_capacity_it_was_given")
class HasNoCapacity(WorldTier):
    def stats(self) -> TierStats:
        return TierStats(blocks=0, used_bytes=0, capacity_bytes=None)


@fails("stats_are_cheap")
class CountsSlowly(WorldTier):
    def stats(self) -> TierStats:
        time.sleep(0.26)
        return super().stats()


# ---- round trip


@fails(
    "a_block_comes_back_bit_for_bit",
    "many_blocks_come_back_one_by_one",
    "a_loaded_block_may_be_stored_elsewhere",
    "storing_again_changes_nothing",
    "loading_takes_nothing_away",
)
class FlipsABit(WorldTier):
    def load_one(self, frame: Frame) -> Outcome:
        outcome = super().load_one(frame)
        frame.payload[7] = (frame.payload[7] + 1) % 256
        return outcome


@fails("a_batch_comes_back_in_any_order")
class LoadsInItsOwnOrder(WorldTier):
    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        mixed = [
            Frame(key, frame.header, frame.payload, frame.length)
            for key, frame in zip(sorted(frame.key for frame in into), into, strict=True)
        ]
        return super().load(mixed)


@fails("the_largest_batch_comes_back")
class TakesSmallBatches(WorldTier):
    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        outcomes = super().store(frames[:32])
        return outcomes + [Outcome.OK] * (len(frames) - len(outcomes))


@fails("blocks_of_any_size_come_back", "a_shorter_body_comes_back")
class ReadsWholeSectors(WorldTier):
    def load_one(self, frame: Frame) -> Outcome:
        raw = self.world.blocks.get(frame.key)
        if raw is not None and len(raw) < HEADER_BYTES + 4096:
            return Outcome.FAILED
        return super().load_one(frame)


@fails("bodies_of_different_lengths_share_a_batch")
class OneLengthForABatch(WorldTier):
    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        return super().store(
            [Frame(frame.key, frame.header, frame.payload, frames[-1].length) for frame in frames]
        )


@fails("an_empty_batch_is_nothing")
class NeedsABlock(WorldTier):
    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        assert keys
        return super().contains(keys)


@fails("a_key_may_come_twice_in_a_store")
class RefusesTwins(WorldTier):
    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        unique = {frame.key: frame for frame in frames}
        return super().store(list(unique.values())) + [Outcome.FAILED] * (len(frames) - len(unique))


@fails("a_key_may_come_twice_in_a_load")
class FillsOneTwin(WorldTier):
    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        found = dict(zip((frame.key for frame in into), super().load(into), strict=True))
        for one, other in itertools.pairwise(into):
            if one.key == other.key or into[0].key == into[-1].key:
                into[-1].payload[:8] = bytes(8)
        return [found[frame.key] for frame in into]


@fails("hostile_keys_come_back", "hostile_keys_are_all_different", "scan_yields_hostile_keys_as_they_are")
class KeysAreText(WorldTier):
    def store_one(self, frame: Frame) -> Outcome:
        return super().store_one(
            Frame(BlockKey(text_of(frame.key)), frame.header, frame.payload, frame.length)
        )

    def load_one(self, frame: Frame) -> Outcome:
        return super().load_one(
            Frame(BlockKey(text_of(frame.key)), frame.header, frame.payload, frame.length)
        )

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return super().contains([BlockKey(text_of(key)) for key in keys])


def text_of(key: bytes) -> bytes:
    return key.split(b"\0")[0].strip()


@fails("a_load_leaves_everything_outside_its_buffers_alone")
class WritesPastItsSlot(WorldTier):
    def load_one(self, frame: Frame) -> Outcome:
        address = np.frombuffer(frame.payload, np.uint8).ctypes.data
        ctypes.memset(address + len(frame.payload), 0, 1)
        return super().load_one(frame)


@fails("a_block_that_is_missing_leaves_the_others_whole")
class ShiftsWhatIsThere(WorldTier):
    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        return sorted(super().load(into), key=lambda outcome: outcome is Outcome.MISSING)


@fails("a_load_overwrites_what_the_buffer_held")
class TrustsTheBuffer(WorldTier):
    def load_one(self, frame: Frame) -> Outcome:
        if bytes(frame.header[:7]) == b"KVFERRY":
            return Outcome.OK
        return super().load_one(frame)


@fails("read_only_buffers_can_be_stored")
class WritesWhereItReads(WorldTier):
    def store_one(self, frame: Frame) -> Outcome:
        frame.header[255] = 0
        return super().store_one(frame)


@fails("a_stored_buffer_may_be_reused_at_once")
class WritesLater(WorldTier):
    def load_one(self, frame: Frame) -> Outcome:
        held = self.world.blocks.get(frame.key)
        if isinstance(held, Frame):
            self.world.blocks[frame.key] = bytes(held.header) + bytes(held.body)
        return super().load_one(frame)

    def put(self, frame: Frame) -> None:
        self.world.blocks[frame.key] = frame  # type: ignore[assignment]

    def used_bytes(self) -> int:
        return 0


@fails("a_loaded_buffer_is_left_alone_afterwards")
class LoadsLater(WorldTier):
    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        threading.Timer(0.02, lambda: [self.load_one(frame) for frame in into]).start()
        return super().load(into)


@fails("the_header_comes_back_as_it_was")
class MakesItsOwnHeader(WorldTier):
    def load_one(self, frame: Frame) -> Outcome:
        outcome = super().load_one(frame)
        if outcome is Outcome.OK:
            frame.header[144:] = bytes(112)
        return outcome


# ---- contents


@fails("an_empty_tier_holds_nothing")
class NeverEmpty(WorldTier):
    def scan(self) -> Iterator[BlockKey]:
        return iter([*super().scan(), BlockKey(bytes(32))])


@fails("contains_answers_each_key_in_order")
class AnswersEachKeyOnce(WorldTier):
    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return super().contains(list(dict.fromkeys(keys)))


@fails("contains_has_no_side_effect")
class CreatesWhatIsAskedFor(WorldTier):
    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        answers = super().contains(keys)
        for key in keys:
            self.world.blocks.setdefault(key, b"")
        return answers


@fails("contains_agrees_with_load", "a_deleted_block_is_missing", "a_deleted_block_can_be_stored_again")
class DeletesTheName(WorldTier):
    def delete(self, keys: Sequence[BlockKey]) -> None:
        self.hidden = getattr(self, "hidden", set()) | set(keys)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        hidden = getattr(self, "hidden", set())
        return [held and key not in hidden for key, held in zip(keys, super().contains(keys), strict=True)]


@fails("any_sequence_of_calls_agrees_with_a_model")
class KeepsOldBytesForADeletedKey(WorldTier):
    def delete(self, keys: Sequence[BlockKey]) -> None:
        self.old = {key: self.world.blocks[key] for key in keys if key in self.world.blocks}
        super().delete(keys)

    def put(self, frame: Frame) -> None:
        super().put(frame)
        self.world.blocks[frame.key] = getattr(self, "old", {}).get(frame.key, self.world.blocks[frame.key])


@fails("deleting_what_is_not_there_is_nothing", "a_block_may_be_deleted_twice")
class DeletesWhatIsThere(WorldTier):
    def delete(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            del self.world.blocks[key]


@fails("deleting_is_no_removal_of_its_own", "deleting_makes_room")
class ReportsDeletes(WorldTier):
    def delete(self, keys: Sequence[BlockKey]) -> None:
        super().delete(keys)
        self.report(keys)


@fails(
    "scan_yields_only_what_is_held",
    "scan_may_run_while_blocks_come_and_go",
    "scan_is_complete_where_kvferry_relies_on_it",
)
class ScansTwice(WorldTier):
    def scan(self) -> Iterator[BlockKey]:
        return itertools.chain(super().scan(), super().scan(), [BlockKey(b"?" * 32)])


@fails("a_scan_may_be_left_unfinished")
class LocksWhileScanning(WorldTier):
    def scan(self) -> Iterator[BlockKey]:
        self.is_scanning = True
        yield from list(self.world.blocks)
        self.is_scanning = False

    def delete(self, keys: Sequence[BlockKey]) -> None:
        assert not self.is_scanning, "database is locked"
        super().delete(keys)


# ---- capacity


@fails(
    "it_never_exceeds_its_capacity",
    "it_never_exceeds_its_capacity_with_batches",
    "it_never_exceeds_its_capacity_with_many_threads",
    "the_capacity_holds_over_a_restart",
)
class NeverEvicts(WorldTier):
    def store_one(self, frame: Frame) -> Outcome:
        with self.world.lock:
            self.put(frame)
        return Outcome.OK


@fails("the_block_stored_last_is_held")
class EvictsTheNewest(WorldTier):
    def store_one(self, frame: Frame) -> Outcome:
        outcome = super().store_one(frame)
        if self.evictions:
            self.world.blocks.pop(frame.key, None)
        return outcome


@fails("evicted_blocks_are_missing_and_the_others_are_right")
class RemembersTheEvicted(WorldTier):
    def evict(self) -> BlockKey:
        key = super().evict()
        self.gone = [*getattr(self, "gone", []), key]
        return key

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        gone = getattr(self, "gone", [])[:3]
        return [held or key in gone for key, held in zip(keys, super().contains(keys), strict=True)]


@fails("evictions_are_reported")
class EvictsSilently(WorldTier):
    def report(self, evicted: Sequence[BlockKey]) -> None:
        pass


@fails("storing_what_is_held_takes_no_room")
class KeepsEveryVersion(WorldTier):
    versions = 0

    def store_one(self, frame: Frame) -> Outcome:
        self.versions += 1
        outcome = super().store_one(frame)
        if self.versions * frame.length > self.capacity_bytes:
            self.evict()
        return outcome


class InHalves(WorldTier):
    """Copies a block in two steps, with whatever happens in between."""

    def load_one(self, frame: Frame) -> Outcome:
        raw = self.world.blocks.get(frame.key)
        if raw is None:
            return Outcome.MISSING
        middle = len(raw) // 2
        time.sleep(0.001)
        frame.header[:] = raw[:HEADER_BYTES]
        frame.payload[: middle - HEADER_BYTES] = raw[HEADER_BYTES:middle]
        time.sleep(0.001)
        frame.payload[middle - HEADER_BYTES : len(raw) - HEADER_BYTES] = raw[middle:]
        return Outcome.OK


@fails("a_block_evicted_while_it_is_loaded_is_never_wrong")
class ReusesTheSpaceOfTheEvicted(InHalves):
    def evict(self) -> BlockKey:
        oldest = next(iter(self.world.blocks))
        space = self.world.blocks[oldest]
        assert isinstance(space, bytearray)
        space[:] = bytes(len(space))
        return super().evict()

    def put(self, frame: Frame) -> None:
        self.world.blocks[frame.key] = bytearray(bytes(frame.header) + bytes(frame.body))  # type: ignore[assignment]


# ---- several threads


@fails(
    "a_reader_never_sees_half_a_block",
    "a_reader_never_sees_half_a_block_that_comes_and_goes",
    "everything_at_once_stays_right",
)
class ShowsBeforeItIsWhole(WorldTier):
    def store_one(self, frame: Frame) -> Outcome:
        if frame.key not in self.world.blocks:
            self.world.blocks[frame.key] = bytes(frame.header) + bytes(frame.length)
            time.sleep(0.002)
            self.world.blocks[frame.key] = bytes(frame.header) + bytes(frame.body)
        return Outcome.OK


@fails("the_same_block_may_be_stored_by_all_at_once")
class RefusesWhatIsBeingStored(WorldTier):
    def store_one(self, frame: Frame) -> Outcome:
        if not self.world.lock.acquire(blocking=False):
            return Outcome.FAILED
        try:
            time.sleep(0.002)
            return super().store_one(frame)
        finally:
            self.world.lock.release()


@fails("a_store_that_is_ok_can_be_loaded_at_once")
class ShowsLater(WorldTier):
    def store_one(self, frame: Frame) -> Outcome:
        copy = Frame(
            frame.key, memoryview(bytes(frame.header)), memoryview(bytes(frame.payload)), frame.length
        )
        threading.Timer(0.01, super().store_one, (copy,)).start()
        return Outcome.OK


@fails("more_threads_than_it_was_told_of_are_served")
class CountsItsConnections(WorldTier):
    busy = 0

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        self.busy += 1
        try:
            time.sleep(0.005)
            if self.busy > self.context.threads + 1:
                raise TierError("world", "no connection left")
            return super().load(into)
        finally:
            self.busy -= 1


@fails("threads_that_come_and_go_leave_nothing_behind")
class OneConnectionPerThread(WorldTier):
    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        self.seen = getattr(self, "seen", 0) + (threading.current_thread() is not threading.main_thread())
        if self.seen > 64:
            raise TierError("world", "too many connections")
        return super().load(into)


@fails("two_tiers_in_two_places_know_nothing_of_each_other")
class OnePlaceForAll(WorldKit):
    def make_tier(self, context: TierContext, place: Path, capacity_bytes: int) -> Tier:
        return super().make_tier(context, self.place, capacity_bytes)


@fails("two_models_in_one_place_never_mix")
class TakesOverThePlace(WorldTier):
    def __init__(self, context: TierContext, world: World, capacity_bytes: int) -> None:
        super().__init__(context, world, capacity_bytes)
        if world.owner not in (b"", context.fingerprint):
            world.blocks = {key: raw[::-1] for key, raw in world.blocks.items()}
        world.owner = context.fingerprint


# ---- restarts


@fails("blocks_survive_a_restart", "many_restarts_lose_nothing", "damaged_bytes_are_seen_after_a_restart_too")
class ForgetsWhenClosed(WorldTier):
    def close(self) -> None:
        super().close()
        self.world.blocks.clear()


@fails("shorter_bodies_survive_a_restart")
class KeepsNoLength(WorldTier):
    def close(self) -> None:
        super().close()
        self.world.blocks = {key: raw[:1000] for key, raw in self.world.blocks.items()}


@fails("deleted_blocks_stay_deleted_over_a_restart")
class BringsBackTheDead(WorldTier):
    def delete(self, keys: Sequence[BlockKey]) -> None:
        self.dead = {key: self.world.blocks[key] for key in keys}
        super().delete(keys)

    def close(self) -> None:
        super().close()
        self.world.blocks |= getattr(self, "dead", {})


@fails("a_restart_is_never_wrong")
class WrongAfterARestart(WorldTier):
    def close(self) -> None:
        super().close()
        self.world.blocks = {key: raw[:-1] + b"!" for key, raw in self.world.blocks.items()}


class Shared(WorldTier):
    claims = Capabilities(is_persistent=True, is_shared=True, is_bounded=True)


@fails("two_users_of_one_place_see_the_same", "two_users_of_one_place_work_at_the_same_time")
class IsNotShared(Shared):
    def __init__(self, context: TierContext, world: World, capacity_bytes: int) -> None:
        super().__init__(context, World(), capacity_bytes)


@fails("closing_one_user_leaves_the_other_at_work")
class ClosesForAll(Shared):
    def close(self) -> None:
        super().close()
        self.world.is_alive = False


@fails("a_killed_process_leaves_whole_blocks", "another_process_stores_what_this_one_loads")
class InAnotherWorld(WorldKit):
    """Claims to be persistent, but each process has a world of its own."""

    plugins = ("world_plugin",)

    def configuration(self, place: Path, capacity_bytes: int) -> dict[str, object]:
        return {"type": "world"}


# ---- the outside


@fails("damaged_bytes_never_pass_for_the_block", "a_damaged_block_can_be_replaced")
class ParsesWhatItReads(WorldTier):
    def load_one(self, frame: Frame) -> Outcome:
        raw = self.world.blocks.get(frame.key)
        if raw is not None:
            struct.unpack(f"<256s{frame.length}s", raw)
        return super().load_one(frame)


@fails("damage_is_really_done")
class DamagesNothing(WorldKit):
    def damage(self, tier: Tier, place: Path, key: BlockKey, how: Damage) -> None:
        world = self.worlds()[place]
        world.blocks[key] = self.blocks.raw(key)[:HEADER_BYTES] + content_of(key, self.layout.payload_bytes)
        self.blocks.verify = lambda frame, length=None: None  # type: ignore[method-assign]


@fails("a_full_medium_is_an_outcome")
class RaisesWhenFull(WorldTier):
    def store_one(self, frame: Frame) -> Outcome:
        if self.world.is_full:
            raise OSError(28, "No space left on device")
        return super().store_one(frame)


@fails(
    "a_call_ends_though_nothing_answers",
    "threads_give_up_side_by_side",
    "it_works_again_when_answers_come_again",
    "a_buffer_is_left_alone_after_a_call_was_given_up",
)
class WaitsTooLong(WorldTier):
    def reach(self) -> None:
        self.require_open()
        if not self.world.is_awake.wait(self.context.deadline_s + 0.6):
            raise OSError("timed out")
        super().reach()


@fails("stats_and_close_do_not_wait_for_an_answer")
class AsksForStats(WorldTier):
    def stats(self) -> TierStats:
        self.world.is_awake.wait(1.0)
        return super().stats()


@fails("a_call_fails_when_the_other_side_is_gone", "it_does_not_open_where_nothing_answers")
class PassesErrorsOn(WorldTier):
    def reach(self) -> None:
        self.require_open()
        if not self.world.is_alive:
            raise ConnectionError("refused")


@fails("it_works_again_when_the_other_side_is_back")
class NeverConnectsAgain(WorldTier):
    was_dead = False

    def reach(self) -> None:
        self.was_dead = self.was_dead or not self.world.is_alive
        if self.was_dead:
            raise TierError("world", "connection lost")
        super().reach()
