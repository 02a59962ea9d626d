"""What comparisons of tiers with their raw limits share: the slots, the threads, and the tier's side.

The tier's side is what kvferry does in service: frames are sealed before they are stored and verified after
they are loaded, out of and into the slots of an arena, a transfer's worth of blocks per call. A raw side
derives from ``Slots`` too, so that both move the same bytes with the same threads and calls.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvferry.connector.arena import Arena
from kvferry.connector.bench.case import BenchSkipped, Figure, Goal
from kvferry.connector.embedded import batch_blocks
from kvferry.connector.frame import HEADER_BYTES, FrameSeal
from kvferry.connector.keys import BlockKey
from kvferry.connector.layout import SLOT_ALIGNMENT_BYTES, BlockLayout
from kvferry.connector.policy import POLICIES
from kvferry.connector.tier import Frame, Outcome, Tier, TierContext

__all__ = ["FINGERPRINT", "Slots", "TierSide", "against_raw", "context_of"]

GOAL = Goal(0.8, at_least=True)
FINGERPRINT = bytes(32)
"""Of the model whose blocks are moved; there is none."""


def context_of(name: str, layout: BlockLayout, threads: int, deadline_s: float = 10.0) -> TierContext:
    """Return what a tier that is measured is told; what it has to say is not printed."""
    logger = logging.getLogger(f"{__name__}.{name}")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    return TierContext(
        name=name,
        layout=layout,
        fingerprint=FINGERPRINT,
        instance="",
        on_removed=lambda keys: None,
        make_eviction_policy=lambda policy: POLICIES[policy](),
        logger=logger,
        threads=threads,
        deadline_s=deadline_s,
    )


class Slots:
    """The slots of an arena, and threads that each take a transfer's worth of them.

    Args:
        layout: Of the blocks.
        arena: One slot for each block of a round.
        threads: Who calls.
    """

    def __init__(self, layout: BlockLayout, arena: Arena, threads: ThreadPoolExecutor) -> None:
        self.slots = [arena.slot(index) for index in range(arena.handle.num_slots)]
        self._threads = threads
        per_call = batch_blocks(layout)
        self._calls = [
            range(first, min(first + per_call, len(self.slots)))
            for first in range(0, len(self.slots), per_call)
        ]

    def everywhere(self, work: Callable[[range], None]) -> None:
        """Do ``work`` for all slots, given as ranges of indices; returns when all of it is done."""
        for _ in self._threads.map(work, self._calls):
            pass


class TierSide(Slots):
    """Stores and loads through a tier, sealing and verifying every frame.

    Args:
        tier: What is measured; the caller closes it.
        layout: Of the blocks.
        arena: One slot for each block of a round.
        threads: Who calls the tier.
    """

    def __init__(self, tier: Tier, layout: BlockLayout, arena: Arena, threads: ThreadPoolExecutor) -> None:
        super().__init__(layout, arena, threads)
        self._tier = tier
        self._seal = FrameSeal(FINGERPRINT, layout.payload_bytes)
        self._headers = [memoryview(bytearray(HEADER_BYTES)) for _ in self.slots]
        self._run = os.urandom(8)
        self._generations = itertools.count()
        self._stored: list[int] = []
        for slot in self.slots:
            slot[:] = os.urandom(SLOT_ALIGNMENT_BYTES) * (len(slot) // SLOT_ALIGNMENT_BYTES)

    def store(self, _: int) -> None:
        """Store every slot under keys never used before."""
        self._stored.append(next(self._generations))
        self.everywhere(self._store)

    def load(self, _: int) -> None:
        """Load what was stored last."""
        self.everywhere(self._load)

    def sweep(self) -> None:
        """Delete all but what was stored last."""
        while len(self._stored) > 1:
            generation = self._stored.pop(0)
            self._tier.delete([self._key(generation, index) for index in range(len(self.slots))])

    def clear(self) -> None:
        """Delete everything."""
        self._stored.append(next(self._generations))
        self.sweep()

    def _store(self, indices: range) -> None:
        frames = self._frames(indices)
        for frame in frames:
            self._seal.seal(frame.key, frame.header, frame.payload)
        _require_ok(self._tier.store(frames))

    def _load(self, indices: range) -> None:
        frames = self._frames(indices)
        _require_ok(self._tier.load(frames))
        for frame in frames:
            self._seal.verify(frame.key, frame.header, frame.payload)

    def _frames(self, indices: range) -> list[Frame]:
        generation, length = self._stored[-1], self._seal.payload_bytes
        return [
            Frame(self._key(generation, index), self._headers[index], self.slots[index], length)
            for index in indices
        ]

    def _key(self, generation: int, index: int) -> BlockKey:
        return BlockKey(self._run + generation.to_bytes(8, "little") + index.to_bytes(16, "little"))


def against_raw(
    tier: str,
    what: str,
    moved_bytes: int,
    seconds: Mapping[str, float],
    calls: Mapping[str, str],
    goals: Mapping[str, Goal] | None = None,
) -> list[Figure]:
    """Return the figures of one comparison.

    Args:
        tier: Its type.
        what: What was moved and how (``1.4 MiB blocks, 4 threads``).
        moved_bytes: In one round.
        seconds: Of one round, by ``store``, ``load``, ``raw store`` and ``raw load``.
        calls: What the raw side calls to ``store`` and to ``load``.
        goals: Of ``store`` and ``load``, where they are not those of most tiers.
    """
    goals = {"store": GOAL, "load": GOAL} if goals is None else goals
    return [
        Figure(
            name=f"{tier} {verb}, {what}",
            value=moved_bytes / 1e9 / seconds[verb],
            unit="GB/s",
            raw=moved_bytes / 1e9 / seconds[f"raw {verb}"],
            raw_name=call,
            goal=goals.get(verb),
        )
        for verb, call in calls.items()
    ]


def _require_ok(outcomes: Sequence[Outcome]) -> None:
    if any(outcome is not Outcome.OK for outcome in outcomes):
        raise BenchSkipped(f"the tier answered {sorted({outcome.value for outcome in outcomes})}")
