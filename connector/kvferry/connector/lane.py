"""A lane: one tier's bounded queue and the threads that call the tier.

A thread takes a transfer, composes or verifies its frames and calls the tier; whatever the tier does,
the transfer is reported exactly once. A block whose bytes are damaged is deleted from the tier before the
refusal is reported; what only this reader refuses stays where others share the tier. Questions and loads
go before everything else, and the rest leaves one thread free for them.

Threading: ``put`` and ``withdraw`` belong to the mover's thread, the rest to the lane's own threads,
which are named ``kvferry-<tier>-<n>``. The queue is the only state they share.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import msgspec

from kvferry.connector.coder import FrameCoder
from kvferry.connector.errors import BlockRefused, TierError, short_key
from kvferry.connector.frame import HEADER_BYTES
from kvferry.connector.keys import BlockKey
from kvferry.connector.plan import Direction, Transfer
from kvferry.connector.tier import Frame, Outcome, Tier

__all__ = ["Job", "JobReport", "Lane"]

_IDLE_WAIT_S = 60.0
_LOG_EVERY_S = 60.0
_DAMAGE = frozenset({"magic", "header", "key", "fingerprint", "length", "checksum"})
"""Reasons of a refusal that hold for every reader. Others, such as a codec that is not installed here or
another secret, are between the block and this reader: who shares the tier may still want it."""
_WRITES = frozenset({Direction.STORE, Direction.DELETE})
"""Nobody waits for these, so they leave a thread free for what somebody waits for."""


_Answer = TypeVar("_Answer")


class Job(msgspec.Struct, eq=False):
    """A transfer in a lane."""

    transfer: Transfer
    submitted: float
    started: float | None = None
    """When a thread began it; None while it waits."""
    is_late: bool = False
    """Its deadline passed and was reported; set by the mover."""


class JobReport(msgspec.Struct, frozen=True):
    """What became of a job."""

    job: Job
    outcomes: tuple[Outcome, ...]
    refused: tuple[tuple[BlockKey, str], ...] = ()
    """Blocks whose bytes were refused, and why."""
    moved_bytes: int = 0
    """Of the bodies that were stored, or loaded and found good."""
    duration_s: float = 0.0
    error: str = ""
    """Why the tier failed as a whole, if it did."""


class _Effects(msgspec.Struct):
    """What a call did beside its outcomes."""

    refused: list[tuple[BlockKey, str]] = []
    moved_bytes: int = 0


class Lane:
    """Runs the calls of one tier.

    Args:
        name: The tier's name.
        tier: What is called.
        threads: How many threads call it.
        queue_blocks: Blocks that may wait to be stored.
        coder: Composes and verifies frames.
        slot: Returns the bytes of an arena slot.
        report: Called with the tier's name and a report, on the lane's threads.
        clock: Seconds, monotonic.
        logger: Where failures are reported, each kind at most once a minute.
    """

    def __init__(
        self,
        name: str,
        tier: Tier,
        *,
        threads: int,
        queue_blocks: int,
        coder: FrameCoder,
        slot: Callable[[int], memoryview],
        report: Callable[[str, JobReport], None],
        clock: Callable[[], float],
        logger: logging.Logger,
    ) -> None:
        self.name = name
        self._tier = tier
        self._is_shared = tier.capabilities.is_shared
        self._coder = coder
        self._slot = slot
        self._report = report
        self._clock = clock
        self._log = _SparseLog(logger)
        self._queue = _Queue(queue_blocks, max(1, threads - 1))
        self._threads = [
            threading.Thread(target=self._work, name=f"kvferry-{name}-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_blocks(self) -> int:
        """Blocks that wait to be stored."""
        return self._queue.queued_blocks

    def put(self, job: Job) -> bool:
        """Queue a job; False when it is a store and the queue has no room for it."""
        return self._queue.put(job)

    def withdraw(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Take jobs that no thread has begun out of the queue."""
        return self._queue.withdraw(wanted)

    def stop(self, deadline: float) -> list[str]:
        """End the threads; return the names of those that still run at ``deadline`` (``time.monotonic``)."""
        self._queue.close()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _work(self) -> None:
        while (job := self._queue.take(self._clock)) is not None:
            report = self._run(job)
            self._queue.done(job)
            self._report(self.name, report)
            del job, report  # an idle thread holds no views of the arena

    def _run(self, job: Job) -> JobReport:
        effects = _Effects()
        outcomes = [Outcome.FAILED] * len(job.transfer.keys)
        why = ""
        try:
            outcomes = self._call(job.transfer, effects)
        except BaseException as error:  # noqa: BLE001  # boundary: whatever a tier raises, the job is reported
            why = str(error) if isinstance(error, TierError) else f"{type(error).__name__}: {error}"
            kind = f"{job.transfer.direction.value} {type(error).__name__}"
            self._log.warn(kind, f"tier {self.name!r} failed to {job.transfer.direction.value}: {why}")
        duration = self._clock() - (job.started or 0.0)
        return JobReport(job, tuple(outcomes), tuple(effects.refused), effects.moved_bytes, duration, why)

    def _call(self, transfer: Transfer, effects: _Effects) -> list[Outcome]:
        if transfer.direction is Direction.LOAD:
            return self._load(transfer, effects)
        if transfer.direction is Direction.STORE:
            return self._store(transfer, effects)
        if transfer.direction is Direction.ASK:
            return self._ask(transfer)
        self._tier.delete(transfer.keys)
        return [Outcome.OK] * len(transfer.keys)

    def _frames(self, transfer: Transfer) -> list[Frame]:
        headers = memoryview(bytearray(HEADER_BYTES * len(transfer.keys)))
        return [
            Frame(
                key,
                headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES],
                self._slot(slot),
                self._coder.payload_bytes,
            )
            for index, (key, slot) in enumerate(zip(transfer.keys, transfer.slots, strict=True))
        ]

    def _store(self, transfer: Transfer, effects: _Effects) -> list[Outcome]:
        packed = self._coder.pack(self._frames(transfer))
        outcomes = self._checked(self._tier.store(packed), Outcome, transfer)
        stored = zip(packed, outcomes, strict=True)
        effects.moved_bytes = sum(frame.length for frame, outcome in stored if outcome is Outcome.OK)
        return outcomes

    def _load(self, transfer: Transfer, effects: _Effects) -> list[Outcome]:
        frames = self._frames(transfer)
        outcomes = self._checked(self._tier.load(frames), Outcome, transfer)
        for index, frame in enumerate(frames):
            if outcomes[index] is not Outcome.OK:
                continue
            try:
                effects.moved_bytes += self._coder.unpack(frame)
            except BlockRefused as refusal:
                outcomes[index] = Outcome.FAILED
                effects.refused.append((frame.key, refusal.reason))
                self._log.warn(f"refused {refusal.reason}", f"tier {self.name!r}: {refusal}")
        doomed = [key for key, reason in effects.refused if reason in _DAMAGE or not self._is_shared]
        if doomed:
            self._quarantine(doomed)
        return outcomes

    def _ask(self, transfer: Transfer) -> list[Outcome]:
        answers = self._checked(self._tier.contains(transfer.keys), bool, transfer)
        return [Outcome.OK if answer else Outcome.MISSING for answer in answers]

    def _quarantine(self, keys: list[BlockKey]) -> None:
        """Delete refused blocks, so that nobody meets them again."""
        try:
            self._tier.delete(keys)
        except BaseException as error:  # noqa: BLE001  # boundary: refused is refused, deleted or not
            what = f"tier {self.name!r}: refused block {short_key(keys[0])} could not be deleted: {error}"
            self._log.warn(f"quarantine {type(error).__name__}", what)

    def _checked(self, answers: object, promised: type[_Answer], transfer: Transfer) -> list[_Answer]:
        """Believe a plugin's answers only if they have the promised shape."""
        if (
            not isinstance(answers, list | tuple)
            or len(answers) != len(transfer.keys)
            or not all(isinstance(answer, promised) for answer in answers)
        ):
            call, count = transfer.direction.value, len(transfer.keys)
            what = f"{call} did not return one {promised.__name__} for each of {count} blocks"
            raise TierError(self.name, what, "report this to the plugin's author")
        return list(answers)


