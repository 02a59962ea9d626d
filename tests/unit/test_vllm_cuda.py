"""How the vLLM worker comes to its staging on a GPU, and what doctor says: on stand-ins for torch and the driver."""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from played_device import PlayedDevice

from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError
from kvferry.connector.finding import Finding
from kvferry.connector.layout import BlockLayout
from kvferry.connector.transport import Heads, PageMemory
from kvferry.cuda import choice, diagnosis
from kvferry.cuda.staging import DeviceStaging
from kvferry.engines.vllm import memory as memory_module
from kvferry.engines.vllm import worker
from kvferry.engines.vllm.gpu_pages import GpuPages
from kvferry.engines.vllm.memory import page_memory

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


def staging(device: PlayedDevice, **config: object) -> Any:
    made = worker._staging(layers(device), PAGES, BLOCK, BLOCK.shard(0, 1), CudaConfig(**config))  # type: ignore[arg-type]
    return made.kernel_pages


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
    torch: ModuleType, device: PlayedDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(index: int) -> None:
        raise DeviceError("open a GPU", "NVIDIA's packages are not there", "pip install 'kvferry[cuda]'")

    made_by_torch = ModuleType("kvferry.engines.torch_pages")
    made_by_torch.TorchPages = lambda *arguments: SimpleNamespace(arguments=arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, made_by_torch.__name__, made_by_torch)
    monkeypatch.setattr(choice, "open_device", missing)
    caplog.set_level(logging.INFO)
    assert len(staging(device).arguments) == 4
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "rank 0: torch copies blocks page by page" in record.getMessage()
    assert "pip install 'kvferry[cuda]'" in record.getMessage()


def handed_over(device: PlayedDevice, path: str = "auto") -> tuple[PageMemory, GpuPages]:
    """The rank's pages as transports see them, once the worker has chosen a path for blocks."""
    of_rank, shard, config = layers(device), BLOCK.shard(0, 1), CudaConfig(path=path)  # type: ignore[arg-type]
    chosen = worker._staging(of_rank, PAGES, BLOCK, shard, config).kernel_pages  # type: ignore[arg-type]
    pages = worker._gpu_pages(of_rank, BLOCK, shard, config, chosen.path_name)  # type: ignore[arg-type]
    chosen.close()
    return page_memory(of_rank, PAGES, BLOCK, shard, pages), pages  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["auto", "kernel", "batch", "copies"])
def test_handed_over_pages_go_by_the_path_of_blocks(
    torch: ModuleType, device: PlayedDevice, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    caplog.set_level(logging.INFO)
    memory, pages = handed_over(device, path)
    (chosen,) = caplog.messages
    measured = re.match(r".* blocks go by \w+", chosen)
    on_gpu = np.frombuffer((ctypes.c_uint8 * memory.nbytes).from_address(memory.address), np.uint8)
    on_gpu[:] = np.random.default_rng(0).integers(0, 256, on_gpu.size)
    heads = Heads(1, 1)
    rows = np.zeros((2, memory.page_bytes(heads)), np.uint8)
    memory.stage(heads).gather(np.array([[7], [3]], np.int32), np.array([1, 0]), rows)
    by_page = on_gpu.reshape(BLOCK.num_layers, PAGES, 2, -1)
    assert np.array_equal(rows, [by_page[:, page, 1].ravel() for page in (3, 7)])
    assert measured
    assert caplog.messages[1:] == [measured.group()], "the same, without measuring"
    pages.close()
    assert device.registrations == []


def test_handed_over_pages_that_the_gpu_has_no_room_for_are_copied_by_torch(
    torch: ModuleType,
    device: PlayedDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory, pages = handed_over(device, "copies")

    def full(is_urgent: bool) -> None:
        raise DeviceError("cuStreamCreateWithPriority", "CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(device, "stream", full)
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
    def missing(index: int) -> None:
        raise DeviceError("open a GPU", "NVIDIA's packages are not there", "pip install 'kvferry[cuda]'")

    (found,) = about_cuda(monkeypatch, missing, tmp_path if has_driver else tmp_path / "nothing")
    assert found.level == level
    assert ("kvferry[cuda]" in found.text) == has_driver
