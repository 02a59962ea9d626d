"""Pieces: what is copied between a rank's pages and a connection at a time.

Several small pages make one piece, and a page that is large is cut along its heads, which lie outermost. So a piece is
about as large as a core's cache, whatever the model: what was gathered is sent, and what was received is scattered,
while it is still there. Both sides cut as they like; the bytes on the connection are the same.

Pages in a GPU's memory are not cut: there, one large transfer beats several small ones.

Threading: a ``PieceBuffer`` belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.connector.staging import Bytes, PageIds, SlotIds
from kvferry.connector.transport import Heads, PageMemory, PageStaging

__all__ = ["Piece", "PieceBuffer"]

PIECE_BYTES = 1 << 20


class Piece(NamedTuple):
    """Some pages, or some heads of a page. Only until the next piece of its buffer."""

    rows: npt.NDArray[np.uint8]
    """The bytes: [page, byte], contiguous."""
    page_ids: Sequence[int]
    staging: PageStaging

    @property
    def data(self) -> memoryview:
        """The bytes, to be sent or received."""
        return self.rows.data

    def gather(self) -> None:
        """Fill the bytes from the engine's pages."""
        self.staging.gather(*self._batch())

    def scatter(self) -> None:
        """Copy the bytes over the engine's pages."""
        self.staging.scatter(*self._batch())

    def _batch(self) -> tuple[PageIds, SlotIds, Bytes]:
        return np.array(self.page_ids, np.int32).reshape(-1, 1), np.arange(len(self.rows)), self.rows


class PieceBuffer:
    """Memory for one piece, and the staging for all.

    Args:
        memory: The rank's pages.
        heads: The heads that are copied.
    """

    def __init__(self, memory: PageMemory, heads: Heads) -> None:
        per_head = memory.page_bytes(Heads(heads.first, 1))
        at_once = min(heads.count, max(1, PIECE_BYTES // per_head)) if memory.device == "cpu" else heads.count
        self._parts = [
            (memory.stage(Heads(first, count)), count * per_head)
            for first in range(heads.first, heads.end, at_once)
            for count in [min(at_once, heads.end - first)]
        ]
        self._num_pages = 1 if len(self._parts) > 1 else max(1, PIECE_BYTES // (heads.count * per_head))
        self._buffer = np.empty(self._num_pages * at_once * per_head, np.uint8)

    def pieces(self, page_ids: Sequence[int]) -> Iterator[Piece]:
        """Yield the pieces of pages in the order in which they travel; all share one memory."""
        for start in range(0, len(page_ids), self._num_pages):
            some = page_ids[start : start + self._num_pages]
            for staging, nbytes in self._parts:
                yield Piece(self._buffer[: len(some) * nbytes].reshape(len(some), nbytes), some, staging)
