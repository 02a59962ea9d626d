"""A request, as the engine side sees it: what keys it, how far it is, and the record that explains it afterwards.

Pure state, owned by the engine's scheduler thread. ``now`` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from kvferry.connector.explain import RequestRecord
from kvferry.connector.keys import Extra, KeyChain, Scope
from kvferry.connector.service import HOST, Coming, Match, MissReason
from kvferry.engines.waiting import Waiting

__all__ = ["PEER", "RequestInfo", "RequestState"]

PEER = "peer"
"""In place of a tier's name: pages that come straight out of another engine's memory."""


class RequestInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known about a request before it can be keyed."""

    id: str
    prompt_tokens: int
    scope: Scope = Scope()
    extras: Mapping[int, Sequence[Extra]] = {}
    """Non-token inputs by block index."""
    uncacheable: str = ""
    """Why this request is passed through uncached; empty when it is cached."""


class RequestState:
    """State of one live request."""

    __slots__ = (
        "asked_blocks",
        "chain",
        "info",
        "is_decided",
        "peer_content",
        "peer_tokens",
        "pending_saves",
        "record",
        "saved_blocks",
        "sources",
        "waiting",
    )

    def __init__(self, info: RequestInfo, chain: KeyChain, record: RequestRecord) -> None:
        self.info = info
        self.chain = chain
        self.record = record
        self.sources: dict[int, str] = {}
        """Block index -> tier it was brought from for this request."""
        self.waiting = Waiting()
        self.is_decided = False
        """Whether it was decided before what to load and what to compute."""
        self.peer_tokens = 0
        """Tokens that were last offered from a peer, counted from the first of the prompt."""
        self.peer_content = b""
        """Their digest."""
        self.saved_blocks = 0
        self.asked_blocks = 0
        """Up to where slots were asked for; if that is not answered yet, more than ``saved_blocks``."""
        self.pending_saves: set[int] = set()

    def note(self, **changes: object) -> None:
        """Update the request's record."""
        self.record = msgspec.structs.replace(self.record, **changes)

    def note_sources(self, match: Match, first: int) -> None:
        """Note from which tiers blocks ``first`` and following come."""
        for index, tier in enumerate(match.tiers, start=first):
            self.sources.setdefault(index, tier)

    def note_match(
        self, match: Match, first: int, local_tokens: int, missing: MissReason, now: float
    ) -> None:
        """Note what is offered.

        Args:
            match: What was found from block ``first`` on.
            first: The block that ``local_tokens`` end in.
            local_tokens: Tokens that the engine holds itself.
            missing: Why block ``match.ready`` is not there.
            now: The time.
        """
        self.waiting.offered(first + match.ready, now)
        block_tokens = self.record.block_tokens
        matched: dict[str, int] = {}
        for index, tier in enumerate(match.tiers[: match.ready], start=first):
            source = self.sources.get(index, tier)
            matched[source] = matched.get(source, 0) + block_tokens
        if matched:
            skipped = local_tokens - first * block_tokens
            matched[next(iter(matched))] -= skipped
        self.note(
            wait_ms=self.waiting.seconds(now) * 1e3,
            local_tokens=local_tokens,
            matched_tokens=matched,
            missing_block=None if missing is MissReason.NONE else first + match.ready,
            missing_reason=missing.value,
        )

    def note_peer(self, tokens: int) -> None:
        """Note that ``tokens`` behind those that were noted are offered from a peer."""
        self.note(
            matched_tokens={**self.record.matched_tokens, PEER: tokens},
            missing_block=None,
            missing_reason=MissReason.NONE.value,
        )

    def note_declined(self, match: Match, coming: Coming) -> None:
        """Note which blocks tiers hold that are computed all the same."""
        declined: dict[str, int] = {}
        if coming.cut is MissReason.SLOWER:
            for tier in match.tiers[coming.blocks :]:
                declined[tier] = declined.get(tier, 0) + 1
        declined.pop(HOST, None)
        self.note(declined_blocks=declined)

    def note_regret(self, block_s: float | None) -> None:
        """Note, at the end, what waiting cost.

        Args:
            block_s: Seconds in which the engine computes a block; None when not known.
        """
        self.waiting.end()
        regret_s = self.waiting.regret_s(self.record.load_ms / 1e3, block_s)
        if regret_s:
            self.note(regret_ms=regret_s * 1e3, regret_tier=self.waiting.tier)
