"""The mover: carries transfers out against tiers and hands back what became of them.

Each tier has its own ``Lane`` (bounded queue, threads), its own deadline and its own circuit breaker, so
a dead tier slows nobody else. Nothing here blocks the caller: a full queue sheds stores at once, an open
breaker fails everything at once. Every transfer is reported as finished exactly once; one that passes
its deadline while a tier's thread is at work is reported once before that as not finished, since a
thread cannot be interrupted and the slots belong to it until it returns.

Threading: one thread, the service's, calls every method; lanes report through one queue.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from kvferry.connector import latency
from kvferry.connector.breaker import CircuitBreaker
from kvferry.connector.coder import PLAIN, FrameCoder, TierCodecs
from kvferry.connector.config import TierConfig
from kvferry.connector.errors import ConfigError
from kvferry.connector.frame import FrameSeal
from kvferry.connector.lane import Job, JobReport, Lane
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.tier import Outcome, Tier

__all__ = ["Mover", "TierCounters"]

_PAUSED = "paused after repeated failures"
_QUEUE_FULL = "its queue is full"
_CLOSING = "kvferry is closing"
_AWAITED = frozenset({Direction.LOAD, Direction.ASK})
"""What a request waits for."""


class TierCounters(msgspec.Struct, kw_only=True):
    """Totals of one tier since the start. Owned by the service's thread."""

    loaded_blocks: int = 0
    loaded_bytes: int = 0
    load_batches: int = 0
    load_seconds: float = 0.0
    load_buckets: list[int] = msgspec.field(default_factory=latency.empty_buckets)
    """Batches that a thread carried out, by time, in the buckets of ``latency``."""
    missing_loads: int = 0
    """Blocks the tier was thought to hold and did not."""
    failed_loads: int = 0
    """Blocks not delivered, refused ones included."""
    refused: dict[str, int] = {}
    """Blocks whose bytes were refused, by reason; part of ``failed_loads``."""
    stored_blocks: int = 0
    stored_bytes: int = 0
    store_batches: int = 0
    store_seconds: float = 0.0
    store_buckets: list[int] = msgspec.field(default_factory=latency.empty_buckets)
    no_room_stores: int = 0
    """Blocks the tier itself had no room for."""
    failed_stores: int = 0
    shed_stores: int = 0
    """Blocks not stored because too many waited already, the breaker was open or the tier was being
    cleared."""
    asked_blocks: int = 0
    """Blocks of which a shared tier said whether it holds them."""
    deleted_blocks: int = 0
    removed_blocks: int = 0
    """Blocks the tier dropped on its own."""
    late_transfers: int = 0
    """Transfers that passed their deadline."""
    queued_blocks: int = 0
    breaker: str = "closed"
    blocks: int = 0
    used_bytes: int = 0
    capacity_bytes: int | None = None
    evictions: int = 0


class _Route(msgspec.Struct, eq=False):
    """What the mover keeps per tier."""

    lane: Lane
    breaker: CircuitBreaker
    counters: TierCounters
    deadline_s: float


