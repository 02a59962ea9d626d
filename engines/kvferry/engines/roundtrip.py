"""The start-up round trip: known bytes through the engine's real page tensors and back.

If kvferry's idea of the page layout were wrong in any way, every hit would feed the model wrong
bytes without a word. So each worker proves it before the first request: pattern in through the
engine's own logical view, gather, compare with the canonical block built independently, poison, scatter,
compare with the pattern. Where the engine packs its pages and a block is not packed, the engine itself
writes the pattern, token by token, and must find its pages again as it wrote them.

On a GPU blocks have several ways to go. Each that is tried is sent through here, until one is right.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kvferry.connector.arena import Arena
from kvferry.connector.errors import DeviceError, LayoutError
from kvferry.connector.layout import BlockLayout, Shard
from kvferry.connector.staging import Bytes, Copies, PageIds, SlotIds, Staging
from kvferry.cuda.driver import do_all, insist

if TYPE_CHECKING:
    import torch

__all__ = ["RoundTrip", "TokenWriter"]

TokenWriter = Callable[[int, int, "torch.Tensor"], None]
"""``write(layer, first_page, content)`` has the engine itself write tokens, ``content`` being the bytes
``[pages, heads, tokens, content]`` of whole pages, K then V of each token."""


class RoundTrip:
    """Proves that blocks survive pages -> slot -> pages, and lie in the slot in canonical order.

    Uses the last pages of the cache, and puts back what they held when this was made. For the time before the engine
    serves requests.

    Args:
        layers: Each layer's cache ``[pages, heads, tokens, *content]``, in model order: of a token K, then V,
            however many axes they have.
        block: The canonical block.
        shard: This rank's part of it.
        write_tokens: Writes as the engine does, where its pages hold tokens in another order than blocks.

    Raises:
        LayoutError: The cache has no room for a block.
    """

    def __init__(
        self,
        layers: list[torch.Tensor],
        block: BlockLayout,
        shard: Shard,
        write_tokens: TokenWriter | None = None,
    ) -> None:
        import torch

        self._views = [layer.view(torch.uint8) for layer in layers]
        self._block = block
        self._shard = shard
        self._write_tokens = write_tokens
        self.has_refused = False
        """Whether blocks came back different by some staging."""
        num_pages, _, page_tokens = self._views[0].shape[:3]
        count = block.block_tokens // page_tokens
        if count > num_pages:
            raise LayoutError(f"the KV cache has {num_pages} pages, one block alone needs {count}")
        self._first_page = num_pages - count
        self._page_ids = np.array([range(self._first_page, num_pages)], np.int32)
        self._held = [view[self._first_page :].clone() for view in self._views]
        generator = torch.Generator().manual_seed(0x6B76)
        self._patterns = [
            torch.randint(0, 256, held.shape, dtype=torch.uint8, generator=generator) for held in self._held
        ]
        if write_tokens is not None:
            # A kernel may change a NaN: the highest bit of every exponent is 0.
            itemsize = layers[0].element_size()
            for pattern in self._patterns:
                pattern[..., itemsize - 1 :: itemsize] &= 0xBF

    def __call__(self, staging: Staging) -> None:
        """Prove what will move this rank's blocks.

        Raises:
            LayoutError: Naming the first layer whose bytes differ.
            ArenaError: There is no memory for two slots.
            DeviceError: A GPU refused.
        """
        arena = Arena.create(2, self._block.slot_bytes)
        try:
            try:
                self._send(staging, arena.slots_array)
            except BaseException as error:
                self.has_refused = self.has_refused or isinstance(error, LayoutError)
                with contextlib.suppress(DeviceError):  # What was wrong before it says more.
                    self._put_back(staging, arena.slots_array)
                raise
            self._put_back(staging, arena.slots_array)
        finally:
            arena.close()

    def _send(self, staging: Staging, slots: Bytes) -> None:
        import torch

        batch = self._page_ids, np.array([1]), slots
        slots[:] = 0x5A
        written = self._write_patterns()
        _copy(staging.gathers, staging.mark(), *batch)
        _compare_slots(slots, self._patterns, self._block, self._shard)
        self._write([torch.full_like(pattern, 0xA5) for pattern in self._patterns])
        _copy(staging.scatters, staging.mark(), *batch)
        for index, (view, expected) in enumerate(zip(self._views, written, strict=True)):
            if not torch.equal(view[self._first_page :].cpu(), expected):
                raise LayoutError(f"layer {index} does not get its bytes back from a block")

    def _put_back(self, staging: Staging, slots: Bytes) -> None:
        """Leave pages and staging as they were. Copies that go on would spoil that, so a refused wait is repeated."""
        restore = functools.partial(self._write, self._held)
        waits = [functools.partial(insist, way.finish) for way in (staging.gathers, staging.scatters)]
        do_all([*waits, restore, functools.partial(staging.detach, slots)])

    def _write_patterns(self) -> list[torch.Tensor]:
        """Write tokens and return what the pages hold then."""
        if self._write_tokens is None:
            self._write(self._patterns)
            return self._patterns
        for index, pattern in enumerate(self._patterns):
            self._write_tokens(index, self._first_page, pattern)
        return [view[self._first_page :].clone() for view in self._views]

    def _write(self, contents: list[torch.Tensor]) -> None:
        for view, content in zip(self._views, contents, strict=True):
            view[self._first_page :].copy_(content)


def _copy(direction: Copies, mark: object, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
    direction.wait(mark)
    direction.copy(page_ids, slots, arena)
    direction.finish()


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
