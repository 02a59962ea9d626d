"""The mover against tiers that work, fail, lie, hang and die."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvferry.connector.arena import Arena
from kvferry.connector.config import TierConfig
from kvferry.connector.errors import ConfigError, TierError
from kvferry.connector.frame import FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.connector.mover import Mover
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.tier import Capabilities, Frame, Outcome, TierContext, TierStats

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=16, head_dim=16, itemsize=2)
SLOTS = 64
FINGERPRINT = bytes(32)
DEADLINE_S = 20.0
"""How long a test waits for what must happen; far more than it takes."""

OK, MISSING, NO_ROOM, FAILED = Outcome.OK, Outcome.MISSING, Outcome.NO_ROOM, Outcome.FAILED


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "little"))


def content(number: int, length: int = LAYOUT.payload_bytes) -> bytes:
    return (number.to_bytes(4, "little") * length)[:length]


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fast_clock() -> float:
    """50 seconds in one: breakers that opened close again soon."""
    return time.monotonic() * 50


class GatedTier:
    """Holds frames in a dict; every call waits until the test opens the gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.blocks: dict[BlockKey, tuple[bytes, bytes]] = {}
        self.calls: list[str] = []
        self.entered = threading.Semaphore(0)
        self.threads: set[str] = set()
        self.fault: Callable[[str], object] = lambda call: None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(is_persistent=False, is_shared=False, is_bounded=False)

    def _enter(self, call: str) -> object:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)
        self.entered.release()
        assert self.gate.wait(DEADLINE_S)
        return self.fault(call)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [each in self.blocks for each in keys]

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        answer = self._enter("load")
        for frame in into:
            if frame.key in self.blocks:
                frame.header[:], frame.payload[:] = self.blocks[frame.key]
        return answer or [OK if frame.key in self.blocks else MISSING for frame in into]

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        answer = self._enter("store")
        for frame in frames:
            self.blocks[frame.key] = (bytes(frame.header), bytes(frame.payload))
        return answer or [OK] * len(frames)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        self._enter("delete")
        for each in keys:
            self.blocks.pop(each, None)

    def scan(self) -> Iterator[BlockKey]:
        yield from self.blocks

    def stats(self) -> TierStats:
        return TierStats(blocks=len(self.blocks), used_bytes=0, capacity_bytes=None)

    def close(self) -> None:
        pass


class Bench:
    """A mover over an arena and gated tiers, driven by hand."""

    def __init__(self, *names: str, **options: object) -> None:
        self.arena = Arena.create(SLOTS, LAYOUT.slot_bytes)
        self.clock = Clock()
        self.tiers = {name: GatedTier() for name in names or ("disk",)}
        self.tier = next(iter(self.tiers.values()))
        settings = {"threads": 2, "queue_blocks": 8, "deadline_s": 5.0, **options}
        self.mover = Mover(
            [(TierConfig(type="gated", name=name, **settings), tier) for name, tier in self.tiers.items()],
            seal=FrameSeal(FINGERPRINT, LAYOUT.payload_bytes),
            slot=self.arena.slot,
            clock=self.clock,
        )
        self._ids = iter(range(1, 1 << 30))

    def fill(self, slot: int, number: int) -> None:
        self.arena.slot(slot)[: LAYOUT.payload_bytes] = content(number)

    def submit(self, direction: Direction, numbers: Sequence[int], slots: Sequence[int] = (), tier: str = ""):
        transfer = Transfer(
            next(self._ids),
            direction,
            tier or next(iter(self.tiers)),
            tuple(key(number) for number in numbers),
            tuple(slots),
        )
        self.mover.submit([transfer], self.clock.now)
        return transfer

    def store(self, numbers: Sequence[int], slots: Sequence[int], tier: str = "") -> Transfer:
        for number, slot in zip(numbers, slots, strict=True):
            self.fill(slot, number)
        return self.submit(Direction.STORE, numbers, slots, tier)

    def load(self, numbers: Sequence[int], slots: Sequence[int], tier: str = "") -> Transfer:
        return self.submit(Direction.LOAD, numbers, slots, tier)

    def await_results(self, count: int = 1) -> list[TransferResult]:
        results: list[TransferResult] = []
        end = time.monotonic() + DEADLINE_S
        while len(results) < count:
            assert time.monotonic() < end, f"{len(results)} of {count} results"
            results += self.mover.poll(self.clock.now)
            time.sleep(0.001)
        return results

    def outcomes(self, count: int = 1) -> list[tuple[Outcome, ...]]:
        return [result.outcomes for result in self.await_results(count)]

    def close(self) -> None:
        for tier in self.tiers.values():
            tier.gate.set()
        self.mover.close(DEADLINE_S)
        self.arena.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def create(*names: str, **options: object) -> Bench:
        made.append(Bench(*names, **options))
        return made[-1]

    yield create
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()


