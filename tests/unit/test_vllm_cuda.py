"""How the vLLM worker comes to its staging on a GPU, and what doctor says: on stand-ins for torch and the driver."""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from played_device import PlayedDevice

from kvferry.connector.config import Config, CudaConfig
from kvferry.connector.errors import ArenaError, DeviceError, LayoutError
from kvferry.connector.finding import Finding
from kvferry.connector.layout import BlockLayout
from kvferry.connector.settings import Settings
from kvferry.connector.staging import Staging
from kvferry.connector.transport import Heads, PageMemory
from kvferry.cuda import choice, diagnosis
from kvferry.cuda.choice import Proof, unproved
from kvferry.cuda.staging import DeviceStaging
from kvferry.engines.vllm import memory as memory_module
from kvferry.engines.vllm import worker
from kvferry.engines.vllm.gpu_pages import GpuPages
from kvferry.engines.vllm.memory import page_memory
from kvferry.engines.vllm.packing import PLAIN

BLOCK = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=64, head_dim=8, itemsize=2)
PAGES, PAGE_TOKENS = 12, 16


class Layer:
    """As much of a tensor as the worker looks at: ``[pages, heads, tokens, content]`` of one allocation."""

    ndim = 4
    shape = (PAGES, 2, PAGE_TOKENS, 16)

    def __init__(self, storage: Any, index: int) -> None:
        self.device = SimpleNamespace(type="cuda", index=3)
        self._storage = storage
        self._index = index

    def stride(self) -> tuple[int, ...]:
        return (2 * PAGE_TOKENS * 16, PAGE_TOKENS * 16, 16, 1)

    def element_size(self) -> int:
        return 2

    def storage_offset(self) -> int:
        return self._index * PAGES * 2 * PAGE_TOKENS * 16

    def untyped_storage(self) -> Any:
        return self._storage

    def __getitem__(self, some: object) -> Layer:
        return self


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    played = ModuleType("torch")
    current = SimpleNamespace(cuda_stream=1)
    played.cuda = SimpleNamespace(current_stream=lambda device: current)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", played)
    return played


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PlayedDevice:
    played = PlayedDevice()
    played.activate()
    monkeypatch.setattr(choice, "open_device", {3: played}.__getitem__)
    monkeypatch.setattr(choice, "kept_kernels", lambda architecture: b"cubin")
    return played


def layers(device: PlayedDevice) -> list[Layer]:
    nbytes = BLOCK.num_layers * PAGES * 2 * PAGE_TOKENS * 16 * 2
    held, _ = device.memory(nbytes)
    storage = SimpleNamespace(data_ptr=lambda: held.address, nbytes=lambda: nbytes)
    return [Layer(storage, index) for index in range(BLOCK.num_layers)]


def staging(device: PlayedDevice, prove: Proof = unproved, **config: object) -> Any:
    made = worker._staging(layers(device), PAGES, BLOCK, BLOCK.shard(0, 1), CudaConfig(**config), prove)  # type: ignore[arg-type]
    return made.kernel_pages


def missing(index: int) -> None:
    """In place of ``open_device``."""
    raise DeviceError("open a GPU", "NVIDIA's packages are not there", "pip install 'kvferry[cuda]'")


class TorchCopies(SimpleNamespace):
    """In place of torch's copies, of which none is made."""

    pages_per_block = 4
    gathers = scatters = None

    def close(self) -> None:
        pass


@pytest.fixture
def torch_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    made_by_torch = ModuleType("kvferry.engines.torch_pages")
    made_by_torch.TorchPages = lambda *arguments: TorchCopies(arguments=arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, made_by_torch.__name__, made_by_torch)


