"""Which way blocks go on a GPU, on a played one with a played clock."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from played_device import PlayedDevice
from staging_kit import (
    KINDS,
    Case,
    finish,
    follow,
    gathered,
    ids,
    page_layout,
    pairs,
    random_case,
    slots_of,
    small_case,
)

from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import ArenaError, ConfigError, DeviceError, LayoutError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.settings import load_settings
from kvferry.connector.staging import Bytes, Staging
from kvferry.cuda import choice
from kvferry.cuda.choice import PathName, Paths, Proof, choose, make_staging, staging_by, unproved
from kvferry.cuda.geometry import CopyGeometry, copy_geometry
from kvferry.cuda.scratch import Scratch, miniature
from kvferry.cuda.staging import CopyPath, DevicePages, DeviceStaging

ENGINE = 1
"""The handle of the engine's stream."""

SPEEDS = {"cuMemcpyAsync": 4e-6, "cuMemcpyBatchAsync": 4e-6, "cuLaunchKernel": 4e-6}
"""Seconds of a call; all others are free."""


class Gpu:
    """A played GPU with an engine's pages."""

    def __init__(self, case: Case | None = None, speeds: dict[str, float] = SPEEDS, **about: object) -> None:
        self.device = PlayedDevice(**about)  # type: ignore[arg-type]
        self.device.activate()
        self.case = case or small_case()
        layout = self.case.layout
        held, self.memory = self.device.memory(layout.extent_bytes())
        self.pages = DevicePages(
            held.address, layout.extent_bytes(), layout, self.case.block, self.case.shard
        )
        self.speeds = speeds

    def clock(self) -> float:
        return 1e-6 + sum(self.speeds.get(call, 0.0) for call in self.device.calls)

    def choose(self, compiled: Callable[[str], bytes] | None = None, **config: object) -> DeviceStaging:
        settings = CudaConfig(**config)  # type: ignore[arg-type]
        paths = Paths(self.device, settings, compiled or (lambda architecture: b"cubin"))
        return self.choose_of(paths, settings.path)

    def choose_of(self, paths: Paths, wanted: str = "auto", prove: Proof = unproved) -> DeviceStaging:
        return choose(
            self.device,
            "GPU 0 (sm_90)",
            self.pages,
            paths,
            wanted,
            lambda: ENGINE,
            prove,
            self.tick,  # type: ignore[arg-type]
        )

    def tick(self) -> float:
        """Time never stands still."""
        self.ticks = getattr(self, "ticks", 0) + 1
        return self.clock() + self.ticks * 1e-12


def no_compiler(architecture: str) -> bytes:
    raise DeviceError(f"compile for {architecture}", "NVIDIA's compiler is not there")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_a_miniature_is_copied_as_the_pages_it_stands_for(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads = 1 if kind == "mla" else 2
    block = BlockLayout(
        num_layers=3,
        num_kv_heads=heads,
        block_tokens=4,
        head_dim=8,
        itemsize=2,
        kv_factor=1 if kind == "mla" else 2,
    )
    layout = page_layout(kind, rng, heads, 3, 4, 16)
    small = miniature(layout, 2)
    full, less = (copy_geometry(one, block, block.shard(0, 1)) for one in (layout, small))
    for field in ("run_bytes", "num_heads", "num_tokens", "num_kv", "page_stride", "vector_bytes"):
        assert getattr(less, field) == getattr(full, field)
    taken = np.concatenate([pairs(block, block.shard(0, 1), small, [page])[0] for page in range(2)])
    assert len(np.unique(taken)) == len(taken), "no two bytes in one place"
    assert small.extent_bytes() <= layout.extent_bytes() * 2 / layout.num_pages + 1024, "and gaps"
    assert miniature(layout, layout.num_pages) == layout


def test_pages_without_a_gap_behind_the_last_shrink_too() -> None:
    layout = page_layout("nhd_fused", np.random.default_rng(0), 1, 2, 4, 16)
    padded = msgspec.structs.replace(
        layout, num_pages=100, page_stride=256, layer_offsets=(64, 64 + 99 * 256 + 128)
    )
    assert miniature(padded, 3).layer_offsets == (64, 64 + 2 * 256 + 128)


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({"cuMemcpyAsync": 1e-3, "cuMemcpyBatchAsync": 1e-3, "cuLaunchKernel": 1e-6}, "batch"),
        ({"cuMemcpyAsync": 1e-6, "cuMemcpyBatchAsync": 1e-2, "cuLaunchKernel": 1e-2}, "copies"),
        ({"cuMemcpyAsync": 1e-9, "cuMemcpyBatchAsync": 1e-2, "cuLaunchKernel": 1.0}, "copies"),
    ],
)
def test_the_fastest_is_taken_and_said(
    speeds: dict[str, float], best: str, log: pytest.LogCaptureFixture
) -> None:
    Gpu(speeds=speeds).choose().close()
    (line,) = [record.getMessage() for record in log.records]
    assert line.startswith(f"GPU 0 (sm_90): blocks go by {best} (")
    for path in choice.PATHS:
        assert f"{path} " in line
    assert line.count("GB/s out") == 3


