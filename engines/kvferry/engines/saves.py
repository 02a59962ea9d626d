"""Saves under way: what the ranks still read from, and when a save is through.

A save's slots are settled only when every rank has reported, well or badly: until then some rank may still be
writing into them.

Pure state, owned by the engine's scheduler thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from kvferry.connector.service import Reservation
from kvferry.engines.jobs import WorkerReport

__all__ = ["OpenSaves", "Save"]


class Save(msgspec.Struct):
    """A save that not all ranks have reported yet."""

    id: int
    request_id: str
    reservation: Reservation
    pages: frozenset[int]
    ranks: int = 0
    is_good: bool = True
    """Whether it may be committed."""


class OpenSaves:
    """All saves of one engine.

    Args:
        world_size: Ranks that report every save.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._saves: dict[int, Save] = {}
        self._by_page: dict[int, set[int]] = {}
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._saves)

    def begin(self, request_id: str, reservation: Reservation, pages: Iterable[int]) -> int:
        """Note a save and the pages it reads; return its id."""
        save = Save(self._next_id, request_id, reservation, frozenset(pages))
        self._next_id += 1
        self._saves[save.id] = save
        for page in save.pages:
            self._by_page.setdefault(page, set()).add(save.id)
        return save.id

    def reading(self, pages: Iterable[int]) -> set[int]:
        """Return the saves that still read any of these pages."""
        if not self._by_page:
            return set()
        return {save_id for page in pages for save_id in self._by_page.get(page, ())}

    def is_reading(self, request_id: str) -> bool:
        """Tell whether a save of a request is under way."""
        return any(save.request_id == request_id for save in self._saves.values())

    def report(self, report: WorkerReport) -> Sequence[Save]:
        """Take in what ranks finished; return the saves that all of them have finished now."""
        through = []
        for save_id, ranks in report.saved.items():
            save = self._saves.get(save_id)
            if save is None:
                continue
            save.ranks += ranks
            save.is_good = save.is_good and save_id not in report.failed_saves
            if save.ranks >= self._world_size:
                self._end(save)
                through.append(save)
        return through

    def spoil(self) -> None:
        """Commit none of those that are under way."""
        for save in self._saves.values():
            save.is_good = False

    def _end(self, save: Save) -> None:
        del self._saves[save.id]
        for page in save.pages:
            readers = self._by_page[page]
            readers.discard(save.id)
            if not readers:
                del self._by_page[page]
