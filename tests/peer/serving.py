"""vLLM's OpenAI server in a process group of its own, asked over HTTP as a router asks it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from engine import START_DEADLINE_S, EngineRefused, connector, kill_group, spawn, wait_until
from engine import _members as members_of_group
from processes import Holdings, frozen, holdings

__all__ = ["BLOCK", "PAGE", "HttpError", "Json", "Metrics", "OpenRequest", "Reply", "VllmServer", "free_port"]

Json = Any

PAGE = 32
"""Tokens per page of the engines."""
BLOCK = 64
"""Tokens per block, which is what kvferry makes of such pages."""
NUM_PAGES = 512
REPLY_DEADLINE_S = 120.0
_HERE = Path(__file__).parent
_REQUESTS = "kvferry_requests_total"
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class HttpError(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:500]}")
        self.status = status
        self.text = text


class Sample(NamedTuple):
    """A metric's value with certain labels."""

    name: str
    labels: dict[str, str]
    value: float


class Metrics:
    """vLLM's and kvferry's metrics at one moment."""

    def __init__(self, text: str) -> None:
        self.samples = []
        for line in text.splitlines():
            sample = _SAMPLE.match(line)
            if sample is not None and sample[1].startswith(("vllm:", "kvferry")):
                labels = dict(_LABEL.findall(sample[2] or ""))
                self.samples.append(Sample(sample[1], labels, float(sample[3])))

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all samples with these labels; 0 while it was never set."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def by(self, label: str, name: str) -> dict[str, float]:
        """Return a metric's values that are not 0 by one of its labels."""
        return {s.labels[label]: s.value for s in self.samples if s.name == name and s.value}


