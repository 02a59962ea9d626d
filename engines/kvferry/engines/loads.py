"""Loads under way: which blocks are leased for them, and what is copied into which pages.

A lease is taken when pages were made for a load, or before, when an offer must be certain: it is *secured* then, and
the load that follows uses it. Only the ranks' report ends a load and its lease.

Pure state over a ``CacheService``, owned by the engine's scheduler thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvferry.connector.keys import BlockKey
from kvferry.connector.service import CacheService, Lease
from kvferry.engines.jobs import BlockCopy, PeerRead

__all__ = ["Load", "OpenLoads", "block_copies"]


class Load(NamedTuple):
    """A load that the workers have not reported yet; outlives its session on abort."""

    lease: Lease
    keys: Sequence[BlockKey]
    started: float
    peer: PeerRead | None


class _Secured(NamedTuple):
    keys: tuple[BlockKey, ...]
    lease: Lease


class OpenLoads:
    """All loads of one engine, and the leases of offers that were made certain.

    Args:
        service: Where blocks are kept.
    """

    def __init__(self, service: CacheService) -> None:
        self._service = service
        self._loads: dict[str, Load] = {}
        self._secured: dict[str, _Secured] = {}

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._loads

    def secure(self, request_id: str, keys: Sequence[BlockKey]) -> int:
        """Lease blocks for a load that may follow; return how many of them, from the first one on."""
        self.let_go(request_id)
        lease = self._service.lease(request_id, keys)
        if lease.places:
            self._secured[request_id] = _Secured(tuple(keys), lease)
        else:
            self._service.release(lease)
        return len(lease.places)

    def lease(self, request_id: str, keys: Sequence[BlockKey]) -> Lease:
        """Return a lease of blocks that are loaded now: the secured one if it was for these, or begins with them."""
        secured = self._secured.pop(request_id, None)
        if secured is not None:
            if keys and secured.keys[: len(keys)] == tuple(keys):
                return secured.lease
            self._service.release(secured.lease)
        return self._service.lease(request_id, keys)

    def let_go(self, request_id: str) -> None:
        """Release what was secured for a request and not used."""
        secured = self._secured.pop(request_id, None)
        if secured is not None:
            self._service.release(secured.lease)

    def let_all_go(self) -> None:
        """Release what was secured for any request."""
        for request_id in list(self._secured):
            self.let_go(request_id)

    def begin(self, request_id: str, load: Load) -> None:
        """Note a load that is handed to the workers."""
        self._loads[request_id] = load

    def end(self, request_id: str, ok: bool) -> Load | None:
        """Every rank has reported a load: end its lease. None for unknown ids."""
        load = self._loads.pop(request_id, None)
        if load is None:
            return None
        self._service.release(load.lease)
        self._service.release_owner(request_id)
        if not ok and load.peer is None:
            self._service.report_load_failed(load.keys)
        return load


def block_copies(
    lease: Lease, pages: Sequence[int], first_block: int, first_page: int, end_page: int, pages_per_block: int
) -> tuple[BlockCopy, ...]:
    """Return the copies that bring leased blocks into a request's pages.

    Args:
        lease: Of blocks ``first_block`` and following.
        pages: The request's page ids from its first token on.
        first_block: Which block of the request the lease begins with.
        first_page: The first page to be written; those before it are the engine's own.
        end_page: The first one behind that may not be written either.
        pages_per_block: Pages of a block.
    """
    copies = []
    for index, place in enumerate(lease.places, start=first_block):
        start = index * pages_per_block
        skipped = max(0, first_page - start)
        own = tuple(pages[start + skipped : min(start + pages_per_block, end_page)])
        if own:
            copies.append(BlockCopy(place.slot, place.generation, skipped, own))
    return tuple(copies)
