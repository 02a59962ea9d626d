"""Staging on a GPU, on a played one: the contract, in every order of execution that CUDA allows.

A missing wait for an event gives wrong bytes here, for some seed; so does memory given back too early.
"""

from __future__ import annotations

import itertools
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played_device import PlayedDevice, PlayedEvent, PlayedKernels
from staging_kit import (
    Case,
    MakeRig,
    Rig,
    StagingTests,
    finish,
    follow,
    gathered,
    ids,
    random_case,
    scattered,
    slots_of,
    small_case,
)

from kvferry.connector.arena import Arena
from kvferry.connector.errors import DeviceError, LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes, Copies, Staging
from kvferry.cuda import batch as batch_module
from kvferry.cuda.batch import CopyCall, DirectPath, copy_batch, copy_each
from kvferry.cuda.driver import Held
from kvferry.cuda.geometry import CopyGeometry
from kvferry.cuda.ring import KernelPath, RingSize
from kvferry.cuda.staging import CopyPath, DevicePages, DeviceStaging
from kvferry.engines.jobs import BlockCopy, LoadJob, SaveJob, StepJobs
from kvferry.engines.stager import Stager

ENGINE = 1
"""The handle of the engine's stream."""
HELD_BY_A_STAGING = 4
"""The ring, host memory of page ids, the table of layers, and an arena."""


class Way(NamedTuple):
    """How bytes go."""

    is_direct: bool = False
    copy: CopyCall = copy_each
    ring: RingSize = RingSize(nbytes=1, parts=2, thread_blocks=2)

    def path(self, device: PlayedDevice, address: int, geometry: CopyGeometry) -> CopyPath:
        if self.is_direct:
            return DirectPath(device, address, geometry, self.copy)
        return KernelPath(device, address, geometry, PlayedKernels(), self.copy, self.ring)


class Setting(NamedTuple):
    """A staging on a played GPU, and what the engine sees."""

    device: PlayedDevice
    staging: DeviceStaging
    pages: Bytes

    def compute(self, memory: Bytes) -> None:
        """Queue a forward pass that leaves these bytes."""
        self.device.engine.do(lambda: np.copyto(self.pages, memory))

    def memory(self) -> Bytes:
        """What the engine finds. Nothing may be under way when staging says that it has finished."""
        assert self.device.is_idle()
        self.device.drain()
        return self.pages.copy()


def setting(
    device: PlayedDevice,
    way: Way,
    nbytes: int,
    layout: PageLayout,
    block: BlockLayout,
    shard: Shard,
    offset: int = 0,
) -> Setting:
    device.activate()
    held, pages = device.memory(nbytes, offset)
    on_device = DevicePages(held.address, nbytes, layout, block, shard)
    made = DeviceStaging(
        device, on_device, lambda geometry: way.path(device, held.address, geometry), lambda: ENGINE
    )
    return Setting(device, made, pages)


def rigs(way: Way) -> MakeRig:
    """Every rig on a GPU of its own, with pages that begin at any address and are written late."""

    def make(memory: Bytes, layout: PageLayout, block: BlockLayout, shard: Shard) -> Rig:
        seed = zlib.crc32(memory)
        device = PlayedDevice(seed)
        made = setting(device, way, memory.nbytes, layout, block, shard, offset=seed * 4 % 48)
        content = memory.copy()
        made.compute(content)
        return Rig(made.staging, made.memory)

    return make


class TestKernelPath(StagingTests):
    @pytest.fixture
    def make(self) -> MakeRig:
        return rigs(Way())


class TestKernelPathWithBatchCopies(StagingTests):
    @pytest.fixture
    def make(self) -> MakeRig:
        return rigs(Way(copy=copy_batch, ring=RingSize(1 << 16, 3, 1)))


class TestDirectPath(StagingTests):
    @pytest.fixture
    def make(self) -> MakeRig:
        return rigs(Way(is_direct=True, copy=copy_batch))


class TestDirectPathOneByOne(StagingTests):
    @pytest.fixture
    def make(self) -> MakeRig:
        return rigs(Way(is_direct=True))


WAYS = st.builds(
    Way,
    is_direct=st.booleans(),
    copy=st.sampled_from([copy_each, copy_batch]),
    ring=st.builds(
        RingSize,
        nbytes=st.sampled_from([1, 1 << 10, 1 << 14]),
        parts=st.integers(1, 3),
        thread_blocks=st.integers(1, 4),
    ),
)


