"""The exact reference of a hit: the same engine's own prefix cache, holding as many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import Answer, Engine, wait_until
from prompts import BLOCK, Prompt, full_blocks, matched

EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"
LATE_ANSWERS = "kvferry_server_late_answers_total"
FOR_WANT_OF_AN_ANSWER = (
    "kvferry_misses_total{reason=deadline}",
    "kvferry_misses_total{reason=tier_down}",
    "kvferry_requests_total{outcome=failed}",
)
"""Requests that a server was late for: with what it has, for more than a second, or with a lease."""
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

    A scheduler waits some milliseconds for a cache server's answer and then goes on without. Such a prompt is run
    again; a miss must have been counted as one of that kind, and an answer as late.
    """
    answers = {}
    misses = 0
    late, excused = engine.metric(LATE_ANSWERS), _excused(engine)
    for prompt in prompts:
        answers[prompt], missed = _run_until_hit(
            engine, {"tokens": prompt, **request}, matched(prompt, block)
        )
        misses += missed
    if misses:
        engine.wait_for_metric(LATE_ANSWERS, above=late)
        wait_until(f"{misses} misses are for want of an answer", lambda: _excused(engine) >= excused + misses)
    return answers


def _excused(engine: Engine) -> float:
    engine.generate([{"tokens": [2, 3], "max_tokens": 1}])
    metrics = engine.metrics()
    return sum(metrics.get(name, 0.0) for name in FOR_WANT_OF_AN_ANSWER)


def wait_until_stored(engine: Engine, prompts: Sequence[Prompt], *tiers: str) -> None:
    """Wait until each of these tiers has stored every full block of prompts."""
    blocks = len(full_blocks(prompts))

    def is_stored() -> bool:
        engine.generate([{"tokens": [2, 3], "max_tokens": 1}])
        return all(engine.metric(f"kvferry_stored_blocks_total{{tier={tier}}}") >= blocks for tier in tiers)

    wait_until("every block is stored", is_stored)


def _run_until_hit(engine: Engine, request: dict[str, Any], tokens: int) -> tuple[Answer, int]:
    """Return the answer for which kvferry had ``tokens`` tokens, and how often it had fewer before."""
    for misses in range(TRIES):
        before = engine.metric(EXTERNAL_HITS)
        engine.reset()
        (answer,) = engine.generate([request])
        served = engine.metric(EXTERNAL_HITS) - before
        assert answer.cached <= tokens
        if answer.cached == served == tokens:
            return answer, misses
    raise AssertionError(
        f"{served:.0f} tokens came from kvferry and {answer.cached} were reused instead of {tokens};"
        f" {engine.log[-4000:]}"
    )