def test_a_kernel_is_taken_where_copies_are_many(log: pytest.LogCaptureFixture) -> None:
    case = small_case()
    Gpu(case, has_batch_copies=False, speeds={"cuMemcpyAsync": 1e-3, "cuLaunchKernel": 1e-9}).choose().close()
    (line,) = [record.getMessage() for record in log.records]
    assert "blocks go by kernel" in line
    assert "batch left out: cuMemcpyBatchAsync failed: the driver has none" in line


def test_a_tie_is_won_by_what_leaves_the_multiprocessors_alone() -> None:
    trials = [
        choice.Trial("batch", 100.0, 100.0),
        choice.Trial("copies", 90.0, 90.0),
        choice.Trial("kernel", 103.0, 103.0),
    ]
    assert choice._ranked(trials) == ["batch", "kernel", "copies"]
    trials[2] = choice.Trial("kernel", 110.0, 110.0)
    assert choice._ranked(trials) == ["kernel", "batch", "copies"]


def test_the_engines_pages_are_not_touched_and_everything_is_given_back() -> None:
    gpu = Gpu(random_case(7))
    before = gpu.memory.copy()
    staging = gpu.choose(path="auto")
    assert np.array_equal(gpu.memory, before)
    staging.close()
    assert len(gpu.device.allocations) == 1
    assert gpu.device.registrations == []


@pytest.mark.parametrize("path", ["auto", "kernel", "batch", "copies"])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_made_copies(path: str, seed: int) -> None:
    gpu = Gpu(random_case(seed), seed=seed)
    case = gpu.case
    staging = gpu.choose(path=path)
    content = case.rng.integers(0, 256, gpu.memory.size, dtype=np.uint8)
    gpu.device.engine.do(lambda: np.copyto(gpu.memory, content))
    with slots_of(case.rng, 4, case.block.slot_bytes) as arena:
        batch = case.batch(4)
        expected = gathered(case, content, *batch, arena)
        follow(staging)
        staging.gathers.copy(*batch, arena)
        finish(staging)
        assert np.array_equal(arena, expected)
        staging.close()


def test_a_path_that_is_asked_for_is_not_measured(log: pytest.LogCaptureFixture) -> None:
    gpu = Gpu()
    gpu.choose(path="copies").close()
    assert "cuMemcpyAsync" not in gpu.device.calls
    assert [record.getMessage() for record in log.records] == ["GPU 0 (sm_90): blocks go by copies"]


@pytest.mark.parametrize(
    ("path", "why", "other"),
    [
        ("batch", "batch left out: cuMemcpyBatchAsync failed: the driver has none", "kernel"),
        (
            "kernel",
            "kernel left out: CUDA failed to compile for sm_90: NVIDIA's compiler is not there",
            "copies",
        ),
    ],
)
def test_a_path_that_is_asked_for_and_is_not_there_is_replaced_with_a_warning(
    path: str, why: str, other: str, log: pytest.LogCaptureFixture
) -> None:
    compiled = no_compiler if path == "kernel" else None
    gpu = Gpu(has_batch_copies=False)
    staging = gpu.choose(compiled, path=path)
    assert staging.path_name == other
    staging.close()
    (record,) = log.records
    assert record.levelname == "WARNING"
    assert f"blocks go by {other} instead of {path} ({why}" in record.getMessage()
    assert "GB/s" not in record.getMessage(), "nothing is measured"


