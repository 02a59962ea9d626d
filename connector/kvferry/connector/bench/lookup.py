"""What the manager's bookkeeping costs: microseconds per block looked up, bytes per block held."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from kvferry.connector.bench.case import BenchCase, BenchContext, Figure, Goal
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.connector.manager import BlockManager, LowerTierSpec
from kvferry.connector.policy import EvictionPolicy
from kvferry.connector.registry import PluginRegistry

__all__ = ["LOOKUP"]

PREFIX_BLOCKS = 1000
HELD_BLOCKS = 100_000
GOAL = Goal(1.0, at_least=False)
TIER = "disk"


def _measure(context: BenchContext) -> Sequence[Figure]:
    registry = PluginRegistry()

    def filled() -> BlockManager:
        return _filled(registry.eviction_policy("s3fifo"), held)

    def scanned() -> BlockManager:
        return _scanned(registry.eviction_policy("s3fifo"), held)

    prefix, held = (100, 1000) if context.quick else (PREFIX_BLOCKS, HELD_BLOCKS)
    managers = {"the arena": filled(), "a lower tier": scanned()}
    figures = _lookups(managers, prefix, 5 if context.quick else 201, lambda part: context.progress(part / 2))
    managers.clear()
    for where, build in (("the arena", filled), ("a lower tier", scanned)):
        value = _allocated(build) / held
        figures.append(
            Figure(
                name=f"manager's memory for a block in {where}",
                value=value,
                unit="B",
                note=f"{held:,} blocks",
            )
        )
    context.progress(1.0)
    return figures


def _lookups(
    managers: Mapping[str, BlockManager], prefix: int, repetitions: int, progress: Callable[[float], None]
) -> list[Figure]:
    keys = list(itertools.islice(_keys(), prefix))
    sides = {where: partial(_require_found, manager, keys) for where, manager in managers.items()}
    seconds = interleaved(sides, repetitions, progress)
    return [
        Figure(
            name=f"lookup of a block in {where}",
            value=seconds[where] / prefix * 1e6,
            unit="us",
            goal=GOAL,
            note=f"prefix of {prefix:,} blocks",
        )
        for where in managers
    ]


def _filled(policy: EvictionPolicy, count: int) -> BlockManager:
    """A manager whose arena holds ``count`` blocks."""
    manager = BlockManager(count, policy)
    for batch in _batches(count):
        reservation = manager.reserve("bench", batch, now=0.0)
        manager.commit(reservation.id, batch, now=0.0)
    return manager


def _scanned(policy: EvictionPolicy, count: int) -> BlockManager:
    """A manager with an empty arena above a tier that holds ``count`` blocks."""
    manager = BlockManager(2, policy, [LowerTierSpec(name=TIER, has_scan=True)])
    for batch in _batches(count):
        manager.on_tier_scanned(TIER, batch, is_complete=False)
    manager.on_tier_scanned(TIER, (), is_complete=True)
    return manager


def _require_found(manager: BlockManager, keys: Sequence[BlockKey], _: int) -> None:
    found = manager.lookup(keys, now=0.0).reachable
    assert found == len(keys), f"only {found} of {len(keys)} blocks found"


def _batches(count: int) -> Iterator[list[BlockKey]]:
    keys = _keys()
    for first in range(0, count, 100):
        yield list(itertools.islice(keys, min(100, count - first)))


def _keys() -> Iterator[BlockKey]:
    return (BlockKey(number.to_bytes(KEY_BYTES, "big")) for number in itertools.count())


def _allocated(build: Callable[[], object]) -> int:
    """Return the bytes that stay allocated after ``build``, its result held."""
    gc.collect()
    tracemalloc.start()
    try:
        built = build()
        gc.collect()
        current, _ = tracemalloc.get_traced_memory()
        del built
        return current
    finally:
        tracemalloc.stop()


LOOKUP = BenchCase("lookup", "the manager's lookup and its memory, per block", _measure)
