"""The worker half: one rank's pages, and the copies that a step's plan asks of it.

TensorRT-LLM counts a load's tokens as computed before it has begun, and cannot be told that it failed. So a load is
tried again until ``load_deadline_s``, and then the rank raises: an engine that stops is better than one that answers
wrongly. Saves may fail, and are reported so.

``get_finished`` is answered by three rules. An id is answered once, after the engine has handed it out. What was
finished is reported to the leader first. And pages are let go of only when neither a save nor a load touches them.

Owned by the executor's thread of the rank; copies are the stager's, on its own thread. ``connector`` calls this, and
lets through what is raised while loads are open.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from kvferry.connector.arena import ArenaHandle
from kvferry.connector.config import Config
from kvferry.connector.errors import KVFerryError, LoadFailed
from kvferry.connector.layout import BlockLayout, Shard
from kvferry.cuda.choice import Proof, unproved
from kvferry.engines.jobs import LoadJob, StepJobs, WorkerReport
from kvferry.engines.roundtrip import RoundTrip
from kvferry.engines.stager import Stager
from kvferry.engines.trtllm.geometry import block_layout, page_tokens
from kvferry.engines.trtllm.pages import RankPages, cache_pages, pool_pages
from kvferry.engines.trtllm.plan import StepPlan
from kvferry.engines.trtllm.reports import Outbox, Reporter

if TYPE_CHECKING:
    import torch

__all__ = ["WorkerSide"]

logger = logging.getLogger(__name__)

_RETRY_S = 0.02
"""Between two attempts at a load."""
_POLL_S = 0.0002
"""Between two looks at loads that a forward pass waits for."""
_STUCK_S = 30.0
"""A load that is not over after so long will never be."""


@dataclass
class _OpenLoad:
    """A load that this rank has not finished."""

    job: LoadJob
    jobs: StepJobs
    """The plan that it came with: its slots mean something in that plan's arena alone."""
    is_sync: bool
    """Whether the engine waits for it within its step, and so never asks for it by id."""
    submitted: float
    """Monotonic seconds, of the first attempt."""
    retry_at: float | None = None
    """When to try again, if the last attempt has failed."""
    is_reported: bool = False
    """Whether the leader was told that it failed."""


