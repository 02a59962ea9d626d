"""Who waits for whom: which ids were handed to ``get_finished``, and which all ranks have answered."""

from __future__ import annotations

from collections.abc import Iterable

from standin.failures import ContractBroken

__all__ = ["Waiting"]


class Waiting:
    """Ids of one kind on their way: new, handed out, answered by some ranks, answered by all.

    Args:
        kind: What a message calls them.
        ranks: How many must answer.
    """

    def __init__(self, kind: str, ranks: int) -> None:
        self._kind = kind
        self._new: list[int] = []
        self._pending: list[set[int]] = [set() for _ in range(ranks)]
        self._answered: list[set[int]] = [set() for _ in range(ranks)]

    def add(self, request_id: int) -> None:
        self._new.append(request_id)

    def hand_out(self) -> list[int]:
        """Return the ids that ranks have not been told of."""
        new, self._new = self._new, []
        for pending in self._pending:
            pending.update(new)
        return new

    def answered(self, rank: int, ids: Iterable[int]) -> None:
        """Take a rank's answer."""
        for request_id in ids:
            if request_id in self._answered[rank]:
                raise ContractBroken(f"rank {rank} answered request {request_id} as {self._kind} twice")
            if request_id not in self._pending[rank]:
                raise ContractBroken(
                    f"rank {rank} answered request {request_id} as {self._kind}, which it was not asked for"
                )
            self._pending[rank].discard(request_id)
            self._answered[rank].add(request_id)

    def done(self) -> list[int]:
        """Return the ids that all ranks have answered by now, once."""
        done = set.intersection(*self._answered)
        for answered in self._answered:
            answered -= done
        return sorted(done)

    def is_waiting(self, request_id: int) -> bool:
        """Tell whether a rank has still to answer."""
        return request_id in self._new or any(request_id in pending for pending in self._pending)
