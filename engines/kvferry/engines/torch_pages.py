"""GPU pages where ``kvferry.cuda`` cannot be used: torch's strided copies on a stream of their own.

Correct and simple: every page costs some calls of torch. The fallback without NVIDIA's packages, and on GPUs of
other makers.

Each direction has a stream, and belongs to a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import BatchBounds, Bytes, Copies, PageIds, SlotIds

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
        in_bytes = [layer.view(torch.uint8) for layer in layers]
        slots = _Slots(layout.page_tokens, block, shard, in_bytes[0].shape[3:])
        bounds = BatchBounds.of(layout, block)
        self.pages_per_block = bounds.pages_per_block
        self.gathers: Copies = _Gathers(in_bytes, slots, bounds.check_gather)
        self.scatters: Copies = _Scatters(in_bytes, slots, bounds.check_scatter)

    def mark(self) -> torch.cuda.Event:
        """Record an event behind the work queued on the engine's current stream."""
        event = torch.cuda.Event()
        event.record()
        return event

    def detach(self, arena: Bytes) -> None:
        """Do nothing: no arena is held."""

    def close(self) -> None:
        """Do nothing: torch frees the streams."""


class _Slots:
    """Where pages lie in slots, as torch sees it.

    Args:
        page_tokens: Tokens of a page.
        block: The canonical block.
        shard: A rank's part of it.
        content: Shape of a token's bytes in a page.
    """

    def __init__(self, page_tokens: int, block: BlockLayout, shard: Shard, content: Sequence[int]) -> None:
        self._page_tokens = page_tokens
        head_bytes = block.num_layers * block.run_bytes
        start = shard.first_head * head_bytes
        self._own = slice(start, start + shard.num_heads * head_bytes)
        self._shape = (shard.num_heads, block.num_layers, block.block_tokens, *content)

    def view(self, slot: Bytes, index: int) -> torch.Tensor:
        """View page ``index`` of the shard's bytes as ``[heads, layers, tokens of the page, *content]``."""
        whole = torch.from_numpy(slot[self._own]).view(self._shape)
        return whole[:, :, index * self._page_tokens : (index + 1) * self._page_tokens]


class _Direction:
    """What both directions have in common."""

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        slots: _Slots,
        check: Callable[[PageIds, SlotIds, Bytes], None],
    ) -> None:
        self._layers = layers
        self._slots = slots
        self._check = check
        self._stream = torch.cuda.Stream(device=layers[0].device)

    def wait(self, mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event)
        self._stream.wait_event(mark)

    def finish(self) -> None:
        self._stream.synchronize()

    def copy(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._check(page_ids, slots, arena)
        with torch.cuda.stream(self._stream):
            for row, index in np.argwhere(page_ids >= 0).tolist():
                in_slot = self._slots.view(arena[slots[row]], index)
                self._copy_page(int(page_ids[row, index]), in_slot)

    def _copy_page(self, page: int, in_slot: torch.Tensor) -> None:
        raise NotImplementedError


class _Gathers(_Direction):
    def _copy_page(self, page: int, in_slot: torch.Tensor) -> None:
        in_slot.copy_(torch.stack([layer[page] for layer in self._layers], dim=1))


class _Scatters(_Direction):
    def _copy_page(self, page: int, in_slot: torch.Tensor) -> None:
        on_device = in_slot.to(self._layers[0].device)
        for layer, content in zip(self._layers, on_device.unbind(1), strict=True):
            layer[page].copy_(content)
