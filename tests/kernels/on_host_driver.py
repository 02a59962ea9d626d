"""Refusals, old drivers, other GPUs and misuse, through NVIDIA's bindings.

Run by test_host_driver.py, in a process of its own.
"""

from __future__ import annotations

import gc
import mmap
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import driver
from host_driver import HostDriver
from staging_kit import small_case

import kvferry.cuda.driver
from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError
from kvferry.cuda.choice import make_staging
from kvferry.cuda.driver import Addresses, Device, Held, Kernels, open_device
from kvferry.cuda.program import compile_kernels
from kvferry.cuda.staging import DevicePages

OLD_VERSION = 12070
"""The last without batch copies."""
Code = driver.CUresult
NBYTES = 8192


@pytest.fixture(autouse=True)
def as_after_a_start(host_driver: HostDriver, is_used_rightly: None) -> Iterator[None]:
    host_driver.set()
    yield
    for function in REFUSALS:
        host_driver.refuse(function, 0)


@pytest.fixture
def device() -> Device:
    return open_device(0)


@pytest.fixture(scope="session")
def cubin() -> bytes:
    return compile_kernels("sm_90")


@pytest.fixture
def slots(device: Device) -> Iterator[int]:
    """Return the address of registered host memory."""
    memory = np.frombuffer(mmap.mmap(-1, NBYTES), np.uint8)
    held = device.register_host(memory.ctypes.data, NBYTES)
    yield memory.ctypes.data
    held.close()


@pytest.fixture
def pages(device: Device) -> Iterator[int]:
    """Return the address of device memory."""
    held = device.allocate(NBYTES)
    yield held.address
    held.close()


def array(*values: int) -> Addresses:
    return np.array(values, np.uint64)


def use_everything(cubin: bytes) -> None:
    """Call every function of the driver that kvferry calls, and give everything back."""
    device = open_device(0)
    stream, event = device.stream(is_urgent=True), device.event()
    memory = np.frombuffer(mmap.mmap(-1, NBYTES), np.uint8)
    held: list[Held | Kernels] = []
    try:
        held.append(allocated := device.allocate(NBYTES))
        held.append(device.register_host(memory.ctypes.data, NBYTES))
        pages = allocated.address
        assert device.holds(pages, NBYTES)
        stream.copy_each(array(pages), array(memory.ctypes.data), array(NBYTES))
        stream.copy_batch(array(memory.ctypes.data), array(pages), array(NBYTES))
        held.append(kernels := device.load(cubin))
        launched(device, kernels.kernel("kvferry_gather_v1"), pages)
        stream.record(event)
        stream.wait(event)
        event.synchronize()
    finally:
        for one in held:
            one.close()


def launched(
    device: Device, kernel: object, pages: int, threads: int = 32, page_ids: int | None = None
) -> None:
    """Gather one byte of page 0, from device memory of zeros to behind it."""
    geometry = struct.pack("<11q7I4x", *([1] * 11), *([1] * 5), 0, 1)
    addresses = (pages, pages + 64, pages + 128, pages if page_ids is None else page_ids)
    zeros = np.frombuffer(mmap.mmap(-1, 64), np.uint8)
    held = device.register_host(zeros.ctypes.data, zeros.nbytes)
    stream = device.stream(is_urgent=True)
    stream.copy_each(array(pages), array(zeros.ctypes.data), array(zeros.nbytes))
    held.close()
    arguments = [geometry, *(struct.pack("<Q", address) for address in addresses), struct.pack("<i", 1)]
    stream.launch(kernel, 1, threads, arguments)  # type: ignore[arg-type]


