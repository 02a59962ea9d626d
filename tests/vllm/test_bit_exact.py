"""A hit from kvferry is, bit for bit, a hit in vLLM's own prefix cache; and these tests would notice if not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from first_life import FirstLife
from prompts import BLOCK, PROMPTS, Prompt, matched, random_tokens
from reference import EXTERNAL_HITS, kvferry_hits, local_hits


@pytest.fixture
def tamper(first_life: FirstLife) -> Iterator[Path]:
    yield first_life.tampering
    first_life.tampering.unlink(missing_ok=True)


def test_every_log_probability_of_200_prompts_is_that_of_a_local_hit(first_life: FirstLife) -> None:
    assert len(PROMPTS) == 200
    assert kvferry_hits(first_life.engine, PROMPTS) == first_life.hits


def test_every_greedy_token_of_200_prompts_is_that_of_the_uncached_run(
    first_life: FirstLife, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    for prompt, answer in first_life.hits.items():
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]


def test_a_prefix_held_by_vllm_is_continued_by_kvferry(first_life: FirstLife) -> None:
    engine, hits = first_life.engine, first_life.hits
    pairs = [
        (short, long)
        for short in PROMPTS
        for long in PROMPTS
        if 0 < matched(short) < matched(long) and long[: matched(short)] == short[: matched(short)]
    ][:40]
    for short, long in pairs:
        engine.reset()
        before = engine.metric(EXTERNAL_HITS)
        assert engine.generate([{"tokens": short}, {"tokens": long}]) == [hits[short], hits[long]]
        served = engine.metric(EXTERNAL_HITS) - before
        assert served == matched(long), "the short one's blocks, then only the rest of the long one's"


def test_generated_blocks_are_reused_in_the_next_turn(first_life: FirstLife) -> None:
    engine, rng = first_life.engine, random.Random(1)
    first = [random_tokens(rng, 100 + turn) for turn in range(10)]
    answers = engine.generate([{"tokens": prompt, "max_tokens": 60} for prompt in first])
    second = [
        prompt + answer.tokens + random_tokens(rng, 10) for prompt, answer in zip(first, answers, strict=True)
    ]
    expected = local_hits(engine, second)
    assert all(matched(prompt) == BLOCK for prompt in second)
    assert kvferry_hits(engine, second) == expected


def test_a_prompt_of_full_blocks_only_is_loaded_whole(first_life: FirstLife) -> None:
    """Only its last token is computed, as in the decode step that once filled the block."""
    engine, rng = first_life.engine, random.Random(2)
    shorter = [random_tokens(rng, blocks * BLOCK - 1) for blocks in (1, 2, 3, 4)]
    decoded = engine.generate([{"tokens": prompt, "max_tokens": 9} for prompt in shorter])
    whole = [prompt + answer.tokens[:1] for prompt, answer in zip(shorter, decoded, strict=True)]
    engine.reset()
    before = engine.metric(EXTERNAL_HITS)
    loaded = engine.generate([{"tokens": prompt} for prompt in whole])
    assert engine.metric(EXTERNAL_HITS) - before == sum(map(len, whole))
    for answer, step in zip(loaded, decoded, strict=True):
        assert answer.tokens == step.tokens[1:]
        assert answer.logprobs == step.logprobs[1:]


def test_one_byte_flipped_after_verification_changes_every_answer(
    first_life: FirstLife, tamper: Path
) -> None:
    """The negative control: the comparisons above can fail."""
    engine, rng = first_life.engine, random.Random(3)
    prompts = [random_tokens(rng, blocks * BLOCK + 20) for blocks in (1, 2, 3, 4) for _ in range(5)]
    expected = local_hits(engine, prompts)
    tamper.write_text("flip")
    flipped = kvferry_hits(engine, prompts)
    assert all(flipped[prompt].logprobs != expected[prompt].logprobs for prompt in prompts)
    tamper.unlink()
    assert kvferry_hits(engine, prompts) == expected, "it was the byte, and nothing else"


def test_a_slot_that_is_no_longer_the_leased_block_is_not_read(
    first_life: FirstLife, uncached: dict[Prompt, tuple[int, ...]], tamper: Path
) -> None:
    engine, prompts = first_life.engine, PROMPTS[:10]
    tamper.write_text("stale")
    for prompt in prompts:
        engine.reset()
        (answer,) = engine.generate([{"tokens": prompt}])
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]
        assert answer.finish == "length", "recomputed, not failed"
    engine.wait_for_metric("kvferry_requests_total{outcome=failed}")
