"""Handoffs between engines of different tensor-parallel sizes: every rank reads the heads it owns."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from pair import Pair, Reference, peer, running
from prompts import random_tokens

LENGTHS = (7, 33, 200, 1500)
PATIENT = {"deadline_s": 120.0, "lease_s": 120.0}
"""Engines that wait poll without a pause; here five of their processes do so on the cores of a small machine."""
TWO_RANKS = {"arguments": ("--tensor-parallel-size", "2")}


@pytest.fixture(
    scope="module", params=["one to two over nixl", "one to two over socket", "two to one over nixl"]
)
def pair(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    sizes, transport = request.param.split(" over ")
    config = {"kvferry": peer(transport=transport, **PATIENT)}
    prefill, decode = (config, config | TWO_RANKS) if sizes == "one to two" else (config | TWO_RANKS, config)
    with running(model, tmp_path_factory.mktemp("ranks"), prefill, decode) as engines:
        yield engines
        engines.settle()


def test_answers_are_those_of_a_single_engine(pair: Pair, reference: Reference) -> None:
    rng = random.Random(1)
    asked = [random_tokens(rng, length) for length in LENGTHS]
    reference.learn(asked)
    before = pair.taken()
    for prompt in asked:
        handed = pair.hand_over(prompt)
        assert handed.decode.tokens == reference(prompt)
        assert handed.decode.cached == len(prompt)
    taken = pair.taken().since(before)
    assert (taken.handoffs, taken.failures) == (len(asked), {})
    pair.free()
