"""The border to the CUDA driver, without one: what is handed over, and what becomes of refusals."""

from __future__ import annotations

import ctypes
import enum
import gc
import struct
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvferry.connector.errors import DeviceError
from kvferry.cuda.driver import Device, open_device


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712


OK = Result.CUDA_SUCCESS

BatchFunction = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *[ctypes.c_void_p] * 3,
    ctypes.c_size_t,
    *[ctypes.c_void_p] * 2,
    ctypes.c_size_t,
    *[ctypes.c_void_p] * 2,
)


class PlayedDriver(ModuleType):
    """Answers as ``cuda.bindings.driver`` does: a result first, then what was asked for. Notes every call."""

    CUresult = Result
    CU_MEMHOSTREGISTER_PORTABLE = 1
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2, CU_EVENT_BLOCKING_SYNC=1)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE=2, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9
    )
    CUdeviceptr = int

    def __init__(self) -> None:
        super().__init__("driver")
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.answers: dict[str, tuple[object, ...]] = {
            "cuInit": (OK,),
            "cuDeviceGetCount": (OK, 2),
            "cuDeviceGet": (OK, 11),
            "cuDevicePrimaryCtxRetain": (OK, 12),
            "cuCtxGetStreamPriorityRange": (OK, 0, -5),
            "cuDriverGetVersion": (OK, 13000),
            "cuStreamCreateWithPriority": (OK, 70),
            "cuEventCreate": (OK, 80),
            "cuMemAlloc": (OK, 4096),
            "cuModuleLoadData": (OK, 90),
            "cuModuleGetFunction": (OK, 91),
        }
        self.batches: list[tuple[list[int], list[int], list[int], bytes, int]] = []
        self.batch_code = 0
        self._function = BatchFunction(self._batch)
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        self.answers["cuGetProcAddress"] = (OK, address, 0)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: object) -> tuple[object, ...]:
            self.calls.append((name, arguments))
            return self.answers.get(name, (OK,))

        return call

    def cuDeviceGetAttribute(self, which: int, device: int) -> tuple[object, ...]:  # noqa: N802  # the driver's name
        return OK, {75: 9, 76: 0}[which]

    def cuPointerGetAttribute(self, which: int, address: int) -> tuple[object, ...]:  # noqa: N802  # the driver's name
        if address < 4096:
            return Result.CUDA_ERROR_INVALID_VALUE, None
        return OK, 2 if which == 2 else address // 65536

    def _batch(self, targets, sources, sizes, count, attributes, first, number, failed, stream) -> int:
        assert (number, ctypes.c_size_t.from_address(first).value) == (1, 0)
        arrays = [list((ctypes.c_uint64 * count).from_address(array)) for array in (targets, sources, sizes)]
        self.batches.append((*arrays, ctypes.string_at(attributes, 24), stream))
        ctypes.c_size_t.from_address(failed).value = 1
        return self.batch_code

    def named(self, name: str) -> list[tuple[object, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    played = PlayedDriver()
    bindings = ModuleType("cuda.bindings")
    bindings.driver = played  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return played


@pytest.fixture
def device(driver: PlayedDriver) -> Device:
    return open_device(0)


def array(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_without_nvidias_packages_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"pip install 'kvferry\[cuda\]'"):
        open_device(0)


def test_without_a_driver_the_error_says_so(driver: PlayedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(flags: int) -> tuple[object, ...]:
        raise RuntimeError("libcuda.so.1 is not there")

    monkeypatch.setattr(driver, "cuInit", not_found, raising=False)
    with pytest.raises(
        DeviceError, match=r"no NVIDIA driver \(libcuda.so.1 is not there\); install the GPU's driver"
    ):
        open_device(0)


def test_a_driver_without_a_gpu(driver: PlayedDriver) -> None:
    driver.answers["cuInit"] = (Result.CUDA_ERROR_NO_DEVICE,)
    with pytest.raises(DeviceError, match="cuInit failed: CUDA_ERROR_NO_DEVICE; nvidia-smi must list a GPU"):
        open_device(0)


@pytest.mark.parametrize("index", [2, -1])
def test_a_gpu_that_there_is_not(driver: PlayedDriver, index: int) -> None:
    with pytest.raises(DeviceError, match="this process sees 2; check CUDA_VISIBLE_DEVICES"):
        open_device(index)


def test_a_refusal_names_the_call_and_the_code(driver: PlayedDriver, device: Device) -> None:
    driver.answers["cuMemHostRegister"] = (Result.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,)
    with pytest.raises(DeviceError) as caught:
        device.register_host(4096, 4096)
    assert caught.value.op == "cuMemHostRegister"
    assert caught.value.code == "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"


def test_the_primary_context_is_the_one_that_is_used(driver: PlayedDriver, device: Device) -> None:
    device.activate()
    assert set(driver.named("cuCtxSetCurrent")) == {(12,)}
    assert device.architecture == "sm_90"


def test_urgent_streams_have_the_highest_priority_and_none_waits_for_the_default_stream(
    driver: PlayedDriver, device: Device
) -> None:
    device.stream(is_urgent=True), device.stream(is_urgent=False)
    assert driver.named("cuStreamCreateWithPriority") == [(1, -5), (1, 0)]


def test_streams_and_events_are_destroyed_but_an_engines_stream_is_not(
    driver: PlayedDriver, device: Device
) -> None:
    stream, engine, event = device.stream(True), device.engine_stream(7), device.event()
    engine.record(event)
    stream.wait(event)
    event.synchronize()
    assert driver.named("cuEventRecord") == [(80, 7)]
    assert driver.named("cuStreamWaitEvent") == [(70, 80, 0)]
    assert driver.named("cuEventSynchronize") == [(80,)]
    assert driver.named("cuEventCreate") == [(3,)], "waits block, and take no time stamps"
    del stream, engine, event
    gc.collect()
    assert driver.named("cuStreamDestroy") == [(70,)]
    assert driver.named("cuEventDestroy") == [(80,)]


def test_memory_is_given_back_once(driver: PlayedDriver, device: Device) -> None:
    allocated, registered, kernels = (
        device.allocate(100),
        device.register_host(8192, 50),
        device.load(b"cubin"),
    )
    assert (allocated.address, registered.address) == (4096, 8192)
    assert kernels.kernel("kvferry_gather_v16").name == "kvferry_gather_v16"
    for held in (allocated, registered, kernels) * 2:
        held.close()
    for name, argument in (("cuMemFree", 4096), ("cuMemHostUnregister", 8192), ("cuModuleUnload", 90)):
        assert driver.named(name) == [(argument,)]
    assert driver.named("cuModuleGetFunction") == [(90, b"kvferry_gather_v16")]


@pytest.mark.parametrize(
    ("address", "nbytes", "is_held"),
    [(4096, 61440, True), (4095, 8, False), (65530, 100, False), (65536, 8, False), (8, 8, False)],
)
def test_memory_of_this_gpu_is_told_from_other(
    device: Device, address: int, nbytes: int, is_held: bool
) -> None:
    assert device.holds(address, nbytes) is is_held


def test_a_kernel_is_given_every_argument_as_it_lies_in_memory(
    driver: PlayedDriver, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (bytes(range(120)), struct.pack("<Q", 1 << 40), struct.pack("<i", -3))
    seen: list[bytes] = []

    def launched(function, *rest):
        *sizes, shared, stream, parameters, extra = rest
        assert (function, sizes, shared, stream, extra) == (91, [3, 1, 1, 512, 1, 1], 0, 70, 0)
        pointers = (ctypes.c_void_p * 3).from_address(parameters)
        seen.extend(
            ctypes.string_at(pointer, len(argument))
            for pointer, argument in zip(pointers, arguments, strict=True)
        )
        return (OK,)

    monkeypatch.setattr(driver, "cuLaunchKernel", launched, raising=False)
    device.stream(True).launch(device.load(b"cubin").kernel("k"), 3, 512, arguments)
    assert seen == list(arguments)


def test_copies_one_by_one(driver: PlayedDriver, device: Device) -> None:
    device.stream(True).copy_each(array(1 << 63, 2), array(3, 4), array(5, 6))
    assert driver.named("cuMemcpyAsync") == [(1 << 63, 3, 5, 70), (2, 4, 6, 70)]


def test_a_batch_is_one_call_with_arrays(driver: PlayedDriver, device: Device) -> None:
    assert device.has_batch_copies
    device.stream(True).copy_batch(array(1 << 63, 2, 9)[::2], array(3, 4), array(5, 6))
    in_stream_order = struct.pack("<6i", 1, 0, 0, 0, 0, 0)
    assert driver.batches == [([1 << 63, 9], [3, 4], [5, 6], in_stream_order, 70)]
    assert driver.named("cuGetProcAddress") == [(b"cuMemcpyBatchAsync", 12080, 0)]


def test_a_refused_batch_names_the_copy(driver: PlayedDriver, device: Device) -> None:
    driver.batch_code = 1
    with pytest.raises(
        DeviceError, match="cuMemcpyBatchAsync failed: CUDA_ERROR_INVALID_VALUE at copy 1 of 2"
    ):
        device.stream(True).copy_batch(array(1, 2), array(3, 4), array(5, 6))


@pytest.mark.parametrize(
    "answers",
    [
        {"cuDriverGetVersion": (OK, 12070)},
        {"cuGetProcAddress": (Result.CUDA_ERROR_NOT_FOUND, None, None)},
        {"cuGetProcAddress": (OK, 0, 1)},
    ],
)
def test_a_driver_without_batch_copies(driver: PlayedDriver, answers: dict[str, tuple[object, ...]]) -> None:
    driver.answers.update(answers)
    device = open_device(0)
    assert not device.has_batch_copies
    with pytest.raises(DeviceError, match=r"use a driver of CUDA 12\.8 or newer"):
        device.stream(True).copy_batch(array(1), array(2), array(3))
