"""Whose blocks are whose: salts, adapters and other weights never meet, and every request's record says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import lora_adapter, tiny_llama
from engine import Answer, Engine, Engines, wait_until
from first_life import FirstLife
from prompts import PROMPTS, matched
from reference import EXTERNAL_HITS, kvferry_hits, local_hits

from kvferry.connector.explain import RequestRecord, read_records

PROMPT = max(PROMPTS, key=len)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [lora_adapter(directory / f"adapter-{seed}", seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def engine(engines: Engines, tiny: Path, first_life: FirstLife, records: Path) -> Engine:
    return engines.start(
        "isolation",
        tiny,
        kvferry={"host": {"capacity": "64MiB"}, "explain": {"directory": str(records)}},
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        enable_prompt_embeds=True,
    )


def ask(engine: Engine, **request: Any) -> Answer:
    """Complete one request, with vLLM's own prefix cache empty."""
    engine.reset()
    (answer,) = engine.generate([{"tokens": PROMPT, **request}])
    return answer


def test_a_salt_sees_only_its_own_blocks(engine: Engine) -> None:
    for salt in ("one", "two"):
        assert ask(engine, salt=salt).cached == 0
        assert ask(engine, salt=salt).cached == matched(PROMPT)
    assert ask(engine).cached == 0
    assert ask(engine).cached == matched(PROMPT)


def test_an_adapter_sees_only_its_own_blocks(engine: Engine, adapters: list[Path]) -> None:
    plain = ask(engine)
    for number, path in enumerate(adapters, start=1):
        adapter = (f"adapter {number}", number, str(path))
        first = ask(engine, adapter=adapter)
        assert first.cached == 0
        assert first.tokens != plain.tokens, "the adapter changes what the model says"
        expected = local_hits(engine, [PROMPT], adapter=adapter)
        assert kvferry_hits(engine, [PROMPT], adapter=adapter) == expected
    assert ask(engine).logprobs == plain.logprobs


def test_prompt_embeddings_pass_through_and_the_record_says_why(engine: Engine, records: Path) -> None:
    answers = []
    before = engine.metric(EXTERNAL_HITS)
    for _ in range(2):
        engine.reset()
        answers += engine.generate([{"embeds": [300, 256, 5]}])
    assert answers[0] == answers[1]
    assert answers[0].cached == 0
    assert engine.metric(EXTERNAL_HITS) == before

    def passed() -> list[RequestRecord]:
        return [record for record in read_records(records).records if record.passed]

    wait_until("both records are written", lambda: len(passed()) == 2)
    assert {record.passed for record in passed()} == {"prompt embeddings"}
    assert {record.outcome for record in passed()} == {"passed"}


def test_records_tell_hits_from_misses(engine: Engine, records: Path) -> None:
    engine.settle()
    outcomes = [record.outcome for record in read_records(records).records]
    assert {"hit", "miss", "passed"} <= set(outcomes)
    hits = [record for record in read_records(records).records if record.outcome == "hit"]
    assert {record.loaded_tokens for record in hits} == {matched(PROMPT)}
    assert {tier for record in hits for tier in record.matched_tokens} == {"host"}


def test_other_weights_are_refused_the_disk_and_the_engine_serves(
    engines: Engines, engine: Engine, first_life: FirstLife, tmp_path: Path
) -> None:
    """The same configuration, shapes and model name: only the weights differ."""
    disk = {"type": "disk", "path": str(first_life.disk), "capacity": "512MiB", "ask": "always"}
    other = engines.start(
        "other-weights",
        tiny_llama(tmp_path / "tiny", seed=1),
        kvferry={"host": {"capacity": "64MiB"}, "tiers": [disk]},
    )
    assert "tier 'disk' is left out" in other.log
    for prompt in PROMPTS[:10]:
        other.reset()
        (answer,) = other.generate([{"tokens": prompt}])
        assert answer.tokens != first_life.hits[prompt].tokens
    assert other.metric("kvferry_hit_tokens_total{tier=disk}") == 0
    some = PROMPTS[10:20]
    expected = local_hits(other, some)
    assert kvferry_hits(other, some) == expected, "its own blocks it does serve"
