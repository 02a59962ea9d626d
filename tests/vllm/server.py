"""vLLM's OpenAI server in a process group of its own, spoken to over HTTP."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

from engine import START_DEADLINE_S, EngineRefused, connector, kill_group, spawn, wait_until

REQUEST_DEADLINE_S = 120.0

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy of the environment


class Server:
    """One server; killed with every process of its group when the context ends.

    Args:
        model: Checkpoint directory.
        directory: For its log and temporary files.
        kvferry: kvferry's configuration.
    """

    def __init__(self, model: Path, directory: Path, kvferry: dict[str, Any]) -> None:
        directory.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._log = directory / "server.log"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--model", str(model), "--served-model-name", "model"),
            *("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8"),
            *("--enforce-eager", "--enable-prompt-tokens-details"),
            *("--kv-transfer-config", json.dumps(connector(kvferry))),
        ]
        self._process = spawn(
            command,
            self._log,
            {"TMPDIR": str(directory), "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "2"},
        )
        try:
            wait_until("the server is healthy", self._is_healthy, START_DEADLINE_S)
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        """Everything the server has printed."""
        return self._log.read_text(errors="replace")

    def complete(self, prompt: str, tokens: int = 12) -> tuple[dict[str, Any], int]:
        """Return the ``tokens`` that follow a prompt, and how many of the prompt's were cached."""
        body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 3}
        body["ignore_eos"] = True
        answer = json.loads(self._post("/v1/completions", body))
        (choice,) = answer["choices"]
        details = answer["usage"]["prompt_tokens_details"] or {}
        return {"text": choice["text"], "logprobs": choice["logprobs"]}, details.get("cached_tokens") or 0

    def reset(self) -> None:
        """Empty vLLM's own prefix cache."""
        wait_until("every page is free", lambda: json.loads(self._post("/reset_prefix_cache", {}))["success"])

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        with _open(f"{self._url}/metrics", timeout=REQUEST_DEADLINE_S) as response:
            lines = response.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} "))
        )

    def kill(self) -> set[str]:
        """Send SIGKILL to every process of the server; return what it left in shared memory."""
        return kill_group(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _open(request, timeout=REQUEST_DEADLINE_S) as response:
            content: bytes = response.read()
            return content

    def _is_healthy(self) -> bool:
        if self._process.poll() is not None:
            raise EngineRefused(self.log)
        try:
            with _open(f"{self._url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False
