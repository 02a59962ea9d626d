"""Staging on a real GPU: the contract by every path, all vector widths, bad input, and an engine's pages in torch.

Skipped as a whole without a GPU. What is tested here is what a played device cannot show: the driver's calls, the
compiled kernels, and real memory.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from staging_kit import (
    KINDS,
    Case,
    MakeRig,
    Rig,
    StagingTests,
    finish,
    follow,
    gathered,
    ids,
    page_layout,
    scattered,
    slots_of,
    small_case,
)

from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes, HostStaging
from kvferry.connector.transport import Heads, narrow, page_block
from kvferry.cuda.choice import PATHS, PathName, Paths, choose, make_staging, staging_by
from kvferry.cuda.driver import Device, Held, one_copy, open_device
from kvferry.cuda.program import compile_kernels
from kvferry.cuda.staging import DevicePages, DeviceStaging
from kvferry.engines.vllm.gpu_pages import GpuPages

DELAY_BYTES = 256 << 20
"""Copied on the GPU before an engine's bytes are: staging that does not wait for them finds others."""
KERNELS = [f"kvferry_{way}_v{width}" for way in ("gather", "scatter") for width in (16, 8, 4, 2, 1)]


@pytest.fixture(scope="module")
def device() -> Device:
    """Return the GPU; every test asks for it, so without one all are skipped, with one reason."""
    try:
        return open_device(0)
    except DeviceError as error:
        pytest.skip(f"these tests need an NVIDIA GPU: {error}")


@pytest.fixture(scope="module")
def cubin(device: Device) -> bytes:
    return compile_kernels(device.architecture)


class Engine:
    """Memory of an engine on a GPU, and the stream that its work is queued on."""

    def __init__(self, device: Device, nbytes: int, offset: int = 0) -> None:
        from cuda.bindings import driver

        device.activate()
        result, stream = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        assert result == driver.CUresult.CUDA_SUCCESS
        self.handle = int(stream)
        weakref.finalize(self, driver.cuStreamDestroy, stream)
        self._stream = device.engine_stream(self.handle)
        self._end = device.event()
        self._delay = device.allocate(DELAY_BYTES)
        self._memory = device.allocate(nbytes + offset)
        self.address, self.nbytes = self._memory.address + offset, nbytes
        self._host = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        self._registered = device.register_host(self._host.ctypes.data, nbytes)

    def compute(self, memory: Bytes) -> None:
        """Have these bytes in memory, late."""
        self._host[:] = memory
        half = DELAY_BYTES // 2
        for _ in range(8):
            self._copy(self._delay.address + half, self._delay.address, half)
        self._copy(self.address, self._host.ctypes.data, self.nbytes)

    def memory(self) -> Bytes:
        """What is in memory now."""
        self._copy(self._host.ctypes.data, self.address, self.nbytes)
        self._stream.record(self._end)
        self._end.synchronize()
        return self._host.copy()

    def close(self) -> None:
        self.memory()
        held: tuple[Held, ...] = (self._registered, self._memory, self._delay)
        for one in held:
            one.close()

    def _copy(self, *piece: int) -> None:
        self._stream.copy_each(*one_copy(*piece))


class Rigs:
    """Stagings over engines of their own, by one path, with pages that begin at any address."""

    def __init__(self, device: Device, cubin: bytes, path: PathName, **config: int) -> None:
        self._device = device
        settings = CudaConfig(path=path, **config)  # type: ignore[arg-type]
        self._paths, self._path = Paths(device, settings, lambda architecture: cubin), path
        self._engines: list[Engine] = []
        self._turn = itertools.count()

    def make(self, memory: Bytes, layout: PageLayout, block: BlockLayout, shard: Shard) -> Rig:
        staging, engine = self.staging(memory, layout, block, shard, next(self._turn) * 4 % 48)
        return Rig(staging, engine.memory)

    def staging(
        self, memory: Bytes, layout: PageLayout, block: BlockLayout, shard: Shard, offset: int = 0
    ) -> tuple[DeviceStaging, Engine]:
        engine = Engine(self._device, memory.nbytes, offset)
        self._engines.append(engine)
        engine.compute(memory)
        pages = DevicePages(engine.address, engine.nbytes, layout, block, shard)
        staging = choose(self._device, "GPU 0", pages, self._paths, self._path, lambda: engine.handle)
        assert staging.path_name == self._path
        return staging, engine

    def close(self) -> None:
        while self._engines:
            self._engines.pop().close()


