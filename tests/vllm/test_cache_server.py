"""Engines on a cache server: warm from one another, and right whatever is killed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cache_server import CacheServer
from engine import Engine, Engines, wait_until
from first_life import FirstLife
from prompts import BLOCK, PROMPTS, Prompt, full_blocks, random_tokens
from reference import EXTERNAL_HITS, kvferry_hits
from server import Server
from test_faults import check
from test_server import PROMPTS as DOCUMENTS
from test_server import smollm

__all__ = ["smollm"]

SOME = PROMPTS[:40]
TOKEN = "a token that only the tests know"
OTHERS_TOKEN = "a token of somebody else's"
RESUME_S = 120.0
NOBODY = {"tokens": [2, 3], "max_tokens": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheServer]:
    directory = tmp_path_factory.mktemp("cache-server")
    config = {
        "server": {"token": TOKEN},
        "tenants": [{"name": "others", "token": OTHERS_TOKEN}],
        "host": {"capacity": "256MiB"},
        "tiers": [{"type": "disk", "path": f"{directory}/disk", "capacity": "512MiB", "admission": "always"}],
    }
    with CacheServer(directory, config) as server:
        yield server


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def unix(cache: CacheServer, **extra: Any) -> dict[str, Any]:
    return {"service": cache.unix, "explain": {"enabled": False}, **extra}


@pytest.fixture(scope="module")
def first(
    engines: Engines, tiny: Path, first_life: FirstLife, cache: CacheServer, logs: Path
) -> Iterator[Engine]:
    """An engine that has put the blocks of ``SOME`` on the server."""
    engines.close()
    with Engine(tiny, logs / "first.log", kvferry=unix(cache)) as engine:
        blocks = full_blocks(SOME)

        def is_filled() -> bool:
            # One after the other, as in the first life: batches of other sizes round otherwise.
            engine.reset()
            engine.generate([{"tokens": prompt} for prompt in SOME])
            return pool(cache)["counters"]["host_blocks"] >= len(blocks)

        wait_until("every block is on the server", is_filled)
        yield engine
        assert "kvferry failed in" not in engine.log, engine.log


@pytest.fixture(scope="module")
def second(first: Engine, tiny: Path, cache: CacheServer, logs: Path) -> Iterator[Engine]:
    """An engine beside the first one, that has seen nothing."""
    with Engine(tiny, logs / "second.log", kvferry=unix(cache)) as engine:
        yield engine
        assert "kvferry failed in" not in engine.log, engine.log


def pool(cache: CacheServer, tenant: str = "") -> dict[str, Any]:
    (found,) = [one for one in cache.status()["pools"] if one["tenant"] == tenant]
    return found


def settle(cache: CacheServer, *engines: Engine) -> None:
    """Wait until the engines are through, and check that no slot, lease or reservation is left over."""

    def is_settled() -> bool:
        for engine in engines:
            engine.reset()
            engine.generate([NOBODY])
        now = pool(cache)
        counters = now["counters"]
        return (
            now["dead_writers"] == 0
            and counters["leases"] == counters["reservations"] == 0
            and counters["used_slots"] == counters["host_blocks"]
        )

    wait_until("nothing is left over", is_settled)


def hits_resume(engine: Engine, first_life: FirstLife) -> None:
    """Answer the same prompts, rightly each time, until they come from the server again."""
    turns = itertools.cycle(SOME)
    before = engine.metric(EXTERNAL_HITS)

    def is_serving() -> bool:
        some = list(itertools.islice(turns, 10))
        engine.reset()
        check(first_life, some, engine.generate([{"tokens": prompt} for prompt in some]))
        return engine.metric(EXTERNAL_HITS) > before

    wait_until("hits come back", is_serving, RESUME_S)


def test_the_second_engine_is_warm_from_the_first(
    second: Engine, first_life: FirstLife, uncached: dict[Prompt, tuple[int, ...]], cache: CacheServer
) -> None:
    answers = kvferry_hits(second, SOME)
    assert answers == {prompt: first_life.hits[prompt] for prompt in SOME}, "bit for bit"
    for prompt, answer in answers.items():
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]
    settle(cache, second)


def test_two_ranks_and_one_share_a_pool(
    first: Engine, tiny: Path, cache: CacheServer, logs: Path, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    with Engine(tiny, logs / "two-ranks.log", kvferry=unix(cache), tensor_parallel_size=2) as engine:
        for prompt, answer in kvferry_hits(engine, SOME[:20]).items():
            assert answer.tokens == uncached[prompt][: len(answer.tokens)]
        assert len(cache.status()["pools"]) == 1
    settle(cache, first)


def test_an_engine_elsewhere_streams_what_local_ones_stored(
    first: Engine, tiny: Path, first_life: FirstLife, cache: CacheServer, logs: Path
) -> None:
    remote = {
        "service": cache.tcp,
        "token": TOKEN,
        "host": {"capacity": "8MiB"},
        "explain": {"enabled": False},
    }
    with Engine(tiny, logs / "remote.log", kvferry=remote) as engine:
        hits_resume(engine, first_life)
        engine.wait_for_metric("kvferry_loaded_blocks_total{tier=remote}")
    settle(cache, first)


def test_another_tenant_finds_nothing(
    first: Engine, tiny: Path, first_life: FirstLife, cache: CacheServer, logs: Path
) -> None:
    with Engine(tiny, logs / "others.log", kvferry=unix(cache, token=OTHERS_TOKEN)) as engine:
        answers = engine.generate([{"tokens": prompt} for prompt in SOME[:10]])
        check(first_life, SOME[:10], answers)
        assert engine.metric(EXTERNAL_HITS) == 0
        assert pool(cache, "others")["counters"]["host_blocks"] > 0


@pytest.mark.parametrize("verb", ["gather", "scatter"])
def test_an_engine_killed_amid_its_copies_leaves_nothing_behind(
    first: Engine, tiny: Path, first_life: FirstLife, cache: CacheServer, logs: Path, verb: str
) -> None:
    copies = logs / f"copies-{verb}"
    doomed = Engine(
        tiny,
        logs / f"doomed-{verb}.log",
        kvferry=unix(cache),
        kv_transfer={"kv_connector_module_path": "slow_copies"},
        env={"COPIES": str(copies)},
    )
    try:
        doomed.generate([NOBODY])
        copies.write_text(f"{verb} 0.2")
        rng = random.Random(verb)
        prompts = SOME if verb == "scatter" else [random_tokens(rng, 3 * BLOCK + 5) for _ in range(20)]
        held = "leases" if verb == "scatter" else "reservations"
        with ThreadPoolExecutor(1, "answers") as threads:
            requests = [{"tokens": prompt, "max_tokens": 256} for prompt in prompts]
            answers = threads.submit(doomed.generate, requests, together=True)
            wait_until(f"it holds {held}", lambda: pool(cache)["counters"][held] > 0)
            doomed.kill()
            assert answers.exception() is not None, "killed before it had answered"
    finally:
        doomed.kill()
    first.reset()
    check(first_life, SOME[:20], first.generate([{"tokens": prompt} for prompt in SOME[:20]], together=True))
    settle(cache, first)


def test_a_server_killed_under_load_costs_hits_and_no_answer(
    first: Engine, second: Engine, first_life: FirstLife, cache: CacheServer
) -> None:
    engines = (first, second)
    for engine in engines:
        engine.reset()
    served = [engine.metric(EXTERNAL_HITS) for engine in engines]
    with ThreadPoolExecutor(2, "answers") as threads:
        requests = [{"tokens": prompt} for prompt in SOME * 3]
        answers = [threads.submit(engine.generate, requests, together=True) for engine in engines]
        wait_until("it holds leases", lambda: pool(cache)["counters"]["leases"] > 0)
        cache.kill()
        for answer in answers:
            check(first_life, SOME * 3, answer.result())
    for engine in engines:
        engine.reset()
        check(first_life, SOME[:10], engine.generate([{"tokens": prompt} for prompt in SOME[:10]]))
    cache.start()
    for engine, before in zip(engines, served, strict=True):
        hits_resume(engine, first_life)
        assert engine.metric(EXTERNAL_HITS) > before
    settle(cache, *engines)


def test_a_server_that_stops_in_order_is_found_again(
    first: Engine, second: Engine, first_life: FirstLife, cache: CacheServer
) -> None:
    cache.stop()
    first.reset()
    check(first_life, SOME[:5], first.generate([{"tokens": prompt} for prompt in SOME[:5]]))
    cache.start()
    hits_resume(first, first_life)
    hits_resume(second, first_life)
    assert pool(cache)["counters"]["tiers"]["disk"]["loaded_blocks"] > 0, "its disk was still warm"


def test_a_frozen_server_is_not_waited_for(first: Engine, first_life: FirstLife, cache: CacheServer) -> None:
    with cache.frozen():
        first.reset()
        check(first_life, SOME, first.generate([{"tokens": prompt} for prompt in SOME], together=True))
    hits_resume(first, first_life)
    settle(cache, first)


def test_a_real_model_is_warm_from_another_servers_answers(
    smollm: Path, tmp_path: Path, cache: CacheServer
) -> None:
    config = unix(cache)
    with (
        Server(smollm, tmp_path / "first", config) as first,
        Server(smollm, tmp_path / "second", config) as second,
    ):
        cold = [first.complete(prompt) for prompt in DOCUMENTS[:3]]
        local = [first.complete(prompt) for prompt in DOCUMENTS[:3]]
        reused = sum(cached for _, cached in local)

        def is_warm() -> bool:
            second.reset()
            before = second.metric("vllm:external_prefix_cache_hits_total")
            warm = [second.complete(prompt) for prompt in DOCUMENTS[:3]]
            assert [answer["text"] for answer, _ in warm] == [answer["text"] for answer, _ in cold]
            return warm == local and second.metric("vllm:external_prefix_cache_hits_total") - before == reused

        wait_until("every full block comes from the server, bit for bit", is_warm)
