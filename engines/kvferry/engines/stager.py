"""The worker side: copies blocks between a rank's pages and the arena, beside the engine.

Who owns what
  * The engine's worker thread submits jobs and collects results; it waits only in ``fence``.
  * One thread copies what is loaded, ``kvferry-loader-<rank>``, and one what is saved, ``kvferry-saver-<rank>``, each
    strictly in the order of submission and neither behind the other: a long save must not keep a request waiting, and
    the link carries both directions at once. A request's release comes behind its saves.
  * A load waits for earlier saves that still read its pages. Nothing else needs an order between the two: pages that
    are being loaded are saved only when the load was reported, and the scheduler leases no slot that is reserved.
  * What a load reads from a peer comes after its copies, and is not waited for: ``PeerReads`` has threads of its own,
    and answers there.
  * A job belongs to the arena that it was planned for and touches no other: slot numbers mean nothing elsewhere.
    When the scheduler names another arena, or another way to it, or none, the one before is let go when both threads
    are through with what was submitted for it.
  * A job is reported only when none of its copies is under way any more, however it ended: its pages and slots are
    then given to others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from kvferry.connector.arena import Arena, ArenaHandle
from kvferry.connector.errors import HandoffFailed, KVFerryError
from kvferry.connector.layout import BlockLayout, Shard
from kvferry.connector.staging import Copies, Staging
from kvferry.engines.copying import copy_blocks
from kvferry.engines.handoff.reading import PeerReads
from kvferry.engines.jobs import LoadJob, SaveJob, StepJobs, WorkerReport
from kvferry.engines.ordered import OrderedThread

__all__ = ["Stager", "StagerResults"]

logger = logging.getLogger(__name__)

_FENCE_DEADLINE_S = 30.0
_CLOSE_DEADLINE_S = 10.0
_RETRY_S = 1.0
"""Between two attempts to map an arena of a cache server."""


class _Plan(NamedTuple):
    """What the copies of a job depend on."""

    mark: object
    arena: Arena | None


class StagerResults(NamedTuple):
    """What was finished since the last collection."""

    released: set[str]
    loaded: set[str]
    """Requests whose load is over, including the failed ones."""
    failed_loads: set[str]
    report: WorkerReport


class Stager:
    """Carries out a rank's jobs on threads of its own.

    Args:
        staging: Copies between this rank's pages and slots. Closed with the stager.
        layout: The block geometry this rank derived; the scheduler's must be the same.
        shard: The rank's part of every block. A rank that only holds a replica loads but does not
            save.
        peers: Reads what loads want of other engines; without it such loads fail. Closed with the stager.
        page_encoding: What blocks are that this rank makes of its pages; the scheduler's must be the same.
    """

    def __init__(
        self,
        staging: Staging,
        layout: BlockLayout,
        shard: Shard,
        peers: PeerReads | None = None,
        page_encoding: str = "plain",
    ) -> None:
        self._staging = staging
        self._peers = peers
        self._layout = layout
        self._page_encoding = page_encoding
        self._shard = shard
        self._arena: Arena | None = None
        """Of the jobs that are submitted now; the engine's thread's."""
        self._handle: ArenaHandle | None = None
        self._retry_at = 0.0
        self._problem = ""
        self._state = threading.Condition()
        self._open_saves: dict[int, SaveJob] = {}
        self._cancelled: set[int] = set()
        self._results = StagerResults(set(), set(), set(), WorkerReport())
        self._loader = OrderedThread(f"kvferry-loader-{shard.rank}")
        self._saver = OrderedThread(f"kvferry-saver-{shard.rank}")

    def fence(self, job_ids: Iterable[int]) -> None:
        """Wait until the given saves no longer read their pages.

        A save that does not end within the deadline is given up: it will be reported as failed.
        """
        waited_for = set(job_ids)
        if not waited_for:
            return
        with self._state:
            if not self._state.wait_for(lambda: not waited_for & self._open_saves.keys(), _FENCE_DEADLINE_S):
                late = waited_for & self._open_saves.keys()
                self._cancelled |= late
                logger.error("gave up %d saves whose pages are needed again", len(late))

    def submit_loads(self, jobs: StepJobs) -> None:
        """Queue the step's loads. Never blocks on copies."""
        self._switch(jobs)
        if not jobs.loads:
            return
        plan = _Plan(self._mark(), self._arena)
        with self._state:
            earlier = tuple(self._open_saves.values())
        for load in jobs.loads:
            self._loader.submit(partial(self._load, load, plan, earlier))

    def submit_saves(self, jobs: StepJobs) -> None:
        """Queue the step's saves and releases. Never blocks on copies."""
        self._switch(jobs)
        plan = _Plan(self._mark() if jobs.saves else None, self._arena)
        with self._state:
            self._open_saves.update((save.id, save) for save in jobs.saves)
        for save in jobs.saves:
            self._saver.submit(partial(self._save, save, plan))
        for request_id in jobs.releases:
            self._saver.submit(partial(self._release, request_id))

    def wait_saved(self, jobs: StepJobs, deadline_s: float) -> None:
        """Wait until the step's saves are through, at most ``deadline_s`` seconds."""
        waited_for = {save.id for save in jobs.saves}
        with self._state:
            self._state.wait_for(lambda: not waited_for & self._open_saves.keys(), deadline_s)

    def take_results(self) -> StagerResults:
        """Return and forget what was finished since the last call."""
        with self._state:
            results = self._results
            self._results = StagerResults(set(), set(), set(), WorkerReport(problem=self._problem))
        return results

    def disable(self, problem: str) -> None:
        """Fail every job from now on and report why."""
        with self._state:
            self._problem = self._problem or problem
            self._results.report.problem = self._problem

    def close(self) -> None:
        """Stop the threads and unmap the arena. Idempotent."""
        threads = (self._loader, self._saver)
        for thread in threads:
            thread.close()
        end = time.monotonic() + _CLOSE_DEADLINE_S
        are_over = [thread.join(end) for thread in threads]
        if self._peers is not None:
            self._peers.close()
        if not all(are_over):
            return
        try:
            self._staging.close()
        except Exception:  # boundary: a GPU may refuse; the arena is unmapped all the same
            logger.exception("rank %d could not close its staging", self._shard.rank)
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _switch(self, jobs: StepJobs) -> None:
        """Make the arena of these jobs the present one; without one, or if it cannot be mapped, they fail."""
        if jobs.arena != self._handle:
            self._handle, self._retry_at = jobs.arena, 0.0
            if self._arena is not None:
                self._leave(self._arena)
                self._arena = None
        if self._handle is None or self._arena is not None or self._problem:
            return
        if jobs.layout != self._layout:
            self.disable(f"rank {self._shard.rank} derived {self._layout}, the scheduler {jobs.layout}")
            return
        if jobs.page_encoding != self._page_encoding:
            self.disable(
                f"rank {self._shard.rank} makes {self._page_encoding!r} blocks of its pages, "
                f"the scheduler's are {jobs.page_encoding!r}"
            )
            return
        if time.monotonic() >= self._retry_at:
            self._attach(self._handle)

    def _attach(self, handle: ArenaHandle) -> None:
        try:
            self._arena = Arena.attach(handle)
        except KVFerryError as error:
            if not handle.connection:
                self.disable(f"rank {self._shard.rank} cannot map the arena: {error}")
                return
            if not self._retry_at:
                logger.warning("rank %d cannot map the cache server's arena: %s", self._shard.rank, error)
            self._retry_at = time.monotonic() + _RETRY_S

    def _mark(self) -> object:
        try:
            return self._staging.mark()
        except Exception as error:  # noqa: BLE001  # boundary: the jobs must still be queued and reported
            self.disable(f"rank {self._shard.rank} cannot follow the engine's work: {error!r}")
            return None

    def _load(self, load: LoadJob, plan: _Plan, earlier: Sequence[SaveJob]) -> None:
        pages = {page for copy in load.copies for page in copy.pages}
        if load.peer is not None:
            pages.update(load.peer.pages)
        self.fence(
            save.id for save in earlier if any(not pages.isdisjoint(copy.pages) for copy in save.copies)
        )
        started = time.perf_counter()
        is_good = (
            self._copy(self._staging.scatters, load, plan)
            if load.copies
            else load.peer is not None and not self._problem
        )
        self._read_peer(load, is_good, time.perf_counter() - started)

    def _save(self, save: SaveJob, plan: _Plan) -> None:
        started = time.perf_counter()
        is_good = not self._shard.is_writer or (
            bool(save.copies) and self._copy(self._staging.gathers, save, plan)
        )
        self._saved(save, is_good, time.perf_counter() - started)

    def _release(self, request_id: str) -> None:
        with self._state:
            self._results.released.add(request_id)

    def _copy(self, direction: Copies, job: LoadJob | SaveJob, plan: _Plan) -> bool:
        """Copy a job's blocks; tell whether they are good."""
        if plan.arena is None or self._problem:
            return False
        try:
            return copy_blocks(
                direction,
                plan.mark,
                plan.arena,
                job.copies,
                self._staging.pages_per_block,
                partial(self._is_wanted, job),
            )
        except Exception as error:  # boundary: the thread must live to report the job
            logger.exception("rank %d could not copy", self._shard.rank)
            self.disable(f"rank {self._shard.rank} could not copy between pages and arena: {error!r}")
            return False

    def _is_wanted(self, job: LoadJob | SaveJob) -> bool:
        with self._state:
            return not self._problem and not (isinstance(job, SaveJob) and job.id in self._cancelled)

    def _leave(self, arena: Arena) -> None:
        """Let go of an arena when both threads are through with what was submitted for it."""
        threads = [self._loader, self._saver]

        def is_through(thread: OrderedThread) -> None:
            with self._state:
                threads.remove(thread)
                is_last = not threads
            if is_last:
                self._let_go(arena)

        for thread in tuple(threads):
            thread.submit(partial(is_through, thread))

    def _let_go(self, arena: Arena) -> None:
        try:
            self._staging.detach(arena.slots_array)
        except Exception as error:  # boundary: the thread must live to report the jobs to come
            logger.exception("rank %d could not let go of an arena", self._shard.rank)
            self.disable(f"rank {self._shard.rank} could not let go of an arena: {error!r}")
        arena.close()

    def _shard_bytes(self, job: LoadJob | SaveJob) -> int:
        share = self._layout.payload_bytes * self._shard.num_heads // self._layout.num_kv_heads
        return share * len(job.copies)

    def _read_peer(self, job: LoadJob, is_good: bool, seconds: float) -> None:
        """Go on with what a load wants of a peer, if it does, and if it can still succeed."""
        if job.peer is None or not is_good:
            self._loaded(job, is_good, seconds)
        elif self._peers is None:
            missing = HandoffFailed("transport", "this rank reads from no peer")
            self._peer_read(job, seconds, missing, 0, 0.0)
        else:
            self._peers.submit(job.peer, partial(self._peer_read, job, seconds))

    def _peer_read(
        self, job: LoadJob, copy_seconds: float, failure: HandoffFailed | None, moved: int, seconds: float
    ) -> None:
        """Any thread: a read is through."""
        with self._state:
            counts = self._results.report.peer
            if failure is None:
                counts.bytes += moved
                counts.seconds.append(seconds)
            else:
                counts.failed[job.request_id] = failure.reason
            self._loaded(job, failure is None, copy_seconds)

    def _loaded(self, job: LoadJob, is_good: bool, seconds: float) -> None:
        with self._state:
            self._results.loaded.add(job.request_id)
            if is_good:
                self._results.report.bytes_loaded += self._shard_bytes(job)
                self._results.report.load_seconds += seconds
            else:
                self._results.failed_loads.add(job.request_id)

    def _saved(self, job: SaveJob, is_good: bool, seconds: float) -> None:
        with self._state:
            report = self._results.report
            report.saved[job.id] = 1
            if is_good and job.id not in self._cancelled:
                report.bytes_saved += self._shard_bytes(job) if self._shard.is_writer else 0
                report.save_seconds += seconds
            else:
                report.failed_saves.add(job.id)
            self._cancelled.discard(job.id)
            self._open_saves.pop(job.id, None)
            self._state.notify_all()
