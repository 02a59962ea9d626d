"""What was called, in order, in a form that a test compares with the contract's transcripts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "Report", "Transcript"]


@dataclass(frozen=True)
class Report:
    """One ``RequestData``, as far as all dialects have it."""

    id: int
    tokens: int
    """How many new ones."""
    pages: tuple[int, ...]
    position: int
    scheduled: int | None
    """None in the dialect that does not say."""


@dataclass(frozen=True)
class Call:
    """A call of the connector; ``rank`` is None for the leader."""

    iteration: int
    name: str
    arguments: tuple[Any, ...]
    answer: Any = None
    rank: int | None = None


@dataclass
class Transcript:
    """All calls since the engine was started."""

    calls: list[Call] = field(default_factory=list)
    iteration: int = -1

    def add(self, name: str, *arguments: Any, answer: Any = None, rank: int | None = None) -> None:
        self.calls.append(Call(self.iteration, name, arguments, answer, rank))

    def names(self, iteration: int, rank: int = 0) -> list[str]:
        """Return what was called in an iteration: the leader's calls and one rank's, each repeated name once."""
        names: list[str] = []
        for call in self.of(iteration):
            if call.rank in (None, rank) and names[-1:] != [call.name]:
                names.append(call.name)
        return names

    def of(self, iteration: int) -> Iterator[Call]:
        return (call for call in self.calls if call.iteration == iteration)

    def all(self, name: str, rank: int | None = None) -> list[Call]:
        """Return the calls of one method, all ranks' unless one is given."""
        return [call for call in self.calls if call.name == name and rank in (None, call.rank)]

    def counts(self, rank: int = 0) -> dict[str, int]:
        """Return how often what was called: the leader's methods and one rank's."""
        found: dict[str, int] = {}
        for call in self.calls:
            if call.rank in (None, rank):
                found[call.name] = found.get(call.name, 0) + 1
        return found

    def tail(self, count: int = 300) -> str:
        """Return the last calls, a line each, but those of turns in which nothing was asked or answered."""
        told = [
            call for call in self.calls if call.name != "get_finished" or any((*call.arguments, *call.answer))
        ]
        return "\n".join(map(str, told[-count:]))
