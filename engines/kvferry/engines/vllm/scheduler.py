"""The scheduler half: vLLM's scheduler hooks translated into sessions.

Owned by vLLM's scheduler thread (EngineCore). ``connector`` calls it and catches what it raises.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from kvferry.connector.choosing import open_service
from kvferry.connector.coding import block_fingerprint
from kvferry.connector.explain import RequestRecord, open_log
from kvferry.connector.keys import BlockKey, pages_fingerprint
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import Settings
from kvferry.connector.transport import RemotePages
from kvferry.engines.handoff.handoffs import Handoffs
from kvferry.engines.handoff.roles import ROLES
from kvferry.engines.jobs import StepJobs, WorkerReport
from kvferry.engines.notices import make_visible, serving, take_report
from kvferry.engines.session import EngineSessions
from kvferry.engines.vllm.geometry import attention_spec, block_layout
from kvferry.engines.vllm.identity import model_identity
from kvferry.engines.vllm.packing import page_order
from kvferry.engines.vllm.pages import PageTables
from kvferry.engines.vllm.requests import RequestTranslator
from kvferry.engines.vllm.stats import SchedulerStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["SchedulerSide"]

logger = logging.getLogger(__name__)

_CLOSE_DEADLINE_S = 10.0
_MOST_STEPS_UNDER_WAY = 8
_WHOLE = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")
"""Statuses of requests whose prompt was computed to its end."""


class SchedulerSide:
    """What the connector does in vLLM's scheduler process.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: vLLM's KV cache plan, of one attention group.
        settings: kvferry's effective configuration.

    Raises:
        ConfigError: The configuration does not fit this engine.
        KVFerryError: There can be no cache: no memory for the arena, or a server that refuses this engine.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings) -> None:
        transfer = vllm_config.kv_transfer_config
        self._role = ROLES[transfer.kv_role]
        config = settings.config
        if not self._role.saves:
            config = msgspec.structs.replace(config, save="none")
        self._commit_wait_s = config.peer.commit_wait_s
        layout = block_layout(vllm_config, kv_cache_config, config.block_tokens)
        identity = model_identity(vllm_config, kv_cache_config, layout, config)
        self._model, self._page_encoding = identity.model, identity.page_encoding
        self._engine = transfer.engine_id
        self._page_tokens = attention_spec(kv_cache_config).block_size
        self._is_in_step = False
        self._requests: dict[str, Request] = {}
        self._local_tokens: dict[str, int] = {}
        self._tables = PageTables()
        self._awaited: deque[list[BlockKey]] = deque(maxlen=_MOST_STEPS_UNDER_WAY)
        """For each step under way, what must be visible to others before its output leaves this engine."""
        self._translator = RequestTranslator(layout.block_tokens, config.tenant)
        self._wants_events = bool(
            vllm_config.kv_events_config and vllm_config.kv_events_config.enable_kv_cache_events
        )
        parallel = vllm_config.parallel_config
        instance = f"dp{parallel.data_parallel_rank}" if parallel.data_parallel_size > 1 else ""
        registry = PluginRegistry(config.plugins)
        fingerprint = block_fingerprint(identity.fingerprint(), config, registry)
        self._service = open_service(
            config,
            layout,
            fingerprint,
            registry,
            instance=instance,
            engine=self._engine,
            wants_events=self._wants_events,
        )
        self._log = open_log(config.explain, self._engine, os.environ)
        self.stats = SchedulerStats(self._service)
        self._handoffs = (
            Handoffs(
                config,
                self._role,
                pages_fingerprint(
                    fingerprint, page_order(vllm_config, attention_spec(kv_cache_config)).order
                ),
                self._engine,
                kv_cache_config.num_blocks,
                parallel.data_parallel_rank,
            )
            if self._role.is_on(config.peer.enabled)
            else None
        )
        self._tp_size = parallel.tensor_parallel_size
        self._sessions = EngineSessions(
            self._service,
            config,
            fingerprint,
            self._page_tokens,
            self._tp_size,
            self._on_record,
            peers=self._handoffs,
        )
        serving(self._model, self._service, fingerprint)

    def ranks_exported(self, ranks: Sequence[RemotePages]) -> None:
        """The workers have made their pages readable for other engines."""
        if self._handoffs is None or not self._role.gives:
            return
        if len(ranks) < self._tp_size:
            logger.error("no pages are handed over: %d of %d ranks export theirs", len(ranks), self._tp_size)
            return
        self._handoffs.start(ranks)

    def new_request(self, request: Request) -> None:
        """A request has arrived."""
        self._requests[request.request_id] = request
        self._sessions.open(self._translator.describe(request))
        params = request.kv_transfer_params
        if params and self._handoffs is not None and not self._handoffs.arrived(request.request_id, params):
            self._sessions.peer_failed(request.request_id, "params")

    def offer(self, request: Request, local_tokens: int) -> int | None:
        """Tokens loadable beyond ``local_tokens``; None to be asked again."""
        if request.request_id not in self._requests:
            self.new_request(request)
        if request.skip_reading_prefix_cache:
            return 0
        self._local_tokens[request.request_id] = local_tokens
        self._begin_step()
        if self._handoffs is not None and self._handoffs.is_gone(request.request_id):
            self._sessions.peer_failed(request.request_id, "gone")
        return self._sessions.offer(request.request_id, request.all_token_ids, local_tokens)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """vLLM made pages for a waiting request; load what it took from the offer."""
        if external_tokens > 0:
            pages = blocks.get_block_ids()[0]
            local_tokens = self._local_tokens[request.request_id]
            self._sessions.accept(request.request_id, pages, local_tokens, external_tokens)

    def plan_step(self, output: SchedulerOutput) -> StepJobs:
        """Plan the step's copies. Called before vLLM advances ``num_computed_tokens``."""
        self._begin_step()
        self._is_in_step = False
        self._sessions.pages_assigned(self._tables.update(output))
        prompt_tokens = 0
        awaited: list[BlockKey] = []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is not None:
                left = request.num_tokens - request.num_computed_tokens
                prompt_tokens += min(scheduled, left) if left > 1 else 0
                is_awaited = self._is_awaited(request, scheduled)
                self._sessions.computed(
                    request_id,
                    request.all_token_ids,
                    request.num_computed_tokens + scheduled,
                    self._tables.get(request_id),
                    self._commit_wait_s if is_awaited else 0.0,
                )
                if is_awaited:
                    awaited += self._sessions.saved_keys(request_id)
        self._sessions.prefill.step_planned(prompt_tokens, time.monotonic())
        jobs = self.planned()
        jobs.is_awaited = bool(awaited)
        self._awaited.append(awaited)
        return jobs

    def _is_awaited(self, request: Request, scheduled: int) -> bool:
        """Tell whether others are told of a request's prompt, and go by what they find, when this step ends."""
        if not 0 <= request.num_prompt_tokens - 1 - request.num_computed_tokens < scheduled:
            return False
        is_producer = self._role.gives and not self._role.takes
        is_wanted = self._handoffs is not None and self._handoffs.is_wanted(request.request_id)
        return self._service.is_shared and (is_producer or is_wanted)

    def _begin_step(self) -> None:
        """Poll once a step, before the first offer or else before the copies are planned."""
        if not self._is_in_step:
            self._is_in_step = True
            self._service.poll()

    def planned(self) -> StepJobs:
        """Hand over what is planned so far."""
        if self._handoffs is not None:
            for request_id in self._handoffs.take_ended():
                self._sessions.release(request_id)
            table = self._handoffs.table
            self.stats.show_leases(len(table), table.held_pages)
            self.stats.show_expired(table.expired_count)
        jobs = self._sessions.take_jobs()
        jobs.page_encoding = self._page_encoding
        if self._handoffs is not None:
            jobs.exports = self._handoffs.take_exports()
        return jobs

    def workers_reported(
        self, loaded: Iterable[str], failed_loads: Iterable[str], report: WorkerReport | None
    ) -> None:
        """A step is through: all ranks have finished these loads, some ranks have finished these saves."""
        self._sessions.prefill.step_ended(time.monotonic())
        self.stats.show_prefill_rate(self._sessions.prefill.tokens_per_s)
        failed = set(failed_loads)
        for request_id in loaded:
            self._sessions.load_finished(request_id, ok=request_id not in failed)
        if report is not None:
            take_report(self._sessions, report)
            self.stats.count_copies(report)
            self.stats.count_peer(report.peer)
            if self._handoffs is not None:
                self._handoffs.report(report)
        self._settle()

    def _settle(self) -> None:
        """Let nobody be told of blocks that others do not find yet."""
        awaited = self._awaited.popleft() if self._awaited else []
        if awaited and not self._sessions.disabled:
            make_visible(self._service, awaited, self._commit_wait_s, self._commit_wait_s)

    def finished(self, request: Request, pages: Sequence[int]) -> tuple[bool, dict[str, object] | None]:
        """The request is over.

        Returns:
            Whether vLLM must hold its pages until it is told otherwise, and what the router is answered.
        """
        request_id = request.request_id
        answer = self._hand_over(request, pages)
        self._requests.pop(request_id, None)
        self._local_tokens.pop(request_id, None)
        self._tables.drop(request_id)
        if self._handoffs is not None:
            self._handoffs.finished(request_id)
        return self._sessions.finish(request_id, is_held=answer is not None), answer

    def _hand_over(self, request: Request, pages: Sequence[int]) -> dict[str, object] | None:
        request_id = request.request_id
        if self._handoffs is None or not self._handoffs.is_wanted(request_id):
            return None
        # What was sampled last has no KV; a request that was preempted meanwhile has no pages.
        computed = min(request.num_computed_tokens, request.num_tokens - 1)
        held = min(computed, len(pages) * self._page_tokens)
        if request.status.name not in _WHOLE or held < request.num_prompt_tokens:
            return None
        content = self._sessions.content(request_id, request.all_token_ids)
        answer = self._handoffs.hand_over(request_id, pages, held, content)
        self.stats.count_given(held=int(answer is not None), declined=int(answer is None))
        return answer

    def hit_tokens_by_tier(self, request: Request, tokens: int) -> dict[str, int]:
        """Split tokens of an offer that vLLM took over the tiers they came from."""
        return self._sessions.hit_tokens_by_tier(request.request_id, tokens)

    def has_pending(self) -> bool:
        """Tell whether the workers must be stepped although no request runs."""
        return self._sessions.has_pending()

    def disable(self, reason: str) -> None:
        """Offer and save nothing any more."""
        self._sessions.disable(reason)

    def take_events(self) -> list[KVCacheEvent]:
        """Return what became loadable or stopped being so, in vLLM's terms."""
        events = self._service.take_events()
        if not self._wants_events:
            return []
        from kvferry.engines.vllm.events import translate

        return [translate(event, self._service.layout.block_tokens) for event in events]

    def clear(self) -> None:
        """Forget every block: the weights have changed."""
        self._sessions.clear()

    def close(self) -> None:
        """Finish what is under way and release everything."""
        if self._handoffs is not None:
            self._handoffs.close()
        self._service.close(_CLOSE_DEADLINE_S)
        self._log.close()

    def _on_record(self, record: RequestRecord) -> None:
        named = msgspec.structs.replace(record, engine=self._engine, model=self._model)
        self.stats.count_request(named)
        self._log.record(named)
