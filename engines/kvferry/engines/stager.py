"""The worker side: copies blocks between a rank's pages and the arena, beside the engine.

Who owns what
  * The engine's worker thread submits jobs and collects results; it waits only in ``fence``.
  * One thread, ``kvferry-stager-<rank>``, copies, strictly in the order of submission. That order is
    relied upon: a request's release comes after its saves, a load into reused pages after the save
    that still reads them.
  * What a load reads from a peer comes after its copies, and is not waited for: ``PeerReads`` has threads of its own,
    and answers there.
  * A job belongs to the arena that it was planned for and touches no other: slot numbers mean nothing elsewhere.
    When the scheduler names another arena, or another way to it, or none, the one before is let go behind the jobs
    that were submitted for it.
  * A copy is good only if the slot's generation was the expected one before and after it; otherwise
    the load is reported as failed and the engine recomputes, or the save is not committed.
  * A job is reported only when none of its copies is under way any more, however it ended: its pages and slots are
    then given to others.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from kvferry.connector.arena import Arena, ArenaHandle
from kvferry.connector.errors import HandoffFailed, KVFerryError
from kvferry.connector.layout import BlockLayout, Shard
from kvferry.connector.staging import Staging
from kvferry.engines.handoff.reading import PeerReads
from kvferry.engines.jobs import BlockCopy, LoadJob, SaveJob, StepJobs, WorkerReport, copy_batches

__all__ = ["Stager", "StagerResults"]

logger = logging.getLogger(__name__)

_FENCE_DEADLINE_S = 30.0
_CLOSE_DEADLINE_S = 10.0
_RETRY_S = 1.0
"""Between two attempts to map an arena of a cache server."""


class _Submitted(NamedTuple):
    job: LoadJob | SaveJob | str | None
    """A load, a save, the id of a request to release, or None: let go of the arena."""
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
    """Carries out a rank's jobs on a thread of its own.

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
        self._queue: queue.SimpleQueue[_Submitted | None] = queue.SimpleQueue()
        self._state = threading.Condition()
        self._open_saves: set[int] = set()
        self._cancelled: set[int] = set()
        self._results = StagerResults(set(), set(), set(), WorkerReport())
        self._thread = threading.Thread(target=self._run, name=f"kvferry-stager-{shard.rank}", daemon=True)
        self._thread.start()

    def fence(self, job_ids: Iterable[int]) -> None:
        """Wait until the given saves no longer read their pages.

        A save that does not end within the deadline is given up: it will be reported as failed.
        """
        waited_for = set(job_ids)
        if not waited_for:
            return
        with self._state:
            if not self._state.wait_for(lambda: not waited_for & self._open_saves, _FENCE_DEADLINE_S):
                late = waited_for & self._open_saves
                self._cancelled |= late
                logger.error("gave up %d saves whose pages are needed again", len(late))

    def submit_loads(self, jobs: StepJobs) -> None:
        """Queue the step's loads. Never blocks on copies."""
        self._switch(jobs)
        mark = self._mark() if jobs.loads else None
        for load in jobs.loads:
            self._queue.put(_Submitted(load, mark, self._arena))

    def submit_saves(self, jobs: StepJobs) -> None:
        """Queue the step's saves and releases. Never blocks on copies."""
        self._switch(jobs)
        mark = self._mark() if jobs.saves else None
        with self._state:
            self._open_saves.update(save.id for save in jobs.saves)
        for save in jobs.saves:
            self._queue.put(_Submitted(save, mark, self._arena))
        for request_id in jobs.releases:
            self._queue.put(_Submitted(request_id, None, None))

    def wait_saved(self, jobs: StepJobs, deadline_s: float) -> None:
        """Wait until the step's saves are through, at most ``deadline_s`` seconds."""
        waited_for = {save.id for save in jobs.saves}
        with self._state:
            self._state.wait_for(lambda: not waited_for & self._open_saves, deadline_s)

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
        """Stop the thread and unmap the arena. Idempotent."""
        self._queue.put(None)
        self._thread.join(_CLOSE_DEADLINE_S)
        if self._peers is not None:
            self._peers.close()
        if self._thread.is_alive():
            logger.error("%s did not stop within %g s", self._thread.name, _CLOSE_DEADLINE_S)
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
                self._queue.put(_Submitted(None, None, self._arena))
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

    def _run(self) -> None:
        while (submitted := self._queue.get()) is not None:
            job = submitted.job
            if job is None:
                if submitted.arena is not None:
                    self._let_go(submitted.arena)
                continue
            if isinstance(job, str):
                with self._state:
                    self._results.released.add(job)
                continue
            started = time.perf_counter()
            is_good = self._copy(job, submitted)
            seconds = time.perf_counter() - started
            if isinstance(job, LoadJob):
                self._read_peer(job, is_good, seconds)
            else:
                self._saved(job, is_good, seconds)

    def _copy(self, job: LoadJob | SaveJob, submitted: _Submitted) -> bool:
        arena = submitted.arena
        if isinstance(job, SaveJob) and not self._shard.is_writer:
            return True
        if self._problem:
            return False
        if not job.copies:
            return isinstance(job, LoadJob) and job.peer is not None
        if arena is None:
            return False
        try:
            self._staging.wait(submitted.mark)
            is_good = self._copy_batches(arena, job)
            return is_good and _are_current(arena, job.copies)
        except Exception as error:  # boundary: the thread must live to report the job
            logger.exception("rank %d could not copy", self._shard.rank)
            self.disable(f"rank {self._shard.rank} could not copy between pages and arena: {error!r}")
            return False

    def _copy_batches(self, arena: Arena, job: LoadJob | SaveJob) -> bool:
        """Copy a job's blocks; stop early, with False, when it cannot be good any more."""
        copy = self._staging.scatter if isinstance(job, LoadJob) else self._staging.gather
        try:
            for batch in copy_batches(job.copies, self._staging.pages_per_block):
                if self._is_given_up(job) or not _are_current(arena, batch.copies):
                    return False
                copy(batch.page_ids, batch.slots, arena.slots_array)
        finally:
            self._staging.finish()
        return True

    def _is_given_up(self, job: LoadJob | SaveJob) -> bool:
        with self._state:
            return bool(self._problem) or (isinstance(job, SaveJob) and job.id in self._cancelled)

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
            self._open_saves.discard(job.id)
            self._state.notify_all()


def _are_current(arena: Arena, copies: Sequence[BlockCopy]) -> bool:
    return all(arena.generation(copy.slot) == copy.generation for copy in copies)
