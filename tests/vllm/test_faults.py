"""Faults in every call of a tier and in the workers: a miss each time, never another answer, nothing leaked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import Answer, Engine, Engines
from first_life import FirstLife
from prompts import PROMPTS, Prompt, random_tokens
from reference import EXTERNAL_HITS

ROUNDING = 1e-3
"""How far a log-probability may move when a prompt is computed in other portions; seen: below 1e-5."""


@pytest.fixture(scope="module")
def faulty(
    engines: Engines, tiny: Path, first_life: FirstLife, tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    """A host tier of 16 blocks above a disk of which one call in eight goes wrong, and a tier that dies."""
    disk = {"type": "disk", "path": str(tmp_path_factory.mktemp("disk")), "capacity": 256 << 20}
    limits = {"deadline_s": 0.4, "queue_blocks": 64, "ask": "always"}
    broken = {"type": "faulty", "inner": disk, "rate": 0.125, "seed": 1, "slow_s": 0.8}
    dying = {"type": "faulty", "name": "dying", "inner": {"type": "memory"}, "rate": 0, "die_after": 40}
    return engines.start(
        "faulty-tiers",
        tiny,
        kvferry={
            "host": {"capacity": "8MiB"},
            "tiers": [broken | limits, dying | limits],
            "plugins": ["faulty"],
            "load_deadline_s": 1.0,
            "retry_failed_s": 1.0,
        },
    )


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steers ``slow_copies``."""
    return tmp_path_factory.mktemp("copies") / "how"


@pytest.fixture(scope="module")
def slow(engines: Engines, tiny: Path, first_life: FirstLife, copies: Path, faulty: Engine) -> Engine:
    """An engine with pages for some ten prompts, whose copies can be slowed down."""
    return engines.start(
        "slow-copies",
        tiny,
        kvferry={"host": {"capacity": "256MiB"}},
        kv_transfer={"kv_connector_module_path": "slow_copies"},
        env={"COPIES": str(copies)},
        block_size=32,
        num_gpu_blocks_override=128,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=256,
    )


@pytest.fixture
def disturb(copies: Path) -> Iterator[Path]:
    yield copies
    copies.unlink(missing_ok=True)


def check(first_life: FirstLife, prompts: list[Prompt], answers: list[Answer]) -> None:
    """Every answer has the reference's tokens, and log-probabilities within rounding of it."""
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = first_life.hits[prompt]
        assert answer.tokens == expected.tokens
        for place, expected_place in zip(answer.logprobs, expected.logprobs, strict=True):
            assert dict(place) == pytest.approx(dict(expected_place), abs=ROUNDING)


def test_a_fault_in_every_tier_call_never_changes_an_answer(faulty: Engine, first_life: FirstLife) -> None:
    rng = random.Random(11)
    for _ in range(2):
        for prompt in rng.sample(PROMPTS, len(PROMPTS)):
            answers = faulty.generate([{"tokens": prompt}])
            check(first_life, [prompt], answers)
            if rng.random() < 0.5:
                faulty.reset()
    faulty.settle()
    metrics = faulty.metrics()
    assert metrics["kvferry_hit_tokens_total{tier=faulty}"] > 0
    assert metrics["kvferry_failed_loads_total{tier=faulty}"] > 0
    assert metrics["kvferry_failed_stores_total{tier=faulty}"] > 0
    assert sum(value for name, value in metrics.items() if name.startswith("kvferry_refusals_total")) > 0
    assert metrics["kvferry_breaker_state{tier=dying}"] > 0


def aborting(rng: random.Random, prompts: list[Prompt], within_s: float) -> list[dict[str, Any]]:
    """Requests of which every second one is aborted at a random moment."""
    return [
        {"tokens": prompt} | ({"abort_s": rng.random() * within_s} if index % 2 else {})
        for index, prompt in enumerate(prompts)
    ]


def test_requests_aborted_while_they_are_saved_leave_nothing_behind(
    slow: Engine, first_life: FirstLife, disturb: Path
) -> None:
    disturb.write_text("gather 0.02")
    rng = random.Random(12)
    for _ in range(3):
        assert slow.generate_aborting(aborting(rng, PROMPTS[:40], 2.0)) > 0
    disturb.unlink()
    slow.settle(block_tokens=64)
    check(first_life, PROMPTS[:40], slow.generate([{"tokens": prompt} for prompt in PROMPTS[:40]]))


