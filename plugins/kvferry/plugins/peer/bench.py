"""Pages of another process: the ``nixl`` transport against bare NIXL, a copy in memory, and a plain socket.

All sides move the same bytes, scattered blocks of one size, in turn within one run. The transport reads them as the
pages of an engine whose page is one such block; bare NIXL is given a list of descriptors that lies ready, which is
the least anybody does for a read. The socket is one connection to a process that sends them out of its memory. Nothing
is verified here: checksums are the engine adapter's, above any transport.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchContext, BenchSkipped, Figure, Goal
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.bench.raw_socket import RawSocket, raw_server
from kvferry.connector.errors import HandoffFailed
from kvferry.connector.layout import BlockLayout, PageLayout
from kvferry.connector.transport import Heads, PageMemory, PageStaging, RemotePages, TransportContext
from kvferry.plugins.peer.agent import Agent, is_installed, memory_type
from kvferry.plugins.peer.nixl_exporter import NixlExporter
from kvferry.plugins.peer.nixl_offer import unpack
from kvferry.plugins.peer.nixl_reader import NixlReader
from kvferry.plugins.peer.nixl_transport import MISSING
from kvferry.plugins.peer.runs import Rows

__all__ = ["measure", "serve"]

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"64 KiB": 64 * KIB, "256 KiB": 256 * KIB, "1 MiB": MIB, "4 MiB": 4 * MIB}
COUNTS = (1, 16, 64, 256)
SIDES = 7
"""A measurement needs so many times the memory that it moves; one that does not fit into what is free is left out."""

GOAL_FROM_BYTES = 16 * MIB
OVERHEAD = Goal(0.9, at_least=True)
REPETITIONS = 11
START_S = 30.0
CONNECT_S = 20.0

_MAIN = "import sys; from kvferry.plugins.peer.bench import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"


def measure(context: BenchContext) -> Sequence[Figure]:
    """Measure reads of every size and number; see the module docstring.

    Raises:
        BenchSkipped: NIXL is missing, or cannot read another process of this machine directly.
    """
    if not is_installed():
        raise BenchSkipped(MISSING)
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    plan = [
        (name, size, count)
        for name, size in SIZES.items()
        for count in COUNTS
        if SIDES * size * count <= free_bytes
    ]
    if context.quick:
        plan = [("64 KiB", 64 * KIB, 1), ("64 KiB", 64 * KIB, 16)]
    figures: list[Figure] = []
    for index, (name, size, count) in enumerate(plan):

        def progress(part: float, done: int = index) -> None:
            context.progress((done + part) / len(plan))

        try:
            figures += _compare(f"{count} x {name}", size, count, context.quick, progress)
        except HandoffFailed as error:
            raise BenchSkipped(f"NIXL does not read another process here: {error.why}") from error
    return figures


def _compare(
    what: str, size: int, count: int, is_quick: bool, progress: Callable[[float], None]
) -> list[Figure]:
    block = _block(size)
    with ExitStack() as stack:
        offer = stack.enter_context(_exporting(size, count))
        buffer = np.zeros(size * count, np.uint8)
        ours = _Ours(offer, buffer, size, count)
        stack.callback(ours.close)
        bare = _Bare(offer, buffer, size, count)
        stack.callback(bare.close)
        arena = Arena.create(count, block.slot_bytes)
        stack.callback(arena.close)
        threads = stack.enter_context(ThreadPoolExecutor(1, "kvferry-bench"))
        port = stack.enter_context(raw_server(count, block.payload_bytes))
        raw = RawSocket(port, block, arena, threads)
        stack.callback(raw.close)
        source = np.ones_like(buffer)
        order = _order(count)

        def copy(_: int) -> None:
            for to, start in enumerate(order):
                buffer[to * size : (to + 1) * size] = source[start * size : (start + 1) * size]

        sides = {"nixl": ours.read, "bare": bare.read, "memcpy": copy, "socket": raw.load}
        seconds = interleaved(sides, 3 if is_quick else REPETITIONS, progress)
    rates = {name: size * count / taken / 1e9 for name, taken in seconds.items()}
    goal = OVERHEAD if size * count >= GOAL_FROM_BYTES else None
    own_us = (seconds["nixl"] - seconds["bare"]) * 1e6
    limits = [("bare NIXL", "bare", goal), ("memcpy", "memcpy", None), ("socket", "socket", None)]
    return [
        Figure(
            name=f"handoff read, {what}, against {label}",
            value=rates["nixl"],
            unit="GB/s",
            raw=rates[side],
            raw_name=label,
            goal=aim,
            note=f"{own_us:+.0f} us a read over bare NIXL" if side == "bare" else "",
        )
        for label, side, aim in limits
    ]


def _block(size: int) -> BlockLayout:
    return BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=16, head_dim=size // 64, itemsize=2)


def _memory(buffer: np.ndarray, size: int, count: int) -> PageMemory:
    """Describe a buffer as the pages of an engine with one layer, each as large as a block."""
    block = _block(size)
    layout = PageLayout(
        num_pages=count,
        page_tokens=block.block_tokens,
        num_heads=1,
        head_bytes=size // 32,
        kv_factor=2,
        layer_offsets=(0,),
        page_stride=size,
        head_stride=size,
        token_stride=size // 16,
        kv_stride=size // 32,
    )
    return PageMemory(
        address=buffer.ctypes.data,
        nbytes=buffer.nbytes,
        device="cpu",
        device_id=0,
        layout=layout,
        block=block,
        shard=block.shard(0, 1),
        stage=_no_staging,
    )


def _no_staging(heads: Heads) -> PageStaging:
    raise NotImplementedError("one-sided reads need no staging")


def _context() -> TransportContext:
    return TransportContext(host="127.0.0.1", advertised="127.0.0.1", token="", name="kvferry-bench")


def _order(count: int) -> np.ndarray:
    """Return which block is read into which: no two neighbours stay neighbours, as in an engine that has run."""
    return (
        (np.arange(count, dtype=np.int32) * 7 + 3) % count if count % 7 else np.arange(count, dtype=np.int32)
    )


@contextmanager
def _exporting(size: int, count: int) -> Iterator[bytes]:
    """Run a process that exports blocks, and yield its offer."""
    command = [sys.executable, "-c", _MAIN, str(size), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        too_late = threading.Timer(START_S, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            lines = (line for line in process.stdout if line.startswith("offer "))
            line = next(lines, None)
            too_late.cancel()
            if line is None:
                raise BenchSkipped("the process to read from did not start")
            yield bytes.fromhex(line.split()[1])
        finally:
            too_late.cancel()
            process.kill()


def serve(size: int, count: int) -> None:
    """Export blocks until the other side of the standard input goes away."""
    buffer = np.tile(np.frombuffer(os.urandom(size), np.uint8), count)
    exporter = NixlExporter(_memory(buffer, size, count), _context())
    print("offer", exporter.offer.hex(), flush=True)
    sys.stdin.read()
    exporter.close()


class _Ours:
    """The transport."""

    def __init__(self, offer: bytes, buffer: np.ndarray, size: int, count: int) -> None:
        own = _memory(buffer, size, count)
        remote = RemotePages(shard=own.shard, layout=own.layout, nbytes=own.nbytes, device="cpu", offers={})
        self._reader = NixlReader(remote, offer, own, _context(), time.monotonic() + CONNECT_S)
        self._from, self._to = _order(count), np.arange(count, dtype=np.int32)
        self.close = self._reader.close

    def read(self, _: int) -> None:
        self._reader.read(self._from, self._to, time.monotonic() + CONNECT_S)


class _Bare:
    """NIXL with one list of descriptors for each side, made before."""

    def __init__(self, offer: bytes, buffer: np.ndarray, size: int, count: int) -> None:
        believed = unpack(offer)
        self._agent = Agent("kvferry-bench-bare", is_local=True, has_thread=False)
        self.close = self._agent.close
        kind = memory_type("cpu")
        self._agent.register(buffer.ctypes.data, buffer.nbytes, kind, 0)
        self._agent.connect(believed.metadata, believed.agent)
        rows = _rows(buffer.ctypes.data, np.arange(count), size)
        self._own = self._agent.prepare(rows, kind, is_remote=False)
        rows = _rows(believed.address, _order(count), size)
        self._remote = self._agent.prepare(rows, kind, is_remote=True)
        self._indices = np.arange(count, dtype=np.int32)

    def read(self, _: int) -> None:
        if not self._agent.post(self._own, self._indices, self._remote, self._indices):
            while not self._agent.poll():
                pass


def _rows(address: int, blocks: np.ndarray, size: int) -> Rows:
    rows = np.empty((len(blocks), 3), np.uint64)
    rows[:, 0] = np.uint64(address) + blocks.astype(np.uint64) * np.uint64(size)
    rows[:, 1:] = size, 0
    return rows
