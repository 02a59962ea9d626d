"""Staging against a slow, independent reference: every byte by index arithmetic."""

import sys
import threading

import numpy as np
import pytest

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import HostStaging

KINDS = ["nhd_fused", "hnd_fused", "cross_layer", "kv_separate", "ragged_layers", "mla"]


def page_layout(kind: str, rng: np.random.Generator, heads: int, layers: int, tokens: int, head_bytes: int):
    """Describe pages the way engines lay them out; a random gap keeps strides from being guessable."""
    pages = int(rng.integers(3, 9))
    gap = int(rng.integers(0, 3)) * 32
    kv = 1 if kind == "mla" else 2
    token_bytes = kv * head_bytes
    page_bytes = heads * tokens * token_bytes + gap
    common = {
        "num_pages": pages,
        "page_tokens": tokens,
        "num_heads": heads,
        "head_bytes": head_bytes,
        "kv_factor": kv,
    }
    offsets = tuple(layer * pages * page_bytes for layer in range(layers))
    nhd = {"head_stride": token_bytes, "token_stride": heads * token_bytes, "kv_stride": head_bytes}
    hnd = {"head_stride": tokens * token_bytes, "token_stride": token_bytes, "kv_stride": head_bytes}
    if kind in ("nhd_fused", "mla"):
        return PageLayout(**common, layer_offsets=offsets, page_stride=page_bytes, **nhd)
    if kind == "hnd_fused":
        return PageLayout(**common, layer_offsets=offsets, page_stride=page_bytes, **hnd)
    if kind == "cross_layer":
        within = tuple(layer * page_bytes for layer in range(layers))
        return PageLayout(**common, layer_offsets=within, page_stride=layers * page_bytes, **hnd)
    if kind == "kv_separate":
        half = heads * tokens * head_bytes
        far = tuple(2 * layer * pages * half for layer in range(layers))
        strides = {"head_stride": head_bytes, "token_stride": heads * head_bytes, "kv_stride": pages * half}
        return PageLayout(**common, layer_offsets=far, page_stride=half, **strides)
    order = rng.permutation(layers)
    ragged = tuple(int(place) * (pages * page_bytes + 64) + int(place) ** 2 * 8 for place in order)
    return PageLayout(**common, layer_offsets=ragged, page_stride=page_bytes, **hnd)


