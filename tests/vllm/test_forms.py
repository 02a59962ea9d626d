"""Other forms of KV: pages of 32 tokens in blocks of 64, prompts computed in small chunks, bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import Engine, Engines
from prompts import PROMPTS, Prompt
from reference import kvferry_hits, local_hits

BLOCK = 64
SOME = PROMPTS[:60]


@pytest.fixture(scope="module")
def engine(engines: Engines, tiny: Path, uncached: dict[Prompt, tuple[int, ...]]) -> Engine:
    return engines.start(
        "chunks",
        tiny,
        kvferry={"host": {"capacity": "256MiB"}},
        block_size=32,
        max_num_batched_tokens=96,
        max_num_seqs=32,
    )


def test_hits_are_those_of_the_local_cache(engine: Engine, uncached: dict[Prompt, tuple[int, ...]]) -> None:
    expected = local_hits(engine, SOME, BLOCK)
    assert kvferry_hits(engine, SOME, BLOCK) == expected
    for prompt, answer in expected.items():
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]


def test_many_at_once_say_what_the_uncached_engine_says(
    engine: Engine, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    for _ in range(2):
        engine.reset()
        answers = engine.generate([{"tokens": prompt} for prompt in PROMPTS], together=True)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.tokens == uncached[prompt][: len(answer.tokens)]
    engine.settle(BLOCK)


def test_hits_in_bfloat16_are_those_of_the_local_cache(engines: Engines, tiny: Path, engine: Engine) -> None:
    """Where recomputing differs in the second digit, only the same bytes give the same answer."""
    half = engines.start("bfloat16", tiny, kvferry={"host": {"capacity": "64MiB"}}, dtype="bfloat16")
    expected = local_hits(half, PROMPTS[:40])
    assert kvferry_hits(half, PROMPTS[:40]) == expected
