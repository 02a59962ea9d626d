"""The exact reference of a hit: the same engine's own prefix cache, holding as many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import Answer, Engine
from prompts import BLOCK, Prompt, matched

EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"


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
    """Run prompts, each with vLLM's own prefix cache empty, so that every full block came from kvferry."""
    answers = {}
    before = engine.metric(EXTERNAL_HITS)
    for prompt in prompts:
        engine.reset()
        (answers[prompt],) = engine.generate([{"tokens": prompt, **request}])
    served = engine.metric(EXTERNAL_HITS) - before
    assert [answer.cached for answer in answers.values()] == [matched(prompt, block) for prompt in prompts]
    assert served == sum(matched(prompt, block) for prompt in prompts)
    return answers
