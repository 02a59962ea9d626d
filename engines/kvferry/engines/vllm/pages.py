"""Each request's page ids, followed through vLLM's scheduler outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

__all__ = ["PageTables"]


class PageTables:
    """Keeps the page table of every scheduled request. Owned by the scheduler thread."""

    def __init__(self) -> None:
        self._tables: dict[str, list[int]] = {}

    def update(self, output: SchedulerOutput) -> list[int]:
        """Follow one step.

        Returns:
            The pages that were assigned in it (with pages that were reused as they are among them).
        """
        assigned: list[int] = []
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            assigned += new.block_ids[0]
        cached = output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if block_ids is None:
                continue
            pages = block_ids[0]
            assigned += pages
            if request_id in cached.resumed_req_ids:
                self._tables[request_id] = list(pages)
            else:
                self._tables.setdefault(request_id, []).extend(pages)
        return assigned

    def get(self, request_id: str) -> list[int]:
        """Return a request's pages, first token first; empty when it was never scheduled."""
        return self._tables.get(request_id, [])

    def drop(self, request_id: str) -> None:
        """Forget a finished request."""
        self._tables.pop(request_id, None)
