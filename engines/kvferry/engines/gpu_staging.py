"""How blocks go between a GPU's pages and slots: by ``kvferry.cuda`` where that works, else by torch's copies.

Each is proved on the engine's own pages before it serves, torch's copies last. They use no addresses, so they may be
right where everything else is wrong; where they are not, kvferry misunderstands these pages and the cache stays off.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvferry.connector.config import CudaConfig
from kvferry.connector.errors import DeviceError, LayoutError
from kvferry.connector.staging import Staging
from kvferry.cuda.choice import Proof, make_staging
from kvferry.cuda.staging import DevicePages

if TYPE_CHECKING:
    import torch

__all__ = ["gpu_staging"]

logger = logging.getLogger(__name__)


def gpu_staging(layers: list[torch.Tensor], pages: DevicePages, config: CudaConfig, prove: Proof) -> Staging:
    """Return the CUDA staging path; where it cannot be used or is wrong, torch's copies, saying so.

    Marks are on the stream that is torch's current one when they are made.

    Args:
        layers: Each layer's cache ``[pages, heads, tokens, *content]``, in model order; of a token K comes before V.
        pages: The same pages by their addresses.
        config: Which path, and how much of the GPU it may take.
        prove: Called with one staging after the other, until it lets one through.

    Raises:
        LayoutError: Pages and blocks do not fit together, or blocks survive no way.
        Exception: What ``prove`` raises that is not a staging's fault.
    """
    import torch

    device = layers[0].device
    try:
        return make_staging(
            device.index or 0, pages, config, lambda: torch.cuda.current_stream(device).cuda_stream, prove
        )
    except DeviceError as error:
        reason = error
    from kvferry.engines.torch_pages import TorchPages

    staging = TorchPages(layers, pages.layout, pages.block, pages.shard)
    try:
        prove(staging)
    except LayoutError as error:
        raise LayoutError(f"{error}, even by torch's copies; before them, {reason}") from error
    logger.warning(
        "rank %d: torch copies blocks page by page, so loads and saves take longer and hold Python's lock: %s",
        pages.shard.rank,
        reason,
    )
    return staging