class Mover:
    """Executes transfers.

    Args:
        tiers: Open tiers and their configuration.
        seal: Composes and verifies the headers of frames.
        codecs: Of each tier by name; a tier that is absent stores blocks as they are.
        slot: Returns the bytes of an arena slot.
        clock: Seconds, monotonic; the clock of every ``now``.
        logger: Where failures are reported.
        on_report: Called, on a tier's thread, when the next ``poll`` has something to take in.

    Raises:
        ConfigError: A tier's threads, queue or deadline is not positive.
    """

    def __init__(
        self,
        tiers: Iterable[tuple[TierConfig, Tier]],
        *,
        seal: FrameSeal,
        codecs: Mapping[str, TierCodecs] = {},
        slot: Callable[[int], memoryview],
        clock: Callable[[], float] = time.monotonic,
        logger: logging.Logger | None = None,
        on_report: Callable[[], None] = lambda: None,
    ) -> None:
        self._logger = logger or logging.getLogger(__name__)
        self._clock = clock
        self._on_report = on_report
        self._reports: queue.SimpleQueue[tuple[str, JobReport]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._ready: list[TransferResult] = []
        self._is_closing = False
        self._routes: dict[str, _Route] = {}
        for config, tier in tiers:
            _check(config)
            lane = Lane(
                config.name,
                tier,
                threads=config.threads,
                queue_blocks=config.queue_blocks,
                coder=FrameCoder(seal, codecs.get(config.name, PLAIN), self._logger),
                slot=slot,
                report=self._report,
                clock=clock,
                logger=self._logger,
            )
            breaker = CircuitBreaker(probe_s=2 * config.deadline_s)
            self._routes[config.name] = _Route(lane, breaker, TierCounters(), config.deadline_s)

    def submit(self, transfers: Iterable[Transfer], now: float) -> None:
        """Start transfers; what cannot be taken is reported by the next ``poll``. Never blocks.

        A store that the queue has no room for is ``NO_ROOM``. While the tier's breaker is open, stores
        are ``NO_ROOM`` and everything else is ``FAILED``. When the breaker's pause is over, the
        transfers of one call together are the probe.
        """
        allowed: dict[str, bool] = {}
        for transfer in transfers:
            route = self._routes[transfer.tier]
            job = Job(transfer, now)
            if transfer.tier not in allowed:
                allowed[transfer.tier] = route.breaker.allow(now)
            if self._is_closing:
                self._shed(route, job, _CLOSING)
            elif not allowed[transfer.tier]:
                self._shed(route, job, _PAUSED)
            elif route.lane.put(job):
                self._jobs[transfer.id] = job
            else:
                self._shed(route, job, _QUEUE_FULL)

    def poll(self, now: float, wait_s: float = 0.0) -> list[TransferResult]:
        """Return finished transfers, and those that passed their deadline since the last call.

        Args:
            now: The time.
            wait_s: Longest to wait for a first report where transfers are under way.
        """
        named = self._next_report(wait_s if self._jobs and not self._ready else 0.0)
        while named is not None:
            self._take_in(*named, now)
            named = self._next_report(0.0)
        for job in list(self._jobs.values()):
            if not job.is_late and job.transfer.id in self._jobs:  # one deadline can end other jobs
                self._check_deadline(job, now)
        ready, self._ready = self._ready, []
        return ready

    def has_pending(self) -> bool:
        """Tell whether a later ``poll`` will report something."""
        return bool(self._jobs or self._ready)

    def is_available(self, tier: str, now: float) -> bool:
        """Tell whether a transfer submitted now would reach the tier."""
        return self._routes[tier].breaker.would_allow(now)

    def counters(self) -> dict[str, TierCounters]:
        """Return a copy of each tier's totals."""
        return {
            name: msgspec.structs.replace(
                route.counters,
                refused=dict(route.counters.refused),
                load_buckets=list(route.counters.load_buckets),
                store_buckets=list(route.counters.store_buckets),
                queued_blocks=route.lane.queued_blocks,
                breaker=route.breaker.state.value,
            )
            for name, route in self._routes.items()
        }

    def close(self, deadline_s: float) -> list[TransferResult]:
        """Drain stores for at most ``deadline_s`` seconds, end the threads, return the last results.

        Waiting loads and questions fail at once. Threads that do not return in time are logged and left behind;
        the transfers they hold are never reported. Idempotent.
        """
        self._is_closing = True
        deadline = time.monotonic() + deadline_s
        self._withdraw(lambda job: job.transfer.direction in _AWAITED)
        while self._jobs and (left := deadline - time.monotonic()) > 0:
            if (named := self._next_report(left)) is not None:
                self._take_in(*named, self._clock())
        self._withdraw(lambda job: True)
        for route in self._routes.values():
            for thread in route.lane.stop(deadline):
                self._logger.warning("thread %s did not end within %.1f s; left behind", thread, deadline_s)
        return self.poll(self._clock())

    def _report(self, tier: str, report: JobReport) -> None:
        """Queue what a lane reports. Called on its threads."""
        self._reports.put((tier, report))
        self._on_report()

    def _next_report(self, timeout_s: float) -> tuple[str, JobReport] | None:
        try:
            return self._reports.get(timeout=timeout_s) if timeout_s > 0 else self._reports.get_nowait()
        except queue.Empty:
            return None

    def _take_in(self, name: str, report: JobReport, now: float) -> None:
        route = self._routes[name]
        del self._jobs[report.job.transfer.id]
        _note_time(route.counters, report.job.transfer.direction, report.duration_s)
        self._finish(
            route,
            TransferResult(
                transfer=report.job.transfer,
                outcomes=report.outcomes,
                is_finished=True,
                refused=tuple(reason for _, reason in report.refused),
                refused_keys=tuple(key for key, _ in report.refused),
                moved_bytes=report.moved_bytes,
                duration_s=report.duration_s,
                queued_s=(report.job.started or now) - report.job.submitted,
                error=report.error,
            ),
        )
        if report.job.is_late:
            return  # the breaker was told when the deadline passed
        failed = report.outcomes.count(Outcome.FAILED) - len(report.refused)  # refused ones were delivered
        if report.error or failed == len(report.outcomes):
            self._fail(route, now)
        else:
            route.breaker.succeed()

    def _check_deadline(self, job: Job, now: float) -> None:
        """What a request waits for has its time from the submission, the rest from when a thread began it."""
        route = self._routes[job.transfer.tier]
        started = job.started
        since = job.submitted if job.transfer.direction in _AWAITED else started
        if since is None or now - since <= route.deadline_s:
            return
        why = f"no answer within {route.deadline_s:g} s"
        waiting = route.lane.withdraw(lambda waiting: waiting is job)
        if waiting:
            self._shed(route, job, why)
            return  # the tier was not asked: whoever keeps its threads busy is judged
        job.is_late = True
        route.counters.late_transfers += 1
        outcomes = (Outcome.FAILED,) * len(job.transfer.keys)
        self._ready.append(TransferResult(job.transfer, outcomes, is_finished=False, error=why))
        if started is not None and now - started > route.deadline_s:
            self._fail(route, now)

    def _fail(self, route: _Route, now: float) -> None:
        if route.breaker.fail(now):
            self._logger.warning("tier %r is %s", route.lane.name, _PAUSED)
            for job in route.lane.withdraw(lambda job: True):
                self._shed(route, job, _PAUSED)

    def _withdraw(self, wanted: Callable[[Job], bool]) -> None:
        for route in self._routes.values():
            for job in route.lane.withdraw(wanted):
                self._shed(route, job, _CLOSING)

    def _shed(self, route: _Route, job: Job, why: str) -> None:
        """Finish a job that no thread has begun."""
        self._jobs.pop(job.transfer.id, None)
        is_store = job.transfer.direction is Direction.STORE
        count = len(job.transfer.keys)
        outcomes = (Outcome.NO_ROOM if is_store else Outcome.FAILED,) * count
        if is_store:
            route.counters.shed_stores += count
            route.counters.no_room_stores -= count  # counted by ``_finish``, but not the tier's doing
        queued_s = self._clock() - job.submitted
        self._finish(
            route,
            TransferResult(job.transfer, outcomes, is_finished=True, queued_s=queued_s, error=why),
        )

    def _finish(self, route: _Route, result: TransferResult) -> None:
        self._ready.append(result)
        _count(route.counters, result)


def _check(config: TierConfig) -> None:
    for field, value in (
        ("threads", config.threads),
        ("queue_blocks", config.queue_blocks),
        ("deadline_s", config.deadline_s),
    ):
        if value <= 0:
            raise ConfigError(f"tiers.{config.name}.{field}", f"found {value}, expected more than 0")


def _note_time(counters: TierCounters, direction: Direction, seconds: float) -> None:
    if direction is Direction.LOAD:
        latency.note(counters.load_buckets, seconds)
    elif direction is Direction.STORE:
        latency.note(counters.store_buckets, seconds)


def _count(counters: TierCounters, result: TransferResult) -> None:
    done, failed, missing, no_room = (
        result.outcomes.count(outcome)
        for outcome in (Outcome.OK, Outcome.FAILED, Outcome.MISSING, Outcome.NO_ROOM)
    )
    if result.transfer.direction is Direction.LOAD:
        counters.loaded_blocks += done
        counters.loaded_bytes += result.moved_bytes
        counters.load_batches += 1
        counters.load_seconds += result.duration_s
        counters.failed_loads += failed
        counters.missing_loads += missing
        for reason in result.refused:
            counters.refused[reason] = counters.refused.get(reason, 0) + 1
    elif result.transfer.direction is Direction.STORE:
        counters.stored_blocks += done
        counters.stored_bytes += result.moved_bytes
        counters.store_batches += 1
        counters.store_seconds += result.duration_s
        counters.failed_stores += failed
        counters.no_room_stores += no_room
    elif result.transfer.direction is Direction.ASK:
        counters.asked_blocks += done + missing
    else:
        counters.deleted_blocks += done
