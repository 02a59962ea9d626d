"""A GPU for tests: real bytes, real index arithmetic, and the worst order of execution that CUDA allows.

Streams are queues. Nothing runs when it is queued; it runs when somebody waits on the host, or by chance in between.
Which stream goes on is chosen by a seeded generator among all that may, some of them much slower than others. So work
that is ordered by nothing but luck runs in the wrong order for some seed. Kernels are the real ones' headers, run by
the emulation in ``tests/kernels``.

What CUDA leaves undefined, or refuses, is an ``AssertionError``: host memory that is not registered, addresses outside
any allocation, memory given back while queued work still uses it, calls of a thread without this device's context.
"""

from __future__ import annotations

import ctypes
import random
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from emulation import emulation

from kvferry.connector.errors import DeviceError
from kvferry.cuda.driver import Addresses, Event, Held, Kernel, Kernels, Stream

Bytes = npt.NDArray[np.uint8]


class _Span(NamedTuple):
    address: int
    nbytes: int

    def holds(self, address: int, nbytes: int) -> bool:
        return self.address <= address and address + nbytes <= self.address + self.nbytes


class PlayedEvent:
    """Counts how often it was recorded, and up to which of these its work is done."""

    def __init__(self, device: PlayedDevice) -> None:
        self._device = device
        self.recorded = 0
        self.passed = 0

    def synchronize(self) -> None:
        self._device.call("cuEventSynchronize")
        self._device.run_until(self, self.recorded)


class _Op(NamedTuple):
    what: str
    run: Callable[[], None]
    may_run: Callable[[], bool] = lambda: True


class PlayedStream:
    """A queue of work."""

    def __init__(self, device: PlayedDevice, is_urgent: bool | None) -> None:
        self.device = device
        self.is_urgent = is_urgent
        self.speed = 10.0 ** device.rng.uniform(-2, 2)
        self.queue: deque[_Op] = deque()

    def record(self, event: Event) -> None:
        assert isinstance(event, PlayedEvent)
        self.device.call("cuEventRecord")
        event.recorded += 1
        number = event.recorded

        def run() -> None:
            event.passed = max(event.passed, number)

        self.queue.append(_Op("record", run))

    def wait(self, event: Event) -> None:
        assert isinstance(event, PlayedEvent)
        self.device.call("cuStreamWaitEvent")
        number = event.recorded
        self.queue.append(_Op("wait", lambda: None, lambda: event.passed >= number))

    def copy_each(self, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        for piece in self._pieces(targets, sources, sizes):
            self.device.call("cuMemcpyAsync")
            self.queue.append(_Op("copy", lambda piece=piece: self.device.copy(*piece)))

    def copy_batch(self, targets: Addresses, sources: Addresses, sizes: Addresses) -> None:
        """In any order, and not all at once: other streams' work comes in between."""
        assert self.device.has_batch_copies
        pieces = self._pieces(targets, sources, sizes)
        self.device.call("cuMemcpyBatchAsync")
        self.device.rng.shuffle(pieces)
        for piece in pieces:
            self.queue.append(_Op("copy", lambda piece=piece: self.device.copy(*piece)))

    def _pieces(self, targets: Addresses, sources: Addresses, sizes: Addresses) -> list[tuple[int, int, int]]:
        assert targets.dtype == sources.dtype == sizes.dtype == np.uint64
        assert targets.shape == sources.shape == sizes.shape == (len(sizes),)
        pieces = list(zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True))
        for target, source, nbytes in pieces:
            self.device.check(target, nbytes)
            self.device.check(source, nbytes)
        return pieces

    def launch(self, kernel: Kernel, thread_blocks: int, threads: int, arguments: Sequence[bytes]) -> None:
        assert isinstance(kernel, PlayedKernel)
        assert thread_blocks > 0
        assert threads % 32 == 0
        assert threads <= 1024
        self.device.call("cuLaunchKernel")
        given = list(map(bytes, arguments))
        self.queue.append(_Op(kernel.name, lambda: self.device.run_kernel(kernel.name, given)))

    def do(self, what: Callable[[], None]) -> None:
        """Queue work of an engine."""
        self.queue.append(_Op("engine", what))


class PlayedKernel(NamedTuple):
    name: str


class PlayedKernels:
    def __init__(self) -> None:
        self.is_closed = False

    def kernel(self, name: str) -> Kernel:
        assert not self.is_closed
        return PlayedKernel(name)

    def close(self) -> None:
        self.is_closed = True


class _PlayedHeld:
    def __init__(self, span: _Span, spans: list[_Span]) -> None:
        self._span = span
        self._spans = spans
        spans.append(span)

    @property
    def address(self) -> int:
        return self._span.address

    def close(self) -> None:
        if self._span in self._spans:
            self._spans.remove(self._span)