REFUSALS = {
    "cuInit": Code.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
    "cuDeviceGetCount": Code.CUDA_ERROR_SYSTEM_NOT_READY,
    "cuDeviceGet": Code.CUDA_ERROR_DEVICE_UNAVAILABLE,
    "cuDevicePrimaryCtxRetain": Code.CUDA_ERROR_OUT_OF_MEMORY,
    "cuCtxSetCurrent": Code.CUDA_ERROR_CONTEXT_IS_DESTROYED,
    "cuDeviceGetAttribute": Code.CUDA_ERROR_INVALID_VALUE,
    "cuCtxGetStreamPriorityRange": Code.CUDA_ERROR_INVALID_CONTEXT,
    "cuDriverGetVersion": Code.CUDA_ERROR_UNKNOWN,
    "cuStreamCreateWithPriority": Code.CUDA_ERROR_OUT_OF_MEMORY,
    "cuEventCreate": Code.CUDA_ERROR_OUT_OF_MEMORY,
    "cuMemAlloc": Code.CUDA_ERROR_OUT_OF_MEMORY,
    "cuMemHostRegister": Code.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
    "cuMemcpyAsync": Code.CUDA_ERROR_LAUNCH_FAILED,
    "cuMemcpyBatchAsync": Code.CUDA_ERROR_NOT_SUPPORTED,
    "cuModuleLoadData": Code.CUDA_ERROR_NO_BINARY_FOR_GPU,
    "cuModuleGetFunction": Code.CUDA_ERROR_NOT_FOUND,
    "cuLaunchKernel": Code.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
    "cuEventRecord": Code.CUDA_ERROR_ILLEGAL_ADDRESS,
    "cuStreamWaitEvent": Code.CUDA_ERROR_INVALID_HANDLE,
    "cuEventSynchronize": Code.CUDA_ERROR_ECC_UNCORRECTABLE,
}


GIVING_BACK = {"cuStreamDestroy", "cuEventDestroy", "cuMemFree", "cuMemHostUnregister", "cuModuleUnload"}
ASKING = {"cuGetProcAddress", "cuPointerGetAttribute"}
"""To these a refusal is an answer."""


def test_every_function_is_used_rightly(cubin: bytes) -> None:
    used = set(re.findall(r"\bcu[A-Z]\w+", Path(kvferry.cuda.driver.__file__).read_text()))
    assert used == {*REFUSALS, *GIVING_BACK, *ASKING}
    use_everything(cubin)


@pytest.mark.parametrize("function", REFUSALS)
def test_a_refusal_arrives_with_its_function_and_name(
    host_driver: HostDriver, cubin: bytes, function: str
) -> None:
    host_driver.refuse(function, REFUSALS[function])
    with pytest.raises(DeviceError) as caught:
        use_everything(cubin)
    assert caught.value.op == function
    assert caught.value.code.split()[0] == REFUSALS[function].name


