"""GPU pages where ``kvferry.cuda`` cannot be used: torch's strided copies on a stream of their own.

Correct and simple: every page costs some calls of torch. The fallback without NVIDIA's packages, and on GPUs of
other makers.

Owned by the stager's thread but for ``mark``, which is called on the engine's.
"""

from __future__ import annotations

import numpy as np
import torch

from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import BatchBounds, Bytes, PageIds, SlotIds

__all__ = ["TorchPages"]


class TorchPages:
    """Copies one rank's shard of blocks between CUDA pages and host slots: see ``connector.staging.Staging``.

    Args:
        layers: Each layer's cache ``[pages, heads, tokens, *content]``, in model order; of a token K comes before V.
            however many axes it has.
        layout: Their strides.
        block: The canonical block.
        shard: This rank's part of it.

    Raises:
        LayoutError: The three do not fit together.
    """

    def __init__(
        self, layers: list[torch.Tensor], layout: PageLayout, block: BlockLayout, shard: Shard
    ) -> None:
        layout.check(block, shard)
        self._layers = [layer.view(torch.uint8) for layer in layers]
        self._page_tokens = layout.page_tokens
        self._block = block
        self._shard = shard
        self._bounds = BatchBounds.of(layout, block)
        self._stream = torch.cuda.Stream(device=layers[0].device)

    @property
    def pages_per_block(self) -> int:
        """Engine pages that make up one block."""
        return self._bounds.pages_per_block

    def mark(self) -> torch.cuda.Event:
        """Record an event behind the work queued on the engine's current stream."""
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: object) -> None:
        """Make this stream's copies come after ``mark``."""
        assert isinstance(mark, torch.cuda.Event)
        self._stream.wait_event(mark)

    def gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy blocks out of the engine's pages into slots."""
        self._bounds.check_gather(page_ids, slots, arena)
        with torch.cuda.stream(self._stream):
            for row, index in np.argwhere(page_ids >= 0).tolist():
                page = int(page_ids[row, index])
                packed = torch.stack([layer[page] for layer in self._layers], dim=1)
                self._in_slot(arena[slots[row]], index).copy_(packed)

    def scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        """Copy blocks out of slots into the engine's pages."""
        self._bounds.check_scatter(page_ids, slots, arena)
        with torch.cuda.stream(self._stream):
            for row, index in np.argwhere(page_ids >= 0).tolist():
                page = int(page_ids[row, index])
                packed = self._in_slot(arena[slots[row]], index).to(self._layers[0].device)
                for layer, content in zip(self._layers, packed.unbind(1), strict=True):
                    layer[page].copy_(content)

    def finish(self) -> None:
        """Wait until the copies are complete."""
        self._stream.synchronize()

    def detach(self, arena: Bytes) -> None:
        """Do nothing: no arena is held."""

    def close(self) -> None:
        """Do nothing: torch frees the stream."""

    def _in_slot(self, slot: Bytes, index: int) -> torch.Tensor:
        """View page ``index`` of the shard's bytes as ``[heads, layers, tokens of the page, *content]``."""
        block, shard = self._block, self._shard
        head_bytes = block.num_layers * block.run_bytes
        own = slot[shard.first_head * head_bytes :][: shard.num_heads * head_bytes]
        whole = torch.from_numpy(own).view(
            shard.num_heads, block.num_layers, block.block_tokens, *self._layers[0].shape[3:]
        )
        return whole[:, :, index * self._page_tokens : (index + 1) * self._page_tokens]
