"""A lane: one tier's bounded queue and the threads that call the tier.

A thread takes a part of a transfer, composes or verifies its frames and calls the tier; whatever the
tier does, the part is reported exactly once. Loads go before stores, and stores leave one thread free
for loads. A delete waits for the stores before it and holds those behind it, so that nothing that was
deleted is stored by a thread that was slower.

Threading: ``put``, ``room`` and ``withdraw`` belong to the mover's thread, the rest to the lane's own
threads, which are named ``kvferry-<tier>-<n>``. The queue is the only state they share.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import msgspec

from kvferry.connector.errors import BlockRefused, TierError, short_key
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.plan import Direction
from kvferry.connector.tier import Frame, Outcome, Tier

__all__ = ["Lane", "Part", "PartReport"]

_IDLE_WAIT_S = 60.0
_LOG_EVERY_S = 60.0


class Part(msgspec.Struct, eq=False):
    """Some blocks of a transfer: the unit one thread works on."""

    transfer_id: int
    direction: Direction
    first: int
    """Index of the part's first block within the transfer."""
    keys: tuple[BlockKey, ...]
    slots: tuple[int, ...]
    started: float | None = None
    """When a thread took it; None while it waits."""


class PartReport(msgspec.Struct, frozen=True):
    """What became of a part."""

    part: Part
    outcomes: tuple[Outcome, ...]
    refused: tuple[tuple[BlockKey, str], ...] = ()
    """Blocks whose bytes were refused, and why."""
    duration_s: float = 0.0
    error: str = ""
    """Why the tier failed as a whole, if it did."""


class Lane:
    """Runs the calls of one tier.

    Args:
        name: The tier's name.
        tier: What is called.
        threads: How many threads call it.
        queue_blocks: Blocks that may wait to be stored, and as many to be loaded.
        seal: Composes and verifies frames.
        slot: Returns the bytes of an arena slot.
        reports: Where reports go.
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
        seal: FrameSeal,
        slot: Callable[[int], memoryview],
        reports: SimpleQueue[tuple[str, PartReport]],
        clock: Callable[[], float],
        logger: logging.Logger,
    ) -> None:
        self.name = name
        self._tier = tier
        self._seal = seal
        self._slot = slot
        self._reports = reports
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
    def threads(self) -> int:
        """How many threads call the tier."""
        return len(self._threads)

    @property
    def queued_blocks(self) -> int:
        """Blocks that wait to be stored."""
        return self._queue.waiting[Direction.STORE]

    def room(self, direction: Direction) -> int:
        """Return how many more blocks the queue takes now."""
        return self._queue.room(direction)

    def put(self, part: Part) -> None:
        """Add a part; the caller has looked at ``room``."""
        self._queue.put(part)

    def withdraw(self, wanted: Callable[[Part], bool]) -> list[Part]:
        """Take parts that no thread has begun out of the queue."""
        return self._queue.withdraw(wanted)

    def stop(self, deadline: float) -> list[str]:
        """End the threads; return the names of those that still run at ``deadline`` (``time.monotonic``)."""
        self._queue.close()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _work(self) -> None:
        while (part := self._queue.take(self._clock)) is not None:
            report = self._run(part)
            self._queue.done(part)
            self._reports.put((self.name, report))
            del part, report  # an idle thread holds no views of the arena

    def _run(self, part: Part) -> PartReport:
        refused: list[tuple[BlockKey, str]] = []
        outcomes: Sequence[Outcome] = (Outcome.FAILED,) * len(part.keys)
        why = ""
        try:
            outcomes = self._call(part, refused)
        except BaseException as error:  # noqa: BLE001  # boundary: whatever a tier raises, the part is reported
            why = str(error) if isinstance(error, TierError) else f"{type(error).__name__}: {error}"
            self._log.warn(f"{part.direction.value} {type(error).__name__}", f"tier {self.name!r}: {why}")
        duration = self._clock() - (part.started or 0.0)
        return PartReport(part, tuple(outcomes), tuple(refused), duration, why)

    def _call(self, part: Part, refused: list[tuple[BlockKey, str]]) -> Sequence[Outcome]:
        if part.direction is Direction.LOAD:
            return self._load(part, refused)
        if part.direction is Direction.STORE:
            return self._store(part)
        self._tier.delete(part.keys)
        return [Outcome.OK] * len(part.keys)

    def _store(self, part: Part) -> list[Outcome]:
        headers = memoryview(bytearray(HEADER_BYTES * len(part.keys)))
        frames: list[Frame] = []
        for index, (key, slot) in enumerate(zip(part.keys, part.slots, strict=True)):
            header = headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES]
            payload = self._slot(slot)
            self._seal.seal(key, header, payload)
            frames.append(Frame(key, header.toreadonly(), payload.toreadonly()))
        return self._checked(self._tier.store(frames), part)

    def _load(self, part: Part, refused: list[tuple[BlockKey, str]]) -> list[Outcome]:
        headers = memoryview(bytearray(HEADER_BYTES * len(part.keys)))
        frames = [
            Frame(key, headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES], self._slot(slot))
            for index, (key, slot) in enumerate(zip(part.keys, part.slots, strict=True))
        ]
        outcomes = self._checked(self._tier.load(frames), part)
        for index, frame in enumerate(frames):
            if outcomes[index] is not Outcome.OK:
                continue
            try:
                self._seal.verify(frame.key, frame.header, frame.payload)
            except BlockRefused as refusal:
                outcomes[index] = Outcome.FAILED
                refused.append((frame.key, refusal.reason))
                self._log.warn(f"refused {refusal.reason}", f"tier {self.name!r}: {refusal}")
        if refused:
            self._quarantine([key for key, _ in refused])
        return outcomes

    def _quarantine(self, keys: list[BlockKey]) -> None:
        """Delete refused blocks, so that nobody meets them again."""
        try:
            self._tier.delete(keys)
        except BaseException as error:  # noqa: BLE001  # boundary: the refusal stands whether or not the delete works
            why = f"tier {self.name!r}: cannot delete refused block {short_key(keys[0])}: {error}"
            self._log.warn(f"quarantine {type(error).__name__}", why)

    def _checked(self, outcomes: object, part: Part) -> list[Outcome]:
        """Believe a plugin's answer only if it has the promised shape."""
        if (
            not isinstance(outcomes, list | tuple)
            or len(outcomes) != len(part.keys)
            or not all(isinstance(outcome, Outcome) for outcome in outcomes)
        ):
            what = f"{part.direction.value} did not return one Outcome for each of {len(part.keys)} blocks"
            raise TierError(self.name, what, "report this to the plugin's author")
        return list(outcomes)


