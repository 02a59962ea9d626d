"""Whether a request waits for blocks that slower tiers hold, or goes on without them.

Owned by the engine's scheduler thread; nothing here blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvferry.connector.config import Config
from kvferry.connector.keys import BlockKey
from kvferry.connector.service import HOST, CacheService, Match, MissReason
from kvferry.engines.prefill import PrefillRate
from kvferry.engines.request import RequestState

__all__ = ["Patience"]


class Patience:
    """Has tiers bring what is worth it, and ends waits that last too long.

    Args:
        service: Where blocks are kept.
        config: The effective configuration.
        prefill: How fast the engine computes.
        clock: Monotonic seconds.
    """

    def __init__(
        self, service: CacheService, config: Config, prefill: PrefillRate, clock: Callable[[], float]
    ) -> None:
        self._service = service
        self._block_tokens = service.layout.block_tokens
        self._deadline_s = config.load_deadline_s
        self._always_asked = _always_asked(config)
        self._prefill = prefill
        self._clock = clock

    def wait(
        self, session: RequestState, match: Match, first: int, wanted: Sequence[BlockKey]
    ) -> MissReason | None:
        """Have the tiers bring what is worth it.

        Args:
            session: The request.
            match: What was found from block ``first`` on.
            first: The block that the engine's own tokens end in.
            wanted: The keys from there on.

        Returns:
            None while the request is to wait, else why it goes on without block ``match.ready``.
        """
        now = self._clock()
        block_s = self._prefill.seconds(self._block_tokens)
        waiting = session.waiting
        is_answer_open = match.missing is MissReason.NOT_ASKED
        is_patient = self._always_asked if is_answer_open else waiting.tiers & self._always_asked
        if waiting.is_over(None if is_patient else block_s, self._deadline_s, now):
            return MissReason.DEADLINE
        coming = self._service.prefetch(session.info.id, wanted, block_s)
        if match.ready < match.reachable and not session.is_decided:
            session.is_decided = True
            if coming.expected_s is not None and block_s is not None:
                recompute_ms = (match.reachable - match.ready) * block_s * 1e3
                session.note(expected_ms=coming.expected_s * 1e3, recompute_ms=recompute_ms)
        if match.ready < coming.blocks:
            tiers = set(match.tiers[match.ready : coming.blocks]) - {HOST}
            hoped = len(wanted) - match.ready if coming.blocks > match.reachable else 0
            waiting.go_on(first + match.ready, first + coming.blocks, tiers, now, hoped)
            return None
        session.note_declined(match, coming)
        is_cut = match.ready < match.reachable or coming.cut in (MissReason.SLOWER, MissReason.TIER_DOWN)
        return coming.cut if is_cut else match.missing


def _always_asked(config: Config) -> frozenset[str]:
    """Return the names of the tiers that are asked, and waited for, whatever was measured."""
    always = (tier for tier in config.tiers if tier.get("ask") == "always")
    return frozenset(str(tier.get("name") or tier.get("type", "")) for tier in always)
