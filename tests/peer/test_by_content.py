"""Handoff without a word: when P has answered, what it computed is found by whoever shares its cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cache_server import CacheServer
from pair import Pair, Reference, running
from prompts import random_tokens
from redis_server import RedisServer
from serving import BLOCK

ROUNDS = 30


@pytest.fixture(scope="module", params=["server", "redis"])
def tier(request: pytest.FixtureRequest) -> str:
    """Where D finds what P computed: in the server's arena, or in the tier both have."""
    return {"server": "host", "redis": "redis"}[request.param]


@pytest.fixture(scope="module")
def pair(tier: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("shared")
    with ExitStack() as stack:
        config: dict[str, Any] = {"explain": {"enabled": False}}
        if tier == "host":
            cache = stack.enter_context(CacheServer(directory, {"host": {"capacity": "64MiB"}}))
            config |= {"service": cache.unix}
        else:
            server = RedisServer(directory)
            stack.callback(server.kill)
            # Whatever can be had is taken: so small a model computes a block sooner than it comes.
            shared = {"type": "redis", "url": server.url, "ask": "always", "admission": "always"}
            config |= {"host": {"capacity": "64MiB"}, "tiers": [shared]}
        engines = stack.enter_context(running(model, directory, {"kvferry": config}, {"kvferry": config}))
        yield engines
        engines.settle()


def test_as_soon_as_the_prefill_has_answered_every_block_is_a_hit(
    pair: Pair, tier: str, reference: Reference
) -> None:
    rng = random.Random(1)
    asked = [random_tokens(rng, rng.randint(1, 8) * BLOCK + rng.randint(1, BLOCK - 1)) for _ in range(ROUNDS)]
    reference.learn(asked)
    before = pair.taken()
    found = []
    for prompt in asked:
        prefill = pair.prefill.ask(prompt, 1)
        decode = pair.decode.ask(prompt)
        assert prefill.params is None
        assert prefill.tokens + decode.tokens[1:] == decode.tokens == reference(prompt)
        found.append(decode.cached)
    assert found == [len(prompt) // BLOCK * BLOCK for prompt in asked]
    taken = pair.taken().since(before)
    assert taken.tokens == {tier: sum(len(prompt) // BLOCK * BLOCK for prompt in asked)}
    assert taken.handoffs == 0
    pair.free()


def test_a_prompt_that_nobody_prefilled_is_computed(pair: Pair, reference: Reference) -> None:
    """The control."""
    prompt = random_tokens(random.Random(2), 300)
    reply = pair.decode.ask(prompt)
    assert reply.cached == 0
    assert reply.tokens == reference(prompt)
