"""What a block key costs: one BLAKE3 over the block's tokens, chained."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvferry.connector.bench.case import BenchCase, BenchContext, Figure
from kvferry.connector.bench.measure import interleaved
from kvferry.connector.keys import KeyChain, Scope, root_key

__all__ = ["KEYS"]

BLOCK_TOKENS = 64
BLOCKS = 1000


def _measure(context: BenchContext) -> Sequence[Figure]:
    generator = random.Random(1)
    blocks = 100 if context.quick else BLOCKS
    tokens = [generator.randrange(128_000) for _ in range(blocks * BLOCK_TOKENS)]
    root = root_key(bytes(32), Scope())

    def whole_prompt(_: int) -> None:
        KeyChain(root, BLOCK_TOKENS).extend(tokens)

    def one_block(_: int) -> None:
        for start in range(blocks):
            KeyChain(root, BLOCK_TOKENS).extend(tokens[start : start + BLOCK_TOKENS])

    sides = {"prompt": whole_prompt, "block": one_block}
    median = interleaved(sides, 3 if context.quick else 51, context.progress)
    return [
        Figure(
            name="key of a block, a whole prompt at once",
            value=median["prompt"] / blocks * 1e6,
            unit="us",
            note=f"{blocks} blocks of {BLOCK_TOKENS} tokens",
        ),
        Figure(name="key of a block, one at a time", value=median["block"] / blocks * 1e6, unit="us"),
    ]


KEYS = BenchCase("keys", "hashing tokens to block keys", _measure)
