"""The order in which vLLM's CPU attention keeps K and V inside a (page, head): found by asking vLLM's own op.

The kernel packs each page for the instruction set it runs on. Names do not settle how: one name stands for two orders,
by how vLLM was compiled. So the op that writes pages is made to write a page of known numbers, and where they arrive is
the order. An order that is known here is undone when blocks are saved (``Packing``), so that they serve engines with
other pages. An unknown one stays as it is, under a name that holds its digest, and blocks of it serve its like only.

    order    K of a head and page, outermost first                V
    vec      i, t                                                 t, i
    amx      t//16, i//2, t%16, i%2                               i//16, t//2, i%16, t%2
    bfmmla   t//8, i//4, t%8//2, t%2, i%4                         i//2, t//4, i%2, t%4

with token t of the page and element i of the head; K comes first, V behind it. (page, head) is one dense run.

Source: ``csrc/cpu/cpu_attn_*.hpp`` (``reshape_and_cache``) and ``vllm/v1/attention/backends/cpu_attn.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import ElementOrder, Packing
from kvferry.engines.roundtrip import TokenWriter

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

__all__ = [
    "PLAIN",
    "PageOrder",
    "Positions",
    "known_packings",
    "page_order",
    "positions_of",
    "probe",
    "recognise",
    "token_writer",
]

Positions = npt.NDArray[np.int64]
"""``[2, page_tokens, head_dim]``: where each element of K and of V lies, counted in elements from its half's start."""

_WriteDigits = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
_BASE = 8
"""Digits 0 to 7 are written as the numbers 2**0 to 2**7, which every type of cache element holds exactly."""


class PageOrder(NamedTuple):
    """How elements lie within a (layer, page, head)."""

    encoding: str
    """Of blocks, for their keys: ``plain``, or which pages they serve."""
    order: str
    """Of the pages themselves (``PageLayout.order``)."""
    packing: Packing | None
    """How they become plain; None where they are, or where it is not known."""


PLAIN = PageOrder("plain", "", None)


