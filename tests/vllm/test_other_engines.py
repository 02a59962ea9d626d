"""What one engine left on disk is read by the next: after a restart, with another tensor-parallel or page size."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import Engine, Engines
from first_life import FirstLife
from prompts import BLOCK, PROMPTS, Prompt
from reference import kvferry_hits, local_hits

SOME = PROMPTS[:40]
SALT = "two ranks"


def _on_disk(first_life: FirstLife) -> dict[str, object]:
    """The first engine's disk, and a host tier of 16 blocks: nearly everything comes from the disk."""
    disk = {"type": "disk", "path": str(first_life.disk), "capacity": "512MiB", "ask": "always"}
    return {"host": {"capacity": "8MiB"}, "tiers": [disk]}


@pytest.fixture(scope="module")
def two_ranks(engines: Engines, tiny: Path, first_life: FirstLife) -> Engine:
    return engines.start("two-ranks", tiny, kvferry=_on_disk(first_life), tensor_parallel_size=2)


@pytest.fixture(scope="module")
def second_life(engines: Engines, tiny: Path, first_life: FirstLife, two_ranks: Engine) -> Engine:
    return engines.start("second-life", tiny, kvferry=_on_disk(first_life))


def test_two_ranks_read_what_one_wrote(two_ranks: Engine, uncached: dict[Prompt, tuple[int, ...]]) -> None:
    for prompt, answer in kvferry_hits(two_ranks, SOME).items():
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]


def test_hits_of_two_ranks_are_those_of_their_local_cache(two_ranks: Engine) -> None:
    expected = local_hits(two_ranks, SOME, salt=SALT)
    assert kvferry_hits(two_ranks, SOME, salt=SALT) == expected
    two_ranks.settle()


def test_one_rank_reads_what_two_wrote(second_life: Engine, uncached: dict[Prompt, tuple[int, ...]]) -> None:
    for prompt, answer in kvferry_hits(second_life, SOME, salt=SALT).items():
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]


def test_after_a_restart_the_disk_answers_bit_for_bit(second_life: Engine, first_life: FirstLife) -> None:
    some = PROMPTS[40:140]
    assert kvferry_hits(second_life, some) == {prompt: first_life.hits[prompt] for prompt in some}
    metrics = second_life.metrics()
    assert metrics["kvferry_evictions_total{tier=host}"] > 0, "the host tier held nearly nothing"
    assert metrics["kvferry_loaded_blocks_total{tier=disk}"] > 100
    second_life.settle()


def test_pages_of_another_size_are_filled_with_the_same_blocks(
    engines: Engines, tiny: Path, first_life: FirstLife, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    """Their kernel packs them otherwise: 32 tokens where the writer's had 128."""
    config = _on_disk(first_life) | {"block_tokens": BLOCK}
    small_pages = engines.start("small-pages", tiny, kvferry=config, block_size=BLOCK // 4)
    for prompt, answer in kvferry_hits(small_pages, SOME).items():
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]
    small_pages.settle()