def rigs(device: Device, cubin: bytes, path: PathName, **config: int) -> Iterator[Rigs]:
    if path == "batch" and not device.has_batch_copies:
        pytest.skip("this driver has no batch copies")
    made = Rigs(device, cubin, path, **config)
    yield made
    made.close()


class TestKernel(StagingTests):
    @pytest.fixture
    def make(self, device: Device, cubin: bytes) -> Iterator[MakeRig]:
        for made in rigs(device, cubin, "kernel", ring_bytes=1, thread_blocks=2):
            yield made.make


class TestBatch(StagingTests):
    @pytest.fixture
    def make(self, device: Device, cubin: bytes) -> Iterator[MakeRig]:
        for made in rigs(device, cubin, "batch"):
            yield made.make


class TestCopies(StagingTests):
    @pytest.fixture
    def make(self, device: Device, cubin: bytes) -> Iterator[MakeRig]:
        for made in rigs(device, cubin, "copies"):
            yield made.make


@pytest.fixture(params=PATHS)
def by_path(request: pytest.FixtureRequest, device: Device, cubin: bytes) -> Iterator[Rigs]:
    yield from rigs(device, cubin, request.param)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_large_pages_of_every_layout_and_width(by_path: Rigs, kind: str, itemsize: int) -> None:
    rng = np.random.default_rng(itemsize)
    heads = 1 if kind == "mla" else 8
    block = BlockLayout(
        num_layers=4,
        num_kv_heads=heads,
        block_tokens=32,
        head_dim=128,
        itemsize=itemsize,
        kv_factor=1 if kind == "mla" else 2,
    )
    shard = block.shard(0, 1)
    case = Case(rng, block, shard, page_layout(kind, rng, heads, 4, 16, 128 * itemsize))
    copied_right(by_path, case)


@pytest.mark.parametrize("offset", [0, 8, 4, 2, 1])
def test_misaligned_pages_are_copied_by_narrower_accesses(by_path: Rigs, offset: int) -> None:
    copied_right(by_path, small_case(), offset)


def copied_right(rigs: Rigs, case: Case, offset: int = 0) -> None:
    """A gather into poisoned slots and a scatter into poisoned pages: every other byte keeps its poison."""
    memory = case.memory()
    staging, engine = rigs.staging(memory, case.layout, case.block, case.shard, offset)
    with slots_of(case.rng, 4, case.block.slot_bytes) as arena:
        arena[:] = 0xA5
        batch = case.batch(4)
        expected = gathered(case, memory, *batch, arena)
        follow(staging)
        staging.gathers.copy(*batch, arena)
        finish(staging)
        assert np.array_equal(arena, expected)

        poison = np.full_like(memory, 0x5A)
        engine.compute(poison)
        batch = case.partial(4)
        expected_memory = scattered(case, poison, *batch, arena)
        follow(staging)
        staging.scatters.copy(*batch, arena)
        finish(staging)
        assert np.array_equal(engine.memory(), expected_memory)
        staging.close()


def test_every_kernel_loads(device: Device, cubin: bytes) -> None:
    device.activate()
    loaded = device.load(cubin)
    assert [loaded.kernel(name).name for name in KERNELS] == KERNELS
    with pytest.raises(DeviceError, match="CUDA_ERROR_NOT_FOUND"):
        loaded.kernel("kvferry_gather_v32")
    loaded.close()


def test_what_is_no_cubin_is_refused(device: Device) -> None:
    device.activate()
    with pytest.raises(DeviceError, match="cuModuleLoadData"):
        device.load(b"no cubin" * 64)


