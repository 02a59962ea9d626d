"""The embedded service end to end, without an engine: a worker's mapping, real tiers, injected faults."""

import logging
import random
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

import faulty
import msgspec
import pytest

from kvferry.connector.arena import Arena
from kvferry.connector.config import Config, HostConfig
from kvferry.connector.embedded import EmbeddedService
from kvferry.connector.errors import ArenaError, ClosedError, ConfigError, KVFerryError, LeaseError
from kvferry.connector.frame import CODEC_NONE, FrameSeal, Sealed
from kvferry.connector.hooks import hookimpl
from kvferry.connector.keys import BlockKey, KeyChain, Scope, root_key
from kvferry.connector.layout import BlockLayout
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.service import HOST, MissReason

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=16, head_dim=32, itemsize=2)
FINGERPRINT = b"f" * 32
DEADLINE_S = 30.0
"""How long a test waits for what must happen; far more than it takes."""
MIB = 1 << 20


def prefix(length: int, salt: str = "") -> list[BlockKey]:
    chain = KeyChain(root_key(FINGERPRINT, Scope(cache_salt=salt)), 1)
    return list(chain.extend(range(length)))


def content(key: BlockKey) -> bytes:
    return (key * (LAYOUT.payload_bytes // len(key) + 1))[: LAYOUT.payload_bytes]


class Worker:
    """Plays engine and worker over a service: fills reserved slots, reads leased ones, checks every byte."""

    def __init__(self, slots: int = 32, speed: float = 1.0, **settings: object) -> None:
        host = HostConfig(capacity=(slots + 1) * LAYOUT.slot_bytes, eviction="lru")
        config = msgspec.convert({"plugins": ["faulty"], **settings}, Config)
        self.config = msgspec.structs.replace(config, host=host)
        self.registry = PluginRegistry(self.config.plugins)
        self.service = EmbeddedService(
            self.config, LAYOUT, FINGERPRINT, self.registry, clock=lambda: time.monotonic() * speed
        )
        self.arena = Arena.attach(self.service.arena)

    @property
    def tier(self) -> faulty.FaultyTier:
        tier = self.service._tiers[0].tier
        assert isinstance(tier, faulty.FaultyTier)
        return tier

    def save(self, keys: Sequence[BlockKey], owner: str = "save") -> int:
        """Reserve, fill and commit; return how many blocks were taken."""
        reservation = self.service.reserve(owner, keys)
        for place in reservation.places:
            assert self.arena.generation(place.slot) == place.generation
            self.arena.slot(place.slot)[: LAYOUT.payload_bytes] = content(place.key)
        self.service.commit(reservation, [place.key for place in reservation.places])
        return len(reservation.places)

    def load(self, keys: Sequence[BlockKey], owner: str = "load", wait_s: float = DEADLINE_S) -> int:
        """Prefetch, wait, lease, read; return how many blocks were read, every byte of them checked."""
        coming = self.service.prefetch(owner, keys).blocks
        self.wait_until(lambda: self.service.lookup(keys).ready >= coming or not self.is_moving(), wait_s)
        return self.read(keys, owner)

    def read(self, keys: Sequence[BlockKey], owner: str = "load") -> int:
        lease = self.service.lease(owner, keys)
        for place in lease.places:
            assert self.arena.generation(place.slot) == place.generation
            assert bytes(self.arena.slot(place.slot)[: LAYOUT.payload_bytes]) == content(place.key)
            assert self.arena.generation(place.slot) == place.generation
        assert [place.key for place in lease.places] == list(keys[: len(lease.places)])
        self.service.release(lease)
        self.service.release_owner(owner)
        return len(lease.places)

    def is_moving(self) -> bool:
        return self.service.has_pending()

    def wait_until(self, holds: Callable[[], bool], wait_s: float = DEADLINE_S) -> bool:
        end = time.monotonic() + wait_s
        self.service.poll()
        while not holds():
            if time.monotonic() > end:
                return False
            time.sleep(0.0005)
            self.service.poll()
        return True

    def settle(self) -> None:
        assert self.wait_until(lambda: not self.service.has_pending()), "transfers never end"

    def assert_nothing_leaked(self) -> None:
        self.settle()
        held = self.service._manager.occupancy
        assert (held.leases, held.holds, held.reservations, held.void_reservations) == (0, 0, 0, 0)
        assert (held.loading, held.transfers) == (0, 0)
        assert held.slots.pinned == held.slots.reserved == held.slots.quarantined == held.slots.retired == 0
        assert held.slots.free + held.slots.committed == self.service.arena.num_slots

    def close(self, deadline_s: float = DEADLINE_S) -> None:
        self.service.close(deadline_s)
        self.arena.close()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def make(slots: int = 32, speed: float = 1.0, **settings: object) -> Worker:
        started.append(Worker(slots, speed, **settings))
        return started[-1]

    yield make
    for worker in started:
        worker.close(1.0)


def disk(path: Path, **options: object) -> dict[str, object]:
    return {"type": "disk", "path": str(path), "capacity": 64 * MIB, "eviction": "lru", **options}


def wrapped(inner: dict[str, object] | None = None, **options: object) -> dict[str, object]:
    return {"type": "faulty", "name": "f", "inner": inner or {"type": "memory"}, **options}


def test_a_block_saved_is_read_back_from_the_host(start: Callable[..., Worker]) -> None:
    worker, keys = start(), prefix(5)
    assert worker.service.lookup(keys).missing is MissReason.NEVER_STORED
    assert worker.save(keys) == 5
    match = worker.service.lookup([*keys, *prefix(1, "other")])
    assert (match.ready, match.reachable, set(match.tiers)) == (5, 5, {HOST})
    assert worker.read(keys) == 5
    assert worker.save(keys) == 0  # held already
    worker.assert_nothing_leaked()


def test_nothing_uncommitted_is_visible_and_aborted_slots_come_back(start: Callable[..., Worker]) -> None:
    worker, keys = start(slots=4), prefix(4)
    reservation = worker.service.reserve("a", keys)
    assert worker.service.lookup(keys).reachable == 0
    worker.service.abort(reservation)
    assert worker.service.lookup(keys).reachable == 0
    assert worker.save(keys) == 4


def test_blocks_survive_a_restart_on_disk(start: Callable[..., Worker], tmp_path: Path) -> None:
    keys = prefix(20)
    first = start(tiers=[disk(tmp_path)])
    assert first.save(keys) == 20
    first.settle()
    assert first.service.counters().tiers["disk"].stored_blocks == 20
    first.close()
    second = start(tiers=[disk(tmp_path)])
    match = second.service.lookup(keys)
    assert (match.ready, match.reachable, set(match.tiers)) == (0, 20, {"disk"})
    assert second.load(keys) == 20
    assert second.service.counters().tiers["disk"].loaded_blocks == 20
    second.assert_nothing_leaked()


def test_a_store_under_way_is_finished_by_close(start: Callable[..., Worker], tmp_path: Path) -> None:
    first, keys = start(tiers=[disk(tmp_path)]), prefix(20)
    first.save(keys)
    first.close()
    assert start(tiers=[disk(tmp_path)]).load(keys) == 20


def test_eviction_pressure_moves_blocks_to_the_tier_and_back(start: Callable[..., Worker]) -> None:
    worker = start(slots=8, tiers=[{"type": "memory"}])
    prompts = [prefix(4, str(number)) for number in range(50)]
    for keys in prompts:
        assert worker.save(keys) == 4
        worker.settle()
    for keys in reversed(prompts):
        assert worker.load(keys) == 4
    counters = worker.service.counters()
    assert counters.used_slots <= counters.slots == 8
    assert counters.host_evictions >= 4 * 48
    assert counters.tiers["memory"].loaded_blocks >= 4 * 48
    worker.assert_nothing_leaked()


def test_what_a_tier_drops_is_no_longer_offered(start: Callable[..., Worker]) -> None:
    worker = start(slots=4, tiers=[{"type": "memory", "capacity_blocks": 8, "admission": "always"}])
    for number in range(20):
        worker.save(prefix(2, str(number)))
        worker.settle()
    worker.service.poll()
    found = [number for number in range(20) if worker.service.lookup(prefix(2, str(number))).reachable == 2]
    assert len(found) <= 8
    assert worker.service.lookup(prefix(2, "0")).missing is MissReason.EVICTED
    assert worker.service.counters().tiers["memory"].removed_blocks == 40 - 8


def test_events_and_observers_tell_the_same_story(start: Callable[..., Worker]) -> None:
    seen: list[tuple[object, ...]] = []

    class Observer:
        @hookimpl
        def kvferry_block_stored(self, tier: str, keys: Sequence[BlockKey]) -> None:
            seen.extend(("stored", tier, key) for key in keys)

        @hookimpl
        def kvferry_block_loaded(self, tier: str, keys: Sequence[BlockKey]) -> None:
            seen.extend(("loaded", tier, key) for key in keys)

        @hookimpl
        def kvferry_block_removed(self, tier: str, keys: Sequence[BlockKey], reason: str) -> None:
            seen.extend(("removed", tier, key, reason) for key in keys)

        @hookimpl
        def kvferry_block_refused(self, tier: str, keys: Sequence[BlockKey], reason: str) -> None:
            seen.extend(("refused", tier, key, reason) for key in keys)

    worker = start(slots=4, tiers=[wrapped(modes=["bit_flip"], rate=0.0)])
    worker.registry._plugins.register(Observer(), "observer")
    worker.registry._observers = {
        hook: list(worker.registry._callers(hook)) for hook in worker.registry._observers
    }
    first, second = prefix(4, "first"), prefix(4, "second")
    for keys in (first, second):
        worker.save(keys)
        worker.settle()
    assert worker.load(first) == 4
    worker.service.poll()
    events = worker.service.take_events()
    for key in first:
        assert ("stored", HOST, key) in seen
        assert ("stored", "f", key) in seen
        assert ("removed", HOST, key, "evicted") in seen
        assert ("loaded", "f", key) in seen
    flat = [(event.kind, event.tier, key) for event in events for key in event.keys]
    assert flat == [fact[:3] for fact in seen if fact[0] in ("stored", "removed")]
    assert worker.service.take_events() == ()


def test_a_refused_block_leaves_its_tier_and_is_recomputed(start: Callable[..., Worker]) -> None:
    worker = start(slots=4, tiers=[wrapped(modes=["bit_flip"], rate=0.0)], retry_failed_s=0.001)
    first = prefix(4, "first")
    for keys in (first, prefix(4, "second")):
        worker.save(keys)
        worker.settle()
    inner = worker.tier._inner
    header, payload = inner._blocks[first[2]]
    inner._blocks[first[2]] = (header, bytes([payload[0] ^ 1]) + payload[1:])
    assert worker.load(first) == 2
    worker.settle()
    assert first[2] not in inner._blocks
    assert worker.service.counters().tiers["f"].refused == {"checksum": 1}
    assert worker.service.lookup(first).missing is MissReason.REFUSED
    worker.save(first)
    assert worker.read(first) == 4
    worker.assert_nothing_leaked()


def faulty_settings(**options: object) -> dict[str, object]:
    """A tier whose slow calls pass their deadline; time runs 50 times as fast, so breakers close again."""
    tier = wrapped(rate=0.25, slow_s=0.03, deadline_s=1.0, **options)
    return {"slots": 12, "speed": 50.0, "retry_failed_s": 0.5, "tiers": [tier]}


@pytest.mark.parametrize("mode", faulty.MODES)
def test_no_fault_of_a_tier_lets_a_wrong_byte_through_or_leaks(
    start: Callable[..., Worker], mode: str
) -> None:
    worker = start(**faulty_settings(modes=[mode], seed=7))
    assert run_at_random(worker, 1500, seed=3, until=lambda: worker.tier.injected.get(mode, 0) > 10) > 0


@pytest.mark.parametrize("seed", range(3))
def test_all_faults_together_over_disk(start: Callable[..., Worker], seed: int, tmp_path: Path) -> None:
    settings = faulty_settings(inner=disk(tmp_path, capacity=2 * MIB), seed=seed)
    worker = start(**{**settings, "tiers": [*settings["tiers"], {"type": "memory", "capacity_blocks": 30}]})
    assert run_at_random(worker, 2000, seed=seed) > 0


def test_without_verification_the_same_faults_are_noticed(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: these tests see a single wrong bit."""
    monkeypatch.setattr(FrameSeal, "verify", accept_anything)
    worker = start(**faulty_settings(modes=["bit_flip"], seed=7))
    with pytest.raises(AssertionError):
        run_at_random(worker, 1500, seed=3)


def accept_anything(
    seal: FrameSeal, key: BlockKey, header: memoryview, payload: memoryview, codecs: Container[int] = ()
) -> Sealed:
    return Sealed(CODEC_NONE, seal.payload_bytes)


def run_at_random(worker: Worker, steps: int, seed: int, until: Callable[[], bool] = lambda: True) -> int:
    """Save, load, abort and drop at random, for ``steps`` and ``until``; return how many blocks were read.

    Every byte that is read is checked, and at the end that nothing leaked.
    """
    chance = random.Random(seed)
    prompts = [prefix(4, str(number)) for number in range(30)]
    read = step = 0
    end = time.monotonic() + DEADLINE_S
    while step < steps or not until():
        assert time.monotonic() < end
        step += 1
        keys = chance.choice(prompts)[: chance.randint(1, 4)]
        action = chance.random()
        if action < 0.4:
            worker.save(keys, f"save-{step}")
        elif action < 0.9:
            read += worker.load(keys, f"load-{step}", wait_s=0.01)
        elif action < 0.97:
            worker.service.abort(worker.service.reserve("abort", keys))
        elif action < 0.98:
            worker.service.report_load_failed(keys)
        else:
            worker.service.poll()
    worker.assert_nothing_leaked()
    return read


def test_a_late_delivery_is_a_miss_and_harms_nobody(start: Callable[..., Worker]) -> None:
    worker = start(slots=4, tiers=[wrapped(modes=["slow"], rate=0.0, slow_s=0.5, deadline_s=0.05)])
    first, second = prefix(4, "first"), prefix(4, "second")
    for keys in (first, second):
        worker.save(keys)
        worker.settle()
    worker.tier.rate = 1.0
    worker.service.prefetch("r", first)
    assert worker.wait_until(lambda: worker.service.counters().tiers["f"].late_transfers > 0)
    assert worker.service.lookup(first).ready == 0
    assert worker.service.has_pending()  # the tier's thread still holds the slots
    worker.service.release_owner("r")
    worker.save(second)  # whatever slots are handed out now, none is the late thread's
    worker.settle()
    worker.read(second)
    worker.read(first)
    worker.assert_nothing_leaked()


def test_a_tier_that_dies_midway_leaves_the_host_serving(start: Callable[..., Worker]) -> None:
    worker = start(slots=8, tiers=[wrapped(rate=0.0)], retry_failed_s=0.05)
    prompts = [prefix(4, str(number)) for number in range(6)]
    for keys in prompts:
        worker.save(keys)
        worker.settle()
    worker.tier.kill()
    for keys in prompts * 2:
        worker.load(keys)
        worker.settle()
    assert worker.service.counters().tiers["f"].breaker == "open"
    assert worker.service.lookup(prompts[0]).missing in (MissReason.TIER_DOWN, MissReason.LOAD_FAILED)
    assert worker.save(prompts[0]) == 4
    assert worker.load(prompts[0]) == 4
    worker.assert_nothing_leaked()


def test_concurrent_prefetches_of_one_block_are_one_load(start: Callable[..., Worker]) -> None:
    worker = start(slots=8, tiers=[{"type": "memory"}])
    first = prefix(4, "first")
    for keys in (first, prefix(4, "second"), prefix(4, "third")):
        worker.save(keys)
        worker.settle()
    for number in range(5):
        assert worker.service.prefetch(f"r{number}", first).blocks == 4
    worker.settle()
    assert worker.service.counters().tiers["memory"].loaded_blocks == 4
    for number in range(5):
        worker.service.release_owner(f"r{number}")
    worker.assert_nothing_leaked()


def test_clear_forgets_every_tier_also_after_a_restart(start: Callable[..., Worker], tmp_path: Path) -> None:
    worker, keys = start(tiers=[disk(tmp_path)]), prefix(10)
    worker.save(keys)
    worker.settle()
    worker.service.clear()
    assert worker.service.lookup(keys).reachable == 0
    worker.settle()
    worker.assert_nothing_leaked()
    worker.close()
    again = start(tiers=[disk(tmp_path)])
    assert again.service.lookup(keys).reachable == 0


def test_what_was_being_stored_when_it_was_cleared_is_gone_after_a_restart(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    worker, keys = start(tiers=[disk(tmp_path)]), prefix(20)
    worker.save(keys)
    worker.service.clear()  # the stores are on their way
    worker.close()
    assert start(tiers=[disk(tmp_path)]).service.lookup(keys).reachable == 0


def test_a_tier_that_could_not_be_cleared_is_named_at_the_end(
    start: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(tiers=[wrapped(rate=0.0)])
    worker.save(prefix(3))
    worker.settle()
    worker.tier.kill()
    worker.service.clear()
    worker.close()
    assert "tier 'f' may still hold blocks that were to be forgotten" in caplog.text


def test_a_tier_that_cannot_be_opened_is_a_problem_and_not_the_end(
    start: Callable[..., Worker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    worker = start(tiers=[disk(tmp_path / "file" / "below"), {"type": "memory"}])
    (problem,) = worker.service.problems()
    assert "tier 'disk' is left out" in problem
    assert caplog.text.count("is left out") == 1
    assert set(worker.service.counters().tiers) == {"memory"}
    assert worker.save(prefix(3)) == 3


def test_a_required_tier_that_cannot_be_opened_is_the_end(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    good = disk(tmp_path / "good", name="good")
    with pytest.raises(KVFerryError):
        start(tiers=[good, disk(tmp_path / "file" / "below", required=True)])
    start(tiers=[good])  # the one that had been opened was closed again


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ({"type": "dsik"}, r"tiers\[0\]\.type.*did you mean 'disk'"),
        ({"type": "memory", "capacity_block": 3}, r"tiers\[0\]\.capacity_block.*'capacity_blocks'"),
        ({"type": "memory", "threads": -1}, "threads"),
        ({"type": "memory", "deadline_s": -1}, "deadline_s"),
    ],
)
def test_mistakes_in_a_tiers_configuration_are_errors(
    start: Callable[..., Worker], tier: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(tiers=[tier])


def test_a_capacity_that_holds_no_two_blocks_is_an_error(start: Callable[..., Worker]) -> None:
    with pytest.raises(ConfigError, match=r"host\.capacity"):
        start(slots=1)


def test_after_close_everything_says_so_and_nothing_runs(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    worker, keys = start(tiers=[disk(tmp_path)]), prefix(3)
    worker.save(keys)
    handle = worker.service.arena
    worker.close()
    worker.service.close(1.0)
    for call in (
        lambda: worker.service.lookup(keys),
        worker.service.poll,
        lambda: worker.service.reserve("a", keys),
        lambda: worker.service.release_owner("a"),
    ):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(ArenaError):
        Arena.attach(handle)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvferry-")]


def test_close_does_not_wait_for_a_hanging_tier(
    start: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(tiers=[wrapped(modes=["slow"], rate=1.0, slow_s=60.0)])
    worker.save(prefix(3))
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        worker.close(0.2)
    assert time.monotonic() - started < 10
    assert "left behind" in caplog.text


def test_a_foreign_reservation_is_refused(start: Callable[..., Worker]) -> None:
    worker = start()
    reservation = worker.service.reserve("a", prefix(2))
    forged = msgspec.structs.replace(reservation, id=reservation.id + 100)
    with pytest.raises(LeaseError):
        worker.service.commit(forged, prefix(2))
    worker.service.abort(reservation)


def test_an_expired_reservation_is_not_committed_and_its_slots_are_nobody_elses(
    start: Callable[..., Worker],
) -> None:
    worker, keys = start(slots=4, lease_s=0.02), prefix(4)
    reservation = worker.service.reserve("a", keys)
    assert worker.wait_until(lambda: worker.service.counters().decisions.expired_reservations == 1)
    assert worker.service.reserve("b", prefix(4, "b")).places == ()
    worker.service.commit(reservation, keys)
    assert worker.service.lookup(keys).reachable == 0
    assert worker.save(keys) == 4


def test_a_hundred_thousand_blocks_are_scanned_at_start(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, record_property: Callable[..., None]
) -> None:
    count = 100_000
    keys = [BlockKey(number.to_bytes(32, "little")) for number in range(count)]
    persistent = msgspec.structs.replace(
        faulty.MemoryTier.capabilities.fget(None),
        is_persistent=True,  # type: ignore[attr-defined]
    )
    monkeypatch.setattr(faulty.MemoryTier, "capabilities", property(lambda tier: persistent))
    monkeypatch.setattr(faulty.MemoryTier, "scan", lambda tier: iter(keys))
    before = time.monotonic()
    worker = start(tiers=[{"type": "memory"}])
    record_property("seconds", time.monotonic() - before)
    assert worker.wait_until(lambda: not worker.service._scans)
    assert worker.service.lookup(keys[:1000]).reachable == 1000
    assert worker.service.lookup([keys[-1]]).reachable == 1
