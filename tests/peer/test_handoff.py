"""Prefill on one engine, decode on another: the answers of a single engine, and the pages really handed over."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine import TOKEN_BYTES, wait_until
from pair import ASK, Pair, Reference, peer, running
from prompts import Prompt, random_tokens
from serving import BLOCK, PAGE, Reply, VllmServer
from speaking import words

from kvferry.connector.explain import read_records

LENGTHS = (
    *(5, PAGE - 1, PAGE, PAGE + 1),
    *(BLOCK - 1, BLOCK, BLOCK + 1, 3 * PAGE, 3 * PAGE + 7),
    *(10 * PAGE, 10 * PAGE + 1, 1000, 1900),
)


def prompts(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[Prompt]:
    rng = random.Random(seed)
    return [random_tokens(rng, length) for length in lengths]


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While it exists, P's pages are damaged."""
    return tmp_path_factory.mktemp("damage") / "lines"


@pytest.fixture(scope="module", params=["nixl", "socket"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(
    transport: str, model: Path, damage: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """NIXL is what both find by themselves. Over the socket, which they are told to use, D trusts what it gets."""
    told = {} if transport == "nixl" else {"transport": transport}
    with running(
        model,
        tmp_path_factory.mktemp(transport),
        {"kvferry": peer(**told), "module": "tampering_pages", "env": {"DAMAGE": str(damage)}},
        {"kvferry": peer(**told, verify=transport == "nixl")},
    ) as engines:
        yield engines
        engines.settle()


def test_answers_are_those_of_a_single_engine_and_no_prompt_is_computed_twice(
    pair: Pair, transport: str, reference: Reference
) -> None:
    asked = prompts(1)
    reference.learn(asked)
    before = pair.taken()
    for prompt in asked:
        handed = pair.hand_over(prompt)
        assert handed.prefill.tokens == reference(prompt, 1)
        assert handed.decode.tokens == reference(prompt)
        assert handed.decode.cached == len(prompt)
    taken = pair.taken().since(before)
    assert taken.handoffs == len(asked)
    assert taken.bytes >= sum(map(len, asked)) * TOKEN_BYTES
    assert taken.tokens == {"peer": sum(map(len, asked))}
    assert taken.failures == {}
    pair.free()
    assert f"read through {transport}" in pair.decode.log


def test_a_prompt_handed_over_again_is_right_again(pair: Pair, reference: Reference) -> None:
    (prompt,) = prompts(2, (300,))
    for _ in range(3):
        assert pair.hand_over(prompt).decode.tokens == reference(prompt)
    pair.decode.reset()
    before = pair.taken()
    assert pair.hand_over(prompt).decode.tokens == reference(prompt)
    assert pair.taken().since(before).handoffs == 1
    pair.free()


def test_prompts_that_begin_alike_are_told_apart(pair: Pair, reference: Reference) -> None:
    (common,) = prompts(3, (5 * PAGE + 3,))
    asked = [common + tail for tail in prompts(4, (1, PAGE, 100, 101))]
    for prompt in asked:
        handed = pair.hand_over(prompt)
        assert handed.decode.tokens == reference(prompt)
    pair.free()


def test_chat(pair: Pair) -> None:
    (prompt,) = prompts(5, (200,))
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": words(prompt)}],
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }

    def ask(server: VllmServer, tokens: int, params: object = None) -> Reply:
        asked = body | {"max_tokens": tokens} | ({"kv_transfer_params": params} if params else {})
        return Reply.of(json.loads(server.post("/v1/chat/completions", asked)))

    alone = ask(pair.prefill, 12)
    pair.prefill.reset()
    before = pair.taken()
    prefill = ask(pair.prefill, 1, ASK)
    decode = ask(pair.decode, 12, prefill.params)
    assert (decode.tokens, decode.text) == (alone.tokens, alone.text)
    assert decode.cached == prefill.cached, "as vLLM reports it: what P found"
    assert pair.taken().since(before).handoffs == 1
    pair.free()


def test_streaming(pair: Pair, reference: Reference) -> None:
    (prompt,) = prompts(6, (500,))
    pieces = pair.decode.stream(prompt, 32, pair.prefilled(prompt))
    assert sum(pieces, ()) == reference(prompt, 32)
    assert len(pieces) > 1
    pair.free()


def test_many_at_once(pair: Pair, reference: Reference) -> None:
    asked = prompts(7, tuple(random.Random(7).randrange(10, 700) for _ in range(16)))
    reference.learn(asked)
    before = pair.taken()
    with ThreadPoolExecutor(len(asked)) as clients:
        replies = list(clients.map(lambda prompt: pair.hand_over(prompt).decode, asked))
    assert [reply.tokens for reply in replies] == [reference(prompt) for prompt in asked]
    assert pair.taken().since(before).handoffs == len(asked)
    pair.free()


def test_a_salted_prompt_is_handed_over_under_its_salt(pair: Pair, reference: Reference) -> None:
    (prompt,) = prompts(8, (200,))
    before = pair.taken()
    assert pair.hand_over(prompt, cache_salt="a salt").decode.tokens == reference(prompt)
    assert pair.taken().since(before).handoffs == 1
    reply = pair.decode.ask(prompt, params=pair.prefilled(prompt, cache_salt="a salt"), cache_salt="another")
    assert reply.tokens == reference(prompt)
    assert reply.cached == 0, "another salt's pages"
    pair.free()


def test_a_byte_changed_behind_the_digest_reaches_no_answer_unless_nobody_verifies(
    pair: Pair, transport: str, reference: Reference, damage: Path
) -> None:
    asked = prompts(9, (40, 70, 100, 130, 160, 190))
    before = pair.taken()
    replies = []
    damage.touch()
    try:
        for count, prompt in enumerate(asked, 1):
            params = pair.prefilled(prompt)
            wait_until("a byte is changed", lambda: len(damage.read_text().splitlines()) == count)  # noqa: B023  # is over before the next one
            replies.append(pair.decode.ask(prompt, params=params))
    finally:
        damage.unlink()
    right = [reply.tokens == reference(prompt) for reply, prompt in zip(replies, asked, strict=True)]
    if transport == "nixl":
        assert all(right)
        assert pair.taken().since(before).failures == {"checksum": len(asked)}
        assert {reply.cached for reply in replies} == {0}, "computed"
    else:
        assert not all(right), "the test would notice a wrong byte"
    pair.free()


HIDE = """
import sys
from importlib.machinery import PathFinder

class WithoutNixl(PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.startswith("nixl") else super().find_spec(name, *args)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutNixl
"""
"""A ``sitecustomize`` with which a Python finds no NIXL."""

BROKEN = "raise ImportError('libucp.so.0: cannot open shared object file')"
"""A NIXL whose libraries are missing."""


@pytest.fixture(scope="module")
def without_nixl(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, Path]]:
    """P cannot import NIXL. D, which here also saves, has none; and D's records."""
    directory = tmp_path_factory.mktemp("without-nixl")
    for name, content in (("nixl", BROKEN), ("sitecustomize", HIDE)):
        (directory / name).mkdir()
        (directory / name / f"{name}.py").write_text(content)
    records = directory / "records"
    with running(
        model,
        directory,
        {"env": {"PYTHONPATH": str(directory / "nixl")}},
        {
            "kvferry": peer() | {"explain": {"directory": str(records)}},
            "role": "kv_both",
            "env": {"PYTHONPATH": str(directory / "sitecustomize")},
        },
    ) as engines:
        yield engines, records
        engines.settle()


def test_where_nixl_is_missing_or_broken_a_socket_takes_its_place_and_the_log_says_so(
    without_nixl: tuple[Pair, Path], reference: Reference
) -> None:
    pair, _ = without_nixl
    for prompt in prompts(10, (5, 100, 800)):
        handed = pair.hand_over(prompt)
        assert handed.decode.tokens == reference(prompt)
        assert handed.decode.cached == len(prompt)
    assert "read through socket" in pair.decode.log
    assert "does not read through nixl: nixl is not installed: pip install" in pair.decode.log
    assert "does not offer transport nixl: " in pair.prefill.log
    assert "libucp.so.0" in pair.prefill.log
    pair.free()


def test_what_the_own_cache_has_is_not_fetched_from_the_peer(
    without_nixl: tuple[Pair, Path], reference: Reference
) -> None:
    pair, records = without_nixl
    (prompt,) = prompts(11, (8 * BLOCK + 20,))
    begin = prompt[: 4 * BLOCK]
    pair.decode.ask((*begin, 2, 3))
    wait_until("it is saved", lambda: pair.decode.counted().value("kvferry_tier_blocks", tier="host") >= 4)
    pair.decode.reset()
    before = pair.taken()
    handed = pair.hand_over(prompt)
    assert handed.decode.tokens == reference(prompt)
    assert handed.decode.cached == len(prompt)
    assert pair.taken().since(before).tokens == {"host": len(begin), "peer": len(prompt) - len(begin)}

    def record() -> dict[str, int]:
        found = [
            record for record in read_records(records, last=100).records if "peer" in record.matched_tokens
        ]
        return found[-1].matched_tokens if found else {}

    wait_until("the record is written", lambda: record().get("host") == len(begin))
    assert record()["peer"] == len(prompt) - len(begin)
    pair.free()