@pytest.mark.parametrize("is_registered", [False, True])
def test_pages_in_host_memory_are_refused(device: Device, is_registered: bool) -> None:
    case = small_case()
    device.activate()
    memory = np.frombuffer(mmap.mmap(-1, case.layout.extent_bytes()), np.uint8)
    held = device.register_host(memory.ctypes.data, memory.nbytes) if is_registered else None
    pages = DevicePages(memory.ctypes.data, memory.nbytes, case.layout, case.block, case.shard)
    try:
        with pytest.raises(DeviceError, match="pages in host memory, or of another GPU"):
            make_staging(0, pages, CudaConfig(), lambda: 0)
    finally:
        if held is not None:
            held.close()


def test_pages_behind_the_end_of_an_allocation_are_refused(device: Device) -> None:
    case = small_case()
    engine = Engine(device, case.layout.extent_bytes())
    pages = DevicePages(engine.address, 1 << 40, case.layout, case.block, case.shard)
    with pytest.raises(DeviceError, match="not this GPU's memory"):
        make_staging(0, pages, CudaConfig(), lambda: 0)
    engine.close()


def test_auto_measures_and_says_what_it_took(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    case = small_case()
    engine = Engine(device, case.layout.extent_bytes())
    pages = DevicePages(engine.address, engine.nbytes, case.layout, case.block, case.shard)
    make_staging(0, pages, CudaConfig(), lambda: engine.handle).close()
    assert "blocks go by" in caplog.text
    assert "GB/s out" in caplog.text
    engine.close()


@pytest.mark.parametrize("path", PATHS)
def test_single_pages_of_some_heads(device: Device, path: PathName) -> None:
    """As a transport copies them that goes through the host."""
    if path == "batch" and not device.has_batch_copies:
        pytest.skip("this driver has no batch copies")
    case, heads = small_case(), Heads(1, 2)
    memory, poison = case.memory(), np.full(case.layout.extent_bytes(), 0x5A, np.uint8)
    memory = memory[: poison.size]
    engine = Engine(device, poison.size)
    pages = DevicePages(engine.address, engine.nbytes, case.layout, case.block, case.shard)
    config = CudaConfig(ring_bytes=1)
    by_page = GpuPages(pages, lambda some: staging_by(0, some, config, path, lambda: 0))
    block = page_block(case.block, case.layout.page_tokens, heads)
    rows, expected = (np.zeros((2, block.payload_bytes), np.uint8) for _ in range(2))
    batch = ids([2], [0]), np.array([0, 1])
    for engines, copied in ((memory, "gather"), (poison, "scatter")):
        engine.compute(engines)
        assert np.array_equal(engine.memory(), engines)
        on_host = HostStaging(
            engines, narrow(case.layout, case.shard, heads), block, Shard(0, 0, heads.count, True)
        )
        getattr(on_host, copied)(*batch, expected)
        getattr(by_page.stage(heads), copied)(*batch, rows)
        assert np.array_equal(rows, expected)
        assert np.array_equal(engine.memory(), engines)
    by_page.close()
    engine.close()


@pytest.mark.parametrize("path", PATHS)
def test_the_vllm_workers_self_test_on_torchs_pages(device: Device, path: PathName) -> None:
    torch = pytest.importorskip("torch")
    from kvferry.engines.roundtrip import RoundTrip
    from kvferry.engines.vllm.worker import _staging

    if path == "batch" and not device.has_batch_copies:
        pytest.skip("this driver has no batch copies")
    block = BlockLayout(num_layers=3, num_kv_heads=4, block_tokens=64, head_dim=32, itemsize=2)
    memory = torch.zeros(3, 20, 4, 16, 64, dtype=torch.bfloat16, device="cuda:0")
    shard = block.shard(0, 1)
    layers = list(memory)
    proof = RoundTrip(layers, block, shard)
    staging = _staging(layers, 20, block, shard, CudaConfig(path=path), proof)
    assert isinstance(staging.kernel_pages, DeviceStaging)
    assert (staging.kernel_pages.path_name, proof.has_refused) == (path, False)
    assert not memory.any(), "the self-test leaves the cache as it was"
    staging.close()
