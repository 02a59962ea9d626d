"""Too little of everything: KV space that makes vLLM preempt, a host and a disk tier that must evict."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine import Engine, Engines
from first_life import UNCACHED_TOKENS
from prompts import PROMPTS, Prompt
from reference import EXTERNAL_HITS

MIB = 1 << 20


@pytest.fixture(scope="module")
def preempting(engines: Engines, tiny: Path, uncached: dict[Prompt, tuple[int, ...]]) -> Engine:
    """An engine with pages for some five prompts that is asked to run sixteen at once."""
    return engines.start(
        "preempting",
        tiny,
        kvferry={"host": {"capacity": "256MiB"}},
        block_size=32,
        num_gpu_blocks_override=72,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=256,
    )


@pytest.fixture(scope="module")
def evicting(
    engines: Engines,
    tiny: Path,
    uncached: dict[Prompt, tuple[int, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    """Without vLLM's own prefix cache, with a host tier of 16 blocks and a disk tier of some 40."""
    disk = {
        "type": "disk",
        "path": str(tmp_path_factory.mktemp("disk")),
        "capacity": 24 * MIB,
        "ask": "always",
    }
    return engines.start(
        "evicting",
        tiny,
        kvferry={"host": {"capacity": 8 * MIB}, "tiers": [disk]},
        enable_prefix_caching=False,
    )


def test_preempted_requests_say_what_the_uncached_engine_says(
    preempting: Engine, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    for round_ in range(3):
        chosen = random.Random(round_).choices(PROMPTS, k=64)
        requests = [{"tokens": prompt, "max_tokens": UNCACHED_TOKENS} for prompt in chosen]
        answers = preempting.generate(requests, together=True)
        assert [answer.tokens for answer in answers] == [uncached[prompt] for prompt in chosen]
    assert preempting.metric("vllm:num_preemptions_total") > 0
    assert preempting.metric(EXTERNAL_HITS) > 0
    preempting.settle(block_tokens=64)


def test_evicting_tiers_never_serve_a_wrong_block(
    evicting: Engine, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    rng = random.Random(7)
    chosen = rng.choices(PROMPTS[:60], k=240)
    answers = evicting.generate([{"tokens": prompt} for prompt in chosen])
    for prompt, answer in zip(chosen, answers, strict=True):
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]
    evicting.settle()
    metrics = evicting.metrics()
    for tier in ("host", "disk"):
        assert metrics[f"kvferry_hit_tokens_total{{tier={tier}}}"] > 0
        assert metrics[f"kvferry_evictions_total{{tier={tier}}}"] > 0
        capacity = metrics[f"kvferry_tier_capacity_bytes{{tier={tier}}}"]
        assert 0 < metrics[f"kvferry_tier_used_bytes{{tier={tier}}}"] <= capacity


def test_everything_is_served_without_vllms_own_prefix_cache(evicting: Engine) -> None:
    metrics = evicting.metrics()
    assert metrics.get("vllm:prefix_cache_hits_total", 0) == 0
    assert metrics[EXTERNAL_HITS] > 0