def test_requests_aborted_while_they_are_loaded_leave_nothing_behind(
    slow: Engine, first_life: FirstLife, disturb: Path
) -> None:
    slow.generate([{"tokens": prompt} for prompt in PROMPTS[:40]])
    disturb.write_text("scatter 0.02")
    rng = random.Random(13)
    before = slow.metric(EXTERNAL_HITS)
    for _ in range(3):
        slow.reset()
        assert slow.generate_aborting(aborting(rng, PROMPTS[:40], 2.0)) > 0
    assert slow.metric(EXTERNAL_HITS) > before
    disturb.unlink()
    slow.settle(block_tokens=64)
    check(first_life, PROMPTS[:40], slow.generate([{"tokens": prompt} for prompt in PROMPTS[:40]]))


def test_pages_reused_under_slow_saves_are_saved_right(
    slow: Engine, first_life: FirstLife, disturb: Path
) -> None:
    """Blocks that were gathered late, from pages that the engine wanted back."""
    slow.clear()
    disturb.write_text("gather 0.02")
    some = PROMPTS[60:120]
    slow.generate([{"tokens": prompt} for prompt in some], together=True)
    disturb.unlink()
    slow.settle(block_tokens=64)
    before = slow.metric(EXTERNAL_HITS)
    for prompt in some:
        slow.reset()
        check(first_life, [prompt], slow.generate([{"tokens": prompt}]))
    assert slow.metric(EXTERNAL_HITS) > before


def test_pages_that_loads_reuse_under_slow_saves_are_saved_right(
    slow: Engine, first_life: FirstLife, disturb: Path
) -> None:
    """Pages that were given back before they were saved take what another request loads, with a thread for each."""
    slow.clear()
    known, others = PROMPTS[:30], PROMPTS[60:100]
    slow.generate([{"tokens": prompt} for prompt in known])
    slow.settle(block_tokens=64)
    before = slow.metric(EXTERNAL_HITS)
    disturb.write_text("gather 0.02")
    mixed = [prompt for pair in zip(others, [*known, *others[:10]], strict=True) for prompt in pair]
    check(first_life, mixed, slow.generate([{"tokens": prompt} for prompt in mixed], together=True))
    assert slow.metric(EXTERNAL_HITS) > before
    disturb.unlink()
    slow.settle(block_tokens=64)
    for prompt in known + others:
        slow.reset()
        check(first_life, [prompt], slow.generate([{"tokens": prompt}]))


def test_a_hit_does_not_wait_for_what_is_being_saved(
    slow: Engine, first_life: FirstLife, disturb: Path
) -> None:
    slow.clear()
    known = PROMPTS[0]
    slow.generate([{"tokens": known}])
    slow.settle(block_tokens=64)
    disturb.write_text("gather hold")
    slow.generate([{"tokens": random_tokens(random.Random(14), 4 * 64 + 5)}])
    before = slow.metric(EXTERNAL_HITS)
    check(first_life, [known], slow.generate([{"tokens": known}]))
    assert slow.metric(EXTERNAL_HITS) > before
    slow.wait_for_metric("kvferry_reservations")
    disturb.unlink()
    slow.settle(block_tokens=64)


def test_a_worker_that_cannot_copy_switches_kvferry_off_and_the_engine_goes_on(
    slow: Engine, first_life: FirstLife, disturb: Path
) -> None:
    disturb.write_text("gather fail")
    slow.clear()
    check(first_life, PROMPTS[:20], slow.generate([{"tokens": prompt} for prompt in PROMPTS[:20]]))
    slow.reset()
    before = slow.metric(EXTERNAL_HITS)
    check(first_life, PROMPTS[:20], slow.generate([{"tokens": prompt} for prompt in PROMPTS[:20]]))
    assert slow.metric(EXTERNAL_HITS) == before
    assert slow.log.count("kvferry is off, the engine goes on without it") == 1
    slow.settle(block_tokens=64)