def test_what_was_stored_is_loaded_byte_for_byte(bench: Bench) -> None:
    bench.store([1, 2, 3], [0, 1, 2])
    assert bench.outcomes() == [(OK, OK, OK)]
    bench.load([3, 9, 1], [10, 11, 12])
    assert bench.outcomes() == [(OK, MISSING, OK)]
    assert bytes(bench.arena.slot(10)[: LAYOUT.payload_bytes]) == content(3)
    assert bytes(bench.arena.slot(12)[: LAYOUT.payload_bytes]) == content(1)
    totals = bench.mover.counters()["disk"]
    assert (totals.stored_blocks, totals.loaded_blocks, totals.missing_loads) == (3, 2, 1)
    assert totals.loaded_bytes == 2 * LAYOUT.payload_bytes
    assert not bench.mover.has_pending()


def test_calls_of_a_tier_are_counted_by_how_long_they_took(bench: Bench) -> None:
    bench.store([1], [0])
    bench.await_results()
    bench.load([1], [1])
    bench.load([1], [2])
    bench.await_results(2)
    counted = bench.mover.counters()["disk"]
    assert (sum(counted.store_buckets), sum(counted.load_buckets)) == (1, 2)
    counted.load_buckets[0] += 100
    assert sum(bench.mover.counters()["disk"].load_buckets) == 2  # the first was a copy


