"""Engines' pages in every physical order that vLLM and TensorRT-LLM use, with random sizes and gaps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.connector.layout import BlockLayout, PageLayout, Shard

Bytes = npt.NDArray[np.uint8]

FAMILIES = {
    "vllm_LBHNC": "LBHNK",
    "vllm_LBNHC": "LBNHK",
    "vllm_LHBNC": "LHBNK",
    "vllm_BLHNC": "BLHNK",
    "vllm_BLNHC": "BLNHK",
    "vllm_BHLNC": "BHLNK",
    "mla_layer_outermost": "LBHNK",
    "mla_page_outermost": "BLHNK",
    "trtllm_pool": "BLKHN",
    "separate_k_and_v": "LKBNH",
    "separate_k_and_v_hnd": "KLBHN",
    "uneven_layers": "LBHNK",
    "uneven_layers_in_a_page": "BLNHK",
}
"""Axes from the slowest to the fastest: layer, page (B), head, token (N), K or V; head_dim elements follow."""


class Case(NamedTuple):
    """One rank's pages, some blocks of them, and a grid to copy them with."""

    block: BlockLayout
    shard: Shard
    layout: PageLayout
    page_ids: npt.NDArray[np.int32]
    """``[blocks, pages_per_block]``; negative where a page is left out."""
    num_threads: int
    pages_shift: int
    """Bytes by which the engine's memory misses an aligned address."""
    shards_shift: int


def random_case(family: str, seed: int) -> Case:
    rng = np.random.default_rng([sorted(FAMILIES).index(family), seed])
    is_mla = family.startswith("mla")
    tp_size = int(rng.choice([1, 2, 4]))
    heads = 1 if is_mla else int(rng.choice([1, 2, 3])) * int(rng.choice([1, tp_size]))
    if heads % tp_size and tp_size % heads:
        tp_size = heads
    tokens = int(rng.choice([1, 2, 4, 8, 16], p=[0.1, 0.2, 0.3, 0.2, 0.2]))
    block = BlockLayout(
        num_layers=int(rng.integers(1, 6)),
        num_kv_heads=heads,
        block_tokens=tokens * int(rng.integers(1, 5)),
        head_dim=int(rng.choice([72, 576] if is_mla else [1, 3, 8, 20, 36, 64, 128])),
        kv_factor=1 if is_mla else 2,
        itemsize=int(rng.choice([1, 2, 4])),
    )
    shard = block.shard(int(rng.integers(tp_size)), tp_size)
    layout = page_layout(family, rng, block, shard, tokens)
    per_block = block.block_tokens // tokens
    ids = rng.permutation(layout.num_pages)[: layout.num_pages // per_block * per_block]
    page_ids = ids.astype(np.int32).reshape(-1, per_block)
    if rng.random() < 0.5:
        page_ids[rng.random(page_ids.shape) < 0.3] = -int(rng.integers(1, 1 << 31))
    threads = int(rng.integers(1, 8)) * int(rng.choice([1, 3, 7, 32, 61, 64]))
    shifts = [int(rng.choice([0, 0, 1, 2, 4, 8])) for _ in range(2)]
    return Case(block, shard, layout, page_ids, threads, *shifts)


def page_layout(
    family: str, rng: np.random.Generator, block: BlockLayout, shard: Shard, tokens: int
) -> PageLayout:
    """Lay pages out in a family's order; a gap behind some axes keeps strides from being guessable."""
    per_block = block.block_tokens // tokens
    sizes = {
        "L": block.num_layers,
        "B": per_block * int(rng.integers(1, 4)) + int(rng.integers(0, 2)),
        "H": shard.num_heads,
        "N": tokens,
        "K": block.kv_factor,
    }
    head_bytes = block.head_dim * block.itemsize
    strides, reach = {}, head_bytes
    for axis in reversed(FAMILIES[family]):
        strides[axis] = reach
        reach *= sizes[axis]
        if axis in "BHL" and rng.random() < 0.3:
            reach += block.itemsize * int(rng.choice([1, 4, 16]))
    offsets = np.arange(block.num_layers) * strides["L"]
    if family == "uneven_layers":
        places = rng.permutation(block.num_layers)
        offsets = places * strides["L"] + places**2 * 16 * block.itemsize
    elif family == "uneven_layers_in_a_page":
        offsets = rng.permutation(offsets)
    return PageLayout(
        num_pages=sizes["B"],
        page_tokens=tokens,
        num_heads=shard.num_heads,
        head_bytes=head_bytes,
        kv_factor=block.kv_factor,
        layer_offsets=tuple(int(offset) for offset in offsets),
        page_stride=strides["B"],
        head_stride=strides["H"],
        token_stride=strides["N"],
        kv_stride=strides["K"],
    )


def shifted(content: Bytes, shift: int) -> Bytes:
    """Copy bytes to memory that begins ``shift`` bytes behind an address that is aligned to 64."""
    room = np.empty(content.size + 128, np.uint8)
    first = -room.ctypes.data % 64 + shift
    room[first : first + content.size] = content.ravel()
    return room[first : first + content.size]
