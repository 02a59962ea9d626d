"""One job's copies between a rank's pages and the arena, in batches, for as long as they are wanted.

A copy is good only if the slot's generation was the expected one before and after it: otherwise somebody else has the
slot, and the load gave bytes of another block, or the save must not be committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvferry.connector.arena import Arena
from kvferry.connector.staging import Copies
from kvferry.engines.jobs import BlockCopy, copy_batches

__all__ = ["copy_blocks"]


def copy_blocks(
    direction: Copies,
    mark: object,
    arena: Arena,
    copies: Sequence[BlockCopy],
    pages_per_block: int,
    is_wanted: Callable[[], bool],
) -> bool:
    """Copy blocks and wait until none of the copies is under way, however it ended.

    Args:
        direction: Of a staging; this thread's.
        mark: What the copies come after.
        arena: That they were planned for.
        copies: They themselves.
        pages_per_block: Engine pages of a block.
        is_wanted: Asked before each batch; copying ends when it is not.

    Returns:
        Whether all were made and are good.

    Raises:
        LayoutError: Pages or slots that do not exist.
        DeviceError: A GPU refused.
    """
    direction.wait(mark)
    try:
        for batch in copy_batches(copies, pages_per_block):
            if not is_wanted() or not _are_current(arena, batch.copies):
                return False
            direction.copy(batch.page_ids, batch.slots, arena.slots_array)
    finally:
        direction.finish()
    return _are_current(arena, copies)


def _are_current(arena: Arena, copies: Sequence[BlockCopy]) -> bool:
    return all(arena.generation(copy.slot) == copy.generation for copy in copies)