class _Queue:
    """The parts of one lane that wait, and the rule which one may be begun next."""

    def __init__(self, queue_blocks: int, max_writers: int) -> None:
        self.waiting = dict.fromkeys(Direction, 0)
        self._queue_blocks = queue_blocks
        self._max_writers = max_writers
        self._loads: deque[Part] = deque()
        self._writes: deque[Part] = deque()
        self._running_stores = 0
        self._is_deleting = False
        self._is_closed = False
        self._changed = threading.Condition()

    def room(self, direction: Direction) -> int:
        with self._changed:
            return 0 if self._is_closed else self._queue_blocks - self.waiting[direction]

    def put(self, part: Part) -> None:
        with self._changed:
            (self._loads if part.direction is Direction.LOAD else self._writes).append(part)
            self.waiting[part.direction] += len(part.keys)
            self._changed.notify()

    def take(self, clock: Callable[[], float]) -> Part | None:
        """Wait for a part that may be begun; None when the lane closes."""
        with self._changed:
            while not self._is_closed:
                part = self._next()
                if part is not None:
                    part.started = clock()
                    return part
                self._changed.wait(_IDLE_WAIT_S)
            return None

    def done(self, part: Part) -> None:
        with self._changed:
            if part.direction is Direction.STORE:
                self._running_stores -= 1
            elif part.direction is Direction.DELETE:
                self._is_deleting = False
            self._changed.notify_all()

    def withdraw(self, wanted: Callable[[Part], bool]) -> list[Part]:
        with self._changed:
            taken = [part for queue in (self._loads, self._writes) for part in queue if wanted(part)]
            for part in taken:
                (self._loads if part.direction is Direction.LOAD else self._writes).remove(part)
                self.waiting[part.direction] -= len(part.keys)
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _next(self) -> Part | None:
        if self._loads:
            part = self._loads.popleft()
        elif self._writes and self._may_begin(self._writes[0]):
            part = self._writes.popleft()
            if part.direction is Direction.STORE:
                self._running_stores += 1
            else:
                self._is_deleting = True
        else:
            return None
        self.waiting[part.direction] -= len(part.keys)
        return part

    def _may_begin(self, write: Part) -> bool:
        if self._is_deleting:
            return False
        if write.direction is Direction.DELETE:
            return self._running_stores == 0
        return self._running_stores < self._max_writers


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
