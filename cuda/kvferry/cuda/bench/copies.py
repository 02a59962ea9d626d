"""Blocks out of pages and back by every path, against one large copy between the same memories.

The limit is one ``cuMemcpyAsync`` (what ``cudaMemcpyAsync`` calls) of the whole buffer to pinned memory, and for both
directions at once one of either half. Path and limit take turns, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvferry.connector.bench.case import Figure, Goal
from kvferry.connector.bench.host import page_layout
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.errors import ArenaError, DeviceError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.staging import Copies
from kvferry.cuda.choice import PathName, Paths, blocks_at_once
from kvferry.cuda.driver import Device, one_copy
from kvferry.cuda.geometry import copy_geometry
from kvferry.cuda.scratch import Scratch
from kvferry.cuda.staging import DeviceStaging

__all__ = ["CACHES", "DIRECTIONS", "ORDERS", "Comparison", "Sides", "compare", "path_sides"]

CACHES: Mapping[str, BlockLayout] = {
    "8B": BlockLayout(num_layers=32, num_kv_heads=8, block_tokens=64, head_dim=128, itemsize=2),
    "70B": BlockLayout(num_layers=80, num_kv_heads=8, block_tokens=64, head_dim=128, itemsize=2),
}
"""Blocks of 64 tokens of models of two sizes, bf16: 8 MiB and 20 MiB."""
ORDERS = ("tokens", "heads")
"""What comes first in a page: see ``kvferry.connector.bench.host.page_layout``."""
PAGE_TOKENS = 16

DIRECTIONS = {"D2H": Goal(0.9, at_least=True), "H2D": Goal(0.9, at_least=True), "both": Goal(0.85, True)}

_MOST_COPIES = 1 << 17
"""Of a call of the paths that copy run by run; beyond it they are given fewer blocks, and the figure says so."""
_STAGERS_BATCH = 64
"""Blocks that an engine's stager hands over at once."""

Sides = Mapping[str, Callable[[int], None]]
"""What is timed, by direction; called with the number of the repetition."""


class Comparison(NamedTuple):
    """One path on one cache."""

    cache: str
    order: str
    blocks: int
    path: PathName
    figures: Sequence[Figure]
    """One for each of ``DIRECTIONS``, none where it was left out."""
    left_out: str = ""
    """Why."""


def compare(
    device: Device,
    paths: Paths,
    names: Sequence[PathName],
    cache: str,
    order: str,
    num_blocks: int,
    repetitions: int,
    progress: Callable[[float], None],
) -> Iterator[Comparison]:
    """Measure paths on one cache. What a GPU or host has no memory for is left out, with the reason.

    Args:
        device: The GPU.
        paths: What it has.
        names: Which of them.
        cache: One of ``CACHES``.
        order: One of ``ORDERS``.
        num_blocks: Blocks that are moved.
        repetitions: Timed calls of each side.
        progress: Told the part that is done.
    """
    block = CACHES[cache]
    layout = page_layout(block, order, PAGE_TOKENS, num_blocks * block.block_tokens // PAGE_TOKENS)
    about = functools.partial(Comparison, cache, order, num_blocks)
    try:
        with Scratch(device, layout, block) as scratch:
            for index, name in enumerate(names):

                def advance(part: float, done: int = index) -> None:
                    progress((done + part) / len(names))

                try:
                    yield about(name, _figures(device, scratch, paths, name, repetitions, advance))
                except DeviceError as error:
                    yield about(name, (), str(error))
    except (ArenaError, DeviceError) as error:
        for name in names:
            yield about(name, (), str(error))


def path_sides(scratch: Scratch, staging: DeviceStaging, num_blocks: int) -> Sides:
    """Return what a stager would do with the first ``num_blocks`` blocks, in each direction and in both at once.

    Args:
        scratch: The memory.
        staging: Over its pages.
        num_blocks: At least two.
    """
    half = num_blocks // 2

    def copy(direction: Copies, start: int, end: int) -> None:
        for first in range(start, end, _STAGERS_BATCH):
            some = slice(first, min(first + _STAGERS_BATCH, end))
            direction.copy(scratch.page_ids[some], scratch.slot_ids[some], scratch.slots)
        direction.finish()

    def both(_: int) -> None:
        with ThreadPoolExecutor(2, "kvferry-bench") as threads:
            out = threads.submit(copy, staging.gathers, 0, half)
            back = threads.submit(copy, staging.scatters, half, 2 * half)
        out.result()
        back.result()

    return {
        "D2H": lambda _: copy(staging.gathers, 0, num_blocks),
        "H2D": lambda _: copy(staging.scatters, 0, num_blocks),
        "both": both,
    }


def _figures(
    device: Device,
    scratch: Scratch,
    paths: Paths,
    name: PathName,
    repetitions: int,
    progress: Callable[[float], None],
) -> list[Figure]:
    geometry = copy_geometry(scratch.pages.layout, scratch.pages.block, scratch.pages.shard)
    all_blocks = len(scratch.slot_ids)
    num_blocks = max(2, min(all_blocks, blocks_at_once(name, geometry, _MOST_COPIES)))
    note = f"{num_blocks} blocks only" if num_blocks < all_blocks else ""
    staging = scratch.staging(functools.partial(paths.make, name))
    try:
        # The path comes first: its first copy makes the slots known to the GPU, for the limit too.
        moving = path_sides(scratch, staging, num_blocks)
        limits = _raw_sides(device, scratch)
        sides = {**moving, **{f"raw {direction}": side for direction, side in limits.items()}}
        seconds = interleaved(sides, repetitions, progress)
    finally:
        staging.close()
    moved = {"D2H": num_blocks, "H2D": num_blocks, "both": num_blocks // 2 * 2}
    return [
        Figure(
            name=direction,
            value=moved[direction] * geometry.shard_bytes / seconds[direction] / 1e9,
            unit="GB/s",
            raw=_raw_bytes(scratch) / seconds[f"raw {direction}"] / 1e9,
            raw_name="cuMemcpyAsync",
            goal=goal,
            note=note,
        )
        for direction, goal in DIRECTIONS.items()
    ]


def _raw_bytes(scratch: Scratch) -> int:
    """Return how much the limit moves, an even number."""
    return min(scratch.pages.nbytes, scratch.slots.nbytes) // 2 * 2


def _raw_sides(device: Device, scratch: Scratch) -> Sides:
    streams = device.stream(is_urgent=False), device.stream(is_urgent=True)
    ends = device.event(), device.event()
    nbytes = _raw_bytes(scratch)
    pages, slots = scratch.pages.address, scratch.slots.ctypes.data

    def copies(*pieces: tuple[int, int, int]) -> Callable[[int], None]:
        arrays = [one_copy(*piece) for piece in pieces]

        def run(_: int) -> None:
            for stream, end, piece in zip(streams, ends, arrays, strict=False):
                stream.copy_each(*piece)
                stream.record(end)
            for end in ends[: len(arrays)]:
                end.synchronize()

        return run

    half = nbytes // 2
    return {
        "D2H": copies((slots, pages, nbytes)),
        "H2D": copies((pages, slots, nbytes)),
        "both": copies((slots, pages, half), (pages + half, slots + half, half)),
    }
