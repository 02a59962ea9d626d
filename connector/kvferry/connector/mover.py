"""The mover: carries transfers out against tiers and hands back what became of them.

Each tier has its own ``Lane`` (bounded queue, threads), its own deadline and its own circuit breaker, so
a dead tier slows nobody else. Nothing here blocks the caller: a full queue sheds stores and fails loads
at once. Every transfer is reported as finished exactly once; one that passes its deadline while a tier's
thread is at work is reported once before that as not finished, since a thread cannot be interrupted and
its slots belong to it until it returns.

Threading: one thread, the service's, calls every method; lanes report through one queue.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from kvferry.connector.breaker import CircuitBreaker
from kvferry.connector.config import TierConfig
from kvferry.connector.counters import TierCounters
from kvferry.connector.errors import ConfigError
from kvferry.connector.frame import FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.lane import Lane, Part, PartReport
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.tier import Outcome, Tier

__all__ = ["Mover"]

_PART_BYTES = 4 << 20
"""Transfers are split between a lane's threads, but not into calls of fewer bytes than this."""
_PAUSED = "paused after repeated failures"
_QUEUE_FULL = "its queue is full"
_CLOSING = "closing"


class _Operation(msgspec.Struct, eq=False):
    """A transfer under way, or one that is given up at once."""

    transfer: Transfer
    submitted: float
    parts: list[Part]
    outcomes: list[Outcome | None]
    """None: not known yet."""
    refused: list[tuple[BlockKey, str]] = []
    duration_s: float = 0.0
    error: str = ""
    is_late: bool = False
    shed: int = 0
    """Blocks that never reached the tier."""

    @property
    def _when_shed(self) -> Outcome:
        return Outcome.NO_ROOM if self.transfer.direction is Direction.STORE else Outcome.FAILED

    def settle(self, part: Part, outcomes: Sequence[Outcome]) -> None:
        """Take in what became of a part."""
        self.parts.remove(part)
        self.outcomes[part.first : part.first + len(outcomes)] = outcomes

    def shed_part(self, part: Part, why: str) -> None:
        """Give up a part that no thread has begun."""
        self.settle(part, [self._when_shed] * len(part.keys))
        self.shed += len(part.keys)
        self.error = self.error or why

    def shed_rest(self) -> None:
        """Give up the blocks behind those whose outcome is to come."""
        missing = len(self.transfer.keys) - len(self.outcomes)
        self.outcomes += [self._when_shed] * missing
        self.shed += missing

    def result(self) -> TransferResult:
        return TransferResult(
            transfer=self.transfer,
            outcomes=tuple(Outcome.FAILED if known is None else known for known in self.outcomes),
            is_finished=not self.parts,
            refused=tuple(reason for _, reason in self.refused),
            refused_keys=tuple(key for key, _ in self.refused),
            duration_s=self.duration_s,
            error=self.error,
        )


class _Route(msgspec.Struct, eq=False):
    """What the mover keeps per tier."""

    lane: Lane
    breaker: CircuitBreaker
    counters: TierCounters
    deadline_s: float
    part_blocks: Callable[[int], int]