class PlayedDevice:
    """See the module.

    Args:
        seed: Of the order in which things happen.
        has_batch_copies: As drivers before 12.8 have not.
        haste: How likely a call lets some queued work run.
    """

    architecture = "sm_90"

    def __init__(self, seed: int = 0, has_batch_copies: bool = True, haste: float = 0.2) -> None:
        self.rng = random.Random(seed)
        self.has_batch_copies = has_batch_copies
        self.haste = haste
        self.streams: list[PlayedStream] = []
        self.engine = PlayedStream(self, None)
        """What ``engine_stream(1)`` is."""
        self.calls: list[str] = []
        self.fails_at: int | None = None
        """The call that is refused, counted from 0."""
        self.allocations: list[_Span] = []
        self.registrations: list[_Span] = []
        self._memory: dict[int, Bytes] = {}
        self._threads: set[int] = set()
        self._lock = threading.RLock()

    # What ``Device`` asks for

    def activate(self) -> None:
        self._threads.add(threading.get_ident())

    def stream(self, is_urgent: bool) -> Stream:
        self.call("cuStreamCreateWithPriority")
        self.streams.append(PlayedStream(self, is_urgent))
        return self.streams[-1]

    def engine_stream(self, handle: int) -> Stream:
        assert handle == 1
        return self.engine

    def event(self) -> Event:
        self.call("cuEventCreate")
        return PlayedEvent(self)

    def allocate(self, nbytes: int) -> Held:
        self.call("cuMemAlloc")
        return self.memory(nbytes)[0]

    def register_host(self, address: int, nbytes: int) -> Held:
        self.call("cuMemHostRegister")
        first, last = address // 4096, (address + nbytes - 1) // 4096
        for other in self.registrations:
            is_apart = other.address // 4096 > last or (other.address + other.nbytes - 1) // 4096 < first
            assert is_apart, "these pages of host memory are registered already"
        return _PlayedHeld(_Span(address, nbytes), self.registrations)

    def holds(self, address: int, nbytes: int) -> bool:
        return any(span.holds(address, nbytes) for span in self.allocations)

    def load(self, cubin: bytes) -> Kernels:
        self.call("cuModuleLoadData")
        return PlayedKernels()

    # What tests ask for

    def memory(self, nbytes: int, offset: int = 0) -> tuple[Held, Bytes]:
        """Device memory that begins ``offset`` bytes behind a boundary, and its bytes as the host sees them."""
        whole = np.full(nbytes + offset + 256, 0xDD, np.uint8)
        start = -whole.ctypes.data % 256 + offset
        array = whole[start : start + nbytes]
        self._memory[array.ctypes.data] = array
        return _PlayedHeld(_Span(array.ctypes.data, nbytes), self.allocations), array

    def is_idle(self) -> bool:
        """Whether none of the streams that were asked for has anything queued."""
        return not any(stream.queue for stream in self.streams)

    def drain(self) -> None:
        """Run everything."""
        while self._step():
            pass
        assert not any(stream.queue for stream in (*self.streams, self.engine)), (
            "streams wait for one another"
        )

    # What happens inside

    def call(self, name: str) -> None:
        """Count a call, refuse it if it is its turn, and perhaps let some time pass."""
        assert threading.get_ident() in self._threads, f"{name} by a thread without the device's context"
        with self._lock:
            self.calls.append(name)
            if self.fails_at is not None and len(self.calls) > self.fails_at:
                self.fails_at = None
                raise DeviceError(name, "CUDA_ERROR_PLAYED")
        while self.rng.random() < self.haste and self._step(may_idle=True):
            pass

    def run_until(self, event: PlayedEvent, number: int) -> None:
        """Let time pass until an event has passed; more than that is left to chance."""
        while True:
            with self._lock:
                if event.passed >= number:
                    return
                assert self._step(), "a wait for work that never runs"

    def check(self, address: int, nbytes: int) -> None:
        spans = [*self.allocations, *self.registrations]
        assert any(span.holds(address, nbytes) for span in spans), (
            f"{nbytes} bytes at {address:#x} are neither this device's memory nor registered"
        )

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.check(target, nbytes)
        self.check(source, nbytes)
        ctypes.memmove(target, source, nbytes)

    def run_kernel(self, name: str, arguments: Sequence[bytes]) -> None:
        geometry, *addresses, count = arguments
        offsets, pages, shards, page_ids = (int.from_bytes(address, "little") for address in addresses)
        (num_pages,) = struct.unpack("<i", count)
        on_device = [self._allocation(address) for address in (offsets, pages, shards, page_ids)]
        assert on_device[3].holds(page_ids, 4 * num_pages)
        report = emulation().launch(
            name,
            geometry,
            offsets,
            self._behind(on_device[1], pages),
            self._behind(on_device[2], shards),
            page_ids,
            num_pages,
            self.rng.choice([1, 32, 96, 512]),
        )
        assert (report.misaligned, report.outside) == (0, 0)

    def _allocation(self, address: int) -> _Span:
        spans = [span for span in self.allocations if span.holds(address, 1)]
        assert spans, f"a kernel was given {address:#x}, which is not this device's memory"
        return spans[0]

    def _behind(self, span: _Span, address: int) -> tuple[int, int]:
        return address, span.address + span.nbytes - address

    def _step(self, may_idle: bool = False) -> bool:
        """Run the next thing of some stream; False when none may go on, or the one that may is too slow."""
        with self._lock:
            ready = [
                stream
                for stream in (*self.streams, self.engine)
                if stream.queue and stream.queue[0].may_run()
            ]
            if not ready:
                return False
            speeds = [stream.speed for stream in ready]
            if may_idle and self.rng.random() < 1 / (1 + sum(speeds)):
                return False
            (stream,) = self.rng.choices(ready, speeds)
            stream.queue.popleft().run()
            return True
