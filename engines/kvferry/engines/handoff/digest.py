"""Digests of pages: what tells a reader that the bytes it got are the bytes that were there.

One XXH3-64 for each page and head, over that head's canonical bytes ``[layer][token][k_or_v][head_dim]``, whatever the
strides: so two ranks of different tensor-parallel sizes compare the heads they share. It catches broken transfers, not
forgery: a peer that may hand over pages may hand over any.

Only for pages in host memory. Immutable once made; threads may digest at the same time, and most of the work is done
without the GIL.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from kvferry.connector.transport import Heads, PageMemory

__all__ = ["DIGEST_BYTES", "PageDigester", "part"]

DIGEST_BYTES = 8


class PageDigester:
    """Digests one rank's pages.

    Args:
        memory: The pages, in host memory.
    """

    def __init__(self, memory: PageMemory) -> None:
        assert memory.device == "cpu"
        layout = memory.layout
        self._num_heads = layout.num_heads
        buffer = np.frombuffer(
            memoryview((ctypes.c_uint8 * memory.nbytes).from_address(memory.address)), np.uint8
        )
        shape = (layout.num_pages, layout.num_heads, layout.page_tokens, layout.kv_factor, layout.head_bytes)
        strides = (layout.page_stride, layout.head_stride, layout.token_stride, layout.kv_stride, 1)
        self._layers = [
            np.ndarray(shape, np.uint8, buffer=buffer, offset=offset, strides=strides)
            for offset in layout.layer_offsets
        ]

    def digest(self, pages: Sequence[int] | npt.NDArray[np.int32]) -> bytes:
        """Return ``DIGEST_BYTES`` for each page and, within it, each head of the rank."""
        found = bytearray()
        for page in pages:
            for head in range(self._num_heads):
                hasher = xxhash.xxh3_64()
                for layer in self._layers:
                    hasher.update(np.ascontiguousarray(layer[page, head]).data)
                found += hasher.digest()
        return bytes(found)


def part(digests: bytes, owned: Heads, wanted: Heads) -> bytes:
    """Return the digests of ``wanted`` heads out of those of all ``owned`` ones, page by page."""
    by_page = np.frombuffer(digests, np.uint8).reshape(-1, owned.count * DIGEST_BYTES)
    first = (wanted.first - owned.first) * DIGEST_BYTES
    return by_page[:, first : first + wanted.count * DIGEST_BYTES].tobytes()
