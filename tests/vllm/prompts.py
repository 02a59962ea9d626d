"""Prompts with random shared prefixes, as token ids, from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Iterable

BLOCK = 128
"""Tokens per block with vLLM's default page on CPU, which is as long."""
MOST_BLOCKS = 4
VOCABULARY = 512
SPECIAL = 2
"""Ids below are begin and end of text."""

Prompt = tuple[int, ...]


def shared_prefix_prompts(count: int, seed: int) -> list[Prompt]:
    """Make prompts, most of which begin like an earlier one, cut anywhere.

    vLLM's own prefix cache leaves out at least a prompt's last token and matches whole pages; kvferry matches
    whole blocks. Every prompt ends 1 to 32 tokens behind a block, so that both match up to ``matched``
    tokens, with blocks and pages of 128 tokens and also with blocks of 64 and pages of 32.
    """
    rng = random.Random(seed)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        prefix: Prompt = ()
        if prompts and rng.random() < 0.75:
            parent = rng.choice(prompts)
            prefix = parent[: rng.randrange(len(parent) + 1)]
        length = rng.randint(max(1, len(prefix) // BLOCK), MOST_BLOCKS) * BLOCK + rng.randint(1, 32)
        if len(prefix) < length:
            prompts.append(prefix + random_tokens(rng, length - len(prefix)))
    return prompts


def random_tokens(rng: random.Random, count: int) -> Prompt:
    """Return tokens that no other prompt has in this order."""
    return tuple(rng.randrange(SPECIAL, VOCABULARY) for _ in range(count))


def matched(prompt: Prompt, block: int = BLOCK) -> int:
    """Return how many tokens of a prompt lie in full blocks."""
    return len(prompt) // block * block


def full_blocks(prompts: Iterable[Prompt]) -> set[Prompt]:
    """Return the full blocks of prompts, each as all tokens up to its last."""
    return {prompt[:end] for prompt in prompts for end in range(BLOCK, len(prompt) + 1, BLOCK)}


PROMPTS = shared_prefix_prompts(200, seed=20261123)