class Rightly:
    """A proof that lets these stagings through, torch's copies being one of them."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self.proved: list[str] = []
        self.has_refused = False

    def __call__(self, staging: Staging) -> None:
        name = "torch" if isinstance(staging, TorchCopies) else staging.path_name  # type: ignore[attr-defined]
        self.proved.append(name)
        if name not in self._names:
            self.has_refused = True
            raise LayoutError(f"other bytes by {name}")


@pytest.mark.parametrize("path", ["auto", "kernel", "batch", "copies"])
def test_pages_on_a_gpu_are_staged_by_it(torch: ModuleType, device: PlayedDevice, path: str) -> None:
    made = staging(device, path=path)
    assert isinstance(made, DeviceStaging)
    assert made.pages_per_block == 4
    made.close()


def test_a_mark_is_on_the_stream_that_the_engine_uses_now(torch: ModuleType, device: PlayedDevice) -> None:
    made = staging(device, path="copies")
    before = len(device.engine.queue)
    made.mark()
    assert len(device.engine.queue) == before + 1
    made.close()


def test_without_the_staging_path_torch_copies_and_one_line_says_so(
    torch: ModuleType,
    torch_copies: None,
    device: PlayedDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(choice, "open_device", missing)
    caplog.set_level(logging.INFO)
    prove = Rightly("torch")
    assert len(staging(device, prove).arguments) == 4
    assert prove.proved == ["torch"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "rank 0: torch copies blocks page by page" in record.getMessage()
    assert "pip install 'kvferry[cuda]'" in record.getMessage()


@pytest.mark.parametrize("right", choice.PATHS)
def test_the_path_that_is_right_serves(
    torch: ModuleType, torch_copies: None, device: PlayedDevice, right: str
) -> None:
    made = staging(device, Rightly(right))
    assert made.path_name == right
    made.close()


def test_torch_copies_where_every_path_is_wrong_and_one_line_says_so(
    torch: ModuleType, torch_copies: None, device: PlayedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prove = Rightly("torch")
    assert isinstance(staging(device, prove), TorchCopies)
    assert sorted(prove.proved[:-1]) == ["batch", "copies", "kernel"]
    assert prove.proved[-1] == "torch"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "rank 0: torch copies blocks page by page" in record.getMessage()
    for path in choice.PATHS:
        assert f"{path} left out: the self-test failed: other bytes by {path}" in record.getMessage()
    assert len(device.allocations) == 1


def test_when_torchs_copies_are_wrong_too_the_error_has_every_reason(
    torch: ModuleType, torch_copies: None, device: PlayedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(
        LayoutError, match=r"^other bytes by torch, even by torch's copies; before them"
    ) as refused:
        staging(device, Rightly())
    for path in choice.PATHS:
        assert f"other bytes by {path}" in str(refused.value)
    assert caplog.records == [], "nobody says that torch copies"


def test_a_host_without_memory_for_the_proof_is_no_fault_of_the_path(
    torch: ModuleType, torch_copies: None, device: PlayedDevice
) -> None:
    proved = []

    def prove(staging: Staging) -> None:
        proved.append(staging)
        raise ArenaError("no memory for two slots")

    with pytest.raises(ArenaError):
        staging(device, prove)
    assert len(proved) == 1
    assert len(device.allocations) == 1


class Registered:
    """The worker's half, once it has been given pages."""

    def __init__(self, device: PlayedDevice, role: str = "kv_both", **config: Any) -> None:
        names = ["a", "b"]
        vllm_config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            kv_transfer_config=SimpleNamespace(kv_role=role, engine_id="engine"),
        )
        group = SimpleNamespace(layer_names=names, kv_cache_spec=None)
        plan: Any = SimpleNamespace(num_blocks=PAGES, kv_cache_groups=[group])
        self.worker = worker.WorkerSide(vllm_config, plan, Settings(Config(**config), {}), 0)
        self.worker.register(dict(zip(names, layers(device), strict=True)))  # type: ignore[arg-type]


@pytest.fixture
def register(
    torch: ModuleType, torch_copies: None, device: PlayedDevice, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., worker.WorkerSide]]:
    """Registers pages with a worker whose self-test is ``proof``."""
    made: list[worker.WorkerSide] = []
    monkeypatch.setattr(worker, "block_layout", lambda *_: BLOCK)
    monkeypatch.setattr(worker, "page_order", lambda *_: PLAIN)

    def with_proof(proof: Rightly | None, **config: Any) -> worker.WorkerSide:
        def round_trip(*_: object) -> Rightly:
            assert proof is not None, "there is no self-test"
            return proof

        monkeypatch.setattr(worker, "RoundTrip", round_trip)
        made.append(Registered(device, **config).worker)
        return made[-1]

    yield with_proof
    for one in made:
        one.close()


def test_where_every_way_is_wrong_the_cache_is_off_with_one_line(
    register: Callable[..., worker.WorkerSide], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    side = register(Rightly())
    assert side._stager is None
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert (
        "kvferry is off on rank 0: the start-up self-test failed: other bytes by torch" in record.getMessage()
    )


@pytest.mark.parametrize("right", ["kernel", "torch"])
def test_where_one_way_is_right_the_cache_is_on(
    register: Callable[..., worker.WorkerSide], right: str, caplog: pytest.LogCaptureFixture
) -> None:
    side = register(Rightly(right))
    assert side._stager is not None
    assert (side._gpu_pages is None) == (right == "torch")
    assert "kvferry is off" not in caplog.text


def test_without_the_self_test_nothing_is_proved(register: Callable[..., worker.WorkerSide]) -> None:
    side = register(None, self_test=False)
    assert side._stager is not None


@pytest.mark.parametrize(
    ("right", "has_cuda", "is_exported"),
    [("batch", True, True), ("torch", True, False), ("torch", False, True), (None, True, True)],
)
def test_pages_whose_addresses_are_in_doubt_are_not_handed_over(
    register: Callable[..., worker.WorkerSide],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    right: str | None,
    has_cuda: bool,
    is_exported: bool,
) -> None:
    played = SimpleNamespace(pages=object(), close=lambda: None)
    monkeypatch.setattr(worker, "export_pages", lambda *_: played)
    if not has_cuda:
        monkeypatch.setattr(choice, "open_device", missing)
    proof, cuda = Rightly(right) if right else None, CudaConfig(path="kernel")
    side = register(proof, role="kv_producer", self_test=right is not None, cuda=cuda)
    assert (side.exported() is played.pages) == is_exported
    assert ("takes part in no handoff: blocks that go by the addresses" in caplog.text) != is_exported


def handed_over(device: PlayedDevice, path: str = "auto") -> tuple[PageMemory, GpuPages]:
    """The rank's pages as transports see them, once the worker has chosen a path for blocks."""
    of_rank, shard, config = layers(device), BLOCK.shard(0, 1), CudaConfig(path=path)  # type: ignore[arg-type]
    chosen = worker._staging(of_rank, PAGES, BLOCK, shard, config, unproved).kernel_pages  # type: ignore[arg-type]
    assert isinstance(chosen, DeviceStaging)
    pages = worker._gpu_pages(of_rank, BLOCK, shard, config, chosen.path_name)  # type: ignore[arg-type]
    chosen.close()
    return page_memory(of_rank, PAGES, BLOCK, shard, pages), pages  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["auto", "kernel", "batch", "copies"])
