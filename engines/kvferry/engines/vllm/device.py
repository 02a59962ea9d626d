"""GPU pages without the CUDA staging path: torch's strided copies on a stream of their own.

Correct and simple, not fast: every page is one strided copy. ``kvferry.cuda`` will replace it.

Owned by the stager's thread but for ``mark``, which is called on the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.engines.stager import Bytes

__all__ = ["DevicePages"]


class DevicePages:
    """Copies one rank's shard of blocks between CUDA pages and host slots.

    Args:
        layers: Each layer's cache ``[pages, heads, tokens, content]``, in model order.
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
        self._stream = torch.cuda.Stream(device=layers[0].device)

    def mark(self) -> torch.cuda.Event:
        """Record an event behind the work queued on the engine's current stream."""
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: object) -> None:
        """Make this stream's copies come after ``mark``."""
        assert isinstance(mark, torch.cuda.Event)
        self._stream.wait_event(mark)

    def gather(self, page_ids: Sequence[int], slot: Bytes) -> None:
        """Copy a block's pages into the shard's bytes of a slot."""
        target = self._in_slot(slot)
        with torch.cuda.stream(self._stream):
            for index, page in enumerate(page_ids):
                tokens = slice(index * self._page_tokens, (index + 1) * self._page_tokens)
                packed = torch.stack([layer[page] for layer in self._layers], dim=1)
                target[:, :, tokens].copy_(packed)

    def scatter(self, slot: Bytes, page_ids: Sequence[int], first_page: int = 0) -> None:
        """Copy pages ``first_page`` and following of a block out of a slot."""
        source = self._in_slot(slot)
        with torch.cuda.stream(self._stream):
            for index, page in enumerate(page_ids, start=first_page):
                tokens = slice(index * self._page_tokens, (index + 1) * self._page_tokens)
                packed = source[:, :, tokens].to(self._layers[0].device)
                for layer, content in zip(self._layers, packed.unbind(1), strict=True):
                    layer[page].copy_(content)

    def finish(self) -> None:
        """Wait until the copies are complete."""
        self._stream.synchronize()

    def _in_slot(self, slot: Bytes) -> torch.Tensor:
        """View the shard's bytes as ``[heads, layers, tokens, content]``."""
        block, shard = self._block, self._shard
        head_bytes = block.num_layers * block.run_bytes
        own = slot[shard.first_head * head_bytes :][: shard.num_heads * head_bytes]
        return torch.from_numpy(own).view(
            shard.num_heads, block.num_layers, block.block_tokens, block.token_bytes
        )
