"""A rank's page memory, as transports see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.connector.errors import LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes, HostStaging, PageIds, SlotIds
from kvferry.connector.transport import Heads, PageMemory, PageStaging, narrow, page_block
from kvferry.engines.vllm.geometry import page_layout, pages_array

if TYPE_CHECKING:
    import torch

__all__ = ["page_memory"]


def page_memory(layers: list[torch.Tensor], num_pages: int, block: BlockLayout, shard: Shard) -> PageMemory:
    """Describe the allocation behind the layers' caches.

    Args:
        layers: Each layer's cache ``[pages, heads, tokens, content]``, in model order.
        num_pages: Pages as the scheduler counts them.
        block: The canonical block.
        shard: This rank's part of it.

    Raises:
        LayoutError: The pages cannot be described, or the kernel splits them into smaller ones.
    """
    layout = page_layout(layers, block)
    if layout.num_pages != num_pages:
        raise LayoutError(
            f"the attention kernel splits vLLM's {num_pages} pages into {layout.num_pages} smaller ones; "
            "use a block size that it takes as it is"
        )
    first = layers[0]
    is_host = first.device.type == "cpu"
    storage = first.untyped_storage()

    def stage(heads: Heads) -> PageStaging:
        narrowed = narrow(layout, shard, heads)
        one_page = page_block(block, layout.page_tokens, heads)
        own = Shard(0, 0, heads.count, True)
        if is_host:
            return HostStaging(pages_array(first), narrowed, one_page, own)
        skipped = heads.first - shard.first_head
        some = [layer[:, skipped : skipped + heads.count] for layer in layers]
        return _DevicePages(some, narrowed, one_page, own)

    return PageMemory(
        address=storage.data_ptr(),
        nbytes=storage.nbytes(),
        device=first.device.type,
        device_id=first.device.index or 0,
        layout=layout,
        block=block,
        shard=shard,
        stage=stage,
    )


class _DevicePages:
    """Copies that are complete when they return, between GPU pages and the host."""

    def __init__(
        self, layers: list[torch.Tensor], layout: PageLayout, block: BlockLayout, shard: Shard
    ) -> None:
        from kvferry.engines.vllm.device import TorchPages

        self._pages = TorchPages(layers, layout, block, shard)

    def gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._pages.gather(page_ids, slots, arena)
        self._pages.finish()

    def scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._pages.scatter(page_ids, slots, arena)
        self._pages.finish()
