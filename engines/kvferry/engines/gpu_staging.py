"""How blocks go between a GPU's pages and slots: by ``kvferry.cuda`` where that works, else by torch's copies."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError
from kvferry.connector.staging import Staging
from kvferry.cuda.choice import make_staging
from kvferry.cuda.staging import DevicePages

if TYPE_CHECKING:
    import torch

__all__ = ["gpu_staging"]

logger = logging.getLogger(__name__)


def gpu_staging(layers: list[torch.Tensor], pages: DevicePages, config: CudaConfig) -> Staging:
    """Return the CUDA staging path; where it cannot be used, torch's copies, saying so.

    Marks are on the stream that is torch's current one when they are made.

    Args:
        layers: Each layer's cache ``[pages, heads, tokens, *content]``, in model order; of a token K comes before V.
        pages: The same pages by their addresses.
        config: Which path, and how much of the GPU it may take.

    Raises:
        LayoutError: Pages and blocks do not fit together.
    """
    import torch

    device = layers[0].device
    try:
        return make_staging(
            device.index or 0, pages, config, lambda: torch.cuda.current_stream(device).cuda_stream
        )
    except DeviceError as error:
        logger.warning(
            "rank %d: torch copies blocks page by page, so loads and saves take longer and hold Python's lock: %s",
            pages.shard.rank,
            error,
        )
    from kvferry.engines.torch_pages import TorchPages

    return TorchPages(layers, pages.layout, pages.block, pages.shard)
