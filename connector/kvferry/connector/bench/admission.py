"""What each admission policy is worth: hit rate and blocks written, simulated over a load.

A host arena of a tenth of the tier's capacity stands before one bounded tier, as in the manager: blocks
are offered to the tier when they are saved and whenever they are used while it does not hold them. A hit
is a block of the *prefix*, in the arena or in the tier; a block behind a hole is a miss, as in an engine.
Nothing is timed and no byte moves, so the figures are the same on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvferry.connector.admission import ADMISSION_POLICIES, AdmissionPolicy
from kvferry.connector.bench.case import BenchCase, BenchContext, Figure, Goal
from kvferry.connector.bench.loads import Load, default_load
from kvferry.connector.config import HostConfig
from kvferry.connector.keys import BlockKey
from kvferry.connector.memory import format_bytes
from kvferry.connector.policy import POLICIES, EvictionPolicy

__all__ = ["ADMISSION", "CAPACITIES", "Served", "serve"]

CAPACITIES = (1_000, 3_000, 10_000, 30_000)
"""Blocks that the tier holds."""
ARENA_SHARE = 10
"""The tier is so many times as large as the arena."""
BLOCK_BYTES = 64 << 20
"""Of a block of 512 tokens, as the trace has them, where a token takes 128 KiB (8B models with 8 KV heads)."""
GOAL = Goal(0.95, at_least=True)
FIXED = ("always", "second-touch")


class Served(NamedTuple):
    """What came of a load."""

    hits: int
    """Blocks of a prefix that were found."""
    blocks: int
    """Blocks asked for."""
    written: int
    """Blocks stored in the tier."""

    @property
    def hit_rate(self) -> float:
        """Hits as a part of all blocks."""
        return self.hits / max(1, self.blocks)


class _Level:
    """A bounded set of blocks: the arena, or the tier."""

    def __init__(self, capacity: int, policy: EvictionPolicy) -> None:
        self.keys: set[BlockKey] = set()
        self._capacity = capacity
        self._policy = policy

    def touch(self, keys: Sequence[BlockKey]) -> None:
        for key in reversed(keys):
            self._policy.touch(key)

    def take_in(self, keys: Sequence[BlockKey]) -> tuple[list[BlockKey], list[BlockKey]]:
        """Take in as many blocks as it can hold; return them, and those that had to go."""
        new = [key for key in keys if key not in self.keys][: self._capacity]
        victims: list[BlockKey] = []
        if (needed := len(self.keys) + len(new) - self._capacity) > 0:
            victims = self._policy.victims(needed, lambda key: True)
            for key in victims:
                self._policy.remove(key)
                self.keys.remove(key)
        for key in reversed(new):
            self._policy.insert(key)
            self.keys.add(key)
        return new, victims


def serve(
    load: Load,
    capacity: int,
    make_eviction: Callable[[], EvictionPolicy],
    admission: AdmissionPolicy,
) -> Served:
    """Run a load through an arena and a tier of ``capacity`` blocks.

    Args:
        load: The requests.
        capacity: Blocks that the tier holds; the arena holds a tenth.
        make_eviction: Makes the tier's eviction policy; the arena's is the default one.
        admission: The tier's admission policy, unused so far.
    """
    arena = _Level(max(1, capacity // ARENA_SHARE), POLICIES[HostConfig().eviction]())
    tier = _Level(capacity, make_eviction())
    hits = blocks = written = 0
    for keys in load:
        blocks += len(keys)
        found = list(itertools.takewhile(lambda key: key in arena.keys or key in tier.keys, keys))
        hits += len(found)
        loaded = [key for key in found if key not in arena.keys]
        for key in loaded:
            admission.hit(key)
        tier.touch(loaded)
        arena.touch([key for key in keys if key in arena.keys])
        arena.take_in(keys)
        admitted = [key for key in keys if key not in tier.keys and admission.admits(key)]
        stored, evicted = tier.take_in(admitted)
        for key in evicted:
            admission.removed(key)
        for key in stored:
            admission.stored(key)
        written += len(stored)
    return Served(hits, blocks, written)


def _measure(context: BenchContext) -> Sequence[Figure]:
    name, load = default_load(context.quick)
    figures: list[Figure] = []
    rounds = [
        (eviction, capacity)
        for eviction in sorted(POLICIES)
        for capacity in ((100,) if context.quick else CAPACITIES)
    ]
    for done, (eviction, capacity) in enumerate(rounds):
        served: dict[str, Served] = {}
        for part, (policy, make) in enumerate(ADMISSION_POLICIES.items()):
            context.progress((done + part / len(ADMISSION_POLICIES)) / len(rounds))
            served[policy] = serve(load, capacity, POLICIES[eviction], make())
        figures += _figures(f"{eviction}, {capacity:,} blocks, {name}", served)
    context.progress(1.0)
    return figures


def _figures(where: str, served: dict[str, Served]) -> Iterator[Figure]:
    better = max(served[name].hit_rate for name in FIXED)
    for name, result in served.items():
        size = format_bytes(result.written * BLOCK_BYTES)
        share = result.written / max(1, served["always"].written)
        is_judged = name not in FIXED and better > 0
        yield Figure(
            name=f"hit rate with admission {name}, {where}",
            value=100 * result.hit_rate,
            unit="%",
            raw=100 * better if is_judged else None,
            raw_name="better fixed rule" if is_judged else "",
            goal=GOAL if is_judged else None,
            note=f"{result.written:,} blocks written, {size} at 64 MiB each, {share:.0%} of always",
        )


ADMISSION = BenchCase("admission", "admission policies: hit rate and blocks written, simulated", _measure)
