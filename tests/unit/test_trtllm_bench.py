"""The query's bench measures queries that find something."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.connector.bench.case import BenchContext
from kvferry.engines.trtllm import bench, plugin


def test_the_query_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_PROMPTS_TOKENS", (512,))
    (case,) = plugin.kvferry_bench_cases()
    parts: list[float] = []
    figures = case.run(BenchContext(quick=True, scratch=str(tmp_path), progress=parts.append))
    assert [(figure.unit, figure.value > 0, figure.goal is None) for figure in figures] == [
        ("ms", True, True),
        ("ms", True, False),
    ]
    assert parts == sorted(parts)
    assert parts[-1] == 1


def test_what_prompts_share_is_offered(tmp_path: Path) -> None:
    engine = bench._PlayedEngine(tmp_path, 512)
    try:
        engine.request(list(range(512)))
        assert engine.offered_tokens == 0
        engine.request([*range(256), *range(1000, 1256)])
        assert engine.offered_tokens == 256
    finally:
        engine.close()
