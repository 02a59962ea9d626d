"""Which engines of TensorRT-LLM cannot be served, and why.

A block's bytes must follow from its key, and lie in pages as this adapter believes. Where one or the other is not
certain the engine runs without kvferry, and a sentence of these says so at start.

What the engine says of itself is read with defaults: its arguments differ by release. What it keeps to itself, a
checkpoint's ``config.json`` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvferry.connector.errors import LayoutError
from kvferry.engines.trtllm.geometry import (
    KV_QUANTISATION,
    block_layout,
    checkpoint_config,
    checkpoint_folder,
    quantised,
    text_config,
)

__all__ = ["cautions", "unservable"]

_RECURRENT = (
    "hybrid_override_pattern",
    "layers_block_type",
    "attn_layer_period",
    "full_attention_interval",
    "linear_attn_config",
    "linear_num_key_heads",
    "mamba_d_state",
    "mamba_num_heads",
    "ssm_cfg",
    "ssm_state_size",
    "state_size",
)
"""Keys by which checkpoints describe layers that keep a state instead of KV."""
_SPARSE = ("index_topk", "index_n_heads", "attention_chunk_size")
_FULL = "full_attention"


def unservable(llm_args: object) -> str:
    """Tell why this engine runs without kvferry; empty when it can be served.

    Args:
        llm_args: The engine's arguments.
    """
    reason = _first((*_of_engine(llm_args), *_of_cache(llm_args)))
    if reason:
        return reason
    try:
        reason = _first(_of_model(checkpoint_config(checkpoint_folder(llm_args))))
        if not reason:
            block_layout(llm_args, 0)
    except LayoutError as error:
        return str(error)
    return reason


def cautions(llm_args: object) -> list[str]:
    """Return what an operator should change although the engine can be served."""
    cache = getattr(llm_args, "kv_cache_config", None)
    if getattr(cache, "enable_partial_reuse", False):
        return [
            "kv_cache_config.enable_partial_reuse is on: behind a page that the engine reuses in part nothing can be "
            "loaded; switch it off"
        ]
    return []


def _first(reasons: Iterable[tuple[bool, str]]) -> str:
    return next((reason for is_true, reason in reasons if is_true), "")


def _of_engine(llm_args: object) -> Iterator[tuple[bool, str]]:
    backend = str(getattr(llm_args, "backend", None) or "pytorch")
    yield backend != "pytorch", f"backend {backend} is not supported; use pytorch"
    yield _count(llm_args, "max_beam_width") > 1, "beam search is not supported"
    yield _count(llm_args, "pipeline_parallel_size") > 1, "pipeline parallelism is not supported"
    yield _count(llm_args, "context_parallel_size") > 1, "context parallelism is not supported"
    yield bool(getattr(llm_args, "enable_attention_dp", False)), "attention data parallelism is not supported"
    yield (
        getattr(llm_args, "speculative_config", None) is not None,
        "speculative decoding is not supported: the engine gives pages of rejected tokens to others without a word",
    )
    yield (
        getattr(llm_args, "sparse_attention_config", None) is not None,
        "sparse attention is not supported: it keeps more than KV",
    )
    yield (
        bool(getattr(llm_args, "model_kwargs", None)),
        "model_kwargs is set: the checkpoint no longer says what the model is",
    )
    kernels = str(getattr(llm_args, "attn_backend", None) or "TRTLLM")
    yield (
        kernels.upper() != "TRTLLM",
        f"attn_backend {kernels} is not supported: how it lays out a page is not known; use TRTLLM",
    )


def _of_cache(llm_args: object) -> Iterator[tuple[bool, str]]:
    cache = getattr(llm_args, "kv_cache_config", None)
    yield (
        not getattr(cache, "enable_block_reuse", True),
        "kv_cache_config.enable_block_reuse is off, so the engine would not use what is loaded",
    )
    for name, where in (("host_cache_size", "host memory"), ("disk_cache_size", "disk")):
        yield (
            bool(getattr(cache, name, None)),
            f"kv_cache_config.{name} is set: pages that the engine moves to {where} have no fixed place; leave it out",
        )
    windows = getattr(cache, "max_attention_window", None) or ()
    longest = getattr(llm_args, "max_seq_len", None)
    yield (
        bool(windows) and (not isinstance(longest, int) or min(windows) < longest),
        "kv_cache_config.max_attention_window is set: sliding windows are not supported",
    )
    yield (
        bool(getattr(cache, "sink_token_length", None)),
        "kv_cache_config.sink_token_length is set: where a token's KV belongs would depend on what was dropped",
    )
    yield (
        "nvfp4" in f"{getattr(cache, 'dtype', '')} {quantised(llm_args, KV_QUANTISATION)}".lower(),
        "a KV cache of NVFP4 is not supported: its scales lie outside its pages",
    )


def _of_model(config: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    text = text_config(config)
    yield bool(config.get("is_encoder_decoder")), "encoder-decoder models are not supported"
    recurrent = [name for name in _RECURRENT if text.get(name) is not None]
    yield (
        bool(recurrent),
        f"hybrid and Mamba models are not supported (config.json has {', '.join(recurrent)})",
    )
    sparse = [name for name in _SPARSE if text.get(name) is not None]
    yield (
        bool(sparse),
        f"sparse and chunked attention are not supported (config.json has {', '.join(sparse)})",
    )
    kinds = sorted({str(kind) for kind in text.get("layer_types") or ()} - {_FULL})
    yield bool(kinds), f"layers with {', '.join(kinds)} are not supported"
    yield _slides(text), "sliding windows are not supported: pages behind the window go to other requests"


def _slides(text: Mapping[str, Any]) -> bool:
    """Tell whether a model has layers that see a window only, though it does not say which."""
    if text.get("layer_types"):
        return False
    window, longest = text.get("sliding_window"), text.get("max_position_embeddings")
    if not window or text.get("use_sliding_window") is False:
        return False
    return not isinstance(longest, int) or window < longest


def _count(llm_args: object, name: str) -> int:
    return int(getattr(llm_args, name, None) or 1)
