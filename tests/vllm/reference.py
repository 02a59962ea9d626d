"""The exact reference of a hit: the same engine's own prefix cache, holding as many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import Answer, Engine
from prompts import BLOCK, Prompt, matched

EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"
LATE_ANSWERS = "kvferry_server_late_answers_total"
TRIES = 10


def local_hits(
    engine: Engine, prompts: Sequence[Prompt], block: int = BLOCK, **request: Any
) -> dict[Prompt, Answer]:
    """Run prompts twice; return the second answers, for which vLLM's own prefix cache held every full block."""
    requests = [{"tokens": prompt, **request} for prompt in prompts]
    engine.generate(requests)
    before = engine.metric(EXTERNAL_HITS)
    answers = dict(zip(prompts, engine.generate(requests), strict=True))
    assert [answer.cached for answer in answers.values()] == [matched(prompt, block) for prompt in prompts]
    assert engine.metric(EXTERNAL_HITS) == before, "the reference must not come from kvferry"
    return answers


def kvferry_hits(
    engine: Engine, prompts: Sequence[Prompt], block: int = BLOCK, **request: Any
) -> dict[Prompt, Answer]:
    """Run prompts, each with vLLM's own prefix cache empty, so that every full block came from kvferry.

    A scheduler waits some milliseconds for a cache server's lease and then goes on without. Such a prompt is run again;
    nothing else than an answer that was late excuses a miss.
    """
    answers = {}
    misses = 0
    late = engine.metric(LATE_ANSWERS)
    for prompt in prompts:
        answers[prompt], missed = _run_until_hit(
            engine, {"tokens": prompt, **request}, matched(prompt, block)
        )
        misses += missed
    if misses:
        engine.wait_for_metric(LATE_ANSWERS, above=late + misses - 1)
    return answers


def _run_until_hit(engine: Engine, request: dict[str, Any], tokens: int) -> tuple[Answer, int]:
    """Return the answer for which kvferry had ``tokens`` tokens, and how often it had fewer before."""
    for misses in range(TRIES):
        before = engine.metric(EXTERNAL_HITS)
        engine.reset()
        (answer,) = engine.generate([request])
        served = engine.metric(EXTERNAL_HITS) - before
        assert answer.cached == served <= tokens
        if served == tokens:
            return answer, misses
    raise AssertionError(f"{served:.0f} tokens came from kvferry instead of {tokens}; {engine.log[-4000:]}")
