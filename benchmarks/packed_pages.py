"""Pages that vLLM's CPU attention packs, against the same pages copied as they are: microseconds a MiB.

    python benchmarks/packed_pages.py

``HostStaging`` copies two blocks of 128 tokens between pages and slots, once with the packing undone and once without,
beside a plain memcpy of as many bytes. Best of 20, one thread. Every pair is checked to come back as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np

from kvferry.connector.layout import BlockLayout, PageLayout
from kvferry.connector.staging import HostStaging
from kvferry.engines.vllm.packing import known_packings

BLOCK_TOKENS, BLOCKS = 128, 2
SMALL, LARGE = (30, 3, 64), (32, 8, 128)
"""Layers, KV heads and head dimension of models with about 0.1 and 8 billion parameters."""
CASES = [
    ("vec", 16, 4, SMALL),
    ("vec", 128, 2, SMALL),
    ("vec", 32, 2, LARGE),
    ("vec", 128, 2, LARGE),
    ("amx", 128, 2, SMALL),
    ("amx", 128, 2, LARGE),
    ("bfmmla", 128, 2, LARGE),
]


def best_s(copy: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        copy()
        best = min(best, time.perf_counter() - started)
    return best


def measure(name: str, page_tokens: int, itemsize: int, model: tuple[int, int, int]) -> list[float]:
    """Return seconds: memcpy, then gather and scatter as they are, then packed."""
    layers, heads, head_dim = model
    block = BlockLayout(
        num_layers=layers,
        num_kv_heads=heads,
        block_tokens=BLOCK_TOKENS,
        head_dim=head_dim,
        itemsize=itemsize,
    )
    pages = BLOCKS * BLOCK_TOKENS // page_tokens
    run = page_tokens * block.token_bytes
    packed = PageLayout(
        num_pages=pages,
        page_tokens=page_tokens,
        num_heads=heads,
        head_bytes=head_dim * itemsize,
        kv_factor=2,
        layer_offsets=tuple(layer * pages * heads * run for layer in range(layers)),
        page_stride=heads * run,
        head_stride=run,
        token_stride=block.token_bytes,
        kv_stride=head_dim * itemsize,
        packing=known_packings(page_tokens, head_dim)[name],
    )
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 256, packed.extent_bytes(), dtype=np.uint8)
    before, copied = memory.copy(), np.ones_like(memory)
    page_ids = rng.permutation(pages).astype(np.int32).reshape(BLOCKS, -1)
    slots, arena = np.arange(BLOCKS), np.zeros((BLOCKS, block.slot_bytes), np.uint8)
    seconds = [best_s(lambda: np.copyto(copied, before))]
    for layout in (msgspec.structs.replace(packed, packing=None), packed):
        staging = HostStaging(memory, layout, block, block.shard(0, 1))
        seconds.append(best_s(partial(staging.gather, page_ids, slots, arena)))
        memory[:] = 0
        seconds.append(best_s(partial(staging.scatter, page_ids, slots, arena)))
        assert np.array_equal(memory, before)
    return [one * (1 << 20) / memory.nbytes for one in seconds]


def main() -> None:
    print("order    page  item  model   memcpy   as they are   packed, save and load   ratios")
    for name, page_tokens, itemsize, model in CASES:
        memcpy, gather, scatter, unpack, pack = (
            one * 1e6 for one in measure(name, page_tokens, itemsize, model)
        )
        size = "small" if model == SMALL else "large"
        print(
            f"{name:7} {page_tokens:5} {itemsize:5}  {size:6} {memcpy:7.0f} {gather:7.0f} {scatter:5.0f} "
            f"{unpack:12.0f} {pack:6.0f} {unpack / gather:18.1f} {pack / scatter:4.1f}"
        )


if __name__ == "__main__":
    main()