def test_handed_over_pages_go_by_the_path_of_blocks(
    torch: ModuleType, device: PlayedDevice, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    caplog.set_level(logging.INFO)
    memory, pages = handed_over(device, path)
    (line,) = caplog.messages
    chosen = re.search(r"blocks go by (\w+)", line)
    assert chosen
    device.calls.clear()
    on_gpu = np.frombuffer((ctypes.c_uint8 * memory.nbytes).from_address(memory.address), np.uint8)
    on_gpu[:] = np.random.default_rng(0).integers(0, 256, on_gpu.size)
    heads = Heads(1, 1)
    rows = np.zeros((2, memory.page_bytes(heads)), np.uint8)
    memory.stage(heads).gather(np.array([[7], [3]], np.int32), np.array([1, 0]), rows)
    by_page = on_gpu.reshape(BLOCK.num_layers, PAGES, 2, -1)
    assert np.array_equal(rows, [by_page[:, page, 1].ravel() for page in (3, 7)])
    assert len(caplog.messages) == 1, "nothing is chosen anew"
    calls = {"kernel": "cuLaunchKernel", "batch": "cuMemcpyBatchAsync", "copies": "cuMemcpyAsync"}
    assert calls[chosen[1]] == next(call for call in calls.values() if call in device.calls)
    pages.close()
    assert device.registrations == []


@pytest.mark.parametrize(("path", "refused"), [("copies", "stream"), ("kernel", "allocate")])
def test_handed_over_pages_that_the_gpu_has_no_room_for_are_copied_by_torch(
    torch: ModuleType,
    device: PlayedDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    path: str,
    refused: str,
) -> None:
    memory, pages = handed_over(device, path)

    def full(*_: object, **named: object) -> None:
        raise DeviceError(refused, "CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(device, refused, full)
    monkeypatch.setattr(memory_module, "_DevicePages", lambda *arguments: arguments)
    _, layout, block, shard = memory.stage(Heads(1, 1))  # type: ignore[misc]
    assert (layout.num_heads, block.num_kv_heads, shard.num_heads) == (1, 1, 1)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "rank 0: torch copies pages that are handed over" in warning
    assert "CUDA_ERROR_OUT_OF_MEMORY" in warning
    pages.close()


def about_cuda(
    monkeypatch: pytest.MonkeyPatch, found: Callable[[int], object], driver: Path, compiles: bool = True
) -> list[Finding]:
    def compiled(architecture: str) -> bytes:
        if not compiles:
            raise DeviceError(f"compile staging.cu for {architecture}", "no", log="a line\nanother")
        return b"cubin"

    monkeypatch.setattr(diagnosis, "open_device", found)
    monkeypatch.setattr(diagnosis, "kept_kernels", compiled)
    return list(diagnosis.findings(driver))


def test_doctor_tells_which_ways_blocks_may_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (found,) = about_cuda(monkeypatch, lambda index: PlayedDevice(), tmp_path)
    assert (found.level, found.topic) == ("ok", "cuda")
    assert found.text == "GPU 0 is sm_90; blocks may go by kernel, batch, copies"


def test_doctor_tells_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = PlayedDevice(has_batch_copies=False)
    compiler, ways, driver = about_cuda(monkeypatch, lambda index: old, tmp_path, compiles=False)
    assert compiler.level == "warn"
    assert "\n" not in compiler.text
    assert ways.text.endswith("blocks may go by copies")
    assert "older than CUDA 12.8" in driver.text


@pytest.mark.parametrize(("has_driver", "level"), [(True, "warn"), (False, "ok")])
def test_doctor_minds_a_gpu_that_cannot_be_used_and_no_machine_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_driver: bool, level: str
) -> None:
    (found,) = about_cuda(monkeypatch, missing, tmp_path if has_driver else tmp_path / "nothing")
    assert found.level == level
    assert ("kvferry[cuda]" in found.text) == has_driver