def test_a_refusal_to_take_memory_back_arrives(host_driver: HostDriver, device: Device) -> None:
    memory = np.frombuffer(mmap.mmap(-1, NBYTES), np.uint8)
    for held, function in (
        (device.allocate(NBYTES), "cuMemFree"),
        (device.register_host(memory.ctypes.data, NBYTES), "cuMemHostUnregister"),
    ):
        host_driver.refuse(function, Code.CUDA_ERROR_ILLEGAL_ADDRESS)
        with pytest.raises(DeviceError, match=f"{function} failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
            held.close()
        host_driver.refuse(function, 0)
        held.close()  # is not asked again
        assert getattr(driver, function)(held.address) == (Code.CUDA_SUCCESS,)


def test_without_a_gpu_opening_says_so(host_driver: HostDriver) -> None:
    host_driver.set(num_devices=0)
    with pytest.raises(DeviceError, match="cuInit failed: CUDA_ERROR_NO_DEVICE; nvidia-smi must list a GPU"):
        open_device(0)


def test_memory_of_another_gpu_is_told_apart(host_driver: HostDriver) -> None:
    host_driver.set(num_devices=2)
    first, second = open_device(0), open_device(1)
    held = second.allocate(NBYTES)
    assert second.holds(held.address, NBYTES)
    assert not second.holds(held.address, NBYTES + 1)
    assert not first.holds(held.address, NBYTES)
    second.activate()
    held.close()
    with pytest.raises(DeviceError, match="this process sees 2; check CUDA_VISIBLE_DEVICES"):
        open_device(2)


def staged(device: Device, path: str = "auto") -> bytes:
    """Bring a block from an engine's pages of zeros to an arena by ``make_staging``; return the slot."""
    case = small_case()
    memory = device.allocate(case.layout.extent_bytes())
    arena = np.frombuffer(mmap.mmap(-1, case.block.slot_bytes), np.uint8).reshape(1, -1)
    pages = DevicePages(memory.address, case.layout.extent_bytes(), case.layout, case.block, case.shard)
    try:
        staging = make_staging(0, pages, CudaConfig(path=path), lambda: 0)  # type: ignore[arg-type]
        try:
            staging.gathers.copy(np.array([[0, 1]], np.int32), np.array([0]), arena)
            staging.gathers.finish()
        finally:
            staging.close()
    finally:
        memory.close()
    return arena.tobytes()


def test_a_driver_without_batch_copies(host_driver: HostDriver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    host_driver.set(version=OLD_VERSION)
    device = open_device(0)
    assert not device.has_batch_copies
    with pytest.raises(DeviceError, match=r"use a driver of CUDA 12\.8 or newer"):
        device.stream(is_urgent=True).copy_batch(array(1), array(2), array(3))
    assert set(staged(device, "batch")[: small_case().block.payload_bytes]) == {0xDD}
    assert re.search(r"kernel instead of batch \(batch left out: .* it needs one of CUDA 12\.8", caplog.text)
    caplog.clear()
    assert set(staged(device)[: small_case().block.payload_bytes]) == {0xDD}
    assert "blocks go by" in caplog.text
    assert "batch left out" in caplog.text


def test_a_driver_that_registers_no_memory(host_driver: HostDriver) -> None:
    device = open_device(0)
    host_driver.refuse("cuMemHostRegister", Code.CUDA_ERROR_NOT_SUPPORTED)
    with pytest.raises(
        DeviceError, match=r"no path works here.*cuMemHostRegister failed: CUDA_ERROR_NOT_SUPPORTED"
    ):
        staged(device)
    with pytest.raises(DeviceError, match="cuMemHostRegister failed: CUDA_ERROR_NOT_SUPPORTED"):
        staged(device, "copies")


def test_a_staging_is_closed_by_a_driver_that_waits_for_nothing(host_driver: HostDriver) -> None:
    device = open_device(0)
    host_driver.refuse("cuEventSynchronize", Code.CUDA_ERROR_LAUNCH_FAILED)
    with pytest.raises(DeviceError, match="cuEventSynchronize failed: CUDA_ERROR_LAUNCH_FAILED"):
        staged(device, "copies")


def test_memory_is_registered_once(device: Device, slots: int) -> None:
    with pytest.raises(DeviceError, match="CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"):
        device.register_host(slots + 4096, 1)


def test_a_refused_batch_names_the_copy(
    host_driver: HostDriver, device: Device, pages: int, slots: int
) -> None:
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE at copy 1 of 3"):
        device.stream(is_urgent=True).copy_batch(
            array(pages, pages + NBYTES, pages), array(slots, slots, slots), array(8, 8, 8)
        )
    assert host_driver.take_misuses() == ["cuMemcpyBatchAsync: to memory that it does not know"]


Wrong = Callable[[Device, int, int, bytes], object]


def destroyed(device: Device, cubin: bytes) -> object:
    """Return a kernel whose module is unloaded."""
    kernels = device.load(cubin)
    kernel = kernels.kernel("kvferry_gather_v16")
    kernels.close()
    return kernel


def in_another_thread(call: Callable[[], object]) -> None:
    errors: list[DeviceError] = []

    def run() -> None:
        try:
            call()
        except DeviceError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    raise errors[0]


def loaded(device: Device, cubin: bytes, pages: int, **about: int) -> None:
    kernels = device.load(cubin)
    try:
        launched(device, kernels.kernel("kvferry_gather_v1"), pages, **about)
    finally:
        kernels.close()


def unmapped(device: Device) -> None:
    memory = mmap.mmap(-1, NBYTES)
    held = device.register_host(np.frombuffer(memory, np.uint8).ctypes.data, NBYTES)
    memory.close()
    held.close()


MISUSES: dict[str, tuple[str, Wrong]] = {
    "host memory that is not registered": (
        "cuMemcpyAsync: from memory that it does not know",
        lambda device, pages, slots, cubin: copied(device, pages, np.zeros(8, np.uint8).ctypes.data, 8),
    ),
    "past the end": (
        "cuMemcpyAsync: to memory that it does not know",
        lambda device, pages, slots, cubin: copied(device, pages + 1, slots, NBYTES),
    ),
    "target and source that overlap": (
        "cuMemcpyAsync: onto itself",
        lambda device, pages, slots, cubin: copied(device, pages + 4, pages, 8),
    ),
    "a stream that nobody made": (
        "cuMemcpyAsync: no stream",
        lambda device, pages, slots, cubin: device.engine_stream(pages).copy_each(
            array(pages), array(slots), array(8)
        ),
    ),
    "a module that is unloaded": (
        "cuLaunchKernel: no kernel, or its module is unloaded",
        lambda device, pages, slots, cubin: launched(device, destroyed(device, cubin), pages),
    ),
    "half a warp": (
        "cuLaunchKernel: thread blocks that are not 1 to 32 whole warps",
        lambda device, pages, slots, cubin: loaded(device, cubin, pages, threads=16),
    ),
    "page ids on the host": (
        "cuLaunchKernel: page ids that are not in device memory",
        lambda device, pages, slots, cubin: loaded(device, cubin, pages, page_ids=slots),
    ),
    "memory that is not there": (
        "cuMemHostRegister: not this process's memory",
        lambda device, pages, slots, cubin: device.register_host(4096, NBYTES),
    ),
    "memory that is unmapped before it is let go of": (
        "cuMemHostUnregister: memory that is unmapped already",
        lambda device, pages, slots, cubin: unmapped(device),
    ),
    "a thread without a context": (
        "cuMemAlloc: by a thread without a context",
        lambda device, pages, slots, cubin: in_another_thread(lambda: device.allocate(8)),
    ),
}


def copied(device: Device, target: int, source: int, nbytes: int) -> None:
    device.stream(is_urgent=True).copy_each(array(target), array(source), array(nbytes))


@pytest.mark.parametrize("how", MISUSES)
def test_misuse_is_noticed(
    host_driver: HostDriver, device: Device, pages: int, slots: int, cubin: bytes, how: str
) -> None:
    """The negative control of every test that finds no misuse."""
    noted, wrong = MISUSES[how]
    with pytest.raises(DeviceError):
        wrong(device, pages, slots, cubin)
    assert host_driver.take_misuses() == [noted]


def test_what_is_left_is_counted(host_driver: HostDriver, device: Device, cubin: bytes) -> None:
    held = [device.allocate(8), device.load(cubin)]
    streams = [device.stream(is_urgent=True), device.event(), device.event()]
    assert host_driver.left() == (1, 0, 1, 2, 1)
    del streams
    for one in held:
        one.close()
    gc.collect()
    assert host_driver.left() == (0, 0, 0, 0, 0)
    held[0].close()


def test_only_what_was_allocated_is_given_back(host_driver: HostDriver, pages: int) -> None:
    assert driver.cuMemFree(pages + 256) == (Code.CUDA_ERROR_INVALID_VALUE,)
    assert host_driver.take_misuses() == ["cuMemFree: not the beginning of device memory"]
