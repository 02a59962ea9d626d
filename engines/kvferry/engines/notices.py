"""What every adapter's leader tells the operator, and what it waits for before others are told, in the same words.

Owned by the engine's scheduler thread.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvferry.connector.keys import BlockKey
from kvferry.connector.service import CacheService
from kvferry.engines.jobs import WorkerReport
from kvferry.engines.session import EngineSessions

__all__ = ["make_visible", "serving", "take_report"]

logger = logging.getLogger(__name__)


def serving(model: str, service: CacheService, fingerprint: bytes) -> None:
    """Say which blocks are kept where."""
    logger.info(
        "kvferry serves %s: blocks of %d tokens (%d bytes), %s, fingerprint %s",
        model,
        service.layout.block_tokens,
        service.layout.payload_bytes,
        service.description,
        fingerprint[:4].hex(),
    )


def take_report(sessions: EngineSessions, report: WorkerReport) -> None:
    """Take in what ranks finished; say so once if the cache is off because of it."""
    was_disabled = sessions.disabled
    sessions.report(report)
    if sessions.disabled and not was_disabled:
        logger.error("kvferry is off, the engine goes on without it: %s", sessions.disabled)


def make_visible(
    service: CacheService, keys: Sequence[BlockKey], left_s: float, commit_wait_s: float
) -> None:
    """Wait until others find blocks whose request is answered next; go on with a warning if they don't in time.

    Args:
        service: Where the blocks are kept.
        keys: Of the blocks.
        left_s: Longest wait, in seconds.
        commit_wait_s: What is configured, of which that is left.
    """
    if not service.settle(keys, left_s):
        logger.warning(
            "%d blocks may not be visible to others yet although their request is answered "
            "(peer.commit_wait_s is %g s)",
            len(keys),
            commit_wait_s,
        )
