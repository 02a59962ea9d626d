"""What was asked of a cache server and not yet answered, and answers that came too late and are kept for a while.

A question that is asked again while it is under way is not sent again, and its answer, when it comes, is there for
whoever asks next. A lease or a reservation whose answer nobody takes is handed to whoever gives it back.

Pure state, owned by the engine's scheduler thread. ``now`` is monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kvferry.connector import wire
from kvferry.connector.answers import Grants, read_coming, read_lease, read_match, read_reservation
from kvferry.connector.channel import unexpected
from kvferry.connector.errors import WireError
from kvferry.connector.keys import BlockKey
from kvferry.connector.service import Coming, Lease, Match, Reservation

__all__ = ["HINT_S", "RESERVATION_S", "Answer", "Inquiries", "Inquiry", "Question"]

HINT_S = 0.05
"""For so long the answer to a lookup or a prefetch is good for whoever asks next."""
RESERVATION_S = 1.0
"""For so long slots are kept for whoever asked for them."""

Answer = Match | Coming | Lease | Reservation


class Question(NamedTuple):
    """What is asked. A key stands for all that come before it, so the ends tell everything."""

    kind: type[wire.Lookup | wire.Prefetch | wire.Lease | wire.Reserve | wire.Ping]
    owner: str = ""
    first: BlockKey = BlockKey(b"")
    last: BlockKey = BlockKey(b"")
    blocks: int = 0

    @classmethod
    def about(
        cls,
        kind: type[wire.Lookup | wire.Prefetch | wire.Lease | wire.Reserve],
        keys: Sequence[BlockKey],
        owner: str = "",
    ) -> Question:
        """Return the question about some keys, at least one."""
        return cls(kind, owner, keys[0], keys[-1], len(keys))


class Inquiry:
    """One request and what became of it."""

    __slots__ = ("answer", "answered_at", "id", "is_late", "keys", "question", "sent_at")

    def __init__(self, number: int, question: Question, keys: Sequence[BlockKey], sent_at: float) -> None:
        self.id = number
        self.question = question
        self.keys = keys
        self.sent_at = sent_at
        self.answer: Answer | None = None
        self.answered_at: float | None = None
        self.is_late = False
        """Whether it was waited for and the time ran out."""

    @property
    def is_answered(self) -> bool:
        """Whether the answer is there."""
        return self.answered_at is not None


class Inquiries:
    """The inquiries of one connection. Answers come in the order of the questions.

    Args:
        grants: Of the connection.
    """

    def __init__(self, grants: Grants) -> None:
        self._grants = grants
        self._under_way: deque[Inquiry] = deque()
        self._known: dict[Question, Inquiry] = {}
        self._next_id = 1
        self._unwanted: list[Lease | Reservation] = []

    @property
    def under_way(self) -> int:
        """Questions without an answer."""
        return len(self._under_way)

    @property
    def oldest_sent_at(self) -> float | None:
        """When the question was sent whose answer comes next; None without one."""
        return self._under_way[0].sent_at if self._under_way else None

    def find(self, question: Question) -> Inquiry | None:
        """Return the inquiry for a question, under way or answered."""
        return self._known.get(question)

    def begin(self, question: Question, keys: Sequence[BlockKey], now: float) -> Inquiry:
        """Note that a question is being sent; the inquiry has its id."""
        inquiry = Inquiry(self._next_id, question, keys, now)
        self._next_id += 1
        self._under_way.append(inquiry)
        self._known[question] = inquiry
        return inquiry

    def forget(self, inquiry: Inquiry) -> None:
        """Nobody wants this answer, or somebody has it now. What was granted without being taken is given back."""
        if self._known.get(inquiry.question) is inquiry:
            del self._known[inquiry.question]

    def answered(self, reply: wire.Reply, now: float) -> Inquiry:
        """Take in an answer and return its inquiry.

        Raises:
            WireError: It answers nothing that was asked, or cannot be so.
        """
        number = getattr(reply, "id", None)
        if not self._under_way or number != self._under_way[0].id:
            raise WireError(f"its {type(reply).__name__} answers nothing that was asked next")
        inquiry = self._under_way[0]
        inquiry.answer = self._answer(inquiry, reply)
        self._under_way.popleft()
        inquiry.answered_at = now
        if self._known.get(inquiry.question) is not inquiry:
            self._give_back(inquiry)
        elif inquiry.answer is None:
            self.forget(inquiry)
        return inquiry

    def expire(self, now: float) -> None:
        """Forget answers that nobody has asked for in time."""
        for inquiry in list(self._known.values()):
            kept_s = RESERVATION_S if inquiry.question.kind is wire.Reserve else HINT_S
            if inquiry.answered_at is not None and now - inquiry.answered_at > kept_s:
                self._drop(inquiry)

    def forget_hints(self) -> None:
        """Forget what is known about which blocks are there: it has changed."""
        for inquiry in list(self._known.values()):
            if inquiry.is_answered and inquiry.question.kind in (wire.Lookup, wire.Prefetch):
                self.forget(inquiry)

    def forget_all(self) -> None:
        """Want no answer any more."""
        for inquiry in list(self._known.values()):
            self._drop(inquiry)

    def take_unwanted(self) -> Sequence[Lease | Reservation]:
        """Return and forget what the server granted and nobody wants."""
        unwanted, self._unwanted = self._unwanted, []
        return unwanted

    def _drop(self, inquiry: Inquiry) -> None:
        self.forget(inquiry)
        self._give_back(inquiry)

    def _give_back(self, inquiry: Inquiry) -> None:
        if isinstance(inquiry.answer, Lease | Reservation) and inquiry.answer.id:
            self._unwanted.append(inquiry.answer)

    def _answer(self, inquiry: Inquiry, reply: wire.Reply) -> Answer | None:
        match inquiry.question.kind, reply:
            case wire.Lookup, wire.Found():
                return read_match(reply, inquiry.keys)
            case wire.Prefetch, wire.Coming():
                return read_coming(reply, inquiry.keys)
            case wire.Lease, wire.Leased():
                return read_lease(reply, inquiry.keys, self._grants)
            case wire.Reserve, wire.Reserved():
                return read_reservation(reply, inquiry.keys, self._grants)
            case wire.Ping, wire.Pong():
                return None
        raise unexpected(reply)