def random_case(seed: int):
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    tp_size = 1 if kind == "mla" else int(rng.choice([1, 2]))
    heads = 1 if kind == "mla" else tp_size * int(rng.integers(1, 3))
    layers, tokens = int(rng.integers(1, 4)), int(rng.choice([1, 2, 4]))
    head_dim, itemsize = int(rng.choice([1, 4, 6])), int(rng.choice([1, 2, 4]))
    block = BlockLayout(
        num_layers=layers,
        num_kv_heads=heads,
        block_tokens=tokens * int(rng.integers(1, 4)),
        head_dim=head_dim,
        kv_factor=1 if kind == "mla" else 2,
        itemsize=itemsize,
    )
    shard = block.shard(int(rng.integers(tp_size)), tp_size)
    layout = page_layout(kind, rng, shard.num_heads, layers, tokens, head_dim * itemsize)
    page_ids = [int(page) for page in rng.choice(layout.num_pages, block.block_tokens // tokens, False)]
    return rng, block, shard, layout, page_ids


def pairs(block: BlockLayout, shard: Shard, layout: PageLayout, page_ids: list[int]):
    """(byte in the engine's memory, byte in the slot) for every byte of the given pages."""
    head_bytes = block.head_dim * block.itemsize
    for head in range(shard.num_heads):
        for layer in range(block.num_layers):
            for token in range(len(page_ids) * layout.page_tokens):
                for kv in range(block.kv_factor):
                    for byte in range(head_bytes):
                        page = page_ids[token // layout.page_tokens]
                        in_pages = (
                            layout.layer_offsets[layer]
                            + page * layout.page_stride
                            + head * layout.head_stride
                            + token % layout.page_tokens * layout.token_stride
                            + kv * layout.kv_stride
                            + byte
                        )
                        vector = (shard.first_head + head) * block.num_layers + layer
                        vector = (vector * block.block_tokens + token) * block.kv_factor + kv
                        yield in_pages, vector * head_bytes + byte


@pytest.mark.parametrize("seed", range(240))
def test_gather_and_scatter_move_exactly_the_shards_bytes(seed: int) -> None:
    rng, block, shard, layout, page_ids = random_case(seed)
    memory = rng.integers(0, 256, layout.extent_bytes() + 50, dtype=np.uint8)
    poison = rng.integers(0, 256, block.slot_bytes, dtype=np.uint8)
    expected_slot, expected_memory = poison.copy(), memory.copy()
    for in_pages, in_slot in pairs(block, shard, layout, page_ids):
        expected_slot[in_slot] = memory[in_pages]

    slot = poison.copy()
    HostStaging(memory, layout, block, shard).gather(page_ids, slot)
    assert np.array_equal(slot, expected_slot)

    target = rng.integers(0, 256, memory.size, dtype=np.uint8)
    expected_memory = target.copy()
    for in_pages, in_slot in pairs(block, shard, layout, page_ids):
        expected_memory[in_pages] = slot[in_slot]
    HostStaging(target, layout, block, shard).scatter(memoryview(slot), page_ids)
    assert np.array_equal(target, expected_memory)


@pytest.mark.parametrize("seed", range(40))
def test_scatter_from_the_middle_of_a_block_touches_only_those_pages(seed: int) -> None:
    rng, block, shard, layout, page_ids = random_case(seed)
    first = len(page_ids) // 2
    memory = rng.integers(0, 256, layout.extent_bytes(), dtype=np.uint8)
    slot = rng.integers(0, 256, block.slot_bytes, dtype=np.uint8)
    expected = memory.copy()
    for in_pages, in_slot in pairs(block, shard, layout, page_ids):
        token = in_slot % block.run_bytes // block.token_bytes
        if token >= first * layout.page_tokens:
            expected[in_pages] = slot[in_slot]
    HostStaging(memory, layout, block, shard).scatter(slot, page_ids[first:], first_page=first)
    assert np.array_equal(memory, expected)


@pytest.fixture
def staging() -> HostStaging:
    block = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=8, head_dim=4, itemsize=2)
    layout = page_layout("hnd_fused", np.random.default_rng(0), 2, 2, 4, 8)
    return HostStaging(np.zeros(layout.extent_bytes(), np.uint8), layout, block, block.shard(0, 1))


@pytest.mark.parametrize("page_ids", [[0, -1], [0, 1 << 40], [0], [0, 1, 2], []])
def test_pages_that_the_engine_does_not_have_are_refused(staging: HostStaging, page_ids: list[int]) -> None:
    with pytest.raises(LayoutError):
        staging.gather(page_ids, np.zeros(4096, np.uint8))


@pytest.mark.parametrize(("page_ids", "first_page"), [([0, 1], 1), ([0], -1), ([0], 2), ([99], 0)])
def test_scatter_stays_within_the_block(staging: HostStaging, page_ids: list[int], first_page: int) -> None:
    with pytest.raises(LayoutError):
        staging.scatter(np.zeros(4096, np.uint8), page_ids, first_page)


def test_a_short_slot_is_refused(staging: HostStaging) -> None:
    with pytest.raises(LayoutError, match="cannot hold"):
        staging.gather([0, 1], np.zeros(16, np.uint8))
    with pytest.raises(LayoutError, match="cannot hold"):
        staging.scatter(memoryview(bytearray(16)), [0, 1])


def test_pages_beyond_the_engines_memory_are_refused() -> None:
    block = BlockLayout(num_layers=2, num_kv_heads=2, block_tokens=8, head_dim=4, itemsize=2)
    layout = page_layout("hnd_fused", np.random.default_rng(0), 2, 2, 4, 8)
    with pytest.raises(LayoutError, match="span"):
        HostStaging(np.zeros(layout.extent_bytes() - 1, np.uint8), layout, block, block.shard(0, 1))
    with pytest.raises(LayoutError, match="contiguous"):
        HostStaging(np.zeros(2 * layout.extent_bytes(), np.uint8)[::2], layout, block, block.shard(0, 1))


def test_copies_release_the_gil() -> None:
    block = BlockLayout(num_layers=32, num_kv_heads=16, block_tokens=64, head_dim=64, itemsize=2)
    layout = page_layout("kv_separate", np.random.default_rng(0), 16, 32, 64, 128)
    staging = HostStaging(np.ones(layout.extent_bytes(), np.uint8), layout, block, block.shard(0, 1))
    slot = np.zeros(block.slot_bytes, np.uint8)

    def runs_during_a_copy() -> bool:
        started, ended = threading.Event(), threading.Event()

        def copy() -> None:
            started.set()
            staging.gather([0], slot)
            ended.set()

        thread = threading.Thread(target=copy, name="copier")
        thread.start()
        started.wait(20)
        met_it = not ended.is_set()
        thread.join(20)
        return met_it

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody is asked to give the GIL up: this thread runs if it is released
    try:
        assert any(runs_during_a_copy() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)
