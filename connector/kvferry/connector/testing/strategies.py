"""Hypothesis strategies for what passes through a tier, for authors' own property tests.

Needs hypothesis, which nothing else in the kit does: import this module by its name.
"""

from __future__ import annotations

from hypothesis import strategies

from kvferry.connector.keys import KEY_BYTES, BlockKey
from kvferry.connector.layout import SLOT_ALIGNMENT_BYTES, BlockLayout
from kvferry.connector.testing.blocks import hostile_keys

__all__ = ["batches", "block_keys", "body_lengths"]


def block_keys() -> strategies.SearchStrategy[BlockKey]:
    """Any 32 bytes; often hostile ones, or such that share most of their bytes with others."""
    similar = strategies.tuples(
        strategies.sampled_from(range(KEY_BYTES)), strategies.binary(min_size=1, max_size=1)
    )
    return strategies.one_of(
        strategies.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
        strategies.sampled_from(hostile_keys()),
        similar.map(lambda place: bytes(place[0]) + place[1] + bytes(KEY_BYTES - 1 - place[0])),
    ).map(BlockKey)


def body_lengths(layout: BlockLayout) -> strategies.SearchStrategy[int]:
    """Any length that a codec could make of a block; often one at a boundary of alignment."""
    boundaries = range(0, layout.payload_bytes + 1, SLOT_ALIGNMENT_BYTES)
    near = {edge + step for edge in (*boundaries, layout.payload_bytes) for step in (-1, 0, 1)}
    return strategies.one_of(
        strategies.integers(1, layout.payload_bytes),
        strategies.sampled_from(sorted(length for length in near if 1 <= length <= layout.payload_bytes)),
    )


def batches(max_blocks: int = 8) -> strategies.SearchStrategy[list[BlockKey]]:
    """The keys of one call, none to ``max_blocks``, some of them twice now and then."""
    return strategies.lists(block_keys(), max_size=max_blocks)
