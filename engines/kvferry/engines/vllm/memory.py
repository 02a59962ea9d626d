"""A rank's page memory, as transports see it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvferry.connector.errors import DeviceError, LayoutError
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes, HostStaging, PageIds, SlotIds
from kvferry.connector.transport import Heads, PageMemory, PageStaging, narrow, page_block
from kvferry.engines.vllm.geometry import page_layout, pages_array
from kvferry.engines.vllm.gpu_pages import GpuPages
from kvferry.engines.vllm.packing import PLAIN, PageOrder

if TYPE_CHECKING:
    import torch

__all__ = ["page_memory"]

logger = logging.getLogger(__name__)


def page_memory(
    layers: list[torch.Tensor],
    num_pages: int,
    block: BlockLayout,
    shard: Shard,
    gpu_pages: GpuPages | None,
    order: PageOrder = PLAIN,
) -> PageMemory:
    """Describe the allocation behind the layers' caches.

    Args:
        layers: Each layer's cache ``[pages, heads, tokens, content]``, in model order.
        num_pages: Pages as the scheduler counts them.
        block: The canonical block.
        shard: This rank's part of it.
        gpu_pages: Stages them by ``kvferry.cuda``; without it torch copies pages that are on a GPU.
        order: How elements lie inside a (layer, page, head). They are handed over as they lie, to pages of the same
            order.

    Raises:
        LayoutError: The pages cannot be described, or the kernel splits them into smaller ones.
    """
    layout = page_layout(layers, block, order._replace(packing=None))
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
        if gpu_pages is not None:
            try:
                return gpu_pages.stage(heads)
            except DeviceError as error:
                logger.warning("rank %d: torch copies pages that are handed over: %s", shard.rank, error)
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
    """Copies by torch that are complete when they return, where ``kvferry.cuda`` cannot be used."""

    def __init__(
        self, layers: list[torch.Tensor], layout: PageLayout, block: BlockLayout, shard: Shard
    ) -> None:
        from kvferry.engines.torch_pages import TorchPages

        self._pages = TorchPages(layers, layout, block, shard)

    def gather(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._pages.gather(page_ids, slots, arena)
        self._pages.finish()

    def scatter(self, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
        self._pages.scatter(page_ids, slots, arena)
        self._pages.finish()
