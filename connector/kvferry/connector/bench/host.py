"""Host store and load against memcpy: gather from engine pages to the arena, and scatter back.

Pages and arena are each many times larger than the caches' useful share, and every repetition touches
other blocks, so both sides move cold memory. The limit is ``np.copyto`` of as many contiguous bytes
between the same two regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchCase, BenchContext, Figure, Goal
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.layout import BlockLayout, PageLayout
from kvferry.connector.staging import HostStaging

__all__ = ["HOST", "engine_memory", "page_layout"]

GOAL = Goal(0.8, at_least=True)
MIB = 1 << 20

SHAPES = {
    "1.4 MiB": BlockLayout(num_layers=30, num_kv_heads=3, block_tokens=64, head_dim=64, itemsize=2),
    "8 MiB": BlockLayout(num_layers=32, num_kv_heads=8, block_tokens=64, head_dim=128, itemsize=2),
}
"""Blocks of a small model (SmolLM2-135M) and of a large one (Llama-3 8B), 64 tokens each."""
PAGES = (("heads", 64), ("heads", 32), ("tokens", 16))
"""Pages as large as a block; the smallest that vLLM has on a CPU; and how it lays them out on a GPU, which
no engine does in host memory and which therefore has no goal."""
SMALL = {"0.1 MiB": BlockLayout(num_layers=4, num_kv_heads=2, block_tokens=64, head_dim=64, itemsize=2)}


def page_layout(block: BlockLayout, order: str, page_tokens: int, num_pages: int) -> PageLayout:
    """Return pages as vLLM lays them out, layers outermost, K beside V for each token and head.

    Args:
        block: Geometry of the model.
        order: ``heads`` (LBHNC: a page's tokens of one head together) or ``tokens`` (LBNHC).
        page_tokens: Tokens per page.
        num_pages: Pages of every layer.
    """
    page = page_tokens * block.num_kv_heads * block.token_bytes
    by_head = order == "heads"
    return PageLayout(
        num_pages=num_pages,
        page_tokens=page_tokens,
        num_heads=block.num_kv_heads,
        head_bytes=block.head_dim * block.itemsize,
        kv_factor=block.kv_factor,
        layer_offsets=tuple(layer * num_pages * page for layer in range(block.num_layers)),
        page_stride=page,
        head_stride=(page_tokens if by_head else 1) * block.token_bytes,
        token_stride=(1 if by_head else block.num_kv_heads) * block.token_bytes,
        kv_stride=block.head_dim * block.itemsize,
    )


def _measure(context: BenchContext) -> Sequence[Figure]:
    plan = [
        (name, block, order, page_tokens)
        for name, block in (SMALL if context.quick else SHAPES).items()
        for order, page_tokens in PAGES
    ]
    figures: list[Figure] = []
    for index, (name, block, order, page_tokens) in enumerate(plan):

        def progress(part: float, done: int = index) -> None:
            context.progress((done + part) / len(plan))

        seconds, moved = _compare(block, order, page_tokens, context.quick, progress)
        for verb, side in (("store", "gather"), ("load", "scatter")):
            figures.append(
                Figure(
                    name=f"host {verb}, {name} blocks, {page_tokens}-token pages, {order} first",
                    value=moved / seconds[side] / 1e9,
                    unit="GB/s",
                    raw=moved / seconds[f"memcpy {verb}"] / 1e9,
                    raw_name="memcpy",
                    goal=GOAL if order == "heads" else None,
                )
            )
    return figures


def _compare(
    block: BlockLayout, order: str, page_tokens: int, quick: bool, progress: Callable[[float], None]
) -> tuple[dict[str, float], int]:
    """Time both directions; return median seconds by side and the bytes each call moves."""
    region = (4 if quick else 512) * MIB
    blocks = region // block.slot_bytes
    batch = max(1, min(blocks // 4, (1 if quick else 64) * MIB // block.slot_bytes))
    per_block = block.block_tokens // page_tokens
    layout = page_layout(block, order, page_tokens, blocks * per_block)
    pages = engine_memory(layout.extent_bytes())
    staging = HostStaging(pages, layout, block, block.shard(0, 1))
    arena = Arena.create(blocks, block.slot_bytes)
    try:
        slots = arena.slots_array
        sides = _sides(staging, pages, slots, block.payload_bytes, batch)
        slots[:] = 1
        return interleaved(sides, 3 if quick else 15, progress), batch * block.payload_bytes
    finally:
        del slots, sides
        arena.close()


def engine_memory(size: int) -> npt.NDArray[np.uint8]:
    """Return touched memory that starts on a cache line, as torch allocates it.

    numpy's own arrays start 16 bytes after a page, where copies of a few KiB into them are four times
    slower on some processors (``rep movsb`` into a line it does not fill).
    """
    memory = np.ones(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def _sides(
    staging: HostStaging,
    pages: npt.NDArray[np.uint8],
    slots: npt.NDArray[np.uint8],
    payload_bytes: int,
    batch: int,
) -> dict[str, Callable[[int], None]]:
    per_block = staging.pages_per_block
    page_ids = np.random.default_rng(2).permutation(len(slots) * per_block).astype(np.int32)
    page_ids = page_ids.reshape(len(slots), per_block)

    def chosen(repetition: int) -> list[tuple[int, int]]:
        """Pairs of (block of pages, slot), other ones in every repetition."""
        first = (repetition + 1) * batch
        return [
            (index % len(slots), (index + len(slots) // 2) % len(slots))
            for index in range(first, first + batch)
        ]

    def gather(repetition: int) -> None:
        sources, targets = np.array(chosen(repetition)).T
        staging.gather(page_ids[sources], targets, slots)

    def scatter(repetition: int) -> None:
        targets, sources = np.array(chosen(repetition)).T
        staging.scatter(page_ids[targets], sources, slots)

    def copy_out(repetition: int) -> None:
        for source, target in chosen(repetition):
            start = source * payload_bytes
            np.copyto(slots[target, :payload_bytes], pages[start : start + payload_bytes])

    def copy_in(repetition: int) -> None:
        for target, source in chosen(repetition):
            start = target * payload_bytes
            np.copyto(pages[start : start + payload_bytes], slots[source, :payload_bytes])

    return {"gather": gather, "memcpy store": copy_out, "scatter": scatter, "memcpy load": copy_in}


HOST = BenchCase("host", "engine pages to arena and back, against memcpy", _measure)
