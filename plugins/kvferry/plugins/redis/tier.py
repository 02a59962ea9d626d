"""The Redis tier at work: frames in and out of values, one value per block.

A value is the frame's header and body, written by one ``SET``: other engines see the whole block or none.
What the server evicts or expires is a miss. Which server holds a key, and what a failure means, is settled
below (``batches``, ``faults``); names of keys and the capacity in ``keyspace``.

Who owns what
  * ``_lock`` guards what ``stats`` shows and what was reported; it is never held across I/O.
  * A call's connections are its own. There are no threads here: callers bring them.

A batch is stored last block first, so that a capacity drops a prefix's tail before its head.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from redis import exceptions

from kvferry.connector.errors import ClosedError, TierError
from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Capabilities, Frame, Outcome, TierContext, TierStats
from kvferry.plugins.redis.batches import Batches, Receive, Request
from kvferry.plugins.redis.census import INFO, KEYS, Census, facts_of
from kvferry.plugins.redis.faults import block_outcome, one_line, tier_error
from kvferry.plugins.redis.keyspace import Keyspace
from kvferry.plugins.redis.servers import Servers
from kvferry.plugins.redis.wire import Deadline, Reader

__all__ = ["RedisTier"]

_REPORT_EVERY_S = 60.0
_MAX_REPORTED = 100


class RedisTier:
    """Blocks in Redis; see the module docstring. Made by ``opening.open_redis_tier``.

    Args:
        context: What kvferry gave the tier.
        servers: Where keys live; owned by the tier from now on.
        keyspace: Names of keys.
        census: What is known of the servers' sizes.
        is_bounded: Whether a capacity or the server's ``maxmemory`` bounds it.
    """

    def __init__(
        self, context: TierContext, servers: Servers, keyspace: Keyspace, census: Census, is_bounded: bool
    ) -> None:
        self._context = context
        self._servers = servers
        self._keyspace = keyspace
        self._batches = Batches(context.name, servers)
        self._census = census
        self._capabilities = Capabilities(is_persistent=True, is_shared=True, is_bounded=is_bounded)
        self._is_closed = False
        self._lock = threading.Lock()
        self._reported: dict[str, float] = {}

    @property
    def capabilities(self) -> Capabilities:
        """Persistent and shared; bounded by a capacity or by the server's ``maxmemory``."""
        return self._capabilities

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Ask the server for each key. Blocks until it answers or the deadline has passed.

        Raises:
            TierError: No server answers.
        """
        deadline = self._begin()
        return [answer == 1 for answer in self._run(self._asking(keys), deadline)]

    def load(self, into: Sequence[Frame]) -> list[Outcome]:
        """Read values straight into the frames' buffers. Blocks until done or the deadline has passed.

        Raises:
            TierError: No server answers.
        """
        deadline = self._begin()
        requests = [self._keyspace.get(frame) for frame in into]

        def receive(reader: Reader, index: int) -> Outcome:
            return reader.frame(into[index])

        answers = self._run(requests, deadline, receive)
        outcomes = [self._outcome(answer, "load") for answer in answers]
        self._reconcile(
            (
                frame.key
                for frame, outcome in zip(into, outcomes, strict=True)
                if outcome is not Outcome.FAILED
            ),
            deadline,
        )
        self._look_around(_with_ok(into, outcomes), deadline)
        return outcomes

    def store(self, frames: Sequence[Frame]) -> list[Outcome]:
        """Store the frames; what the server holds already is not sent. Blocks until done or too late.

        Raises:
            TierError: No server answers.
        """
        deadline = self._begin()
        held = self._run(self._asking([frame.key for frame in frames]), deadline)
        wanted = [index for index in reversed(range(len(frames))) if held[index] != 1]
        outcomes = [Outcome.OK] * len(frames)
        requests = [self._keyspace.set(frames[index]) for index in wanted]
        evicted: list[BlockKey] = []
        for index, answer in zip(wanted, self._run(requests, deadline), strict=True):
            key = frames[index].key
            outcomes[index] = self._outcome(self._entered(key, answer, evicted), "store")
        if evicted:
            self._settle_evicted(frames, outcomes, evicted)
        self._reconcile((frames[index].key for index in range(len(frames)) if held[index] == 1), deadline)
        self._look_around(_with_ok(frames, outcomes), deadline)
        return outcomes

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Remove the blocks, for every engine.

        Raises:
            TierError: A server did not answer, so some may still be there.
        """
        deadline = self._begin()
        for answer in self._run([self._keyspace.unlink(key) for key in keys], deadline):
            if isinstance(answer, TierError):
                raise answer
            if isinstance(answer, Exception):
                raise tier_error(self._context.name, "the server", answer) from answer
        self._reconcile(keys, deadline)

    def scan(self) -> Iterator[BlockKey]:
        """Yield nothing: what is shared can change at any time, so kvferry asks ``contains`` instead.

        Listing the keys would cost the server more than it tells: an entry can be gone a moment later.
        """
        self._begin()
        return iter(())

    def stats(self) -> TierStats:
        """Return what the servers said last. With a capacity that is all engines' blocks, else the servers'
        memory and their number of keys, whoever's they are.
        """
        self._begin()
        return self._census.stats()

    def close(self) -> None:
        """Close every connection; calls under way fail."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._servers.close()

    def _begin(self) -> Deadline:
        self._require_open()
        return Deadline(self._context.deadline_s)

    def _run(
        self, requests: Sequence[Request], deadline: Deadline, receive: Receive | None = None
    ) -> list[object]:
        """Carry a batch out; what fails because the tier was closed meanwhile is a ClosedError."""
        try:
            answers = self._batches.run(requests, deadline, receive)
        except TierError:
            self._require_open()
            raise
        if any(isinstance(answer, TierError) for answer in answers):
            self._require_open()
        return answers

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"tier {self._context.name!r} is closed")

    def _asking(self, keys: Iterable[BlockKey]) -> list[Request]:
        return [self._keyspace.exists(key) for key in keys]

    def _entered(self, key: BlockKey, answer: object, evicted: list[BlockKey]) -> object:
        """Take the script's reply out of a transaction's; return the answer to ``SET``."""
        if self._keyspace.limit_bytes is None or not isinstance(answer, list):
            return answer
        partition = self._keyspace.partition_of(key)
        usage = self._keyspace.usage(partition, answer[0])
        if usage is None:  # the script failed: what was stored is in no index
            return answer[0] if isinstance(answer[0], Exception) else exceptions.ResponseError("no usage")
        self._census.count(partition, usage)
        evicted += usage.evicted
        return answer[1]

    def _settle_evicted(
        self, frames: Sequence[Frame], outcomes: list[Outcome], evicted: Sequence[BlockKey]
    ) -> None:
        """Tell of evicted blocks: those of this batch had no room after all, the others are gone."""
        gone = set(evicted)
        for index, frame in enumerate(frames):
            if frame.key in gone and outcomes[index] is Outcome.OK:
                outcomes[index] = Outcome.NO_ROOM
        stored = {frame.key for frame in frames}
        others = [key for key in evicted if key not in stored]
        if others:
            self._context.on_removed(others)

    def _outcome(self, answer: object, verb: str) -> Outcome:
        if isinstance(answer, Outcome):
            if answer is Outcome.FAILED:
                self._report(f"{verb}: a value has a length that no block of this model has")
            return answer
        if not isinstance(answer, Exception):
            return Outcome.OK if answer == b"OK" else Outcome.FAILED
        outcome = None if isinstance(answer, TierError) else block_outcome(answer)
        if outcome is None:
            self._report(f"{verb}: {one_line(answer)}")
            return Outcome.FAILED
        if outcome is Outcome.FAILED:
            self._report(f"{verb}: the server answered: {one_line(answer)}")
        return outcome

    def _reconcile(self, keys: Iterable[BlockKey], deadline: Deadline) -> None:
        """Bring the index up to date, where there is one; a failure is left to the next call."""
        parts = self._keyspace.reconcile(keys)
        if not parts:
            return
        try:
            answers = self._run([request for _, request in parts], deadline)
        except TierError as error:
            self._report(f"the index of blocks was not updated: {one_line(error)}")
            return
        for (partition, _), answer in zip(parts, answers, strict=True):
            usage = self._keyspace.usage(partition, answer)
            if usage is not None:
                self._census.count(partition, usage)

    def _look_around(self, keys: Iterable[BlockKey], deadline: Deadline) -> None:
        """Ask the servers that have just answered for these keys for their figures, now and then."""
        requests: list[Request] = []
        places: list[str] = []
        try:
            for key in keys:
                name = self._keyspace.name(key)
                place = self._servers.place_of(name).label
                if self._census.is_due(place):
                    places.append(place)
                    requests += (Request(name, (INFO,)), Request(name, (KEYS,)))
            answers = self._batches.run(requests, deadline)
        except (TierError, exceptions.RedisError, exceptions.RedisClusterException, OSError):
            self._census.refused(places)  # figures only; no call fails for want of them
            return
        for number, place in enumerate(places):
            info, count = answers[2 * number : 2 * number + 2]
            if isinstance(info, bytes):
                self._census.note(place, facts_of(info, count))

    def _report(self, text: str) -> None:
        """Log each kind of trouble at most once a minute."""
        now = time.monotonic()
        with self._lock:
            if now - self._reported.get(text, -_REPORT_EVERY_S) < _REPORT_EVERY_S:
                return
            if len(self._reported) >= _MAX_REPORTED:
                self._reported.clear()
            self._reported[text] = now
        self._context.logger.warning("tier %r: %s", self._context.name, text)


def _with_ok(frames: Sequence[Frame], outcomes: Sequence[Outcome]) -> list[BlockKey]:
    return [frame.key for frame, outcome in zip(frames, outcomes, strict=True) if outcome is Outcome.OK]
