"""Plans: what the manager wants moved, and what became of it.

The manager changes state and returns transfers; the mover carries them out and hands back results.
Values only.
"""

from __future__ import annotations

import enum

import msgspec

from kvferry.connector.keys import BlockKey
from kvferry.connector.tier import Outcome

__all__ = ["Direction", "Transfer", "TransferResult"]


class Direction(enum.Enum):
    """Which way a transfer goes."""

    LOAD = "load"
    """Tier to arena (promotion)."""
    STORE = "store"
    """Arena to tier (spill)."""
    DELETE = "delete"
    """Forget in the tier; no slots are involved."""
    ASK = "ask"
    """Ask a shared tier which blocks it holds (``OK`` or ``MISSING``); no slots are involved."""


class Transfer(msgspec.Struct, frozen=True):
    """One batch for one tier. The slots stay pinned until the mover reports the transfer."""

    id: int
    direction: Direction
    tier: str
    keys: tuple[BlockKey, ...]
    slots: tuple[int, ...]
    """Arena slots, parallel to ``keys``; empty for DELETE and ASK."""


class TransferResult(msgspec.Struct, frozen=True):
    """What became of a transfer.

    A transfer is reported exactly once as finished. One that passed its deadline may be reported once
    before that with ``is_finished`` False: its blocks count as missed from then on, but its slots
    still belong to the tier's thread until the final report.
    """

    transfer: Transfer
    outcomes: tuple[Outcome, ...]
    """Parallel to ``transfer.keys``."""
    is_finished: bool
    refused: tuple[str, ...] = ()
    """Reasons of blocks refused by verification, for counters."""
    refused_keys: tuple[BlockKey, ...] = ()
    """The refused blocks, parallel to ``refused``."""
    moved_bytes: int = 0
    """Of the bodies that were stored, or loaded and found good: less than the blocks where a codec
    shortened them."""
    duration_s: float = 0.0
    """Of the tier's call."""
    queued_s: float = 0.0
    """From its submission until a thread began it, or until it was given up."""
    error: str = ""
    """Why the tier failed as a whole, if it did."""
