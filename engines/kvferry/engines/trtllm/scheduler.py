"""The leader's half: TensorRT-LLM's scheduler hooks translated into sessions.

TensorRT-LLM asks once, and counts what it is offered as computed when it makes pages. So an offer is leased before it
is made, and what is not in the arena by then is not offered: slower tiers are waited for only as long as
``trtllm.query_wait_s`` lasts, within the query, and go on for whoever asks next. Nothing is offered or saved before
every rank has reported that it can copy.

Pages change hands without a word: a request that failed may never be finished, and the pages of one that was cancelled
are reused while its load still writes them. So pages are compared, whenever they are given out, with those that copies
under way touch, and the ranks wait for these copies first.

Owned by the executor's thread. ``connector`` calls this and decides what becomes of what it raises.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvferry.connector.choosing import open_service
from kvferry.connector.coding import block_fingerprint
from kvferry.connector.config import Config
from kvferry.connector.errors import LayoutError
from kvferry.connector.explain import RequestRecord, open_log
from kvferry.connector.keys import BlockKey
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.service import CacheService
from kvferry.engines.notices import make_visible, serving, take_report
from kvferry.engines.session import EngineSessions
from kvferry.engines.trtllm.compat import RequestDelta, fact, honoured_tokens, request_deltas
from kvferry.engines.trtllm.geometry import (
    block_layout,
    checkpoint_config,
    checkpoint_folder,
    page_tokens,
    tp_size,
)
from kvferry.engines.trtllm.identity import adapters, model_identity
from kvferry.engines.trtllm.plan import StepPlan
from kvferry.engines.trtllm.reports import Mailbox, RankReport
from kvferry.engines.trtllm.requests import RequestTranslator, media_tokens

__all__ = ["SchedulerSide"]

_CLOSE_DEADLINE_S = 10.0
_SYNC_BYTES = 32 << 20
"""``trtllm.sync_bytes`` of an engine with one rank, unless configured."""
_POLL_S = 0.0005
"""Between two looks at what slower tiers have brought."""
_MOST_REQUESTS = 8192
"""Kept at once: a failed request may never be finished. Those that were not scheduled for longest go first."""


@dataclass
class _Request:
    """What is known of a live request since its pages were made."""

    tokens: list[int]
    prompt_tokens: int
    is_prefill_only: bool
    """Whether somebody else goes on with its prompt: it generates one token at most."""
    local_tokens: int = 0
    """What the engine found in its own pages."""
    offered_tokens: int = 0
    loaded_tokens: int = 0
    """What the engine took of the offer."""
    is_sync: bool = False
    pages: list[int] = field(default_factory=list)
    is_whole: bool = True
    """Whether ``pages`` are all it has; False once one of them was none."""


class SchedulerSide:
    """What the connector does in the leader, the executor of rank 0.

    Args:
        llm_args: The engine's arguments.
        config: kvferry's effective configuration.
        clock: Monotonic seconds.

    Raises:
        ConfigError: The configuration does not fit this engine.
        KVFerryError: There can be no cache: no memory for the arena, or a server that refuses this engine.
        OSError: The system gives no socket.
    """

    def __init__(self, llm_args: object, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        layout = block_layout(llm_args, config.block_tokens)
        identity = model_identity(llm_args, layout, config)
        self._model = identity.model
        self._engine = f"trtllm-{secrets.token_hex(4)}"
        self._page_tokens = page_tokens(llm_args)
        self._token_bytes = layout.payload_bytes // layout.block_tokens
        self._tp_size = tp_size(llm_args)
        given = config.trtllm.sync_bytes
        self._sync_bytes = given if given is not None else _SYNC_BYTES if self._tp_size == 1 else 0
        self._query_wait_s = self._wait_left_s = config.trtllm.query_wait_s
        self._commit_wait_s = config.peer.commit_wait_s
        self._steps_behind = 0 if getattr(llm_args, "disable_overlap_scheduler", False) else 1
        """How many steps the engine plans ahead of the one that it takes the result of."""
        self._translator = RequestTranslator(
            layout.block_tokens,
            config.tenant,
            adapters(config),
            media_tokens(checkpoint_config(checkpoint_folder(llm_args))),
        )
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._ready_ranks: set[int] = set()
        self._load_pages: dict[str, frozenset[int]] = {}
        """Of each load that is not over the pages that it writes."""
        self._load_ranks: dict[str, set[int]] = {}
        self._failed_loads: set[str] = set()
        self._empty_loads: dict[str, None] = {}
        self._awaited_loads: dict[str, None] = {}
        self._awaited_saves: dict[str, Sequence[BlockKey]] = {}
        """What must be visible to others before the step's answers leave this engine, by request."""
        self._step = 0
        self._steps_open = 0
        self._is_in_step = self._is_planned = self._is_closed = False
        self.mailbox = Mailbox()
        registry = PluginRegistry(config.plugins)
        fingerprint = block_fingerprint(identity.fingerprint(), config, registry)
        try:
            self._service: CacheService = open_service(
                config, layout, fingerprint, registry, engine=self._engine
            )
        except BaseException:
            self.mailbox.close()
            raise
        self._log = open_log(config.explain, self._engine, os.environ)
        self._sessions = EngineSessions(
            self._service, config, fingerprint, self._page_tokens, self._tp_size, self._on_record, clock
        )
        serving(self._model, self._service, fingerprint)

    @property
    def disabled(self) -> str:
        """Why nothing is offered or saved any more; empty while the cache is in use."""
        return self._sessions.disabled

    def disable(self, reason: str) -> None:
        """Offer and save nothing any more; what was promised is kept."""
        self._sessions.disable(reason)

    def query(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Offer tokens beyond ``num_computed_tokens``, and tell whether they are loaded beside the engine's steps.

        What is offered is leased. A request that was asked for before has lost its pages.
        """
        self._begin_step()
        request_id = str(request.request_id)
        self._forget_pages(request_id)
        tokens = request.get_tokens(0)
        info = self._translator.describe(request, tokens)
        self._sessions.open(info)
        most = fact(request, "max_new_tokens")
        state = self._requests[request_id] = _Request(
            tokens, info.prompt_tokens, isinstance(most, int) and most <= 1, num_computed_tokens
        )
        self._limit_requests()
        page = self._page_tokens
        # The engine must compute the last token of the prompt itself, and begins with a page of its own.
        most_tokens = (info.prompt_tokens - 1) // page * page - num_computed_tokens
        if num_computed_tokens % page or most_tokens <= 0 or not self._is_ready():
            return 0, False
        offered = min(most_tokens, self._offer(request_id, tokens, num_computed_tokens))
        if offered > 0:
            offered = self._sessions.secure(request_id, num_computed_tokens, offered)
        if offered <= 0:
            return 0, False
        state.is_sync = offered * self._token_bytes <= self._sync_bytes
        state.offered_tokens = offered
        return offered, not state.is_sync

    def has_offered(self, request: Any) -> bool:
        """Tell whether the engine counts on tokens that this request was offered."""
        state = self._requests.get(str(request.request_id))
        return state is not None and state.offered_tokens > 0

    def allocated(self, request: Any, page_ids: Sequence[int]) -> None:
        """The engine made pages for a request: plan the load of what it took from the offer.

        Raises:
            LayoutError: The pages do not hold what the engine counts as computed.
        """
        request_id = str(request.request_id)
        state = self._requests.get(request_id)
        pages = list(page_ids)
        first = 0 if state is None else state.local_tokens // self._page_tokens
        self._given_out(request_id, pages, pages[first:])
        if state is None:
            return
        self._take_pages(state, pages)
        if not state.offered_tokens:
            return
        taken = state.loaded_tokens = honoured_tokens(request, state.offered_tokens)
        if not taken:
            self._sessions.decline(request_id)
            if not state.is_sync:
                self._empty_loads[request_id] = None
            return
        end = -(-(state.local_tokens + taken) // self._page_tokens)
        if len(state.pages) < end:
            raise LayoutError(
                f"request {request_id} counts {state.local_tokens + taken} tokens as computed in {len(state.pages)} "
                f"pages of {self._page_tokens}"
            )
        self._empty_loads.pop(request_id, None)
        self._load_pages[request_id] = frozenset(state.pages[first:end])
        self._sessions.accept(request_id, state.pages, state.local_tokens, taken)

    def plan_step(self, output: object) -> StepPlan:
        """Plan the step's copies."""
        self._begin_step()
        self._is_in_step = False
        self.take_reports()
        prompt_tokens = sum(self._advance(delta) for delta in request_deltas(output))
        self._sessions.prefill.step_planned(prompt_tokens, self._clock())
        self._steps_open += 1
        self._is_planned = True
        return self.planned()

    def has_promised(self) -> bool:
        """Tell whether loads are planned or under way: the engine counts on them."""
        return bool(self._load_pages or self._empty_loads)

    def planned(self) -> StepPlan:
        """Hand over what is planned so far."""
        jobs = self._sessions.take_jobs()
        # The engine names the requests that it wants to hear of itself.
        jobs.releases = []
        jobs.is_awaited = bool(self._awaited_saves)
        self._step += 1
        loads = [load.request_id for load in jobs.loads]
        plan = StepPlan(
            jobs=jobs,
            mailbox=self.mailbox.name,
            sync_loads=tuple(load for load in loads if self._is_sync(load)),
            empty_loads=tuple(self._empty_loads),
            awaited_loads=tuple(self._awaited_loads),
            step=self._step,
        )
        self._empty_loads, self._awaited_loads = {}, {}
        return plan

    def finished(self, request: Any) -> bool:
        """The request is over. Tell whether its pages must stay until every rank has answered."""
        self.take_reports()
        request_id = str(request.request_id)
        self._requests.pop(request_id, None)
        is_held = self._sessions.finish(request_id)
        return is_held or self.is_touched(request_id)

    def is_touched(self, request_id: str) -> bool:
        """Tell whether copies from or into a request's pages are planned or under way."""
        return self._sessions.is_loading(request_id) or self._sessions.is_saving(request_id)

    def is_settled(self, request_id: int) -> bool:
        """Tell whether every save of a finished request is committed or given up, and no load of it under way."""
        self.take_reports()
        return not self.is_touched(str(request_id))

    def take_reports(self) -> None:
        """Take in what ranks have reported. Never blocks."""
        for report in self.mailbox.take():
            if report.rank < self._tp_size:
                self._take_report(report)

    def settle(self) -> None:
        """Let nobody be told of blocks that others do not find yet.

        Called when this rank's saves of the step are through. Waits for the other ranks', and until they are visible,
        at most ``peer.commit_wait_s``.
        """
        awaited, self._awaited_saves = self._awaited_saves, {}
        deadline = self._clock() + self._commit_wait_s
        while any(self._sessions.is_saving(request_id) for request_id in awaited):
            self.take_reports()
            if self._clock() >= deadline:
                break
            time.sleep(_POLL_S)
        if not awaited or self.disabled:
            return
        keys = [key for of_request in awaited.values() for key in of_request]
        left_s = max(_POLL_S, deadline - self._clock())
        make_visible(self._service, keys, left_s, self._commit_wait_s)

    def iteration_ended(self) -> None:
        """The engine's loop came round, with a step or without one."""
        self.take_reports()
        steps_open = self._steps_behind if self._is_planned else 0
        while self._steps_open > steps_open:
            self._steps_open -= 1
            self._sessions.prefill.step_ended(self._clock())
        if not self._is_planned:
            self._service.poll()
        self._is_planned = self._is_in_step = False

    def close(self) -> None:
        """Finish what is under way and release everything. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self.mailbox.close()
        self._service.close(_CLOSE_DEADLINE_S)
        self._log.close()

    def _begin_step(self) -> None:
        """Poll once a step, before the first offer or else before the copies are planned."""
        if not self._is_in_step:
            self._is_in_step = True
            self._wait_left_s = self._query_wait_s
            self.take_reports()
            self._service.poll()

    def _is_ready(self) -> bool:
        return len(self._ready_ranks) == self._tp_size

    def _is_sync(self, request_id: str) -> bool:
        state = self._requests.get(request_id)
        return state is not None and state.is_sync

    def _offer(self, request_id: str, tokens: Sequence[int], local_tokens: int) -> int:
        """Return how many tokens are in the arena, having waited for more while this step may still wait."""
        began = self._clock()
        while True:
            left = self._wait_left_s - (self._clock() - began)
            offered = self._sessions.offer(request_id, tokens, local_tokens, may_wait=left > 0)
            if offered is not None:
                break
            time.sleep(min(_POLL_S, left))
            self._service.poll()
        self._wait_left_s = max(0.0, left)
        return offered

    def _forget_pages(self, request_id: str) -> None:
        """Drop what is known of pages that a request had before the engine took them away."""
        state = self._requests.pop(request_id, None)
        if state is None or not self._sessions.decline(request_id):
            return
        self._load_pages.pop(request_id, None)
        if not state.is_sync:
            self._empty_loads[request_id] = None

    def _limit_requests(self) -> None:
        while len(self._requests) > _MOST_REQUESTS:
            request_id, _ = self._requests.popitem(last=False)
            self._sessions.finish(request_id)

    def _given_out(self, request_id: str, pages: Iterable[int], fresh: Iterable[int]) -> None:
        """Have the ranks wait for copies that others began and that these pages are part of.

        Args:
            request_id: Who has the pages now.
            pages: All of them: somebody may still be loading those that the engine takes for computed.
            fresh: Those that will be written.
        """
        self._sessions.pages_assigned(fresh)
        if not self._load_pages:
            return
        given = set(pages)
        for loading, written in self._load_pages.items():
            if loading != request_id and not given.isdisjoint(written):
                self._awaited_loads[loading] = None

    def _take_pages(self, state: _Request, pages: Sequence[int]) -> None:
        """Note a request's further pages, up to the first that is none: what lies behind it has no place."""
        if not state.is_whole:
            return
        end = next((index for index, page in enumerate(pages) if page < 0), len(pages))
        state.is_whole = end == len(pages)
        state.pages += pages[:end]

    def _advance(self, delta: RequestDelta) -> int:
        """Plan the saves of a request that the step computes tokens of; return how many of them are its prompt's."""
        request_id = str(delta.request_id)
        state = self._requests.get(request_id)
        if state is None:
            return 0
        self._requests.move_to_end(request_id)
        computed = delta.computed
        if delta.is_new:
            # Dialects differ in whether the position counts what is loaded before the step.
            computed = max(computed, state.local_tokens + state.loaded_tokens)
            state.tokens = list(delta.tokens or state.tokens)
            pages = delta.pages[len(state.pages) :] if state.is_whole else ()
        else:
            state.tokens += delta.tokens
            pages = delta.pages
        if pages:
            self._given_out(request_id, pages, pages)
            self._take_pages(state, pages)
        end = computed + delta.scheduled
        if self._is_ready() and (state.is_sync or not self._sessions.is_loading(request_id)):
            is_last = computed < state.prompt_tokens <= end
            is_awaited = is_last and state.is_prefill_only and self._service.is_shared
            self._sessions.computed(
                request_id, state.tokens, end, state.pages, self._commit_wait_s if is_awaited else 0.0
            )
            if is_awaited and (keys := self._sessions.saved_keys(request_id)):
                self._awaited_saves[request_id] = keys
        return max(0, min(end, state.prompt_tokens) - computed)

    def _take_report(self, report: RankReport) -> None:
        if not report.report.problem:
            self._ready_ranks.add(report.rank)
        take_report(self._sessions, report.report)
        self._failed_loads.update(report.failed)
        for request_id in report.loaded:
            if not self._sessions.is_loading(request_id):
                continue
            ranks = self._load_ranks.setdefault(request_id, set())
            ranks.add(report.rank)
            if len(ranks) == self._tp_size:
                self._load_ended(request_id)

    def _load_ended(self, request_id: str) -> None:
        del self._load_ranks[request_id]
        self._load_pages.pop(request_id, None)
        self._awaited_loads.pop(request_id, None)
        self._sessions.load_finished(request_id, ok=request_id not in self._failed_loads)
        self._failed_loads.discard(request_id)

    def _on_record(self, record: RequestRecord) -> None:
        self._log.record(msgspec.structs.replace(record, engine=self._engine, model=self._model))
