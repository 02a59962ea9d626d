"""Digests of pages: what tells a reader that the bytes it got are the bytes that were there.

One XXH3-64 for each page and head, over that head's bytes ``[layer][token][k_or_v][head_dim]``, whatever the
strides: so two ranks of different tensor-parallel sizes compare the heads they share. Where the engine packs pages in
an order of its own (``PageLayout.order``) the bytes of a layer are taken as they lie, and so they are copied. It
catches broken transfers, not forgery: a peer that may hand over pages may hand over any.

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
        self._layout = layout = memory.layout
        everything = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
        self._bytes = memoryview(everything).cast("B")
        self._run_bytes = layout.page_tokens * layout.kv_factor * layout.head_bytes
        one_run = (layout.kv_factor * layout.head_bytes, layout.head_bytes)
        is_one_run = (layout.token_stride, layout.kv_stride) == one_run
        self._update = self._update_runs if is_one_run else self._update_strided

    def digest(self, pages: Sequence[int] | npt.NDArray[np.int32]) -> bytes:
        """Return ``DIGEST_BYTES`` for each page and, within it, each head of the rank."""
        layout = self._layout
        found = bytearray()
        for page in pages:
            for head in range(layout.num_heads):
                hasher = xxhash.xxh3_64()
                self._update(hasher, int(page) * layout.page_stride + head * layout.head_stride)
                found += hasher.digest()
        return bytes(found)

    def _update_runs(self, hasher: xxhash.xxh3_64, start: int) -> None:
        """Take in a head whose bytes of one layer lie together; ``start`` is where they do in the first layer at 0."""
        everything, update, end = self._bytes, hasher.update, start + self._run_bytes
        for offset in self._layout.layer_offsets:
            update(everything[offset + start : offset + end])

    def _update_strided(self, hasher: xxhash.xxh3_64, start: int) -> None:
        layout = self._layout
        shape = (layout.page_tokens, layout.kv_factor, layout.head_bytes)
        strides = (layout.token_stride, layout.kv_stride, 1)
        for offset in layout.layer_offsets:
            scattered = np.ndarray(shape, np.uint8, self._bytes, offset + start, strides)
            hasher.update(np.ascontiguousarray(scattered).data)


def part(digests: bytes, owned: Heads, wanted: Heads) -> bytes:
    """Return the digests of ``wanted`` heads out of those of all ``owned`` ones, page by page."""
    by_page = np.frombuffer(digests, np.uint8).reshape(-1, owned.count * DIGEST_BYTES)
    first = (wanted.first - owned.first) * DIGEST_BYTES
    return by_page[:, first : first + wanted.count * DIGEST_BYTES].tobytes()
