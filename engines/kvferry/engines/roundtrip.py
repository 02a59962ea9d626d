"""The start-up round trip: known bytes through the engine's real page tensors and back.

If kvferry's idea of the page layout were wrong in any way, every hit would feed the model wrong
bytes without a word. So each worker proves it before the first request: pattern in through the
engine's own logical view, gather, compare with the canonical block built independently, poison, scatter,
compare with the pattern. Where the engine packs its pages and a block is not packed, the engine itself
writes the pattern, token by token, and must find its pages again as it wrote them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kvferry.connector.arena import Arena
from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, Shard
from kvferry.connector.staging import Bytes, Copies, PageIds, SlotIds, Staging

if TYPE_CHECKING:
    import torch

__all__ = ["TokenWriter", "round_trip"]

TokenWriter = Callable[[int, int, "torch.Tensor"], None]
"""``write(layer, first_page, content)`` has the engine itself write tokens, ``content`` being the bytes
``[pages, heads, tokens, content]`` of whole pages, K then V of each token."""


def round_trip(
    staging: Staging,
    layers: list[torch.Tensor],
    block: BlockLayout,
    shard: Shard,
    write_tokens: TokenWriter | None = None,
) -> None:
    """Prove that a block survives pages -> slot -> pages, and lies in the slot in canonical order.

    Uses the last pages of the cache and restores them. Call before the engine serves requests.

    Args:
        staging: What will move this rank's blocks.
        layers: Each layer's cache ``[pages, heads, tokens, *content]``, in model order: of a token K, then V,
            however many axes they have.
        block: The canonical block.
        shard: This rank's part of it.
        write_tokens: Writes as the engine does, where its pages hold tokens in another order than blocks.

    Raises:
        LayoutError: Naming the first layer whose bytes differ.
        ArenaError: There is no memory for two slots.
        DeviceError: A GPU refused.
    """
    import torch

    views = [layer.view(torch.uint8) for layer in layers]
    page_tokens = views[0].shape[2]
    count = block.block_tokens // page_tokens
    pages = list(range(views[0].shape[0] - count, views[0].shape[0]))
    if pages[0] < 0:
        raise LayoutError(f"the KV cache has {views[0].shape[0]} pages, one block alone needs {count}")
    saved = [view[pages[0] :].clone() for view in views]
    generator = torch.Generator().manual_seed(0x6B76)
    patterns = [torch.randint(0, 256, kept.shape, dtype=torch.uint8, generator=generator) for kept in saved]
    if write_tokens is not None:
        # A kernel may change a NaN: the highest bit of every exponent is 0.
        itemsize = layers[0].element_size()
        for pattern in patterns:
            pattern[..., itemsize - 1 :: itemsize] &= 0xBF
    page_ids, slots = np.array([pages], np.int32), np.array([1])
    arena = Arena.create(2, block.slot_bytes)
    arena.slots_array[:] = 0x5A
    try:
        written = _write_tokens(views, pages[0], patterns, write_tokens)
        _copy(staging, staging.gathers, page_ids, slots, arena)
        _compare_slots(arena.slots_array, patterns, block, shard)
        _write(views, pages[0], [torch.full_like(pattern, 0xA5) for pattern in patterns])
        _copy(staging, staging.scatters, page_ids, slots, arena)
        for index, (view, expected) in enumerate(zip(views, written, strict=True)):
            if not torch.equal(view[pages[0] :].cpu(), expected):
                raise LayoutError(f"layer {index} does not get its bytes back from a block")
    finally:
        _write(views, pages[0], saved)
        staging.detach(arena.slots_array)
        arena.close()


def _copy(staging: Staging, copies: Copies, page_ids: PageIds, slots: SlotIds, arena: Arena) -> None:
    copies.wait(staging.mark())
    try:
        copies.copy(page_ids, slots, arena.slots_array)
    finally:
        copies.finish()


def _write_tokens(
    views: list[torch.Tensor], first_page: int, patterns: list[torch.Tensor], write_tokens: TokenWriter | None
) -> list[torch.Tensor]:
    """Write tokens and return what the pages hold then."""
    if write_tokens is None:
        _write(views, first_page, patterns)
        return patterns
    for index, pattern in enumerate(patterns):
        write_tokens(index, first_page, pattern)
    return [view[first_page:].clone() for view in views]


def _write(views: list[torch.Tensor], first_page: int, contents: list[torch.Tensor]) -> None:
    for view, content in zip(views, contents, strict=True):
        view[first_page:].copy_(content)


def _compare_slots(arena: Bytes, patterns: list[torch.Tensor], block: BlockLayout, shard: Shard) -> None:
    """Raise LayoutError unless the second of two slots holds the patterns and nothing else was written."""
    other, slot = arena
    head_bytes = block.num_layers * block.run_bytes
    start = shard.first_head * head_bytes
    own = slot[start : start + shard.num_heads * head_bytes]
    found = own.reshape(shard.num_heads, block.num_layers, block.block_tokens, block.token_bytes)
    for index, pattern in enumerate(patterns):
        # [pages, heads, tokens, *content] -> [heads, tokens of the block, bytes]
        canonical = pattern.transpose(0, 1).reshape(shard.num_heads, block.block_tokens, -1).numpy()
        if not np.array_equal(found[:, index], canonical):
            raise LayoutError(f"layer {index} lies in a block in an order that kvferry does not expect")
    outside = np.concatenate((other, slot[:start], slot[start + own.size :]))
    if not (outside == 0x5A).all():
        raise LayoutError("a gather wrote outside its rank's shard")
