"""Pages in two processes: layouts as engines have them, contents that both sides know, and a process that exports.

Run as a program this is the exporting side, told what to do over its standard input. It imports nothing heavy, and
NIXL only in that process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.transport import (
    Heads,
    PageMemory,
    PageReader,
    RemotePages,
    TransportContext,
    narrow,
)

__all__ = [
    "BLOCK",
    "LAYOUTS",
    "POISON",
    "Pages",
    "Spec",
    "Target",
    "connect",
    "contents",
    "context",
    "dense",
    "held",
]

LAYOUTS = ("nhd", "hnd", "pages_outermost", "kv_separate", "ragged")
BLOCK = BlockLayout(num_layers=3, num_kv_heads=4, block_tokens=64, head_dim=64, itemsize=2, dtype="bfloat16")
LATENT = BlockLayout(
    num_layers=3, num_kv_heads=1, block_tokens=64, head_dim=288, itemsize=2, kv_factor=1, dtype="bfloat16"
)
PAGE_TOKENS = 16
POISON = 0xEE
START_S = 90.0


def dense(
    kind: str, pages: int, layers: int, heads: int, tokens: int, kv: int, vector: int, gap: int
) -> PageLayout:
    """Lay pages out as engines do; ``gap`` bytes lie unused behind every layer of every page."""
    token, half = kv * vector, pages * (heads * tokens * vector + gap)
    page = heads * tokens * token + gap
    by_head = tokens * token, token, vector
    head_stride, token_stride, kv_stride = {
        "nhd": (token, heads * token, vector),
        "kv_separate": (vector, heads * vector, half),
    }.get(kind, by_head)
    offsets, page_stride = [layer * pages * page for layer in range(layers)], page
    if kind == "pages_outermost":
        offsets, page_stride = [layer * page for layer in range(layers)], layers * page
    if kind == "kv_separate":
        offsets, page_stride = [kv * layer * half for layer in range(layers)], heads * tokens * vector + gap
    if kind == "ragged":
        offsets = [offset + 3 * index**2 for index, offset in enumerate(offsets)][::-1]
    return PageLayout(
        num_pages=pages,
        page_tokens=tokens,
        num_heads=heads,
        head_bytes=vector,
        kv_factor=kv,
        layer_offsets=tuple(offsets),
        page_stride=page_stride,
        head_stride=head_stride,
        token_stride=token_stride,
        kv_stride=kv_stride,
    )


class Spec(msgspec.Struct, frozen=True):
    """One rank's pages, in words."""

    kind: str = "hnd"
    pages: int = 64
    tp_size: int = 1
    rank: int = 0
    is_latent: bool = False
    gap: int = 0
    seed: int = 1

    @property
    def block(self) -> BlockLayout:
        return LATENT if self.is_latent else BLOCK

    @property
    def shard(self) -> Shard:
        return self.block.shard(self.rank, self.tp_size)

    @property
    def layout(self) -> PageLayout:
        block = self.block
        return dense(
            self.kind,
            self.pages,
            block.num_layers,
            self.shard.num_heads,
            PAGE_TOKENS,
            block.kv_factor,
            block.head_dim * block.itemsize,
            self.gap,
        )


def contents(spec: Spec) -> np.ndarray:
    """Return what the whole model's pages hold: ``[page, layer, head, token, kv, byte]``."""
    block = spec.block
    vector = block.head_dim * block.itemsize
    shape = (spec.pages, block.num_layers, block.num_kv_heads, PAGE_TOKENS, block.kv_factor, vector)
    return np.random.default_rng(spec.seed).integers(0, 256, shape, dtype=np.uint8)


class Pages:
    """A rank's pages in this process, poisoned."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.bytes = np.full(spec.layout.extent_bytes() + 4096, POISON, np.uint8)
        self.memory = PageMemory(
            address=self.bytes.ctypes.data,
            nbytes=self.bytes.nbytes,
            device="cpu",
            device_id=0,
            layout=spec.layout,
            block=spec.block,
            shard=spec.shard,
            stage=_no_staging,
        )

    def put(self, heads: Heads, pages: Sequence[int], values: np.ndarray) -> None:
        """Write some heads of some pages, from ``[page, layer, head, token, kv, byte]``."""
        part = narrow(self.spec.layout, self.spec.shard, heads)
        shape = (part.num_pages, part.num_heads, part.page_tokens, part.kv_factor, part.head_bytes)
        strides = (part.page_stride, part.head_stride, part.token_stride, part.kv_stride, 1)
        for layer, offset in enumerate(part.layer_offsets):
            view = np.lib.stride_tricks.as_strided(self.bytes[offset:], shape, strides)
            view[list(pages)] = values[:, layer]

    def fill(self) -> None:
        """Write what the rank's pages hold."""
        heads, values = self.memory.heads, contents(self.spec)
        self.put(heads, range(self.spec.pages), values[:, :, heads.first : heads.end])

    @property
    def remote(self) -> RemotePages:
        """What this rank says of itself."""
        memory = self.memory
        return RemotePages(
            shard=memory.shard, layout=memory.layout, nbytes=memory.nbytes, device="cpu", offers={}
        )


