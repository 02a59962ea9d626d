"""The measurements of the cache server run and yield figures; how large they are is no matter for a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.connector.bench import local_redis
from kvferry.connector.bench.case import Figure
from kvferry.connector.bench.run import all_cases, run_case
from kvferry.connector.registry import PluginRegistry


def figures(name: str, scratch: Path) -> list[Figure]:
    (case,) = [one for one in all_cases(PluginRegistry()) if one.name == name]
    parts: list[float] = []
    result = run_case(case, True, str(scratch), parts.append)
    assert result.skipped == ""
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1)
    assert all(figure.value > 0 and figure.unit for figure in result.figures)
    return list(result.figures)


def test_a_local_engine_is_held_against_memcpy(tmp_path: Path) -> None:
    (figure,) = figures("server-map", tmp_path)
    assert figure.raw_name == "memcpy"
    assert figure.goal is not None


def test_a_streaming_client_is_held_against_a_plain_socket(tmp_path: Path) -> None:
    found = figures("server-stream", tmp_path)
    assert [figure.raw_name for figure in found] == ["socket"] * 4
    assert [figure.goal is not None for figure in found] == [False, True] * 2


def test_lookups_are_held_against_redis(tmp_path: Path) -> None:
    found = figures("server-lookup", tmp_path)
    assert [figure.unit for figure in found] == ["/s", "ms", "ms"]
    assert all(figure.raw and not figure.note for figure in found)


def test_without_a_redis_server_only_our_figures_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_redis, "find_server", lambda: None)
    found = figures("server-lookup", tmp_path)
    assert all(figure.raw is None for figure in found)
    assert {figure.note for figure in found} == {"no valkey-server or redis-server to compare with"}


def test_a_server_that_does_not_start_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.connector.bench.serving._MAIN", "raise SystemExit('no such thing')")
    (case,) = [one for one in all_cases(PluginRegistry()) if one.name == "server-map"]
    result = run_case(case, True, str(tmp_path), lambda part: None)
    assert "did not start: no such thing" in result.skipped
    assert result.figures == ()
