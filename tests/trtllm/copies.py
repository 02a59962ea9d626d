"""Holds kvferry's copies back, or makes them fail, as a test wants it. Each rank copies on a thread of its own."""

from __future__ import annotations

import threading
from typing import Any, Literal

import pytest

from kvferry.connector.layout import BlockLayout, PageLayout, Shard
from kvferry.connector.staging import Bytes, HostStaging, PageIds, SlotIds
from kvferry.engines.jobs import LoadJob, SaveJob
from kvferry.engines.stager import Stager

__all__ = ["Copies", "Kind"]

Kind = Literal["load", "save"]
_DEADLINE_S = 30.0


class Copies:
    """Between kvferry and the pages of all ranks of the engines that a test starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed = threading.Condition()
        self._held: dict[tuple[Kind, int], float] = {}
        self._failing: dict[Kind, int] = {"load": 0, "save": 0}
        self._spoiled: dict[Kind, int] = {"load": 0, "save": 0}
        self.counts: dict[Kind, int] = {"load": 0, "save": 0}
        """Copies that were begun, of all ranks: each of one request's blocks or a part of them."""
        ranks: dict[int, int] = {}
        copy = Stager._copy
        make, scatter, gather = HostStaging.__init__, HostStaging.scatter, HostStaging.gather

        def made(self_: Any, pages: Bytes, layout: PageLayout, block: BlockLayout, shard: Shard) -> None:
            make(self_, pages, layout, block, shard)
            ranks[id(self_)] = shard.rank

        def loaded(self_: Any, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
            self._begin("load", ranks[id(self_)])
            scatter(self_, page_ids, slots, arena)

        def saved(self_: Any, page_ids: PageIds, slots: SlotIds, arena: Bytes) -> None:
            self._begin("save", ranks[id(self_)])
            gather(self_, page_ids, slots, arena)

        def copied(self_: Any, direction: Any, job: LoadJob | SaveJob, plan: Any) -> bool:
            is_good = copy(self_, direction, job, plan)
            return not self._spoils("load" if isinstance(job, LoadJob) else "save") and is_good

        monkeypatch.setattr(Stager, "_copy", copied)
        monkeypatch.setattr(HostStaging, "__init__", made)
        monkeypatch.setattr(HostStaging, "scatter", loaded)
        monkeypatch.setattr(HostStaging, "gather", saved)

    def hold(self, kind: Kind, *ranks: int, seconds: float = _DEADLINE_S) -> None:
        """Hold copies back that begin from now on, each so long at most; of rank 0 if none is given."""
        with self._changed:
            self._held.update({(kind, rank): seconds for rank in ranks or (0,)})

    def release(self, kind: Kind, *ranks: int) -> None:
        """Let copies happen; of all ranks if none is given."""
        with self._changed:
            for one in [one for one in self._held if one[0] == kind and (not ranks or one[1] in ranks)]:
                del self._held[one]
            self._changed.notify_all()

    def fail(self, kind: Kind, times: int) -> None:
        """Have the next copies raise, as a device does that is broken."""
        with self._changed:
            self._failing[kind] = times

    def spoil(self, kind: Kind, times: int) -> None:
        """Have the next copies be no good, as when slots were given to other blocks meanwhile."""
        with self._changed:
            self._spoiled[kind] = times

    def _spoils(self, kind: Kind) -> bool:
        with self._changed:
            self._spoiled[kind] -= 1
            return self._spoiled[kind] >= 0

    def _begin(self, kind: Kind, rank: int) -> None:
        with self._changed:
            self.counts[kind] += 1
            seconds = self._held.get((kind, rank), 0.0)
            is_free = self._changed.wait_for(lambda: (kind, rank) not in self._held, seconds)
            assert is_free or seconds < _DEADLINE_S, "a test forgot a copy that it held back"
            if self._failing[kind]:
                self._failing[kind] -= 1
                raise RuntimeError("this copy fails, as the test wants it")
