"""Engines that do everything hand over in both directions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from pair import Pair, Reference, running
from prompts import random_tokens

LENGTH = 300


@pytest.fixture(scope="module")
def both(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    role = {"role": "kv_both"}
    with running(model, tmp_path_factory.mktemp("both"), role, role) as engines:
        yield engines
        engines.settle()


def test_engines_of_both_roles_hand_over_to_one_another(both: Pair, reference: Reference) -> None:
    rng = random.Random(5)
    back = Pair(both.decode, both.prefill)
    for way in (both, back, both):
        prompt = random_tokens(rng, LENGTH)
        before = way.taken()
        handed = way.hand_over(prompt)
        assert handed.decode.tokens == reference(prompt)
        assert handed.decode.cached == LENGTH
        assert way.taken().since(before).handoffs == 1
    both.free()


def test_a_request_may_be_taken_and_handed_on(both: Pair, reference: Reference) -> None:
    """As in a conversation whose next turn begins on the engine that decoded."""
    prompt = random_tokens(random.Random(6), LENGTH)
    params = both.prefilled(prompt)
    taken = both.decode.ask(prompt, 8, params | {"do_remote_decode": True})
    assert taken.tokens == reference(prompt)
    assert taken.params is not None
    longer = (*prompt, *taken.tokens[:-1])
    reply = both.prefill.ask((*longer, *taken.tokens[-1:]), 8, taken.params)
    assert reply.tokens == reference((*longer, *taken.tokens[-1:]))
    both.free()
