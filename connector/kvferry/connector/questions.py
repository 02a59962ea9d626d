"""Questions: what shared tiers are asked, for which blocks of a prompt, and what the answers change.

Blocks are asked for in prefix order and a few at a time: a prompt that nobody has seen costs one small
question, and each answer that its blocks are there doubles the next. A block is asked of one tier after
the other, in their order, until one holds it. Requests that wait for the same block share one question.

Pure state, owned by the manager's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvferry.connector.flights import Flights
from kvferry.connector.keys import BlockKey
from kvferry.connector.lower import LowerTier, LowerTiers
from kvferry.connector.plan import Direction, Transfer, TransferResult
from kvferry.connector.residency import Residency
from kvferry.connector.service import MissReason
from kvferry.connector.tier import Outcome

__all__ = ["Asked", "Questions"]

_FIRST_BLOCKS = 8
"""Blocks of a prompt that are asked for when none of it is known to be there."""


class Asked(NamedTuple):
    """What is being asked for a prompt."""

    blocks: int
    """Blocks that the answers may add to the reachable ones."""
    tier: str
    """The tier that is asked for the first of them; empty when nothing is asked for."""
    transfers: list[Transfer]
    """Questions that are new."""


class Questions:
    """Plans questions and takes in the answers.

    Args:
        lower: The tiers.
        residency: Which tier holds what.
        flights: Where transfers are planned.
        again_s: Time for which a tier that did not answer is not asked again for the same block.
    """

    def __init__(self, lower: LowerTiers, residency: Residency, flights: Flights, again_s: float) -> None:
        self._lower = lower
        self._residency = residency
        self._asking = residency.asking
        self._flights = flights
        self._again_s = again_s

    def plan(self, keys: Sequence[BlockKey], reachable: int, now: float) -> Asked:
        """Ask for the blocks of a prompt that follow its ``reachable`` first ones."""
        if not self._asking.is_needed:
            return Asked(0, "", [])
        blocks, first = 0, 0
        by_bit: dict[int, list[BlockKey]] = {}
        for key in keys[reachable : reachable + max(_FIRST_BLOCKS, reachable)]:
            if not self._residency.is_reachable(key, now):
                bit = self._residency.tier_to_ask(key, now)
                if not bit:
                    break
                first = first or bit
                if not self._asking.is_under_way(key, bit):
                    by_bit.setdefault(bit, []).append(key)
            blocks += 1
        tier = next((tier.name for tier in self._lower.all() if tier.bit == first), "")
        return Asked(blocks, tier, self._ask(by_bit))

    def ended(self, tier: LowerTier, transfer: Transfer, result: TransferResult, now: float) -> None:
        """Take in the answers, in time or late."""
        self._asking.end(transfer.keys, tier.bit)
        answers = list(zip(transfer.keys, result.outcomes, strict=True))
        absent = [key for key, outcome in answers if outcome is Outcome.MISSING]
        self._asking.absent(absent, tier.bit, now)
        self._residency.stored_below([key for key, outcome in answers if outcome is Outcome.OK], tier.bit)
        failed = [key for key, outcome in answers if outcome is Outcome.FAILED]
        self.unanswered(tier, failed, MissReason.TIER_DOWN, now)

    def unanswered(self, tier: LowerTier, keys: Sequence[BlockKey], reason: MissReason, now: float) -> None:
        """Take in that a tier failed to answer, or has not answered in time."""
        self._asking.end(keys, tier.bit)
        for key in keys:
            self._residency.losses.failed(key, tier.bit, reason, now, now + self._again_s)

    def _ask(self, by_bit: dict[int, list[BlockKey]]) -> list[Transfer]:
        transfers: list[Transfer] = []
        for tier in self._lower.all():
            keys = by_bit.get(tier.bit)
            if keys:
                self._asking.begin(keys, tier.bit)
                transfers += self._flights.plan_slotless(Direction.ASK, tier.name, keys)
        return transfers
