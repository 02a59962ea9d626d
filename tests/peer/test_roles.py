"""What an engine does with the two halves of a handoff is its role's choice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from pair import ASK, Pair, Reference, running
from prompts import random_tokens
from serving import VllmServer

LENGTH = 300


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running(model, tmp_path_factory.mktemp("roles")) as engines:
        yield engines
        engines.settle()


def said(server: VllmServer, words: str) -> int:
    return server.log.count(words)


def test_a_producer_computes_what_it_should_take_and_says_so(pair: Pair, reference: Reference) -> None:
    prompt = random_tokens(random.Random(1), LENGTH)
    params = pair.prefilled(prompt)
    reply = pair.prefill.ask(prompt, params=params)
    assert reply.tokens == reference(prompt)
    assert said(pair.prefill, "takes nothing from peers") == 1
    assert pair.decode.ask(prompt, params=params).tokens == reference(prompt), "and D can still take it"
    pair.free()


def test_a_consumer_holds_nothing_for_others(pair: Pair, reference: Reference) -> None:
    prompt = random_tokens(random.Random(2), LENGTH)
    reply = pair.decode.ask(prompt, params=ASK)
    assert reply.tokens == reference(prompt)
    assert reply.params is None
    assert said(pair.decode, "hands nothing over") == 1
    pair.free()


def test_a_consumer_saves_nothing(pair: Pair) -> None:
    prompt = random_tokens(random.Random(3), LENGTH)
    pair.hand_over(prompt)
    pair.decode.ask(random_tokens(random.Random(4), LENGTH))
    pair.free()
    assert pair.decode.value("kvferry_gathered_bytes_total") == 0
    assert pair.prefill.value("kvferry_gathered_bytes_total") > 0
