"""vLLM's cache tensors in every physical order: described, proved by the self-test, refused when odd."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout
from kvferry.connector.staging import HostStaging
from kvferry.engines.roundtrip import round_trip
from kvferry.engines.vllm.geometry import page_layout, pages_array
from kvferry.engines.vllm.worker import _ManagerPages

LAYERS, PAGES, TOKENS, HEAD_DIM = 3, 8, 16, 8


def cache(order: KVCacheLayout, heads: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Each layer's ``[pages, heads, tokens, content]`` view of one allocation in this physical order."""
    logical = (LAYERS, PAGES, heads, TOKENS, 2 * HEAD_DIM)
    physical = [logical[axis] for axis in order.stride_order]
    allocation = torch.zeros(math.prod(logical), dtype=dtype).view(physical)
    inverse = [order.stride_order.index(axis) for axis in range(5)]
    return list(allocation.permute(inverse).unbind(0))


def block(heads: int, dtype: torch.dtype = torch.bfloat16, pages_per_block: int = 2) -> BlockLayout:
    return BlockLayout(
        num_layers=LAYERS,
        num_kv_heads=heads,
        block_tokens=TOKENS * pages_per_block,
        head_dim=HEAD_DIM,
        itemsize=dtype.itemsize,
    )


@pytest.mark.parametrize(
    ("order", "dtype", "tp_size"),
    list(itertools.product(KVCacheLayout, (torch.bfloat16, torch.float32, torch.uint8), (1, 2))),
)
def test_blocks_survive_in_every_physical_order(
    order: KVCacheLayout, dtype: torch.dtype, tp_size: int
) -> None:
    heads = 4
    for rank in range(tp_size):
        shard = block(heads, dtype).shard(rank, tp_size)
        layers = cache(order, shard.num_heads, dtype)
        layout = page_layout(layers, block(heads, dtype))
        staging = HostStaging(pages_array(layers[0]), layout, block(heads, dtype), shard)
        round_trip(staging, layers, block(heads, dtype), shard)
        assert not any(layer.any() for layer in layers), "the self-test leaves the cache as it was"


def test_what_one_tp_size_writes_another_reads() -> None:
    whole, order = block(4), KVCacheLayout.LBHNC
    layers = cache(order, 4)
    for layer in layers:
        layer.copy_(torch.randn(layer.shape))
    slots, arena = np.array([0]), np.zeros((1, whole.slot_bytes), np.uint8)
    one = HostStaging(pages_array(layers[0]), page_layout(layers, whole), whole, whole.shard(0, 1))
    one.gather(np.array([[5, 2]], np.int32), slots, arena)
    for rank in range(2):
        shard = whole.shard(rank, 2)
        halves = cache(KVCacheLayout.BLNHC, 2)
        half = HostStaging(pages_array(halves[0]), page_layout(halves, whole), whole, shard)
        half.scatter(np.array([[1, 6]], np.int32), slots, arena)
        for layer, full in zip(halves, layers, strict=True):
            assert torch.equal(layer[[1, 6]], full[[5, 2]][:, shard.first_head : shard.first_head + 2])


def test_pages_that_the_kernel_splits_go_by_the_managers_ids() -> None:
    whole = block(4)
    layers = cache(KVCacheLayout.LBHNC, 4)
    for layer in layers:
        layer.copy_(torch.randn(layer.shape))
    kernel = HostStaging(pages_array(layers[0]), page_layout(layers, whole), whole, whole.shard(0, 1))
    manager = _ManagerPages(kernel, 2)
    assert manager.pages_per_block == 1
    found, expected = (np.zeros((2, whole.slot_bytes), np.uint8) for _ in range(2))
    manager.gather(np.array([[3], [-1]], np.int32), np.array([1, 0]), found)
    kernel.gather(np.array([[6, 7]], np.int32), np.array([1]), expected)
    assert np.array_equal(found, expected)
    for page in (PAGES // 2, (1 << 31) - 1):
        with pytest.raises(LayoutError, match="outside the engine's"):
            manager.scatter(np.array([[page]], np.int32), np.array([0]), found)


def test_the_self_test_finds_a_wrong_stride() -> None:
    whole = block(4)
    layers = cache(KVCacheLayout.LBHNC, 4)
    swapped = page_layout(cache(KVCacheLayout.LBNHC, 4), whole)
    staging = HostStaging(pages_array(layers[0]), swapped, whole, whole.shard(0, 1))
    with pytest.raises(LayoutError, match="layer 0 lies in a block in an order"):
        round_trip(staging, layers, whole, whole.shard(0, 1))


def test_the_self_test_finds_swapped_layers() -> None:
    whole = block(4)
    layers = cache(KVCacheLayout.LBHNC, 4)
    layout = page_layout([layers[1], layers[0], layers[2]], whole)
    staging = HostStaging(pages_array(layers[0]), layout, whole, whole.shard(0, 1))
    with pytest.raises(LayoutError, match="layer 0"):
        round_trip(staging, layers, whole, whole.shard(0, 1))


def test_separate_allocations_are_refused() -> None:
    layers = [torch.zeros(PAGES, 4, TOKENS, 2 * HEAD_DIM, dtype=torch.bfloat16) for _ in range(LAYERS)]
    with pytest.raises(LayoutError, match="separate allocations"):
        page_layout(layers, block(4))


def test_a_cache_too_small_for_one_block_is_refused() -> None:
    whole = block(4, pages_per_block=PAGES + 1)
    layers = cache(KVCacheLayout.LBHNC, 4)
    staging = HostStaging(pages_array(layers[0]), page_layout(layers, whole), whole, whole.shard(0, 1))
    with pytest.raises(LayoutError, match="one block alone needs"):
        round_trip(staging, layers, whole, whole.shard(0, 1))