class Mover:
    """Executes transfers.

    Args:
        tiers: Open tiers and their configuration.
        seal: Composes and verifies frames.
        slot: Returns the bytes of an arena slot.
        slot_bytes: Bytes of one slot, to size the calls and to count.
        clock: Seconds, monotonic; the clock of every ``now``.
        logger: Where failures are reported.
    """

    def __init__(
        self,
        tiers: Iterable[tuple[TierConfig, Tier]],
        *,
        seal: FrameSeal,
        slot: Callable[[int], memoryview],
        slot_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        logger: logging.Logger | None = None,
    ) -> None:
        self._logger = logger or logging.getLogger(__name__)
        self._slot_bytes = slot_bytes
        self._clock = clock
        self._reports: queue.SimpleQueue[tuple[str, PartReport]] = queue.SimpleQueue()
        self._operations: dict[int, _Operation] = {}
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
                seal=seal,
                slot=slot,
                reports=self._reports,
                clock=clock,
                logger=self._logger,
            )
            self._routes[config.name] = _Route(
                lane=lane,
                breaker=CircuitBreaker(probe_s=2 * config.deadline_s),
                counters=TierCounters(),
                deadline_s=config.deadline_s,
                part_blocks=_part_rule(config.threads, slot_bytes),
            )

    def submit(self, transfers: Iterable[Transfer], now: float) -> None:
        """Start transfers; what cannot be taken is reported by the next ``poll``. Never blocks.

        Blocks that the queue has no room for, and all while the breaker is open, are ``NO_ROOM`` in a
        store and ``FAILED`` otherwise.
        """
        for transfer in transfers:
            route = self._routes[transfer.tier]
            count = len(transfer.keys)
            is_delete = transfer.direction is Direction.DELETE
            taken = count if is_delete else max(0, min(count, route.lane.room(transfer.direction)))
            why = _CLOSING if self._is_closing else _QUEUE_FULL if taken < count else ""
            if self._is_closing or (taken and not route.breaker.allow(now)):
                taken, why = 0, why if self._is_closing else _PAUSED
            known: list[Outcome | None] = [None] * taken
            operation = _Operation(transfer, now, [], known, error=why)
            operation.shed_rest()
            if taken:
                self._operations[transfer.id] = operation
                self._start(operation, route, taken)
            else:
                self._finish(operation, route)

    def poll(self, now: float) -> list[TransferResult]:
        """Return finished transfers, and those that passed their deadline since the last call."""
        while True:
            try:
                name, report = self._reports.get_nowait()
            except queue.Empty:
                break
            self._take_in(name, report, now)
        for operation in list(self._operations.values()):
            if operation.parts and not operation.is_late:
                self._check_deadline(operation, self._routes[operation.transfer.tier], now)
        ready, self._ready = self._ready, []
        return ready

    def has_pending(self) -> bool:
        """Tell whether a later ``poll`` will report something."""
        return bool(self._operations or self._ready)

    def is_available(self, tier: str, now: float) -> bool:
        """Tell whether a transfer submitted now would reach the tier."""
        return self._routes[tier].breaker.would_allow(now)

    def counters(self) -> dict[str, TierCounters]:
        """Return each tier's totals; the caller must not change them."""
        for route in self._routes.values():
            route.counters.queued_blocks = route.lane.queued_blocks
            route.counters.breaker = route.breaker.state.value
        return {name: route.counters for name, route in self._routes.items()}

    def close(self, deadline_s: float) -> list[TransferResult]:
        """Drain stores for at most ``deadline_s`` seconds, end the threads, return the last results.

        Waiting loads fail at once. Threads that do not return in time are logged and left behind;
        the transfers they hold are never reported. Idempotent.
        """
        self._is_closing = True
        deadline = time.monotonic() + deadline_s
        self._withdraw_all(lambda part: part.direction is Direction.LOAD)
        while self._operations and (left := deadline - time.monotonic()) > 0:
            try:
                name, report = self._reports.get(timeout=left)
            except queue.Empty:
                break
            self._take_in(name, report, self._clock())
        self._withdraw_all(lambda part: True)
        for route in self._routes.values():
            for thread in route.lane.stop(deadline):
                self._logger.warning("thread %s did not end within %.1f s; left behind", thread, deadline_s)
        while not self._reports.empty():
            name, report = self._reports.get_nowait()
            self._take_in(name, report, self._clock())
        ready, self._ready = self._ready, []
        return ready

    def _start(self, operation: _Operation, route: _Route, count: int) -> None:
        transfer = operation.transfer
        step = route.part_blocks(count) if transfer.direction is not Direction.DELETE else count
        for first in range(0, count, step):
            chosen = slice(first, min(first + step, count))
            part = Part(transfer.id, transfer.direction, first, transfer.keys[chosen], transfer.slots[chosen])
            operation.parts.append(part)
        for part in tuple(operation.parts):
            route.lane.put(part)

    def _take_in(self, name: str, report: PartReport, now: float) -> None:
        route = self._routes[name]
        operation = self._operations[report.part.transfer_id]
        operation.settle(report.part, report.outcomes)
        operation.refused += report.refused
        operation.duration_s = max(operation.duration_s, report.duration_s)
        operation.error = operation.error or report.error
        if not operation.is_late:
            self._judge(route, report, now)
        if not operation.parts:
            del self._operations[operation.transfer.id]
            self._finish(operation, route)

    def _judge(self, route: _Route, report: PartReport, now: float) -> None:
        """Tell the breaker how a call went: refused blocks were delivered, failed ones were not."""
        failed = sum(outcome is Outcome.FAILED for outcome in report.outcomes) - len(report.refused)
        if report.error or failed == len(report.outcomes):
            self._fail(route, now)
        else:
            route.breaker.succeed()

    def _fail(self, route: _Route, now: float) -> None:
        if route.breaker.fail(now):
            self._logger.warning("tier %r is %s", route.lane.name, _PAUSED)
            self._give_back(route, route.lane.withdraw(lambda part: True), _PAUSED)

    def _check_deadline(self, operation: _Operation, route: _Route, now: float) -> None:
        """A load's time runs from its submission, another call's from when a thread began it."""
        limit = now - route.deadline_s
        if operation.transfer.direction is Direction.LOAD:
            is_over = operation.submitted < limit
        else:
            is_over = any(part.started is not None and part.started < limit for part in operation.parts)
        if not is_over:
            return
        operation.is_late = True
        operation.error = f"no answer within {route.deadline_s:g} s"
        route.counters.late_transfers += 1
        waiting = route.lane.withdraw(lambda part: part.transfer_id == operation.transfer.id)
        self._give_back(route, waiting, operation.error)
        if operation.parts:
            self._ready.append(operation.result())
        self._fail(route, now)

    def _withdraw_all(self, wanted: Callable[[Part], bool]) -> None:
        for route in self._routes.values():
            self._give_back(route, route.lane.withdraw(wanted), _CLOSING)

    def _give_back(self, route: _Route, parts: Iterable[Part], why: str) -> None:
        """Settle parts that no thread has begun."""
        for part in parts:
            operation = self._operations[part.transfer_id]
            operation.shed_part(part, why)
            if not operation.parts:
                del self._operations[part.transfer_id]
                self._finish(operation, route)

    def _finish(self, operation: _Operation, route: _Route) -> None:
        result = operation.result()
        self._ready.append(result)
        _count(route.counters, result, operation.shed, self._slot_bytes)


