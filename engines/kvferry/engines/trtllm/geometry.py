"""TensorRT-LLM's KV cache geometry in kvferry's terms: the canonical block, and how a rank's pages lie.

The block follows from the engine's arguments and the checkpoint alone, since the leader has no pages to look at. Each
rank holds its pages against it when they are registered. The first cache manager hands out one tensor ``[pages,
layers, K and V, content]``; the second describes regions of memory that repeat for every page. In both, K (and V) of
a page and layer is ``[heads, tokens, head_dim]``, as attention kernels of TensorRT-LLM want it; MLA has one head and
no V.

Whatever is not exactly so is refused: a wrong guess would feed the model wrong bytes without a word.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard, default_block_tokens

__all__ = [
    "KV_QUANTISATION",
    "CacheLayout",
    "block_layout",
    "cache_layout",
    "checkpoint_config",
    "checkpoint_folder",
    "compute_dtype",
    "page_tokens",
    "pool_layout",
    "quantised",
    "text_config",
    "tp_size",
]

_PAGE_TOKENS = 32
"""``tokens_per_block`` where the engine's arguments do not say."""
_DTYPES = {
    "bfloat16": ("bfloat16", 2),
    "float16": ("float16", 2),
    "half": ("float16", 2),
    "float32": ("float32", 4),
    "fp8": ("float8_e4m3fn", 1),
    "float8_e4m3fn": ("float8_e4m3fn", 1),
    "int8": ("int8", 1),
}
_WIDE = {"half": "float16", "bf16": "bfloat16", "float": "float32"}
_WIDE |= {name: name for name in ("float16", "bfloat16", "float32")}
"""Names, torch's and the engine's, of element types that are more than a byte."""
KV_QUANTISATION = "kv_cache_quant_algo"
"""How the KV cache is quantised, in the engine's arguments and in a quantised checkpoint."""
_MOST_CONFIG_BYTES = 16 << 20
_KEY, _VALUE = "key", "value"


def checkpoint_folder(llm_args: object) -> Path:
    """Return where the engine's checkpoint is; a name on the hub is looked up among what was downloaded.

    Raises:
        LayoutError: It is nowhere on this machine.
    """
    name = str(getattr(llm_args, "model", "") or "")
    folder = Path(name)
    if name and (folder / "config.json").is_file():
        return folder
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError:
        hub = None
    if name and hub is not None:
        revision = getattr(llm_args, "revision", None)
        # A path that is not there is no name either: the hub refuses it as a ValueError.
        with contextlib.suppress(ValueError):
            found = hub.try_to_load_from_cache(name, "config.json", revision=revision)
            if isinstance(found, str):
                return Path(found).parent
    raise LayoutError(
        f"no checkpoint with a config.json at {name!r}; give the engine a local folder as its model"
    )


def checkpoint_config(folder: Path, name: str = "config.json") -> Mapping[str, Any]:
    """Return what a JSON file of a checkpoint says; nothing where there is no such file.

    Raises:
        LayoutError: It is no JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_MOST_CONFIG_BYTES))
    except ValueError as error:
        raise LayoutError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise LayoutError(f"{path} is no JSON object")
    return cast("dict[str, Any]", config)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a checkpoint's configuration."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def page_tokens(llm_args: object) -> int:
    """Return the tokens of one of the engine's pages."""
    cache = getattr(llm_args, "kv_cache_config", None)
    return int(getattr(cache, "tokens_per_block", None) or _PAGE_TOKENS)


def tp_size(llm_args: object) -> int:
    """Return how many tensor-parallel ranks the engine has."""
    return int(getattr(llm_args, "tensor_parallel_size", None) or 1)


def quantised(llm_args: object, what: str) -> str | None:
    """Return how the engine was asked to quantise something; None if it was not.

    Args:
        llm_args: The engine's arguments.
        what: A field of their ``quant_config``.
    """
    method = getattr(getattr(llm_args, "quant_config", None), what, None)
    return None if method is None else str(getattr(method, "value", method))


def compute_dtype(llm_args: object, config: Mapping[str, Any]) -> str:
    """Return the element type of the model's activations (``bfloat16``): as configured, else the checkpoint's.

    Args:
        llm_args: The engine's arguments.
        config: What the checkpoint's ``config.json`` says.
    """
    text = text_config(config)
    given = getattr(llm_args, "dtype", None)
    names = (given, *(source.get(name) for source in (text, config) for name in ("dtype", "torch_dtype")))
    name = next((str(name) for name in names if name and name != "auto"), "bfloat16")
    name = name.lower().removeprefix("torch.")
    return _DTYPES[name][0] if name in _DTYPES else name