def test_what_no_thread_began_is_not_counted_as_fast(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.mover.close(DEADLINE_S)
    bench.load([1], [0])
    bench.await_results()
    assert sum(bench.mover.counters()["disk"].load_buckets) == 0


def test_deletes_reach_the_tier(bench: Bench) -> None:
    bench.store([1, 2], [0, 1])
    bench.await_results()
    bench.submit(Direction.DELETE, [1])
    assert bench.outcomes() == [(OK,)]
    assert list(bench.tier.blocks) == [key(2)]


def test_threads_have_the_tiers_name(bench: Bench) -> None:
    bench.store([1], [0])
    bench.await_results()
    assert bench.tier.threads <= {"kvferry-disk-0", "kvferry-disk-1"}


def test_a_tier_cannot_change_the_block_it_stores(bench: Bench) -> None:
    def scribble(frames: Sequence[Frame]) -> list[Outcome]:
        frames[0].payload[0] = 1
        return [OK]

    bench.tier.store = scribble  # type: ignore[method-assign]
    bench.store([5], [0])
    (result,) = bench.await_results()
    assert result.outcomes == (FAILED,)
    assert "read-only" in result.error
    assert bytes(bench.arena.slot(0)[: LAYOUT.payload_bytes]) == content(5)


@pytest.mark.parametrize(
    ("reason", "damage"),
    [
        ("checksum", lambda header, payload: payload.__setitem__(7, payload[7] ^ 1)),
        (
            "checksum",
            lambda header, payload: payload.__setitem__(slice(100, None), bytes(len(payload) - 100)),
        ),
        ("header", lambda header, payload: header.__setitem__(90, header[90] ^ 1)),
        ("magic", lambda header, payload: header.__setitem__(slice(0, 8), bytes(8))),
    ],
)
def test_damaged_blocks_are_refused_and_named(bench: Bench, reason: str, damage: Callable[..., None]) -> None:
    bench.store([1, 2], [0, 1])
    bench.await_results()
    header, payload = (bytearray(part) for part in bench.tier.blocks[key(1)])
    damage(header, payload)
    bench.tier.blocks[key(1)] = (bytes(header), bytes(payload))
    bench.load([1, 2], [5, 6])
    (result,) = bench.await_results()
    assert result.outcomes == (FAILED, OK)
    assert (result.refused, result.refused_keys) == ((reason,), (key(1),))
    assert bench.mover.counters()["disk"].refused == {reason: 1}
    assert list(bench.tier.blocks) == [key(2)]  # nobody meets the damaged one again


def test_a_refusal_stands_when_the_block_cannot_be_deleted(bench: Bench) -> None:
    def fault(call: str) -> None:
        if call == "delete":
            raise TierError("disk", "read-only")

    bench.tier.fault = fault
    bench.tier.blocks[key(1)] = (bytes(256), bytes(LAYOUT.slot_bytes))
    bench.load([1], [5])
    (result,) = bench.await_results()
    assert (result.outcomes, result.refused, result.error) == ((FAILED,), ("magic",), "")


def test_another_blocks_frame_is_refused(bench: Bench) -> None:
    bench.store([1, 2], [0, 1])
    bench.await_results()
    bench.tier.blocks[key(1)] = bench.tier.blocks[key(2)]
    bench.load([1], [5])
    (result,) = bench.await_results()
    assert result.refused == ("key",)


def test_refused_blocks_do_not_open_the_breaker(bench: Bench) -> None:
    for _ in range(6):
        bench.tier.blocks[key(1)] = (bytes(256), bytes(LAYOUT.slot_bytes))
        bench.load([1], [5])
        assert bench.outcomes() == [(FAILED,)]
    assert bench.mover.counters()["disk"].breaker == "closed"


@pytest.mark.parametrize("error", [TierError("disk", "gone"), RuntimeError("bug"), SystemExit(3)])
def test_whatever_a_tier_raises_is_a_failed_transfer(bench: Bench, error: BaseException) -> None:
    def fault(call: str) -> None:
        raise error

    bench.tier.fault = fault
    bench.store([1], [0])
    bench.load([1], [1])
    results = bench.await_results(2)
    assert all(result.outcomes == (FAILED,) and result.error for result in results)
    bench.tier.fault = lambda call: None
    bench.store([2], [2])
    assert bench.outcomes() == [(OK,)]  # the threads live


@pytest.mark.parametrize("answer", [[OK], [OK] * 3, "ok", [1, 2], [True, True]])
def test_an_answer_of_the_wrong_shape_is_a_failure(bench: Bench, answer: object) -> None:
    bench.tier.fault = lambda call: answer
    bench.load([1, 2], [0, 1])
    (result,) = bench.await_results()
    assert result.outcomes == (FAILED, FAILED)
    assert "did not return one Outcome for each" in result.error


def test_failures_are_logged_once_per_kind(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def fault(call: str) -> None:
        raise TierError("disk", "gone")

    bench.tier.fault = fault
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            bench.store([number], [number])
            bench.await_results()
    assert caplog.text.count("gone") == 1


def test_a_full_queue_sheds_stores_at_once(make: Callable[..., Bench]) -> None:
    bench = make(threads=1, queue_blocks=4)
    bench.tier.gate.clear()
    bench.store([1, 2], [0, 1])
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)  # in the tier's hands now
    bench.store([3, 4, 5], [2, 3, 4])
    bench.store([6, 7], [5, 6])
    results = bench.mover.poll(bench.clock.now)
    assert [result.outcomes for result in results] == [(NO_ROOM, NO_ROOM)]
    assert bench.mover.counters()["disk"].queued_blocks == 3
    bench.tier.gate.set()
    assert sorted(map(len, bench.outcomes(2))) == [2, 3]
    totals = bench.mover.counters()["disk"]
    assert (totals.stored_blocks, totals.shed_stores, totals.no_room_stores) == (5, 2, 0)


def test_loads_overtake_waiting_stores(make: Callable[..., Bench]) -> None:
    bench = make(threads=1, queue_blocks=64)
    bench.tier.gate.clear()
    bench.store([0], [0])
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    for number in range(1, 5):
        bench.store([number], [number])
    bench.load([0], [9])
    bench.tier.gate.set()
    bench.await_results(6)
    assert bench.tier.calls == ["store", "load", "store", "store", "store", "store"]


def test_stores_leave_a_thread_for_loads(make: Callable[..., Bench]) -> None:
    bench = make(threads=2, queue_blocks=64)
    bench.tier.gate.clear()
    for number in range(4):
        bench.store([number], [number])
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    bench.load([0], [9])
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    assert bench.tier.calls == ["store", "load"]
    bench.tier.gate.set()
    bench.await_results(5)


def test_a_late_load_is_reported_missed_first_and_finished_when_it_returns(bench: Bench) -> None:
    bench.store([1], [0])
    bench.await_results()
    bench.tier.gate.clear()
    bench.load([1], [5])
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    assert bench.mover.poll(bench.clock.now) == []
    bench.clock.now += 5.01
    (early,) = bench.mover.poll(bench.clock.now)
    assert (early.is_finished, early.outcomes) == (False, (FAILED,))
    assert bench.mover.poll(bench.clock.now) == []  # reported once
    assert bench.mover.has_pending()
    bench.tier.gate.set()
    (final,) = bench.await_results()
    assert (final.is_finished, final.outcomes) == (True, (OK,))
    assert final.transfer is early.transfer
    assert bench.mover.counters()["disk"].late_transfers == 1


def test_a_load_that_never_left_the_queue_ends_at_its_deadline(make: Callable[..., Bench]) -> None:
    bench = make(threads=1)
    bench.tier.gate.clear()
    bench.load([1], [0])
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    waiting = bench.load([2], [1])
    bench.clock.now += 5.01
    results = bench.mover.poll(bench.clock.now)
    assert [(result.transfer.keys, result.is_finished) for result in results] == [
        ((key(1),), False),
        ((key(2),), True),
    ]
    assert results[1].transfer is waiting
    bench.tier.gate.set()
    bench.await_results()
    assert bench.tier.calls == ["load"]


def test_a_store_may_wait_in_the_queue_for_longer_than_the_deadline(make: Callable[..., Bench]) -> None:
    bench = make(threads=1)
    bench.tier.gate.clear()
    bench.load([9], [9])
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    bench.store([1], [0])
    bench.clock.now += 6
    assert [result.transfer.direction for result in bench.mover.poll(bench.clock.now)] == [Direction.LOAD]
    bench.tier.gate.set()
    assert sorted(str(outcome) for outcome in bench.outcomes(2)) == sorted([str((MISSING,)), str((OK,))])


def test_repeated_failures_open_the_breaker_and_a_probe_closes_it(bench: Bench) -> None:
    def fault(call: str) -> None:
        raise TierError("disk", "gone")

    bench.tier.fault = fault
    for number in range(3):
        bench.load([number], [number])
        bench.await_results()
    assert not bench.mover.is_available("disk", bench.clock.now)
    calls = len(bench.tier.calls)
    bench.load([1], [1])
    bench.store([2], [2])
    at_once = bench.mover.poll(bench.clock.now)
    assert [result.outcomes for result in at_once] == [(FAILED,), (NO_ROOM,)]
    assert len(bench.tier.calls) == calls  # the tier was left in peace
    bench.tier.fault = lambda call: None
    bench.clock.now += 1.01
    assert bench.mover.is_available("disk", bench.clock.now)
    bench.load([1], [1])
    assert bench.outcomes() == [(MISSING,)]
    assert bench.mover.counters()["disk"].breaker == "closed"


def test_an_opening_breaker_empties_the_queue(make: Callable[..., Bench]) -> None:
    bench = make(threads=1, queue_blocks=64)

    def fault(call: str) -> None:
        raise TierError("disk", "gone")

    bench.tier.fault = fault
    for number in range(3):
        bench.load([number], [number])
        bench.await_results()
        bench.clock.now += 0.1
    bench.clock.now += 2
    bench.tier.gate.clear()
    bench.load([1], [1])  # the probe
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    bench.load([2], [2])
    bench.tier.gate.set()
    assert bench.outcomes(2) == [(FAILED,), (FAILED,)]
    assert not bench.mover.has_pending()


def test_a_deadline_that_opens_the_breaker_ends_waiting_loads_once(make: Callable[..., Bench]) -> None:
    bench = make(threads=1, queue_blocks=64)

    def fault(call: str) -> None:
        raise TierError("disk", "gone")

    bench.tier.fault = fault
    for number in range(2):
        bench.load([number], [number])
        bench.await_results()
    bench.tier.gate.clear()
    bench.load([7], [7])
    while bench.tier.calls != ["load"] * 3:
        assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    bench.load([8], [8])
    bench.clock.now += 5.01
    results = bench.mover.poll(bench.clock.now)
    assert [(result.transfer.keys, result.is_finished) for result in results] == [
        ((key(7),), False),
        ((key(8),), True),
    ]
    assert bench.mover.counters()["disk"].breaker == "open"


def test_a_dead_tier_does_not_slow_another(make: Callable[..., Bench]) -> None:
    bench = make("dead", "disk")
    bench.tiers["dead"].gate.clear()
    for number in range(4):
        bench.store([number], [number], tier="dead")
    bench.store([7], [7], tier="disk")
    bench.load([7], [8], tier="disk")
    assert {result.transfer.tier for result in bench.await_results(2)} == {"disk"}


def test_close_drains_stores_and_ends_the_threads(make: Callable[..., Bench]) -> None:
    bench = make(threads=2, queue_blocks=64)
    for number in range(20):
        bench.store([number], [number])
    results = bench.mover.close(DEADLINE_S)
    assert sum(result.outcomes.count(OK) for result in results) == 20
    assert len(bench.tier.blocks) == 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvferry-disk-")]
    bench.store([1], [1])
    assert bench.mover.close(1.0)[0].error == "kvferry is closing"


def test_close_leaves_a_hanging_tier_behind_and_says_so(
    make: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = make(threads=1, queue_blocks=64)
    bench.tier.gate.clear()
    for number in range(3):
        bench.store([number], [number])
    assert bench.tier.entered.acquire(timeout=DEADLINE_S)
    started = time.monotonic()
    results = bench.mover.close(0.2)
    assert time.monotonic() - started < 5
    assert [result.outcomes for result in results] == [(NO_ROOM,), (NO_ROOM,)]
    assert "kvferry-disk-0 did not end" in caplog.text


@pytest.mark.parametrize("field", ["threads", "queue_blocks", "deadline_s"])
def test_limits_that_make_no_sense_are_refused(make: Callable[..., Bench], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"tiers\.disk\.{field}: found 0"):
        make(**{field: 0})


@pytest.mark.parametrize("seed", range(4))
def test_under_random_faults_every_transfer_ends_once_and_no_wrong_byte_passes(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = PluginRegistry(["faulty"], use_entry_points=False)
    context = TierContext(
        name="f",
        layout=LAYOUT,
        fingerprint=FINGERPRINT,
        instance="",
        on_removed=lambda keys: None,
        make_eviction_policy=registry.eviction_policy,
        logger=logging.getLogger("test"),
    )
    tier_type = registry.tier_type("faulty")
    tier = tier_type.create(
        tier_type.options(inner={"type": "memory"}, seed=seed, rate=0.1, slow_s=0.03), context
    )
    arena = Arena.create(SLOTS, LAYOUT.slot_bytes)
    mover = Mover(
        [(TierConfig(type="faulty", name="f", threads=3, deadline_s=1.0), tier)],
        seal=FrameSeal(FINGERPRINT, LAYOUT.payload_bytes),
        slot=arena.slot,
        clock=fast_clock,
        logger=logging.getLogger("test"),
    )
    free, pending, finished, loaded = set(range(SLOTS)), {}, set(), 0

    def take_in() -> int:
        good = 0
        for result in mover.poll(fast_clock()):
            if not result.is_finished:
                assert result.transfer.id in pending
                continue
            assert result.transfer.id not in finished
            finished.add(result.transfer.id)
            transfer = pending.pop(result.transfer.id)
            for which, slot, outcome in zip(transfer.keys, transfer.slots, result.outcomes, strict=True):
                if transfer.direction is Direction.LOAD and outcome is OK:
                    number = int.from_bytes(which, "little")
                    assert bytes(arena.slot(slot)[: LAYOUT.payload_bytes]) == content(number)
                    good += 1
                free.add(slot)
        return good

    end = time.monotonic() + 60
    number = 0
    while number < 1500 or loaded < 100 or not mover.counters()["f"].refused:
        number += 1
        while len(free) < 4:
            assert time.monotonic() < end
            loaded += take_in()
            time.sleep(0.0005)
        is_store = number % 3 == 0
        slots = tuple(free.pop() for _ in range(4))
        first = number // 3 * 4 % 40
        keys = tuple(key(first + index) for index in range(4))
        for index, slot in enumerate(slots):
            fresh = content(first + index) if is_store else bytes(LAYOUT.payload_bytes)
            arena.slot(slot)[: LAYOUT.payload_bytes] = fresh
        direction = Direction.STORE if is_store else Direction.LOAD
        pending[number] = Transfer(number, direction, "f", keys, slots)
        mover.submit([pending[number]], fast_clock())
        loaded += take_in()
    while mover.has_pending():
        assert time.monotonic() < end
        loaded += take_in()
        time.sleep(0.001)
    assert not pending
    assert len(finished) == number
    mover.close(5)
    arena.close()
