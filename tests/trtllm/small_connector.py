"""A connector of a screen or two that keeps to the contract: pages in a dict, for tests of the stand-in itself.

Leader and ranks are separate objects that meet in a ``Store``, as a real connector's processes meet in their storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from standin.executor import Engine
from standin.interface import Interface

__all__ = ["StartSmall", "Store", "Tracked", "small_connector"]

StartSmall = Callable[..., Engine]
"""What the fixture of that name gives."""


@dataclass
class Store:
    """Pages by key and rank, and how the connector behaves."""

    ranks: int
    page_tokens: int
    is_async: bool = False
    load_polls: tuple[int, ...] = (2, 2, 2, 2)
    """How many calls of ``get_finished`` a load takes, for each rank."""
    save_polls: tuple[int, ...] = (2, 2, 2, 2)
    pages: dict[tuple[object, int], list[bytes]] = field(default_factory=dict)

    def has(self, key: object) -> bool:
        return all((key, rank) in self.pages for rank in range(self.ranks))


@dataclass
class Tracked:
    """What the leader knows of a request."""

    scope: object
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    local: int = 0
    offered: int = 0
    saved: int = 0
    """Pages whose save is planned."""
    is_async: bool = False
    has_saves: bool = False


def small_connector(interface: Interface, store: Store) -> tuple[type[Any], type[Any]]:
    """Return the leader's and the ranks' class, of base classes of this release line."""

    class Leader(_Leader, interface.scheduler):  # type: ignore[name-defined, misc]
        pass

    class Rank(_Rank, interface.worker):  # type: ignore[name-defined, misc]
        pass

    Leader.store = Rank.store = store
    Rank.interface = interface
    return Leader, Rank


class _Leader:
    store: ClassVar[Store]

    def __init__(self, llm_args: object) -> None:
        super().__init__(llm_args)  # type: ignore[call-arg]
        self.requests: dict[int, Tracked] = {}
        self.loads: list[tuple[int, bool, list[tuple[int, object]]]] = []

    def keys(self, tracked: Tracked, first: int, last: int) -> Iterator[tuple[int, object]]:
        """Yield index and key of full pages."""
        for index in range(first, last):
            end = (index + 1) * self.store.page_tokens
            yield index, (tracked.scope, tuple(tracked.tokens[:end]))

    def scope(self, request: Any) -> object:
        salt = getattr(request, "cache_salt", None) or getattr(request, "cache_salt_id", None)
        images = request.multimodal_hashes, request.multimodal_positions, request.multimodal_lengths
        return salt, request.lora_task_id, repr(images)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        page_tokens = self.store.page_tokens
        tracked = Tracked(self.scope(request), request.get_tokens(0), local=num_computed_tokens)
        self.requests[request.request_id] = tracked
        if num_computed_tokens % page_tokens:
            tracked.saved = 0
            return 0, False
        first, last = num_computed_tokens // page_tokens, (request.prompt_len - 1) // page_tokens
        count = 0
        for _, key in self.keys(tracked, first, last):
            if not self.store.has(key):
                break
            count += 1
        tracked.offered, tracked.saved = count * page_tokens, first + count
        tracked.is_async = self.store.is_async and count > 0
        return tracked.offered, tracked.is_async

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        tracked = self.requests[request.request_id]
        honoured = getattr(request, "py_num_connector_matched_tokens", tracked.offered)
        tracked.offered = min(tracked.offered, honoured)
        page_tokens = self.store.page_tokens
        first, last = tracked.local // page_tokens, (tracked.local + tracked.offered) // page_tokens
        tracked.saved = last
        copies = [(block_ids[index], key) for index, key in self.keys(tracked, first, last)]
        if copies or tracked.is_async:
            self.loads.append((request.request_id, tracked.is_async, copies))

    def build_connector_meta(self, scheduler_output: Any) -> object:
        saves: list[tuple[int, list[tuple[int, object]]]] = []
        for is_new, datas in (
            (True, scheduler_output.new_requests),
            (False, scheduler_output.cached_requests),
        ):
            for data in datas:
                tracked = self.requests[data.request_id]
                if is_new:
                    tracked.tokens, tracked.pages = [], []
                tracked.tokens = tracked.tokens + data.new_tokens
                tracked.pages = tracked.pages + data.new_block_ids
                end = data.computed_position
                if is_new:
                    end = max(end, tracked.local + tracked.offered)
                end = min(end + getattr(data, "num_scheduled_tokens", 0), len(tracked.tokens))
                last = end // self.store.page_tokens
                copies = [
                    (tracked.pages[index], key) for index, key in self.keys(tracked, tracked.saved, last)
                ]
                if copies:
                    saves.append((data.request_id, copies))
                    tracked.saved, tracked.has_saves = last, True
        loads, self.loads = self.loads, []
        return {"loads": loads, "saves": saves}

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        tracked = self.requests[request.request_id]
        return tracked.has_saves or tracked.is_async


class _Rank:
    store: ClassVar[Store]
    interface: ClassVar[Interface]

    def __init__(self, llm_args: object) -> None:
        super().__init__(llm_args)  # type: ignore[call-arg]
        self.rank = self.interface.rank
        self.pool: Any = None
        self.layout: Any = None
        self.loading: list[list[Any]] = []
        """Polls left, id, copies."""
        self.saving: list[list[Any]] = []
        self.asked: tuple[set[int], set[int]] = set(), set()
        self.loaded: set[int] = set()

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        self.pool = kv_cache_tensor

    def register_kv_cache_layout(self, layout: Any) -> None:
        self.layout = layout

    def page(self, page: int) -> list[Any]:
        """Return a page's bytes as numpy arrays that write through."""
        import torch

        if self.layout is not None:
            return [region.slot_tensor(page).numpy() for region in self.layout.groups[0].regions]
        return [self.pool[page].view(torch.uint8).numpy()]

    def load(self, copies: list[tuple[int, object]]) -> None:
        for page, key in copies:
            for own, stored in zip(self.page(page), self.store.pages[key, self.rank], strict=True):
                own.reshape(-1)[:] = memoryview(stored)

    def save(self, copies: list[tuple[int, object]]) -> None:
        for page, key in copies:
            self.store.pages[key, self.rank] = [part.tobytes() for part in self.page(page)]

    def start_load_kv(self, stream: Any) -> None:
        for _, _, copies in self.saving:
            self.save(copies)  # the pass may write to pages that were taken from their request
        for save in self.saving:
            save[2] = []
        if self._metadata is None:  # type: ignore[attr-defined]
            return
        for request_id, is_async, copies in self._metadata["loads"]:  # type: ignore[attr-defined]
            if is_async:
                self.loading.append([self.store.load_polls[self.rank], request_id, copies])
            else:
                self.load(copies)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        pass

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        pass

    def wait_for_save(self, stream: Any) -> None:
        if self._metadata is not None:  # type: ignore[attr-defined]
            for request_id, copies in self._metadata["saves"]:  # type: ignore[attr-defined]
                self.saving.append([self.store.save_polls[self.rank], request_id, copies])

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        asked_saves, asked_loads = self.asked
        asked_saves.update(finished_gen_req_ids)
        asked_loads.update(started_loading_req_ids)
        for queue, copy in ((self.loading, self.load), (self.saving, self.save)):
            for one in list(queue):
                one[0] -= 1
                if one[0] < 0:
                    copy(one[2])
                    queue.remove(one)
                    if queue is self.loading:
                        self.loaded.add(one[1])
        loaded = sorted(asked_loads & self.loaded)
        busy = {one[1] for one in (*self.loading, *self.saving)}
        saved = sorted(asked_saves - busy)
        asked_saves -= set(saved)
        asked_loads -= set(loaded)
        self.loaded -= set(loaded)
        return saved, loaded