def known_packings(page_tokens: int, head_dim: int) -> dict[str, Packing]:
    """Return, by name, the known orders that a page of this shape can have."""
    n, d = page_tokens, head_dim
    found = {"vec": Packing(ElementOrder((d, n), (1, 0)), ElementOrder((n, d), (0, 1)))}
    if n % 16 == 0 and d % 16 == 0:
        found["amx"] = Packing(
            ElementOrder((n // 16, d // 2, 16, 2), (0, 2, 1, 3)),
            ElementOrder((d // 16, n // 2, 16, 2), (1, 3, 0, 2)),
        )
    if n % 8 == 0 and d % 4 == 0:
        found["bfmmla"] = Packing(
            ElementOrder((n // 8, d // 4, 4, 2, 4), (0, 2, 3, 1, 4)),
            ElementOrder((d // 2, n // 4, 2, 4), (1, 3, 0, 2)),
        )
    return found


def positions_of(packing: Packing, page_tokens: int, head_dim: int) -> Positions:
    """Return where a packing puts each element."""
    halves = [
        np.arange(page_tokens * head_dim).reshape(order.shape).transpose(order.axes)
        for order in (packing.k, packing.v)
    ]
    return np.stack([half.reshape(page_tokens, head_dim) for half in halves])


def probe(write: _WriteDigits, page_tokens: int, head_dim: int) -> Positions:
    """Find the order of a page by having each element's number written into it, a digit at a time.

    Args:
        write: Writes a page whose K and V hold these digits ``[page_tokens, head_dim]``, and returns the digits of the
            (page, head) in memory, ``[2, page_tokens * head_dim]``; negative where there is none of them.
        page_tokens: Tokens of a page.
        head_dim: Elements of a token's K or V of one head.

    Raises:
        LayoutError: What was found is not each element of K in the first half and each of V in the second, once.
    """
    count = page_tokens * head_dim
    numbers = np.arange(count)
    found = np.zeros((2, count), np.int64)
    weight = 1
    while weight < count:
        digits = write((numbers // weight % _BASE).reshape(page_tokens, head_dim))
        if digits.shape != found.shape or digits.min() < 0:
            raise LayoutError("vLLM's CPU attention stores other numbers than it was given")
        found += digits * weight
        weight *= _BASE
    if not (np.sort(found, axis=1) == numbers).all():
        raise LayoutError("vLLM's CPU attention does not store each number once")
    positions = np.empty_like(found)
    np.put_along_axis(positions, found, np.broadcast_to(numbers, found.shape), axis=1)
    return positions.reshape(2, page_tokens, head_dim)


def recognise(positions: Positions, name: str, can_unpack: bool = True) -> PageOrder:
    """Return what is known of an order.

    Args:
        positions: Where each element lies.
        name: What the engine calls the order; only told, never trusted.
        can_unpack: False where the same order of tokens need not mean the same bytes, so that pages stay opaque.
    """
    _, page_tokens, head_dim = positions.shape
    shape = f"{page_tokens}x{head_dim}"
    digest = blake3(f"{shape} ".encode() + positions.astype("<i8").tobytes()).hexdigest()[:32]
    order = f"{shape}-{digest}"
    if can_unpack:
        for packing in known_packings(page_tokens, head_dim).values():
            if np.array_equal(positions, positions_of(packing, page_tokens, head_dim)):
                return PageOrder("plain", order, packing)
    return PageOrder(f"vllm-cpu-{name}-{page_tokens}-{digest}", order, None)


def page_order(vllm_config: VllmConfig, spec: AttentionSpec, page_tokens: int = 0) -> PageOrder:
    """Return how this engine's pages are packed. Asks vLLM's op, which takes some milliseconds.

    Args:
        vllm_config: vLLM's configuration.
        spec: Of its one group of layers.
        page_tokens: Tokens of the pages in memory, where the kernel splits vLLM's; 0 if it does not.

    Raises:
        LayoutError: vLLM's op cannot be asked, or what it does is no order.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return PLAIN
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError as error:
        raise LayoutError(f"this vLLM's CPU attention cannot be asked how it packs pages: {error}") from error
    tokens = page_tokens or spec.block_size
    model, cache = vllm_config.model_config, vllm_config.cache_config
    isa = _get_attn_isa(model.dtype, tokens, spec.head_size, cache.cache_dtype)
    if model.use_mla:
        # Another kernel writes these pages, and only their like read them.
        return PageOrder(f"vllm-cpu-{isa}-{tokens}", "", None)
    write = _op_writer(model.dtype, spec.dtype, cache.cache_dtype, tokens, spec.head_size, isa)
    # What is quantised was rounded in this engine's way and by its scales: such bytes are not everybody's.
    return recognise(probe(write, tokens, spec.head_size), isa, can_unpack=spec.dtype == model.dtype)


def _op_writer(
    dtype: torch.dtype, cache_dtype: torch.dtype, cache_name: str, page_tokens: int, head_dim: int, isa: str
) -> _WriteDigits:
    import torch
    from vllm import _custom_ops as ops

    quantising = () if cache_dtype == dtype else (1.0, 1.0, cache_name)

    def write(digits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        numbers = torch.exp2(torch.from_numpy(digits).to(torch.float32)).to(dtype)
        content = torch.zeros(1, 1, 2 * page_tokens, head_dim, dtype=cache_dtype)
        k, v = content.chunk(2, dim=2)
        tokens, slots = numbers.reshape(page_tokens, 1, head_dim), torch.arange(page_tokens)
        try:
            ops.cpu_attn_reshape_and_cache(tokens, tokens, k, v, slots, isa, *quantising)
        except Exception as error:  # boundary: vLLM's op may raise anything
            raise LayoutError(
                f"vLLM's CPU attention ({isa}) does not tell how it packs pages: {error}"
            ) from error
        return _digits_in(content, cache_name).reshape(2, -1)

    return write


def _digits_in(content: torch.Tensor, cache_name: str) -> npt.NDArray[np.int64]:
    """Return the digit that each element stands for; -1 where it is none's."""
    import torch

    dtype = content.dtype
    if dtype == torch.uint8:
        dtype = torch.float8_e5m2 if cache_name == "fp8_e5m2" else torch.float8_e4m3fn
    codes = torch.exp2(torch.arange(_BASE, dtype=torch.float32)).to(dtype).view(torch.uint8)
    wanted = codes.reshape(_BASE, -1).numpy()
    held = content.view(torch.uint8).reshape(content.numel(), -1).numpy()
    digits = np.full(len(held), -1, np.int64)
    for digit, code in enumerate(wanted):
        digits[(held == code).all(axis=1)] = digit
    return digits


def token_writer(vllm_config: VllmConfig, names: list[str], caches: list[torch.Tensor]) -> TokenWriter:
    """Return what writes tokens into the caches as the engine's forward pass does.

    Args:
        vllm_config: vLLM's configuration, after its layers were made ready.
        names: The layers.
        caches: Each one's ``[pages, heads, tokens, content]``.

    Raises:
        LayoutError: A layer's pages are not written by vLLM's CPU attention.
    """
    import torch
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    layers = [vllm_config.compilation_config.static_forward_context.get(name) for name in names]
    for name, layer in zip(names, layers, strict=True):
        impl = getattr(layer, "impl", None)
        is_ready = hasattr(layer, "isa") and hasattr(impl, "do_kv_cache_update")
        if not is_ready or not isinstance(impl, CPUAttentionBackendImpl):
            raise LayoutError(
                f"the pages of layer {name} are written by {type(impl).__name__}, in an order that is not this vLLM's"
            )

    def write(index: int, first_page: int, content: torch.Tensor) -> None:
        cache, layer = caches[index], layers[index]
        pages, _, page_tokens, _ = content.shape
        tokens = content.contiguous().view(cache.dtype).permute(0, 2, 1, 3).flatten(0, 1)
        key, value = (half.contiguous() for half in tokens.chunk(2, dim=-1))
        slots = torch.arange(first_page * page_tokens, (first_page + pages) * page_tokens)
        layer.impl.do_kv_cache_update(layer, key, value, cache, slots)

    return write
