"""What the tests on the real engine share: a checkpoint, engines one at a time, and two bodies of answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import tiny_llama
from engine import Engines
from first_life import UNCACHED_TOKENS, FirstLife
from prompts import PROMPTS, Prompt
from reference import local_hits


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    started = Engines(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose output depends strongly on its KV."""
    return tiny_llama(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def uncached(engines: Engines, tiny: Path) -> dict[Prompt, tuple[int, ...]]:
    """The greedy tokens that follow every prompt, from an engine without any cache, in float32."""
    engine = engines.start("uncached", tiny, enable_prefix_caching=False)
    requests = [{"tokens": prompt, "max_tokens": UNCACHED_TOKENS} for prompt in PROMPTS]
    answers = engine.generate(requests, together=True)
    assert {answer.cached for answer in answers} == {0}
    assert min(answer.lead for answer in answers) > 1e-5, "rounding must not choose a token"
    return {prompt: answer.tokens for prompt, answer in zip(PROMPTS, answers, strict=True)}


@pytest.fixture(scope="session")
def first_life(
    engines: Engines,
    tiny: Path,
    uncached: dict[Prompt, tuple[int, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> FirstLife:
    """Let an engine with kvferry see every prompt twice, the second time from vLLM's own prefix cache."""
    disk = tmp_path_factory.mktemp("disk")
    tampering = tmp_path_factory.mktemp("tampering") / "mode"
    engine = engines.start(
        "first-life",
        tiny,
        kvferry={
            "host": {"capacity": "256MiB"},
            "tiers": [{"type": "disk", "path": str(disk), "capacity": "512MiB", "ask": "always"}],
            "plugins": ["tampering"],
        },
        env={"TAMPERING": str(tampering)},
    )
    return FirstLife(engine, local_hits(engine, PROMPTS), disk, tampering)
