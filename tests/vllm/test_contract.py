"""One contract, two engines: what kvferry promises whoever computes, on a real vLLM and on TensorRT-LLM's stand-in.

The same prompts, blocks of the same size, the same promises. Right answers are vLLM's without any cache, and what the
stand-in's model by hashes makes of every byte of KV.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
from engine import Engine, Engines
from ferry import Ferry, settle
from prompts import BLOCK, PROMPTS, Prompt, matched
from reference import EXTERNAL_HITS
from standin.executor import Engine as StandIn
from standin.model import Scope
from standin.options import EngineOptions

ANSWER_TOKENS = 8
CONFIG = f"""
block_tokens = {BLOCK}
[host]
capacity = "64MiB"
"""


class Reply(NamedTuple):
    """What became of a prompt."""

    is_right: bool
    local: int
    """Tokens from the engine's own pages."""
    brought: int
    """Tokens that kvferry brought."""


class AnyEngine(Protocol):
    """An engine with kvferry."""

    def ask(self, prompt: Prompt, salt: str = "") -> Reply:
        """Run a prompt to its end."""

    def settle(self) -> None:
        """Have everything be saved that is to be saved."""

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""


class Vllm:
    """The real one."""

    def __init__(self, engine: Engine, uncached: dict[Prompt, tuple[int, ...]]) -> None:
        self._engine = engine
        self._uncached = uncached

    def ask(self, prompt: Prompt, salt: str = "") -> Reply:
        before = self._engine.metric(EXTERNAL_HITS)
        request = {"tokens": prompt, "max_tokens": ANSWER_TOKENS} | ({"salt": salt} if salt else {})
        (answer,) = self._engine.generate([request])
        brought = int(self._engine.metric(EXTERNAL_HITS) - before)
        is_right = answer.tokens == self._uncached[prompt][:ANSWER_TOKENS]
        return Reply(is_right, answer.cached - brought, brought)

    def settle(self) -> None:
        self._engine.settle()

    def forget(self) -> None:
        self._engine.reset()


class TrtLlm:
    """The played one."""

    def __init__(self, engine: StandIn) -> None:
        self._engine = engine

    def ask(self, prompt: Prompt, salt: str = "") -> Reply:
        request_id = self._engine.submit(list(prompt), ANSWER_TOKENS, Scope(salt=salt))
        self._engine.run()
        sequence = self._engine.sequences[request_id]
        is_right = self._engine.outcomes[request_id].tokens == self._engine.expected(request_id)
        return Reply(is_right, sequence.local, sequence.honoured)

    def settle(self) -> None:
        settle(self._engine)

    def forget(self) -> None:
        self._engine.allocator.evict(self._engine.options.num_pages)


@pytest.fixture(scope="module", params=["vllm", "trtllm-V1", "trtllm-V2"])
def engine(
    request: pytest.FixtureRequest,
    engines: Engines,
    tiny: Path,
    uncached: dict[Prompt, tuple[int, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[AnyEngine]:
    if request.param == "vllm":
        config = {"block_tokens": BLOCK, "host": {"capacity": "64MiB"}, "explain": {"enabled": False}}
        yield Vllm(engines.start("contract", tiny, kvferry=config), uncached)
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        ferry = Ferry(tmp_path_factory.mktemp("contract"), monkeypatch)
        options = EngineOptions(page_tokens=32, num_pages=64, is_v2=request.param.endswith("V2"))
        yield TrtLlm(ferry.start(options, config=CONFIG))
        ferry.close()


WHOLE = next(prompt for prompt in PROMPTS if matched(prompt) == 3 * BLOCK)
PARENT, CHILD = next(
    (parent, child)
    for parent in PROMPTS
    for child in PROMPTS
    if parent[:BLOCK] == child[:BLOCK]
    and parent[: 2 * BLOCK] != child[: 2 * BLOCK]
    and len(child) > 2 * BLOCK
)


def test_every_full_block_of_a_prompt_comes_back(engine: AnyEngine) -> None:
    assert engine.ask(WHOLE, "first") == Reply(True, 0, 0)
    engine.settle()
    engine.forget()
    assert engine.ask(WHOLE, "first") == Reply(True, 0, matched(WHOLE))


def test_what_the_engine_holds_itself_is_not_brought(engine: AnyEngine) -> None:
    engine.ask(WHOLE, "second")
    reply = engine.ask(WHOLE, "second")
    assert reply.is_right
    assert reply.brought == 0
    assert reply.local >= matched(WHOLE)


def test_a_prompt_that_goes_on_otherwise_gets_what_it_shares(engine: AnyEngine) -> None:
    engine.ask(PARENT, "third")
    engine.settle()
    engine.forget()
    assert engine.ask(CHILD, "third") == Reply(True, 0, BLOCK)


def test_what_is_held_and_what_is_brought_make_one_prompt(engine: AnyEngine) -> None:
    for prompt in (PARENT, CHILD):
        engine.ask(prompt, "fourth")
    engine.settle()
    engine.forget()
    engine.ask(PARENT, "fourth")
    reply = engine.ask(CHILD, "fourth")
    assert reply.is_right
    assert reply.local >= BLOCK, "as far as the engine's own pages go"
    assert reply.brought == matched(CHILD) - reply.local > 0


def test_nobody_finds_what_another_salt_keys(engine: AnyEngine) -> None:
    engine.ask(WHOLE, "fifth")
    engine.settle()
    engine.forget()
    assert engine.ask(WHOLE, "somebody else") == Reply(True, 0, 0)
    engine.forget()
    assert engine.ask(WHOLE) == Reply(True, 0, 0)
    engine.forget()
    assert engine.ask(WHOLE, "fifth") == Reply(True, 0, matched(WHOLE))


def test_many_prompts_twice(engine: AnyEngine) -> None:
    some = PROMPTS[:12]
    for prompt in some:
        assert engine.ask(prompt, "many").is_right
    engine.settle()
    for prompt in some:
        engine.forget()
        assert engine.ask(prompt, "many") == Reply(True, 0, matched(prompt))
