"""The talk between an engine and its cache server, over as many connections as it takes.

What the engine's scheduler has of it: questions with a time limit, messages without an answer, and whether the server
is there at all. A connection that fails is dropped with everything that came over it, and the server is looked for in
the background. A server that says nothing is taken for down until it answers again.

Threading: the engine's scheduler thread calls every method and owns the socket; it never connects, and waits only for
answers. ``reconnecting`` has a thread of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from kvferry.connector import metrics, wire
from kvferry.connector.answers import Grants
from kvferry.connector.errors import WireError
from kvferry.connector.inquiries import Answer, Inquiries, Inquiry, Question
from kvferry.connector.joining import Joined, is_mistake
from kvferry.connector.keys import BlockKey
from kvferry.connector.pace import Pace
from kvferry.connector.reconnecting import Reconnector
from kvferry.connector.service import Lease, ServiceEvent

__all__ = ["SILENCE_S", "Conversation"]

SILENCE_S = 1.0
"""A server that answers nothing for so long is taken for down; it is asked for a sign of life as often."""
_FIRST_S = 2.0
_MAX_EVENTS = 65536
_NOBODY = Grants(0, 0)


class Conversation:
    """Asks, sends, takes in.

    Args:
        where: The server's address, for logs.
        budget_s: An answer within so many seconds is in time.
        reconnector: Looks for the server; the conversation's from now on.
        clock: Seconds, monotonic.
        logger: Where problems are reported.

    Raises:
        KVFerryError: The server refuses this engine, and will until a configuration changes. One that is away is
            waited for in the background.
    """

    def __init__(
        self,
        where: str,
        budget_s: float,
        reconnector: Reconnector,
        clock: Callable[[], float],
        logger: logging.Logger,
    ) -> None:
        self._where = where
        self._budget_s = budget_s
        self._reconnector = reconnector
        self._clock = clock
        self._logger = logger
        self._connections = 0
        self._pace = Pace()
        self._heard_at = 0.0
        self._pinged_at = 0.0
        self._is_silent = False
        self._late = 0
        self._reconnects = 0
        self._answer_s: list[float] = []
        self.joined: Joined | None = None
        """The present connection; None without one."""
        self.grants = _NOBODY
        """Of the present connection."""
        self.inquiries = Inquiries(_NOBODY)
        """Of the present connection."""
        self.events: deque[ServiceEvent] = deque(maxlen=_MAX_EVENTS)
        """What the server told unasked; the oldest go when nobody takes them."""
        self._begin()

    @property
    def is_up(self) -> bool:
        """Whether there is a server that answers."""
        return self.joined is not None and not self._is_silent

    def begin_step(self) -> None:
        """Take in what has arrived, give back what nobody wanted in time, look after the connection."""
        if self.joined is None:
            self._take_connection()
        self._receive()
        now = self._clock()
        self.inquiries.expire(now)
        self.give_back()
        self._watch(now)

    def ask(
        self,
        question: Question,
        keys: Sequence[BlockKey],
        make: Callable[[int], wire.Request],
        most_s: float,
        is_urgent: bool = False,
    ) -> tuple[Answer | None, float]:
        """Ask something, or wait for the answer if it was asked before.

        Args:
            question: What.
            keys: About which blocks.
            make: Returns the request with a given id.
            most_s: Longest wait, in seconds.
            is_urgent: It is asked however much is under way, and an answer that is late is not wanted any more.

        Returns:
            The answer, None when it is not known yet; and for how many seconds it was waited for.
        """
        inquiry = self.inquiries.find(question)
        if inquiry is None:
            if not is_urgent and not self._pace.allows(self.inquiries.under_way):
                return None, 0.0
            inquiry = self._begin_inquiry(question, keys, make)
        waited_s = self._wait(inquiry, most_s)
        if self.joined is None:
            return None, waited_s
        if inquiry.is_answered or is_urgent:
            self.inquiries.forget(inquiry)
        return inquiry.answer, waited_s

    def send(self, message: wire.Request) -> None:
        """Send a message that has no answer; without a connection nothing is sent."""
        if self.joined is None:
            return
        try:
            self.joined.link.send(message)
        except (OSError, WireError) as error:
            self._lose(str(error))

    def give_back(self) -> None:
        """Release and abort what was granted too late for whoever had asked."""
        for grant in self.inquiries.take_unwanted():
            number = self.grants.untagged(grant.id)
            if number is not None:
                is_lease = isinstance(grant, Lease)
                self.send(wire.Release(lease=number) if is_lease else wire.Abort(reservation=number))

    def report(self, counts: metrics.Counts) -> None:
        """Count what happened since the last call."""
        counts.show(metrics.SERVER_UP, 1 if self.is_up else 0)
        counts.add(metrics.LATE_ANSWERS, self._late)
        counts.add(metrics.RECONNECTS, self._reconnects)
        for seconds in self._answer_s:
            counts.observe(metrics.ANSWER_SECONDS, seconds)
        self._late = self._reconnects = 0
        self._answer_s.clear()

    def close(self) -> None:
        """End the connection and look for no other. Idempotent."""
        self._reconnector.close()
        if self.joined is not None:
            self.joined.close()
            self.joined = None

    def _begin(self) -> None:
        self._reconnector.begin()
        problem = self._reconnector.wait_for_first(_FIRST_S)
        if problem is None:
            self._take_connection()
        elif is_mistake(problem):
            self._reconnector.close()
            raise problem
        else:
            self._logger.warning(
                "no cache server at %s yet (%s): nothing is cached until there is one", self._where, problem
            )

    def _begin_inquiry(
        self, question: Question, keys: Sequence[BlockKey], make: Callable[[int], wire.Request]
    ) -> Inquiry:
        inquiry = self.inquiries.begin(question, keys, self._clock())
        self.send(make(inquiry.id))
        return inquiry

    def _wait(self, inquiry: Inquiry, most_s: float) -> float:
        """Wait for an answer; return for how long it was."""
        started = self._clock()
        waited_s = 0.0
        while not inquiry.is_answered and self.joined is not None and waited_s < most_s:
            try:
                self.joined.link.wait(most_s - waited_s)
            except OSError as error:
                self._lose(str(error))
            self._receive()
            waited_s = self._clock() - started
        if waited_s >= most_s > 0 and not inquiry.is_answered and not inquiry.is_late:
            inquiry.is_late = True
            self._late += 1
            self._pace.late()
        return waited_s

    def _receive(self) -> None:
        joined = self.joined
        if joined is None:
            return
        try:
            for reply in joined.link.receive():
                if self.joined is joined:
                    self._take_in(reply)
        except (OSError, WireError) as error:
            self._lose(str(error))

    def _take_in(self, reply: wire.Reply) -> None:
        match reply:
            case wire.Events():
                keys = tuple(wire.unpack_keys(reply.keys))
                self.events.append(ServiceEvent(reply.kind, reply.tier, keys))
            case wire.Goodbye():
                self._lose("it is stopping", is_expected=True)
            case wire.Refused():
                self._lose(f"it refuses to go on ({reply.code}): {reply.why}")
            case _:
                self._heard_at = self._clock()
                inquiry = self.inquiries.answered(reply, self._heard_at)
                self._note_time(self._heard_at - inquiry.sent_at)

    def _note_time(self, seconds: float) -> None:
        if seconds <= self._budget_s:
            self._pace.in_time()
        if len(self._answer_s) < metrics.MAX_OBSERVATIONS:
            self._answer_s.append(seconds)
        if self._is_silent:
            self._is_silent = False
            self._logger.warning("the cache server at %s answers again", self._where)

    def _watch(self, now: float) -> None:
        """Notice a server that is connected and says nothing, and ask it for a sign of life."""
        sent_at = self.inquiries.oldest_sent_at
        if sent_at is None or now - max(sent_at, self._heard_at) <= SILENCE_S:
            return
        if not self._is_silent:
            self._is_silent = True
            self._pace.restart()
            self._logger.warning(
                "the cache server at %s does not answer: the engine goes on without it until it does",
                self._where,
            )
        if now - self._pinged_at >= SILENCE_S:
            self._pinged_at = now
            self._begin_inquiry(Question(wire.Ping), (), lambda number: wire.Ping(id=number))

    def _take_connection(self) -> None:
        joined = self._reconnector.take()
        if joined is None:
            return
        self._connections += 1
        self._reconnects += self._connections > 1
        joined.handle = msgspec.structs.replace(joined.handle, connection=self._connections)
        self.joined = joined
        self.grants = Grants(self._connections, joined.handle.num_slots)
        self.inquiries = Inquiries(self.grants)
        self._pace.restart()
        self._heard_at = self._clock()
        self._logger.info("connected to the cache server at %s, kvferry %s", self._where, joined.version)

    def _lose(self, why: str, is_expected: bool = False) -> None:
        """The connection has ended, and with it all that came over it. Look for the server in the background."""
        if self.joined is None:
            return
        joined, self.joined = self.joined, None
        joined.close()
        self.grants, self.inquiries = _NOBODY, Inquiries(_NOBODY)
        self._is_silent = False
        self._logger.log(
            logging.INFO if is_expected else logging.WARNING,
            "lost the cache server at %s (%s): the engine goes on without it and looks for it",
            self._where,
            why,
        )
        self._reconnector.begin()
