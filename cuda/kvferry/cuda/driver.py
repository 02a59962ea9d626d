"""The CUDA driver: the only module that talks to it, and what the rest of the staging path needs of it.

The protocols are the border. ``open_device`` returns a GPU behind them, over NVIDIA's ``cuda.bindings``, which is
imported when a device is opened; tests play a device that executes late and out of order. So whatever is above this
module is tested without a GPU, and whatever is in it is kept too simple to need more than a GPU's own test.

Who owns what
  * Streams, events, memory and registrations belong to whoever asked for them. Streams and events are destroyed with
    the last reference to them; memory, registrations and kernels by ``close``, when nothing uses them any more.
  * The GPU's primary context is torch's too, so addresses and events mean the same to both. It is kept until the
    process ends.

Threading: a thread calls ``activate`` before anything else. Each stream is then used by one thread at a time.

Addresses are plain integers; those of registered host memory mean the same to the GPU and to the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvferry.connector.errors import DeviceError

__all__ = [
    "Addresses",
    "Device",
    "Event",
    "Held",
    "Kernel",
    "Kernels",
    "Stream",
    "do_all",
    "insist",
    "one_copy",
    "open_device",
    "wait_for_all",
]

Addresses = npt.NDArray[np.uint64]
"""Addresses, or sizes in bytes, ``[copies]``: passed to the driver as they lie in memory."""

_BATCH_VERSION = 12080
"""The first driver with ``cuMemcpyBatchAsync``, and the form of it that is asked for."""


class Event(Protocol):
    """A point in the work of a stream. Until it is first recorded it counts as passed."""

    def synchronize(self) -> None:
        """Block this thread, without spinning, until the work recorded last is done."""


class Kernel(Protocol):
    """A loaded kernel."""

    @property
    def name(self) -> str:
        """As in the source."""


class Kernels(Protocol):
    """A loaded cubin."""

    def kernel(self, name: str) -> Kernel:
        """Return a kernel by name."""

    def close(self) -> None:
        """Unload. Idempotent."""


class Held(Protocol):
    """Memory that was allocated, or registered."""

    @property
    def address(self) -> int:
        """Where it begins."""

    def close(self) -> None:
        """Give it back. Idempotent. Nothing may be using it."""


class Stream(Protocol):
    """Work in order. Calls queue it and return; each may raise DeviceError, also for a fault of earlier work."""

    def record(self, event: Event) -> None:
        """Have ``event`` stand for everything queued here so far."""

    def wait(self, event: Event) -> None:
        """Have everything queued here from now on come after what ``event`` stands for now."""

    def copy_each(self, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        """Copy ``sizes[i]`` bytes from ``sources[i]`` to ``targets[i]``, one call of the driver each.

        Host memory must be registered. Copies may not overlap.
        """

    def copy_batch(self, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        """As ``copy_each``, in one call; only where the device ``has_batch_copies``."""

    def launch(self, kernel: Kernel, thread_blocks: int, threads: int, arguments: Sequence[bytes]) -> None:
        """Run a kernel.

        Args:
            kernel: Of this device.
            thread_blocks: Size of the one-dimensional grid.
            threads: Of a thread block.
            arguments: Each as it lies in memory.
        """


class Device(Protocol):
    """One GPU."""

    @property
    def architecture(self) -> str:
        """What to compile for, as in ``sm_90``."""

    @property
    def has_batch_copies(self) -> bool:
        """Whether the driver copies many pieces in one call."""

    def activate(self) -> None:
        """Make this thread's calls go to this device. Cheap."""

    def stream(self, is_urgent: bool) -> Stream:
        """Return a new stream of the highest or of the lowest priority, independent of the default stream."""

    def engine_stream(self, handle: int) -> Stream:
        """Return somebody else's stream by its handle; it stays theirs."""

    def event(self) -> Event:
        """Return a new event."""

    def allocate(self, nbytes: int) -> Held:
        """Return device memory, aligned for every vector width."""

    def register_host(self, address: int, nbytes: int) -> Held:
        """Pin host memory and make it known to the GPU. Blocks while its pages are pinned."""

    def holds(self, address: int, nbytes: int) -> bool:
        """Tell whether this is memory of this GPU."""

    def load(self, cubin: bytes) -> Kernels:
        """Load compiled kernels."""


def do_all(steps: Iterable[Callable[[], object]]) -> None:
    """Take steps in turn, each of them even where one before was refused.

    Raises:
        DeviceError: The first refusal, behind the last step.
    """
    refusals: list[DeviceError] = []
    for step in steps:
        try:
            step()
        except DeviceError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def insist(step: Callable[[], object]) -> None:
    """Take a step, and once more if it was refused.

    Raises:
        DeviceError: The first refusal, also where the second attempt was not refused.
    """
    try:
        step()
    except DeviceError:
        with contextlib.suppress(DeviceError):
            step()
        raise


