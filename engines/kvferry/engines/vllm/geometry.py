"""vLLM's KV cache geometry in kvferry's terms: what can be served, block layout, page layout, self-test.

Since vLLM 0.29 a layer's cache is a view ``[pages, heads, tokens, content]`` into one allocation, with K
and V fused in ``content`` (``vllm/v1/kv_cache_layout.py``); its strides tell the physical order, so every
order is served by one description. The CPU backend packs what lies inside a (page, head) for its
instruction set; ``packing`` finds out how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, default_block_tokens
from kvferry.engines.vllm.packing import PLAIN, PageOrder, page_order

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig

__all__ = ["attention_spec", "block_layout", "page_layout", "pages_array", "unservable"]


def unservable(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """Tell why this engine runs without kvferry; empty when it can be served."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if len(kv_cache_config.kv_cache_groups) != 1:
        return f"the model has {len(kv_cache_config.kv_cache_groups)} KV cache groups (hybrid attention)"
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    speculative = vllm_config.speculative_config
    reasons = [
        (not isinstance(spec, FullAttentionSpec), f"{type(spec).__name__} caches are not supported"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not supported"),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism is not supported",
        ),
        (getattr(spec, "num_head_slots", None) is not None, "packed KV quantisation is not supported"),
        (
            getattr(spec, "tokens_per_state", 1) != 1,
            "caches that compress several tokens into one state are not supported",
        ),
        (
            getattr(cache, "calculate_kv_scales", False),
            "KV scales calculated at run time differ between runs (calculate_kv_scales)",
        ),
        (
            speculative is not None and speculative.method not in ("ngram", "ngram_gpu", "suffix"),
            "draft models keep KV that a block key does not determine",
        ),
    ]
    if reason := next((reason for is_true, reason in reasons if is_true), ""):
        return reason
    try:
        page_order(vllm_config, attention_spec(kv_cache_config))
    except LayoutError as error:
        return str(error)
    return ""


def attention_spec(kv_cache_config: KVCacheConfig) -> AttentionSpec:
    """Return the one group's spec."""
    return kv_cache_config.kv_cache_groups[0].kv_cache_spec  # type: ignore[return-value]


def block_layout(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, block_tokens: int) -> BlockLayout:
    """Return the canonical block of this model.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: vLLM's KV cache plan.
        block_tokens: Configured tokens per block; 0 picks the default.

    Raises:
        LayoutError: ``block_tokens`` is not a multiple of the engine's page size.
    """
    group = kv_cache_config.kv_cache_groups[0]
    spec = attention_spec(kv_cache_config)
    tokens = block_tokens or default_block_tokens(spec.block_size)
    if tokens % spec.block_size:
        raise LayoutError(
            f"block_tokens {tokens} is not a multiple of vLLM's block size {spec.block_size}; "
            f"use {default_block_tokens(spec.block_size)} or leave it out"
        )
    content_bytes = spec.unpadded_page_size_bytes // (spec.num_heads * spec.block_size)
    itemsize = _itemsize(spec)
    kv_factor = 2 if content_bytes == 2 * spec.head_size * itemsize else 1
    model = vllm_config.model_config
    total_heads = 1 if model.use_mla else model.get_total_num_kv_heads()
    return BlockLayout(
        num_layers=len(group.layer_names),
        num_kv_heads=total_heads,
        block_tokens=tokens,
        head_dim=content_bytes // (kv_factor * itemsize),
        kv_factor=kv_factor,
        itemsize=itemsize,
        dtype=str(spec.dtype).removeprefix("torch."),
    )


def pages_array(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return the whole allocation behind a CPU tensor as bytes, without copying."""
    import torch

    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    array: npt.NDArray[np.uint8] = storage.numpy()
    return array


def page_layout(layers: list[torch.Tensor], block: BlockLayout, order: PageOrder = PLAIN) -> PageLayout:
    """Describe one rank's pages by the strides of its layers' views, offsets from the allocation's start.

    Args:
        layers: Each layer's cache ``[pages, heads, tokens, content]``, in model order.
        block: The canonical block.
        order: How elements lie inside a (layer, page, head).

    Raises:
        LayoutError: The layers are not views of one allocation with equal strides and dense content.
    """
    first = layers[0]
    itemsize = first.element_size()
    for layer in layers:
        if layer.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            raise LayoutError("the layers' caches are separate allocations; kvferry needs vLLM 0.29 or newer")
        if layer.ndim != 4 or layer.stride() != first.stride() or layer.shape != first.shape:
            raise LayoutError(f"the layers' caches differ: {tuple(layer.shape)} and {tuple(first.shape)}")
    num_pages, num_heads, page_tokens, content = first.shape
    page_stride, head_stride, token_stride, item_stride = (step * itemsize for step in first.stride())
    if item_stride != itemsize or content * itemsize != block.token_bytes:
        raise LayoutError(
            f"a token's content of {content * itemsize} bytes with stride {item_stride} is not the block's "
            f"{block.token_bytes} contiguous bytes"
        )
    head_bytes = block.head_dim * block.itemsize
    return PageLayout(
        num_pages=num_pages,
        page_tokens=page_tokens,
        num_heads=num_heads,
        head_bytes=head_bytes,
        kv_factor=block.kv_factor,
        layer_offsets=tuple(layer.storage_offset() * itemsize for layer in layers),
        page_stride=page_stride,
        head_stride=head_stride,
        token_stride=token_stride,
        kv_stride=head_bytes,
        packing=order.packing,
        order=order.order,
    )


def _itemsize(spec: AttentionSpec) -> int:
    from vllm.utils.torch_utils import get_dtype_size

    return int(get_dtype_size(spec.dtype))
