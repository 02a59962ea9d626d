"""A real language model behind the OpenAI server: killed with SIGKILL while it saves and while it loads, and
on another host, with nothing but a shared tier in common."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from engine import Engines, wait_until
from remote import KINDS
from server import Server

from kvferry.engines.vllm.demo.model import default_cache_dir, prepare

BLOCK = 128
LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text().split("\n\n")
DOCUMENTS = ["\n\n".join(LICENSE[start : start + 7]) for start in range(0, 35, 5)]
"""Passages of real prose, three to five hundred tokens each, that begin differently."""
PROMPTS = [f"{document}\n\nIn one sentence, this text says that" for document in DOCUMENTS]


@pytest.fixture(scope="module")
def smollm(engines: Engines) -> Path:
    engines.close()
    return prepare(default_cache_dir())


def kill_amid(server: Server, has_begun: Callable[[], bool]) -> None:
    """Ask everything at once, for answers that take many seconds, and kill the server as soon as ``has_begun``."""

    def ask(prompt: str) -> bool:
        try:
            server.complete(prompt, tokens=1024)
        except (OSError, HTTPException):
            return False
        return True

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        answers = [threads.submit(ask, prompt) for prompt in PROMPTS]
        wait_until("the engine has begun", has_begun)
        left = server.kill()
        assert not all(answer.result() for answer in answers), "killed in the middle"
    assert all(name.startswith(("psm_", "sem.")) for name in left), "nothing but vLLM's own queues"


def test_answers_are_the_same_after_every_kill(smollm: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "host": {"capacity": "256MiB"},
        "tiers": [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "1GiB", "ask": "always"}],
        "explain": {"enabled": False},
    }

    with Server(smollm, tmp_path / "first", config) as server:
        cold = [server.complete(prompt) for prompt in PROMPTS[:3]]
        local = [server.complete(prompt) for prompt in PROMPTS[:3]]
        server.reset()
        loaded = [server.complete(prompt) for prompt in PROMPTS[:3]]
        assert [cached for _, cached in cold] == [0, 0, 0]
        assert min(cached for _, cached in local) >= BLOCK
        assert loaded == local, "every log-probability of a real model's answers"
        assert server.metric("vllm:external_prefix_cache_hits_total") == sum(cached for _, cached in local)
        saved = server.metric("kvferry_gathered_bytes_total")
        kill_amid(server, lambda: server.metric("kvferry_gathered_bytes_total") > saved)

    with Server(smollm, tmp_path / "second", config) as server:
        assert [server.complete(prompt) for prompt in PROMPTS[:3]] == local, "read from disk, bit for bit"
        server.reset()
        loads = server.metric("kvferry_scattered_bytes_total")
        kill_amid(server, lambda: server.metric("kvferry_scattered_bytes_total") > loads)

    with Server(smollm, tmp_path / "third", config) as server:
        assert [server.complete(prompt) for prompt in PROMPTS[:3]] == local
        for prompt in PROMPTS[3:]:
            server.reset()
            partly, _ = server.complete(prompt)
            wholly, _ = server.complete(prompt)
            assert partly["text"] == wholly["text"], "whatever of it had been saved before the kill"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_second_server_with_an_empty_host_answers_from_what_they_share(
    smollm: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / kind).mkdir()
    remote = KINDS[kind](tmp_path / kind)
    config: dict[str, Any] = {
        "host": {"capacity": "256MiB"},
        "tiers": [remote.tier() | {"ask": "always"}],
        "explain": {"enabled": False},
    }
    try:
        with Server(smollm, tmp_path / "first", config) as server:
            cold = [server.complete(prompt) for prompt in PROMPTS[:3]]
            local = [server.complete(prompt) for prompt in PROMPTS[:3]]
            reused = sum(cached for _, cached in local)

            def is_stored() -> bool:
                server.complete("Yes.")  # a server that does nothing reports nothing
                return server.metric("kvferry_stored_blocks_total") >= reused // BLOCK

            wait_until("every block is stored", is_stored)

        with Server(smollm, tmp_path / "second", config) as server:
            shared = [server.complete(prompt) for prompt in PROMPTS[:3]]
            assert server.metric("vllm:external_prefix_cache_hits_total") == reused > 0

            def is_loaded() -> bool:
                server.complete("Yes.")
                return server.metric("kvferry_loaded_blocks_total") >= reused // BLOCK

            wait_until("every block was loaded", is_loaded)
    finally:
        remote.kill()
    assert shared == local, "every log-probability of a real model's answers"
    assert [answer["text"] for answer, _ in shared] == [answer["text"] for answer, _ in cold]