def wait_for_all(streams: Iterable[Stream], end: Event) -> None:
    """Wait until everything queued on some streams is done, one after the other, also behind one that refused.

    Args:
        streams: Those that are waited for.
        end: Recorded on each of them in turn.

    Raises:
        DeviceError: The first refusal, behind the last stream.
    """

    def wait(stream: Stream) -> None:
        stream.record(end)
        end.synchronize()

    do_all(functools.partial(wait, stream) for stream in streams)


def one_copy(target: int, source: int, nbytes: int) -> tuple[Addresses, Addresses, Addresses]:
    """Return the arguments of ``Stream.copy_each`` for a single piece."""
    return np.array([target], np.uint64), np.array([source], np.uint64), np.array([nbytes], np.uint64)


def open_device(index: int) -> Device:
    """Return a GPU.

    Args:
        index: As CUDA counts the devices that this process sees.

    Raises:
        DeviceError: There is no driver, no such GPU, or NVIDIA's packages are missing; it says what to do.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        hint = "install them with pip install 'kvferry[cuda]'"
        raise DeviceError("open a GPU", f"NVIDIA's packages are not there ({error})", hint) from error
    try:
        code, *_ = driver.cuInit(0)
    except Exception as error:  # boundary: the loader of NVIDIA's libraries
        hint = "install the GPU's driver, or keep the KV cache on the CPU"
        raise DeviceError("open a GPU", f"there is no NVIDIA driver ({error})", hint) from error
    if code != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError("cuInit", code.name, "nvidia-smi must list a GPU to this process")
    return _Gpu(driver, index)


class _Calls:
    """The driver's functions with errors raised."""

    def __init__(self, driver: ModuleType) -> None:
        self.driver: Any = driver

    def __call__(self, name: str, *arguments: object) -> Any:
        """Call a function; return its one result, a tuple of several, or None."""
        code, *results = getattr(self.driver, name)(*arguments)
        if code != self.driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(name, code.name)
        return results[0] if len(results) == 1 else tuple(results) or None