def test_without_a_compiler_copies_remain(log: pytest.LogCaptureFixture) -> None:
    Gpu().choose(no_compiler).close()
    assert "kernel left out: CUDA failed to compile for sm_90: NVIDIA's compiler is not there" in log.text


def test_without_memory_to_measure_on_the_first_that_works_is_taken(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu()

    def full(nbytes: int) -> None:
        raise DeviceError("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(gpu.device, "allocate", full)
    gpu.choose().close()
    assert "cannot be compared: cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY" in log.text
    assert "blocks go by batch instead of kernel (kernel left out: cuMemAlloc failed" in log.text
    assert gpu.device.registrations == []


def test_a_compilers_log_is_kept_out_of_the_line(log: pytest.LogCaptureFixture) -> None:
    def refused(architecture: str) -> bytes:
        raise DeviceError(
            f"compile for {architecture}", "NVRTC_ERROR_COMPILATION", log="staging.cu(3): error"
        )

    Gpu().choose(refused).close()
    warning, line = (record.getMessage() for record in log.records)
    assert "staging.cu(3): error" in warning
    assert "\n" not in line
    assert "kernel left out: CUDA failed to compile for sm_90: NVRTC_ERROR_COMPILATION" in line


def test_every_path_can_be_configured() -> None:
    for path in ("auto", *choice.PATHS):
        assert load_settings({"cuda": {"path": path}}).config.cuda.path == path
    with pytest.raises(ConfigError, match=r"cuda\.path"):
        load_settings({"cuda": {"path": "dma"}})
    with pytest.raises(ConfigError, match=r"cuda\.thread_blocks"):
        load_settings({"cuda": {"thread_blocks": 0}})
    assert load_settings({"cuda": {"ring_bytes": "128MiB"}}).config.cuda.ring_bytes == 128 << 20


def test_when_nothing_works_the_error_says_why_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(has_batch_copies=False)

    def refused(is_urgent: bool) -> None:
        raise DeviceError("cuStreamCreateWithPriority", "CUDA_ERROR_PLAYED")

    monkeypatch.setattr(gpu.device, "stream", refused)
    with pytest.raises(DeviceError, match=r"no path works here \(batch left out: .*; copies left out: .*"):
        gpu.choose()
    assert len(gpu.device.allocations) == 1


@pytest.mark.parametrize(
    "refused",
    [
        "cuMemAlloc", "cuMemHostRegister", "cuModuleLoadData", "cuStreamCreateWithPriority", "cuEventCreate",
        "cuMemcpyAsync", "cuMemcpyBatchAsync", "cuLaunchKernel",
    ],
)  # fmt: skip
@pytest.mark.parametrize("turn", [1, 3])
def test_a_fault_in_a_trial_costs_no_more_than_its_path(
    refused: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(seed=turn)
    call = gpu.device.call
    counts: list[str] = []

    def counted(name: str) -> None:
        call(name)
        counts.append(name)
        if name == refused and counts.count(name) == turn:
            raise DeviceError(name, "CUDA_ERROR_PLAYED")

    monkeypatch.setattr(gpu.device, "call", counted)
    gpu.choose().close()
    assert len(gpu.device.allocations) == 1
    assert gpu.device.registrations == []


def test_no_round_follows_once_the_time_is_over() -> None:
    quick, slow = Gpu(), Gpu(speeds={"cuMemcpyAsync": 1.0, "cuMemcpyBatchAsync": 1.0, "cuLaunchKernel": 1.0})
    quick.choose().close()
    slow.choose().close()
    counts = [gpu.device.calls.count("cuMemcpyBatchAsync") for gpu in (quick, slow)]
    assert counts[0] == 6 * counts[1]


def test_scratch_that_the_host_has_no_room_for_leaves_nothing_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*arguments: object) -> None:
        raise DeviceError("arena", "none")

    monkeypatch.setattr("kvferry.cuda.scratch.Arena.create", refused)
    gpu = Gpu()
    with pytest.raises(DeviceError):
        Scratch(gpu.device, gpu.case.layout, gpu.case.block)
    assert len(gpu.device.allocations) == 1


def test_pages_that_are_not_this_gpus_memory_are_refused() -> None:
    gpu = Gpu()
    elsewhere: Bytes = gpu.case.memory()
    gpu.pages = gpu.pages._replace(address=elsewhere.ctypes.data)
    with pytest.raises(DeviceError, match="pages in host memory, or of another GPU"):
        gpu.choose()


def test_without_a_gpu_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(index: int) -> None:
        raise DeviceError("open a GPU", "there is no NVIDIA driver", "install the GPU's driver")

    monkeypatch.setattr(choice, "open_device", missing)
    with pytest.raises(DeviceError, match="install the GPU's driver"):
        make_staging(0, Gpu().pages, CudaConfig(), lambda: ENGINE)


def test_the_gpu_is_opened_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(choice, "open_device", {3: gpu.device}.__getitem__)
    staging = make_staging(3, gpu.pages, CudaConfig(path="batch"), lambda: ENGINE)
    staging.gathers.copy(
        ids([0, 1])[:0], np.zeros(0, np.int64), np.zeros((1, gpu.case.block.slot_bytes), np.uint8)
    )
    staging.close()


def test_by_one_path_means_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(has_batch_copies=False)
    monkeypatch.setattr(choice, "open_device", {3: gpu.device}.__getitem__)
    staging = staging_by(3, gpu.pages, CudaConfig(), "copies", lambda: ENGINE)
    assert staging.path_name == "copies"
    staging.close()
    with pytest.raises(DeviceError, match="the driver has none"):
        staging_by(3, gpu.pages, CudaConfig(), "batch", lambda: ENGINE)


class Misled(Paths):
    """Paths of which some copy other pages than the engine's."""

    def __init__(self, gpu: Gpu, *misled: PathName) -> None:
        super().__init__(gpu.device, CudaConfig(), lambda architecture: b"cubin")
        self._pages = gpu.pages.address
        self._misled = misled
        self._elsewhere, memory = gpu.device.memory(gpu.pages.nbytes)
        memory[:] = 0x11

    def make(self, name: PathName, pages: int, geometry: CopyGeometry) -> CopyPath:
        if name not in self._misled or pages != self._pages:
            return super().make(name, pages, geometry)
        return super().make(name, self._elsewhere.address, geometry.at(self._elsewhere.address))


class Gather:
    """Proves that blocks come out of the engine's pages; notes what it was called with."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.proved: list[str] = []
        self.allocations: list[int] = []
        """On the GPU at each call."""

    def __call__(self, staging: Staging) -> None:
        assert isinstance(staging, DeviceStaging)
        self.proved.append(staging.path_name)
        self.allocations.append(len(self._gpu.device.allocations))
        case, memory = self._gpu.case, self._gpu.memory
        memory[:] = case.rng.integers(0, 256, memory.size, dtype=np.uint8)
        with slots_of(case.rng, 4, case.block.slot_bytes) as arena:
            batch = case.batch(4)
            expected = gathered(case, memory, *batch, arena)
            follow(staging)
            staging.gathers.copy(*batch, arena)
            finish(staging)
            staging.detach(arena)
            if not np.array_equal(arena, expected):
                raise LayoutError("other bytes")


MANY_RUNS_ARE_SLOW = {"cuMemcpyAsync": 1e-3, "cuMemcpyBatchAsync": 1e-3, "cuLaunchKernel": 1e-6}
"""``batch`` is fastest, then ``kernel``."""


@pytest.mark.parametrize(
    ("misled", "proved"),
    [
        ((), ["batch"]),
        (("kernel",), ["batch"]),
        (("batch",), ["batch", "kernel"]),
        (("batch", "kernel"), ["batch", "kernel", "copies"]),
    ],
)
def test_a_path_that_is_wrong_is_left_out_and_the_next_best_serves(
    misled: tuple[PathName, ...], proved: list[PathName], log: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu(speeds=MANY_RUNS_ARE_SLOW)
    paths, prove = Misled(gpu, *misled), Gather(gpu)
    staging = gpu.choose_of(paths, prove=prove)
    assert prove.proved == proved
    assert staging.path_name == proved[-1]
    prove(staging)
    staging.close()
    assert len(gpu.device.allocations) == 2
    assert gpu.device.registrations == []
    (record,) = log.records
    wrong = proved[:-1]
    instead = f" instead of {proved[0]}" if wrong else ""
    assert f"blocks go by {proved[-1]}{instead} (" in record.getMessage()
    assert record.levelname == ("WARNING" if wrong else "INFO")
    assert record.getMessage().count("left out") == len(wrong)
    for path in wrong:
        assert f"{path} left out: the self-test failed: other bytes" in record.getMessage()


@pytest.mark.parametrize("path", choice.PATHS)
def test_a_path_that_is_asked_for_and_is_wrong_is_replaced_with_a_warning(
    path: PathName, log: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu()
    prove = Gather(gpu)
    staging = gpu.choose_of(Misled(gpu, path), path, prove)
    other = "batch" if path == "kernel" else "kernel"
    assert (prove.proved, staging.path_name) == ([path, other], other)
    staging.close()
    (record,) = log.records
    assert record.levelname == "WARNING"
    expected = f"blocks go by {other} instead of {path} ({path} left out: the self-test failed: other bytes)"
    assert record.getMessage().endswith(expected)


@pytest.mark.parametrize("wanted", ["auto", "batch"])
def test_when_every_path_is_wrong_the_error_says_so_for_each(
    wanted: str, log: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu()
    with pytest.raises(DeviceError, match="no path works here") as refused:
        gpu.choose_of(Misled(gpu, *choice.PATHS), wanted, Gather(gpu))
    for path in choice.PATHS:
        assert f"{path} left out: the self-test failed: other bytes" in str(refused.value)
    assert len(gpu.device.allocations) == 2
    assert gpu.device.registrations == []
    assert log.records == []


def test_unproved_a_wrong_path_serves() -> None:
    gpu = Gpu()
    staging = gpu.choose_of(Misled(gpu, "batch"), "batch")
    assert staging.path_name == "batch"
    with pytest.raises(LayoutError):
        Gather(gpu)(staging)
    staging.close()


def test_what_a_wrong_path_held_is_given_back_before_the_next_is_made() -> None:
    gpu = Gpu()
    prove = Gather(gpu)
    gpu.choose_of(Misled(gpu, "kernel"), "kernel", prove).close()
    with_ring, without = prove.allocations
    assert with_ring > without == 2


def test_a_path_that_the_gpu_refuses_to_prove_is_left_out(log: pytest.LogCaptureFixture) -> None:
    gpu = Gpu()

    def prove(staging: Staging) -> None:
        assert isinstance(staging, DeviceStaging)
        if staging.path_name == "batch":
            raise DeviceError("cuMemcpyBatchAsync", "CUDA_ERROR_PLAYED")

    staging = gpu.choose_of(Misled(gpu), "batch", prove)
    assert staging.path_name == "kernel"
    staging.close()
    assert "batch left out: cuMemcpyBatchAsync failed: CUDA_ERROR_PLAYED)" in log.text


def test_what_cannot_be_given_back_hides_no_reason(log: pytest.LogCaptureFixture) -> None:
    gpu = Gpu()

    def prove(staging: Staging) -> None:
        assert isinstance(staging, DeviceStaging)
        if staging.path_name == "kernel":
            gpu.device.fails_at = len(gpu.device.calls)
            raise LayoutError("other bytes")

    staging = gpu.choose_of(Misled(gpu), "kernel", prove)
    assert staging.path_name == "batch"
    about_closing, line = (record.getMessage() for record in log.records)
    assert "what kernel held could not be given back: " in about_closing
    assert "CUDA_ERROR_PLAYED" in about_closing
    assert "kernel left out: the self-test failed: other bytes" in line
    staging.close()
    assert len(gpu.device.allocations) == 2


@pytest.mark.parametrize("wanted", ["auto", "kernel"])
@pytest.mark.parametrize("error", [ArenaError("no memory for two slots"), RuntimeError("torch says no")])
def test_what_is_not_a_paths_fault_goes_up_at_once(error: Exception, wanted: str) -> None:
    gpu = Gpu()
    proved = []

    def prove(staging: Staging) -> None:
        proved.append(staging)
        raise error

    with pytest.raises(type(error), match=str(error)):
        gpu.choose_of(Misled(gpu), wanted, prove)
    assert len(proved) == 1
    assert len(gpu.device.allocations) == 2, "closed all the same"
