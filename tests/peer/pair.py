"""A prefill and a decode engine, and the router between them that a test plays."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from engine import Engine, wait_until
from prompts import random_tokens
from serving import Json, Metrics, Reply, VllmServer

__all__ = ["ASK", "Handed", "Pair", "Reference", "Taken", "free", "own_count", "peer", "running", "settle"]

ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What a router sends to the prefill engine."""

LEAD = 1e-5
"""By how much a chosen token must lead: rounding may not choose."""


class Reference:
    """What one engine without any cache answers, computed once for each prompt. Use it as a context manager.

    Thread-safe.
    """

    def __init__(self, model: Path, log: Path) -> None:
        self._model = model
        self._log = log
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._answers: dict[tuple[int, ...], tuple[int, ...]] = {}

    def __call__(self, tokens: Sequence[int], max_tokens: int = 8) -> tuple[int, ...]:
        """Return the greedy tokens that follow a prompt."""
        prompt = tuple(tokens)
        with self._lock:
            if len(self._answers.get(prompt, ())) < max_tokens:
                self._compute([prompt], max_tokens)
            return self._answers[prompt][:max_tokens]

    def learn(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8) -> None:
        """Compute many at once."""
        with self._lock:
            self._compute([tuple(prompt) for prompt in prompts], max_tokens)

    def _compute(self, prompts: list[tuple[int, ...]], max_tokens: int) -> None:
        if self._engine is None:
            self._engine = Engine(
                self._model,
                self._log,
                enable_prefix_caching=False,
                max_model_len=2048,
                block_size=32,
                num_gpu_blocks_override=512,
            )
        requests = [{"tokens": prompt, "max_tokens": max_tokens} for prompt in prompts]
        for prompt, answer in zip(prompts, self._engine.generate(requests, together=True), strict=True):
            assert answer.lead > LEAD, "rounding must not choose a token"
            self._answers[prompt] = answer.tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()


class Handed(NamedTuple):
    """A request that both engines have answered."""

    prefill: Reply
    decode: Reply


def own_count(params: Mapping[str, Json]) -> dict[str, Json]:
    """Return params with which D reports the tokens that it did not compute.

    vLLM adds how many P had found in its cache, and D then reports those.
    """
    return {name: value for name, value in params.items() if name != "remote_prefill_cached_tokens"}


@dataclass(frozen=True)
class Taken:
    """What an engine has taken from peers."""

    handoffs: int
    """That went well."""
    bytes: int
    tokens: dict[str, int]
    """Hit tokens by tier."""
    failures: dict[str, int]
    """By reason."""

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        return cls(
            int(metrics.value("kvferry_handoffs_total", side="taken", outcome="ok")),
            int(metrics.value("kvferry_handoff_bytes_total")),
            {tier: int(n) for tier, n in metrics.by("tier", "kvferry_hit_tokens_total").items()},
            {reason: int(n) for reason, n in metrics.by("reason", "kvferry_handoff_failures_total").items()},
        )

    def since(self, before: Taken) -> Taken:
        """Return what came after another count."""
        return Taken(
            self.handoffs - before.handoffs,
            self.bytes - before.bytes,
            _minus(self.tokens, before.tokens),
            _minus(self.failures, before.failures),
        )


def _minus(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: grown for name, count in now.items() if (grown := count - before.get(name, 0))}


class Pair:
    """Two engines and the handoff between them."""

    def __init__(self, prefill: VllmServer, decode: VllmServer) -> None:
        self.prefill = prefill
        self.decode = decode

    @property
    def both(self) -> tuple[VllmServer, VllmServer]:
        return self.prefill, self.decode

    def prefilled(self, tokens: Sequence[int], **body: Json) -> dict[str, Json]:
        """Have P compute a prompt for D and return the params of its answer."""
        params = self.prefill.ask(tokens, 1, ASK, **body).params
        assert params is not None, "P did not hold the pages"
        return own_count(params)

    def hand_over(self, tokens: Sequence[int], max_tokens: int = 8, **body: Json) -> Handed:
        """Do what a router does: prefill on P, then the whole request on D with what P said."""
        prefill = self.prefill.ask(tokens, 1, ASK, **body)
        assert prefill.params is not None, "P did not hold the pages"
        return Handed(prefill, self.decode.ask(tokens, max_tokens, own_count(prefill.params), **body))

    def hands_over_again(self, reference: Reference, rng: random.Random, length: int) -> None:
        """Make sure that fresh prompts are handed over, whatever happened before.

        A machine that stands still for longer than a lease makes D compute one of them, rightly; not three in a row.
        """
        reasons = []
        for _ in range(3):
            prompt = random_tokens(rng, length)
            before = self.taken()
            handed = self.hand_over(prompt)
            assert handed.decode.tokens == reference(prompt)
            if handed.decode.cached == length:
                return
            reasons.append(self.taken().since(before).failures)
        raise AssertionError(f"no handoff is taken any more: {reasons}\n{self.decode.log}")

    def free(self) -> None:
        """Wait until no page is in use, on either side; vLLM's own caches are then empty."""
        for server in self.both:
            free(server)

    def settle(self) -> None:
        """Wait until no page is in use and no lease is left over, on either side."""
        for server in self.both:
            settle(server)

    def taken(self) -> Taken:
        """Return what D has taken up to now."""
        return Taken.of(self.decode.counted())


def free(server: VllmServer) -> None:
    """Wait until a server holds no page; its own prefix cache is then empty."""
    wait_until("no page is in use", lambda: server.idle_usage() == 0.0)
    server.reset()
    assert "kvferry failed in" not in server.log, server.log


def settle(server: VllmServer) -> None:
    """Wait until a server holds no page and says that it holds no lease."""
    free(server)

    def holds_nothing() -> bool:
        now = server.counted()
        return now.value("kvferry_handoff_held_pages") == 0.0 == now.value("kvferry_handoff_leases")

    wait_until("no lease is left", holds_nothing)


@contextlib.contextmanager
def running(
    model: Path,
    directory: Path,
    prefill: Mapping[str, Any] | None = None,
    decode: Mapping[str, Any] | None = None,
) -> Iterator[Pair]:
    """Start two engines at once.

    Args:
        model: Checkpoint directory.
        directory: For their logs.
        prefill: Arguments of P's ``VllmServer`` other than its defaults.
        decode: The same for D.
    """
    one = VllmServer(
        model, directory / "prefill", **({"kvferry": peer(), "role": "kv_producer"} | dict(prefill or {}))
    )
    other = VllmServer(
        model, directory / "decode", **({"kvferry": peer(), "role": "kv_consumer"} | dict(decode or {}))
    )
    with one, other:
        one.launch()
        other.launch()
        one.wait()
        other.wait()
        yield Pair(one, other)


def peer(**options: Json) -> dict[str, Json]:
    """Return a configuration whose ``peer`` table has these options, with a small arena and no records.

    A busy machine is given time: whether a transfer is too slow is for the tests that say so.
    """
    return {
        "host": {"capacity": "64MiB"},
        "explain": {"enabled": False},
        "peer": {"enabled": True, "deadline_s": 30.0, **options},
    }