@dataclass(frozen=True)
class Reply:
    """What a completion was."""

    tokens: tuple[int, ...]
    text: str
    prompt_tokens: int
    cached: int
    """Prompt tokens that were not computed here."""
    finish: str
    params: dict[str, Json] | None
    """``kv_transfer_params`` of the answer."""

    @classmethod
    def of(cls, answer: Json) -> Self:
        (choice,) = answer["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        details = answer["usage"].get("prompt_tokens_details") or {}
        return cls(
            tuple(choice["token_ids"]),
            text,
            answer["usage"]["prompt_tokens"],
            details.get("cached_tokens") or 0,
            choice["finish_reason"],
            answer.get("kv_transfer_params"),
        )


class OpenRequest:
    """A request on its way; its client may leave."""

    def __init__(self, port: int, path: str, body: Json, deadline_s: float) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=deadline_s)
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})

    def reply(self) -> bytes:
        """Wait for the whole answer.

        Raises:
            HttpError: The server refused or could not.
            OSError, http.client.HTTPException: It went away.
        """
        with contextlib.closing(self._connection):
            response = self._connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise HttpError(response.status, content.decode(errors="replace"))
            return content

    def completion(self) -> Reply:
        """Wait for the answer; errors as with ``reply``."""
        return Reply.of(json.loads(self.reply()))

    def lines(self) -> Iterator[str]:
        """Yield the lines of a streamed answer as they come."""
        with contextlib.closing(self._connection):
            response = self._connection.getresponse()
            if response.status != 200:
                raise HttpError(response.status, response.read().decode(errors="replace"))
            for line in response:
                yield line.decode().strip()

    def abort(self) -> None:
        """Hang up."""
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class VllmServer:
    """One server, which can be started again on the same port. Killed when the context ends.

    Args:
        model: Checkpoint directory.
        directory: Made for its logs and temporary files.
        kvferry: kvferry's configuration; None runs without connector.
        role: ``kv_role``.
        module: ``kv_connector_module_path``, for engines that a test disturbs.
        env: Further environment variables.
        arguments: Further arguments of ``vllm serve``.
    """

    def __init__(
        self,
        model: Path,
        directory: Path,
        kvferry: dict[str, Json] | None,
        role: str = "kv_both",
        module: str = "kvferry.engines.vllm",
        env: dict[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.directory = directory
        self.lives = 0
        self._env = {
            "TMPDIR": str(directory),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        } | (env or {})
        paths = (str(_HERE), self._env.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", ""))
        self._env["PYTHONPATH"] = os.pathsep.join(filter(None, (*paths, *_TESTS)))
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"),
            *("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"),
            *("--block-size", str(PAGE), "--num-gpu-blocks-override", str(NUM_PAGES)),
            "--enable-prompt-tokens-details",
            *arguments,
        ]
        if kvferry is not None:
            transfer = connector(kvferry, kv_role=role, kv_connector_module_path=module)
            self._command += ["--kv-transfer-config", json.dumps(transfer)]
        self._process: subprocess.Popen[str] | None = None

    # -- its life ----------------------------------------------------------------------------------

    def launch(self) -> Self:
        """Start it, again if need be; see ``wait``."""
        assert self._process is None
        self.lives += 1
        self._process = spawn(
            self._command,
            self._log_file(self.lives),
            self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        return self

    def wait(self) -> Self:
        """Wait until it is healthy."""
        try:
            wait_until("the server is healthy", self.is_healthy, START_DEADLINE_S)
        except BaseException:
            self.kill()
            raise
        return self

    def is_healthy(self) -> bool:
        """Tell whether it answers.

        Raises:
            EngineRefused: It has ended; the text is its log.
        """
        if self._process is None or self._process.poll() is not None:
            raise EngineRefused(self.log)
        try:
            self.get("/health", 5.0)
        except (OSError, http.client.HTTPException, HttpError):
            return False
        return True

    def kill(self) -> None:
        """Send SIGKILL to every process of it."""
        if self._process is not None:
            process, self._process = self._process, None
            kill_group(process)

    def restart(self) -> None:
        """Kill it and start it again on the same port."""
        self.kill()
        self.launch().wait()

    def stop(self) -> None:
        """End it in order."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60.0)
        self.kill()

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Keep all its processes from doing anything."""
        return frozen(self.pids)

    @property
    def pids(self) -> list[int]:
        assert self._process is not None
        return members_of_group(self._process.pid)

    def holdings(self) -> Holdings:
        """Return what all its processes hold."""
        return holdings(self.pids)

    @property
    def log(self) -> str:
        """Everything it has printed in its present life."""
        return self._log_file(self.lives).read_text(errors="replace")

    @property
    def logs(self) -> str:
        """Everything it has printed in all its lives."""
        return "\n".join(
            self._log_file(life).read_text(errors="replace") for life in range(1, self.lives + 1)
        )

    def _log_file(self, life: int) -> Path:
        return self.directory / f"life-{life}.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # -- its answers -------------------------------------------------------------------------------

    def ask(
        self,
        tokens: Sequence[int],
        max_tokens: int = 8,
        params: Json = None,
        deadline_s: float = REPLY_DEADLINE_S,
        **body: Json,
    ) -> Reply:
        """Return what follows a prompt."""
        return self.open(tokens, max_tokens, params, deadline_s, **body).completion()

    def open(
        self,
        tokens: Sequence[int],
        max_tokens: int = 8,
        params: Json = None,
        deadline_s: float = REPLY_DEADLINE_S,
        **body: Json,
    ) -> OpenRequest:
        """Ask for what follows a prompt, without waiting."""
        asked = completion(tokens, max_tokens, params) | body
        return OpenRequest(self.port, "/v1/completions", asked, deadline_s)

    def stream(
        self, tokens: Sequence[int], max_tokens: int = 8, params: Json = None
    ) -> list[tuple[int, ...]]:
        """Return the tokens that follow a prompt, in the pieces in which they were sent."""
        pieces = []
        for line in self.open(tokens, max_tokens, params, stream=True).lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    pieces.append(tuple(choice["token_ids"] or ()))
        return [piece for piece in pieces if piece]

    def post(self, path: str, body: Json, deadline_s: float = REPLY_DEADLINE_S) -> bytes:
        return OpenRequest(self.port, path, body, deadline_s).reply()

    def get(self, path: str, deadline_s: float = REPLY_DEADLINE_S) -> str:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=deadline_s)
        ) as line:
            line.request("GET", path)
            response = line.getresponse()
            content = response.read().decode()
            if response.status != 200:
                raise HttpError(response.status, content)
            return content

    def reset(self) -> None:
        """Empty vLLM's own prefix cache; impossible while a single page is still in use."""

        def is_reset() -> bool:
            answer = self.post("/reset_prefix_cache", {})
            return bool(json.loads(answer)["success"]) if answer else True

        wait_until("every page is free", is_reset)

    def probe(self) -> None:
        """Have the engine take a few steps."""
        self.ask((2, 3), 2)

    def metrics(self) -> Metrics:
        """Return vLLM's and kvferry's metrics as they were last sent."""
        return Metrics(self.get("/metrics"))

    def counted(self) -> Metrics:
        """Return metrics that count everything up to this call.

        Engines send them about once a second, and only while they work: what the second change from now on shows was
        taken after the first one had come.
        """
        seen = [self.metrics().value(_REQUESTS)]

        def has_changed_twice() -> Metrics | None:
            self.probe()
            now = self.metrics()
            if now.value(_REQUESTS) != seen[-1]:
                seen.append(now.value(_REQUESTS))
            return now if len(seen) > 2 else None

        return wait_until("the metrics are sent", has_changed_twice)

    def value(self, name: str, **labels: str) -> float:
        """Return one metric that counts everything up to this call."""
        return self.counted().value(name, **labels)

    def idle_usage(self) -> float:
        """Return the share of pages that are in use according to vLLM, as it last said."""
        return self.metrics().value("vllm:kv_cache_usage_perc")


_TESTS = [str(_HERE.parent / name) for name in ("vllm", "unit")]


def completion(tokens: Sequence[int], max_tokens: int, params: Json = None) -> dict[str, Json]:
    """Return the body of a completion request, greedy and to its last token."""
    body = {
        "model": "model",
        "prompt": list(tokens),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return body if params is None else body | {"kv_transfer_params": params}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
