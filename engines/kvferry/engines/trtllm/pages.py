"""One rank's pages: by address, as staging takes them, and as the engine's own tensors, which prove that right."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvferry.connector.config import CudaConfig
from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes, HostStaging, Staging
from kvferry.cuda.choice import Proof
from kvferry.cuda.staging import DevicePages
from kvferry.engines.gpu_staging import gpu_staging
from kvferry.engines.trtllm.geometry import cache_layout, pool_layout

if TYPE_CHECKING:
    import torch

__all__ = ["RankPages", "cache_pages", "pool_pages"]


class RankPages(NamedTuple):
    """A rank's pages. Whoever holds this holds the engine's memory."""

    address: int
    layout: PageLayout
    layers: list[torch.Tensor]
    """Each layer's bytes ``[pages, heads, tokens, K and V, bytes of a vector]``, in model order: views of the engine's
    tensors, made by torch and not by ``layout``."""

    @property
    def is_on_gpu(self) -> bool:
        """Whether copies must be ordered against the engine's streams."""
        return bool(self.layers[0].device.type != "cpu")

    def staging(self, block: BlockLayout, shard: Shard, config: CudaConfig, prove: Proof) -> Staging:
        """Return what moves blocks between these pages and slots, once ``prove`` has let it through.

        Raises:
            LayoutError: Pages and blocks do not fit together, or blocks survive no way.
            Exception: What ``prove`` raises that is not a staging's fault.
        """
        if not self.is_on_gpu:
            on_host = HostStaging(self._bytes(), self.layout, block, shard)
            prove(on_host)
            return on_host
        nbytes = self.layout.extent_bytes()
        pages = DevicePages(self.address, nbytes, self.layout, block, shard)
        return gpu_staging(self.layers, pages, config, prove)

    def _bytes(self) -> Bytes:
        memory = (ctypes.c_uint8 * self.layout.extent_bytes()).from_address(self.address)
        return np.frombuffer(memoryview(memory), np.uint8)


def pool_pages(pool: torch.Tensor, block: BlockLayout, shard: Shard, tokens: int) -> RankPages:
    """Return the pages in the first cache manager's pool; see ``geometry.pool_layout``.

    Raises:
        LayoutError: They are not what the checkpoint and the engine's arguments say.
    """
    import torch

    layout = pool_layout(pool, block, shard, tokens)
    content = pool.view(torch.uint8).unflatten(3, (shard.num_heads, tokens, layout.head_bytes))
    # [pages, layers, K and V, heads, tokens, vector] -> per layer [pages, heads, tokens, K and V, vector]
    layers = list(content.permute(1, 0, 3, 4, 2, 5).unbind(0))
    return RankPages(pool.data_ptr(), layout, layers)


def cache_pages(described: Any, block: BlockLayout, shard: Shard, tokens: int) -> RankPages:
    """Return the pages that the second cache manager describes; see ``geometry.cache_layout``.

    Raises:
        LayoutError: They are not what the checkpoint and the engine's arguments say.
    """
    found = cache_layout(described, block, shard, tokens)
    layout = found.layout
    regions = [region.as_tensor() for region in described.groups[0].regions]
    vector = shard.num_heads * tokens * layout.head_bytes
    layers = []
    for index, start in found.regions:
        parts = regions[index][:, start:]
        step = layout.kv_stride if layout.kv_factor > 1 else vector
        run = parts[:, : (layout.kv_factor - 1) * step + vector]
        # Two views of K and V at their distance, as one axis.
        halves = run.unfold(1, vector, step)
        content = halves.unflatten(2, (shard.num_heads, tokens, layout.head_bytes))
        layers.append(content.permute(0, 2, 3, 1, 4))
    return RankPages(found.address, layout, layers)
