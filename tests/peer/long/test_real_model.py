"""A real language model: what it says about prose on D is what it says on the engine that read the prose."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from pair import Pair, peer, running
from test_server import PROMPTS

from kvferry.engines.vllm.demo.model import default_cache_dir, prepare

ANSWER = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    config = {"kvferry": peer(deadline_s=120.0, lease_s=120.0)}
    with running(prepare(default_cache_dir()), tmp_path_factory.mktemp("real"), config, config) as engines:
        yield engines
        engines.settle()


@pytest.fixture(scope="module")
def alone(pair: Pair) -> dict[str, tuple[int, ...]]:
    """What P says by itself, to each prompt."""
    answers = {prompt: pair.prefill.ask((), ANSWER, prompt=prompt).tokens for prompt in PROMPTS}
    assert len(set(answers.values())) == len(PROMPTS), "the control: it depends on the prompt"
    pair.free()
    return answers


def test_one_after_the_other(pair: Pair, alone: dict[str, tuple[int, ...]]) -> None:
    before = pair.taken()
    for prompt, answer in alone.items():
        handed = pair.hand_over((), ANSWER, prompt=prompt)
        assert handed.decode.tokens == answer
        assert handed.decode.cached == handed.decode.prompt_tokens > 100
    taken = pair.taken().since(before)
    assert (taken.handoffs, taken.failures) == (len(alone), {})
    pair.free()


def test_all_at_once(pair: Pair, alone: dict[str, tuple[int, ...]]) -> None:
    with ThreadPoolExecutor(len(alone)) as clients:
        handed = list(clients.map(lambda prompt: pair.hand_over((), ANSWER, prompt=prompt).decode, alone))
    assert [reply.tokens for reply in handed] == list(alone.values())
    assert all(reply.cached == reply.prompt_tokens for reply in handed)
    pair.free()
