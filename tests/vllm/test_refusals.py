"""Wrong input: a start that is refused with one clear line, or a tier left out and an engine that serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import Engine, EngineRefused, Engines
from first_life import FirstLife
from prompts import PROMPTS, Prompt
from reference import EXTERNAL_HITS

SOME = PROMPTS[:20]


def flip_slabs(directory: Path) -> None:
    """Invert a byte in every 4 KiB of every slab."""
    for slab in directory.glob("slab*"):
        with slab.open("r+b") as file:
            content = bytearray(file.read())
            content[1000::4096] = bytes(byte ^ 0xFF for byte in content[1000::4096])
            file.seek(0)
            file.write(content)


def truncate_slabs(directory: Path) -> None:
    for slab in directory.glob("slab*"):
        with slab.open("r+b") as file:
            file.truncate(slab.stat().st_size // 3)


def garble_manifest(directory: Path) -> None:
    (directory / "kvferry-disk.json").write_text("not a manifest")


def move_to_the_future(directory: Path) -> None:
    path = directory / "kvferry-disk.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kvferry_disk": 99}))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip_slabs,
    "truncated": truncate_slabs,
    "garbled": garble_manifest,
    "future": move_to_the_future,
}
"""Tier name -> what was done to its directory, a copy of a good one."""


@pytest.fixture(scope="module")
def damaged(
    engines: Engines, tiny: Path, first_life: FirstLife, tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    engines.close()
    base = tmp_path_factory.mktemp("damaged")
    tiers: list[dict[str, object]] = []
    for name, damage in DAMAGE.items():
        shutil.copytree(first_life.disk, base / name)
        damage(base / name)
        tiers.append({"type": "disk", "name": name, "path": str(base / name), "capacity": "512MiB"})
    tiers.append({"type": "disk", "name": "unwritable", "path": "/sys/kvferry", "capacity": "512MiB"})
    return engines.start("damaged", tiny, kvferry={"host": {"capacity": "8MiB"}, "tiers": tiers})


def test_damaged_disks_never_change_an_answer(
    damaged: Engine, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    for prompt in SOME:
        damaged.reset()
        (answer,) = damaged.generate([{"tokens": prompt}])
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]
    damaged.settle()
    metrics = damaged.metrics()
    assert metrics["kvferry_refusals_total{reason=checksum,tier=flipped}"] > 0


@pytest.mark.parametrize("name", ["garbled", "future", "unwritable"])
def test_a_disk_that_cannot_be_used_is_left_out_with_one_clear_line(damaged: Engine, name: str) -> None:
    lines = [line for line in damaged.log.splitlines() if f"tier '{name}' is left out" in line]
    assert len(lines) == 1
    assert "cannot be opened" in lines[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hots": {"capacity": "8MiB"}}, "hots: unknown key"),
        ({"host": {"capacity": "600KiB"}}, "host.capacity"),
    ],
)
def test_a_wrong_configuration_refuses_the_start(
    engines: Engines, tiny: Path, wrong: dict[str, object], said: str
) -> None:
    with pytest.raises(EngineRefused) as refused:
        engines.start("refused", tiny, kvferry=wrong)
    lines = [line for line in str(refused.value).splitlines() if "kvferry cannot start" in line]
    assert lines
    assert all(said in line for line in lines)


def test_a_kv_space_below_one_block_runs_without_kvferry(
    engines: Engines, tiny: Path, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    engine = engines.start(
        "small-kv-space",
        tiny,
        kvferry={"host": {"capacity": "8MiB"}, "block_tokens": 512},
        block_size=32,
        num_gpu_blocks_override=10,
        max_model_len=256,
    )
    assert "kvferry is off on rank 0" in engine.log
    short = [prompt for prompt in PROMPTS if len(prompt) < 200][:5]
    answers = engine.generate([{"tokens": prompt} for prompt in short])
    for prompt, answer in zip(short, answers, strict=True):
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]
    assert engine.metric(EXTERNAL_HITS) == 0