def _check(config: TierConfig) -> None:
    for field, value in (
        ("threads", config.threads),
        ("queue_blocks", config.queue_blocks),
        ("deadline_s", config.deadline_s),
    ):
        if value <= 0:
            raise ConfigError(f"tiers.{config.name}.{field}", f"found {value}, expected more than 0")


def _part_rule(threads: int, slot_bytes: int) -> Callable[[int], int]:
    least = max(1, _PART_BYTES // slot_bytes)
    return lambda count: max(least, -(-count // threads))


def _count(counters: TierCounters, result: TransferResult, shed: int, block_bytes: int) -> None:
    done = result.outcomes.count(Outcome.OK)
    failed = result.outcomes.count(Outcome.FAILED)
    if result.transfer.direction is Direction.LOAD:
        counters.loaded_blocks += done
        counters.loaded_bytes += done * block_bytes
        counters.load_batches += 1
        counters.load_seconds += result.duration_s
        counters.failed_loads += failed
        counters.missing_loads += result.outcomes.count(Outcome.MISSING)
        for reason in result.refused:
            counters.refused[reason] = counters.refused.get(reason, 0) + 1
    elif result.transfer.direction is Direction.STORE:
        counters.stored_blocks += done
        counters.stored_bytes += done * block_bytes
        counters.store_batches += 1
        counters.store_seconds += result.duration_s
        counters.failed_stores += failed
        counters.no_room_stores += result.outcomes.count(Outcome.NO_ROOM) - shed
        counters.shed_stores += shed
    else:
        counters.deleted_blocks += done