class WorkerSide:
    """What the connector does in one of TensorRT-LLM's ranks.

    Args:
        llm_args: The engine's arguments.
        config: kvferry's effective configuration.
        rank: This rank.
        tp_size: How many there are.

    Raises:
        LayoutError: The model's KV cache is none that kvferry can serve.
    """

    def __init__(self, llm_args: object, config: Config, rank: int, tp_size: int) -> None:
        self._config = config
        self._page_tokens = page_tokens(llm_args)
        self._layout: BlockLayout = block_layout(llm_args, config.block_tokens)
        self._shard: Shard = self._layout.shard(rank, tp_size)
        self._stager: Stager | None = None
        self._is_on_gpu = False
        self._problem = "the KV cache was never registered"
        self._arena: ArenaHandle | None = None
        self._unstarted: list[StepPlan] = []
        self._unsaved: StepJobs | None = None
        """Jobs of the last plan, while its saves are not submitted."""
        self._loads: dict[str, _OpenLoad] = {}
        self._saves: dict[int, str] = {}
        """Saves under way, and of which request."""
        self._loaded: set[str] = set()
        """Loads that are over and that the engine asks for by id."""
        self._saved_asked: dict[int, None] = {}
        self._loaded_asked: dict[int, None] = {}
        self._outbox = Outbox(rank)
        self._mailbox = ""
        self._reporter: Reporter | None = None
        self._is_closed = False

    def register(self, pool: torch.Tensor) -> None:
        """Take this rank's pages, the first cache manager's, and prove that blocks survive the way through them."""
        self._register(lambda: pool_pages(pool, self._layout, self._shard, self._page_tokens))

    def register_layout(self, described: object) -> None:
        """Take this rank's pages, the second cache manager's, and prove that blocks survive the way through them."""
        self._register(lambda: cache_pages(described, self._layout, self._shard, self._page_tokens))

    def _register(self, find: Callable[[], RankPages]) -> None:
        try:
            pages = find()
            prove: Proof = unproved
            if self._config.self_test:
                prove = RoundTrip(pages.layers, self._layout, self._shard)
            staging = pages.staging(self._layout, self._shard, self._config.cuda, prove)
        except Exception as error:  # noqa: BLE001  # boundary: torch and a GPU may refuse anything
            self._problem = f"rank {self._shard.rank}: the start-up self-test failed: {_told(error)}"
            logger.error("kvferry is off on %s", self._problem)
            return
        self._problem = ""
        self._is_on_gpu = pages.is_on_gpu
        self._stager = Stager(staging, self._layout, self._shard)

    def fail(self, problem: str) -> None:
        """Give up what is not begun, and have the leader switch the cache off; loads under way go on."""
        self._outbox.add(WorkerReport(problem=problem))
        self._give_up_saves()

    def has_loads(self) -> bool:
        """Tell whether loads are bound or under way: tokens count as computed that are not there yet."""
        return bool(self._loads) or any(plan.jobs.loads for plan in self._unstarted)

    def bind(self, plan: StepPlan) -> None:
        """Take a step's plan. What the step before did not come to save is given up."""
        self._give_up_saves()
        self._outbox.add(WorkerReport(problem=self._problem))
        self._arena = plan.jobs.arena
        self._unstarted.append(plan)
        self._unsaved = plan.jobs
        self._loaded.update(plan.empty_loads)
        if plan.mailbox and plan.mailbox != self._mailbox:
            if self._reporter is not None:
                self._reporter.close()
            self._mailbox = plan.mailbox
            self._reporter = Reporter(plan.mailbox, self._shard.rank)

    def start_loads(self, stream: object) -> None:
        """Submit the loads of what was bound, and wait for those that the forward pass needs.

        Args:
            stream: torch's, that the engine's work is queued on; anything where pages are in host memory.

        Raises:
            LoadFailed: A load cannot be kept, and the engine must not go on.
        """
        plans, self._unstarted = self._unstarted, []
        for plan in plans:
            # Loads whose pages others have now come first and to their end: what fails is tried again later, and
            # would be on top of what the others wrote.
            self._await_loads(plan.awaited_loads)
            if self._stager is not None:
                self._stager.fence(plan.jobs.fences)
            with self._following(stream):
                self._submit_loads(plan, is_awaited=True)
                self._await_loads(plan.awaited_loads)
                self._submit_loads(plan, is_awaited=False)
        for plan in plans:
            self._await_loads(plan.sync_loads)

    def save(self, stream: object) -> None:
        """Submit the saves of the step whose forward pass is queued on ``stream``. Waits for them only if somebody is
        told of them next, and then reports them.

        If this raises, they are reported as failed.
        """
        jobs, self._unsaved = self._unsaved, None
        if jobs is None or not jobs.saves:
            return
        if self._stager is None:
            self._report_failed(jobs)
            return
        self._saves.update((save.id, save.request_id) for save in jobs.saves)
        try:
            with self._following(stream):
                self._stager.submit_saves(jobs)
        except Exception:
            for save in jobs.saves:
                del self._saves[save.id]
            self._report_failed(jobs)
            raise
        if jobs.is_awaited:
            self._stager.wait_saved(jobs, self._config.peer.commit_wait_s)
            # A load that failed meanwhile is raised by the next hook that may stop the engine.
            with contextlib.suppress(LoadFailed):
                self._collect()
            self._flush()

    def take_finished(
        self, saved_ids: Iterable[int], loading_ids: Iterable[int], is_settled: Callable[[int], bool]
    ) -> tuple[list[int], list[int]]:
        """Tell which requests' pages are no longer read by saves, and which loads are over. Does not block.

        Args:
            saved_ids: Finished requests that the engine holds the pages of from now on.
            loading_ids: Requests that it waits for the load of from now on.
            is_settled: Whether all saves of a finished request are settled; asked once this rank's are through.

        Returns:
            Of the ids that were ever handed out those that are through now, each once.

        Raises:
            LoadFailed: A load cannot be kept, and the engine must not go on.
        """
        self._saved_asked.update(dict.fromkeys(saved_ids))
        self._loaded_asked.update(dict.fromkeys(loading_ids))
        self._give_up_saves()
        try:
            self._collect()
        finally:
            is_told = self._flush()
        if not is_told:
            return [], []
        loaded = [asked for asked in self._loaded_asked if str(asked) in self._loaded]
        for answered in loaded:
            del self._loaded_asked[answered]
            self._loaded.discard(str(answered))
        touched = {*self._saves.values(), *self._loads}
        touched.update(load.request_id for plan in self._unstarted for load in plan.jobs.loads)
        saved = [asked for asked in self._saved_asked if str(asked) not in touched and is_settled(asked)]
        for answered in saved:
            del self._saved_asked[answered]
        return saved, loaded

    def close(self) -> None:
        """Stop copying, and report what is through. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._give_up_saves()
        if self._stager is not None:
            self._stager.close()
            results = self._stager.take_results()
            told = {request_id for request_id, load in self._loads.items() if load.is_reported}
            self._outbox.add(results.report, sorted(results.loaded - told), results.failed_loads - told)
        self._flush()
        if self._reporter is not None:
            self._reporter.close()

    def _submit_loads(self, plan: StepPlan, *, is_awaited: bool) -> None:
        """Submit those of a plan's loads that it waits for, or the others."""
        now = time.monotonic()
        loads = [load for load in plan.jobs.loads if (load.request_id in plan.awaited_loads) is is_awaited]
        for load in loads:
            self._loaded.discard(load.request_id)
            is_sync = load.request_id in plan.sync_loads
            self._loads[load.request_id] = _OpenLoad(load, plan.jobs, is_sync, now)
        if self._stager is not None:
            self._stager.submit_loads(_jobs(plan.jobs, [load for load in loads if load.copies]))
        for load in loads:
            self._check(self._loads[load.request_id], "it cannot be had any more")

    def _await_loads(self, request_ids: Sequence[str]) -> None:
        """Wait until none of these loads is under way."""
        deadline = time.monotonic() + _STUCK_S
        while late := [request_id for request_id in request_ids if request_id in self._loads]:
            self._collect()
            late = [request_id for request_id in late if request_id in self._loads]
            if late and time.monotonic() >= deadline:
                # Not reported: the lease must last as long as the copy may.
                raise LoadFailed(self._shard.rank, late[0], f"it was not over after {_STUCK_S:g} s")
            if late:
                time.sleep(_POLL_S)

    def _collect(self) -> None:
        """Take in what the stager finished, and try again what failed."""
        if self._stager is None:
            return
        results = self._stager.take_results()
        for job_id in results.report.saved:
            self._saves.pop(job_id, None)
        over = results.loaded - results.failed_loads
        for request_id in over:
            load = self._loads.pop(request_id, None)
            if load is not None and not load.is_sync:
                self._loaded.add(request_id)
        self._outbox.add(results.report, sorted(over))
        if results.report.problem:
            self._problem = results.report.problem
        now = time.monotonic()
        for request_id in results.failed_loads:
            load = self._loads.get(request_id)
            if load is not None:
                load.retry_at = now + _RETRY_S
        for load in [load for load in self._loads.values() if load.retry_at is not None]:
            self._check(load, "its blocks could not be copied")
            if now >= load.submitted + self._config.load_deadline_s:
                raise self._failed(
                    load, f"its blocks could not be copied for {self._config.load_deadline_s:g} s"
                )
            if load.retry_at is not None and now >= load.retry_at:
                load.retry_at = None
                self._stager.submit_loads(_jobs(load.jobs, [load.job]))

    def _check(self, load: _OpenLoad, why: str) -> None:
        """Raise LoadFailed if trying cannot help."""
        if not load.job.copies:
            raise self._failed(load, why)
        if self._problem:
            raise self._failed(load, self._problem)
        if load.retry_at is not None and load.jobs.arena != self._arena:
            raise self._failed(load, "its blocks were in an arena that is gone")

    def _failed(self, load: _OpenLoad, why: str) -> LoadFailed:
        """Return the error, and have the leader told."""
        request_id = load.job.request_id
        if not load.is_reported:
            load.is_reported = True
            self._outbox.add(WorkerReport(), [request_id], [request_id])
            self._flush()
        return LoadFailed(self._shard.rank, request_id, why)

    def _give_up_saves(self) -> None:
        """Report saves of a step that ended without coming to them as failed."""
        jobs, self._unsaved = self._unsaved, None
        if jobs is not None:
            self._report_failed(jobs)

    def _report_failed(self, jobs: StepJobs) -> None:
        saves = [save.id for save in jobs.saves]
        if saves:
            self._outbox.add(WorkerReport(saved=dict.fromkeys(saves, 1), failed_saves=set(saves)))

    def _flush(self) -> bool:
        """Report what there is; tell whether the leader has all of it, or there is no leader to be told."""
        return self._reporter is None or self._outbox.flush(self._reporter)

    def _following(self, stream: object) -> contextlib.AbstractContextManager[Any]:
        """Have marks be on a stream."""
        if not self._is_on_gpu:
            return contextlib.nullcontext()
        import torch

        return cast("contextlib.AbstractContextManager[Any]", torch.cuda.stream(cast(Any, stream)))


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, KVFerryError) else repr(error)


def _jobs(jobs: StepJobs, loads: Sequence[LoadJob]) -> StepJobs:
    """Return jobs of the same arena with these loads alone."""
    return StepJobs(arena=jobs.arena, layout=jobs.layout, loads=list(loads))
