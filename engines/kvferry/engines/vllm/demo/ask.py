"""The client: asks the server, streams the answer, and notes when the first token came.

Uses nothing but HTTP, as any OpenAI client would. What was reused is not inferred from times: the server
says it with each answer, and its ``/metrics`` page says where the bytes came from.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any
from urllib.request import Request

import click

from kvferry.engines.vllm.demo.server import MODEL_NAME, open_local

__all__ = ["QUESTIONS", "Answer", "Client", "Metrics", "document", "parse_metrics"]

QUESTIONS = (
    "Who are the three people who had to agree before a ship could leave in fog?",
    "What does the library at sea hold?",
    "How many times a day does the ferry cross the strait in summer?",
)
ANSWER_TOKENS = 32
ANSWER_DEADLINE_S = 300.0
SETTLE_DEADLINE_S = 30.0
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def document() -> str:
    """Return the document that all questions are about."""
    return files(__package__).joinpath("document.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Answer:
    """A greedy answer and what it took."""

    text: str
    tokens: tuple[int, ...]
    first_token_s: float
    prompt_tokens: int
    reused_tokens: int
    """Of the prompt, by the engine's own account."""
    disk_bytes: float = 0.0
    """Read from the disk tier for this answer."""
    engine_bytes: float = 0.0
    """Copied from DRAM into the engine's KV cache for this answer."""


@dataclass(frozen=True)
class Metrics:
    """A reading of ``/metrics``: each sample's name, labels and value."""

    samples: tuple[tuple[str, dict[str, str], float], ...]

    def total(self, name: str, **labels: str) -> float:
        """Return a metric's value, summed over all samples that have these labels; 0 if it was never counted."""
        return sum(
            value for found, has, value in self.samples if found == name and labels.items() <= has.items()
        )


def parse_metrics(text: str) -> Metrics:
    """Read Prometheus' text format, as far as the demo needs it."""
    matches = filter(None, map(_SAMPLE.match, text.splitlines()))
    return Metrics(
        tuple(
            (match["name"], dict(_LABEL.findall(match["labels"] or "")), float(match["value"]))
            for match in matches
        )
    )


class Client:
    """Talks to one server.

    Args:
        url: Of the server, without a path.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def warm_up(self) -> None:
        """Have the engine do everything once, with a prompt that has nothing to do with the document."""
        self._stream("Write a short poem about a mountain.", ANSWER_TOKENS)

    def ask(self, question: str) -> Answer:
        """Ask about the document: the document first, the question last.

        Raises:
            click.ClickException: The server refused or did not answer in time.
        """
        return self._stream(f"{document()}\n{question}", ANSWER_TOKENS)

    def ask_kvferry(self, question: str) -> Answer:
        """Ask like `ask`, and read from ``/metrics`` what kvferry moved for the answer.

        Raises:
            click.ClickException: As `ask`; or kvferry did not count the question.
        """
        before = self.metrics()
        answer = self.ask(question)

        def grown(after: Metrics, name: str, **labels: str) -> float:
            return after.total(name, **labels) - before.total(name, **labels)

        after = self.metrics_when(
            lambda now: grown(now, "kvferry_lookup_tokens_total") >= answer.prompt_tokens,
            "kvferry counting the question",
        )
        return replace(
            answer,
            disk_bytes=grown(after, "kvferry_loaded_bytes_total", tier="disk"),
            engine_bytes=grown(after, "kvferry_scattered_bytes_total"),
        )

    def metrics(self) -> Metrics:
        """Read the server's ``/metrics``."""
        with open_local(f"{self._url}/metrics", timeout=ANSWER_DEADLINE_S) as response:
            return parse_metrics(response.read().decode())

    def metrics_when(self, ready: Callable[[Metrics], bool], what: str) -> Metrics:
        """Read ``/metrics`` until it satisfies a condition.

        The engine publishes what a request did with a later step, at most once a second, and takes no steps
        while it is idle. So a one-word question is asked between two readings.

        Raises:
            click.ClickException: `SETTLE_DEADLINE_S` passed without ``what`` happening.
        """
        deadline = time.monotonic() + SETTLE_DEADLINE_S
        while not ready(metrics := self.metrics()):
            if time.monotonic() > deadline:
                raise click.ClickException(f"waited {SETTLE_DEADLINE_S:.0f} s in vain for {what}")
            self._stream("Hello?", 1)
            time.sleep(0.2)
        return metrics

    def _stream(self, content: str, max_tokens: int) -> Answer:
        body = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        text, first_token_s = "", 0.0
        tokens: list[int] = []
        usage: dict[str, Any] = {}
        started = time.perf_counter()
        for event in self._events("/v1/chat/completions", body):
            if "error" in event:
                raise click.ClickException(f"the server broke off: {event['error']}")
            for choice in event["choices"]:
                if choice.get("token_ids") and not tokens:
                    first_token_s = time.perf_counter() - started
                tokens += choice.get("token_ids") or []
                text += choice["delta"].get("content") or ""
            usage = event.get("usage") or usage
        if not usage or not tokens:
            raise click.ClickException("the server broke off without an answer")
        reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(text.strip(), tuple(tokens), first_token_s, usage["prompt_tokens"], reused)

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the server-sent events of one request as they come."""
        request = Request(self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with open_local(request, timeout=ANSWER_DEADLINE_S) as response:
                for line in response:
                    payload = line.removeprefix(b"data: ").strip()
                    if payload and payload != b"[DONE]":
                        yield json.loads(payload)
        except (OSError, http.client.HTTPException) as error:
            raise click.ClickException(f"the server did not answer: {error}") from error