@given(
    seed=st.integers(0, 100_000),
    way=WAYS,
    haste=st.sampled_from([0.0, 0.3, 0.8]),
    saves=st.lists(st.booleans(), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=120)
def test_any_jobs_in_any_order_of_execution(seed: int, way: Way, haste: float, saves: list[bool]) -> None:
    case = random_case(seed)
    with slots_of(case.rng, 6, case.block.slot_bytes) as arena:
        device = PlayedDevice(seed, haste=haste)
        nbytes = case.layout.extent_bytes() + 50
        made = setting(device, way, nbytes, case.layout, case.block, case.shard, seed % 33)
        for is_save in saves:
            run_job(case, made, arena, is_save)
        made.staging.close()
        assert len(device.allocations) == 1, "only the engine's own memory is left"
        assert device.registrations == []


def run_job(case: Case, made: Setting, arena: Bytes, is_save: bool) -> None:
    """A forward pass, then a save or a load of some blocks in several batches, as the stager does it."""
    memory = case.memory()
    made.compute(memory)
    page_ids, slots = case.partial(len(arena)) if case.rng.random() < 0.5 else case.batch(len(arena))
    expected_arena = gathered(case, memory, page_ids, slots, arena) if is_save else arena.copy()
    expected_memory = memory if is_save else scattered(case, memory, page_ids, slots, arena)
    follow(made.staging)
    copy = made.staging.gathers.copy if is_save else made.staging.scatters.copy
    at_once = int(case.rng.integers(1, 4))
    for start in range(0, len(slots), at_once):
        some = slice(start, start + at_once)
        copy(page_ids[some], slots[some], arena)
    finish(made.staging)
    assert np.array_equal(arena, expected_arena)
    assert np.array_equal(made.memory(), expected_memory)


@given(seed=st.integers(0, 100_000), way=WAYS, haste=st.sampled_from([0.0, 0.3, 0.8]))
@settings(deadline=None, max_examples=60)
def test_both_directions_go_on_at_once(seed: int, way: Way, haste: float) -> None:
    """Each on its own thread, in batches of a block, over pages and slots that the other does not touch."""
    case = random_case(seed)
    per_block = case.block.block_tokens // case.layout.page_tokens
    blocks = case.layout.num_pages // per_block
    with slots_of(case.rng, blocks, case.block.slot_bytes) as arena:
        device = PlayedDevice(seed, haste=haste)
        nbytes = case.layout.extent_bytes()
        made = setting(device, way, nbytes, case.layout, case.block, case.shard, seed % 33)
        memory = case.rng.integers(0, 256, nbytes, dtype=np.uint8)
        made.compute(memory)
        page_ids = case.rng.permutation(case.layout.num_pages)[: blocks * per_block].astype(np.int32)
        page_ids, slots = page_ids.reshape(blocks, per_block), case.rng.permutation(blocks)
        saved, loaded = slice(0, blocks // 2), slice(blocks // 2, blocks)
        expected_arena = gathered(case, memory, page_ids[saved], slots[saved], arena)
        expected_memory = scattered(case, memory, page_ids[loaded], slots[loaded], arena)

        def copy(direction: Copies, some: slice) -> None:
            device.activate()
            direction.wait(made.staging.mark())
            for page_row, slot in zip(page_ids[some], slots[some], strict=True):
                direction.copy(page_row[np.newaxis], np.array([slot]), arena)
            direction.finish()

        with ThreadPoolExecutor(2) as threads:
            jobs = [
                threads.submit(copy, made.staging.gathers, saved),
                threads.submit(copy, made.staging.scatters, loaded),
            ]
        for job in jobs:
            job.result()
        assert np.array_equal(arena, expected_arena)
        assert np.array_equal(made.memory(), expected_memory)
        made.staging.close()
        assert device.registrations == []


def test_one_direction_is_finished_while_the_other_is_under_way() -> None:
    case, made = small(Way(), haste=0.0)
    with slots_of(case.rng, 3, case.block.slot_bytes) as arena:
        late = PlayedEvent(made.device)
        late.recorded = 1
        made.device.streams[0].wait(late)
        made.staging.gathers.copy(ids([0, 1]), np.array([0]), arena)
        expected = scattered(case, made.pages, ids([2, -1]), np.array([1]), arena)
        made.staging.scatters.copy(ids([2, -1]), np.array([1]), arena)
        made.staging.scatters.finish()
        assert np.array_equal(made.pages, expected)
        assert not made.device.is_idle()
        late.passed = 1
        made.staging.close()


@pytest.mark.parametrize("is_save", [True, False])
@pytest.mark.parametrize("way", [Way(), Way(is_direct=True)])
@pytest.mark.parametrize("seed", range(30))
def test_copies_come_after_the_engines_work_so_far(way: Way, is_save: bool, seed: int) -> None:
    case, made = small(way, seed=seed)
    memory = case.rng.integers(0, 256, made.pages.size, dtype=np.uint8)
    batch = ids([0, 1], [2, -1]), np.array([2, 0])
    with slots_of(case.rng, 3, case.block.slot_bytes) as arena:
        expected_arena = gathered(case, memory, *batch, arena)
        expected_memory = scattered(case, memory, *batch, arena)
        made.compute(memory)
        follow(made.staging)
        (made.staging.gathers.copy if is_save else made.staging.scatters.copy)(*batch, arena)
        finish(made.staging)
        if is_save:
            assert np.array_equal(arena, expected_arena)
        else:
            assert np.array_equal(made.memory(), expected_memory)
        made.staging.close()


@pytest.mark.parametrize("is_save", [True, False])
@pytest.mark.parametrize("way", [Way(), Way(copy=copy_batch), Way(is_direct=True)])
@pytest.mark.parametrize("seed", range(10))
def test_after_a_fault_finish_leaves_nothing_under_way(way: Way, is_save: bool, seed: int) -> None:
    for fails_at in itertools.count():
        case = random_case(13)
        with slots_of(case.rng, 6, case.block.slot_bytes) as arena:
            device = PlayedDevice(seed, haste=0.0)
            made = setting(device, way, case.layout.extent_bytes(), case.layout, case.block, case.shard)
            page_ids, slots = case.partial(6)
            follow(made.staging)
            device.fails_at = len(device.calls) + fails_at
            try:
                (made.staging.gathers.copy if is_save else made.staging.scatters.copy)(page_ids, slots, arena)
                device.fails_at = None
                return
            except DeviceError:
                pass
            finally:
                finish(made.staging)
                assert device.is_idle()
                made.staging.close()


def test_a_gpu_that_refuses_at_the_start_keeps_nothing() -> None:
    case = small_case()
    for fails_at in itertools.count():
        device = PlayedDevice(fails_at)
        device.fails_at = fails_at
        try:
            setting(device, Way(), case.layout.extent_bytes(), case.layout, case.block, case.shard)
            break
        except DeviceError:
            assert len(device.allocations) == 1, "only the engine's own memory is left"
            assert device.registrations == []
    assert fails_at > 10


def small(way: Way, **about: object) -> tuple[Case, Setting]:
    case = small_case()
    device = PlayedDevice(**about)  # type: ignore[arg-type]
    return case, setting(device, way, case.layout.extent_bytes(), case.layout, case.block, case.shard)


def test_pages_that_are_not_on_the_gpu_are_refused() -> None:
    case = small_case()
    device = PlayedDevice()
    device.activate()
    memory = case.memory()
    for nbytes, refusal, why in (
        (memory.nbytes, DeviceError, "not this GPU's memory"),
        (1, LayoutError, "span"),
    ):
        pages = DevicePages(memory.ctypes.data, nbytes, case.layout, case.block, case.shard)
        with pytest.raises(refusal, match=why):
            DeviceStaging(device, pages, lambda _: pytest.fail("too late"), lambda: ENGINE)


def test_loads_go_first() -> None:
    _, made = small(Way())
    assert sorted(stream.is_urgent for stream in made.device.streams) == [False, False, True, True]


def test_an_arena_is_registered_once() -> None:
    case, made = small(Way())
    with slots_of(case.rng, 3, case.block.slot_bytes) as arena:
        before = len(made.device.registrations)
        for slot in range(3):
            made.staging.gathers.copy(ids([0, 1]), np.array([slot]), arena)
        assert len(made.device.registrations) == before + 1
        finish(made.staging)
        made.staging.detach(arena)
        assert len(made.device.registrations) == before
        made.staging.close()


def test_two_directions_that_begin_together_register_an_arena_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = small(Way(is_direct=True))
    first, second = threading.Event(), threading.Event()
    register = made.device.register_host

    def slow(address: int, nbytes: int) -> Held:
        if first.is_set():
            second.set()
        first.set()
        second.wait(0.1)
        return register(address, nbytes)

    monkeypatch.setattr(made.device, "register_host", slow)
    with slots_of(case.rng, 3, case.block.slot_bytes) as arena, ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(made.staging.gathers.copy, ids([0, 1]), np.array([0]), arena)]
        assert first.wait(10.0)
        jobs.append(threads.submit(made.staging.scatters.copy, ids([2, -1]), np.array([1]), arena))
        for job in jobs:
            job.result()
        assert not second.is_set()
        made.staging.close()


@pytest.mark.parametrize("way", [Way(), Way(is_direct=True)])
def test_close_waits_for_what_is_under_way(way: Way) -> None:
    case, made = small(way, haste=0.0)
    with slots_of(case.rng, 3, case.block.slot_bytes) as arena:
        batch = ids([0, 1]), np.array([1])
        expected = gathered(case, made.pages, *batch, arena)
        made.staging.gathers.copy(*batch, arena)
        made.staging.close()
        assert made.device.is_idle()
        assert np.array_equal(arena, expected)


@pytest.mark.parametrize("way", [Way(), Way(is_direct=True)])
def test_close_gives_back_what_it_can_when_a_wait_is_refused(way: Way) -> None:
    """Whichever wait it is: the rest is waited for, everything is given back, and the refusal is told once."""
    for fails_at in itertools.count():
        case, made = small(way, haste=0.0)
        device = made.device
        with slots_of(case.rng, 3, case.block.slot_bytes) as arena:
            batch = ids([0, 1]), np.array([1])
            expected = gathered(case, made.pages, *batch, arena)
            made.staging.gathers.copy(*batch, arena)
            device.fails_at = len(device.calls) + fails_at
            is_refused = False
            try:
                made.staging.close()
            except DeviceError:
                is_refused = True
            device.fails_at = None
            assert device.is_idle()
            assert np.array_equal(arena, expected)
            assert len(device.allocations) == 1, "only the engine's own memory is left"
            assert device.registrations == []
            made.staging.close()
        if not is_refused:
            break
    assert fails_at >= 4


@pytest.mark.parametrize("way", [Way(), Way(is_direct=True)])
def test_close_of_a_gpu_that_answers_nothing_any_more(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = small(way)
    with slots_of(case.rng, 3, case.block.slot_bytes) as arena:
        made.staging.gathers.copy(ids([0, 1]), np.array([1]), arena)

        def refused(name: str) -> None:
            raise DeviceError(name, "CUDA_ERROR_LAUNCH_FAILED")

        with monkeypatch.context() as patch:
            patch.setattr(made.device, "call", refused)
            with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED"):
                made.staging.close()
        assert len(made.device.allocations) == 1
        assert made.device.registrations == []


@pytest.mark.parametrize("refused_at", range(HELD_BY_A_STAGING))
def test_memory_that_the_gpu_does_not_take_back_keeps_nothing_else(
    refused_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, made = small(Way())
    device = made.device
    with slots_of(case.rng, 3, case.block.slot_bytes) as arena:
        made.staging.gathers.copy(ids([0, 1]), np.array([1]), arena)
        order = itertools.count()
        held_type = type(device.allocate(1))
        give_back = held_type.close

        def close(held: object) -> None:
            if next(order) == refused_at:
                raise DeviceError("cuMemFree", "CUDA_ERROR_PLAYED")
            give_back(held)

        before = len(device.allocations) + len(device.registrations)
        monkeypatch.setattr(held_type, "close", close)
        with pytest.raises(DeviceError, match="cuMemFree"):
            made.staging.close()
        assert next(order) == HELD_BY_A_STAGING
        assert len(device.allocations) + len(device.registrations) == before - (HELD_BY_A_STAGING - 1)


def test_the_ring_bounds_what_is_queued() -> None:
    case, made = small(Way(ring=RingSize(1, 2, 1)), haste=0.0)
    with slots_of(case.rng, 4, case.block.slot_bytes) as arena:
        for slot in range(4):
            made.staging.gathers.copy(ids([0, 1]), np.array([slot]), arena)
            kernels = [op for op in made.device.streams[0].queue if "gather" in op.what]
            assert len(kernels) <= 2
        finish(made.staging)
        made.staging.close()


def test_a_kernel_takes_no_more_of_the_gpu_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    stream_type = type(PlayedDevice().engine)
    launch = stream_type.launch

    def noted(self, kernel, thread_blocks, threads, arguments):
        taken.append(thread_blocks)
        launch(self, kernel, thread_blocks, threads, arguments)

    monkeypatch.setattr(stream_type, "launch", noted)
    block = BlockLayout(num_layers=4, num_kv_heads=4, block_tokens=64, head_dim=128, itemsize=2)
    layout = PageLayout(
        num_pages=4,
        page_tokens=64,
        num_heads=4,
        head_bytes=256,
        kv_factor=2,
        layer_offsets=tuple(layer * 4 * 4 * 64 * 512 for layer in range(4)),
        page_stride=4 * 64 * 512,
        head_stride=64 * 512,
        token_stride=512,
        kv_stride=256,
    )
    for most in (1, 3, 1000):
        device = PlayedDevice()
        way = Way(ring=RingSize(1 << 20, 2, most))
        made = setting(device, way, layout.extent_bytes(), layout, block, block.shard(0, 1))
        with slots_of(np.random.default_rng(0), 1, block.slot_bytes) as arena:
            made.staging.gathers.copy(ids([0]), np.array([0]), arena)
            made.staging.close()
    assert taken[:2] == [1, 3]
    assert 3 < taken[2] < 1000, "threads without work are not launched"


def test_copies_are_handed_over_in_bounded_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "_MOST_COPIES", 3)
    counts: list[int] = []

    def counted(stream, targets, sources, sizes):
        counts.append(len(targets))
        copy_batch(stream, targets, sources, sizes)

    case, made = small(Way(is_direct=True, copy=counted))
    with slots_of(case.rng, 3, case.block.slot_bytes) as arena:
        memory = made.pages.copy()
        batch = ids([0, 1], [2, -1]), np.array([2, 0])
        expected = gathered(case, memory, *batch, arena)
        made.staging.gathers.copy(*batch, arena)
        finish(made.staging)
        assert np.array_equal(arena, expected)
        made.staging.close()
    assert max(counts) == 3
    assert sum(counts) == 3 * case.layout.num_heads * case.block.num_layers


def test_a_stager_drives_it_from_its_own_thread() -> None:
    case, made = small(Way())
    memory = case.rng.integers(0, 256, made.pages.size, dtype=np.uint8)
    made.compute(memory)
    arena = Arena.create(2, case.block.slot_bytes)
    stager = Stager(made.staging, case.block, case.shard)
    copies = (BlockCopy(1, 0, 0, (2, 0)),)

    def run(**jobs: list[SaveJob] | list[LoadJob]) -> None:
        planned = StepJobs(arena=arena.handle, layout=case.block, **jobs)
        stager.submit_loads(planned)
        stager.submit_saves(planned)
        until(lambda: results_of(stager, jobs))

    run(saves=[SaveJob(1, "a", copies)])
    assert np.array_equal(
        arena.slots_array, gathered(case, memory, ids([2, 0]), np.array([1]), 0 * arena.slots_array)
    )
    poison = np.full_like(memory, 0xA5)
    made.compute(poison)
    run(loads=[LoadJob("b", (BlockCopy(1, 0, 1, (1,)),))])
    expected = scattered(case, poison, ids([-1, 1]), np.array([1]), arena.slots_array)
    assert np.array_equal(made.memory(), expected)
    stager.close()
    assert made.device.registrations == []
    arena.close()


def results_of(stager: Stager, jobs: dict[str, object]) -> bool:
    found = stager.take_results()
    assert not found.failed_loads
    assert not found.report.failed_saves
    return bool(found.loaded if "loads" in jobs else found.report.saved)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10.0
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_it_is_a_staging() -> None:
    _, made = small(Way())
    staging: Staging = made.staging
    assert staging.pages_per_block == 2