def _no_staging(heads: Heads) -> Any:
    raise NotImplementedError("one-sided reads need no staging")


def context(name: str = "test", *, is_only: bool = False) -> TransportContext:
    return TransportContext(host="127.0.0.1", advertised="127.0.0.1", token="", name=name, is_only=is_only)


class Target:
    """Another process that exports pages. Use it as a context manager; it dies with this process.

    Args:
        specs: Its ranks.
        environ: Added to the environment.
    """

    def __init__(self, specs: Sequence[Spec], environ: dict[str, str] | None = None) -> None:
        self.specs = list(specs)
        command = [sys.executable, __file__, msgspec.json.encode(self.specs).decode()]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environ or {})}
        self._process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self.offers: list[bytes] = []

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, command: str) -> str:
        """Have it do something, and return what it says."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)
        if number == signal.SIGSTOP:
            _, status = os.waitpid(self.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
        if number == signal.SIGKILL:
            self._process.wait(START_S)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        too_late = threading.Timer(START_S, self._process.kill)
        too_late.start()
        try:
            for line in self._process.stdout:
                if line.startswith("= "):
                    return line[2:].strip()
        finally:
            too_late.cancel()
        raise AssertionError(f"the target ended with {self._process.wait()}")

    def __enter__(self) -> Self:
        try:
            self.offers = [bytes.fromhex(offer) for offer in self._answer().split()]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(START_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def connect(
    target: Target, own: Pages, index: int = 0, *, timeout_s: float = 20.0, is_only: bool = False
) -> PageReader:
    """Connect to one of a target's ranks."""
    from kvferry.plugins.peer.nixl_transport import NIXL

    remote = Pages(target.specs[index]).remote
    deadline = time.monotonic() + timeout_s
    return NIXL.connect(remote, target.offers[index], own.memory, context(is_only=is_only), deadline)


def held() -> tuple[int, int]:
    """Return the open descriptors and the resident KiB of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (resident,) = (int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    return len(os.listdir("/proc/self/fd")), resident


def _idle_cores(seconds: float) -> float:
    """Return the cores that this process takes while it waits."""
    before, started = time.process_time(), time.monotonic()
    time.sleep(seconds)
    return (time.process_time() - before) / (time.monotonic() - started)


def serve(specs: list[Spec]) -> None:
    """Export pages and answer commands until the other side goes away."""
    from kvferry.plugins.peer.nixl_transport import NIXL

    everything = [Pages(spec) for spec in specs]
    for pages in everything:
        pages.fill()
    exporters = [NIXL.export(pages.memory, context("target")) for pages in everything]
    print("=", *(exporter.offer.hex() for exporter in exporters), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "idle":
            print("=", _idle_cores(float(arguments[0])), flush=True)
        elif command == "held":
            print("=", *held(), flush=True)
        elif command == "close":
            for exporter in exporters * 2:
                exporter.close()
            print("=", *held(), flush=True)


def read_forever(target_spec: Spec, offer: bytes) -> None:
    """Connect and read whole pages over and over; says so once it has begun."""
    from kvferry.plugins.peer.nixl_transport import NIXL

    own = Pages(target_spec)
    remote = Pages(target_spec).remote
    reader = NIXL.connect(remote, offer, own.memory, context("victim"), time.monotonic() + START_S)
    ids = np.arange(target_spec.pages, dtype=np.int32)
    for turn in range(10**9):
        reader.read(ids, ids, time.monotonic() + START_S)
        if turn == 1:
            print("= reading", flush=True)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    if os.getppid() == 1:
        sys.exit("the parent is gone")
    # Where a torch without CUDA is installed, nixl imports it to ask for its version: seconds for every process.
    sys.modules["torch"] = None  # type: ignore[assignment]
    if len(sys.argv) > 2:
        read_forever(msgspec.json.decode(sys.argv[1], type=list[Spec])[0], bytes.fromhex(sys.argv[2]))
    else:
        serve(msgspec.json.decode(sys.argv[1], type=list[Spec]))