def block_layout(llm_args: object, block_tokens: int) -> BlockLayout:
    """Return the canonical block of this model.

    Args:
        llm_args: The engine's arguments.
        block_tokens: Configured tokens per block; 0 picks the default.

    Raises:
        LayoutError: ``block_tokens`` is not a multiple of the engine's page size, or the checkpoint does not say what
            its KV cache looks like.
    """
    page = page_tokens(llm_args)
    tokens = block_tokens or default_block_tokens(page)
    if tokens % page:
        raise LayoutError(
            f"block_tokens {tokens} is not a multiple of TensorRT-LLM's tokens_per_block {page}; "
            f"use {default_block_tokens(page)} or leave it out"
        )
    folder = checkpoint_folder(llm_args)
    config = checkpoint_config(folder)
    text = text_config(config)
    heads, head_dim, kv_factor = _heads(text)
    dtype, itemsize = _dtype(llm_args, folder, config)
    return BlockLayout(
        num_layers=_whole(text, "num_hidden_layers"),
        num_kv_heads=heads,
        block_tokens=tokens,
        head_dim=head_dim,
        kv_factor=kv_factor,
        itemsize=itemsize,
        dtype=dtype,
    )


def pool_layout(pool: Any, block: BlockLayout, shard: Shard, tokens: int) -> PageLayout:
    """Describe one rank's pages in the first cache manager's pool, offsets from the tensor's first byte.

    Args:
        pool: ``[pages, layers, kv_factor, heads * tokens * head_dim]``.
        block: The canonical block.
        shard: This rank's part of it.
        tokens: Of a page, as the engine's arguments say.

    Raises:
        LayoutError: The tensor is not that.
    """
    itemsize = pool.element_size()
    if len(pool.shape) != 4:
        raise LayoutError(
            f"the KV cache pool has {len(pool.shape)} dimensions, not [pages, layers, K and V, content]"
        )
    num_pages, *inside = pool.shape
    expected = [block.num_layers, block.kv_factor, shard.num_heads * tokens * block.head_dim]
    if inside != expected or itemsize != block.itemsize:
        raise LayoutError(
            f"the KV cache pool has {inside} elements of {itemsize} bytes in a page; by the checkpoint and the "
            f"engine's arguments it is {expected} of {block.itemsize}"
        )
    _check_dtype(getattr(pool, "dtype", None), block)
    page_step, layer_step, kv_step, item_step = (step * itemsize for step in pool.stride())
    if item_step != itemsize or min(page_step, layer_step, kv_step) <= 0:
        raise LayoutError(f"the KV cache pool's strides are {tuple(pool.stride())}: its content is not dense")
    offsets = tuple(layer * layer_step for layer in range(block.num_layers))
    return _page_layout(num_pages, tokens, block, shard, offsets, page_step, kv_step)


class CacheLayout(NamedTuple):
    """Pages that the second cache manager describes."""

    address: int
    """Of the lowest region; the layout's offsets count from it."""
    layout: PageLayout
    regions: tuple[tuple[int, int], ...]
    """For each layer, in model order: its region, and the byte of it at which the layer's K begins."""


def cache_layout(described: Any, block: BlockLayout, shard: Shard, tokens: int) -> CacheLayout:
    """Describe one rank's pages in the second cache manager's memory.

    Args:
        described: A ``KvCacheLayout``.
        block: The canonical block.
        shard: This rank's part of it.
        tokens: Of a page, as the engine's arguments say.

    Raises:
        LayoutError: There are several layer groups, windows, contents other than K and V, or regions in which pages are
            differently far apart.
    """
    if len(described.groups) != 1:
        raise LayoutError(f"the KV cache has {len(described.groups)} layer groups; only one is supported")
    if described.tokens_per_block != tokens:
        raise LayoutError(
            f"the KV cache's pages have {described.tokens_per_block} tokens, the engine's arguments say {tokens}"
        )
    _check_dtype(getattr(described, "dtype", None), block)
    (group,) = described.groups
    if group.window_size is not None:
        raise LayoutError(f"a sliding window of {group.window_size} tokens is not supported")
    regions = group.regions
    if len({(region.stride, region.num_slots) for region in regions}) != 1:
        raise LayoutError("the KV cache's regions differ in the number of pages or their distance")
    vector_bytes = shard.num_heads * tokens * block.head_dim * block.itemsize
    placed = _placed(regions, vector_bytes)
    layers = sorted(group.layer_ids)
    roles = (_KEY, _VALUE)[: block.kv_factor]
    if len(layers) != block.num_layers or sorted(placed) != [
        (layer, role) for layer in layers for role in roles
    ]:
        raise LayoutError(
            f"the KV cache has {sorted(placed)}; by the checkpoint it is {' and '.join(roles)} of "
            f"{block.num_layers} layers"
        )
    keys = [placed[layer, _KEY] for layer in layers]
    steps = {_kv_step(key, placed.get((layer, _VALUE), key)) for layer, key in zip(layers, keys, strict=True)}
    if len(steps) != 1:
        raise LayoutError(f"V is differently far behind K in the layers' pages: {sorted(steps)} bytes")
    address = min(region.base for region in regions)
    offsets = tuple(regions[index].base - address + start for index, start in keys)
    layout = _page_layout(regions[0].num_slots, tokens, block, shard, offsets, regions[0].stride, steps.pop())
    return CacheLayout(address, layout, tuple(keys))