class _Queue:
    """The jobs of one lane that wait, and the rule which one may be begun next."""

    def __init__(self, queue_blocks: int, max_writers: int) -> None:
        self.queued_blocks = 0
        self._queue_blocks = queue_blocks
        self._max_writers = max_writers
        self._asks: deque[Job] = deque()
        self._loads: deque[Job] = deque()
        self._writes: deque[Job] = deque()
        self._writers = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, job: Job) -> bool:
        with self._changed:
            if job.transfer.direction is Direction.STORE:
                if self.queued_blocks + len(job.transfer.keys) > self._queue_blocks:
                    return False
                self.queued_blocks += len(job.transfer.keys)
            self._queue_of(job).append(job)
            self._changed.notify()
            return True

    def take(self, clock: Callable[[], float]) -> Job | None:
        """Wait for a job that may be begun; None when the lane closes."""
        with self._changed:
            while not self._is_closed:
                job = self._next()
                if job is not None:
                    job.started = clock()
                    return job
                self._changed.wait(_IDLE_WAIT_S)
            return None

    def done(self, job: Job) -> None:
        with self._changed:
            if job.transfer.direction in _WRITES:
                self._writers -= 1
                self._changed.notify()

    def withdraw(self, wanted: Callable[[Job], bool]) -> list[Job]:
        with self._changed:
            taken = [job for jobs in (self._asks, self._loads, self._writes) for job in jobs if wanted(job)]
            for job in taken:
                self._queue_of(job).remove(job)
                self._leave(job)
            return taken

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _queue_of(self, job: Job) -> deque[Job]:
        if job.transfer.direction in _WRITES:
            return self._writes
        return self._loads if job.transfer.direction is Direction.LOAD else self._asks

    def _leave(self, job: Job) -> None:
        if job.transfer.direction is Direction.STORE:
            self.queued_blocks -= len(job.transfer.keys)

    def _next(self) -> Job | None:
        if self._asks:
            return self._asks.popleft()
        if self._loads:
            return self._loads.popleft()
        if not self._writes or self._writers == self._max_writers:
            return None
        job = self._writes.popleft()
        self._leave(job)
        self._writers += 1
        return job


class _SparseLog:
    """Says each kind of thing at most once a minute, and how often it was left unsaid."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def warn(self, kind: str, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(kind, -_LOG_EVERY_S) < _LOG_EVERY_S:
                self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
                return
            self._said[kind] = now
            unsaid = self._unsaid.pop(kind, 0)
        self._logger.warning("%s%s", text, f" (and {unsaid} times before)" if unsaid else "")