class _Gpu:
    def __init__(self, driver: ModuleType, index: int) -> None:
        self._call = call = _Calls(driver)
        count = call("cuDeviceGetCount")
        if not 0 <= index < count:
            raise DeviceError(f"open GPU {index}", f"this process sees {count}", "check CUDA_VISIBLE_DEVICES")
        self._index = index
        self._device = call("cuDeviceGet", index)
        self._context = call("cuDevicePrimaryCtxRetain", self._device)
        self.activate()
        attribute = call.driver.CUdevice_attribute
        major, minor = (
            call("cuDeviceGetAttribute", which, self._device)
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self._architecture = f"sm_{major}{minor}"
        self._least, self._greatest = call("cuCtxGetStreamPriorityRange")
        self._batch = _batch_function(call)

    @property
    def architecture(self) -> str:
        return self._architecture

    @property
    def has_batch_copies(self) -> bool:
        return self._batch is not None

    def activate(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def stream(self, is_urgent: bool) -> Stream:
        flags = self._call.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        priority = self._greatest if is_urgent else self._least
        stream = self._call("cuStreamCreateWithPriority", flags, priority)
        made = _GpuStream(self._call, int(stream), self._batch)
        weakref.finalize(made, self._call.driver.cuStreamDestroy, stream)
        return made

    def engine_stream(self, handle: int) -> Stream:
        return _GpuStream(self._call, handle, self._batch)

    def event(self) -> Event:
        return _GpuEvent(self._call)

    def allocate(self, nbytes: int) -> Held:
        address = self._call("cuMemAlloc", nbytes)
        return _GpuHeld(int(address), lambda: self._call("cuMemFree", address))

    def register_host(self, address: int, nbytes: int) -> Held:
        self._call("cuMemHostRegister", address, nbytes, self._call.driver.CU_MEMHOSTREGISTER_PORTABLE)
        return _GpuHeld(address, lambda: self._call("cuMemHostUnregister", address))

    def holds(self, address: int, nbytes: int) -> bool:
        driver = self._call.driver
        which = driver.CUpointer_attribute
        memory_type = which.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        ordinal = which.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        for end in (address, address + nbytes - 1):
            # An address that CUDA has never seen is an error to it: pageable host memory, most likely.
            code, found = driver.cuPointerGetAttribute(memory_type, driver.CUdeviceptr(end))
            if code != driver.CUresult.CUDA_SUCCESS or found != driver.CUmemorytype.CU_MEMORYTYPE_DEVICE:
                return False
            if self._call("cuPointerGetAttribute", ordinal, driver.CUdeviceptr(end)) != self._index:
                return False
        return True

    def load(self, cubin: bytes) -> Kernels:
        return _GpuKernels(self._call, cubin)


class _GpuHeld:
    def __init__(self, address: int, give_back: Callable[[], object]) -> None:
        self._address = address
        self._give_back: Callable[[], object] | None = give_back

    @property
    def address(self) -> int:
        return self._address

    def close(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class _GpuEvent:
    def __init__(self, call: _Calls) -> None:
        self._call = call
        which = call.driver.CUevent_flags
        flags = which.CU_EVENT_DISABLE_TIMING | which.CU_EVENT_BLOCKING_SYNC
        self.handle = call("cuEventCreate", int(flags))
        weakref.finalize(self, call.driver.cuEventDestroy, self.handle)

    def synchronize(self) -> None:
        self._call("cuEventSynchronize", self.handle)


class _GpuKernel:
    def __init__(self, name: str, handle: object) -> None:
        self._name = name
        self.handle = handle

    @property
    def name(self) -> str:
        return self._name


class _GpuKernels:
    def __init__(self, call: _Calls, cubin: bytes) -> None:
        self._call = call
        self._module = call("cuModuleLoadData", cubin)

    def kernel(self, name: str) -> Kernel:
        return _GpuKernel(name, self._call("cuModuleGetFunction", self._module, name.encode()))

    def close(self) -> None:
        module, self._module = self._module, None
        if module is not None:
            self._call("cuModuleUnload", module)


class _GpuStream:
    def __init__(self, call: _Calls, handle: int, batch: Callable[..., int] | None) -> None:
        self._call = call
        self._handle = handle
        self._batch = batch

    def record(self, event: Event) -> None:
        assert isinstance(event, _GpuEvent)
        self._call("cuEventRecord", event.handle, self._handle)

    def wait(self, event: Event) -> None:
        assert isinstance(event, _GpuEvent)
        self._call("cuStreamWaitEvent", self._handle, event.handle, 0)

    def copy_each(self, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            self._call("cuMemcpyAsync", target, source, size, self._handle)

    def copy_batch(self, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        if self._batch is None:
            raise DeviceError(
                "cuMemcpyBatchAsync", "this driver has none", "use a driver of CUDA 12.8 or newer"
            )
        arrays = [np.ascontiguousarray(array, np.uint64) for array in (targets, sources, sizes)]
        count = len(arrays[0])
        assert all(array.shape == (count,) for array in arrays)
        attributes, first, failed = _CopyAttributes(_IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
        code = self._batch(
            *(array.ctypes.data for array in arrays),
            count,
            ctypes.addressof(attributes),
            ctypes.addressof(first),
            1,
            ctypes.addressof(failed),
            self._handle,
        )
        if code:
            name = self._call.driver.CUresult(code).name
            raise DeviceError("cuMemcpyBatchAsync", f"{name} at copy {failed.value} of {count}")

    def launch(self, kernel: Kernel, thread_blocks: int, threads: int, arguments: Sequence[bytes]) -> None:
        assert isinstance(kernel, _GpuKernel)
        buffers = [ctypes.create_string_buffer(argument, len(argument)) for argument in arguments]
        pointers = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        sizes = (thread_blocks, 1, 1, threads, 1, 1)
        parameters = ctypes.addressof(pointers)
        self._call("cuLaunchKernel", kernel.handle, *sizes, 0, self._handle, parameters, 0)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``: without hints of where memory lies."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", _Location),
        ("target_location", _Location),
        ("flags", ctypes.c_uint),
    )


_IN_STREAM_ORDER = 1
"""``CU_MEMCPY_SRC_ACCESS_ORDER_STREAM``: a source is read when the stream has come to the copy."""


def _batch_function(call: _Calls) -> Callable[..., int] | None:
    """Return ``cuMemcpyBatchAsync`` as CUDA 12.8 declared it, None in drivers without it.

    Called past the bindings, which take lists: arrays of addresses are passed as they are.
    """
    if call("cuDriverGetVersion") < _BATCH_VERSION:
        return None
    code, address, *_ = call.driver.cuGetProcAddress(b"cuMemcpyBatchAsync", _BATCH_VERSION, 0)
    if code != call.driver.CUresult.CUDA_SUCCESS or not int(address):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    declared = ctypes.CFUNCTYPE(
        ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer
    )
    return declared(int(address))
