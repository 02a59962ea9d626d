"""Flights: the transfers that were planned and not yet reported as finished.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvferry.connector.errors import UsageError
from kvferry.connector.keys import BlockKey
from kvferry.connector.plan import Direction, Transfer, TransferResult

__all__ = ["Flights"]

_SLOTLESS_BLOCKS = {Direction.DELETE: 1024, Direction.ASK: 256}
"""Keys per transfer that involves no slots, so batches may be large."""


class Flights:
    """Plans transfers in batches and remembers them until they are finished.

    Args:
        batch_blocks: Blocks per LOAD or STORE.
    """

    def __init__(self, batch_blocks: int) -> None:
        self._batch_blocks = batch_blocks
        self._transfers: dict[int, Transfer] = {}
        self._stale: set[int] = set()
        self._last_id = 0

    def plan(self, direction: Direction, tier: str, blocks: Sequence[tuple[BlockKey, int]]) -> list[Transfer]:
        """Return transfers of ``blocks``, pairs of key and slot, in order."""
        step = self._batch_blocks
        batches = [blocks[first : first + step] for first in range(0, len(blocks), step)]
        return [
            self._add(direction, tier, (key for key, _ in batch), (slot for _, slot in batch))
            for batch in batches
        ]

    def plan_slotless(self, direction: Direction, tier: str, keys: Sequence[BlockKey]) -> list[Transfer]:
        """Return transfers that delete ``keys`` or ask for them."""
        step = _SLOTLESS_BLOCKS[direction]
        return [
            self._add(direction, tier, keys[first : first + step], ()) for first in range(0, len(keys), step)
        ]

    def find(self, result: TransferResult) -> Transfer:
        """Return the transfer that a result is about.

        Raises:
            UsageError: It is unknown or was reported as finished before, or the result does not
                cover its blocks.
        """
        transfer = self._transfers.get(result.transfer.id)
        if transfer is None:
            raise UsageError(f"transfer {result.transfer.id} is unknown or was already reported as finished")
        if len(result.outcomes) != len(transfer.keys):
            raise UsageError(
                f"transfer {transfer.id} has {len(transfer.keys)} blocks, its result {len(result.outcomes)}"
            )
        return transfer

    def finish(self, transfer: Transfer) -> bool:
        """Forget a finished transfer; tell whether it was stale."""
        del self._transfers[transfer.id]
        is_stale = transfer.id in self._stale
        self._stale.discard(transfer.id)
        return is_stale

    def make_stale(self) -> list[Transfer]:
        """Mark the loads, stores and questions under way as outdated and return the stores."""
        moving = [one for one in self._transfers.values() if one.direction is not Direction.DELETE]
        self._stale.update(one.id for one in moving)
        return [one for one in moving if one.direction is Direction.STORE]

    def __len__(self) -> int:
        """Return how many transfers are under way."""
        return len(self._transfers)

    def _add(
        self, direction: Direction, tier: str, keys: Iterable[BlockKey], slots: Iterable[int]
    ) -> Transfer:
        self._last_id += 1
        transfer = Transfer(self._last_id, direction, tier, tuple(keys), tuple(slots))
        self._transfers[transfer.id] = transfer
        return transfer
