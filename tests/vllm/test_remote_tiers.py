"""Redis and S3 as the only tier below the arena: engines share them, and no trouble of theirs is the engine's.

What a request waits is taken from its record, which kvferry writes when the request is over.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine import Engine, EngineRefused, Engines, wait_until
from first_life import FirstLife
from prompts import BLOCK, PROMPTS, Prompt, random_tokens
from reference import kvferry_hits, wait_until_stored
from remote import KINDS, RedisRemote, Remote
from test_faults import check

from kvferry.connector.explain import RequestRecord, read_records

SOME = PROMPTS[:60]
DEADLINE_S = 1.0
"""Both of a call to the server, and of a request that waits."""
STORE_DEADLINE_S = 30.0
"""Where everything has to be stored, however slow the machine is."""
SLACK_S = 1.0
"""For a step of an engine on a busy machine, at whose end a deadline is noticed."""
FROZEN_S = 30.0
RESUME_S = 150.0
"""A paused tier is tried again after at most a minute."""


@pytest.fixture(scope="module", params=sorted(KINDS))
def remote(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    server = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


def configuration(remote: Remote, records: Path, **changes: Any) -> dict[str, Any]:
    """A host tier of 16 blocks: nearly everything comes from the server, within a short deadline."""
    tier = remote.tier() | {"deadline_s": DEADLINE_S, "ask": "always", "admission": "always"} | changes
    return {
        "host": {"capacity": "8MiB"},
        "tiers": [tier],
        "load_deadline_s": DEADLINE_S,
        "retry_failed_s": 1.0,
        "explain": {"directory": str(records)},
    }


@pytest.fixture(scope="module")
def second(engines: Engines, tiny: Path, first_life: FirstLife, remote: Remote, records: Path) -> Engine:
    """An engine on an empty host, after another engine filled the server."""
    patient = configuration(remote, records, deadline_s=STORE_DEADLINE_S, queue_blocks=1024)
    patient["host"]["capacity"] = "256MiB"
    first = engines.start(f"{remote.name}-first", tiny, kvferry=patient)
    # One after the other, as in the first life: batches of other sizes round otherwise.
    first.generate([{"tokens": prompt} for prompt in SOME])
    wait_until_stored(first, SOME, remote.name)
    return engines.start(f"{remote.name}-second", tiny, kvferry=configuration(remote, records))


def loaded(engine: Engine, remote: Remote) -> float:
    engine.generate([{"tokens": [2, 3], "max_tokens": 1}])  # so that the counters are younger than the work
    return engine.metric(f"kvferry_loaded_blocks_total{{tier={remote.name}}}")


def hits_resume(engine: Engine, remote: Remote, first_life: FirstLife) -> None:
    """Answer the same prompts, rightly each time, until they come from the server again."""
    turns = itertools.cycle(SOME[:20])
    before = loaded(engine, remote)

    def is_serving() -> bool:
        some = list(itertools.islice(turns, 10))
        engine.reset()
        check(first_life, some, engine.generate([{"tokens": prompt} for prompt in some]))
        return loaded(engine, remote) > before

    wait_until("hits resume", is_serving, RESUME_S)


def longest_wait_s(records: Path, since: float) -> float:
    """Return how long a request that arrived after ``since`` waited for the server at most."""

    def recent() -> list[RequestRecord]:
        return [record for record in read_records(records, last=10_000).records if record.arrived >= since]

    wait_until("records are written", recent)
    return max(record.wait_ms for record in recent()) / 1e3


def test_an_engine_on_an_empty_host_reuses_what_another_one_stored(
    second: Engine, first_life: FirstLife, remote: Remote, uncached: dict[Prompt, tuple[int, ...]]
) -> None:
    answers = kvferry_hits(second, SOME)
    assert answers == {prompt: first_life.hits[prompt] for prompt in SOME}, (
        "bit for bit, log-probabilities too"
    )
    for prompt, answer in answers.items():
        assert answer.tokens == uncached[prompt][: len(answer.tokens)]
    assert loaded(second, remote) > 100
    second.settle()


def test_a_server_killed_in_mid_load_costs_hits_and_nothing_else(
    second: Engine, first_life: FirstLife, remote: Remote, records: Path
) -> None:
    second.reset()
    since = time.time()
    before = remote.written_bytes()
    with ThreadPoolExecutor(1, "answers") as threads:
        answers = threads.submit(second.generate, [{"tokens": prompt} for prompt in SOME], together=True)
        wait_until("the server is delivering", lambda: remote.written_bytes() > before + (1 << 20))
        remote.kill()
        check(first_life, SOME, answers.result())
    assert longest_wait_s(records, since) < DEADLINE_S + SLACK_S
    second.reset()
    check(first_life, SOME, second.generate([{"tokens": prompt} for prompt in SOME]))
    remote.start()
    hits_resume(second, remote, first_life)
    second.settle()


def test_a_server_frozen_for_half_a_minute_costs_hits_and_nothing_else(
    second: Engine, first_life: FirstLife, remote: Remote, records: Path
) -> None:
    since = time.time()
    turns = itertools.cycle(SOME)
    with remote.frozen():
        end = time.monotonic() + FROZEN_S
        while time.monotonic() < end:
            some = list(itertools.islice(turns, 5))
            second.reset()
            check(first_life, some, second.generate([{"tokens": prompt} for prompt in some], together=True))
    assert longest_wait_s(records, since) < DEADLINE_S + SLACK_S
    hits_resume(second, remote, first_life)
    second.settle()


def test_a_full_server_takes_nothing_and_serves_on(
    second: Engine, first_life: FirstLife, remote: Remote
) -> None:
    if not isinstance(remote, RedisRemote):
        pytest.skip("an S3 store that is full is tested at the tier, on a server with a few small volumes")
    rng = random.Random(7)
    stored = f"kvferry_stored_blocks_total{{tier={remote.name}}}"

    def save_new() -> float:
        second.generate([{"tokens": random_tokens(rng, 2 * BLOCK + 5)} for _ in range(4)])
        return second.metric(stored)

    def refused() -> float:
        save_new()
        return second.metric(f"kvferry_no_room_stores_total{{tier={remote.name}}}")

    remote.fill_up()
    some = wait_until("blocks are refused", refused)
    full = second.metric(stored)
    wait_until("more blocks are refused", lambda: refused() > some)
    assert second.metric(stored) == full
    hits_resume(second, remote, first_life)
    remote.make_room()
    wait_until("stores resume", lambda: save_new() > full, RESUME_S)
    second.settle()


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("redis", {"username": "nobody", "password": "a wrong one"}, "tiers.redis"),
        ("redis", {"tls": True}, "tiers.redis"),
        ("s3", {"secret_access_key": "a wrong one"}, "tiers.s3"),
        ("s3", {"bucket": "no-such-bucket"}, "tiers.s3"),
    ],
)
def test_a_mistake_in_the_access_is_one_clear_error_at_the_start(
    engines: Engines,
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    wrong: dict[str, Any],
    said: str,
) -> None:
    server = KINDS[name](tmp_path_factory.mktemp(f"wrong-{name}"))
    tier = server.tier() | wrong
    if tier.pop("tls", False):
        tier["url"] = tier["url"].replace("redis://", "rediss://")
    try:
        with pytest.raises(EngineRefused) as refused:
            engines.start("refused", tiny, kvferry={"host": {"capacity": "8MiB"}, "tiers": [tier]})
    finally:
        server.kill()
    lines = [line for line in str(refused.value).splitlines() if "kvferry cannot start" in line]
    assert lines
    assert all(said in line for line in lines)
    assert "a wrong one" not in str(refused.value)