def _check_dtype(dtype: object, block: BlockLayout) -> None:
    """Refuse pages of another element type than keys say: two of the same size would pass for each other."""
    name = _WIDE.get(str(dtype).rpartition(".")[2].lower(), block.dtype)
    if name != block.dtype:
        raise LayoutError(
            f"the KV cache has elements of {name}; by the checkpoint and the engine's arguments they are {block.dtype}"
        )


def _placed(regions: Any, vector_bytes: int) -> dict[tuple[int, str], tuple[int, int]]:
    """Return for each layer and role in which region it is, and from which byte of a page on."""
    placed: dict[tuple[int, str], tuple[int, int]] = {}
    for index, region in enumerate(regions):
        if region.size != len(region.buffers) * vector_bytes or region.size > region.stride:
            raise LayoutError(
                f"a region of {len(region.buffers)} buffers has {region.size} bytes of {region.stride} in a page; "
                f"by the checkpoint and the engine's arguments a buffer has {vector_bytes}"
            )
        for position, buffer in enumerate(region.buffers):
            role = str(getattr(buffer.role, "value", buffer.role)).lower()
            if buffer.expansion != 1 or (buffer.layer_id, role) in placed:
                raise LayoutError(f"layer {buffer.layer_id} has its {role} in several pieces")
            placed[buffer.layer_id, role] = index, position * vector_bytes
    return placed


def _kv_step(key: tuple[int, int], value: tuple[int, int]) -> int:
    if key[0] != value[0] or value[1] < key[1]:
        raise LayoutError("K and V of a layer are not one behind the other in one region")
    return value[1] - key[1]


def _page_layout(
    num_pages: int,
    tokens: int,
    block: BlockLayout,
    shard: Shard,
    layer_offsets: tuple[int, ...],
    page_stride: int,
    kv_stride: int,
) -> PageLayout:
    head_bytes = block.head_dim * block.itemsize
    layout = PageLayout(
        num_pages=num_pages,
        page_tokens=tokens,
        num_heads=shard.num_heads,
        head_bytes=head_bytes,
        kv_factor=block.kv_factor,
        layer_offsets=layer_offsets,
        page_stride=page_stride,
        head_stride=tokens * head_bytes,
        token_stride=head_bytes,
        kv_stride=kv_stride,
    )
    layout.check(block, shard)
    return layout


def _heads(text: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return KV heads of the whole model, elements of one, and whether there are K and V (2) or one for both (1)."""
    if text.get("kv_lora_rank"):
        return 1, _whole(text, "kv_lora_rank") + _whole(text, "qk_rope_head_dim"), 1
    heads = _whole(text, "num_attention_heads")
    if text.get("head_dim"):
        head_dim = _whole(text, "head_dim")
    else:
        head_dim = _whole(text, "hidden_size") // heads
    return (_whole(text, "num_key_value_heads") if text.get("num_key_value_heads") else heads), head_dim, 2


def _dtype(llm_args: object, folder: Path, config: Mapping[str, Any]) -> tuple[str, int]:
    """Return the KV cache's element type and size: as configured, else as quantised, else the model's."""
    wanted = str(getattr(getattr(llm_args, "kv_cache_config", None), "dtype", None) or "auto")
    method = quantised(llm_args, KV_QUANTISATION)
    if method is None:
        declared = checkpoint_config(folder, "hf_quant_config.json").get("quantization", {})
        method = str(declared.get(KV_QUANTISATION) or "")
    name = wanted if wanted != "auto" else method
    name = (name or compute_dtype(llm_args, config)).lower().removeprefix("torch.")
    if name not in _DTYPES:
        raise LayoutError(f"a KV cache of {name} is not supported; it may be {', '.join(sorted(_DTYPES))}")
    return _DTYPES[name]


def _whole(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value <= 0:
        raise LayoutError(
            f"the checkpoint's config.json has {name} {value!r}, which is no number of anything"
        )
    return value
